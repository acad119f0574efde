"""Segmentation, detection and video through the one loop: runs, interruption, weights on disk, what is refused.

One file, though long: every property of the loop, for every task.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anyres import load_pretrained
from anyres.cli.main import main
from anyres.data import Item, video_views
from anyres.data.config import DataConfig
from anyres.errors import UserError
from anyres.evaluation.cost import random_input
from anyres.evaluation.evaluate import evaluate, open_test_source, preparation_text, sample_images
from anyres.inference.files import draw_results
from anyres.inference.predictor import Predictor
from anyres.tasks import TASKS, task_of
from anyres.tasks.detection.network import Detector
from anyres.training import load_config, loop, train
from anyres.training.setup import open_validation
from tests.contract.small import small_args
from tests.training.helpers import SMALL, metrics, small_config, weights

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
SCORES = {"segmentation": "miou", "detection": "ap", "video": "top1"}


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
    assert task_of(model).name == task
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
    from anyres.models._registry import create_model
    from anyres.training import setup

    options = RUNS[task]
    classifier: Any = create_model(options["model"], num_classes=5, **options["model_args"])
    classifier.save_pretrained(tmp_path / "classifier")
    chosen, task_object = config(task, tmp_path / "run"), TASKS[task]
    model = setup.build_model(chosen, task_object, task_object.open_source(chosen, "train"))
    report = task_object.load(model, setup.weights_file(str(tmp_path / "classifier")))
    assert not any("blocks" in name for name in report.missing)
    own, theirs = model.backbone.state_dict(), classifier.state_dict()
    blocks = [name for name in theirs if "attn.q" in name]
    assert blocks
    assert all(torch.equal(own[name], theirs[name]) for name in blocks)


def test_the_head_learns_faster(tmp_path: Path) -> None:
    from anyres.training import setup

    chosen = config("segmentation", tmp_path)
    task = TASKS[chosen.task]
    model = setup.build_model(chosen, task, task.open_source(chosen, "train"))
    optimizer: Any = setup.build_optimizer(chosen, model)
    rates = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert all(rates[id(p)] == (1 if name.startswith("backbone.") else 10) for name, p in model.named_parameters())


@pytest.mark.parametrize("changes", [{}, {"head_lr": 1.0}, {"head_lr": 1.0, "layer_decay": 0.9}])
def test_decay_all_spares_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    from anyres.training import setup

    swin = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    for everything in (True, False):
        options = {"model": "swin_tiny", "model_args": swin, "weight_decay": 0.1, "decay_all": everything, **changes}
        chosen = config("segmentation", tmp_path, **options)
        task = TASKS[chosen.task]
        model = setup.build_model(chosen, task, task.open_source(chosen, "train"))
        decayed = {group["weight_decay"] for group in setup.build_optimizer(chosen, model).param_groups}
        assert decayed == ({0.1} if everything else {0.0, 0.1})


def test_frozen_statistics_are_those_of_the_backbone(tmp_path: Path) -> None:
    from accelerate import Accelerator

    from anyres.training import setup

    small = small_args("mpvit_tiny")
    chosen = config("segmentation", tmp_path, batch_norm="frozen", model="mpvit_tiny", model_args=small)
    task = TASKS[chosen.task]
    model = setup.build_model(chosen, task, task.open_source(chosen, "train"))
    task.set_training_mode(chosen, setup.TrainForward(model, Accelerator(cpu=True)))
    for part, training in ((model.backbone, False), (model.head, True), (model.auxiliary, True)):
        norms = [module for module in part.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        assert norms
        assert all(norm.training == training for norm in norms)
    assert model.backbone.training


def test_shared_statistics_concern_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed

    from anyres.training import setup

    small = small_args("mpvit_tiny")
    chosen = config("segmentation", tmp_path, batch_norm="sync", model="mpvit_tiny", model_args=small)
    task = TASKS[chosen.task]
    source = task.open_source(chosen, "train")
    torch.manual_seed(0)
    alone = setup.build_model(chosen, task, source)
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in alone.modules())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs GPUs"):
        setup.build_model(chosen, task, source)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.manual_seed(0)
    shared = setup.build_model(chosen, task, source)
    monkeypatch.undo()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in shared.modules())
    # Without other processes torch's synchronised norm is the ordinary one, so the two are comparable here.
    images = torch.randn(2, 3, 64, 96)
    for training in (True, False):
        torch.manual_seed(0)
        expected = alone.train(training)(images)
        torch.manual_seed(0)
        torch.testing.assert_close(shared.train(training)(images), expected)
    torch.testing.assert_close(shared.state_dict(), alone.state_dict())


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    settings: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("segmentation", {"head_lr": 2.0, "layer_decay": 0.9}, "leave one out"),
        ("segmentation", {"decay": "step"}, "step needs drops"),
        ("detection", {"head": "yolo"}, "head is 'yolo'"),
        ("video", {"frames": 0}, "frames is 0"),
    )
    for task, changes, words in settings:
        with pytest.raises(UserError, match=words):
            config(task, tmp_path, **changes)
    runs: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("segmentation", {"head_args": {"widht": 3}}, "widht"),
        ("segmentation", {"model_args": {"depths": 3}}, "depths of pvt_v2_b0 is 3; it must be four values"),
        ("segmentation", {"data": str(tmp_path / "none")}, "none"),
        ("detection", {"head_args": {"chanels": 3}}, "did you mean 'channels'"),
        ("detection", {"data": str(tmp_path / "none")}, "none"),
        ("detection", {"jitter": [1.0]}, r"jitter \[1.0\] must be two positive shares"),
        ("video", {"model": "pvt_v2_b0", "model_args": {}}, "has no video form"),
        ("video", {"data": str(tmp_path / "none")}, "none"),
    )
    for task, changes, words in runs:
        with pytest.raises((UserError, FileNotFoundError), match=words) as caught:
            train(config(task, tmp_path / "run", **changes))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("told", "stored"),
    [({"num_classes": 3, "reduce_zero_label": True}, [0, 1, 2, 3]), ({"mask_values": [9, 255, 0]}, [255, 9, 0, 0])],
    ids=["from 1", "values"],
)
def test_the_scores_of_training_are_found_again_from_the_weights(
    told: dict[str, Any], stored: list[int], tmp_path: Path
) -> None:
    """What the masks' numbers mean, and sides rounded up: both stand beside the weights."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
        for number in range(4):
            mask = np.kron(rng.integers(0, 4, (5, 7), dtype=np.uint8), np.ones((10, 10), dtype=np.uint8))
            Image.fromarray(60 * mask).save(tmp_path / "data" / "images" / split / f"{number}.png")
            Image.fromarray(np.array(stored, np.uint8)[mask]).save(
                tmp_path / "data" / "masks" / split / f"{number}.png"
            )
    changes = {**told, "divisor": 32, "sizes": [48], "epochs": 2, "ema_decay": 0}
    data = str(tmp_path / "data")
    train(config("segmentation", tmp_path / "run", **changes, data=data, epoch_size=4, distillation="none"))
    model: Any = load_pretrained(tmp_path / "run" / "last")
    assert DataConfig.of(model).fitting == {"longest": 4.0, "divisor": 32}
    assert "multiples of 32" in preparation_text(model, open_test_source(model, data))
    again = evaluate(model, open_test_source(model, data), (48, 48)).scores["miou"]
    assert again == pytest.approx(float(metrics(tmp_path / "run")[-1]["miou"]))
    assert sample_images(model, open_test_source(model, data), (48, 48), 1)[0].size == (96, 64)
    ((found, _),) = draw_results(
        Predictor(model, 48), [Item("x", np.zeros((50, 70, 3), np.uint8), None)], tmp_path / "seen"
    )
    assert found.rows()


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_a_folder_for_validation_alone_is_used_whole(task: str, tmp_path: Path) -> None:
    """But not the folder of the training data, given once more."""
    mask = np.arange(64, dtype=np.uint8).reshape(8, 8) % 2
    kinds = ("images", "masks") if task == "segmentation" else ("a", "b")
    for folder, count in (("data", 20), ("others", 10)):
        for kind in kinds:
            (tmp_path / folder / kind).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(mask).save(tmp_path / folder / kind / f"{number}.png")
    more: dict[str, Any] = {"num_classes": 2} if task == "segmentation" else {}
    expected = {"others": 10, "data": 2, None: 2} if task == "segmentation" else {"others": 20, "data": 4, None: 4}
    for name, count in expected.items():
        val_data = None if name is None else str(tmp_path / "data" / ".." / name)
        options = {**RUNS.get(task, SMALL), **more, "data": str(tmp_path / "data"), "val_data": val_data}
        chosen, opened = load_config(options, task, output=str(tmp_path / "run")), TASKS[task]
        assert len(opened.open_source(chosen, "val", like=opened.open_source(chosen, "train"))) == count


