"""How files are damaged: bytes without regard to what they mean, and trees of values as JSON, YAML and pickles hold."""

from __future__ import annotations

import copy
import json
import math
import pickletools
import random
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

NUMBERS = (0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 32767, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 10**9)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 1000, 2**31, 2**63, 2**64, -(2**63), 10**9, 10**30, 0.5, -0.0, 1e-300, 1e308,
    math.inf, -math.inf, math.nan, "", " ", "0", "1e309", "nan", "none", "a", "../../x", "/", "\x00", "\x1b[31m",
    "[red]a", "$\\foo$", "=1+1", "\ud800", "ä" * 300, "x" * 5000, [], [[]], [None], [0], [1, 2], [1, "a"], {}, {"a": 1},
    {"": None},
)  # fmt: skip
"""What people and broken programs write where something else belongs."""


def mutate_bytes(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Damage in one to four places; `others` are spliced in."""
    for _ in range(1 + int(rng.expovariate(1.0)) % 4):
        data = rng.choice(_BYTES)(rng, data, others)
    return data


def _place(rng: random.Random, data: bytes) -> int:
    """Anywhere, but often near the beginning, where formats keep what counts."""
    return rng.randrange(min(len(data), 64) if rng.random() < 0.4 else len(data)) if data else 0


def _flip(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if data else 0):
        changed[_place(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _set(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = _place(rng, data)
    return data[:at] + bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))]) + data[at + 1 :]


def _length(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = _place(rng, data)
    order, width = rng.choice("<>"), rng.choice("HIQ")
    field = struct.pack(order + width, rng.choice(NUMBERS) % 2 ** (8 * struct.calcsize(width)))
    return data[:at] + field + data[at + len(field) :]


def _cut(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _drop(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = _place(rng, data)
    return data[:at] + data[at + rng.choice((1, 2, 4, 16, 256)) :]


def _repeat(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = _place(rng, data)
    block = data[at : at + rng.choice((1, 4, 16, 256, 4096))]
    return data[:at] + block * rng.choice((2, 2, 3, 50)) + data[at:]


def _swap(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    a, b, c = sorted(_place(rng, data) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def _zero(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at, count = _place(rng, data), rng.choice((1, 8, 512))
    return data[:at] + bytes(len(data[at : at + count])) + data[at + count :]


def _junk(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = rng.choice((0, len(data), _place(rng, data)))
    return data[:at] + rng.randbytes(rng.choice((1, 3, 64, 2000))) + data[at:]


def _splice(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others) if others else data
    return data[: _place(rng, data)] + other[_place(rng, other) :]


def _wipe(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return rng.choice((b"", bytes(len(data)), b"\xff" * len(data), data[::-1]))


_BYTES: list[Callable[[random.Random, bytes, Sequence[bytes]], bytes]] = [
    *(_flip, _set, _length, _length, _cut, _drop, _repeat, _swap, _zero, _junk, _splice),
    *(_flip, _set, _length),  # more often than the rest: what they leave is read further
]


def mutate_file(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """`mutate_bytes`, and once in a while a file that is empty, all zeros, …"""
    return _wipe(rng, data, others) if rng.random() < 0.01 else mutate_bytes(rng, data, others)


# Trees ----------------------------------------------------------------------------------------------------------------


def mutate_tree(rng: random.Random, tree: Any, values: Sequence[Any] = VALUES, most: int = 3) -> Any:
    """A copy with one to `most` changes: a value replaced, removed, repeated, renamed, wrapped, nested deep."""
    tree = [copy.deepcopy(tree)]  # so that the root has a parent, too
    for _ in range(rng.randint(1, most)):
        places = _places(tree)
        if places:
            _change(rng, *rng.choice(places), values)
    return tree[0] if tree else None


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside, shallow things as often as deep ones."""
    found: list[tuple[Any, Any]] = []
    level = [tree]
    while level:
        here = [
            (node, key)
            for node in level
            if isinstance(node, dict | list)
            for key in (list(node) if isinstance(node, dict) else range(len(node)))
        ]
        found += here[:200]
        level = [node[key] for node, key in here[:2000]]
    return found


def _change(rng: random.Random, parent: Any, key: Any, values: Sequence[Any]) -> None:
    value = parent[key]
    way = rng.randrange(12)
    if way < 6:
        parent[key] = copy.deepcopy(rng.choice(values))
    elif way == 6:
        del parent[key]
    elif way == 7 and isinstance(parent, dict):
        name = rng.choice(("", f"{key}_", str(key).upper(), "x", rng.choice(list(parent))))
        parent[name] = parent.pop(key)
    elif way == 7:
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(rng.choice(parent)))
    elif way == 8:
        parent[key] = rng.choice(([value], [value] * 3, {"a": value}, str(value), [value] * 300))
    elif way == 9:
        parent[key] = deep(rng, value, rng.choice((3, 30, 300)))
    elif way == 10 and isinstance(value, int | float) and not isinstance(value, bool):
        parent[key] = rng.choice(
            (-value, value + 1, value - 1, value * 2, value * 1000, float(value), value / 3, value * 1e6)
        )
    else:
        other = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        parent[key], parent[other] = parent[other], value


