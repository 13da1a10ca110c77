"""Feeds damaged files to the readers. Out may come the reader's own error, or what is really in the file.

    python tests/fuzz.py idx                         a million inputs, drawn with seed 0
    python tests/fuzz.py model --runs 50000 --seed 1
    python tests/fuzz.py npy --first 4711 --runs 1   one of them again
    python tests/fuzz.py npz --input FILE            one file
    python tests/fuzz.py idx --atheris               inputs led by coverage, where atheris is installed

Every input comes of a sound file: bytes are changed, cut, repeated and mixed with other files'; and, so that what lies
behind the first checks is reached too, parts are changed in their unpacked or parsed form, and lengths, checksums and
digests made to fit again. A finding ends the run with status 1, and its input is kept in a file: any other exception
than the reader's, a warning, an error of other than two lines, an array or network that is not what is in the file,
more memory than a file of that size may ask for, more than PATIENCE seconds, the end of the process.

The inputs reach no disk: the readers are given a file in memory, by its name under /proc. Wants Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import gzip
import hashlib
import io
import itertools
import json
import math
import mmap
import operator
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import numpy as np

import backprop_gpu as bp  # its modules follow when they are used: atheris must see that

PATIENCE = 30.0  # seconds for one input: the machine may be busy with others
FIXED = 2 << 20  # bytes that any file may ask for: pieces that are read at once, a parsed header
DEFLATE = 1032  # to one, the most that deflate can squeeze
ROOM = 8 << 30  # bytes of addresses: more than a reader that believes 32 bits asks for, so that it is seen asking

INTEGERS = (0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62)
INTEGERS += (2**63 - 1, 2**63, 2**64 - 1)
Rng = random.Random


# ------------------------------------------------------------------------------------------------------------- bytes


def flip(rng: Rng, content: bytearray, other: bytes) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def put(rng: Rng, content: bytearray, other: bytes) -> None:
    content[rng.randrange(len(content))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def cut(rng: Rng, content: bytearray, other: bytes) -> None:
    del content[rng.choice((rng.randrange(len(content)), len(content) - 1)) :]


def extend(rng: Rng, content: bytearray, other: bytes) -> None:
    content += rng.choice((b"\0", bytes(rng.randrange(1, 200)), rng.randbytes(rng.randrange(1, 40)), other))


def splice(rng: Rng, content: bytearray, other: bytes) -> None:
    """Bytes of the other file in the place of as many here, or of all that follow."""
    start, end = sorted(rng.choices(range(len(other) + 1), k=2))
    at = rng.choice((start, rng.randrange(len(content))))
    content[at : at + end - start if rng.random() < 0.5 else None] = other[start:end]


def number(rng: Rng, content: bytearray, other: bytes) -> None:
    size, at = rng.choice((1, 2, 4, 8)), rng.randrange(len(content))
    value = rng.choice((*INTEGERS, len(content))) + rng.choice((-1, 0, 0, 0, 1))
    content[at : at + size] = (value % 256**size).to_bytes(size, rng.choice(("big", "little")))


def repeat(rng: Rng, content: bytearray, other: bytes) -> None:
    at = rng.randrange(len(content))
    content[at:at] = content[at : at + rng.choice((1, 2, 8, 64))] * rng.choice((1, 1, 2, 7, 300))


def drop(rng: Rng, content: bytearray, other: bytes) -> None:
    at = rng.randrange(len(content))
    del content[at : at + rng.choice((1, 1, 4, 8, rng.randrange(1, 64)))]


def damaged(rng: Rng, content: bytes, other: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        if changed:
            rng.choice((flip, put, cut, extend, splice, number, repeat, drop))(rng, changed, other)
    return bytes(changed)


def near(rng: Rng, content: bytes) -> bytes:
    """Letters for letters and digits for digits in the text of the file, or any damage."""
    if rng.random() < 0.3:
        return damaged(rng, content, content)
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(changed) or 1)
        found = re.search(rb"[0-9]+|[a-zA-Z]+|[\[\]{}:,]", changed[at : at + 200])
        if found:
            kind = b"0123456789" if found[0].isdigit() else b"[]{}:," if not found[0].isalpha() else b"abcxyzEN_"
            changed[at + rng.randrange(found.start(), found.end())] = rng.choice(kind)
    return bytes(changed)


# --------------------------------------------------------------------------------------------------------------- idx


def idx(*shape: int) -> bytes:
    data = bytes(i % 251 for i in range(math.prod(shape)))
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + data


def idx_seeds() -> list[bytes]:
    plain = [idx(2, 3, 4), idx(1, 1, 1), idx(40, 5, 6), idx(7)]
    named = io.BytesIO()
    with gzip.GzipFile("named", "wb", 6, named, 0) as file:
        file.write(plain[0])
    return [*plain, *(gzip.compress(p, level, mtime=0) for p in plain for level in (0, 9)), named.getvalue()]


def mutate_idx(rng: Rng, content: bytes, other: bytes) -> bytes:
    """The packed bytes, those within, or both."""
    inner = unpacked(content)
    if inner is None or rng.random() < 0.3:
        return damaged(rng, content, other)
    if rng.random() < 0.8:
        inner = damaged(rng, inner, unpacked(other) or other)
    if rng.random() < 0.3:  # dimensions and data that agree, or nearly
        shape = [rng.choice((1, 1, 2, 3, 28, 300)) for _ in range(rng.choice((1, 3, 3, 3)))]
        inner = idx(*shape)[: rng.choice((None, None, -1))] if math.prod(shape) < 10_000 else inner
    if content[:2] != b"\x1f\x8b":
        return inner
    inner += bytes(rng.choice((0, 0, 0, 0, 1, 70_000)))
    squeeze = zlib.compressobj(rng.choice((0, 1, 9)), wbits=31, strategy=rng.choice((0, 0, 2, 3, 4)))
    content = squeeze.compress(inner) + squeeze.flush()
    return damaged(rng, content, other) if rng.random() < 0.2 else content


def unpacked(content: bytes) -> bytes | None:
    """What is in a file, packed or not; None where gzip cannot tell."""
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, struct.error, zlib.error):
        return None


def check_idx(content: bytes, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, 3]) + struct.pack(">3I", *array.shape)
    assert array.dtype == np.uint8
    assert head + array.tobytes() == unpacked(content), "another array than the file's"


# ---------------------------------------------------------------------------------------------------------- npy, npz

TYPES = "<f4 <f8 >f4 >i8 <i4 |u1 |b1 <f2 <f16 <c8 |O |V0 |V8 <U3 <U0 |S0 <M8[ns] f8 ,f8 (2,)f4 f4,f4 i".split()
SHAPES = ((), (1,), (3,), (2, 3), (3, 2, 1), (0,), (2, 0), (1,) * 33, (6, 1))


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version, allow_pickle=False)
    return out.getvalue()


def npy_seeds() -> list[bytes]:
    a = np.arange(6.0).reshape(2, 3)
    arrays = [a, np.asfortranarray(a), a.astype(">f4"), np.arange(3), np.array([True]), np.array(2.5), a.astype("f2")]
    return [*map(npy, arrays), npy(a, (2, 0)), npy(np.array(["a"])), npy(np.zeros(2, "i4,f4"))]


def mutate_npy(rng: Rng, content: bytes, other: bytes) -> bytes:
    """Any bytes; those of the header, with a length that fits; or a header made anew, often with data that fit."""
    start = 12 if content[6:7] == b"\2" else 10
    end = start + int.from_bytes(content[8:start], "little")
    if content[:6] != b"\x93NUMPY" or end > len(content) or rng.random() < 0.3:
        return damaged(rng, content, other)
    header, data = content[start:end], content[end:]
    if rng.random() < 0.4:
        header = damaged(rng, header, other[start : start + 118])
    else:
        text, size = npy_header(rng)
        header = text.encode()
        if size < 1 << 16 and rng.random() < 0.8:
            data = bytes(max(0, size + rng.choice((0, 0, 0, -1, 1))))
    header += b" " * rng.choice((0,) * 98 + (9_000, 70_000))
    width = 4 if start == 12 or len(header) >= 1 << 16 else 2
    version = b"\2\0" if width == 4 else rng.choice((b"\1\0",) * 9 + (b"\3\0",))
    length = len(header) if rng.random() < 0.95 else rng.choice(INTEGERS) % 256**width
    return content[:6] + version + length.to_bytes(width, "little") + header + data


def npy_header(rng: Rng) -> tuple[str, int]:
    """A header, and how many bytes it seems to announce."""
    descr, shape, fortran = rng.choice(TYPES), rng.choice(SHAPES), rng.choice((True, False))
    if rng.random() < 0.2:
        shape = tuple(rng.choice((*INTEGERS, -1)) for _ in range(rng.randrange(1, 5)))
    try:
        size = math.prod(shape) * np.dtype(descr).itemsize
    except (TypeError, SyntaxError):
        size = 0
    entries = {"'descr'": repr(descr), "'fortran_order'": repr(fortran), "'shape'": repr(shape)}
    if rng.random() < 0.5:
        entries[rng.choice((*entries, literal(rng)))] = literal(rng)
    if rng.random() < 0.1:
        del entries[rng.choice([*entries])]
    return "{" + ", ".join(f"{name}: {value}" for name, value in entries.items()) + ", }\n", size


ODD = ("None", "True", "1e999", "1j", "''", "b''", "x", "...", "'", "__import__('os')", "1 if 1 else 2", "f'{1}'")
FORMS = ("(@,)", "[@]", "{@}", "(@, @)", "[(@, @)]", "{@: @}", "@+@", "-@") * 9 + ("(" * 90 + "@" + ",)" * 90,)


def literal(rng: Rng, depth: int = 0) -> str:
    """What Python's own parser, which reads those headers, may be given: a literal, or almost."""
    what = rng.randrange(6)
    if what == 0:
        return str(rng.choice(INTEGERS)) + rng.choice(("", "", "L"))
    if what == 1:
        return rng.choice(("0x" + "f" * rng.choice((1, 16, 4000, 9000)), "9" * rng.choice((20, 4300, 4301))))
    if what == 2:
        return rng.choice("([{-~!") * rng.choice((1,) * 60 + (90, 250, 5000))
    if what == 3:
        return repr(rng.choice(TYPES))
    if what == 4 or depth == 3:
        return rng.choice(ODD)
    return re.sub("@", lambda _: literal(rng, depth + 1), rng.choice(FORMS))