@pytest.mark.parametrize("link", [os.symlink, os.link, None])
def test_files_of_both_splits_are_noticed(link: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Refused within a dataset; told where somebody gave both sets. Equal content is nothing to complain of."""
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(4):
                Image.new("L", (8, 8), number).save(tmp_path / split / label / f"{split}{number}.png")
    first = tmp_path / "val" / "b" / "other.png"
    if link is not None:
        link(tmp_path / "train" / "b" / "train2.png", first)
    else:
        Image.new("L", (8, 8), 2).save(first)

    def opened(**data: Any) -> int:
        chosen = small_config(tmp_path / "run", **{name: str(tmp_path / at) for name, at in data.items()})
        task = TASKS["classification"]
        return len(open_validation(chosen, task, task.open_source(chosen, "train")))

    if link is None:
        assert opened(data="") == 9
        return
    with pytest.raises(UserError, match=f"1 of the 9 files of .* are also in the training data, .*{first}: rem"):
        opened(data="")
    assert opened(data="train", val_data="val") == 9
    assert f"the first is {first}: validation scores are too high" in caplog.text


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_pictures_of_both_splits_are_noticed_whatever_is_marked_in_them(task: str, tmp_path: Path) -> None:
    mask = np.arange(64, dtype=np.uint8).reshape(8, 8) % 2
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
            Image.fromarray(mask).save(tmp_path / "data" / kind / split / f"{split}.png")
    marks = {
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4],
                         "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]]}],
    }  # fmt: skip
    (tmp_path / "data" / "annotations").mkdir()
    for split in ("train", "val"):
        images = [{"id": 1, "file_name": f"{split}/{split}.png", "height": 8, "width": 8}]
        (tmp_path / "data" / "annotations" / f"{split}.json").write_text(json.dumps({"images": images, **marks}))
    more: dict[str, Any] = {"num_classes": 2} if task == "segmentation" else {}
    chosen, made = config(task, tmp_path / "run", data=str(tmp_path / "data"), **more), TASKS[task]
    if task == "segmentation":  # of which annotations are another name
        shutil.rmtree(tmp_path / "data" / "annotations")
    train = made.open_source(chosen, "train")
    assert len(open_validation(chosen, made, train)) == 1
    (tmp_path / "data" / "images" / "val" / "val.png").unlink()
    (tmp_path / "data" / "images" / "val" / "val.png").symlink_to("../train/train.png")
    with pytest.raises(UserError, match=r"1 of the 1 files .*val\.png: remove"):
        open_validation(chosen, made, train)


def test_black_and_white_masks_are_no_single_class(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for number in range(20):
            Image.fromarray(np.eye(48, dtype=np.uint8) * 255).save(tmp_path / kind / f"{number}.png")
    changes = {"data": str(tmp_path), "sizes": [48], "epoch_size": 16, "distillation": "none"}
    with pytest.raises(UserError, match=r"'0' alone has labelled pixels.* give mask_values=0,255"):
        train(config("segmentation", tmp_path / "run", num_classes=2, **changes))
    result = train(config("segmentation", tmp_path / "run", mask_values="0,255", **changes))
    model: Any = load_pretrained(result.folder / "last")
    source = open_test_source(model, str(tmp_path))
    measured = evaluate(model, source, (48, 48))
    assert set(measured.by_class) == {"0", "1"}
    model.pretrained_cfg["mask_values"] = []
    with pytest.raises(UserError, match="only one class has labelled pixels"):
        evaluate(model, open_test_source(model, str(tmp_path)), (48, 48))


def test_a_thin_picture_is_predicted_at_the_padded_size_of_evaluation(tmp_path: Path) -> None:
    """One row of pixels is below what the backbone takes."""
    model = Detector.build("pvt_v2_b0", 3, PYRAMID, **RUNS["detection"]["head_args"], head="faster_rcnn").eval()
    seen: list[tuple[int, ...]] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    ((found, _),) = draw_results(Predictor(model, 48), [Item("x", np.zeros((1, 80, 3), np.uint8), None)], tmp_path)
    assert not found.problem
    assert seen == [(1, 3, 32, 96)]


def test_clips_are_cut_out_as_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"sizes": [24], "epochs": 2, "ema_decay": 0, "crop_pct": 0.5, "distillation": "none"}
    train(config("video", tmp_path / "run", **changes))
    model: Any = load_pretrained(tmp_path / "run" / "last")
    source = open_test_source(model, "digits")
    row = metrics(tmp_path / "run")[-1]
    assert evaluate(model, source, (24, 24)).scores["loss"] == pytest.approx(float(row["val_loss_24"]), rel=1e-4)
    seen: list[tuple[int, ...]] = []
    boxes = video_views.crop_boxes

    def crop_boxes(*args: Any) -> Any:
        seen.append(args[3:])
        return boxes(*args)

    monkeypatch.setattr(video_views, "crop_boxes", crop_boxes)
    sample_images(model, source, (24, 24), 1)
    ((found, _),) = draw_results(Predictor(model, 24), [Item("x", source.item(0).data, None)], tmp_path / "seen")
    assert found.rows()
    test = ["video", "test", str(tmp_path / "run"), "size=24", "device=cpu"]
    assert main(test) == 0
    assert main([*test, "--crop-pct=0.75"]) == 0
    assert main([*test, "crops=3"]) == 0
    assert list(dict.fromkeys(seen)) == [(0.5, 1), (0.75, 1), (1.0, 3)]


def test_published_schedule_of_mvitv2_on_clips() -> None:
    for name in ("mvitv2_small", "mvitv2_base"):
        chosen = load_config(name, "video")
        assert chosen.crop_pct == 0.875
        assert chosen.peak_lr == 1e-4 * (chosen.batch_size / chosen.repeats) / 16
        assert (chosen.epochs, chosen.warmup_epochs) == (200 * chosen.repeats, 30 * chosen.repeats)


def test_pictures_do_not_replace_those_they_are_of(tmp_path: Path) -> None:
    from anyres.tasks.segmentation.network import Segmenter

    torch.manual_seed(0)
    model = Segmenter.build("pvt_v2_b0", 3, {**PYRAMID, "img_size": 64}, head="semantic_fpn")
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "own.png"
    Image.fromarray(np.zeros((64, 70, 3), np.uint8)).save(file)
    before = file.read_bytes()
    predict = ["predict", str(tmp_path / "model"), str(file), "size=64", "device=cpu"]
    assert main([*predict, f"pictures={tmp_path / 'model' / '..'}"]) == 2
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "own.png"]
    for _ in range(2):
        assert main([*predict, f"pictures={tmp_path / 'seen'}"]) == 0
    assert (tmp_path / "seen" / "own.png").is_file()
    (tmp_path / "seen" / "own.png").write_bytes(before)  # somebody's
    (tmp_path / "seen" / "thesis.png").write_bytes(before)
    assert main([*predict, f"pictures={tmp_path / 'seen'}"]) == 2
    assert (tmp_path / "seen" / "own.png").read_bytes() == before
    (tmp_path / "seen" / "own.png").unlink()
    assert main([*predict, f"pictures={tmp_path / 'seen'}"]) == 0
    assert (tmp_path / "seen" / "thesis.png").read_bytes() == before


def test_faults_of_annotations_stand_in_the_summary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "val"):
        boxes = [[5, 5, 30, 30], [0, 0, -1, 5], [20, 10, 30, 30]]
        marks = [{"id": i, "image_id": i // 2, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)]
        for mark in marks:
            mark["segmentation"] = [[5, 5, 35, 5, 35, 35]]
        images = [{"id": i, "file_name": f"{i}.png", "height": 48, "width": 64} for i in range(2)]
        (tmp_path / "data" / split).mkdir(parents=True)
        for i in range(2):
            Image.effect_noise((64, 48), 50).convert("RGB").save(tmp_path / "data" / split / f"{i}.png")
        (tmp_path / "data" / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "categories": [{"id": 1, "name": "cat"}], "annotations": marks}
        (tmp_path / "data" / "annotations" / f"{split}.json").write_text(json.dumps(content))
    changes = {"epochs": 2, "sizes": [48], "epoch_size": 2, "batch_size": 1, "ema_decay": 0, "distillation": "none"}
    train(config("detection", tmp_path / "run", **changes, data=str(tmp_path / "data")))
    faults = json.loads((tmp_path / "run" / "summary.json").read_text())["annotations"]
    assert [faults[split]["bad_boxes"] for split in ("train", "val")] == [1, 1]
    assert sum("negative side: left out (1)" in line for line in caplog.messages) == 2


def test_a_missing_package_is_noticed_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setitem(sys.modules, "faster_coco_eval.core.mask", None)
    with pytest.raises(UserError, match=r"need the package faster-coco-eval, .* pip install 'anyres\[detection\]'"):
        TASKS["detection"].open_source(config("detection", tmp_path, head="retinanet"), "train")


MISSING = {
    "faster_coco_eval": (["detect", "demo"], "detection"),
    "faster_coco_eval.core.mask": (["detect", "train", "resformer_tiny", "sizes=32", "device=cpu"], "detection"),
    "av": (["video", "train", "resformer_tiny", "data=clips", "sizes=32", "device=cpu"], "video"),
    "datasets": (["train", "resformer_tiny", "data=hf:beans", "sizes=32", "device=cpu"], "datasets"),
    "wandb": (["train", "resformer_tiny", "sizes=32", "device=cpu", "--wandb"], "tracking"),
    "trackio": (["train", "resformer_tiny", "sizes=32", "device=cpu", "--trackio"], "tracking"),
}


@pytest.mark.parametrize("module", MISSING)
def test_every_missing_extra_is_named_with_its_line_before_any_work(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "clips" / "wave").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    command, extra = MISSING[module]
    assert main(command) == 2
    said = capfd.readouterr()
    assert said.out == ""
    (sentence,) = said.err.splitlines()
    assert sentence.endswith(f"pip install 'anyres[{extra}]'")
    assert [path.name for path in tmp_path.iterdir()] in (["clips"], ["clips", "runs"], ["runs", "clips"])
    assert not list(tmp_path.glob("runs/*"))


def test_a_batch_norm_with_nothing_to_learn_from_gets_a_sentence(tmp_path: Path) -> None:
    options = {"batch_size": 4, "accumulation": 4, "distillation": "none", "ema_decay": 0}
    with pytest.raises(UserError, match="give each device 2 images"):
        train(config("segmentation", tmp_path / "pooled", **options))
    plain = {"mixup": 0.0, "cutmix": 0.0, "batch_size": 2, "accumulation": 2, "sizes": [32]}
    for model in ("cvt_13", "cmt_tiny", "mpvit_tiny"):
        own = {"model": model, "model_args": small_args(model), "output": str(tmp_path / model)}
        with pytest.raises(UserError, match="give every process at least 2 images per pass"):
            train(load_config({**SMALL, **plain, **own}))
        assert not list((tmp_path / model / "state").glob("step_*"))


@pytest.fixture(scope="module")
def detectors(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A detector of boxes and one of masks, as they start."""
    from anyres.training import setup

    folder = tmp_path_factory.mktemp("detectors")
    for head in ("faster_rcnn", "mask_rcnn"):
        chosen, task = config("detection", folder / head, head=head), TASKS["detection"]
        setup.build_model(chosen, task, task.open_source(chosen, "train")).save_pretrained(folder / head)
    return [folder / "faster_rcnn", folder / "mask_rcnn"]


def test_masks_are_read_if_any_model_gives_them(detectors: list[Path]) -> None:
    boxes, masks = (load_pretrained(folder) for folder in detectors)
    assert open_test_source(boxes, "digits").item(0).label.segments is None
    assert open_test_source(boxes, "digits", others=[masks]).item(0).label.segments is not None


def test_sizes_below_the_minimum_are_refused(
    detectors: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from anyres.tasks.segmentation.network import Segmenter

    model = Segmenter.build("pvt_v2_b0", 11, {**PYRAMID, "img_size": 64}, head="semantic_fpn")
    model.pretrained_cfg["label_names"] = ["background", *"0123456789"]
    model.save_pretrained(tmp_path / "model")
    Image.fromarray(np.zeros((64, 70, 3), np.uint8)).save(tmp_path / "x.png")
    least = model.minimum_size
    pictures = ["pictures=" + str(tmp_path / "seen"), str(tmp_path / "x.png")]
    for words in (
        ["segment", "test", str(tmp_path / "model")],
        ["detect", "test", str(detectors[1])],
        ["predict", str(tmp_path / "model"), *pictures],
        ["predict", str(detectors[0]), *pictures],
    ):
        assert main([*words, f"size={least - 1}", "device=cpu"]) == 2
        assert f"below the model's minimum: give sides of at least {least}" in capsys.readouterr().err
    out = tmp_path / "sweep"
    assert main(["sweep", *map(str, detectors), f"sizes={least - 1}", "cost=false", f"output={out}"]) == 0
    assert "below the model's minimum" in (out / "sweep.csv").read_text()
    for scales in ("1,inf", "nan"):
        assert main(["segment", "test", str(tmp_path / "model"), f"scales={scales}", "device=cpu"]) == 2
        assert "scales holds" in capsys.readouterr().err


def test_a_head_for_other_classes_starts_afresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from anyres.models._registry import create_model
    from anyres.tasks.weights import load_but_head

    def classifier(names: list[str]) -> Any:
        model: Any = create_model("resformer_tiny", num_classes=2, embed_dim=48, depth=1, num_heads=3)
        model.pretrained_cfg["label_names"] = names
        return model

    trained = classifier(["cat", "dog"])
    folder = trained.save_pretrained(tmp_path / "saved")
    for names, kept in ((["cat", "dog"], False), (["dog", "cat"], True), (["cow", "owl"], True)):
        model = classifier(names)
        fresh = model.head.weight.clone()
        load_but_head(model, folder / "model.safetensors", model.get_classifier())
        assert model.head.weight.equal(fresh) is kept
        assert model.norm.weight.equal(trained.norm.weight)
        assert ("other classes" in caplog.text) is kept
        caplog.clear()
