"""Batches: which samples each step of an epoch sees.

All randomness of a run is a function of (seed, stream): stream 0 draws the initial theta, stream e the order of epoch
e = 1, 2, ..., the last stream what is held out for validation. Drawn on the host, the same on every backend, with no
generator state to carry along. (Dropout draws by element: see `dropout`.)
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from .errors import ConfigError

KINDS = ("shuffled", "chunks", "in_order")
SPLIT_STREAM = 2**64 - 1


def check_seed(seed: Any) -> int:
    """A seed as an int in 0..2^64-1, else ConfigError."""
    try:
        value = operator.index(seed)
    except TypeError:
        value = -1
    if not 0 <= value < 2**64:
        raise ConfigError(f"seed is {seed!r}", "give an integer from 0 to 2^64 - 1")
    return value


def generator(seed: int, stream: int) -> np.random.Generator:
    """The counter-based generator Philox under the key (seed, stream)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))


def epoch_plan(kind: str, n: int, batch_size: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of an epoch, int64 (n,), and where its batches begin and end in it, int64 (steps + 1,).

    "shuffled": a fresh order, the last batch holds the rest. "chunks": a fresh order, and the batch that holds the rest
    comes at a random place (source 5, "Batch generator"). "in_order": the data's own order every time; with one sample
    a batch it is the loop of source 1. A batch that holds all samples has them in order: then nothing that repeats
    itself depends on the epoch, and source 3's while(theta^(i+1) != theta^i) can end. Every sample is visited once.
    """
    sizes = np.full(steps_per_epoch(n, batch_size), batch_size, np.int64)
    sizes[-1] = n - batch_size * (len(sizes) - 1)
    rng = generator(seed, epoch)
    order = np.arange(n) if kind == "in_order" or len(sizes) == 1 else rng.permutation(n)
    if kind == "chunks":
        sizes = rng.permutation(sizes)
    return order, np.concatenate([[0], np.cumsum(sizes)])


def split_off(n: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two ascending sets of indices, of the samples that stay and of the `share` of them that is held out, at random.

    At least one sample is in each; ConfigError where that cannot be.
    """
    held = round(n * share)
    if not 1 <= held < n:
        raise ConfigError(f"validation {share:g} of {n} samples leaves {n - held} and {held}", "give another fraction")
    order = generator(seed, SPLIT_STREAM).permutation(n)
    return np.sort(order[held:]), np.sort(order[:held])


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Steps in an epoch; the last, smaller batch is kept."""
    return -(-n // batch_size)
