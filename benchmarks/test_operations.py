"""Each operation of the engine at MNIST's sizes, 784/512/10 in batches of 128, on every backend that is there.

    python -m pytest benchmarks/test_operations.py --benchmark-enable

On a GPU a call is timed with the wait for the device. Without `--benchmark-enable` each operation runs once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu import numpy_ops
from backprop_gpu.backend import Backend, choose, to_host
from backprop_gpu.costs import COSTS
from backprop_gpu.network import Batch, Views, backward, forward
from backprop_gpu.regularization import Regularization
from backprop_gpu.stepping import wait_for

LAYERS, M = [784, 512, 10], 128
DRAW = (0, 1)  # seed and step of the dropout mask
RULE = bp.Adam(1e-6)
HELPERS = {"counting", "scratch", "xp"}  # what numpy_ops offers that is no operation
IN_PLACE = {"regularize", "step_rows", "subtract_targets", "update"}


class Call(NamedTuple):
    """An operation's arguments, and the array that it writes."""

    arguments: tuple[Any, ...]
    result: Any = None


@pytest.fixture(params=["numpy", "cupy"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn; skipped where it cannot be used."""
    try:
        return choose(request.param)
    except bp.BackendError as e:
        pytest.skip(e.cause)


def calls(be: Backend) -> dict[str, Call]:
    """Every operation in the middle of training a network with dropout on random data."""
    net, xp, rng = bp.Network(LAYERS, seed=0, backend=be.name, dropout=0.5), be.xp, np.random.default_rng(0)
    X = be.asarray(rng.integers(0, 256, (60_000, LAYERS[0])).astype(np.uint8))
    T = be.asarray(rng.integers(0, LAYERS[-1], M))
    rows, w = be.asarray(rng.permutation(len(X))[:M]), be.asarray(rng.random(M).astype(np.float32))
    cost, batch = COSTS["cross_entropy"], Batch(net, M, gradient=True, draw=DRAW)
    flat = be.zeros(net.theta.size, net.dtype)
    gradient, slots = Views(flat, net.layers, net.biased), tuple(xp.zeros_like(net.theta) for _ in range(RULE.slots))
    part, measured, diverged = xp.empty_like(w), xp.zeros(2), xp.zeros(1, xp.int64)
    W, b, f, Z, A, F, mask, Delta = net.W, net.b, net.f, batch.Z, batch.A, batch.F, batch.mask, batch.Delta
    be.ops.gather(X, rows, A[0])
    forward(be.ops, net, batch)
    backward(be.ops, net, batch, T, 1 / M, cost, gradient)
    Y, row = xp.empty_like(Z[2]), be.ops.step_rows(RULE, [RULE.lr], 1)[0]
    return {
        "gather": Call((X, rows, A[0]), A[0]),
        "affine": Call((W[2], A[1], b[2], Z[2]), Z[2]),
        "affine_activate": Call((W[1], A[0], b[1], f[1], Z[1], F[1]), F[1]),
        "drop": Call((F[1], 0.5, DRAW, 1, mask[1], A[1]), A[1]),
        "output": Call((net.g, Z[2], Y), Y),
        "output_delta": Call((cost, net.g, Z[2], T, 1 / M, Delta[2], batch.C, gradient.b[2]), Delta[2]),
        "weight_gradient": Call((Delta[1], A[0], gradient.W[1]), gradient.W[1]),
        "hidden_delta": Call((W[2], Delta[2], f[1], Z[1], F[1], mask[1], Delta[1], gradient.b[1]), Delta[1]),
        "share": Call((w, part), part),
        "measure": Call(("labels", net.g, Z[2], T, batch.C, None, measured), measured),
        "regularize": Call((Regularization(l2=1e-6, clip_norm=1.0), net.theta, net.weight_mask(), flat), flat),
        "update": Call((RULE, net.theta, flat, slots, row, measured, diverged), net.theta),
        "step_rows": Call((RULE, [RULE.lr] * 469, 1)),
        "dot_targets": Call((T, Z[2], part), part),
        "subtract_targets": Call((Y, T), Y),
    }


OPERATIONS = sorted(set(numpy_ops.__all__) - HELPERS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name: str, backend: Backend, benchmark: Callable[..., Any]) -> None:
    """It runs, and what it writes are numbers."""
    with backend.active():
        call, operation = calls(backend)[name], getattr(backend.ops, name)
        if name not in IN_PLACE:
            call.result.fill(np.nan)

        def run() -> None:
            operation(*call.arguments)
            wait_for(backend)

        benchmark(run)
        if call.result is not None:
            assert np.isfinite(to_host(call.result)).all()