def check_npy(content: bytes, array: np.ndarray) -> None:
    same(array, np.load(io.BytesIO(content)))


def same(a: np.ndarray, b: np.ndarray) -> None:
    assert a.dtype.kind in "biuf", "no plain numbers"
    assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), "another array than the file's"


NAMES = ("x_train.npy", "y_train.npy", "x_test.npy", "y_test.npy")


def npz(members: dict[str, bytes], method: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)  # of 1980, so that inputs are what they were
    return out.getvalue()


def npz_seeds() -> list[bytes]:
    arrays = (np.ones((3, 2)), np.arange(3), np.zeros((50, 2)), np.ones(2, np.uint8))
    members = dict(zip(NAMES, map(npy, arrays), strict=True))
    return [npz(members, zipfile.ZIP_STORED), npz(members, zipfile.ZIP_DEFLATED)]


def mutate_npz(rng: Rng, content: bytes, other: bytes) -> bytes:
    """Any bytes, those of the directory at the end, or an archive of arrays that are damaged themselves."""
    choice = rng.random()
    if choice < 0.5 and (at := content.find(b"PK\1\2")) >= 0:
        return content[:at] + damaged(rng, content[at:], other)
    if choice < 0.7:
        return damaged(rng, content, other)
    arrays = READERS["npy"].seeds
    members = {name: rng.choice(arrays) for name in rng.choices(NAMES, k=rng.randrange(1, 5))}
    members[rng.choice([*members])] = mutate_npy(rng, rng.choice(arrays), rng.choice(arrays))
    if rng.random() < 0.1:
        members[rng.choice(NAMES)] = bytes(100_000)
    return npz(members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)))


