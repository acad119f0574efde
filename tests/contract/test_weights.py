"""Published files in models with other channels, and through timm's own door, over every registered model."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from anyres.models._checkpoints import load_checkpoint, save_weights
from tests.contract.small import distinct_models, image, small, small_args
from tests.contract.test_contract import close

pytestmark = pytest.mark.parametrize("name", distinct_models())


@torch.inference_mode()
def test_an_rgb_file_fits_other_channels(name: str, tmp_path: Path) -> None:
    model = small(name)
    save_weights(model.to_published(model.state_dict()), tmp_path / "x.safetensors")
    x = image(1, (64, 80), model)
    grey = x[:, :1]
    cases = {1: (grey.expand_as(x), grey), 4: (x, torch.cat([x * 4 / 3, 0 * grey], 1)), 12: (x, torch.cat([x] * 4, 1))}
    for channels, (rgb, other) in cases.items():
        adapted = small(name, in_chans=channels)
        report = load_checkpoint(adapted, tmp_path / "x.safetensors")
        assert report.adapted
        assert close(adapted(other), model(rgb), 1e-4), channels  # MPViT amplifies rounding


def test_timm_takes_a_published_file_as_checkpoint_path(name: str, tmp_path: Path) -> None:
    model = small(name)
    torch.save({"model": model.to_published(model.state_dict())}, tmp_path / "x.pth")
    options = {"num_classes": 7, **small_args(name)}
    loaded = timm.create_model(f"anyres_{name}", checkpoint_path=str(tmp_path / "x.pth"), **options)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())
