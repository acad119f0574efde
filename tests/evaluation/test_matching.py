"""What a score counts as right: the output that means an image's class, or no score at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from anyres.data import open_source
from anyres.data.config import DataConfig
from anyres.errors import UserError
from anyres.evaluation.evaluate import evaluate, open_test_source
from tests.evaluation.helpers import TableModel


def classifier(count: int, **cfg: Any) -> TableModel:
    """A model of `count` outputs that takes an image of brightness 10·i for class i."""
    model = TableModel(torch.eye(count), **{"mean": (0.0,), "std": (1.0,), "label_names": None, **cfg})
    model.num_classes = count
    return model


def write_folder(root: Path, brightness: dict[str, int]) -> Path:
    for name, value in brightness.items():
        (root / name).mkdir(parents=True)
        for copy in range(2):
            Image.new("L", (20, 20), value).save(root / name / f"{copy}.png")
    return root


def test_numbers_are_numbers_and_not_places_in_sorted_order(tmp_path: Path) -> None:
    # Sorted, "10" comes before "2".
    folder = write_folder(tmp_path, {"2": 20, "10": 100, "007": 70})
    for model in (classifier(1000), classifier(12), classifier(12, label_names=[str(i) for i in range(12)])):
        assert evaluate(model, open_source(folder, "all", in_chans=1), (16, 16)).scores["top1"] == 100


@pytest.mark.parametrize("names", [("cats", "dogs"), ("1000", "2"), ("crane", "tench")])
def test_an_imagenet_model_has_no_score_on_other_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = write_folder(tmp_path, dict.fromkeys(names, 0))
    with pytest.raises(UserError, match=rf"'{names[0]}', '{names[1]}'.*ImageNet's 1000 classes.*names=FILE"):
        open_test_source(classifier(1000), str(folder), "all")


def test_every_model_of_a_sweep_is_matched_before_it_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = str(write_folder(tmp_path, {"cat": 0, "dog": 10}))
    one, other = classifier(3, label_names=["cow", "dog", "cat"]), classifier(2, label_names=["cat", "dog"])
    source = open_test_source(one, folder, "all", others=[other])
    assert DataConfig.of(one).places(source).tolist() == [2, 1]
    assert DataConfig.of(other).places(source).tolist() == [0, 1]
    assert "2 of the 3 classes" in caplog.text
    assert "without 'cow'" in caplog.text
    assert "normalised" not in caplog.text
    open_test_source(one, folder, "all", others=[classifier(2, label_names=["cat", "dog"], mean=None)])
    assert "std 0.226 of ImageNet, as the model states none that fit" in caplog.text  # the folder's are for colours
    for unknown in (classifier(2), classifier(2, label_names=["a", "b"])):  # just created; trained on something else
        with pytest.raises(UserError, match="'cat', 'dog'"):
            open_test_source(one, folder, "all", others=[unknown])


def test_names_must_be_as_many_as_outputs() -> None:
    with pytest.raises(UserError, match="states 3 names for its 2 outputs"):
        _ = DataConfig.of(classifier(2, label_names=["a", "b", "c"])).label_names


class Segmenter(nn.Module):
    """Takes every pixel for the class that its brightness over 10 is."""

    task = "segmentation"
    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        names = ["sky", "sea", "land", "road"]
        self.pretrained_cfg = {"label_names": names, "input_size": (1, 32, 32), "mean": (0.0,), "std": (1.0,)}
        self.register_buffer("weight", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        classes = (x[:, 0] * 255 / 10).round().long().clamp(0, self.num_classes - 1)
        return nn.functional.one_hot(classes, self.num_classes).permute(0, 3, 1, 2).float()


def test_masks_may_have_a_part_of_the_models_classes(tmp_path: Path) -> None:
    """What the masks number 0 and 1 are the model's 2 and 0, and are right where it says so."""
    mask = np.tile(np.array([[0, 1]], dtype=np.uint8), (8, 4))
    for part, values in (("images", np.array([20, 0], dtype=np.uint8)[mask]), ("masks", mask)):
        (tmp_path / part).mkdir()
        Image.fromarray(values).save(tmp_path / part / "a.png")
    (tmp_path / "classes.txt").write_text("Land\nsky\n")
    source = open_test_source(Segmenter(), str(tmp_path), "train")
    assert DataConfig.of(Segmenter()).places(source).tolist() == [2, 0]
    measured = evaluate(Segmenter(), source, (8, 8))
    assert measured.scores["pixel_accuracy"] == 100
    assert measured.by_class == {"sky": 100, "sea": None, "land": 100, "road": None}
    (tmp_path / "classes.txt").unlink()  # numbers, of which nobody says what they mean
    with pytest.raises(UserError, match="are not among the 4"):
        open_test_source(Segmenter(), str(tmp_path), "train")
