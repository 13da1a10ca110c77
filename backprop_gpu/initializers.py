"""Initial weights: one function each of a generator and the shape (N_l, N_(l-1)). Biases start at zero.

he: variance 2 / fan_in (He et al., 2015); glorot: 2 / (fan_in + fan_out) (Glorot and Bengio, 2010); lecun: 1 / fan_in
(LeCun et al., 1998). The normal forms have that standard deviation, the uniform ones the range +-sqrt(3 variance).
Drawn in float64 on the host, whatever the backend and dtype, so that a seed means one network everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Initializer = Callable[[Any, tuple[int, int]], np.ndarray]


def _variance(kind: str, shape: tuple[int, int]) -> float:
    fan_out, fan_in = shape
    return {"he": 2 / fan_in, "glorot": 2 / (fan_in + fan_out), "lecun": 1 / fan_in}[kind]


def _normal(kind: str) -> Initializer:
    return lambda rng, shape: rng.standard_normal(shape) * _variance(kind, shape) ** 0.5


def _uniform(kind: str) -> Initializer:
    return lambda rng, shape: (rng.random(shape) * 2 - 1) * (3 * _variance(kind, shape)) ** 0.5


INITIALIZERS: dict[str, Initializer] = {"zeros": lambda rng, shape: np.zeros(shape)}
for _kind in ("he", "glorot", "lecun"):
    INITIALIZERS[_kind] = INITIALIZERS[f"{_kind}_normal"] = _normal(_kind)
    INITIALIZERS[f"{_kind}_uniform"] = _uniform(_kind)
