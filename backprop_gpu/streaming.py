"""Data that stays on the host while the GPU trains on it: whether it has to, and how its rows get there in time.

An epoch's steps are cut into chunks. While the steps of one train, the host permutes the rows of the next into pinned
memory, from where a stream of its own copies them to the half of a device buffer that is not in use. The steps read
consecutive rows then, the same ones in the same order as from data that lies on the device as a whole.
"""

from __future__ import annotations

import bisect
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from .activations import Array
from .backend import Backend, is_cupy
from .cublaslt import WORKSPACE_BYTES
from .errors import ConfigError
from .inputs import Samples
from .network import CHUNK_ROWS, Network
from .optimizers import Optimizer

MOST_STEPS, MOST_BYTES = 64, 64 << 20  # of a chunk
SHARE = 0.6  # of the memory that is free, up to which the data lies on the device
UNITS = {"": 1, **{f"{letter}b": 1000**i for i, letter in enumerate("kmgt", 1)}, "b": 1}
UNITS |= {f"{letter}ib": 1024**i for i, letter in enumerate("kmgt", 1)}


def room_for(net: Network, data: Sequence[Samples], rule: Optimizer, batch_size: int) -> int | None:
    """None where all the data may lie on the device, else how many bytes of it the data may have there.

    BACKPROP_GPU_DATA_LIMIT says how many; without it that is measured. Data that is there already stays there. Raises
    ConfigError.
    """
    if net.backend.name == "numpy":
        return None
    room = data_limit()
    if is_cupy(data[0].X):
        return None
    if room is None:
        room = max(0, int(SHARE * (_free(net.backend.xp) - _needed(net, rule, batch_size))))
    return room if sum(samples.nbytes for samples in data) > room else None


def data_limit() -> int | None:
    """Bytes, from BACKPROP_GPU_DATA_LIMIT; None where it says nothing. Raises ConfigError."""
    text = os.environ.get("BACKPROP_GPU_DATA_LIMIT", "").strip()
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+) *([a-z]*)", text.lower(), re.ASCII)
    if not found or found[2] not in UNITS:
        raise ConfigError(
            f"BACKPROP_GPU_DATA_LIMIT is {text!r}", "set it to a number of bytes, such as 500MB, 2GiB or 1000000"
        )
    number, unit = found[1], UNITS[found[2]]
    return int(number) * unit if number.isdigit() else int(float(number) * unit)


def _free(xp: Any) -> int:
    """Bytes of the device that can be had: nobody's, and those that CuPy keeps for later; up to its limit."""
    pool = xp.get_default_memory_pool()
    free, limit = int(xp.cuda.runtime.memGetInfo()[0]) + int(pool.free_bytes()), int(pool.get_limit())
    return min(free, limit - int(pool.used_bytes())) if limit else free


def _needed(net: Network, rule: Optimizer, batch_size: int) -> int:
    """About how many bytes a run takes beside its data: vectors like theta, and what a batch computes on its way."""
    vectors = (rule.slots + 4) * net.theta.size
    on_the_way = 10 * max(batch_size, CHUNK_ROWS) * sum(net.layers)
    return (vectors + on_the_way) * net.dtype.itemsize + 2 * WORKSPACE_BYTES  # of the steps, and of evaluations