def check_npz(content: bytes, arrays: dict[str, np.ndarray]) -> None:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name, array in arrays.items():
            check_npy(archive.read(f"{name}.npy"), array)


# ------------------------------------------------------------------------------------------------------------- model


class Cut(Exception):  # noqa: N818
    """What ends a run in the middle of an epoch."""

    def on_step(self, run: Any) -> None:
        if run.step == 3:
            raise self


RUNS = (  # Settings of bp.train: each that puts something else into a file should be here.
    {"optimizer": "sgd"},
    {"optimizer": "adam:amsgrad=true", "frozen": 1, "gradient_norms": True},
    {"validation": 0.5, "patience": 1, "epochs": 3, "retreats": 2, "gradient_error": True, "seed": 2**64 - 1},
    {"callbacks": [Cut()]},
)


def model_seeds() -> list[bytes]:
    """Files as the library writes them: one of each kind that there is."""
    files = []
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        path = Path(folder, "m")
        for settings in (
            {"layers": [4, 5, 3]},
            {"layers": [2, 1], "precision": "float64", "output": "sigmoid", "bias": False},
            {"layers": [3, 4, 2, 2], "hidden": ["tanh", "gelu"], "output": "identity", "dropout": [0.5, 0.0]},
        ):
            bp.save(bp.Network(**settings, backend="numpy"), path)
            files.append(path.read_bytes())
        for settings in RUNS:
            net = bp.Network([4, 3, 3], backend="numpy")
            clock = mock.patch("time.perf_counter", itertools.count().__next__)  # equal runs make equal files
            with clock, contextlib.suppress(Cut):
                bp.train(net, np.eye(4), [0, 1, 2, 0], save=path, **{"epochs": 2, "batch_size": 2, **settings})
            files.append(path.read_bytes())
    return files


