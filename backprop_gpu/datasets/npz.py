"""NumPy's own files: .npz archives with x_train, y_train, x_test, y_test, and single .npy arrays; never pickled."""

from __future__ import annotations

import io
import math
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from ..errors import DataError
from .idx import DEFLATE_LIMIT, open_regular

if TYPE_CHECKING:
    import zipfile

MAX_BYTES = 1 << 32  # of one array, unpacked
MAX_HEADER = 1 << 10  # numpy writes less for 32 dimensions, and takes a minute to refuse 10 000 bytes
_OF_ZIPFILE = (zlib.error, struct.error, EOFError, RuntimeError, OSError, ValueError, OverflowError)


def read_npy(path: Path, max_bytes: int = MAX_BYTES) -> np.ndarray:
    """The array of a .npy file. Raises DataError for a file that is missing, damaged, pickled or too large."""
    path = Path(path)
    with open_regular(path) as file:
        return _read(file, os.fstat(file.fileno()).st_size, str(path), max_bytes)


def read_npz(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, of those among x_train, y_train, x_test, y_test. Raises DataError as `read_npy`."""
    import zipfile  # with shutil and more: only where such a file is read

    path = Path(path)
    arrays = {}
    with open_regular(path) as content:
        size = os.fstat(content.fileno()).st_size
        try:
            with zipfile.ZipFile(content) as archive:
                members = {info.filename: info for info in archive.infolist()}
                for name in ("x_train", "y_train", "x_test", "y_test"):
                    if info := members.get(f"{name}.npy"):
                        _refuse_bomb(info, size)
                        with archive.open(info) as file:
                            arrays[name] = _read(file, info.file_size, f"{path}: {name}", max_bytes)
        except DataError:
            raise
        except (zipfile.BadZipFile, *_OF_ZIPFILE) as e:
            raise DataError(f"{path} is not a sound .npz file: {e}", "write it again with numpy.savez") from None
    return arrays


def _refuse_bomb(info: zipfile.ZipInfo, size: int) -> None:
    """No member unpacks to more than its packed bytes, all within a file of `size` bytes, can hold."""
    import zipfile

    most = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: DEFLATE_LIMIT}.get(info.compress_type)
    if most is None:
        raise NotImplementedError(f"{info.filename} is packed in a way that numpy does not write")
    if info.file_size > most * min(info.compress_size, size):
        raise zipfile.BadZipFile(
            f"{info.filename} announces {info.file_size} bytes, which {info.compress_size} cannot hold"
        )


def _read(file: IO[bytes], size: int, what: str, max_bytes: int) -> np.ndarray:
    """One array in .npy form of `size` bytes, header included; memory is taken once the header has been checked."""
    cure = "write it again with numpy.save or numpy.savez, as plain numbers"
    start = file.read(8)
    start += file.read(4 if start[6:] == b"\2\0" else 2)
    length = int.from_bytes(start[8:], "little")
    header = io.BytesIO(start + file.read(min(length, MAX_HEADER)))
    try:
        version = np.lib.format.read_magic(header)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of the format is for structured arrays only")
        if length > MAX_HEADER:
            raise ValueError(f"a header of {length} bytes")
        parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            shape, fortran, dtype = parse(header)
        if len(shape) > 32 or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError(f"shape {shape}")
    except Exception as e:  # the parser expects no malice, and raises IndexError, MemoryError, TokenError too
        raise DataError(f"{what} is not a sound .npy array: {(str(e).splitlines() or ['?'])[0]}", cure) from None
    if dtype.hasobject or dtype.kind not in "biuf":
        raise DataError(f"{what} holds {dtype}, not plain numbers: pickled objects are never read", cure)
    expected = math.prod(shape) * dtype.itemsize
    there = size - file.tell()
    if expected == 0:
        raise DataError(f"{what} is empty, shape {shape}", cure)
    if expected != there:
        raise DataError(f"{what} announces {expected} bytes, shape {shape}, but holds {there}", cure)
    if expected > max_bytes:
        raise DataError(f"{what} announces {expected} bytes, more than the limit of {max_bytes}", cure)
    data = np.empty(expected, np.uint8)
    view, at = data.data, 0
    while at < expected:
        piece = file.read(min(1 << 20, expected - at))
        if not piece:
            raise DataError(f"{what} is truncated: {at} of {expected} bytes", cure)
        view[at : at + len(piece)] = piece
        at += len(piece)
    if file.read(1):
        raise DataError(f"{what} goes on after its {expected} bytes", cure)
    array = data.view(dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
