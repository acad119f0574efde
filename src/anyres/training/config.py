"""Everything a training run can be told: one flat set of options for each task."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from anyres.errors import UserError
from anyres.options import Options, Range, Sides, option


class RunConfig(Options):
    """Options that every training run has; those of `Classify` and the other tasks are below."""

    task: ClassVar[str]

    # What is trained, on what, into which folder
    model: str = option("resformer_tiny", "Architecture, a name from `anyres models`.")
    model_args: dict[str, Any] = option({}, "Further arguments of create_model, such as {embed_dim: 96, depth: 4}.")
    data: str = option("digits", "Training data: digits, a folder, hf:NAME, hf-stream:NAME or wds:PATTERN.")
    val_data: str | None = option(
        None, "Validation data, if not the other split of `data`: its validation split, or all."
    )
    output: str = option("runs/train", "Run folder: weights, metrics, logs and the state to resume from.")
    init: Literal["published", "scaled"] = option(
        "published", "First weights: the paper's, or scaled by each layer's inputs, from which narrow networks learn."
    )
    init_from: str | None = option(
        None, "Start from the weights of this run or checkpoint file; not the same as resume."
    )
    bit_depth: int | None = option(
        None, "Bits of pictures of more than 8 bits, where the files do not say: 12, or 16 for dark ones.", ge=1, le=32
    )
    epoch_size: int | None = option(
        None, "Images per epoch: needed for streams of unknown length, a cut for others.", ge=1
    )
    max_bad_fraction: float = option(0.01, "Share of unreadable images in an epoch at which the run stops.", ge=0, le=1)

    # Sizes
    sizes: Sides = option([128, 160, 224], "Training sizes in pixels, each a side or HEIGHTxWIDTH.")
    mode: Literal["replicate", "sample"] = option(
        "replicate", "Every image at all sizes per step, or a size per batch."
    )
    per: Literal["iteration", "epoch"] = option(
        "iteration", "How often mode=sample draws a size, the same on all processes."
    )
    window: int | None = option(None, "mode=replicate with only this many neighbouring sizes per step, sliding.", ge=1)
    separate_aug: bool = option(True, "Augment every replica on its own; otherwise small ones are resized large ones.")
    distillation: Literal["none", "smooth-l1", "l2", "cosine", "kl"] = option(
        "smooth-l1", "Scale consistency: how a replica is compared with the next larger one."
    )
    distillation_target: Literal["cls", "gap", "logit"] = option(
        "cls", "Scale consistency: what is compared (vector that enters the head, mean patch token, logits)."
    )
    distillation_alpha: float = option(1.0, "Weight of scale consistency.", ge=0)

    # Optimisation
    epochs: int = option(300, "Passes over the training images.", ge=1)
    batch_size: int = option(
        128, "Images per optimiser step, over all processes and accumulated passes together.", ge=1
    )
    accumulation: int = option(1, "Passes that a step is split into, to save memory; their gradients add up.", ge=1)
    optimizer: str = option("adamw", "Optimiser, a name of timm.optim.")
    lr: float | None = option(None, "Peak learning rate; otherwise base_lr x batch_size / 512.", gt=0)
    base_lr: float = option(5e-4, "Peak learning rate of a batch_size of 512.", gt=0)
    weight_decay: float = option(0.05, "Weight decay; not for biases, norms and the model's no_weight_decay().", ge=0)
    decay_all: bool = option(
        False, "Weight decay for every parameter, without exceptions (PVT's and P2T's dense settings)."
    )
    layer_decay: float | None = option(None, "Learning rate factor from one layer to the one below it.", gt=0)
    schedule: Literal["iteration", "epoch"] = option(
        "iteration", "Learning rate: changed at every step (ResFormer), or once per epoch as DeiT does."
    )
    decay: Literal["cosine", "linear", "poly", "step"] = option(
        "cosine", "How the learning rate falls; poly has the power 0.9, step is 0.1 at each of `drops`."
    )
    drops: list[float] = option([], "decay=step: epochs after which the learning rate is a tenth.")
    warmup_epochs: float = option(5.0, "Epochs of linear warm-up.", ge=0)
    warmup_lr: float = option(0.0, "Learning rate at the start of the warm-up (not scaled).", ge=0)
    min_lr: float = option(1e-5, "Learning rate at the end (not scaled).", ge=0)
    clip_grad: float | None = option(None, "Largest norm of the gradient.", gt=0)
    ema_decay: float = option(0.0, "Decay of an exponential moving average of the weights; 0 keeps none.", ge=0, lt=1)
    ema_warmup: bool = option(False, "Let the average's decay grow from 0, for runs of a few thousand steps.")
    drop_path: float = option(0.1, "Stochastic depth of the last block.", ge=0, lt=1)

    # Augmentation
    hflip: float = option(0.5, "Probability of a horizontal flip.", ge=0, le=1)
    repeats: int = option(1, "Repeated augmentation: copies of an image per epoch (an epoch keeps its length).", ge=1)

    # Validation
    eval_every: int = option(
        1, "Epochs between validations at all training sizes; the last one always validates.", ge=1
    )
    eval_batch_size: int = option(128, "Images per process and pass in validation.", ge=1)

    # Machine
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps.")
    precision: Literal["auto", "float32", "bf16", "fp16"] = option(
        "auto", "auto is bf16 on GPUs and CPUs that do it in hardware (AMX), float32 elsewhere."
    )
    compile: bool = option(False, "torch.compile, one graph per size.")
    grad_checkpointing: bool = option(False, "Compute activations again in the backward pass to save memory.")
    fsdp: bool = option(False, "Shard weights and optimiser over the processes (FSDP2) instead of copying them (DDP).")
    workers: int | None = option(None, "Data loading processes per process; otherwise from the number of CPUs.", ge=0)
    seed: int = option(0, "Seed of everything random.", ge=0)
    deterministic: bool = option(False, "Only deterministic kernels (slower on GPUs).")

    # Records, saving and stopping
    log_every: int = option(50, "Optimiser steps between log entries.", ge=1)
    wandb: bool = option(False, "Log to Weights & Biases too (TensorBoard always).")
    trackio: bool = option(False, "Log to trackio too.")
    progress: bool = option(True, "Progress bar on a terminal, a line per epoch elsewhere; or silence.")
    save_every_minutes: float = option(
        10.0, "Save to resume from this often, besides every epoch's end; 0: never.", ge=0
    )
    save_every_steps: int | None = option(None, "Also save it after this many optimiser steps.", ge=1)
    keep: int = option(2, "States to keep; the older ones serve if a disk spoils the newest.", ge=1)
    resume: Literal["auto", "yes", "no"] = option(
        "auto", "Continue the run in `output`: if there is one, or fail, or start over and replace it."
    )
    time_limit: float | None = option(None, "Minutes after which the run saves and stops; resume continues it.", gt=0)
    early_stop: int | None = option(None, "Stop after this many epochs without a better validation.", ge=1)
    fraction: float = option(1.0, "Dry run on this part of every epoch and of the validation images.", gt=0, le=1)

    @model_validator(mode="after")
    def _together(self) -> Self:
        self.check()
        return self

    def check(self) -> None:
        """Refuse values that do not go together, before anything is loaded. Raises UserError."""
        count = len(self.shapes)
        if self.window is not None and self.window > count:
            raise UserError(f"window is {self.window}; it must not exceed the number of sizes, {count}")
        if self.batch_size % self.accumulation:
            raise UserError(f"batch_size {self.batch_size} must be a multiple of accumulation, {self.accumulation}")
        if self.warmup_epochs >= self.epochs:
            raise UserError(f"warmup_epochs is {self.warmup_epochs:g}; it must be less than epochs, {self.epochs}")
        if self.distillation == "kl" and self.distillation_target != "logit":
            raise UserError("distillation kl compares probabilities; set distillation_target logit")
        if self.schedule == "epoch" and self.decay != "cosine":
            raise UserError(f"schedule epoch is DeiT's cosine; choose schedule iteration for decay {self.decay}")
        if (self.decay == "step") != bool(self.drops):
            raise UserError(
                f"decay is {self.decay} and drops are {self.drops}; step needs drops, and nothing else (drops=none)"
            )
        if self.fsdp and self.ema_decay:
            raise UserError("fsdp keeps no moving average of the weights; set ema_decay 0 or fsdp false")

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Training sizes as (height, width), large to small."""
        from anyres.data.schedule import parse_sizes

        shapes = dict.fromkeys(parse_sizes(",".join(map(str, self.sizes))))
        return sorted(shapes, key=lambda shape: -shape[0] * shape[1])

    @property
    def peak_lr(self) -> float:
        return self.lr if self.lr is not None else self.base_lr * self.batch_size / 512

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to config.yaml."""
        return {"task": self.task, **self.model_dump()}

    @property
    def unused_parameters(self) -> bool:
        """Whether a step may leave parameters without a gradient, which DDP has to be told."""
        return False


class LabelConfig(RunConfig):
    """Options of runs whose images or clips carry one label: crops, mixing, smoothing."""

    separate_mix: bool = option(False, "Draw mixup/CutMix for every replica on its own.")
    crop_scale: Range = option([0.08, 1.0], "Random crop: range of its share of the image's area.")
    crop_ratio: Range = option([3 / 4, 4 / 3], "Random crop: range of width / height.")
    interpolation: str = option("bicubic", "Interpolation of resizes, in training and validation.")
    auto_augment: str | None = option("rand-m9-mstd0.5-inc1", "timm's RandAugment/AutoAugment policy.")
    color_jitter: float = option(0.3, "Colour jitter; inactive together with auto_augment.", ge=0)
    erasing: float = option(0.25, "Probability of random erasing.", ge=0, le=1)
    mixup: float = option(0.8, "Mixup alpha; 0 switches it off.", ge=0)
    cutmix: float = option(1.0, "CutMix alpha; 0 switches it off.", ge=0)
    mix_prob: float = option(1.0, "Probability that a batch is mixed.", ge=0, le=1)
    switch_prob: float = option(0.5, "Probability of CutMix where both are on.", ge=0, le=1)
    smoothing: float = option(0.1, "Label smoothing.", ge=0, lt=1)


class TrainConfig(LabelConfig):
    """Options of a classifier's run; defaults are ResFormer's published ones where it has one."""

    task: ClassVar[str] = "classification"

    crop_pct: float | None = option(
        None, "Validation: centre crop / resized short side; otherwise 0.875 (digits: 1).", gt=0, le=1
    )

    # Distillation from a teacher network
    teacher: str | None = option(None, "Teacher network: a timm name (regnety_160), or a run's weights folder.")
    teacher_weights: str | None = option(None, "Checkpoint of a timm teacher; otherwise timm's pretrained weights.")
    teacher_names: str | None = option(
        None, "File of the teacher's class names, one on a line, instead of those that it comes with."
    )
    teacher_kind: Literal["hard", "soft"] = option("hard", "Learn the teacher's arg-max label, or its probabilities.")
    teacher_alpha: float = option(0.5, "Weight of the teacher's term; the labels' has 1 minus this.", ge=0, le=1)
    teacher_tau: float = option(
        1.0, "Temperature of teacher_kind=soft (its term is divided by batch times classes).", gt=0
    )

    # Sparsification (DynamicViT)
    sparsify: float = option(
        0.0,
        "Weight of the keep-ratio loss; the unpruned model, from teacher_weights or init_from, teaches. 0: off.",
        ge=0,
    )

    @property
    def unused_parameters(self) -> bool:
        # Without a teacher a distilled model's second head gets no gradient.
        return self.teacher is None and "distilled" in self.model

    def check(self) -> None:
        super().check()
        if self.sparsify and self.teacher:
            raise UserError("sparsify has its own teacher, the unpruned model; leave teacher out")


class DenseConfig(RunConfig):
    """Options of runs with a head on a dense backbone; a task gives those without a default here their own."""

    head: str = option("", "Head on the backbone.")
    head_args: dict[str, Any] = option({}, "Further arguments of the head, such as {channels: 128}.")
    head_lr: float = option(1.0, "Learning rate factor of the head.", gt=0)
    batch_norm: Literal["train", "sync", "frozen"] = option(
        "train",
        "Batch norms: statistics of a process' own images, of all processes' (GPUs), or the backbone's from init_from.",
    )
    longest: float = option(4.0, "Largest ratio of the long side to the short one; longer images get smaller.", ge=1)

    def check(self) -> None:
        super().check()
        if self.head_lr != 1 and self.layer_decay is not None:
            raise UserError(f"head_lr is {self.head_lr:g}, but layer_decay gives every layer its rate; leave one out")


class SegmentConfig(DenseConfig):
    """Options of a segmentation run; defaults are those of UPerNet on ADE20K in 160k steps of 16 images."""

    task: ClassVar[str] = "segmentation"

    head: Literal["upernet", "semantic_fpn", "segformer"] = option("upernet", "Head on the backbone.")
    model: str = option("resformer_small", "Backbone, a name from `anyres models`.")
    data: str = option("digits", "Training data: digits, a folder in ADE20K's layout, or hf:NAME.")
    num_classes: int | None = option(None, "Classes of masks whose folder does not name them.", ge=1)
    reduce_zero_label: bool | None = option(None, "Label 0 is ignored and the others move down (ADE20K: true).")
    mask_values: list[int] = option(
        [], "The number that masks store for each class, in order (black and white: 0,255)."
    )
    sizes: Sides = option([512], "Training crops in pixels, each a side or HEIGHTxWIDTH.")
    distillation: Literal["none", "smooth-l1", "l2", "cosine", "kl"] = option(
        "none", "Scale consistency: how a replica is compared with the next larger one."
    )
    distillation_target: Literal["gap"] = option("gap", "Scale consistency compares the mean of the last map.")
    epochs: int = option(127, "Passes over the training images.", ge=1)
    batch_size: int = option(16, "Images per optimiser step, over all processes and accumulated passes together.", ge=1)
    lr: float | None = option(6e-5, "Peak learning rate.", gt=0)
    weight_decay: float = option(0.01, "Weight decay; not for biases, norms and the model's no_weight_decay().", ge=0)
    decay: Literal["cosine", "linear", "poly", "step"] = option(
        "linear", "How the learning rate falls; poly has the power 0.9, step is 0.1 at each of `drops`."
    )
    warmup_epochs: float = option(1.2, "Epochs of linear warm-up.", ge=0)
    warmup_lr: float = option(1e-6, "Learning rate at the start of the warm-up (not scaled).", ge=0)
    min_lr: float = option(0.0, "Learning rate at the end (not scaled).", ge=0)
    scale: Range = option([0.5, 2.0], "Random scale: range of the image's short side over the crop's.")
    largest_share: float = option(
        0.75,
        "Training crops in which a class covers more than this are drawn again, up to ten times; 1: never.",
        gt=0,
        le=1,
    )
    photometric: bool = option(True, "Random brightness, contrast, saturation and hue.")
    longest: float = option(4.0, "Largest ratio of the long side to the short one; longer images get smaller.", ge=1)
    divisor: int = option(1, "Test: sides of images are rounded up to multiples of this (PVT, P2T, GPViT: 32).", ge=1)
    eval_every: int = option(
        10, "Epochs between validations at all training sizes; the last one always validates.", ge=1
    )
    eval_batch_size: int = option(1, "Images per process and pass in validation.", ge=1)


class DetectConfig(DenseConfig):
    """Options of a detection run; defaults are those of Mask R-CNN on COCO in 12 epochs ("1x") of 16 images."""

    task: ClassVar[str] = "detection"

    head: Literal["retinanet", "faster_rcnn", "mask_rcnn", "keypoint_rcnn", "cascade_rcnn", "cascade_mask_rcnn"] = (
        option("mask_rcnn", "Detector on the backbone.")
    )
    model: str = option("resformer_small", "Backbone, a name from `anyres models`.")
    data: str = option("digits", "Training data: digits, or a folder in COCO's layout.")
    sizes: Sides = option([800], "Training sizes in pixels: short sides, or boxes HEIGHTxWIDTH.")
    distillation: Literal["none", "smooth-l1", "l2", "cosine", "kl"] = option(
        "none", "Scale consistency: how a replica is compared with the next larger one."
    )
    distillation_target: Literal["gap"] = option("gap", "Scale consistency compares the mean of the last map.")
    epochs: int = option(12, "Passes over the training images.", ge=1)
    batch_size: int = option(16, "Images per optimiser step, over all processes and accumulated passes together.", ge=1)
    lr: float | None = option(1e-4, "Peak learning rate.", gt=0)
    decay: Literal["cosine", "linear", "poly", "step"] = option(
        "step", "How the learning rate falls; poly has the power 0.9, step is 0.1 at each of `drops`."
    )
    drops: list[float] = option([8, 11], "decay=step: epochs after which the learning rate is a tenth.")
    warmup_epochs: float = option(0.07, "Epochs of linear warm-up.", ge=0)
    warmup_lr: float = option(1e-7, "Learning rate at the start of the warm-up (not scaled).", ge=0)
    multi_scale: bool = option(False, "Random short sides and crops (the 3x schedules' recipe), within each size.")
    jitter: list[float] = option([], "Large-scale jitter: range of the random scale, such as 0.1,2.0.")
    longest: float = option(
        1333 / 800, "Largest ratio of the long side to the short one; longer images get smaller.", ge=1
    )
    keep_empty: bool = option(False, "Train on images without objects, too.")
    eval_batch_size: int = option(1, "Images per process and pass in validation.", ge=1)

    @property
    def unused_parameters(self) -> bool:
        return True  # a step without a positive proposal leaves the mask head alone


class VideoConfig(LabelConfig):
    """Options of a video run; defaults are those of ResFormer in TimeSformer where the paper has any."""

    task: ClassVar[str] = "video"

    model: str = option("resformer_base", "A plain backbone (divided space-time attention) or a video network.")
    data: str = option("digits", "Training data: digits, or a folder in Kinetics' layout (CLASS folders or CSV).")
    frames: int = option(8, "Frames of a clip.", ge=1)
    stride: float = option(32.0, "Source frames (at 30 a second) from one frame of a clip to the next.", gt=0)
    epochs: int = option(15, "Passes over the training clips.", ge=1)
    batch_size: int = option(64, "Clips per optimiser step, over all processes and accumulated passes together.", ge=1)
    optimizer: str = option("sgd", "Optimiser, a name of timm.optim.")
    lr: float | None = option(5e-3, "Peak learning rate.", gt=0)
    weight_decay: float = option(1e-4, "Weight decay; not for biases, norms and the model's no_weight_decay().", ge=0)
    decay: Literal["cosine", "linear", "poly", "step"] = option(
        "step", "How the learning rate falls; poly has the power 0.9, step is 0.1 at each of `drops`."
    )
    drops: list[float] = option([11, 14], "decay=step: epochs after which the learning rate is a tenth.")
    warmup_epochs: float = option(0.0, "Epochs of linear warm-up.", ge=0)
    interpolation: str = option("bilinear", "Interpolation of resizes, in training and validation.")
    mixup: float = option(0.0, "Mixup alpha; 0 switches it off.", ge=0)
    cutmix: float = option(0.0, "CutMix alpha; 0 switches it off.", ge=0)
    smoothing: float = option(0.0, "Label smoothing.", ge=0, lt=1)
    auto_augment: str | None = option(None, "timm's RandAugment/AutoAugment policy, the same for all frames.")
    erasing: float = option(0.0, "Probability of random erasing.", ge=0, le=1)
    crop_pct: float = option(1.0, "Validation: centre crop / resized short side (MViTv2: 0.875).", gt=0, le=1)
    eval_batch_size: int = option(16, "Clips per process and pass in validation.", ge=1)


CONFIGS: dict[str, type[RunConfig]] = {
    config.task: config for config in (TrainConfig, SegmentConfig, DetectConfig, VideoConfig)
}
"""Options by task."""