class Object(list):
    """An object of JSON as a list of [name, value]: a name may stand there twice."""


class Quoted(list):
    """A string that is JSON itself, as a list of the one value in it."""


class Raw(str):
    """Text that stands in the file as it is."""


def parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=lambda pairs: Object([name, unquoted(value)] for name, value in pairs))


def unquoted(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            return Quoted([parsed(value)])
    return value


def written(tree: Any) -> str:
    if isinstance(tree, Raw):
        return tree
    if isinstance(tree, Quoted):
        return json.dumps(",".join(map(written, tree)))
    if isinstance(tree, Object):
        return "{" + ",".join(f"{written(name)}:{written(value)}" for name, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(written, tree)) + "]"
    return json.dumps(tree)


def places(tree: Any) -> list[tuple[list[Any], int]]:
    """Where the values of a tree are, each as a list and an index."""
    found = []
    for i in range(len(tree) if isinstance(tree, list) else 0):
        held, at = (tree[i], 1) if isinstance(tree, Object) else (tree, i)
        found += [(held, at), *places(held[at])]
    return found


TEXTS = ("", "relu", "softmax", "x" * 50, "x" * 5000, "\ud800", "a\nb\u2028c\0", "F64", "BF16", "huber:delta=0", "{}")
RAWS = ("NaN", "-Infinity", "1e999", "-0.0", "1" + "0" * 400, "1" * 5000, "[" * 500 + "]" * 500, '{"a":' * 300)


def odd_value(rng: Rng) -> Any:
    """One that should not be there: of another type, size or depth."""
    n = rng.choice(INTEGERS)
    plain = rng.choice((n, n, -n, True, False, None, 0.5, -1.5, 1e308))
    many = [1] * rng.choice((4,) * 90 + (2_000,) * 9 + (100_000,))
    deep = rng.choice(([], Object(), [[]], [n], [n] * 3, many, Object([["a", n]]), Quoted([[n]])))
    return rng.choice((plain, plain, rng.choice(TEXTS), Raw(rng.choice(RAWS)), copy.deepcopy(deep)))


def change(rng: Rng, tree: Any, other: Any) -> None:
    """One change somewhere in a tree; `other` is another file's tree, of which values are borrowed."""
    spots = places(tree)
    objects = [t for t in (tree, *(held[i] for held, i in spots)) if isinstance(t, Object) and t]
    if not objects or not spots:
        return
    what, entries = rng.randrange(9), rng.choice(objects)
    entry, (held, i) = rng.choice(entries), rng.choice(spots)
    value = held[i]
    if what == 0:
        entries.remove(entry)
    elif what == 1:
        entries.append([entry[0], copy.deepcopy(rng.choice((entry[1], odd_value(rng))))])
    elif what == 2:
        entry[0] = rng.choice((entry[0] + "x", "", rng.choice(rng.choice(objects))[0], "__metadata__", "\ud800"))
    elif what == 3:
        held[i] = rng.choice(([value], value[:-1] if isinstance(value, list) else [value, value]))
    elif what == 4 and isinstance(value, int | float):
        held[i] = value + rng.choice((-1, 1))
    elif what == 4 and isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        held[i] = value[:at] + rng.choice("a09 .:-\0é") + value[at + rng.randrange(2) :]
    elif what in (5, 6) and (theirs := places(other) if what == 5 else spots):
        its, k = rng.choice(theirs)
        held[i] = copy.deepcopy(its[k])
    else:
        held[i] = odd_value(rng)


OF_METADATA = "sha256_of_metadata"
WIDTHS = {"BOOL": 1, "U8": 1, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}


def fit(tree: Any, data: bytes) -> bytes:
    """Let the tensors follow each other, as long as their shapes call for, and the digests be those of the data."""
    out, digests = bytearray(), Object()
    for name, entry in tree if isinstance(tree, Object) else ():
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):  # no tensor, or one of the odd ones
            tensor = dict(entry)
            size = math.prod(map(operator.index, tensor["shape"])) * WIDTHS[tensor["dtype"]]
            begin, _ = tensor["data_offsets"]
            if 0 <= size < 1 << 16:
                value = data[begin : begin + size].ljust(size, b"\0")
                tensor["data_offsets"][:] = len(out), len(out) + size
                out += value
                digests.append([name, hashlib.sha256(value).hexdigest()])
    for held, i in places(tree):
        if held[0] == "sha256":
            held[i] = Quoted([digests])
    return bytes(out)


