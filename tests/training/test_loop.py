"""Whole runs: what they leave, stopping and resuming, kills, and what stops them.

One file, though long: a list of properties of the loop, short each.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from anyres.data import open_source
from anyres.errors import UserError
from anyres.io.files import LOCK, RECORD, adopt
from anyres.models._checkpoints import save_weights
from anyres.tasks import load_pretrained
from anyres.tasks.classification import objective
from anyres.tasks.classification.options import TrainConfig
from anyres.training import load_config, loop, setup, state, train
from tests.training.helpers import SMALL, metrics, small_config, train_small, weights
from tests.typed import as_a

EMA = {"ema_decay": 0.9, "ema_warmup": True}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    result = train(small_config(folder, **EMA))
    assert result.status == "finished"
    return folder


def same_run(folder: Path, whole: Path) -> None:
    for name in ("last", "last_ema", "best", "best_ema"):
        assert weights(folder / name) == weights(whole / name), name
    assert metrics(folder) == metrics(whole)


def newest_state(folder: Path) -> tuple[state.Position, dict[str, Any]]:
    return state.load_state(state.saved_states(folder)[0])


def test_a_run_leaves_its_files(whole: Path) -> None:
    assert load_config(whole / "config.yaml") == small_config(whole, **EMA)
    rows = metrics(whole)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [row["updates"] for row in rows] == ["3", "6"]
    last = rows[-1]
    mean = sum(float(last[f"top1_{side}"]) for side in (16, 12, 8)) / 3
    assert float(last["top1"]) == pytest.approx(mean)
    replicas = [float(last[f"loss_{side}"]) for side in (16, 12, 8)]
    assert float(last["loss"]) == pytest.approx(sum(replicas) / 3)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["bad_images"] == {"count": 0, "files": {}}
    assert summary["best"]["best"] == pytest.approx(mean)
    assert list((whole / "tensorboard").rglob("events.out.tfevents.*"))


def test_the_weights_come_with_all_that_a_user_needs(whole: Path) -> None:
    model = load_pretrained(whole / "best")
    assert model.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    assert tuple(model.pretrained_cfg["input_size"]) == (1, 16, 16)
    assert model.pretrained_cfg["train_sizes"] == [[16, 16], [12, 12], [8, 8]]
    assert model(torch.zeros(1, 1, 20, 12)).shape == (1, 10)
    averaged = load_pretrained(whole / "best_ema")
    assert not torch.equal(model.head.weight, averaged.head.weight)


def test_a_run_learns(tmp_path: Path) -> None:
    plain = {"mixup": 0.0, "cutmix": 0.0, "hflip": 0.0, "erasing": 0.0, "crop_scale": [0.7, 1.0], "drop_path": 0.0}
    wider = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 4}
    options = {"epochs": 4, "epoch_size": None, "eval_every": 4, "sizes": [16, 12], "lr": 4e-3, "batch_size": 32}
    result = train(small_config(tmp_path, model_args=wider, **options, **plain))
    assert result.score is not None
    assert result.score > 50


@pytest.mark.parametrize(("number", "at"), [(signal.SIGTERM, 2), (signal.SIGINT, 3), (signal.SIGTERM, 4)])
def test_a_signal_saves_and_stops_and_resume_gives_the_same_weights(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, at: int
) -> None:
    """In the middle of an epoch, after an epoch's last step, and in the second epoch."""
    original = loop.step

    def interrupted(run: Any, batches: Any) -> Any:
        if run.position.updates + 1 == at:
            os.kill(os.getpid(), number)
        return original(run, batches)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "step", interrupted)
        result = train(small_config(tmp_path, **EMA))
    assert result.status == "signal"
    assert signal.getsignal(number) == before
    assert len(metrics(tmp_path)) == (at - 1) // 3
    found = newest_state(tmp_path)
    assert (found[0].updates, found[0].batch) == (at, (at - 1) % 3 + 1)
    torch.manual_seed(99)  # resuming must not depend on the state of the process
    assert train(small_config(tmp_path, **EMA)).status == "finished"
    same_run(tmp_path, whole)


def test_resuming_a_finished_run_changes_nothing(whole: Path) -> None:
    before = weights(whole / "last"), metrics(whole)
    result = train(small_config(whole, **EMA))
    assert result.status == "finished"
    assert (weights(whole / "last"), metrics(whole)) == before


def test_resume_refuses_another_run_and_no_replaces_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no saved state"):
        train(small_config(tmp_path, resume="yes"))
    train(small_config(tmp_path, epochs=2, eval_every=9))
    with pytest.raises(UserError, match=r"was started with lr 0.002 and now it is 0.5"):
        train(small_config(tmp_path, lr=0.5))
    result = train(small_config(tmp_path, lr=0.001, resume="no", eval_every=9))
    assert len(result.rows) == 2
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lr"] == 0.001


