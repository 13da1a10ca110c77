"""The BLAS under NumPy, where it is OpenBLAS: its products, and how many threads make one.

Threads cost more than they bring where a product is small. How many there are, one or all that the user allows, is a
function of the product's shape alone, so that the bits of a result do not depend on the time of day. What a user has
set is there again after `kept`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .activations import Array

SMALL = 8_000_000  # multiply-adds of a product that one thread makes as fast as two (Zen 3, OpenBLAS 0.3.31)
LONG = 200_000  # elements of a sum of vectors that two threads make faster than one


class Routines(NamedTuple):
    """Functions of a loaded OpenBLAS. `wide`: whether its integers have 64 bits."""

    get_num_threads: Any
    set_num_threads: Any
    get_corename: Any
    sgemm: Any
    dgemm: Any
    saxpby: Any
    daxpby: Any
    saxpy: Any
    daxpy: Any
    wide: bool


@functools.cache
def routines() -> Routines | None:
    """Those of the OpenBLAS that came with NumPy; None where another BLAS did."""
    package = Path(np.__file__).parent
    found = (*package.parent.glob("numpy.libs/*openblas*"), *package.glob(".dylibs/*openblas*"))
    for file in found:
        for prefix, suffix in (("scipy_", "64_"), ("", "64_"), ("", "")):
            with contextlib.suppress(OSError, AttributeError):
                dll = ctypes.CDLL(str(file))
                names = [f"openblas_{name}" for name in ("get_num_threads", "set_num_threads", "get_corename")]
                names += [f"cblas_{name}" for name in ("sgemm", "dgemm", "saxpby", "daxpby", "saxpy", "daxpy")]
                its = Routines._make([*(getattr(dll, f"{prefix}{name}{suffix}") for name in names), bool(suffix)])
                size = ctypes.c_int64 if its.wide else ctypes.c_int32
                vector = (ctypes.c_void_p, size)
                for real, axpby, axpy in ((ctypes.c_float, *its[5:9:2]), (ctypes.c_double, *its[6:9:2])):
                    axpby.argtypes, axpby.restype = (size, real, *vector, real, *vector), None
                    axpy.argtypes, axpy.restype = (size, real, *vector, *vector), None
                its.get_corename.restype = ctypes.c_char_p
                return its
    return None


def core() -> str | None:
    """The kind of CPU that its kernels were made for, such as "Zen"; None where it does not tell."""
    found = routines()
    return found and found.get_corename().decode()


class _Threads:
    """How many threads OpenBLAS uses: for all of the process.

    While a run is under way in `kept`, what it calls says how many; while all that are under way have it `lent` to
    others, there are as many as before.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # held where the number must not change
        self._users = self._lenders = 0
        self._before = self._now = 0
        self.all = 0  # that a product may use, while there are users
        if hasattr(os, "register_at_fork"):  # a child shall not wait for a thread that it does not have
            release = self.lock.release
            os.register_at_fork(before=self.lock.acquire, after_in_parent=release, after_in_child=release)

    @functools.cached_property  # for importing this opens no library
    def _get(self) -> Callable[[], int] | None:
        found = routines()
        return found and found.get_num_threads

    @functools.cached_property
    def _set(self) -> Callable[[int], Any] | None:
        found = routines()
        return found and found.set_num_threads

    def now(self) -> int | None:
        """How many there are; None where it does not tell."""
        return self._get() if self._get else None

    @contextlib.contextmanager
    def kept(self, most: int | None = None) -> Iterator[None]:
        """After it there are as many as before, when the last of those who are within it at once has left.

        `most`: that a product may use within it, where its first user says so; None: as many as there are.
        """
        with self.lock:
            if self._users == 0 and self._get:
                self._before = self._now = self._get()
                self.all = self._before if most is None else min(most, self._before)
            self._users += 1
            self._settle()
        try:
            yield
        finally:
            with self.lock:
                self._users -= 1
                self._settle()
                if self._users == 0:
                    self._before = self.all = 0

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Within it, and within `kept`, there are as many as before: for what others do, who may change it."""
        with self.lock:
            self._lenders += 1
            self._settle()
        try:
            yield
        finally:
            with self.lock:
                if self._get and self._lenders == self._users:
                    self._before = self._now = self._get()
                self._lenders -= 1
                self._settle()

    def _settle(self) -> None:
        self.set(self._before if self._lenders == self._users else self.all)

    def set(self, threads: int | None) -> None:
        """From now on, within `kept`; None or 0, or a BLAS that does not let it be set: as it is."""
        with self.lock:
            if threads and threads != self._now and self._set:
                self._set(threads)
                self._now = threads

    def call(self, many: bool, f: Callable[..., Any], *arguments: Any) -> Any:
        """f(*arguments) in one thread, or `many`; the lock holds off other runs, which may want another number."""
        if self.all <= 1:
            return f(*arguments)
        with self.lock:
            self.set(self.all if many else 1)
            return f(*arguments)


threads = _Threads()


def matmul(a: Array, b: Array, out: Array) -> Array:
    """out = a b, of two matrices, or of a vector and one; within `threads.kept` its shape says in how many threads."""
    return threads.call(out.size * a.shape[-1] >= SMALL, np.matmul, a, b, out)


def axpby(a: Any, x: Array, b: Any, y: Array) -> None:
    """y = a x + b y, of two vectors without gaps, of one dtype; a and b: numbers, or arrays of one."""
    found = routines()
    assert found is not None
    f = found.saxpby if y.dtype == np.float32 else found.daxpby
    threads.call(y.size >= LONG, f, y.size, float(a), x.ctypes.data, 1, float(b), y.ctypes.data, 1)


def descend(y: Array, a: Any, x: Array) -> None:
    """y = y - a x, as in `axpby`."""
    found = routines()
    assert found is not None
    f = found.saxpy if y.dtype == np.float32 else found.daxpy
    threads.call(y.size >= LONG, f, y.size, -float(a), x.ctypes.data, 1, y.ctypes.data, 1)


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