def fit_metadata(tree: Any) -> None:
    """Let the digest of the metadata be theirs, where they can be parsed."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, RecursionError):
        metadata = json.loads(written(tree))["__metadata__"]
        metadata.pop(OF_METADATA)
        text = json.dumps(metadata, sort_keys=True)
        for held, i in places(tree):
            if held[0] == OF_METADATA:
                held[i] = hashlib.sha256(text.encode()).hexdigest()


def mutate_model(rng: Rng, content: bytes, other: bytes) -> bytes:
    """Any bytes; or the header's tree and the data, often with a length, offsets and digests that fit."""
    if rng.random() < 0.2:
        return damaged(rng, content, other)
    try:
        header, data = remade(rng, *opened(content), opened(other)[0])
    except (ValueError, RecursionError):  # no safetensors file, or one that is nested deep
        return damaged(rng, content, other)
    if rng.random() < 0.1:
        header = damaged(rng, header, other)
    header += b" " * (-len(header) % rng.choice((1, 8, 8, 8))) + b" " * rng.choice((0,) * 999 + (1 << 20,))
    length = len(header) if rng.random() < 0.97 else rng.choice(INTEGERS)
    return length.to_bytes(8, "little") + header + data


def remade(rng: Rng, tree: Any, data: bytes, other: Any) -> tuple[bytes, bytes]:
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        change(rng, tree, other)
    if data and rng.random() < 0.3:
        data = odd_numbers(rng, data) if rng.random() < 0.7 else damaged(rng, data, data)
    if rng.random() < 0.6:
        data = fit(tree, data)
    if rng.random() < 0.95:
        fit_metadata(tree)
    return written(tree).encode("utf8", "surrogatepass"), data