def test_time_limit_and_early_stop(tmp_path: Path) -> None:
    result = train(small_config(tmp_path / "limit", time_limit=1e-9))
    assert (result.status, result.rows) == ("time limit", [])
    options = {"epochs": 6, "eval_every": 1, "early_stop": 2, "lr": 1e-12, "min_lr": 0.0, "fraction": 0.5}
    result = train(small_config(tmp_path / "early", **options))
    assert (result.status, len(result.rows)) == ("early stop", 3)


def test_a_run_without_validation_leaves_its_last_weights(tmp_path: Path) -> None:
    result = train(small_config(tmp_path, eval_every=0))
    assert (result.status, result.score, len(result.rows)) == ("finished", None, 2)
    assert (tmp_path / "last" / "model.safetensors").is_file()
    assert not (tmp_path / "best").exists()
    assert "top1" not in metrics(tmp_path)[-1]


def test_accumulation_gives_the_same_losses_without_mixing(tmp_path: Path) -> None:
    options = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "eval_every": 9}
    once = train(small_config(tmp_path / "once", **options)).rows
    split = train(small_config(tmp_path / "split", accumulation=4, **options)).rows
    for left, right in zip(once, split, strict=True):
        assert left["updates"] == right["updates"]
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)


def test_one_size_per_batch_and_windows(tmp_path: Path) -> None:
    sample = train(small_config(tmp_path / "sample", mode="sample", epochs=2, eval_every=9, epoch_size=160)).rows
    assert len([name for name in sample[0] if name.startswith("loss_")]) > 1
    window = train(small_config(tmp_path / "window", sizes_per_step=2, eval_every=9, fraction=0.34)).rows
    assert [name for name in window[0] if name.startswith("loss_")] == ["loss_16", "loss_12"]


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    original = objective.soft_cross_entropy

    def poisoned(logits: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return original(logits, target) * (math.nan if calls == 3 * 4 + 2 else 1)

    monkeypatch.setattr(objective, "soft_cross_entropy", poisoned)
    updates: list[int] = []
    step = torch.optim.AdamW.step

    def counted(*args: Any) -> Any:
        updates.append(1)
        return step(*args)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    named = r"loss is nan at epoch 2, batch 2, size 12, images digits/\d{4}, .*, \.\.\."
    with pytest.raises(UserError, match=named) as error:
        train(small_config(tmp_path))
    assert "\n" not in str(error.value)
    assert len(updates) == 4


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.step

    def spoil(run: Any, batches: Any) -> Any:
        decision = original(run, batches)
        if run.position.updates + 1 == 3:
            with torch.no_grad():
                run.model.head.bias[0] = math.inf
        return decision

    monkeypatch.setattr(loop, "step", spoil)
    with pytest.raises(UserError, match="the weights are not finite after step 3"):
        train(small_config(tmp_path, save_every_steps=2, eval_every=9))
    found = newest_state(tmp_path)
    assert found[0].updates == 2


def test_a_validation_that_fails_loses_no_epoch(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise UserError("no validation today")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", fail)
        with pytest.raises(UserError, match="today"):
            train(small_config(tmp_path, **EMA))
    found = newest_state(tmp_path)
    assert (found[0].updates, found[0].epoch, found[0].batch) == (6, 1, 3)
    monkeypatch.setattr(loop, "step", fail)  # nothing is trained again
    assert train(small_config(tmp_path, **EMA)).status == "finished"
    same_run(tmp_path, whole)


def test_unreadable_images_are_counted_and_named(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        folder = tmp_path / "images" / label
        folder.mkdir(parents=True)
        for index in range(20):
            Image.effect_noise((20, 20), 50).convert("RGB").save(folder / f"{index}.png")
    (tmp_path / "images" / "cat" / "3.png").write_bytes(b"")
    options = {"data": str(tmp_path / "images"), "epoch_size": 32, "batch_size": 16, "eval_every": 9}
    result = train(small_config(tmp_path / "run", max_bad_fraction=0.5, **options))
    assert result.bad_images == {"cat/3.png": "the file is empty"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["bad_images"] == {"count": 1, "files": result.bad_images}
    with pytest.raises(UserError, match="cannot be read, more than the limit"):
        train(small_config(tmp_path / "strict", **options))


def test_starting_from_weights_is_not_resuming(whole: Path, tmp_path: Path) -> None:
    result = train(small_config(tmp_path, init_from=str(whole), lr=1e-9, min_lr=0.0, **EMA))
    assert [row["epoch"] for row in result.rows] == [1, 2]
    for name in ("last", "last_ema"):
        start = load_pretrained(whole / "best").state_dict()
        end = load_pretrained(tmp_path / name).state_dict()
        for key, value in start.items():
            torch.testing.assert_close(end[key], value, rtol=0, atol=1e-6)


# Building ---------------------------------------------------------------------------------------------------------


def groups(**changes: Any) -> dict[str, dict[str, Any]]:
    """Parameter name -> its group of the optimiser."""
    from anyres.models._registry import create_model

    config = load_config(SMALL, weight_decay=0.05, **changes)
    model = create_model("resformer_tiny", img_size=16, **SMALL["model_args"])  # type: ignore[arg-type]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = setup.build_optimizer(config, model)
    return {names[id(parameter)]: group for group in optimizer.param_groups for parameter in group["params"]}


def test_weight_decay_spares_vectors_biases_tokens_and_positions() -> None:
    for name, group in groups().items():
        spared = (
            name.endswith(".bias") or "norm" in name or name in ("cls_token",) or "position" in name or "local" in name
        )
        assert group["weight_decay"] == (0 if spared else 0.05), name


def test_layer_decay_scales_the_rate_layer_by_layer() -> None:
    scales = {name: group["lr_scale"] for name, group in groups(layer_decay=0.5).items()}
    assert scales["head.weight"] == 1
    ordered = ["patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight"]
    if "blocks.0.mlp.fc1.weight" not in scales:
        ordered[1:] = [
            next(name for name in scales if name.startswith(f"blocks.{i}.") and "weight" in name) for i in (0, 1)
        ]
    low, middle, high = (scales[name] for name in ordered)
    assert middle == pytest.approx(2 * low)
    assert high == pytest.approx(2 * middle)


@pytest.fixture
def teacher(tmp_path: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A timm network, and the options that name it."""
    import timm

    network = timm.create_model("test_resnet", num_classes=10, in_chans=1).eval()
    save_weights(network.state_dict(), tmp_path / "teacher.pth")
    return network, {"teacher": "test_resnet", "teacher_weights": str(tmp_path / "teacher.pth")}


def test_a_teacher_is_asked_about_the_mixed_view(tmp_path: Path, teacher: tuple[Any, dict[str, Any]]) -> None:
    network, named = teacher
    config = small_config(tmp_path, **named, teacher_kind="soft", teacher_alpha=0.3, teacher_tau=2.0)
    accelerator = loop.start_processes(config)
    view, target = torch.rand(4, 1, 32, 32), torch.full((4, 10), 0.1)
    outputs = {"logits": torch.randn(4, 10), "dist_logits": torch.randn(4, 10)}
    loss = objective.build_base_loss(as_a(TrainConfig, config), accelerator, open_source("digits"))(
        outputs, target, view
    )
    with torch.no_grad():
        student, known = (x / 2 for x in (outputs["dist_logits"], network(view)))
    divergence = (known.softmax(-1) * (known.log_softmax(-1) - student.log_softmax(-1))).sum()
    base = -outputs["logits"].log_softmax(-1).mean()
    assert float(loss) == pytest.approx(float(0.7 * base + 0.3 * 4 * divergence / 40), rel=1e-4)


def test_a_distilled_run_trains_both_heads(tmp_path: Path, teacher: tuple[Any, dict[str, Any]]) -> None:
    options = {"model": "deit_tiny_distilled", "sizes": [16], "distillation": "none", "eval_every": 9}
    result = train(small_config(tmp_path / "run", **options, **teacher[1], schedule="epoch", warmup_lr=1e-6))
    assert result.rows[0]["lr"] == result.rows[1]["lr"] == 1e-6  # DeiT's rates come one epoch late
    found = newest_state(tmp_path / "run")
    moments = found[1]["optimizer"]["state"]
    assert len(moments) == len(list(load_pretrained(tmp_path / "run" / "last").parameters()))
    assert all(moment["exp_avg"].abs().sum() > 0 for moment in moments.values())


def test_a_teachers_outputs_are_put_into_the_datas_order(tmp_path: Path, teacher: tuple[Any, dict[str, Any]]) -> None:
    network, named = teacher
    names = [str(digit) for digit in (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    config = small_config(tmp_path / "run", **named, teacher_names=str(tmp_path / "names.txt"))
    loaded, places = objective.load_teacher(as_a(TrainConfig, config), open_source("digits"))
    assert [names[place] for place in places.tolist()] == list("0123456789")
    view = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert loaded(view).equal(network(view))
    (tmp_path / "names.txt").write_text("\n".join("abcdefghij"))
    with pytest.raises(UserError, match="teacher_names=FILE"):
        objective.load_teacher(as_a(TrainConfig, config), open_source("digits"))


def test_a_teacher_of_other_classes_is_refused(whole: Path, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("L", (16, 16)).save(tmp_path / "data" / name / f"{index}.png")
    with pytest.raises(UserError, match=r"2 of the 2 classes of .*data are not among the 10.*teacher_names=FILE"):
        train(
            small_config(tmp_path, data=str(tmp_path / "data"), teacher=str(whole / "best"), batch_size=2, epoch_size=2)
        )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "resformer_tinny"}, "did you mean 'resformer_tiny'"),
        ({"sizes": [16, 3]}, "size 3x3 is below the minimum of resformer_tiny, 4"),
        ({"data": "/no/such/folder"}, "no dataset '/no/such/folder'"),
        ({"optimizer": "adamww"}, "optimizer 'adamww' is unknown; did you mean 'adamw'"),
        ({"device": "tpu"}, "device 'tpu' is unknown"),
        ({"precision": "float16"}, "precision float16 needs a GPU"),
        ({"fsdp": True}, "fsdp needs several processes"),
        ({"batch_size": 4096}, "fewer than batch_size 4096"),
        ({"teacher": "no_such_net"}, "teacher 'no_such_net' cannot be loaded"),
        ({"init_from": "/no/such/file"}, "/no/such/file"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises((UserError, FileNotFoundError)) as error:
        train(small_config(tmp_path, **changes))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_bf16_and_checkpointing_run(tmp_path: Path) -> None:
    result = train(
        small_config(tmp_path, precision="bfloat16", grad_checkpointing=True, clip_grad=1.0, schedule="epoch")
    )
    assert result.status == "finished"
    assert json.loads((tmp_path / "summary.json").read_text())["precision"] == "bfloat16"
    assert load_pretrained(tmp_path / "last").head.weight.dtype == torch.float32


def test_a_run_in_the_spelling_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    train(small_config(tmp_path, precision="bfloat16", save_every_steps=2, keep=9))
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace("precision: bfloat16", "precision: bf16"))
    for path in state.saved_states(tmp_path):
        content = torch.load(path / state.STATE_FILE, weights_only=True)
        if content["position"]["updates"] == 6:
            shutil.rmtree(path)
            continue
        content["identity"]["precision"] = "bf16"
        torch.save(content, path / state.STATE_FILE)
        adopt(path, "state", [state.STATE_FILE])
    assert newest_state(tmp_path)[1]["identity"]["precision"] == "bf16"
    result = train(load_config(config))
    assert (result.status, result.rows[-1]["updates"]) == ("finished", 6)


# Kills ------------------------------------------------------------------------------------------------------------


def survive_kills(folder: Path, kills: int, seed: int, **changes: Any) -> list[list[str]]:
    """Start a run that saves after every step, kill it at random moments `kills` times, then let it finish.

    Returns the temporary files and folders that each kill left, so that a test can see that it hit a save at times.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["anyres.training.loop", "sklearn.datasets", "tests.training.helpers"])
    options = {**SMALL, **EMA, **changes, "output": str(folder), "save_every_steps": 1}
    dice = random.Random(seed)
    left: list[list[str]] = []
    for kill in range(kills):
        process = context.Process(target=train_small, args=(options,))
        process.start()
        before = state.saved_states(folder)[:1]
        # Every fourth kill may hit the start; the others wait for a step, so that the run gets on.
        while kill % 4 and process.is_alive() and state.saved_states(folder)[:1] == before:
            time.sleep(0.002)
        process.join(dice.uniform(0, 0.2 if kill % 4 else 1.5))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed: make it longer"
        left.append([path.name for path in folder.rglob(".anyres-*")])
    process = context.Process(target=train_small, args=(options,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert {path.name for path in folder.rglob(".*")} == {RECORD, LOCK}
    return left


LONGER = {"epochs": 10, "epoch_size": 80, "eval_every": 2, "fraction": 1.0}


def test_kills_leave_a_run_that_ends_with_the_same_weights(tmp_path: Path) -> None:
    train(small_config(tmp_path / "whole", **EMA, **LONGER))
    survive_kills(tmp_path / "killed", kills=3, seed=0, **LONGER)
    same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_twenty_kills_leave_a_run_that_ends_with_the_same_weights(tmp_path: Path) -> None:
    longer = {**LONGER, "epochs": 24}
    train(small_config(tmp_path / "whole", **EMA, **longer))
    left = survive_kills(tmp_path / "killed", kills=20, seed=1, **longer)
    same_run(tmp_path / "killed", tmp_path / "whole")
    assert any(left), "no kill hit a save"
