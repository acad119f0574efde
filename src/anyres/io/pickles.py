"""Safe reading of pickles and torch files: nothing in them is ever executed.

A pickle is a program that can import and call anything. The machine in this file runs only its instructions for
numbers, strings, lists and dictionaries, and never calls anything that the file names. The few functions that torch and
NumPy use to store tensors have counterparts here, which check their arguments. Everything else becomes a `Foreign`, a
name without behaviour, so that the tensors next to it remain usable.

Memory use is bounded by the size of the file, whatever sizes the file claims. Supported formats are torch's zip
archives, torch's format before 1.6, and plain pickles of tensors or NumPy arrays (detectron2).

One file, though long: the machine, the objects it may build and the file formats are security-checked together.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_DIMENSIONS = 64  # NumPy's limit
_ROOM = 8, 1 << 24
"""Tensors may take this many times the file's size, plus this many bytes: some share storage or repeat values."""

_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    )
}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_NUMERIC = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16)")
"""NumPy's codes for dtypes that consist only of bytes."""


class Foreign(dict[Any, Any]):
    """Stand-in for an object that is not built; `name` is the class or function that the file asked for.

    If the object is a kind of dictionary, this has the items given in the file.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


class _Name(str):
    """A class or function that a file refers to."""


class _Storage(NamedTuple):
    data: Tensor
    """Raw bytes, uint8."""
    dtype: torch.dtype


class _Dtype:
    """A NumPy dtype; `found` is None if it is not plain bytes (objects, fields)."""

    def __init__(self, code: Any) -> None:
        self.found = np.dtype(code) if isinstance(code, str) and _NUMERIC.fullmatch(code) else None

    def build(self, state: Any) -> None:
        _, order, subarray, names, fields = state[:5]
        if self.found is not None and order in ("<", ">"):
            self.found = self.found.newbyteorder(order)
        if not subarray is names is fields is None:
            self.found = None


class _Array:
    """A NumPy array whose content comes later in the file."""

    content: Any = None


Locate = Callable[[torch.dtype, str, int], _Storage]
"""Function from (dtype, key, number of values) to the storage."""


def _nothing_outside(dtype: torch.dtype, key: str, count: int) -> _Storage:
    raise ValueError("it refers to data outside of the pickle")


class _Machine:
    """Runs pickles. `locate` finds the storages of a torch file, and `room` is the limit for tensors in bytes."""

    def __init__(self, locate: Locate, room: int) -> None:
        self.locate = locate
        self.room = room
        self.foreign: dict[str, None] = {}
        """Names of objects that were not built, in file order."""

    def run(self, stream: BinaryIO) -> Any:
        """Return the object that the pickle at the stream's position describes, leaving the stream after it."""
        stack: list[Any] = []
        marks: list[int] = []  # stack heights
        memo: dict[int, Any] = {}

        def since_mark() -> list[Any]:
            place = marks.pop()
            found = stack[place:]
            del stack[place:]
            return found

        argument: Any
        for opcode, argument, _ in pickletools.genops(stream):
            match opcode.name:
                case "BINPUT" | "LONG_BINPUT" | "PUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET" | "GET":
                    value = memo[argument]
                    stack.append(value.content if isinstance(value, _Array) else value)
                case "MARK":
                    marks.append(len(stack))
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode.name == "NEWTRUE")
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST" | "EMPTY_SET":
                    stack.append([])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "LIST" | "FROZENSET":
                    stack.append(since_mark())
                case "DICT":
                    stack.append(_fill({}, since_mark()))
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _fill(stack[-1], [key, value])
                case "SETITEMS":
                    pairs = since_mark()
                    _fill(stack[-1], pairs)
                case "APPEND":
                    value = stack.pop()
                    _extend(stack[-1], [value])
                case "APPENDS" | "ADDITEMS":
                    values = since_mark()
                    _extend(stack[-1], values)
                case "GLOBAL":
                    stack.append(_Name(argument.replace(" ", ".", 1)))
                case "STACK_GLOBAL":
                    module, name = stack[-2:]
                    stack[-2:] = [_Name(f"{module}.{name}")]
                case "REDUCE" | "NEWOBJ":
                    arguments = stack.pop()
                    stack[-1] = self.call(stack[-1], arguments)
                case "NEWOBJ_EX":
                    _, arguments = stack.pop(), stack.pop()
                    stack[-1] = self.call(stack[-1], arguments)
                case "INST":
                    stack.append(self.call(_Name(argument.replace(" ", ".", 1)), since_mark()))
                case "OBJ":
                    kind, *arguments = since_mark()
                    stack.append(self.call(kind, arguments))
                case "BUILD":
                    state = stack.pop()
                    stack[-1] = self.build(stack[-1], state)
                case "PERSID" | "BINPERSID":
                    stack.append(self.outside(argument if opcode.name == "PERSID" else stack.pop()))
                case "POP":
                    if marks and marks[-1] == len(stack):
                        marks.pop()
                    else:
                        stack.pop()
                case "POP_MARK":
                    since_mark()
                case "DUP":
                    stack.append(stack[-1])
                case "STOP":
                    return stack.pop()
                case "PROTO" | "FRAME" | "READONLY_BUFFER":
                    pass
                case "EXT1" | "EXT2" | "EXT4" | "NEXT_BUFFER":
                    raise ValueError("it refers to data outside of the pickle")
                case _:  # a number, a string or bytes
                    stack.append(argument)
        raise AssertionError  # genops either reaches STOP or raises

    def call(self, function: Any, arguments: Any) -> Any:
        """Return the counterpart's result for a function that the file calls."""
        if not isinstance(function, _Name):
            raise ValueError("it calls what is no function")
        counterpart = _COUNTERPARTS.get(function.replace("numpy.core.", "numpy._core."))
        return self.refuse(function) if counterpart is None else counterpart(self, *arguments)

    def build(self, made: Any, state: Any) -> Any:
        """Return an object after applying the state that the file gives it."""
        if isinstance(made, _Array):
            _, shape, dtype, by_columns, content = state
            made.content = self.array(content, dtype, shape, "F" if by_columns else "C")
            return made.content
        if isinstance(made, _Dtype):
            made.build(state)
        return made

    def refuse(self, name: Any) -> Foreign:
        """Return the stand-in for an object that is not built."""
        name = str(name) if isinstance(name, _Name) else "an object without a class"
        self.foreign[name] = None
        return Foreign(name)

    def outside(self, place: Any) -> Any:
        """Return what torch stores outside the pickle: a storage, or a module class saved with its source code."""
        kind, name, *rest = place
        if kind == "module":
            return name
        key, _, count, *view = rest
        if view not in ([], [None]) or not isinstance(key, str):
            raise ValueError("it is of a version of torch that is too old")
        return self.locate(_STORAGES[name.rpartition(".")[2]], key, _whole_numbers([count])[0])

    def take(self, count: int) -> None:
        """Reserve `count` bytes for a copy; a tiny file could ask for the same data many times."""
        self.room -= count
        if self.room < 0:
            raise ValueError("it claims tensors many times larger than the file")

    # Tensors and arrays

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
        """Counterpart of `_rebuild_tensor` (all three versions): a view of a storage, made contiguous."""
        if not isinstance(storage, _Storage):
            raise ValueError("it has a tensor without data")
        dtype = next((_DTYPES[str(item)] for item in rest if isinstance(item, _Name)), storage.dtype)
        if any(isinstance(item, dict) and item for item in rest[2:]):
            raise ValueError("it has a tensor that is conjugated or negated when it is read")
        sizes, strides = _whole_numbers(size), _whole_numbers(stride)
        begin = _whole_numbers([offset])[0]
        values = storage.data[: len(storage.data) // dtype.itemsize * dtype.itemsize].view(dtype)
        if len(sizes) != len(strides):
            raise ValueError("it has a tensor whose strides do not belong to its shape")
        count = math.prod(sizes)
        end = begin + sum((length - 1) * step for length, step in zip(sizes, strides, strict=True)) + 1
        if count and end > len(values):
            raise ValueError("it has a tensor larger than its data")
        self.take(count * dtype.itemsize)
        return values.as_strided(sizes, strides, begin if count else 0).contiguous()

    def array(self, content: Any, dtype: Any, shape: Any, order: Any) -> Any:
        """Return a NumPy array as a tensor, from its bytes."""
        if not isinstance(dtype, _Dtype):
            raise ValueError("it has an array without a type")
        if dtype.found is None:
            return self.refuse(_Name("numpy.ndarray"))
        raw = _bytes(content)
        self.take(len(raw))
        values = np.frombuffer(raw, dtype.found).reshape(_whole_numbers(shape), order="F" if order == "F" else "C")
        return torch.from_numpy(values.astype(dtype.found.newbyteorder("="), order="C"))

    def scalar(self, dtype: Any, content: Any = None) -> Any:
        """Return a NumPy scalar as a Python number."""
        if not isinstance(dtype, _Dtype) or dtype.found is None:
            return self.refuse(_Name("numpy.generic"))
        return np.frombuffer(_bytes(content), dtype.found)[0].item()

    def reconstruct(self, kind: Any, *_: Any) -> Any:
        """Return a NumPy array that has no content yet."""
        return _Array() if kind == "numpy.ndarray" else self.refuse(kind)

    def nested(self, content: Any) -> Any:
        """Return a storage nested in a plain pickle: bytes in torch's older format, which is itself a pickle."""
        if self.locate is not _nothing_outside:
            raise ValueError("it has a torch file inside a torch file")
        self.take(len(content))
        return _read_legacy(io.BytesIO(content), self)


def _fill(target: Any, pairs: list[Any]) -> Any:
    if isinstance(target, dict):
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Other keys cannot name weights, and hashing a tuple recurses as deep as the tuple.
            if isinstance(key, str | bytes | int | float | None):
                target[key] = value
    return target


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, list):
        target += values


