"""Damaged and malicious weights files: safetensors, torch files new and old, pickles of arrays."""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from anyres.errors import UserError
from anyres.models._checkpoints import load_checkpoint, read_state
from anyres.models._registry import create_model
from tests.fuzz.core import Failure, Kind, check_sentence, command, kept
from tests.fuzz.mutators import NUMBERS, VALUES, deep, mutate_bytes, mutate_file, mutate_pickle, mutate_tree, to_json

SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3, "img_size": 32, "in_chans": 1}


class Call:
    """Pickles as a call of `function`; the classes of a file's own words need not exist where it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts if self.parts[2] is not None else self.parts[:2]


def _values() -> list[Any]:
    """What else may stand where a tensor belongs."""
    tensors = [
        torch.zeros(0),
        torch.tensor(1.5),
        torch.full((3, 16), torch.nan),
        torch.full((3,), torch.inf),
        torch.zeros(16, 3).T,
        torch.zeros(3, 16, dtype=torch.float16),
        torch.zeros(3, 16, dtype=torch.bfloat16),
        torch.zeros(3, 16, dtype=torch.int64),
        torch.zeros(3, 16, dtype=torch.bool),
        torch.zeros(3, 16, dtype=torch.complex64),
        torch.zeros(3, 16, dtype=torch.float8_e4m3fn),
        torch.eye(3).to_sparse(),
        torch.zeros(1).expand(3, 16),
        torch.zeros(3, 16, device="meta"),
        nn.Parameter(torch.zeros(3, 16)),
    ]
    arrays = [
        np.zeros((3, 16), np.float32),
        np.zeros((3, 16), ">f4"),
        np.zeros((3, 16), np.longdouble),
        np.array(["a", "b"]),
        np.array([None, "a"], dtype=object),
        np.zeros(2, dtype=[("a", "f4"), ("b", "O")]),
        np.zeros(2, "M8[s]"),
        np.float32(1.5),
        np.int64(3),
        np.dtype("f4"),
        np.random.RandomState(0),
    ]
    return [*VALUES, *tensors, *arrays, argparse.Namespace(lr=1), OrderedDict(a=1), b"x", (1, 2), {1, 2}, 1j]


def _malicious() -> list[Any]:
    """What runs code, or breaks memory, where a reader is careless."""
    core: Any = np._core  # type: ignore[attr-defined]  # the names that pickles of arrays hold
    address = (0x4141414141414141).to_bytes(8, "little") * 4
    kinds: list[Any] = [np.dtype("O")]
    for flags in (0, 27, 63):  # whether it says that it holds objects
        kinds.append(Call(np.dtype, "f8", False, True, state=(3, "<", None, None, None, 8, 1, flags)))
        for inner in ("f8", "V8"):
            fields = {"a": (np.dtype("O"), 0)}
            kinds.append(Call(np.dtype, inner, False, True, state=(3, "|", None, ("a",), fields, 8, 1, flags)))
        kinds.append(Call(np.dtype, "V8", False, True, state=(3, "|", (np.dtype("O"), (1,)), None, None, 8, 1, flags)))
    arrays = [
        call
        for kind in kinds
        for call in (
            kind,
            Call(core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, (4,), kind, False, address)),
            Call(core.multiarray.scalar, kind, address[:8]),
            Call(core.numeric._frombuffer, address, kind, (4,), "C"),
            Call(np.ndarray, (4,), kind),
        )
    ]
    calls = [
        Call(os.system, "touch canary"),
        Call(eval, "open('canary', 'w')"),
        Call(exec, "open('canary', 'w').close()"),
        Call(getattr, os, "system"),
        Call(Path("canary").touch),
        Call(np.load, "/etc/passwd"),
        Call(torch.load, "x.pth"),
        Call(bytearray, 1 << 40),
        Call(list, range(10)),
        Call(core.multiarray._reconstruct, np.ndarray, (1 << 40,), b"b"),
        Call(core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, (1 << 33, 0), np.dtype("f4"), False, b"")),
        Call(np.ndarray, (1 << 36,), "f8"),
        Call(torch._utils._rebuild_tensor_v2, torch.zeros(2).untyped_storage(), 1 << 40, (1 << 20,), (1,), False, {}),
        Call(OrderedDict, state={"__class__": dict}),
        Call(argparse.Namespace, state={"__dict__": 3}),
    ]
    loop: list[Any] = []
    loop.append(loop)
    return [*arrays, *calls, *calls, loop, {"model": loop}]


@dataclass(frozen=True)
class Material:
    model: nn.Module
    content: dict[str, Any]
    """A checkpoint as training scripts write it."""
    values: list[Any]
    malicious: list[Any]
    bomb: bytes
    """A zip file of half a megabyte that says it is 512."""


def prepare(_: Path) -> Material:
    torch.manual_seed(0)
    model = create_model("deit_tiny", **SMALL)
    state = model.state_dict()
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3), "step": 4}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    content = {"model": state, "optimizer": optimizer, "args": argparse.Namespace(lr=1e-3), "epoch": 7}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        tensor = io.BytesIO()
        torch.save({"head.weight": torch.zeros(1 << 27)}, tensor)
        with zipfile.ZipFile(tensor) as saved:
            for name in saved.namelist():
                archive.writestr(name, saved.read(name))
    return Material(model, content, _values(), _malicious(), buffer.getvalue())


# Files ----------------------------------------------------------------------------------------------------------------


def _content(rng: random.Random, material: Material) -> Any:
    """A checkpoint's content, sometimes changed, sometimes with something malicious in it."""
    content: Any = material.content if rng.random() < 0.5 else material.content["model"]
    if rng.random() < 0.5:
        content = mutate_tree(rng, content, material.values)
    if rng.random() < 0.1:
        content = {"model": rng.choice(material.malicious), **(content if isinstance(content, dict) else {})}
    return content


