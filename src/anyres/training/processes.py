"""What processes do together: start, vote, share gradients, and shard weights or put them together again.

Accelerate does all that it offers on every device; FSDP2 is torch's own, because Accelerate ignores its plugin on CPUs,
where the tests shard.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from anyres.errors import UserError
from anyres.extras import require
from anyres.tasks.network import TaskModel, blocks_of
from anyres.training.config import RunConfig
from anyres.training.run import Run

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
"""torch's name of a precision → Accelerate's."""


def precision_of(accelerator: Accelerator) -> str:
    """The precision of the arithmetic, one of `PRECISIONS`."""
    return next(name for name, value in PRECISIONS.items() if value == accelerator.mixed_precision)


def start_processes(config: RunConfig) -> Accelerator:
    """The Accelerator of this process; reads the environment that torchrun or accelerate launch set up."""
    kind, _, index = config.device.partition(":")
    has_gpu, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    present = {"cpu": True, "auto": True, "cuda": has_gpu, "mps": has_mps}
    if kind not in present or (index and (kind != "cuda" or not index.isdecimal())):
        raise UserError(f"device {config.device!r} is unknown; choose auto, cpu, cuda, cuda:1 or mps")
    if not present[kind] or (index and int(index) >= torch.cuda.device_count()):
        raise UserError(f"device {config.device!r} is not on this machine; choose auto or cpu")
    if index:
        torch.cuda.set_device(int(index))
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    trackers = ["tensorboard", *(name for name in ("wandb", "trackio") if getattr(config, name))]
    for name in trackers[1:]:
        require(name)
    cpu = kind == "cpu" or not (has_gpu or has_mps)
    # Accelerate keeps its state for the life of the process; a second run in it may differ in device or precision.
    # The process group stays open until the process ends: gloo cannot open a second one under the same addresses.
    connected = torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=not connected)
    with waiting_for_peers():
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=PRECISIONS[_pick_precision(config.precision, cpu)],
            log_with=trackers,
            project_config=ProjectConfiguration(config.output, logging_dir=str(Path(config.output) / "tensorboard")),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.unused_parameters)],
        )
    if accelerator.num_processes > 1 and not connected:
        atexit.register(accelerator.state.destroy_process_group)
    if config.fsdp and accelerator.num_processes == 1:
        raise UserError(
            "fsdp needs several processes; start them with torchrun or accelerate launch, or set fsdp false"
        )
    return accelerator


def _pick_precision(precision: str, cpu: bool) -> str:
    """One of `PRECISIONS` that this machine does fast, unless a certain one is asked for."""
    if precision == "float16" and cpu:
        raise UserError("precision float16 needs a GPU; choose auto, bfloat16 or float32")
    if precision == "auto":
        if cpu:
            # AVX512-BF16 alone is slower than float32 (docs/speed.md).
            fast = torch.cpu._is_amx_tile_supported()
        else:
            fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if fast else "float32"
    return precision


@contextmanager
def waiting_for_peers() -> Iterator[None]:
    """End this process in one sentence on a signal, or if the others do not come, while torch waits for them.

    Python handles no signal then, so a thread does. Where torchrun started the processes it watches them and ends the
    others with one; started by hand, one that has died before it was seen cannot be told from one that is slow.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    patience = None
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        patience = 20 if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost", "::1") else 600
    received, wake = socket.socketpair()
    received.settimeout(patience)

    def watch() -> None:
        try:
            number = next(iter(received.recv(1)), None)
            sentence = "stopped while it waited for the other processes of the run"
        except TimeoutError:
            number, sentence = 0, f"the other processes of the run did not come within {patience} seconds: start all"
        if number is not None:
            os.write(2, f"anyres: {sentence}.\n".encode())
            os._exit(128 + number if number else 2)

    wake.setblocking(False)
    before = signal.set_wakeup_fd(wake.fileno())
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        wake.close()
        thread.join()
        received.close()


