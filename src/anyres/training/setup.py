"""From options to a run: data, network, optimiser, teacher, and their wrappers."""

from __future__ import annotations

import logging
import os
import time
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from anyres.checkpoints import load_checkpoint
from anyres.data import Augmentation, MapSource, Mixing, SizeSchedule, Source, TrainLoader, open_source
from anyres.errors import UserError
from anyres.registry import create_model, load_pretrained
from anyres.training.config import TrainConfig, did_you_mean
from anyres.training.losses import BaseLoss, Outputs, distilled_loss, soft_cross_entropy
from anyres.training.processes import load_whole_states, shard
from anyres.training.sparsification import sparsification_losses
from anyres.training.state import Position

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything that is alive during a run."""

    config: TrainConfig
    accelerator: Accelerator
    folder: Path
    model: Any
    """The network without wrappers; under FSDP2 its parameters are sharded."""
    plain: Any
    """The network with whole parameters, to validate and save: `model` itself except under FSDP2."""
    forward: nn.Module
    """`TrainForward` as DDP or FSDP2 wrap it."""
    optimizer: Any
    ema: ModelEmaV3 | None
    loader: TrainLoader
    mixing: Mixing
    base_loss: BaseLoss
    val_source: Source
    batches_per_epoch: int
    signals: list[int]
    """SIGINT and SIGTERM received so far."""
    position: Position = field(default_factory=Position)
    started: float = field(default_factory=time.monotonic)
    saved: float = field(default_factory=time.monotonic)
    status: str = ""
    """Why the run ended; empty while it goes on."""


class TrainForward(nn.Module):
    """`model.forward_train` behind `forward`, the call that DDP and FSDP2 see. Vectors come out in float32."""

    def __init__(self, model: Any, accelerator: Accelerator, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self.autocast = accelerator.autocast
        # A graph per training size: there are few of them, and a graph for all sizes is slower.
        self.call = torch.compile(model.forward_train, dynamic=False) if compiled else model.forward_train

    def forward(self, view: Tensor, targets: tuple[str, ...]) -> Outputs:
        with self.autocast():
            outputs = self.call(view, targets)
        # Copies, because FSDP2's backward hook gets lost on a view that something changes in place.
        return {name: vector.float().clone() for name, vector in outputs.items()}


def build(config: TrainConfig, accelerator: Accelerator, signals: list[int]) -> Run:
    """Everything from a fixed seed, with the weights of `init_from` if asked for."""
    set_seed(config.seed, deterministic=config.deterministic)
    source = open_source(config.data, split="train")
    loader = build_loader(config, accelerator, source)
    batches = max(1, round(loader.steps_per_epoch * config.fraction)) // config.accumulation * config.accumulation
    if batches == 0:
        raise UserError(
            f"a step takes batch_size {config.batch_size} images, more than an epoch of {config.data} has; lower it"
        )
    model = build_model(config, source).to(accelerator.device)
    forward: nn.Module = TrainForward(model, accelerator, config.compile)
    plain = deepcopy(model) if config.fsdp else model
    if config.fsdp:
        shard(forward)
    optimizer = build_optimizer(config, model)
    run = Run(
        config=config,
        accelerator=accelerator,
        folder=Path(config.output),
        model=model,
        plain=plain,
        forward=forward if config.fsdp else accelerator.prepare_model(forward),
        optimizer=accelerator.prepare_optimizer(optimizer),
        ema=ModelEmaV3(model, config.ema_decay, use_warmup=config.ema_warmup) if config.ema_decay else None,
        loader=loader,
        mixing=Mixing(
            num_classes=len(source.label_names),
            mixup=config.mixup,
            cutmix=config.cutmix,
            prob=config.mix_prob,
            switch_prob=config.switch_prob,
            label_smoothing=config.smoothing,
            separate=config.separate_mix,
            seed=config.seed,
        ),
        base_loss=build_base_loss(config, accelerator, source),
        val_source=open_validation(config, source),
        batches_per_epoch=batches,
        signals=signals,
    )
    torch.manual_seed(config.seed + accelerator.process_index)  # processes differ in their drop paths
    return run


def build_loader(config: TrainConfig, accelerator: Accelerator, source: Any) -> TrainLoader:
    workers = config.workers
    if workers is None:
        share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = 0 if config.data == "digits" else max(0, min(share - 1, 8))
    return TrainLoader(
        source,
        SizeSchedule(config.shapes, mode=config.mode, per=config.per, window=config.window, seed=config.seed),
        Augmentation(
            scale=(config.crop_scale[0], config.crop_scale[1]),
            ratio=(config.crop_ratio[0], config.crop_ratio[1]),
            hflip=config.hflip,
            auto_augment=config.auto_augment,
            color_jitter=config.color_jitter,
            erasing=config.erasing,
            interpolation=config.interpolation,
            separate=config.separate_aug,
        ),
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


def open_validation(config: TrainConfig, train: Source) -> Source:
    spec = config.val_data or config.data
    source = open_source(spec, split="val", in_chans=train.in_chans, label_names=train.label_names)
    if config.fraction < 1 and isinstance(source, MapSource):
        return Thinned(source, config.fraction)
    return source


class Thinned(MapSource):
    """A dry run's part of a source: evenly spread images, since files are sorted by class."""

    def __init__(self, source: MapSource, fraction: float) -> None:
        super().__init__(source.name, source.label_names, source.in_chans)
        self.mean, self.std, self.crop_pct = source.mean, source.std, source.crop_pct
        self._source = source
        self._indices = range(0, len(source), max(1, round(1 / fraction)))

    def __len__(self) -> int:
        return len(self._indices)

    def _item(self, index: int) -> Any:
        return self._source.item(self._indices[index])


