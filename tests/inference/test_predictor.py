"""The one way from pictures and clips to results."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import anyres
from anyres.cli.main import main
from anyres.data import BadImage, Item
from anyres.data.sources import Digits
from anyres.errors import UserError
from anyres.evaluation import evaluate
from anyres.inference.predictor import Predictor
from anyres.tasks.results import Classes, Segments
from anyres.tasks.segmentation.network import Segmenter

SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}


@pytest.fixture(scope="module")
def classifier() -> Any:
    torch.manual_seed(0)
    model: Any = anyres.create_model("resformer_tiny", num_classes=3, **SMALL).eval()
    nn.init.normal_(model.head.weight)
    names = {"label_names": ["ape", "bee", "cat"], "train_sizes": [[16, 16], [24, 32]], "crop_pct": 1.0}
    model.pretrained_cfg = {**model.pretrained_cfg, **names}
    return model


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_the_same_picture_in_every_form_gives_the_same(classifier: Any, picture: Path) -> None:
    image = Image.open(picture)
    pixels = np.asarray(image)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    forms: list[Any] = [picture, str(picture), picture.read_bytes(), image, pixels, tensor, tensor.float() / 255]
    predictor = anyres.Predictor(classifier)
    assert predictor.size == (24, 32)  # the largest that it was trained at
    results = predictor(forms)
    assert all(result.labels == results[0].labels for result in results)
    assert all(result.probabilities == pytest.approx(results[0].probabilities, abs=1e-5) for result in results)
    one = predictor(picture)
    assert isinstance(one, Classes)
    assert one.rows() == results[0].rows()
    assert one.labels[0] in ("ape", "bee", "cat")


def test_a_model_gets_its_mode_back(classifier: Any, picture: Path) -> None:
    classifier.train()
    anyres.Predictor(classifier, 16)(picture)
    assert classifier.training
    classifier.eval()


def test_batches_and_unreadable_items_keep_their_places(classifier: Any, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    wanted = [picture, tmp_path / "bad.png", picture]
    for batch_size in (1, 2, 8):
        results = Predictor(classifier, 16, batch_size=batch_size, topk=1)(wanted)
        assert [bool(result.problem) for result in results] == [False, True, False]
        assert [len(result.rows()) for result in results] == [1, 0, 1]
        assert results[0].probabilities == pytest.approx(results[2].probabilities, rel=1e-5)
    with pytest.raises(BadImage, match="not an image"):
        Predictor(classifier, 16)(tmp_path / "bad.png")


@pytest.mark.parametrize(("options", "words"), [
    ({"size": 2}, "below the model's minimum"), ({"size": "12,24"}, "a single size is"), ({"topk": 0}, "topk is 0"),
    ({"threshold": 0.5}, "'threshold' does not exist"),
])  # fmt: skip
def test_wrong_settings_are_refused(classifier: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Predictor(classifier, **options)


def test_numbers_that_are_no_pixels_are_refused(classifier: Any) -> None:
    with pytest.raises(UserError, match="values outside 0 to 1"):
        Predictor(classifier, 16)(torch.randn(3, 20, 20))


class Grey(nn.Module):
    """Takes a grey picture for the class of its brightness."""

    num_classes, in_chans = 10, 1

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"label_names": list("0123456789"), "input_size": (1, 8, 8)}

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 1
        return torch.eye(10)[(x.mean((1, 2, 3)).abs() * 9).round().long().clamp(max=9)]


def test_a_grey_model_sees_grey_pictures_as_in_evaluation(tmp_path: Path) -> None:
    source = Digits("val")
    seen = Predictor(Grey(), source=source).stream(source.item(index) for index in range(len(source)))
    right = sum(cast(Classes, result).labels[0] == str(source[i][1]) for i, result in enumerate(seen))
    assert 100 * right / len(source) == pytest.approx(evaluate(Grey(), source, (8, 8)).scores["top1"])
    Image.new("RGB", (9, 9), (250, 10, 10)).save(tmp_path / "colour.png")
    assert Predictor(Grey())(tmp_path / "colour.png").labels


def test_maps_are_of_the_size_of_the_picture(picture: Path) -> None:
    torch.manual_seed(0)
    model: Any = Segmenter.build("resformer_tiny", 3, dict(SMALL), head="semantic_fpn", channels=16).eval()
    model.pretrained_cfg["label_names"] = ["sky", "sea", "land"]
    results = Predictor(model, 32)([picture, np.zeros((50, 20, 3), np.uint8)])
    assert [result.classes.shape for result in results] == [(24, 32), (50, 20)]
    assert isinstance(results[0], Segments)
    assert sum(float(row[1].split()[0]) for row in results[0].rows()) == pytest.approx(100, abs=0.2)
    assert results[0].draw(Item("a", picture, None)).width > 32


def test_a_model_for_a_task_is_no_backbone_to_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = Segmenter.build("resformer_tiny", 3, dict(SMALL), head="semantic_fpn", channels=16)
    model.save_pretrained(tmp_path / "model")
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "out.pth"), "to=published"]) == 2
    assert "is a model for segmentation, but only backbones can be converted" in capsys.readouterr().err
