from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from anyres import create_model
from anyres.data import open_source
from anyres.data.config import DataConfig
from anyres.errors import UserError
from anyres.evaluation import read_csv, sweep
from anyres.evaluation.results import Row
from anyres.inference.modelspec import timm_model
from anyres.io.files import LOCK, RECORD
from anyres.tasks.evidence import Answers, wilson
from tests.data.test_kept import Photos
from tests.evaluation.helpers import GreySource, TableModel
from tests.typed import as_a

SQUARES = [(16, 16), (24, 24), (32, 32)]


def source() -> GreySource:
    return GreySource([0, 1, 2, 3, 4, 5], classes=6, broken=(5,))


def test_a_sweep_writes_table_pictures_and_report(tmp_path: Path) -> None:
    models = {
        "good": TableModel(torch.eye(6), train_sizes=[[16, 16], [32, 32]]),
        "fixed": TableModel(torch.eye(6).flip(0), refuses=((16, 16), (24, 24), (12, 20))),
    }
    seen = []
    result = sweep(
        models, source(), [*SQUARES, (12, 20)], tmp_path / "out", cost_seconds=0.0, command="the command",
        progress=lambda row, number, total: seen.append((row.model, number, total)),
    )  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        RECORD, LOCK, "pareto.png", "report.html", "sweep.csv", "sweep.png",
    ]  # fmt: skip
    assert set(result.files) == {"table", "picture", "pareto", "report"}
    assert read_csv(result.files["table"]) == result.rows
    assert seen == [(name, number, 8) for number, name in enumerate(["good"] * 4 + ["fixed"] * 4, 1)]
    by_size = {(row.model, row.size): row for row in result.rows}
    assert [by_size["good", size].trained for size in SQUARES] == [True, False, True]
    assert by_size["good", (12, 20)].score == 100
    assert by_size["good", (16, 16)].bad == 1
    assert by_size["good", (16, 16)].count == 5
    refused = by_size["fixed", (16, 16)]
    assert refused.score is None
    assert refused.note == "Input height (16) doesn't match model (32)."
    assert by_size["fixed", (32, 32)].score == 0
    assert result.areas == {"good": pytest.approx(100), "fixed": None}
    text = result.files["report"].read_text()
    assert "the command" in text
    assert "good" in text
    assert "fixed" in text


