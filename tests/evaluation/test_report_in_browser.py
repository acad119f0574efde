"""The report in Chromium, driven by a script in a page around it: no console error, working filters, phone width."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from anyres.evaluation import sweep
from tests.evaluation.helpers import GreySource, TableModel

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<script>document.title='owned'</script><b>"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium"),
]


class Sided(TableModel):
    """Right for all images up to 24 pixels, and beyond for those of the first class alone."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        answers = super().forward(images)
        if images.shape[2] > 24:
            answers = torch.eye(answers.shape[1])[torch.zeros(len(images), dtype=torch.long)]
        return answers


def report(folder: Path) -> str:
    names = [EVIL, "a" * 90, "class2"]
    models: dict[str, Any] = {}
    for name, kind in (("plain", TableModel), ("sided " + EVIL, Sided)):
        models[name] = kind(torch.eye(3).repeat(4, 1), train_sizes=[[16, 16]], label_names=names)
    source = GreySource([0, 1, 2] * 4, classes=3)
    source.label_names = names
    result = sweep(models, source, [(16, 16), (24, 24), (32, 32), (12, 20)], folder, cost=False)
    return result.files["report"].read_text(encoding="utf-8")


def in_browser(page: str, script: str, folder: Path, width: int = 360) -> Any:
    """Open a page in a frame of this width, and return what `script` returns, which has `page` and `choose`."""
    listener = "<script>window.wrong = []; addEventListener('error', e => wrong.push(e.message));</script>"
    framed = html.escape(page.replace("<head>", f"<head>{listener}", 1), quote=True)
    harness = f"""<!DOCTYPE html><meta charset='utf-8'><pre id='answer'></pre>
<iframe id='frame' style='width:{width}px;height:800px;border:0' srcdoc="{framed}"></iframe><script>
document.getElementById('frame').onload = () => {{
  const page = document.getElementById('frame').contentWindow, found = page.document;
  const choose = (title, text, number = 0) => {{
    const select = found.querySelectorAll(`select[data-filter="${{title}}"]`)[number];
    select.value = [...select.options].find(option => option.textContent === text).value;
    select.dispatchEvent(new page.Event('change'));
  }};
  const answer = (() => {{ {script} }})();
  document.getElementById('answer').textContent = JSON.stringify(answer);
}};
</script>"""
    (folder / "harness.html").write_text(harness, encoding="utf-8")
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
         "--virtual-time-budget=5000", f"--user-data-dir={folder / 'profile'}", (folder / "harness.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    text = done.stdout.partition('<pre id="answer">')[2].partition("</pre>")[0]
    return json.loads(html.unescape(text))


def test_the_report_works_in_a_browser(tmp_path: Path) -> None:
    script = """
      const state = () => found.querySelectorAll('.gallery figure').length;
      const answer = {wrong: page.wrong, title: found.title, start: state()};
      const model = found.querySelectorAll('select[data-filter=model]')[2].options[1].textContent;
      choose('model', model, 2);
      answer.sided = state();
      choose('right at', '32');
      answer.right_at_32 = state();
      choose('right at', '16'); choose('wrong at', '32');
      answer.right_at_16 = state();
      choose('class', 'class2');
      answer.of_a_class = state();
      answer.caption = found.querySelector('.gallery figcaption').textContent;
      choose('model', model, 1); choose('size', '32');
      answer.confusions = [...found.querySelectorAll('table.errors')[1].querySelectorAll('tbody tr')].map(
        row => [...row.querySelectorAll('td')].map(cell => cell.textContent));
      choose('model', model, 0);
      answer.classes = [...found.querySelectorAll('table.errors')[0].querySelectorAll('tbody tr')].map(
        row => [...row.children].map(cell => cell.textContent));
      answer.width = found.documentElement.scrollWidth;
      answer.wide = [...found.querySelectorAll('body *')].filter(
        node => node.getBoundingClientRect().right > 360 && !node.closest('.scroll, .strip'))
        .map(node => node.outerHTML.slice(0, 80));
      return answer;
    """
    found = in_browser(report(tmp_path / "sweep"), script, tmp_path)
    assert found["wrong"] == []
    assert found["title"].startswith("Top-1 accuracy")  # the name with a script in it was text
    assert found["start"] == 0  # the first model changes its mind on no image
    assert (found["sided"], found["right_at_32"], found["right_at_16"], found["of_a_class"]) == (8, 0, 8, 4)
    assert found["caption"].startswith("grey/")
    assert "16: class2" in found["caption"]
    assert found["confusions"] == [["4", "", ""], ["4", "", ""], ["4", "", ""]]
    assert [row[0] for row in found["classes"]] == [EVIL, "a" * 90, "class2"]
    assert found["classes"][1][1:] == ["100.0", "100.0", "0.0", "100.0"]
    assert found["wide"] == []
    assert found["width"] <= 360
