"""Whole training steps on MNIST in batches of 128, as `train` runs them, on every backend that is there.

    python -m pytest benchmarks/test_steps.py --benchmark-enable

A round is one step, on a GPU as many as a graph holds (extra_info tells), with the wait for the device. Without
`--benchmark-enable` each runs one round.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu.stepping import STEPS, Stepping

M = 128
RULES = {"sgd": bp.SGD(0.1), "adam": bp.Adam(1e-3)}
CASES = (("784-100-10", "sgd"), ("784-100-10", "adam"), ("784-512-512-10", "adam"))


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray]:
    """MNIST's training images and labels, uint8."""
    train, _ = bp.datasets.load("mnist")
    return train.images, train.labels


@pytest.mark.parametrize("backend", ["numpy", "cupy"])
@pytest.mark.parametrize(("layers", "rule"), CASES)
def test_step(layers: str, rule: str, backend: str, benchmark: Any) -> None:
    """The cost of each step is that of a network which learns."""
    try:
        net = bp.Network([int(width) for width in layers.split("-")], seed=0, backend=backend)
    except bp.BackendError as e:
        pytest.skip(e.cause)
    with Stepping(net, *data(), RULES[rule], M) as steps:
        steps.run(STEPS)
        steps.wait()
        assert steps.losses[-8:].mean() < 0.8 * steps.losses[:8].mean()
        at_once = 1 if backend == "numpy" else STEPS
        benchmark.extra_info |= {"steps": at_once, "executor": steps.executor.told}

        def run() -> None:
            steps.run(at_once)
            steps.wait()

        benchmark(run)
        assert (steps.losses < np.log(10)).all()