def _whole_numbers(values: Any) -> list[int]:
    if len(values) > _MAX_DIMENSIONS or not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise ValueError("it has a tensor with an impossible shape")
    return list(values)


def _bytes(content: Any) -> bytes:
    """Return bytes; Python 2 stored them as text."""
    return content.encode("latin-1") if isinstance(content, str) else bytes(memoryview(content))


def _dictionary(machine: _Machine, *arguments: Any) -> dict[Any, Any]:
    """Return a plain dictionary: the last argument of OrderedDict, defaultdict or Counter, a dictionary or pairs."""
    items = arguments[-1] if arguments else None
    if not isinstance(items, dict | list | tuple):
        return {}
    machine.take(64 * len(items))
    if isinstance(items, dict):
        return dict(items)
    made: dict[Any, Any] = {}
    for key, value in items:
        _fill(made, [key, value])
    return made


def _encoded(machine: _Machine, text: str | bytes = "", *_: Any) -> bytes:
    """Return bytes as older protocols store them: `codecs.encode(text, "latin1")`, or `bytes()` if empty."""
    machine.take(len(text))
    return _bytes(text)


_COUNTERPARTS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _Machine.tensor,
    "torch._utils._rebuild_tensor_v2": _Machine.tensor,
    "torch._utils._rebuild_tensor_v3": _Machine.tensor,
    "torch._utils._rebuild_parameter": lambda machine, tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda machine, tensor, *_: tensor,
    "torch._tensor._rebuild_from_type_v2": lambda machine, function, kind, arguments, state: machine.call(
        function, arguments
    ),
    "torch.storage._load_from_bytes": _Machine.nested,
    "torch.Size": lambda machine, sizes: sizes,
    "torch.device": lambda machine, kind, *_: kind,
    "numpy._core.multiarray._reconstruct": _Machine.reconstruct,
    "numpy._core.multiarray.scalar": _Machine.scalar,
    "numpy._core.numeric._frombuffer": lambda machine, content, dtype, shape, order, *_: machine.array(
        content, dtype, shape, order
    ),
    "numpy.dtype": lambda machine, code, *_: _Dtype(code),
    **dict.fromkeys(("_codecs.encode", "__builtin__.bytes", "builtins.bytes", "builtins.bytearray"), _encoded),
    "copy_reg._reconstructor": lambda machine, kind, *_: machine.refuse(kind),
    "copyreg._reconstructor": lambda machine, kind, *_: machine.refuse(kind),
    **dict.fromkeys(
        ("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict"), _dictionary
    ),
    **{
        f"{module}.{name}": lambda machine, values=(): values  # always a list in files
        for module in ("builtins", "__builtin__")
        for name in ("set", "frozenset", "list")
    },
}
"""Counterparts of the functions and classes that a file may name."""


