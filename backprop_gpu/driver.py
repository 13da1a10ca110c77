"""The one call of the CUDA driver that CuPy does not offer: a launch with attributes, through ctypes.

A kernel launched with programmatic stream serialization may start while the one before it still runs; it waits for it
by itself (`pdl_wait` in kernels/arch.cuh), after what does not depend on it. Needs sm_90.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID, cuda.h


class _Value(ctypes.Union):  # CUlaunchAttributeValue
    _fields_ = [("pad", ctypes.c_char * 64), ("flag", ctypes.c_int)]


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint), ("pad", ctypes.c_char * 4), ("value", _Value)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("n_attributes", ctypes.c_uint),
    ]  # fmt: skip


@functools.cache
def library() -> Any:
    """The driver's library. Raises OSError where there is none."""
    found = ctypes.CDLL("libcuda.so.1")
    found.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    return found


def launch_early(
    function: Any,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[Any],
    shared: int,
    stream: int,
) -> None:
    """Launch a kernel so that it may start before the one before it in the stream has ended.

    `function`: as CuPy's RawModule gives it; `arguments`: device arrays and NumPy scalars; `shared`: bytes of dynamic
    shared memory; `stream`: its handle. Raises RuntimeError where the driver refuses.
    """
    packed = [_packed(a) for a in arguments]
    places = (ctypes.c_void_p * len(packed))(*map(ctypes.addressof, packed))
    attribute = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION)
    attribute.value.flag = 1
    three = ctypes.c_uint * 3
    config = _Config(
        three(*grid, *(1,) * (3 - len(grid))), three(*block, *(1,) * (3 - len(block))), shared, stream,
        ctypes.pointer(attribute), 1,
    )  # fmt: skip
    code = library().cuLaunchKernelEx(ctypes.byref(config), function.kernel.ptr, places, None)
    if code:
        raise RuntimeError(f"cuLaunchKernelEx: CUDA error {code}")


def _packed(argument: Any) -> Any:
    """An argument's bytes, where the driver can read them."""
    if isinstance(argument, np.generic):
        return ctypes.create_string_buffer(argument.tobytes(), argument.itemsize)
    return ctypes.c_void_p(argument.data.ptr)
