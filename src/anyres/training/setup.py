"""Build a run from its options: data, network, optimiser, objective and their wrappers."""

from __future__ import annotations

import logging
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from anyres.data import MapSource, SizeSchedule, TrainLoader
from anyres.data.loading import Views
from anyres.data.sources import shared_files
from anyres.errors import UserError
from anyres.models._checkpoints import KINDS
from anyres.models._registry import check_model_args
from anyres.options import did_you_mean
from anyres.tasks import TASKS, Task
from anyres.tasks.objective import Outputs
from anyres.tasks.weights import weights_file
from anyres.training.config import RunConfig
from anyres.training.processes import load_whole_states, shard
from anyres.training.run import Run

logger = logging.getLogger(__name__)


class TrainForward(nn.Module):
    """Expose `model.forward_train` as `forward`, which DDP and FSDP2 hook into. All outputs are in float32."""

    def __init__(self, model: Any, accelerator: Accelerator, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self.autocast = accelerator.autocast
        # One graph per training size: there are only a few sizes, and a single dynamic graph is slower.
        self.call = torch.compile(model.forward_train, dynamic=False) if compiled else model.forward_train

    def forward(self, view: Tensor, targets: tuple[str, ...]) -> Outputs:
        try:
            with self.autocast():
                outputs = self.call(view, targets)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):  # torch's message about batch norm
                raise
            raise UserError(
                "a batch norm of this network gets only one value per channel, but needs more in training; give every "
                "process at least 2 images per pass (batch_size / accumulation / processes) or use larger sizes"
            ) from error
        # Clone, because FSDP2's backward hook is lost on a view that is later modified in place.
        return {name: vector.float().clone() for name, vector in outputs.items()}


def build(config: RunConfig, accelerator: Accelerator) -> Run:
    """Build a run from a fixed seed. Raises UserError if the options do not fit the data or the network."""
    set_seed(config.seed, deterministic=config.deterministic)
    task = TASKS[config.task]
    source = task.open_source(config, "train")
    source.bit_depth = config.bit_depth
    loader = build_loader(config, accelerator, source, task.views(config, source))
    batches = max(1, round(loader.steps_per_epoch * config.fraction)) // config.accumulation * config.accumulation
    if batches == 0:
        raise UserError(f"batch_size {config.batch_size} is larger than an epoch of {config.data}; lower batch_size")
    model = build_model(config, task, source).to(accelerator.device)
    forward: nn.Module = TrainForward(model, accelerator, config.compile)
    plain = deepcopy(model) if config.fsdp else model
    if config.fsdp:
        shard(forward)
    optimizer = build_optimizer(config, model)
    run = Run(
        config=config,
        task=task,
        accelerator=accelerator,
        folder=Path(config.output),
        model=model,
        plain=plain,
        forward=forward if config.fsdp else accelerator.prepare_model(forward),
        optimizer=accelerator.prepare_optimizer(optimizer),
        ema=ModelEmaV3(model, config.ema_decay, use_warmup=config.ema_warmup) if config.ema_decay else None,
        loader=loader,
        objective=task.objective(config, source, accelerator),
        val_source=open_validation(config, task, source),
        batches_per_epoch=batches,
    )
    torch.manual_seed(config.seed + accelerator.process_index)  # drop path must differ between processes
    return run


def build_loader(config: RunConfig, accelerator: Accelerator, source: Any, views: Views) -> TrainLoader:
    workers = config.workers
    if workers is None:
        share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = 0 if config.data == "digits" else max(0, min(share - 1, 8))
    return TrainLoader(
        source,
        config.build(SizeSchedule, sizes=config.shapes),
        views,
        config.batch_size // config.accumulation,
        seed=config.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=workers,
        repeats=config.repeats,
        epoch_size=config.epoch_size,
        max_bad_fraction=config.max_bad_fraction,
        pin_memory=accelerator.device.type == "cuda",
    )


def open_validation(config: RunConfig, task: Task, train: Any) -> Any:
    source = task.open_source(config, "val", like=train)
    source.bit_depth = config.bit_depth
    check_disjoint(config, train, source)
    fraction = config.fraction
    return Thinned(source, fraction) if fraction < 1 and isinstance(source, MapSource) else source


