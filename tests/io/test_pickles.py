"""Pickles and torch files: what is in them is read, and nothing of it runs, crashes or takes more memory than the file
has.

One file, though long: a list of attacks, short each.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import functools
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyres.errors import UserError
from anyres.io.pickles import Foreign, read_pickle
from anyres.models._checkpoints import load_checkpoint, read_state
from anyres.models._registry import create_model

# Good files -----------------------------------------------------------------------------------------------------------

TENSORS = {
    "plain": torch.arange(6.0).reshape(2, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "part": torch.arange(10.0)[3:9:2],
    "repeated": torch.tensor([1.0, 2.0]).expand(3, 2),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 3),
    **{
        str(dtype): torch.tensor([0, 1, 1]).to(dtype)
        for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.uint16)
    },
    "complex": torch.tensor([1 + 2j]),
    "small": torch.ones(3).to(torch.float8_e4m3fn),
}
ARRAYS = {
    "rows": np.arange(6.0).reshape(2, 3),
    "columns": np.arange(6.0).reshape(2, 3).T,
    "big endian": np.arange(3, dtype=">i4"),
    "bool": np.array([True, False]),
    "complex": np.array([1j]),
    "scalar": np.array(2.0),
    "empty": np.zeros((0, 2)),
}


def same(value: Any, expected: torch.Tensor) -> bool:
    numbers = torch.float64 if expected.dtype.itemsize == 1 and expected.is_floating_point() else expected.dtype
    return value.dtype == expected.dtype and torch.equal(value.to(numbers), expected.to(numbers))


@pytest.mark.parametrize("archive", [True, False])
def test_tensors_of_torch_files(archive: bool, tmp_path: Path) -> None:
    content = {"model": collections.OrderedDict(TENSORS), "epoch": 3, "names": ["a", None, 1.5, True, b"x"]}
    torch.save(content, tmp_path / "x", _use_new_zipfile_serialization=archive)
    found, foreign = read_pickle(tmp_path / "x")
    assert not foreign
    assert found.keys() == content.keys()
    assert (found["epoch"], found["names"]) == (3, content["names"])
    assert found["model"].keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert same(found["model"][name], tensor.detach()), name


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_tensors_of_plain_pickles(protocol: int, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in TENSORS.items() if protocol > 1 or name != "small"}
    content = {"arrays": ARRAYS, "tensors": tensors, "number": np.float64(2), "count": np.int32(7), "both": (1, [2])}
    (tmp_path / "x").write_bytes(pickle.dumps(content, protocol))
    found, foreign = read_pickle(tmp_path / "x")
    assert not foreign
    assert (found["number"], found["count"], found["both"]) == (2.0, 7, (1, [2]))
    for name, array in ARRAYS.items():
        assert same(found["arrays"][name], torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))), name
    for name, tensor in tensors.items():
        assert same(found["tensors"][name], tensor.detach()), name


class Settings(dict[str, Any]):
    """As yacs' and mmengine's settings are."""

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        self.frozen = True


class History:
    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values = np.ones(3)

    def __reduce__(self) -> Any:
        return History, (), (None, {"values": self.values})


class Numbers(list[Any]):
    pass


def foreign_objects() -> dict[str, Any]:
    """What training programs store beside their weights."""
    return {
        "options": argparse.Namespace(lr=0.1),
        "settings": Settings(a=Settings(b=1)),
        "history": History(),
        "numbers": Numbers([1, 2]),
        "path": Path("a"),
        "time": datetime.datetime(2020, 1, 1),
        "function": functools.partial(print, 1),
        "class": Settings,
        "objects": np.array([None, {}], dtype=object),
        "texts": np.array(["a", "b"]),
        "records": np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]),
        "date": np.datetime64("2020-01-01"),
        "random": np.random.default_rng(0),
        "layout": torch.strided,
        "defaults": collections.defaultdict(list, a=[1]),
        "counts": collections.Counter("ab"),
        "set": {1, 2},
        "frozen set": frozenset({1}),
        "module": torch.nn.Linear(2, 2),
        "sparse": torch.eye(3).to_sparse(),
    }


@pytest.mark.parametrize("archive", [True, False])
def test_tensors_beside_foreign_objects(archive: bool, tmp_path: Path) -> None:
    torch.save(
        {**foreign_objects(), "state_dict": Settings(TENSORS)}, tmp_path / "x", _use_new_zipfile_serialization=archive
    )
    found, foreign = read_pickle(tmp_path / "x")
    assert {"argparse.Namespace", f"{__name__}.Settings", f"{__name__}.History", "functools.partial"} <= set(foreign)
    assert same(found["state_dict"]["plain"], TENSORS["plain"])
    assert isinstance(found["history"], Foreign)
    assert found["history"].name == f"{__name__}.History"
    assert (found["defaults"], found["counts"]) == ({"a": [1]}, {"a": 1, "b": 1})
    state = read_state(tmp_path / "x")
    assert "argparse.Namespace" in state.foreign


# Hostile files --------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def raw(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def name(value: str) -> bytes:
    return b"c" + value.rpartition(".")[0].encode() + b"\n" + value.rpartition(".")[2].encode() + b"\n"


def number(value: int) -> bytes:
    content = value.to_bytes(max(1, (value.bit_length() + 8) // 8), "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def several(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(function: str, *arguments: bytes) -> bytes:
    return name(function) + several(*arguments) + b"R"


def dtype(code: str, *state: bytes) -> bytes:
    made = call("numpy.dtype", text(code), number(0), number(1))
    return made + several(*state) + b"b" if state else made


NONE = b"N"
FLOATS = dtype("f8", number(3), text("<"), NONE, NONE, NONE, number(-1), number(-1), number(0))


def array(kind: bytes, shape: bytes, content: bytes) -> bytes:
    begun = call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), several(number(0)), raw(b"b"))
    return begun + several(number(1), shape, kind, b"\x89", content) + b"b"


def storage(key: str, count: int, kind: str = "torch.FloatStorage") -> bytes:
    return several(text("storage"), name(kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(place: bytes, offset: int, size: list[int], stride: list[int]) -> bytes:
    shape, steps = several(*map(number, size)), several(*map(number, stride))
    return call("torch._utils._rebuild_tensor_v2", place, number(offset), shape, steps, b"\x89", b"}")


def stored(program: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Any:
    """Writes a torch archive."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
            archive.writestr("archive/byteorder", b"little")
            for key, content in storages.items():
                archive.writestr(f"archive/data/{key}", content)

    return write


