"""Batches: which samples each step of an epoch sees.

All randomness of a run is a function of (seed, stream): stream 0 draws the initial theta, stream e the order of epoch
e = 1, 2, .... Drawn on the host, the same on every backend, with no generator state to carry along.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from .errors import ConfigError


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


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of epoch `epoch` (from 1): each of 0..n-1 once, shuffled without replacement. int64 (n,)."""
    return generator(seed, epoch).permutation(n)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Steps in an epoch; the last, smaller batch is kept."""
    return -(-n // batch_size)