def opened(content: bytes) -> tuple[Any, bytes]:
    """The header of a safetensors file as a tree, and its data; ValueError where it is none."""
    end = 8 + int.from_bytes(content[:8], "little")
    return parsed(content[8:end].decode()), content[end:]


def odd_numbers(rng: Rng, data: bytes) -> bytes:
    """NaN, infinities, large integers, zeros in the places of a few numbers."""
    changed, form = bytearray(data), rng.choice("fdQq")
    for _ in range(rng.choice((1, 1, 3))):
        value = rng.choice((math.nan, math.inf, 0.0, 1.5) if form in "fd" else (0, 1, 2**31, 2**63 - 1))
        size = struct.calcsize(form)
        at = rng.randrange(len(data)) // size * size
        changed[at : at + size] = struct.pack(f"<{form}", value)
    return bytes(changed[: len(data)])


def check_model(content: bytes, net: Any) -> None:
    """A network that works, and that comes back the same when it is saved."""
    assert (np.abs(net.theta) < np.inf).all(), "parameters that are not finite"
    with contextlib.suppress(bp.DataError):  # the outputs are not finite: large numbers
        assert len(net.predict(np.zeros((2, net.layers[0])))) == 2
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        bp.save(net, Path(folder, "m"))
        back = bp.load(Path(folder, "m"), "numpy")
    np.testing.assert_array_equal(back.theta, net.theta)
    for name in ("layers", "hidden", "output", "init", "bias", "precision", "seed", "cost", "task", "dropout"):
        assert getattr(back, name) == getattr(net, name), f"{name} does not survive saving"


# ----------------------------------------------------------------------------------------------------------- readers

MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


@dataclass
class Reader:
    """What reads files of one kind, and how such files are made."""

    make: Callable[[], list[bytes]]
    mutate: Callable[[Rng, bytes, bytes], bytes]
    read: Callable[[Path], Any]
    check: Callable[[bytes, Any], None]
    error: str  # the name of the exception that may come out
    per_byte: int  # how many bytes of memory a byte of a file may ask for
    litter: int = 1  # inputs of one mutation, where that takes long: itself, and others near it
    made: list[bytes] = field(default_factory=list)
    parent: tuple[int, int, bytes] | None = None  # the last mutation: seed, run, what came of it

    @property
    def seeds(self) -> list[bytes]:
        self.made = self.made or self.make()
        return self.made

    def draw(self, seed: int, run: int) -> bytes:
        first = run - run % self.litter
        if self.parent is None or self.parent[:2] != (seed, first):
            rng = random.Random(seed << 64 | first)
            self.parent = seed, first, self.mutate(rng, rng.choice(self.seeds), rng.choice(self.seeds))
        content = self.parent[2]
        return content if run == first else near(random.Random(seed << 64 | run), content)


READERS = {
    "idx": Reader(idx_seeds, mutate_idx, lambda path: bp.datasets.read_idx(path, 3), check_idx, "DataError", DEFLATE),
    "npy": Reader(npy_seeds, mutate_npy, lambda path: bp.datasets.read_npy(path), check_npy, "DataError", 4),
    "npz": Reader(npz_seeds, mutate_npz, lambda path: bp.datasets.read_npz(path), check_npz, "DataError", 4 * DEFLATE),
    "model": Reader(
        model_seeds, mutate_model, lambda path: bp.load(path, "numpy"), check_model, "CheckpointError", 100, litter=8
    ),
}


