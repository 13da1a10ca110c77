"""Costs C_i(y_hat, t) of one sample, and Delta[L] = dC_i/dZ[L].

With output function g and Z = Z[L] of shape (m, K), `output_delta` writes the cost of each sample into C (m,) and
dC_i/dZ[L], per sample and not averaged, into Delta (m, K). T holds integer labels (m,), which stand for one-hot rows
that are never formed, or rows (m, K) in the dtype of Z.

For the canonical pairs, softmax with cross-entropy and sigmoid with binary cross-entropy, Delta[L] = A[L] - T
(source 5, "Quick recap"), and the cost is computed from Z so that nothing under- or overflows. Every other pair goes
through g'(Z) (source 3: delta^L = sigma'(z^L) ⊙ grad C; source 4, eq. 32), or, where that elementwise form does not
hold, through softmax's full Jacobian.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .activations import Activation, Array, sigmoid
from .errors import ConfigError, lookup


class Cost(NamedTuple):
    """One cost; `outputs` names the output functions it is legal with, None meaning any.

    `from_Z(ops, Z, T, Delta, C, s)` writes C_i and dC_i/dZ of the canonical pair. A cost that is legal with any output
    has `from_Y(ops, Y, T, G, C, s)` instead, which writes C_i and G = dC_i/dY. `s` is scratch of the shape of Z.
    """

    name: str
    outputs: tuple[str, ...] | None
    from_Z: Callable[[Any, Array, Array, Array, Array, Array], None] | None = None
    from_Y: Callable[[Any, Array, Array, Array, Array, Array], None] | None = None


def output_delta(ops: Any, cost: Cost, g: Activation, Z: Array, T: Array, Delta: Array, C: Array) -> None:
    """C_i into C, dC_i/dZ[L] into Delta."""
    xp = ops.xp
    s = ops.scratch("cost 0", Z.shape, Z.dtype), ops.scratch("cost 1", Z.shape, Z.dtype)
    if cost.from_Z is not None:
        cost.from_Z(ops, Z, T, Delta, C, s[0])
    elif cost.from_Y is not None:
        Y, D = ops.scratch("cost 2", Z.shape, Z.dtype), ops.scratch("cost 3", Z.shape, Z.dtype)
        g.value(xp, Z, Y, s)
        cost.from_Y(ops, Y, T, Delta, C, s[0])
        if not g.elementwise:  # softmax: dC/dz_j = y_j (dC/dy_j - sum_k y_k dC/dy_k)
            r = s[1][:, :1]
            xp.multiply(Delta, Y, out=s[0])
            s[0].sum(axis=1, keepdims=True, out=r)
            xp.subtract(Delta, r, out=Delta)
            xp.multiply(Delta, Y, out=Delta)
        elif g.derivative is not None:
            g.derivative(xp, Z if g.derivative_from == "Z" else Y, D, s)
            xp.multiply(Delta, D, out=Delta)


def cross_entropy(ops: Any, Z: Array, T: Array, Delta: Array, C: Array, s: Array) -> None:
    """C_i = -sum_k t_k ln y_k = ln sum_k exp(z_k) - sum_k t_k z_k, y = softmax(z); Delta = y - t   (source 5).

    The rows of T sum to 1.
    """
    xp = ops.xp
    r = s.reshape(-1, 1)[: len(Z)]  # one number a row
    Z.max(axis=1, keepdims=True, out=r)
    xp.subtract(Z, r, out=Delta)
    ops.dot_targets(T, Delta, C)
    xp.exp(Delta, out=Delta)
    Delta.sum(axis=1, keepdims=True, out=r)
    xp.divide(Delta, r, out=Delta)
    ops.subtract_targets(Delta, T)
    xp.log(r, out=r)
    xp.subtract(r[:, 0], C, out=C)


def binary_cross_entropy(ops: Any, Z: Array, T: Array, Delta: Array, C: Array, s: Array) -> None:
    """C_i = -sum_k (t_k ln y_k + (1 - t_k) ln(1 - y_k)), y = sigmoid(z); Delta = y - t   (source 5).

    Each term is (step(z_k) - t_k) z_k + ln(1 + exp(-|z_k|)), so that nothing large is subtracted from something large.
    """
    xp = ops.xp
    xp.greater(Z, 0, out=s)
    ops.subtract_targets(s, T)
    xp.multiply(s, Z, out=s)
    xp.absolute(Z, out=Delta)
    xp.negative(Delta, out=Delta)
    xp.exp(Delta, out=Delta)
    xp.log1p(Delta, out=Delta)
    xp.add(s, Delta, out=s)
    s.sum(axis=1, out=C)
    sigmoid(xp, Z, Delta, None)
    ops.subtract_targets(Delta, T)


def squared_error(ops: Any, Y: Array, T: Array, G: Array, C: Array, s: Array) -> None:
    """C_i = 1/2 ||y - t||^2, summed over the outputs; dC_i/dy = y - t   (source 5, linear regression; source 2)."""
    xp = ops.xp
    G[...] = Y
    ops.subtract_targets(G, T)
    xp.multiply(G, G, out=s)
    s.sum(axis=1, out=C)
    xp.multiply(C, 0.5, out=C)


COSTS: dict[str, Cost] = {
    c.name: c
    for c in (
        Cost("cross_entropy", ("softmax",), from_Z=cross_entropy),
        Cost("binary_cross_entropy", ("sigmoid",), from_Z=binary_cross_entropy),
        Cost("squared_error", None, from_Y=squared_error),
    )
}
_CANONICAL = {"softmax": "cross_entropy", "sigmoid": "binary_cross_entropy"}


def choose_cost(name: str | None, output: str) -> Cost:
    """The cost `name` for an output function; None is the canonical one. An illegal pair is a ConfigError."""
    cost = lookup("cost", _CANONICAL.get(output, "squared_error") if name is None else name, COSTS)
    if cost.outputs is not None and output not in cost.outputs:
        legal = [c.name for c in COSTS.values() if c.outputs is None or output in c.outputs]
        raise ConfigError(
            f"cost {cost.name!r} does not go with output {output!r}",
            f"use output {' or '.join(map(repr, cost.outputs))}, or one of the costs {', '.join(legal)}",
        )
    return cost
