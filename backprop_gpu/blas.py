"""The BLAS under NumPy, where it is OpenBLAS: its products, and how many threads make one.

Threads cost more than they bring where a product is small. How many there are is a function of the product's shape
alone, so that the bits of a result do not depend on the time of day. What a user has set is there again after `kept`.
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


class Routines(NamedTuple):
    """Functions of a loaded OpenBLAS. `wide`: whether its integers have 64 bits."""

    get_num_threads: Any
    set_num_threads: Any
    get_corename: Any
    sgemm: Any
    dgemm: Any
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
                names += ["cblas_sgemm", "cblas_dgemm"]
                its = Routines(*[getattr(dll, f"{prefix}{name}{suffix}") for name in names], bool(suffix))
                its.get_corename.restype = ctypes.c_char_p
                return its
    return None


def core() -> str | None:
    """The kind of CPU that its kernels were made for, such as "Zen"; None where it does not tell."""
    found = routines()
    return found and found.get_corename().decode()


class _Threads:
    """How many threads OpenBLAS uses: for all of the process."""

    def __init__(self) -> None:
        found = routines()
        self._get: Callable[[], int] | None = found and found.get_num_threads
        self._set: Callable[[int], Any] | None = found and found.set_num_threads
        self._lock, self._users, self._before = threading.Lock(), 0, 0
        self.all = 0  # that a product may use, while there are users
        self._now = 0

    def now(self) -> int | None:
        """How many there are; None where it does not tell."""
        return self._get() if self._get else None

    @contextlib.contextmanager
    def kept(self, most: int | None = None) -> Iterator[None]:
        """After it there are as many as before, when the last of those who are within it at once has left.

        `most`: that a product may use within it, where its first user says so; None: as many as there are.
        """
        with self._lock:
            if self._users == 0 and self._get:
                self._before = self._now = self._get()
                self.all = self._before if most is None else min(most, self._before)
                self.set(self.all)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self.set(self._before)
                    self.all = 0

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Within it, and within `kept`, there are as many as before: for what others do."""
        self.set(self._before)
        try:
            yield
        finally:
            self.set(self.all)

    def set(self, threads: int | None) -> None:
        """From now on, within `kept`; None, or a BLAS that does not let it be set: as it is."""
        if threads and threads != self._now and self._set:
            self._set(threads)
            self._now = threads


threads = _Threads()


def matmul(a: Array, b: Array, out: Array) -> Array:
    """out = a b, of two matrices, or of a vector and a matrix; within `threads.kept` its shape says in how many threads."""
    if threads.all:
        threads.set(1 if out.size * a.shape[-1] < SMALL else threads.all)
    return np.matmul(a, b, out=out)


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
