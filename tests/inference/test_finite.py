"""Numbers that are not finite end every command that would turn them into a score or a label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from anyres.data import Item
from anyres.data.detection import DigitScenes
from anyres.data.segmentation import ComposedDigits
from anyres.data.video_sources import MOTIONS, MovingDigits
from anyres.errors import UserError
from anyres.evaluation import evaluate, sweep
from anyres.inference.files import draw_results
from anyres.inference.predictor import Predictor
from anyres.models._registry import create_model
from anyres.tasks.detection.network import HEADS, Detector
from anyres.tasks.finite import check_weights
from anyres.tasks.segmentation.network import Segmenter
from tests.evaluation.helpers import GreySource, TableModel

SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2}
NUMBERS = [float("nan"), float("inf"), float("-inf")]


def spoil(layer: nn.Module, number: float) -> Any:
    """Add `number` to one output of a layer whose weights are fine."""

    def add(_layer: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[(0,) * output.ndim] += number
        return output

    return layer.register_forward_hook(add)


def tiny_detector(head: str = "faster_rcnn") -> Any:
    torch.manual_seed(0)
    options = {"channels": 16, "hidden": 16, "num_keypoints": 4}
    return Detector.build("resformer_tiny", 10, dict(SMALL), head=head, **options).eval()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(np.full((40, 40, 3), 20, np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize("number", NUMBERS)
def test_weights_name_the_model_and_the_tensor(number: float) -> None:
    model = create_model("resformer_tiny", num_classes=3, **SMALL)
    check_weights(model)
    with torch.no_grad():
        model.get_parameter("blocks.1.norm1.bias")[3] = number
    with pytest.raises(UserError, match=r"1 of the \d+ weights of resformer_tiny.* contain NaN .* blocks.1.norm1.bias"):
        check_weights(model)
    with pytest.raises(UserError, match=r"weights of my\.pth contain NaN"):
        check_weights(model, "my.pth")


@pytest.mark.parametrize("number", NUMBERS)
def test_logits(number: float, tmp_path: Path, picture: Path) -> None:
    class Diverged(TableModel):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = super().forward(images).clone()
            logits[-1, 1] = number
            return logits

    model, source = Diverged(torch.eye(6)), GreySource([0, 1, 2], classes=6)
    with pytest.raises(UserError, match="outputs of Diverged for 1 of the 3 items of grey contain NaN"):
        evaluate(model, source, (16, 16), batch_size=3)
    with pytest.raises(UserError, match="contain NaN"):
        sweep({"m": model}, source, [(16, 16)], tmp_path / "out", cost=False)
    model.pretrained_cfg |= {"input_size": (3, 32, 32), "mean": (0,) * 3, "std": (1,) * 3}
    with pytest.raises(UserError, match=r"for .*a\.png contain NaN"):
        Predictor(model, 16)(str(picture))


def test_a_sweep_names_the_model_of_bad_weights(tmp_path: Path) -> None:
    models = {"good": TableModel(torch.eye(6)), "bad": TableModel(torch.eye(6) / 0)}
    with pytest.raises(UserError, match="weights of bad contain NaN"):
        sweep(models, GreySource([0, 1], classes=6), [(16, 16)], tmp_path / "out", cost=False)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_maps(number: float, tmp_path: Path, picture: Path) -> None:
    torch.manual_seed(0)
    model: Any = Segmenter.build("resformer_tiny", 11, dict(SMALL), head="semantic_fpn", channels=16).eval()
    model.pretrained_cfg["label_names"] = ComposedDigits("val").label_names
    spoil([layer for layer in model.head.modules() if isinstance(layer, nn.Conv2d)][-1], number)
    with pytest.raises(UserError, match="outputs of resformer_tiny for digits/val/0000 contain NaN"):
        evaluate(model, ComposedDigits("val"), (32, 32))
    with pytest.raises(UserError, match="for a contain NaN"):
        list(draw_results(Predictor(model, 32), [Item("a", picture, None)], tmp_path / "out"))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("head", HEADS)
def test_boxes_before_their_choice(head: str, number: float, tmp_path: Path, picture: Path) -> None:
    """Suppression and thresholds would drop what is no number."""
    model = tiny_detector(head)
    layers = [
        layer
        for name, layer in model.head.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and "mask" not in name and "keypoint" not in name
    ]
    for layer in (layers[0], layers[-1]):
        handle = spoil(layer, number)
        with pytest.raises(UserError, match=r"outputs of resformer_tiny.* for the images \[1\] contain NaN"):
            evaluate(model, DigitScenes("val", masks=True, keypoints=True, side=64), (64, 64))
        with pytest.raises(UserError, match=r"outputs of resformer_tiny.* for a contain NaN"):
            list(draw_results(Predictor(model, 64), [Item("a", picture, None)], tmp_path / "out"))
        handle.remove()


class Lost(nn.Module):
    """A classifier of clips whose answers are no numbers."""

    num_classes, in_chans, num_frames, minimum_size, task = 6, 3, 2, 1, "video"

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 32, 32), "num_frames": 2, "label_names": MOTIONS}

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return clips.new_full((len(clips), 6), torch.inf)


def test_clips(tmp_path: Path) -> None:
    source = MovingDigits("val")
    with pytest.raises(UserError, match=r"outputs of Lost for \d+ of the \d+ items of moving digits/val contain NaN"):
        evaluate(Lost(), source, (32, 32))
    item = source.item(0)
    with pytest.raises(UserError, match=r"outputs of Lost for .* contain NaN"):
        list(draw_results(Predictor(Lost(), 32), [item], tmp_path / "out"))