def _torch_file(rng: random.Random, material: Material, new: bool) -> bytes:
    buffer = io.BytesIO()
    try:
        protocol = rng.choice((2, 2, 3, 4))
        torch.save(_content(rng, material), buffer, _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    except Exception:  # not everything that is tried can be saved at all
        return b"PK"
    return buffer.getvalue()


def _safetensors(rng: random.Random, material: Material) -> bytes:
    """A file whose header is changed, with the length that fits it."""
    data = save({name: tensor.contiguous() for name, tensor in material.content["model"].items()}, {"format": "pt"})
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if rng.random() < 0.8:
        header = mutate_tree(rng, header, [*VALUES, "F64", "BOOL", "I8", [0, 0], [0, 2**62], [4, 0], [2**40, 2**40]])
    text = to_json(rng, header).encode()
    length = len(text) if rng.random() < 0.8 else abs(rng.choice(NUMBERS))
    return struct.pack("<Q", length) + text + body[: rng.choice((len(body), len(body), 0, 7))]


def _pickle(rng: random.Random, material: Material) -> bytes:
    """Arrays as detectron2 stores them."""
    arrays = {name: tensor.numpy() for name, tensor in material.content["model"].items()}
    content: Any = {"model": arrays, "__author__": "me"} if rng.random() < 0.5 else arrays
    if rng.random() < 0.5:
        values = [value for value in material.values if not torch.is_tensor(value)]
        content = mutate_tree(rng, content, values)
    if rng.random() < 0.4:
        content = {"model": rng.choice(material.malicious)}
    try:
        data = pickle.dumps(content, rng.randint(0, 5))
    except Exception:  # not everything that is tried can be pickled at all
        data = pickle.dumps(None)
    return mutate_pickle(rng, data) if rng.random() < 0.6 else data


def _repacked(rng: random.Random, data: bytes) -> bytes:
    """A torch file whose parts are damaged, in a zip file that is whole."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        names = old.namelist()
        victim = rng.choice([*names, *(name for name in names if name.endswith("data.pkl"))])
        for name in names:
            content = old.read(name)
            if name == victim:
                way = rng.randrange(5)
                if way == 0:
                    continue
                if way == 1:
                    name = rng.choice(("../x", "/x", name.upper(), "x" * 300, rng.choice(names)))
                elif name.endswith("data.pkl"):
                    content = mutate_pickle(rng, content)
                else:
                    content = mutate_bytes(rng, content)
            new.writestr(name, content, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    return buffer.getvalue()


def _file(rng: random.Random, material: Material) -> tuple[str, bytes]:
    """(suffix, content)."""
    way = rng.random()
    if way < 0.01:
        return ".pth", material.bomb
    if way < 0.02:
        return ".pkl", pickle.dumps(deep(rng, 1, 300), 2) + b"".join(b"]" * 100_000 for _ in range(2)) + b"."
    if way < 0.3:
        suffix, data = ".safetensors", _safetensors(rng, material)
    elif way < 0.55:
        suffix, data = rng.choice((".pth", ".pt", ".bin")), _torch_file(rng, material, new=True)
        if rng.random() < 0.5 and len(data) > 2:
            data = _repacked(rng, data)
    elif way < 0.75:
        suffix, data = rng.choice((".pth", ".tar")), _torch_file(rng, material, new=False)
    else:
        suffix, data = ".pkl", _pickle(rng, material)
    if rng.random() < 0.4:
        data = mutate_file(rng, data)
    if rng.random() < 0.05:
        suffix = rng.choice((".safetensors", ".pth", ".pkl", "", ".npz"))
    return suffix, data


def case(rng: random.Random, material: Material) -> str:
    suffix, data = _file(rng, material)
    path = Path(f"x{suffix}")
    path.write_bytes(data)
    with kept(path):
        verdict = _command(rng, path) if rng.random() < 0.1 else _load(rng, material, path)
    if Path("canary").exists():
        raise Failure("code from the file was run")
    return verdict


def _load(rng: random.Random, material: Material, path: Path) -> str:
    model = copy.deepcopy(material.model)
    before = copy.deepcopy(model.state_dict())
    try:
        if rng.random() < 0.3:
            content = read_state(path)
            if not isinstance(content, dict):
                raise Failure(f"read_state returned a {type(content).__name__}")
        else:
            load_checkpoint(model, path, strict=rng.random() < 0.5, ema=rng.random() < 0.2)
    except UserError as error:
        after = model.state_dict()
        if not all(torch.equal(after[name], tensor) for name, tensor in before.items()):
            raise Failure("a refused file changed the model") from error
        check_sentence(error)
        return "refused"
    return "worked"


def _command(rng: random.Random, path: Path) -> str:
    return command("convert", path, rng.choice(("out.safetensors", "out.pth", "out")), "--model", "deit_tiny").verdict()


KIND = Kind("checkpoints", case, prepare, short=0, long=2000, batch=20, megabytes=400)