class Feed:
    """The rows of an epoch's steps, in the order of the steps, on the device when they are needed.

    `samples` is the buffer there, of two chunks of `rows` samples each, or of one that holds all. A chunk is as many
    steps of `batch_size` samples as `room` bytes have space for, twice, at least one, up to MOST_STEPS and MOST_BYTES;
    a multiple of the first of `sizes` that is not above it.
    """

    def __init__(self, be: Backend, source: Samples, batch_size: int, room: int, sizes: Sequence[int]) -> None:
        xp, n = be.xp, len(source)
        fit = min(room // 2, MOST_BYTES) * n // max(1, source.nbytes * batch_size)
        self._steps = max(1, min(MOST_STEPS, fit))
        self._steps -= self._steps % next((size for size in sizes if size <= self._steps), 1)
        self.rows = min(self._steps * batch_size, n)
        halves = 1 if self.rows == n else 2
        self.xp, self._source = xp, source

        def made(a: np.ndarray | None) -> Any:  # zeros: a kernel may be tried on them
            return None if a is None else xp.zeros((halves * self.rows, *a.shape[1:]), a.dtype)

        self.samples = Samples(made(source.X), made(source.T), made(source.weights), source.task)
        self._pinned = [[self._made_pinned(a) for a in self._parts(source)] for _ in range(halves)]
        self._stream = xp.cuda.Stream(non_blocking=True)
        # Of each half: its copy has landed, and its chunk has been used.
        self._landed, self._used = ([xp.cuda.Event(disable_timing=True) for _ in range(halves)] for _ in range(2))
        for event in self._used:
            event.record()  # after the zeros
        self._held: list[int | None] = [None] * halves  # which chunk
        self._current: int | None = None

    @staticmethod
    def _parts(samples: Samples) -> list[Any]:
        return [a for a in (samples.X, samples.T, samples.weights) if a is not None]

    def _made_pinned(self, a: np.ndarray) -> np.ndarray:
        shape = (self.rows, *a.shape[1:])
        size = int(np.prod(shape))
        memory = self.xp.cuda.alloc_pinned_memory(size * a.dtype.itemsize)
        return np.frombuffer(memory, a.dtype, size).reshape(shape)

    def begin(self, order: np.ndarray, ends: Sequence[int]) -> None:
        """Before an epoch: its samples in order, and where its batches begin and end."""
        self._leave()
        self._order, self._ends = order, ends
        self._bounds = [0]  # the first step of each chunk, and the end
        while (first := self._bounds[-1]) < len(ends) - 1:
            fits = bisect.bisect_right(ends, ends[first] + self.rows) - 1
            self._bounds.append(min(first + self._steps, fits))
        self._held = [None] * len(self._held)
        self._fill(0)

    def rest(self, i: int) -> int:
        """How many steps the chunk of step i has from there on."""
        return self._bounds[bisect.bisect_right(self._bounds, i)] - i

    def enter(self, i: int) -> int:
        """Where the rows of step i begin in the buffer. What the current stream does from here on finds them there."""
        chunk = bisect.bisect_right(self._bounds, i) - 1
        half = chunk % len(self._held)
        if chunk != self._current:
            self._leave()
            self._fill(chunk)
            self.xp.cuda.get_current_stream().wait_event(self._landed[half])
            self._current = chunk
        return half * self.rows + self._ends[i] - self._ends[self._bounds[chunk]]

    def ahead(self) -> None:
        """See to the chunk that comes after the current one."""
        if self._current is not None and self._current + 2 < len(self._bounds):
            self._fill(self._current + 1)

    def _leave(self) -> None:
        """All that reads the current chunk has been given to the current stream."""
        if self._current is not None:
            self._used[self._current % len(self._used)].record()
        self._current = None

    def _fill(self, chunk: int) -> None:
        half = chunk % len(self._held)
        if self._held[half] == chunk:
            return
        first, end = (self._ends[self._bounds[c]] for c in (chunk, chunk + 1))
        rows, m = self._order[first:end], end - first
        self._landed[half].synchronize()  # what was in the pinned memory is on the device
        for a, pinned in zip(self._parts(self._source), self._pinned[half], strict=True):
            np.take(a, rows, axis=0, out=pinned[:m], mode="clip")  # any other mode copies the whole output once more
        self._stream.wait_event(self._used[half])
        for there, pinned in zip(self._parts(self.samples), self._pinned[half], strict=True):
            at = half * self.rows
            there[at : at + m].set(pinned[:m], self._stream)
        self._landed[half].record(self._stream)
        self._held[half] = chunk

    def close(self) -> None:
        """Wait for what is under way: then the memory may go."""
        self._stream.synchronize()


def greatest(X: Array) -> float:
    """The largest |x|."""
    return max(abs(float(X.min())), abs(float(X.max())))