def build_model(config: TrainConfig, source: Source) -> Any:
    """The network for the source's classes and channels, and what a user of its weights has to know about them."""
    options = {
        "num_classes": len(source.label_names),
        "in_chans": source.in_chans,
        "img_size": config.shapes[0],
        "drop_path_rate": config.drop_path,
        **config.model_args,
    }
    model: Any = create_model(config.model, **options)
    for height, width in config.shapes:
        if min(height, width) < model.minimum_size:
            raise UserError(f"size {height}x{width} is below the minimum of {config.model}, {model.minimum_size}")
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        "input_size": (source.in_chans, *config.shapes[0]),
        "mean": tuple(source.mean),
        "std": tuple(source.std),
        "crop_pct": config.crop_pct or source.crop_pct,
        "interpolation": config.interpolation,
        "label_names": list(source.label_names),
        "train_sizes": [list(shape) for shape in config.shapes],
    }
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def start_from(run: Run, path: str) -> None:
    """Take over weights of another run or checkpoint; what does not fit stands in the log."""
    report = load_checkpoint(run.plain, weights_file(path), strict=False)
    if run.config.fsdp:
        load_whole_states(run, run.plain.state_dict())
    if run.ema is not None:
        run.ema.module.load_state_dict(run.model.state_dict())
    logger.log(logging.INFO if report.complete else logging.WARNING, "started from %s: %s", path, report)


def weights_file(path: str) -> Path:
    """The best weights of a run folder; the path itself if it is none."""
    inside = [Path(path) / "best" / "model.safetensors", Path(path) / "model.safetensors"]
    return next((candidate for candidate in inside if candidate.is_file()), Path(path))


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimiser and parameter groups: no decay for vectors, biases and `no_weight_decay()`; layer-wise rates."""
    known = [str(name) for name in list_optimizers()]
    if config.optimizer not in known:
        raise UserError(f"optimizer {config.optimizer!r} is unknown{did_you_mean(config.optimizer, known)}")
    # One fused kernel instead of hundreds of small ones; torch has it for these, on CPUs and GPUs.
    fused: dict[str, Any] = {"fused": True} if config.optimizer in ("adam", "adamw", "sgd") else {}
    return create_optimizer_v2(
        model,
        config.optimizer,
        lr=config.peak_lr,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
        **fused,
    )


def build_base_loss(config: TrainConfig, accelerator: Accelerator, source: Source) -> BaseLoss:
    """Cross-entropy with the soft labels; with a teacher, DeiT's distillation: it sees the same mixed view."""
    if config.sparsify:
        return build_sparsification_loss(config, accelerator, source)
    if config.teacher is None:
        return lambda outputs, target, view: soft_cross_entropy(outputs["logits"], target)
    teacher = load_teacher(config, source).to(accelerator.device)

    def base_loss(outputs: Outputs, target: Tensor, view: Tensor) -> Tensor:
        with torch.no_grad(), accelerator.autocast():
            teacher_logits = teacher(view)
        # A model without a distillation token learns from the teacher through its only head (an ablation of the paper).
        return distilled_loss(
            soft_cross_entropy(outputs["logits"], target),
            outputs.get("dist_logits", outputs["logits"]),
            teacher_logits,
            config.teacher_kind,
            config.teacher_alpha,
            config.teacher_tau,
        )

    return base_loss


def build_sparsification_loss(config: TrainConfig, accelerator: Accelerator, source: Source) -> BaseLoss:
    """DynamicViT's loss; the teacher is the model without its predictors and sees the same mixed view."""
    weights = config.teacher_weights or config.init_from
    if weights is None:
        raise UserError("sparsify starts from a trained unpruned model; set init_from to its weights")
    ratios = getattr(build_model(config, source), "keep_ratios", ())
    if not ratios:
        raise UserError(
            f"sparsify needs a model with score predictors, such as dynamicvit_deit_small; not {config.model}"
        )
    unpruned = replace(config, model_args={**config.model_args, "prune_before": ()}, drop_path=0.0)
    teacher = build_model(unpruned, source).to(accelerator.device)
    report = load_checkpoint(teacher, weights_file(weights), strict=False)
    if report.missing or report.mismatched:
        raise UserError(f"the weights of sparsify's teacher do not fit {config.model}: {report}")
    teacher.eval().requires_grad_(False)

    def base_loss(outputs: Outputs, target: Tensor, view: Tensor) -> Tensor:
        with torch.no_grad(), accelerator.autocast():
            known = teacher.forward_train(view)
        classification = soft_cross_entropy(outputs["logits"], target)
        return sparsification_losses(classification, outputs, known, ratios, config.sparsify)[-1]

    return base_loss


def load_teacher(config: TrainConfig, source: Source) -> nn.Module:
    """A timm network, or the weights folder of a run. Errors: UserError in one sentence, also without network."""
    name, weights = str(config.teacher), config.teacher_weights
    options: dict[str, Any] = {"num_classes": len(source.label_names), "in_chans": source.in_chans}
    if Path(name).is_dir():
        teacher: Any = load_pretrained(name)
    else:
        try:
            teacher = timm.create_model(name, pretrained=weights is None, checkpoint_path=weights or "", **options)
        except Exception as error:  # timm and the hub raise what they like, down to network errors
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"teacher {name!r} cannot be loaded ({reason}); give a timm name where there is internet access, "
                "its checkpoint as teacher_weights, or the weights folder of a run"
            ) from error
    if teacher.num_classes != options["num_classes"]:
        raise UserError(
            f"teacher {name!r} knows {teacher.num_classes} classes but the data has {options['num_classes']}; "
            "choose one that was trained on the same classes"
        )
    teacher.eval().requires_grad_(False)
    return cast(nn.Module, teacher)