def test_an_interrupted_sweep_continues(tmp_path: Path) -> None:
    def stop(row: Row, number: int, total: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    model = TableModel(torch.eye(6))
    with pytest.raises(KeyboardInterrupt):
        sweep({"m": model}, source(), SQUARES, tmp_path, cost=False, progress=stop)
    journal = tmp_path / "sweep.partial.jsonl"
    assert journal.exists()
    model.calls.clear()
    result = sweep({"m": model}, source(), SQUARES, tmp_path, cost=False)
    assert (16, 16) not in model.calls[:-1]  # but for the samples of the report nothing is done again
    assert set(model.calls) == {(32, 32)}
    assert [row.score for row in result.rows] == [100, 100, 100]
    assert set(result.evidence) == {("m", size) for size in SQUARES}  # of the rows that were measured before, too
    assert not journal.exists()


def test_a_share_of_the_images_is_taken_and_said(tmp_path: Path) -> None:
    labels = [0, 1, 2] * 8
    model = TableModel(torch.eye(3).repeat(8, 1))
    result = sweep({"m": model}, GreySource(labels, classes=3), SQUARES, tmp_path, cost=False, images=6)
    assert [(row.count, row.of) for row in result.rows] == [(6, 24)] * 3
    seen = result.evidence["m", (16, 16)]
    assert isinstance(seen, Answers)
    assert sorted(seen.truth.tolist()) == [0, 0, 1, 1, 2, 2]
    assert "6 images of grey (of 24, evenly spread over the classes)" in result.files["report"].read_text()
    assert read_csv(result.files["table"])[0].of == 24


def test_rows_have_the_interval_over_images(tmp_path: Path) -> None:
    row = sweep({"m": TableModel(torch.eye(6))}, source(), SQUARES[:1], tmp_path, cost=False).rows[0]
    assert (row.low, row.high) == pytest.approx(wilson(5, 5))


def test_several_runs_are_shown_as_one(tmp_path: Path) -> None:
    models = {"s0": TableModel(torch.eye(6)), "s1": TableModel(torch.eye(6).flip(0)), "b": TableModel(torch.eye(6))}
    result = sweep(models, source(), SQUARES[:2], tmp_path, cost=False, groups={"seeds": ["s0", "s1"]})
    assert [row.model for row in result.rows] == ["s0", "s0", "s1", "s1", "b", "b", "seeds", "seeds"]
    assert [(row.model, row.score, row.low, row.high) for row in result.shown][:2] == [("seeds", 50, 0, 100)] * 2
    text = result.files["report"].read_text()
    assert "seeds is the mean of 2 runs." in text
    assert "no clear difference between seeds" in text


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_images_are_decoded_once_and_results_are_those_of_every_size_alone(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores() -> list[dict[str, float]]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return [row.scores for row in sweep({"m": model}, Photos(kind), sizes, folder, cost=False).rows]

    sizes = [(8, 8), (24, 24), (90, 90), (24, 48)]
    model: Any = create_model("resformer_tiny", num_classes=3, embed_dim=24, depth=1, num_heads=2, patch_size=4)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["a", "b", "c"]}
    kept = scores()
    monkeypatch.setattr("anyres.data.kept.KEPT_BYTES", 0)
    monkeypatch.setattr("anyres.data.kept.KeptImages.item", lambda _, source, index: source.item(index))
    assert scores() == kept


@pytest.mark.parametrize("name", ["sweep.csv", "sweep.png", "pareto.png", "report.html", "sweep.partial.jsonl"])
def test_files_of_others_stop_a_sweep_before_it_works(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    model = TableModel(torch.eye(6))
    with pytest.raises(UserError, match=f"{name} exists, and it is not a sweep file as anyres wrote it"):
        sweep({"m": model}, source(), SQUARES, tmp_path, cost=False)
    assert not model.calls
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_sweep_is_repeated_into_its_folder_until_somebody_works_on_its_files(tmp_path: Path) -> None:
    for _ in range(2):
        sweep({"m": TableModel(torch.eye(6))}, source(), SQUARES, tmp_path, cost_seconds=0.0)
    with (tmp_path / "report.html").open("a") as report:
        report.write("my notes")
    with pytest.raises(UserError, match=r"report\.html exists"):
        sweep({"m": TableModel(torch.eye(6))}, source(), SQUARES, tmp_path, cost_seconds=0.0)


def test_other_weights_or_settings_are_measured_anew(tmp_path: Path) -> None:
    def stop(row: Row, number: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep({"m": TableModel(torch.eye(6))}, source(), SQUARES, tmp_path, cost=False, progress=stop)
    other = TableModel(torch.eye(6).flip(0))
    assert [row.score for row in sweep({"m": other}, source(), SQUARES, tmp_path, cost=False).rows] == [0, 0, 0]


@pytest.mark.parametrize("way", ["renamed", "outputs", "values", "depth"])
def test_other_classes_or_another_mapping_are_measured_anew(tmp_path: Path, way: str) -> None:
    """Rows of an interrupted sweep are of the classes that it was started with, whatever has the same numbers."""

    def stop(row: Row, number: int, total: int) -> None:
        raise KeyboardInterrupt

    names = [f"class{number}" for number in range(6)]
    with pytest.raises(KeyboardInterrupt):
        sweep({"m": TableModel(torch.eye(6))}, source(), SQUARES[:1], tmp_path, cost=False, progress=stop)
    other, model = source(), TableModel(torch.eye(6))
    if way == "renamed":  # in the model and in the data
        model.pretrained_cfg["label_names"] = other.label_names = ["new", *names[1:]]
    elif way == "outputs":
        model.pretrained_cfg["label_names"] = names[::-1]
    elif way == "values":
        vars(other)["table"] = torch.arange(256).numpy()
    else:
        other.bit_depth = 12
    result = sweep({"m": model}, other, SQUARES[:1], tmp_path, cost=False)
    assert len(model.calls) == 2  # a trial of the size, and the images
    assert [row.score for row in result.rows] == [0 if way == "outputs" else 100]


def test_out_of_memory_is_recorded(tmp_path: Path) -> None:
    class Greedy(TableModel):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if images.shape[2] == 24 and len(images) > 1:
                raise torch.OutOfMemoryError("no room")
            return super().forward(images)

    rows = sweep({"m": Greedy(torch.eye(6))}, source(), SQUARES, tmp_path, cost=False, batch_size=4).rows
    assert [row.score for row in rows] == [100, None, 100]
    assert rows[1].note == "out of memory in batches of 4"


def test_an_error_that_is_not_about_the_size_is_not_hidden(tmp_path: Path) -> None:
    class Broken(TableModel):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if images.any():
                raise RuntimeError("a bug")
            return super().forward(images)

    with pytest.raises(RuntimeError, match="a bug"):
        sweep({"m": Broken(torch.eye(6))}, source(), SQUARES, tmp_path, cost=False)


def test_real_models_on_real_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = create_model(
        "resformer_tiny", num_classes=10, in_chans=1, img_size=32, patch_size=4, embed_dim=48, depth=2, num_heads=3
    )
    rival: Any = timm.create_model("vit_tiny_patch16_224", num_classes=10, in_chans=1, img_size=32, depth=1)
    rival.pretrained_cfg = {"input_size": (1, 32, 32), "mean": (0.0,), "std": (0.5,), "crop_pct": 1.0}
    result = sweep(
        {"ours": ours, "timm": rival},
        open_source("digits", "val"),
        [(16, 16), (32, 32), (24, 43)],
        tmp_path,
        cost_seconds=0.0,
    )
    by_size = {(row.model, row.size): row for row in result.rows}
    assert all(by_size["ours", size].count == 360 for size in ((16, 16), (32, 32), (24, 43)))
    assert by_size["timm", (32, 32)].score is not None
    assert "match" in by_size["timm", (16, 16)].note
    assert as_a(float, by_size["ours", (32, 32)].gflops) > as_a(float, by_size["ours", (16, 16)].gflops)


def test_timm_models_change_their_size_where_they_can() -> None:
    model = timm_model("vit_tiny_patch16_224", pretrained=False)
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 96, 64)).shape == (1, 1000)
    assert DataConfig.of(model).train_sizes == ((224, 224),)
    with pytest.raises(UserError, match="did you mean"):
        timm_model("vit_tiny_patch16_225", pretrained=False)


def test_train_sizes() -> None:
    assert DataConfig.of(TableModel(torch.eye(2), train_sizes=[[24, 32], [16, 16]])).train_sizes == ((24, 32), (16, 16))
    assert DataConfig.of(TableModel(torch.eye(2), train_sizes=(128, 160))).train_sizes == ((128, 128), (160, 160))
    assert DataConfig.of(TableModel(torch.eye(2))).train_sizes == ((32, 32),)
    assert DataConfig.of(torch.nn.Identity()).train_sizes == ()


def test_nothing_to_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one"):
        sweep({}, source(), SQUARES, tmp_path)
    with pytest.raises(UserError, match="at least one"):
        sweep({"m": TableModel(torch.eye(6))}, source(), [], tmp_path)