def read_pickle(path: Path) -> tuple[Any, list[str]]:
    """Read a torch file or a pickle; returns (content with arrays as tensors, names of everything left out).

    Raises any exception that a damaged file causes.
    """
    size = path.stat().st_size
    machine = _Machine(_nothing_outside, _ROOM[0] * size + _ROOM[1])
    if zipfile.is_zipfile(path):
        content = _read_archive(path, size, machine)
    else:
        content = _read_stream(io.BytesIO(path.read_bytes()), machine)
    return content, list(machine.foreign)


def _read_archive(path: Path, size: int, machine: _Machine) -> Any:
    """Read torch's format since 1.6: an uncompressed zip file with NAME/data.pkl and the storages NAME/data/KEY."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: record for record in archive.infolist()}
        programs = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise ValueError("it is a zip file, but none of torch's")
        stored = all(record.file_size == record.compress_size for record in archive.infolist())
        if not stored or sum(record.file_size for record in archive.infolist()) > size:
            raise ValueError("its parts are compressed or larger than the file, and torch's are not")
        name = programs[0].removesuffix("data.pkl")
        if f"{name}byteorder" in records and archive.read(f"{name}byteorder") != b"little":
            raise ValueError("it comes from a big-endian machine")
        read: dict[str, Tensor] = {}

        def locate(dtype: torch.dtype, key: str, count: int) -> _Storage:
            if key not in read:
                read[key] = _byte_tensor(archive.read(f"{name}data/{key}"))
            return _part(read[key], dtype, count)

        machine.locate = locate
        return machine.run(io.BytesIO(archive.read(programs[0])))


def _read_stream(stream: io.BytesIO, machine: _Machine) -> Any:
    """Read a plain pickle, or torch's format before 1.6."""
    first = machine.run(stream)
    stream.seek(0)
    return _read_legacy(stream, machine) if first == _LEGACY_MAGIC else machine.run(stream)