@contextmanager
def peers_explained() -> Iterator[None]:
    """Say in one sentence that another process of the run ended, which the next exchange with it shows."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("gloo/transport/", "ncclRemoteError")):
            raise
        raise UserError(
            "another process of this run has ended, and so does this one; the other's own message says why. "
            "The same command continues the run"
        ) from error


@contextmanager
def stop_signals(run: Run) -> Iterator[None]:
    """Collect SIGINT and SIGTERM, so that the run can save and stop cleanly; a second one acts at once."""

    def handle(number: int, _frame: Any) -> None:
        if run.signals:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        run.signals.append(number)
        if run.accelerator.is_main_process:  # not print: the signal may have come in the middle of one
            os.write(2, b"anyres: saving and stopping after this step; a second signal stops at once.\n")

    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Votes ----------------------------------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """What the processes agreed on in a step; the wish of one is enough."""

    not_finite: bool
    stop: bool
    timeout: bool
    save: bool


def start_vote(run: Run, losses: list[Tensor]) -> Callable[[], Decision]:
    """Begin to ask every process; the returned function waits for the answer.

    Called when the losses are known but the last backward is not queued yet: on a GPU the answer travels to the host
    while that backward runs, so reading it before the optimiser step does not drain the queue.
    """
    config, device = run.config, run.accelerator.device
    now = time.monotonic()
    wishes = (
        bool(run.signals),
        config.time_limit is not None and now - run.started > config.time_limit * 60,
        config.save_every_minutes > 0 and now - run.saved > config.save_every_minutes * 60,
    )
    not_finite = torch.stack(losses).isfinite().all().logical_not()
    if run.accelerator.num_processes == 1 and device.type != "cuda":
        return lambda: Decision(bool(not_finite), *wishes)
    # From pinned memory, since a copy from ordinary memory may wait for the GPU.
    own = torch.tensor(wishes, dtype=torch.float32, pin_memory=device.type == "cuda")
    votes = run.accelerator.reduce(torch.cat([not_finite.float()[None], own.to(device, non_blocking=True)]), "sum")
    if device.type != "cuda":
        return lambda: Decision(*(vote > 0 for vote in votes.tolist()))
    on_host = torch.empty(votes.shape, pin_memory=True)
    on_host.copy_(votes, non_blocking=True)
    arrived: Any = torch.cuda.Event()
    arrived.record()

    def read() -> Decision:
        arrived.synchronize()
        return Decision(*(vote > 0 for vote in on_host.tolist()))

    return read


# DDP and FSDP2 --------------------------------------------------------------------------------------------------------


def no_sync(run: Run) -> AbstractContextManager[None]:
    """Leave gradients on their process during a backward; Accelerate's context knows no network that torch sharded."""
    return _whole_gradients(run.forward) if run.config.fsdp else run.accelerator.no_sync(run.forward)


@contextmanager
def _whole_gradients(forward: Any) -> Iterator[None]:
    forward.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        forward.set_requires_gradient_sync(True)


def clip_gradients(run: Run) -> Tensor:
    """Clip to `clip_grad` if it is set. Returns the norm of all gradients before that, a scalar on the device."""
    parameters = list(run.model.parameters())
    if run.config.clip_grad is not None:
        norm = run.accelerator.clip_grad_norm_(parameters, run.config.clip_grad)
    else:
        run.accelerator.unscale_gradients()
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def shard(forward: nn.Module) -> None:
    """FSDP2: one group per block of the backbone, the rest in the root's.

    A group's weights are whole only while its own `forward` runs, so that what is entered by another door, such as the
    stages of a cascade, has to be in the root's.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model: Any = forward.model
    for part in model.parts_to_shard() if isinstance(model, TaskModel) else blocks_of(model):
        fully_shard(part)
        if hasattr(part, "forward_both"):  # how DynamicViT's blocks with two paths are called in training
            register_fsdp_forward_method(part, "forward_both")
    fully_shard(forward)


def refresh_plain(run: Run) -> None:
    """Put the sharded weights together in `run.plain`."""
    if run.config.fsdp:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        run.plain.load_state_dict(get_model_state_dict(run.model, options=StateDictOptions(full_state_dict=True)))


def whole_states(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """(weights, optimiser state), gathered from the shards to the first process."""
    if not run.config.fsdp:
        return run.model.state_dict(), run.optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_state_dict(run.model, run.optimizer.optimizer, options=options)


def load_whole_states(run: Run, model: dict[str, Any], optimizer: dict[str, Any] | None = None) -> None:
    """Give weights and optimiser state to the network, sharded if it is."""
    if run.config.fsdp:
        from torch.distributed.checkpoint import state_dict

        options = state_dict.StateDictOptions(full_state_dict=True)
        state_dict.set_model_state_dict(run.model, model, options=options)
        if optimizer is not None:
            state_dict.set_optimizer_state_dict(run.model, run.optimizer.optimizer, optimizer, options=options)
        return
    run.model.load_state_dict(model)
    if optimizer is not None:
        run.optimizer.load_state_dict(optimizer)
