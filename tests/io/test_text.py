"""Text that came from elsewhere, made fit for terminals, tables, pictures and pages."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anyres.cli.main import main
from anyres.cli.terminal import note, print_table, safe_streams, say
from anyres.evaluation.results import read_csv, write_csv
from anyres.io.fonts import drawable, font_for
from anyres.io.hub import model_card
from anyres.io.text import csv_text, from_csv, printable, shorten
from anyres.tasks.drawing import draw_clip, draw_detections, draw_segmentation
from tests.evaluation.helpers import make_row

NASTY = {
    "markup": "d[/foo] [red]a[/] :smile: [bold]",
    "escape sequences": "\x1b[2J\x1b]0;title\x07\x9b31m",
    "reversed": "photo_\u202egnp.exe\u2066\u200f",
    "lines": "one\ntwo\rthree\u2028four\x0bfive\tsix\x85seven",
    "bytes": os.fsdecode(b"caf\xe9\xff.png"),
    "mathtext": r"$\foo$ x_1^2 \frac{ % & $$",
    "page": "</script><img src=x onerror=alert(1)>'\"&lt;",
    "formula": '=HYPERLINK("http://example.org","x")',
    "scripts": "猫 あ 😀 עברית العربية ไทย",
    "long": "x" * 10_000,
    "underscore": "_hidden",
    "yaml": "a: [b # {c\n---\n",
    "empty": "",
}
SAFE = {"tab": "\t", "space": " ", "line": "\n"}


def harmless(text: str) -> bool:
    """No control but the end of a line, nothing that reorders, no half of a surrogate pair."""
    return printable(text, keep="\n") == text and text.encode() is not None


def test_what_shows_itself_stays() -> None:
    for text in ("", "plain.png", "a b", "über 猫 😀", "نمی\u200cدانم", "👩\u200d🔬", "é", r"C:\new\x.png",
                 "Screenshot\u202f9.41\u00a0PM\u3000.png"):  # fmt: skip
        assert printable(text) == text
    assert printable("\x1b[31m\n\t\x7f\x9b\u202e\u2066\u200b\ufeff\u2028") == (
        r"\x1b[31m\n\t\x7f\x9b\u202e\u2066\u200b\ufeff\u2028"
    )
    assert printable(os.fsdecode(b"a\xff")) == r"a\xff"
    assert printable(ValueError("\x07")) == r"\x07"
    assert printable("\ud800\U000e0041") == r"\ud800\U000e0041"


@given(st.text(alphabet=st.characters(), max_size=40))
def test_any_text_is_made_harmless(text: str) -> None:
    assert harmless(printable(text))
    assert "\n" not in printable(text)


def test_shorten() -> None:
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "ab…efg"
    assert len(shorten("x" * 10_000, 24)) == 24


@pytest.mark.parametrize("lead", ["=", "+", "-", "@", "\t=", " =", "\n=", "＝", "'", "\r+"])
def test_no_cell_is_a_formula(lead: str) -> None:
    text = f"{lead}1+cmd|' /C calc'!A1"
    (cell,) = next(csv.reader(io.StringIO(csv_text([[text]]))))
    assert cell[0] not in "=+-@\t\r\n＝ "
    assert from_csv(cell) == printable(text, keep="\n")


def test_numbers_and_words_in_a_table_stay_as_they_are() -> None:
    row = ["-3", "+0.5e-7", "-.5", "a=b", "2-1", -3, -0.1, None, 5, "–", "x'y", float("-inf")]
    assert csv_text([row]) == "-3,+0.5e-7,-.5,a=b,2-1,-3,-0.1,,5,–,x'y,-inf\n"


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp"]) | st.just("\n"))))
def test_csv_is_read_back_as_written(texts: list[str]) -> None:
    rows = list(csv.reader(io.StringIO(csv_text([texts, ["end"]]))))
    assert [from_csv(cell) for cell in rows[0]] == texts


@pytest.mark.parametrize("kind", NASTY)
def test_the_table_of_a_sweep_holds_any_name(kind: str, tmp_path: Path) -> None:
    rows = [make_row(NASTY[kind], 8, 8, 50.0, note="-x"), make_row("b", 8, 8, 40.0)]
    write_csv(rows, tmp_path / "sweep.csv")
    read = read_csv(tmp_path / "sweep.csv")
    assert [row.model for row in read] == [printable(NASTY[kind], keep="\n"), "b"]
    assert [row.note for row in read] == ["-x", ""]
    assert harmless((tmp_path / "sweep.csv").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", NASTY)
@pytest.mark.parametrize("columns", ["20", "80", None])
def test_tables_show_all_of_any_cell(
    kind: str, columns: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", columns)
    print_table([NASTY[kind], "label", *"abcdefg"], [[f"{NASTY[kind]}!", "[red]z", *["-12.25"] * 7]])
    out = capsys.readouterr().out
    assert harmless(out)
    shown = "".join(out.split())
    assert out.count("-12.25") == 7  # numbers are not folded
    for char in f"{printable(NASTY[kind])}![red]z":
        assert char.isspace() or char in shown
    if columns is None:
        assert printable(NASTY[kind]).rstrip() in out
        assert "[red]z" in out


def test_columns_of_numbers_stand_at_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["name", "score", "label"], [["a", "-1.5*", "1.2.3"], ["b", "–", "x"], ["c", "100.0 ", ""]])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    ends = {line.find(word) + len(word) for line, word in zip(lines[2:], ("-1.5*", "–", "100.0"), strict=True)}
    assert len(ends) == 1
    assert [line.find(word) for line, word in zip(lines[2:], ("1.2.3", "x"), strict=False)] == [
        lines[0].find("label")
    ] * 2


def test_wide_letters_keep_columns_straight(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.cells import cell_len

    print_table(["name", "n"], [["猫猫.png", "1"], ["é.png", "20"]])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert cell_len(lines[2]) == cell_len(lines[3]) == cell_len(lines[0])


def test_lines_log_and_warnings_are_made_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(value for kind, value in NASTY.items() if kind != "long")
    with safe_streams():
        say(text)
        note(text)
        # pytest keeps the raw text of these, and its workers cannot send half a surrogate pair.
        text = text.encode("utf-8", "replace").decode()
        logging.getLogger("anyres.data").warning("skipped %s", text)
        warnings.warn(text, stacklevel=1)
        note(NASTY["long"])
    out, err = capsys.readouterr()
    assert harmless(out + err)
    whole = printable("".join(value for kind, value in NASTY.items() if kind != "long"))
    assert out == whole + "\n"
    lines = err.splitlines()
    assert lines[:2] == [whole, f"skipped {printable(text)}"]
    assert lines[2].endswith(f": UserWarning: {printable(text)}")
    assert len(lines[3]) == 2000
    assert len(lines) == 4


def test_sentences_about_mistakes_are_made_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "\x1b[31mred\n/x"]) == 2
    assert capsys.readouterr().err.startswith(r"anyres: There is no file or folder \x1b[31mred\n/x: ")


@pytest.mark.parametrize("kind", NASTY)
def test_pictures_show_any_name(kind: str) -> None:
    image = Image.new("RGB", (32, 24), "grey")
    names = [NASTY[kind], "background"]
    classes = np.zeros((24, 32), dtype=np.int64)
    legend = draw_segmentation(image, classes, names)
    assert legend.width < 1600
    boxes = np.array([[2, 4, 20, 20]])
    draw_detections(image, boxes, [0], [0.5], names)
    draw_clip(np.zeros((4, 24, 32, 3), dtype=np.uint8), [f"{name}  0.5" for name in names])


def test_letters_without_a_font_are_escaped() -> None:
    assert drawable("Größe ≤ Жβ") == "Größe ≤ Жβ"
    assert font_for("Größe").name == "DejaVu Sans"
    lacking = "\U00013000"  # a hieroglyph
    known = any(lacking in drawable(f"{lacking}{other}") for other in ("", "a"))
    assert known or drawable(f"a{lacking}") == r"a\U00013000"


@pytest.mark.parametrize("kind", NASTY)
def test_the_card_of_a_model_holds_any_name(kind: str) -> None:
    text = NASTY[kind]
    card = model_card(
        {"architecture": text, "num_classes": 2, "pretrained_cfg": {"license": text}}, "image-classification"
    )
    header, body = card.removeprefix("---\n").split("\n---\n", 1)
    values = yaml.safe_load(header)
    assert values["license"] == (text.lower() or "other")
    assert values["tags"] == ["image-classification", "timm", "multi-resolution"]
    assert body.startswith("# ")
    assert "A network of 2 classes" in body.splitlines()[2]
    assert harmless(card)


def test_the_card_of_a_model_names_data_and_base() -> None:
    own = {"data": "hf:me/birds", "base_model": "hf-hub:you/net"}
    card = model_card({"architecture": "a", "num_classes": 2, "anyres": own}, "image-classification")
    values = yaml.safe_load(card.split("---\n")[1])
    assert (values["datasets"], values["base_model"]) == (["me/birds"], "you/net")
    assert "Training data: hf:me/birds.\nStarted from: hf-hub:you/net.\n" in card
    plain = model_card({"architecture": "a", "num_classes": 2}, "image-classification")
    assert "Training sizes: not recorded.\n\n```python" in plain


PROGRAM = """
# In a file called anyres, which starts without torch.
import sys
from anyres.cli import main as cli
from anyres.cli.terminal import print_csv, print_table, say