def deep(rng: random.Random, value: Any, levels: int) -> Any:
    """`value` inside many lists or dictionaries."""
    for _ in range(levels):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def to_json(rng: random.Random, tree: Any) -> str:
    """The tree as text; once in a while nested deeper than any parser goes, or with a number of 5000 digits."""
    text = json.dumps(tree)
    if rng.random() < 0.02:
        levels = rng.choice((1000, 100_000))
        text = re.sub(r"\d+", rng.choice(("[" * levels + "]" * levels, '{"a":' * levels, "9" * 5000)), text, count=1)
    return text


# Pickles --------------------------------------------------------------------------------------------------------------

_GLOBALS = (
    *("os\nsystem", "builtins\neval", "builtins\ngetattr", "numpy\ndtype", "numpy\nndarray", "numpy\nload"),
    *("numpy._core.multiarray\nscalar", "numpy._core.multiarray\n_reconstruct", "numpy._core.numeric\n_frombuffer"),
    *("collections\nOrderedDict", "argparse\nNamespace", "_codecs\nencode", "torch\nload", "torch\nfloat32"),
    *("torch._utils\n_rebuild_tensor_v2", "torch\nFloatStorage", "no.such\nThing", "\n"),
)
_OPERATIONS = (
    *(b"N", b".", b"(", b"0", b"1", b"2", b"R", b"b", b"o", b"\x81", b"\x92", b"}", b"]", b")", b"\x8f", b"a", b"e"),
    *(b"s", b"u", b"t", b"\x85", b"\x86", b"\x87", b"K\x01", b"J\xff\xff\xff\x7f", b"M\xff\xff", b"S'x'\n", b"I1\n"),
    *(b"\x8a\x08" + b"\xff" * 8, b"G\x7f\xf0" + bytes(6), b"G\x7f\xf8" + bytes(6), b"F1e999\n", b"ios\nsystem\n"),
    *(b"U\x01O", b"X\x01\0\0\0O", b"C\x01O", b"h\0", b"\x94", b"Q", b"P1\n", b"\x82\x01", b"\x97", b"\x98"),
    *(operation + b"\xff\xff\xff\x7f" for operation in (b"j", b"r", b"T", b"\x8b")),
    *(operation + b"\xff" * 6 + b"\0\0" for operation in (b"\x8e", b"\x8d", b"\x95")),
    *(f"c{name}\n".encode() for name in _GLOBALS),
)
"""Operations of a pickle's machine, some with what they work on."""


def mutate_pickle(rng: random.Random, data: bytes) -> bytes:
    """One to four operations of a well-formed pickle replaced, repeated, removed or exchanged."""
    starts = [place for _, _, place in pickletools.genops(data) if place is not None]
    pieces = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(rng.randint(1, 4)):
        if not pieces:
            break
        at, other = (rng.randrange(len(pieces)) for _ in range(2))
        way = rng.randrange(6)
        if way < 2:
            pieces[at] = rng.choice(_OPERATIONS)
        elif way == 2:
            pieces.insert(at, rng.choice(_OPERATIONS))
        elif way == 3:
            del pieces[at]
        elif way == 4:
            pieces[at], pieces[other] = pieces[other], pieces[at]
        else:
            pieces[at] = mutate_bytes(rng, pieces[at])
    return b"".join(pieces)


# Text -----------------------------------------------------------------------------------------------------------------

WORDS = (
    *("", " ", "0", "-1", "1", "2", "3", "007", "1.5", "1e3", "1e309", "-1e309", "nan", "inf", "0x10", "1_000", "٣"),
    *(" 4 ", "99999999999", "9" * 40, "9" * 5000, "none", "null", "true", "yes", "off", "~", "[]", "{}", "[1,2", "a=b"),
    *("{a: 1}", "a", "ä ö", "x" * 300, "x" * 5000, "🙂", "\u202e", "a\nb", "\t", '"', "'", "`", "$(touch canary)", ";"),
    *(
        "|",
        "&",
        "*",
        "%s%n",
        "{0}",
        "\\",
        "$\\foo$",
        "[red]a",
        "[/foo]",
        "\x1b[31m",
        "=1+1",
        "<script>",
        "#",
        "-",
        "--",
    ),
    *("-x", "@", ",", "\udcff", "1,2", "1:2", "16:8", "8:16:0", "8:16:-1", "1:1000000000:1", "16x", "x16", "0x0"),
    *("8x12x16", "16,,8"),
)
"""What people write, by mistake or not, where a word belongs. No zero bytes: command lines cannot hold them."""


def mutate_text(rng: random.Random, text: str, words: Sequence[str] = WORDS) -> bytes:
    """Text as a file's content, with damaged lines, words and encodings."""
    lines = text.split("\n")
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        way = rng.randrange(8)
        if way == 0:
            del lines[at]
        elif way == 1:
            lines.insert(at, rng.choice((*lines, *words)))
        elif way == 2:
            lines[at] = rng.choice(words)
        elif way == 3:
            lines[at] += rng.choice(words)
        elif way == 4:
            lines *= rng.choice((2, 30))
        else:
            parts = re.split(r"([\w.-]+)", lines[at])
            parts[rng.randrange(len(parts))] = rng.choice(words)
            lines[at] = "".join(parts)
        lines = lines or [""]
    joined = rng.choice(("\n", "\n", "\n", "\n", "\r\n", "\r")).join(lines)
    encoding = rng.choice((*["utf-8"] * 8, "utf-8-sig", "utf-16", "latin-1"))
    data = joined.encode(encoding, "surrogateescape" if encoding == "utf-8" else "replace")
    return mutate_bytes(rng, data) if rng.random() < 0.2 else data
