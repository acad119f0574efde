"""Segmentation, detection and video through the one loop: runs, interruption, weights on disk, what is refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from anyres import load_pretrained
from anyres.errors import UserError
from anyres.evaluation.cost import random_input
from anyres.tasks import task_of
from anyres.training import load_config, loop, train
from tests.training.helpers import SMALL, metrics, weights

PYRAMID = {"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "mlp_ratios": [2, 2, 2, 2]}
DENSE = {
    **{name: SMALL[name] for name in ("epochs", "precision", "device", "progress", "workers", "log_every")},
    "model": "pvt_v2_b0",
    "model_args": PYRAMID,
    "sizes": [64, 48],
    "epoch_size": 12,
    "batch_size": 4,
    "lr": 1e-3,
    "warmup_epochs": 1,
    "fraction": 1.0,
    "eval_every": 2,
    "ema_decay": 0.9,
    "distillation": "smooth-l1",
}
RUNS: dict[str, dict[str, Any]] = {
    "segmentation": {**DENSE, "head": "upernet", "head_args": {"channels": 8}, "head_lr": 10.0},
    "detection": {
        **DENSE,
        "head": "mask_rcnn",
        "head_args": {"channels": 8, "hidden": 16, "rpn_pre_nms": [50, 20], "rpn_post_nms": 10, "box_batch": 8},
        "decay": "linear",
        "drops": [],
    },
    "video": {
        **DENSE,
        "model": "resformer_tiny",
        "model_args": {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8},
        "sizes": [32, 24],
        "frames": 4,
        "stride": 4,
        "decay": "cosine",
        "drops": [],
    },
}
SCORES = {"segmentation": "miou", "detection": "ap", "video": "acc1"}


@pytest.fixture(scope="module", autouse=True)
def little_data() -> Any:
    """A dozen composed scenes and clips instead of hundreds."""
    from anyres.data import composed, video_sources

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composed, "COUNTS", {"train": 12, "val": 4})
        patch.setattr(video_sources.MovingDigits, "counts", {"train": 12, "val": 4})
        yield


def config(task: str, output: Path, **changes: Any) -> Any:
    return load_config(RUNS[task], task, output=str(output), **changes)


@pytest.mark.parametrize("task", RUNS)
def test_a_run_its_weights_and_its_resumption(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = train(config(task, tmp_path / "whole"))
    assert result.status == "finished"
    row = metrics(tmp_path / "whole")[-1]
    first, second = (f"{SCORES[task]}_{side}" for side in RUNS[task]["sizes"])
    assert float(row[SCORES[task]]) == pytest.approx((float(row[first]) + float(row[second])) / 2)
    assert {f"loss_{side}" for side in RUNS[task]["sizes"]} <= row.keys()

    model = load_pretrained(tmp_path / "whole" / "last")
    assert task_of(model) == task
    assert model.pretrained_cfg["train_sizes"] == [[side, side] for side in RUNS[task]["sizes"]]
    x = random_input(model, 1, (48, 40))
    with torch.inference_mode():
        once, again = model(x), load_pretrained(tmp_path / "whole" / "last")(x)
    for one, two in zip(once, again, strict=True):
        assert (
            all(torch.equal(one[name], two[name]) for name in one) if isinstance(one, dict) else torch.equal(one, two)
        )

    original = loop.step

    def interrupted(run: Any, batches: Any) -> Any:
        if run.position.updates == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "step", interrupted)
        assert train(config(task, tmp_path / "parts")).status == "signal"
    torch.manual_seed(99)
    assert train(config(task, tmp_path / "parts")).status == "finished"
    assert weights(tmp_path / "parts" / "last") == weights(tmp_path / "whole" / "last")
    assert weights(tmp_path / "parts" / "last_ema") == weights(tmp_path / "whole" / "last_ema")
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("task", RUNS)
def test_starting_from_a_classifier_fills_the_backbone(task: str, tmp_path: Path) -> None:
    from anyres.registry import create_model
    from anyres.training import setup
    from anyres.training.task import open_task

    options = RUNS[task]
    classifier: Any = create_model(options["model"], num_classes=5, **options["model_args"])
    classifier.save_pretrained(tmp_path / "classifier")
    task_object = open_task(config(task, tmp_path / "run"))
    model = setup.build_model(task_object, task_object.open_source("train"))
    report = task_object.load(model, setup.weights_file(str(tmp_path / "classifier")))
    assert not any("blocks" in name for name in report.missing)
    own, theirs = model.backbone.state_dict(), classifier.state_dict()
    blocks = [name for name in theirs if "attn.q" in name]
    assert blocks
    assert all(torch.equal(own[name], theirs[name]) for name in blocks)


def test_the_head_learns_faster(tmp_path: Path) -> None:
    from anyres.training import setup
    from anyres.training.task import open_task

    chosen = config("segmentation", tmp_path)
    task = open_task(chosen)
    model = setup.build_model(task, task.open_source("train"))
    optimizer: Any = setup.build_optimizer(chosen, model)
    rates = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert all(rates[id(p)] == (1 if name.startswith("backbone.") else 10) for name, p in model.named_parameters())


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    for task, changes, words in (
        ("segmentation", {"head_lr": 2.0, "layer_decay": 0.9}, "leave one out"),
        ("segmentation", {"decay": "step"}, "step needs drops"),
        ("detection", {"head": "yolo"}, "head is 'yolo'"),
        ("video", {"frames": 0}, "frames is 0"),
    ):
        with pytest.raises(UserError, match=words):
            config(task, tmp_path, **changes)
    for task, changes, words in (
        ("segmentation", {"head_args": {"widht": 3}}, "widht"),
        ("segmentation", {"batch_norm": "sync"}, "needs GPUs"),
        ("segmentation", {"data": str(tmp_path / "none")}, "none"),
        ("detection", {"head_args": {"chanels": 3}}, "did you mean 'channels'"),
        ("detection", {"data": str(tmp_path / "none")}, "none"),
        ("video", {"model": "pvt_v2_b0", "model_args": {}}, "has no video form"),
        ("video", {"data": str(tmp_path / "none")}, "none"),
    ):
        if "batch_norm" in changes and torch.cuda.is_available():
            continue
        with pytest.raises((UserError, FileNotFoundError), match=words) as caught:
            train(config(task, tmp_path / "run", **changes))
        assert "\n" not in str(caught.value)