def _read_legacy(stream: io.BytesIO, machine: _Machine) -> Any:
    """Read torch's format before 1.6.

    It is a series of pickles (magic number, version, facts about the machine, content, storage keys), followed by the
    storages, each preceded by its number of values.
    """
    for _ in range(3):
        facts = machine.run(stream)
    if not facts.get("little_endian", True):
        raise ValueError("it comes from a big-endian machine")
    content = stream.tell()
    types: dict[str, torch.dtype] = {}

    def note(dtype: torch.dtype, key: str, count: int) -> _Storage:
        types[key] = dtype
        return _Storage(torch.empty(count * dtype.itemsize, dtype=torch.uint8, device="meta"), dtype)

    _Machine(note, machine.room).run(stream)
    read: dict[str, Tensor] = {}
    for key in machine.run(stream):
        length = int.from_bytes(stream.read(8), "little") * types[key].itemsize
        data = stream.read(length)
        if len(data) < length:
            raise ValueError("it ends early")
        read[key] = _byte_tensor(data)
    stream.seek(content)

    def locate(dtype: torch.dtype, key: str, count: int) -> _Storage:
        return _part(read[key], dtype, count)

    outer, machine.locate = machine.locate, locate
    made = machine.run(stream)
    machine.locate = outer
    return made


def _part(data: Tensor, dtype: torch.dtype, count: int) -> _Storage:
    if count * dtype.itemsize > len(data):
        raise ValueError("it has a storage larger than its data")
    return _Storage(data[: count * dtype.itemsize], dtype)


def _byte_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