# ------------------------------------------------------------------------------------------------------------ engine


class Finding(Exception):  # noqa: N818
    """Something that a reader must not do."""


class Stage:
    """One file, in memory alone, that holds one input after the other; meanwhile memory is traced."""

    def __enter__(self) -> Stage:
        self.fd = os.memfd_create("fuzz")
        self.path = Path(f"/proc/self/fd/{self.fd}")
        tracemalloc.start()  # once: in Python 3.11 each start takes some memory for good
        return self

    def __exit__(self, *error: object) -> None:
        tracemalloc.stop()
        os.close(self.fd)

    def put(self, content: bytes) -> Path:
        os.ftruncate(self.fd, len(content))
        os.pwrite(self.fd, content, 0)
        return self.path


@dataclass
class Tally:
    """What came out of the runs."""

    runs: int = 0
    accepted: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    began: float = field(default_factory=time.perf_counter)

    def __str__(self) -> str:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        return "\n".join(
            [
                f"{self.runs} runs in {time.perf_counter() - self.began:.0f} s, {self.accepted} accepted, "
                f"{self.causes.total()} refused for {len(self.causes)} causes, no finding",
                f"peak memory {self.peak / 2**20:.1f} MiB for one input, {resident} MiB for the process",
                *(f"{n:9}  {cause}" for cause, n in self.causes.most_common()),
            ]
        )


def examine(reader: Reader, content: bytes, stage: Stage, tally: Tally) -> None:
    """One input to one reader. Raises Finding."""
    path, error, cause = stage.put(content), getattr(bp, reader.error), ""
    tally.runs += 1
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    try:
        result = reader.read(path)
    except error as e:
        cause = str(e)
    except KeyboardInterrupt:
        raise
    except BaseException:  # no mere Exception: what comes of a panic in a library of Rust is none
        raise Finding(f"another error than {reader.error}:\n{traceback.format_exc()}") from None
    finally:
        peak = tracemalloc.get_traced_memory()[1] - before
    tally.peak = max(tally.peak, peak)
    if peak > FIXED + reader.per_byte * len(content):
        raise Finding(f"{peak} bytes of memory for a file of {len(content)}")
    if cause:
        if len(cause.splitlines()) != 2:
            raise Finding(f"an error of other than two lines:\n{cause}")
        tally.causes[kind(cause.splitlines()[0], path)] += 1
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries that it is held against
            reader.check(content, result)
    except Exception:
        raise Finding(f"accepted, but not sound:\n{traceback.format_exc()}") from None
    tally.accepted += 1


def kind(cause: str, path: Path) -> str:
    """A message without what differs from file to file."""
    text = cause[:300].replace(str(path), "FILE")
    text = re.sub(r"(?<!\w)b?('(\\.|[^'\\])*('|$)|\"(\\.|[^\"\\])*(\"|$))", "'...'", text)
    text = re.sub(r"[\[({<].*([\])}>]|$)", "[...]", text)
    return re.sub(r"[-+]?(0x)?\d[\w.+]*|\bnan\b|-?\binf\b", "N", text)[:120]


def fuzz(name: str, runs: int, seed: int = 0, first: int = 0, at: Callable[[int], object] = int) -> Tally:
    """`runs` inputs to a reader; `at` is told the number of each. Raises Finding, whose input is kept in a file."""
    reader, tally = READERS[name], Tally()
    with Stage() as stage:
        for run in range(first, first + runs):
            at(run)
            content = reader.draw(seed, run)
            try:
                examine(reader, content, stage, tally)
            except Finding as e:
                raise Finding(f"{found(name, seed, run, content)}: {e}") from None
    return tally


