"""The pages that are made from the code say what the code says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.skipif(not DOCS.is_dir(), reason="the pages stand in the repository only")
def test_the_page_of_models_is_up_to_date() -> None:
    page = runpy.run_path(str(DOCS / "make_models.py"))["text"]()
    assert page == (DOCS / "models.md").read_text(), "run docs/make_models.py"
