"""IDX files, the format of MNIST: two zero bytes, a type code, the number of dimensions, the dimensions, the elements.

Only unsigned bytes are read (type code 8). Nothing in the file is believed before it is checked: never more is read
than the header announces plus one byte, and never more is announced than `max_bytes` or the file's own size can hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import stat
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

import numpy as np

from ..errors import DataError

MAX_BYTES = 1 << 30  # of one array, unpacked
_PIECE = 1 << 20
DEFLATE_LIMIT = 1032  # no deflate stream unpacks to more than this many times its size


def read_idx(path: Path, ndim: int, max_bytes: int = MAX_BYTES, sha256: str | None = None) -> np.ndarray:
    """The uint8 array of an IDX file, plain or compressed with gzip (told by its first bytes).

    `ndim`: how many dimensions it must have (MNIST: images 3, labels 1). `sha256`: of the unpacked file, checked where
    given. Raises DataError, naming file and bytes, for a file that is missing, no IDX file, damaged, truncated, longer
    than its header says, larger than `max_bytes`, or another than its digest says.
    """
    path = Path(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        packed = file.peek(2)[:2] == b"\x1f\x8b"
        if size == 0:
            raise _bad(path, "is empty (0 bytes)")
        if path.suffix == ".gz" and not packed:
            raise _bad(path, "is not a gzip file although its name says so")
        digest = hashlib.sha256()
        stream = _Stream(_unpack(path, file) if packed else iter(lambda: file.read(_PIECE), b""), digest)
        head = stream.read(4)
        if len(head) < 4 or head[:2] != b"\0\0":
            raise _bad(path, f"is not an IDX file: it begins with {head!r}")
        if head[2] != 8:
            raise _bad(path, f"holds elements of type 0x{head[2]:02x}; only unsigned bytes, 0x08, are read")
        if head[3] != ndim:
            kind = {1: "labels", 3: "images"}
            raise _bad(
                path,
                f"has {head[3]} dimensions ({kind.get(head[3], 'neither')}), not {ndim} ({kind.get(ndim, 'an array')})",
            )
        dims_bytes = stream.read(4 * ndim)
        if len(dims_bytes) < 4 * ndim:
            raise _bad(path, f"is truncated: its header ends after {4 + len(dims_bytes)} of {4 + 4 * ndim} bytes")
        shape = tuple(int.from_bytes(dims_bytes[i : i + 4], "big") for i in range(0, 4 * ndim, 4))
        expected = math.prod(shape)
        if expected == 0:
            raise _bad(path, f"announces no data: dimensions {shape}")
        if expected > max_bytes:
            raise _bad(path, f"announces {expected} bytes, more than the limit of {max_bytes}")
        if expected > size * (DEFLATE_LIMIT if packed else 1):
            raise _bad(path, f"announces {expected} bytes, dimensions {shape}, which its {size} bytes cannot hold")
        data = np.empty(expected, np.uint8)
        got = stream.read_into(data.data)
        if got < expected:
            raise _bad(path, f"is truncated: {got} of {expected} bytes of data")
        if stream.read(1):
            raise _bad(path, f"is longer than its header says: more than {expected} bytes of data")
        if sha256 is not None and digest.hexdigest() != sha256:
            raise _bad(
                path, f"is not the file it should be: its SHA-256 is {digest.hexdigest()[:16]}..., not {sha256[:16]}..."
            )
        return data.reshape(shape)


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """`path`, open; DataError where it or a read in it fails, or it is no regular file (opening a pipe would hang)."""
    try:
        try:
            mode = path.stat().st_mode
        except ValueError as e:  # a null byte in the name
            raise OSError(str(e)) from None
        if not stat.S_ISREG(mode):
            raise _bad(path, "is not a regular file")
        with path.open("rb") as file:
            yield file
    except OSError as e:
        reason = e.strerror or e
        raise DataError(f"{path} cannot be read: {reason}", "check the path, its permissions and the disk") from None


def _bad(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}", "get the file again, or check that it is the one that was meant")


def _unpack(path: Path, file: BufferedReader) -> Iterator[bytes]:
    """The pieces of a gzip file of one member, which must end where the file ends."""
    inflate = zlib.decompressobj(wbits=31)
    count = 0
    while not inflate.eof:
        packed = inflate.unconsumed_tail or file.read(1 << 16)
        if not packed:
            raise _bad(path, f"is truncated: the gzip stream breaks off after {count} unpacked bytes")
        try:
            piece = inflate.decompress(packed, _PIECE)
        except zlib.error as e:
            raise _bad(path, f"is damaged after {count} unpacked bytes: {e}") from None
        count += len(piece)
        if piece:
            yield piece
    extra = len(inflate.unused_data) + len(file.read(1))
    if extra:
        raise _bad(path, f"goes on after the end of its gzip stream, {count} unpacked bytes")


class _Stream:
    """Exact reads from an iterator of pieces, each piece hashed as it is used."""

    def __init__(self, pieces: Iterator[bytes], digest: hashlib._Hash) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")
        self._digest = digest

    def read(self, n: int) -> bytes:
        out = bytearray(n)
        return bytes(out[: self.read_into(memoryview(out))])

    def read_into(self, out: memoryview) -> int:
        """Fill `out` as far as the pieces go; how many bytes that were."""
        at = 0
        while at < len(out):
            if not self._rest:
                piece = next(self._pieces, b"")
                if not piece:
                    break
                self._rest = memoryview(piece)
            n = min(len(self._rest), len(out) - at)
            out[at : at + n] = self._rest[:n]
            self._digest.update(self._rest[:n])
            self._rest = self._rest[n:]
            at += n
        return at
