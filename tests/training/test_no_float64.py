"""Devices such as Apple's have no float64: neither evaluation nor training may make such a tensor on one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from anyres.data.base import Source
from anyres.data.detection import DigitScenes
from anyres.data.segmentation import ComposedDigits
from anyres.data.sources import Digits
from anyres.evaluation import evaluate
from anyres.models._registry import create_model
from anyres.tasks.detection.network import Detector
from anyres.tasks.segmentation.network import Segmenter
from anyres.training import records, train
from tests.training.helpers import small_config

SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2}


class NoFloat64(TorchDispatchMode):
    """Imitates a device on the CPU: weights are on it, and whatever is computed from a tensor that is on it.

    `Tensor.cpu` leaves it. A float64 tensor on it is an error, as Apple's is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on_device: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(leaf, nn.Parameter) or leaf in self.on_device for leaf in given):
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    if leaf.dtype == torch.float64:
                        raise RuntimeError(f"{function} makes a float64 tensor on a device that has none")
                    self.on_device[leaf] = True
        return out


@contextmanager
def no_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def cpu(tensor: Tensor) -> Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            return tensor.detach().clone()

    monkeypatch.setattr(Tensor, "cpu", cpu)
    monkeypatch.setattr(records, "FLOAT64", ())
    with NoFloat64():
        yield


def test_the_imitation_forbids_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.ones(3))
    with no_float64(monkeypatch):
        assert float(weight.sum().cpu().double()) == 3
        with torch.inference_mode(), pytest.raises(RuntimeError, match="float64"):
            weight.sum().double()
        with pytest.raises(RuntimeError, match="float64"):
            weight + torch.ones(3, dtype=torch.float64)


CASES: dict[str, tuple[Any, Source]] = {
    "classification": (lambda: create_model("resformer_tiny", num_classes=10, in_chans=1, **SMALL), Digits("val")),
    "segmentation": (
        lambda: Segmenter.build("resformer_tiny", 11, SMALL, head="semantic_fpn", channels=16),
        ComposedDigits("val"),
    ),
    "detection": (
        lambda: Detector.build("resformer_tiny", 10, SMALL, head="mask_rcnn", channels=16, hidden=16),
        DigitScenes("val", masks=True, side=64),
    ),
}


@pytest.mark.parametrize("task", CASES)
def test_evaluation(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, source = CASES[task]
    torch.manual_seed(0)
    model = build().eval()
    model.pretrained_cfg["label_names"] = source.label_names
    monkeypatch.setattr(type(source), "__len__", lambda self: 4)
    with no_float64(monkeypatch):
        assert evaluate(model, source, (64, 64), batch_size=2).count == 4


def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with no_float64(monkeypatch):
        result = train(
            small_config(tmp_path / "run", epochs=1, warmup_epochs=0, clip_grad=1.0, ema_decay=0.9, eval_batch_size=16)
        )
    assert result.status == "finished"