def found(name: str, seed: int, run: int, content: bytes) -> str:
    path = Path(tempfile.gettempdir(), f"backprop_gpu-fuzz-{name}-{seed}-{run}")
    path.write_bytes(content)
    return f"FINDING in {name}, seed {seed}, run {run}, kept in {path}"


def supervised(name: str, runs: int, seed: int, first: int) -> int:
    """The status of a child that does the runs, also where that crashes, or stands still and is ended."""
    number, reader = mmap.mmap(-1, 8), READERS[name]
    with Stage() as stage:
        examine(reader, reader.seeds[0], stage, Tally())  # all modules are there now
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there are threads: those of libraries, which know of forks
        child = os.fork()
    if not child:
        work(lambda: fuzz(name, runs, seed, first, lambda run: struct.pack_into("Q", number, 0, run + 1)))
    last, since, hangs = 0, time.monotonic(), False
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.02)
        if (now := struct.unpack_from("Q", number)[0]) != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > PATIENCE and not hangs:
            hangs = True
            os.kill(child, signal.SIGABRT)  # the child says where it stands
    status = os.waitstatus_to_exitcode(done[1])
    if hangs or status < 0:
        what = f"no answer within {PATIENCE:g} s" if hangs else f"the process ended with status {status}"
        print(f"{found(name, seed, last - 1, reader.draw(seed, last - 1))}: {what}")
    return min(abs(status), 1)


def work(runs: Callable[[], Tally]) -> NoReturn:
    """What the child does: its status is 1 after a finding."""
    status = 1
    try:
        faulthandler.enable()
        resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))
        warnings.simplefilter("error")
        print(runs())
        status = 0
    except Finding as e:
        print(e)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def led_by_coverage(name: str, runs: int, seed: int) -> NoReturn:
    """The same under libFuzzer, of which half of the inputs are, and which ends the process."""
    import atheris

    reader, tally = READERS[name], Tally()
    with Stage() as stage, atheris.instrument_imports(include=["backprop_gpu"]):
        examine(reader, reader.seeds[0], stage, Tally())

    def mutate(content: bytes, most: int, number: int) -> bytes:
        rng = random.Random(number)
        if not content or rng.random() < 0.05:
            return rng.choice(reader.seeds)
        if rng.random() < 0.5:
            return atheris.Mutate(content, most)
        return reader.mutate(rng, content, rng.choice(reader.seeds))[:most]

    def one(content: bytes) -> None:
        examine(reader, content, stage, tally)
        if tally.runs == runs:
            print(tally, flush=True)

    options = {"runs": runs, "seed": seed + 1, "timeout": math.ceil(PATIENCE), "rss_limit_mb": ROOM >> 20}
    options |= {"max_len": 1 << 16, "len_control": 0}
    options["artifact_prefix"] = Path(tempfile.gettempdir(), f"backprop_gpu-fuzz-{name}-")
    atheris.Setup([sys.argv[0], *(f"-{key}={value}" for key, value in options.items())], one, custom_mutator=mutate)
    with Stage() as stage:
        atheris.Fuzz()


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first run")
    parser.add_argument("--input", type=Path, help="one file instead")
    parser.add_argument("--atheris", action="store_true")
    given = parser.parse_args(args)
    os.environ.update(BACKPROP_GPU_BACKEND="numpy", BACKPROP_GPU_FAST="0")
    if given.input:
        READERS[given.reader].draw = lambda seed, run: given.input.read_bytes()
        given.runs = 1
    if given.atheris:
        warnings.simplefilter("error")
        led_by_coverage(given.reader, given.runs, given.seed)
    print(f"{given.reader}: Python {sys.version.split()[0]}, NumPy {np.__version__}, seed {given.seed}", flush=True)
    return supervised(given.reader, given.runs, given.seed, given.first)


if __name__ == "__main__":
    sys.exit(main())
