"""Distributed training: start-up, votes, gradient synchronisation, and sharding and gathering of weights.

We use Accelerate wherever it works on every device. For FSDP2 we call torch directly, because Accelerate ignores its
FSDP plugin on CPUs, where the tests run.
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
"""torch's name for a precision → Accelerate's."""


def precision_of(accelerator: Accelerator) -> str:
    """Return the precision that the accelerator computes in, one of `PRECISIONS`."""
    return next(name for name, value in PRECISIONS.items() if value == accelerator.mixed_precision)


def start_processes(config: RunConfig) -> Accelerator:
    """Create this process's Accelerator from the environment that torchrun or accelerate launch set up.

    Raises UserError if this machine or the number of processes does not support the options.
    """
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
    # Accelerate keeps its state as long as the process lives, but a second run in the same process may use another
    # device or precision. The process group stays open: gloo cannot open a second one at the same addresses.
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
    """Return the requested precision, or for "auto" the fastest one on this machine."""
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
    """While torch waits for the other processes, exit with a message on a signal or when they fail to appear.

    Python cannot run signal handlers during that wait, so a thread watches for signals. There is no timeout under
    torchrun, which stops all processes if one dies. Without torchrun, a process that has died cannot be told from a
    slow one, so this one gives up after a while.
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
            sentence = "stopped while waiting for the other processes of the run"
        except TimeoutError:
            number, sentence = 0, f"the other processes did not connect within {patience} seconds; start them all"
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
    """Raise UserError for a communication error, which means that another process of the run has ended."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("gloo/transport/", "ncclRemoteError")):
            raise
        raise UserError(
            "another process of this run has ended, so this one ends too; the other's own message says why. "
            "The same command continues the run"
        ) from error


@contextmanager
def stop_signals(run: Run) -> Iterator[None]:
    """Record SIGINT and SIGTERM so that the run can save and stop cleanly; a second signal stops it at once."""

    def handle(number: int, _frame: Any) -> None:
        if run.signals:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        run.signals.append(number)
        if run.accelerator.is_main_process:  # not print(), which the signal may have interrupted
            os.write(2, b"anyres: saving and stopping after this step; a second signal stops at once.\n")

    if threading.current_thread() is not threading.main_thread():  # only the main thread can set signal handlers
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
    """The joint decision of the processes in a step; each field is true if any process voted for it."""

    not_finite: bool
    stop: bool
    timeout: bool
    save: bool


def start_vote(run: Run, losses: list[Tensor]) -> Callable[[], Decision]:
    """Start a vote of all processes and return a function that waits for the result.

    This is called when the losses are known but the last backward pass is not queued yet. On a GPU the result is then
    copied to the host while that backward pass runs, so reading it before the optimiser step does not drain the queue.
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
    # Pinned memory, because a copy from pageable memory may wait for the GPU.
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
    """Return a context without gradient synchronisation; Accelerate's does not support networks sharded by torch."""
    return _whole_gradients(run.forward) if run.config.fsdp else run.accelerator.no_sync(run.forward)


@contextmanager
def _whole_gradients(forward: Any) -> Iterator[None]:
    forward.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        forward.set_requires_gradient_sync(True)


def clip_gradients(run: Run) -> Tensor:
    """Clip the gradients to `clip_grad` if it is set. Return their norm before clipping, a scalar on the device."""
    parameters = list(run.model.parameters())
    if run.config.clip_grad is not None:
        norm = run.accelerator.clip_grad_norm_(parameters, run.config.clip_grad)
    else:
        run.accelerator.unscale_gradients()
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def shard(forward: nn.Module) -> None:
    """Shard a network with FSDP2: one group per block of the backbone, everything else in the root group.

    A group's weights are gathered only while its own `forward` runs. Modules called in any other way, such as the
    stages of a cascade, therefore have to be in the root group.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model: Any = forward.model
    for part in model.parts_to_shard() if isinstance(model, TaskModel) else blocks_of(model):
        fully_shard(part)
        if hasattr(part, "forward_both"):  # DynamicViT calls its two-path blocks this way in training
            register_fsdp_forward_method(part, "forward_both")
    fully_shard(forward)


def refresh_plain(run: Run) -> None:
    """Gather the sharded weights into `run.plain`."""
    if run.config.fsdp:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        run.plain.load_state_dict(get_model_state_dict(run.model, options=StateDictOptions(full_state_dict=True)))


def whole_states(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (weights, optimiser state), gathered from the shards on the first process."""
    if not run.config.fsdp:
        return run.model.state_dict(), run.optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_state_dict(run.model, run.optimizer.optimizer, options=options)


def load_whole_states(run: Run, model: dict[str, Any], optimizer: dict[str, Any] | None = None) -> None:
    """Load complete weights and optimiser state into the network, which may be sharded."""
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