def show(layout: str = "table") -> None:
    '''Show – something.'''
    rows = [[str(number), "–"] for number in range(9)]
    print_table(["a", "b"], rows) if layout == "table" else print_csv(["a", "b"], rows)
    say("the end – ")

def fail() -> None:
    '''Fail.'''
    raise RuntimeError("\\x1b[31mred\\n[2J")

cli.COMMANDS = {"show": show, "fail": fail}
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("arguments", "redirection", "code", "error"),
    [
        ("show", "", 0, ""),
        ("show", ">&- 2>&-", 0, ""),
        ("show", "| true", 0, ""),  # the reader of the pipe has gone before the first line
        ("show layout=csv", "| true", 0, ""),
        ("show", ">/dev/full", 2, "anyres: the disk is full: free some space, or choose another output folder.\n"),
        ("trian", ">&- 2>&-", 2, ""),
        ("trian", "2>/dev/full", 2, ""),
    ],
)
def test_streams_that_are_closed_or_full(
    arguments: str, redirection: str, code: int, error: str, tmp_path: Path
) -> None:
    (tmp_path / "anyres").write_text(PROGRAM)
    line = f"{sys.executable} {tmp_path / 'anyres'} {arguments} {redirection}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, error)
    assert ("the end – " in done.stdout) == (redirection == "")


