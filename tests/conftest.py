"""Settings for every test: one thread a process, since the suite runs its files in parallel. And what fuzzing adds."""

from collections.abc import Generator
from typing import Any

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz", "fuzzing (tests/fuzz, `-m fuzz`)")
    group.addoption("--fuzz-seed", type=int, default=0, help="seed of all cases")
    group.addoption("--fuzz-scale", type=float, default=1.0, help="times as many cases")
    group.addoption("--fuzz-case", type=int, help="only this case")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The counts of the harness."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    for report in reports:
        for name, text in getattr(report, "user_properties", ()):
            if name == "fuzz" and report.when == "call":
                terminalreporter.write_line(text)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Half a surrogate pair in a captured log, from a name that is not UTF-8, cannot travel from a worker process."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report