def plain(program: bytes) -> Any:
    return lambda path: path.write_bytes(b"\x80\x04" + program + b".")


FOUR = {"0": struct.pack("<4f", 1, 2, 3, 4)}
DEEP = 200_000
SHARED = raw(bytes(1 << 20)) + b"q\x01"  # a mebibyte, remembered
MANY = b"(" + b"X\x01\0\0\0aN\x86" * 50_000 + b"lq\x01"  # a long list of pairs, remembered
LAYOUT = number(3), text("|")
EIGHT = number(8), number(8)
FIELDS = b"}" + text("a") + several(dtype("O8"), number(0)) + b"s"
RECORD = dtype("f8", *LAYOUT, NONE, several(text("a")), FIELDS, *EIGHT, number(63))
PARTS = several(dtype("O8"), several(number(1)))
BOMBS = {
    "memo index": plain(b"]r\xff\xff\xff\xff"),
    "memo index as text": plain(b"]p4294967295\n"),
    "long bytes": plain(b"\x8e" + struct.pack("<Q", 1 << 40)),
    "longer text": plain(b"\x8d" + struct.pack("<Q", 1 << 62)),
    "long number": plain(b"\x8b" + struct.pack("<I", 0x7FFFFFFF)),
    "long frame": plain(b"\x95" + struct.pack("<Q", 1 << 62) + b"]"),
    "digits": plain(b"I" + b"9" * 100_000 + b"\n"),
    "deep lists": plain(b"]" * DEEP + b"a" * (DEEP - 1)),
    "deep tuples": plain(b")" + b"\x85" * DEEP),
    "deep tuple as a key": plain(b"})" + b"\x85" * DEEP + b"Ns"),
    "deep tuple in a set": plain(b"\x8f()" + b"\x85" * DEEP + b"\x90"),
    "deep foreign": plain(b"N" + b"".join([b"\x85cos\nsystem\nq\x000h\x00N0h\x00)\x81"]) * 10_000),
    "deep state": plain(name("a.b") + b")\x81" + (b"2b" * 10_000)),
    "dtype of objects": plain(array(dtype("O8"), several(number(1)), raw(bytes(8)))),
    "dtype rebuilt with objects": plain(array(RECORD, several(number(1)), raw(bytes(8)))),
    "dtype with a flag for objects": plain(
        array(dtype("f8", *LAYOUT, NONE, NONE, NONE, *EIGHT, number(63)), several(number(1)), raw(b"\x41" * 8))
    ),
    "dtype of parts": plain(
        array(dtype("V8", *LAYOUT, PARTS, NONE, NONE, *EIGHT, number(0)), several(number(1)), raw(bytes(8)))
    ),
    "array larger than its bytes": plain(array(FLOATS, several(number(1 << 40)), raw(bytes(8)))),
    "array of a negative size": plain(array(FLOATS, several(number(-1)), raw(bytes(8)))),
    "array of many axes": plain(array(FLOATS, several(*[number(1)] * 2000), raw(bytes(8)))),
    "one block in many arrays": plain(
        SHARED + b"0(" + array(FLOATS, several(number(1 << 17)), b"h\x01") * 20_000 + b"l"
    ),
    "one text encoded often": plain(
        text("a" * (1 << 20)) + b"q\x010(" + call("_codecs.encode", b"h\x01", text("latin1")) * 20_000 + b"l"
    ),
    "one list copied often": plain(MANY + b"0(" + call("collections.OrderedDict", b"h\x01") * 20_000 + b"l"),
    "one long pair": plain(MANY + b"0((" + b"h\x01" * 50_000 + b"lq\x020" + call("builtins.dict", b"h\x02") + b"l"),
    "stride 0": stored(tensor(storage("0", 4), 0, [10**9, 1000], [0, 0]), FOUR),
    "many small strides of 0": stored(b"(" + tensor(storage("0", 4), 0, [10**6], [0]) * 10_000 + b"l", FOUR),
    "beyond the storage": stored(tensor(storage("0", 4), 0, [2, 3], [3, 1]), FOUR),
    "offset beyond the storage": stored(tensor(storage("0", 4), 1 << 40, [1], [1]), FOUR),
    "offset before the storage": stored(tensor(storage("0", 4), -1, [1], [1]), FOUR),
    "negative stride": stored(tensor(storage("0", 4), 3, [3], [-1]), FOUR),
    "size that overflows": stored(tensor(storage("0", 4), 0, [1 << 62, 1 << 62, 4], [1, 1, 1]), FOUR),
    "size beyond 64 bits": stored(tensor(storage("0", 4), 0, [1 << 70], [0]), FOUR),
    "stride beyond 64 bits": stored(tensor(storage("0", 4), 0, [2], [1 << 70]), FOUR),
    "strides for another shape": stored(tensor(storage("0", 4), 0, [2], [1, 1]), FOUR),
    "storage larger than its bytes": stored(tensor(storage("0", 5), 0, [5], [1]), FOUR),
    "storage of a negative size": stored(tensor(storage("0", -4), 0, [1], [1]), FOUR),
    "storage of an unknown kind": stored(tensor(storage("0", 4, "torch.QInt8Storage"), 0, [1], [1]), FOUR),
    "storage that is not there": stored(tensor(storage("1", 4), 0, [1], [1]), FOUR),
    "storage outside": stored(tensor(storage("../../../etc/passwd", 4), 0, [1], [1]), FOUR),
    "compressed": stored(tensor(storage("0", 1 << 22), 0, [1 << 22], [1]), {"0": bytes(1 << 24)}, zipfile.ZIP_DEFLATED),
    "no program": lambda path: zipfile.ZipFile(path, "w").close(),
    "persistent": plain(storage("0", 4)),
    "persistent as text": plain(b"Pabc\n"),
    "extension": plain(b"\x82\x01"),
    "buffer outside": plain(b"\x97"),
    "file in a file": stored(call("torch.storage._load_from_bytes", raw(b"\x80\x02.")), {}),
    "tensor of a list": plain(call("torch._utils._rebuild_tensor_v2", b"]", number(0), b")", b")", b"\x89", b"}")),
    "call of a number": plain(number(3) + b")R"),
    "empty stack": plain(b"R"),
    "no mark": plain(b"t"),
    "legacy with a long storage": plain(b""),
}
"""Each ends in a sentence, or in what is harmless, within the memory and time of the test."""