def test_the_traceback_of_a_defect_is_made_harmless(tmp_path: Path) -> None:
    (tmp_path / "anyres").write_text(PROGRAM)
    done = subprocess.run([sys.executable, tmp_path / "anyres", "fail"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("RuntimeError: \\x1b[31mred\n[2J\n")
    assert harmless(done.stderr)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_results_are_printed_by_the_first_process(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    with safe_streams():
        say("result")
        note("problem")
    assert capsys.readouterr() == ("result\n" * (rank == "0"), "problem\n")


@pytest.mark.parametrize("arguments", [["show"], ["show", "layout=csv"], ["--help"]])
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_output_in_any_encoding(arguments: list[str], encoding: str, tmp_path: Path) -> None:
    (tmp_path / "anyres").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, str(tmp_path / "anyres"), *arguments]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert ("–" if encoding == "cp1252" else r"\u2013") in done.stdout.decode(encoding)


def test_json_keeps_the_bytes_of_a_name(tmp_path: Path) -> None:
    from anyres.training.state import write_config, write_summary

    summary = {"bad_images": {NASTY["bytes"]: NASTY["lines"], "über": "\x1b"}}
    write_summary(tmp_path, summary)
    text = (tmp_path / "summary.json").read_text(encoding="utf-8")
    assert json.loads(text) == summary
    assert "über" in text
    write_config(tmp_path, {"data": NASTY["bytes"], "output": NASTY["escape sequences"]})
    read = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert read == {"data": NASTY["bytes"], "output": NASTY["escape sequences"]}