def check_disjoint(config: RunConfig, train: Any, val: Any) -> None:
    """Check that the validation data share no files with the training data, which would inflate the scores.

    Raises UserError if they do; only logs a warning if the user named both datasets explicitly.
    """
    if not (isinstance(train, MapSource) and isinstance(val, MapSource)):
        return
    shared = shared_files(val, train)
    if not shared:
        return
    found = (
        f"{len(shared)} of the {len(val)} files of the validation data {val.name} are also in the training data, "
        f"the first is {shared[0]}"
    )
    if config.val_data is None:
        raise UserError(f"{found}: remove them from one of the two, or give other validation data as val_data")
    logger.warning("%s: validation scores are too high, because these files can be memorised", found)


class Thinned(MapSource):
    """Evenly spaced items of a source for a dry run (files are sorted by class); delegates the rest to the source."""

    def __init__(self, source: MapSource, fraction: float) -> None:
        vars(self).update(vars(source))
        self._source = source
        self._indices = range(0, len(source), max(1, round(1 / fraction)))

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_source"], name)

    def __len__(self) -> int:
        return len(self._indices)

    def item(self, index: int) -> Any:
        return self._source.item(self._indices[index])

    def _item(self, index: int) -> Any:
        return self._source._item(self._indices[index])


def build_model(config: RunConfig, task: Task, source: Any) -> Any:
    """Build the network and record in its pretrained config what is needed to use the trained weights.

    Raises UserError if a training size is below the network's minimum.
    """
    check_model_args(config.model, config.model_args)
    model = task.build(config, source)
    if config.init == "scaled":
        model.init_scaled()
    for height, width in config.shapes:
        if min(height, width) < model.minimum_size:
            raise UserError(f"size {height}x{width} is below the minimum of {config.model}, {model.minimum_size}")
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        "input_size": (source.in_chans, *config.shapes[0]),
        "mean": tuple(source.mean),
        "std": tuple(source.std),
        "label_names": list(source.label_names),
        "train_sizes": [list(shape) for shape in config.shapes],
        "data": _public(config.data),
        "base_model": config.init_from and _public(config.init_from),
        **task.facts(config, source),
    }
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def _public(name: str) -> str:
    """A name for a model card: of a path only its end, which says nothing about this machine."""
    return name if ":" in name else Path(name).name


def start_from(run: Run, path: str) -> None:
    """Load the weights of another run or checkpoint; weights that do not fit are listed in the log."""
    report = run.task.load(run.plain, weights_file(path), KINDS[run.config.init_weights])
    if run.config.fsdp:
        load_whole_states(run, run.plain.state_dict())
    if run.ema is not None:
        run.ema.module.load_state_dict(run.model.state_dict())
    rest = "; what is missing or of another shape starts anew" if report.missing or report.mismatched else ""
    logger.log(logging.WARNING if report.notable else logging.INFO, "started from %s: %s%s", path, report, rest)


def build_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Create timm's optimiser with `parameter_groups`. Raises UserError if its name is unknown."""
    known = [str(name) for name in list_optimizers()]
    if config.optimizer not in known:
        raise UserError(f"optimizer {config.optimizer!r} is unknown{did_you_mean(config.optimizer, known)}")
    # A fused kernel replaces hundreds of small ones; torch has one for these optimisers (not SGD on sharded weights).
    kernels = ("adam", "adamw") if config.fsdp else ("adam", "adamw", "sgd")
    fused: dict[str, Any] = {"fused": True} if config.optimizer in kernels else {}
    return create_optimizer_v2(
        parameter_groups(config, model),
        config.optimizer,
        lr=config.peak_lr,
        weight_decay=config.weight_decay,
        **fused,
    )


def parameter_groups(config: RunConfig, model: Any) -> list[dict[str, Any]]:
    """Return timm's parameter groups.

    Vectors, biases and `no_weight_decay()` are exempt from weight decay unless `decay_all` is set. The learning rate
    may decay from layer to layer (`layer_decay`), or be `head_lr` times as high outside the backbone.
    """
    decay: dict[str, Any] = {
        "weight_decay": config.weight_decay,
        "weight_decay_exclude_1d": not config.decay_all,
        "no_weight_decay_list": set() if config.decay_all else model.no_weight_decay(),
    }
    if config.layer_decay is not None:
        return param_groups_layer_decay(model, layer_decay=config.layer_decay, **decay)
    groups = param_groups_weight_decay(model, **decay)
    head_lr = getattr(config, "head_lr", 1.0)
    if head_lr == 1:
        return groups
    inside = {id(parameter) for parameter in model.backbone.parameters()}
    parts = []
    for group in groups:
        for of_head, factor in ((False, 1.0), (True, head_lr)):
            chosen = [parameter for parameter in group["params"] if (id(parameter) not in inside) == of_head]
            parts.append({**group, "params": chosen, "lr_scale": factor})
    return [group for group in parts if group["params"]]