def legacy(path: Path) -> None:
    """torch's old format, whose storage claims 2**60 values."""
    parts = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps({"little_endian": True}, 2)]
    parts += [b"\x80\x02" + tensor(storage("0", 1 << 60), 0, [1], [1]) + b".", pickle.dumps(["0"], 2)]
    path.write_bytes(b"".join(parts) + struct.pack("<Q", 1 << 60) + bytes(8))


BOMBS["legacy with a long storage"] = legacy


def test_no_file_takes_more_than_it_has(tmp_path: Path) -> None:
    """In a process of its own, whose memory is bounded: a crash, a hang or an allocation ends it."""
    for place, write in enumerate(BOMBS.values()):
        write(tmp_path / f"{place}.pth")
    code = f"""
import resource, sys, time
from pathlib import Path
from anyres.models._checkpoints import read_state
from anyres.errors import UserError
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
if used:
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 29), used + (3 << 29)))
for place in range({len(BOMBS)}):
    start = time.monotonic()
    try:
        read_state(Path(sys.argv[1]) / f"{{place}}.pth")
        result = "was read"
    except UserError as error:
        result = str(error)[-100:]
    print(place, round(time.monotonic() - start, 1), result, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=200)
    lines = done.stdout.splitlines()
    names = list(BOMBS)
    assert done.returncode == 0, (names[len(lines)] if len(lines) < len(names) else "", done.stderr[-2000:])
    results = {names[int(line.split()[0])]: line.split(maxsplit=2)[1:] for line in lines}
    assert results.keys() == BOMBS.keys()
    assert not [key for key, (seconds, result) in results.items() if result == "was read" or float(seconds) > 20]


CALLS = {
    "REDUCE": lambda f, a: name(f) + several(a) + b"R",
    "STACK_GLOBAL": lambda f, a: text(f.rpartition(".")[0]) + text(f.rpartition(".")[2]) + b"\x93" + several(a) + b"R",
    "INST": lambda f, a: b"(" + a + b"i" + name(f)[1:],
    "OBJ": lambda f, a: b"(" + name(f) + a + b"o",
    "NEWOBJ": lambda f, a: name(f) + several(a) + b"\x81",
    "NEWOBJ_EX": lambda f, a: name(f) + several(a) + b"}\x92",
    "BUILD": lambda f, a: name("collections.OrderedDict") + b")R}" + text("__setstate__") + name(f) + b"sb" + a + b"b",
    "items": lambda f, a: name("collections.OrderedDict") + b")R(" + name(f) + a + b"u",
    "from bytes": lambda f, a: call("torch._tensor._rebuild_from_type_v2", name(f), NONE, several(a), NONE),
    "reconstruct": lambda f, a: call("copyreg._reconstructor", name(f), name("builtins.object"), NONE),
    "reconstruct an array": lambda f, a: call("numpy.core.multiarray._reconstruct", name(f), several(a), raw(b"b")),
}


@pytest.mark.parametrize("way", CALLS)
@pytest.mark.parametrize("function", ["os.mkdir", "builtins.exec", "torch._utils._import_dotted_name"])
def test_nothing_is_called_or_imported(way: str, function: str, tmp_path: Path) -> None:
    program = CALLS[way](function, text(str(tmp_path / "made") if function == "os.mkdir" else "raise SystemExit"))
    plain(b"}(" + text("model") + program + text("w") + array(FLOATS, several(number(1)), raw(bytes(8))) + b"u")(
        tmp_path / "x.pkl"
    )
    found, foreign = read_pickle(tmp_path / "x.pkl")
    assert torch.equal(found["w"], torch.zeros(1, dtype=torch.float64))
    assert not (tmp_path / "made").exists()
    assert function in foreign or way in ("BUILD", "items")


def test_a_dictionary_inside_itself_ends(tmp_path: Path) -> None:
    entries = text("model") + b"h\x01" + text("w") + array(FLOATS, several(number(1)), raw(bytes(8)))
    plain(b"}q\x01(" + entries + b"u")(tmp_path / "x.pkl")
    with pytest.raises(UserError, match="does not fit deit_tiny"):
        load_checkpoint(create_model("deit_tiny", depth=1, embed_dim=12, num_heads=1), tmp_path / "x.pkl")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: Any) -> list[bytes]:
    folder = tmp_path_factory.mktemp("samples")
    content = {
        "model": {"a": torch.ones(3, 2), "b": torch.zeros(4)},
        "args": argparse.Namespace(x=1),
        "n": np.float64(1),
    }
    torch.save(content, folder / "new")
    torch.save(content, folder / "old", _use_new_zipfile_serialization=False)
    arrays = {"model": {"a": np.ones((3, 2)), "o": np.array([None])}, "x": np.float32(1), "t": torch.ones(2)}
    for protocol in (0, 2, 4):
        (folder / str(protocol)).write_bytes(pickle.dumps(arrays, protocol))
    return [path.read_bytes() for path in sorted(folder.iterdir())]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_one_sentence(samples: list[bytes], tmp_path: Path, data: Any) -> None:
    content = bytearray(data.draw(st.sampled_from(samples)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        what = data.draw(st.sampled_from(["flip", "byte", "cut", "opcode", "twice"]))
        if what == "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif what == "byte":
            content[place] = data.draw(st.integers(0, 255))
        elif what == "cut":
            del content[place : place + data.draw(st.integers(1, 50))]
        elif what == "opcode":
            content[place : place + 1] = data.draw(st.sampled_from(pickletools.opcodes)).code.encode("latin-1")
        else:
            content[place:place] = content[place : place + 20]
        content = content or bytearray(b"\0")
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with contextlib.suppress(UserError):  # any other error is a bug
        read_state(path)
