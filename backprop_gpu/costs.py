"""Costs C_i(y_hat, t) of one sample, and Delta[L] = dC_i/dZ[L].

With output function g and Z = Z[L] of shape (m, K), `output_delta` writes the cost of each sample into C (m,) and
dC_i/dZ[L], per sample and not averaged, into Delta (m, K). T holds integer labels (m,), which stand for one-hot rows
that are never formed, or rows (m, K) in the dtype of Z.

For the canonical pairs, softmax with cross-entropy and sigmoid with binary cross-entropy, Delta[L] = A[L] - T
(source 5, "Quick recap"), and the cost is computed from Z so that nothing under- or overflows. Every other pair goes
through g'(Z) (source 3: delta^L = sigma'(z^L) ⊙ grad C; source 4, eq. 32), or, where that elementwise form does not
hold, through softmax's full Jacobian. A cost of one's own is made by `Cost.of`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from . import specs
from .activations import Activation, Array, check_own, expressions, fill, sigmoid
from .errors import ConfigError

REDUCTIONS = ("mean", "sum")


class Cost(NamedTuple):
    """One cost; `outputs` names the output functions it is legal with, None meaning any.

    `from_Z(ops, Z, T, Delta, C, s, smoothing)` writes C_i and dC_i/dZ of the canonical pair. A cost that is legal with
    any output has `from_Y(ops, Y, T, G, C, s)` instead, which writes C_i and G = dC_i/dY. `s` is scratch of the shape
    of Z. `smoothing` is the label smoothing of a training run: see `smoothed`. `parameter` is Huber's delta.
    `cuda`: the part of one output in C_i, and its derivative, of a cost of one's own as the CUDA kernels get them;
    kernels/costs.cuh has those of the table below.
    """

    name: str
    outputs: tuple[str, ...] | None
    from_Z: Callable[[Any, Array, Array, Array, Array, Array, float], None] | None = None
    from_Y: Callable[[Any, Array, Array, Array, Array, Array], None] | None = None
    smoothing: float = 0.0
    parameter: float = 0.0
    cuda: tuple[str, str] | None = None

    @classmethod
    def of(
        cls,
        name: str,
        value: Callable[[Any, Array, Array], Array],
        derivative: Callable[[Any, Array, Array], Array],
        cuda: tuple[str, str] | None = None,
    ) -> Cost:
        """A cost of one's own, legal with every output function, from plain array code.

        `value(xp, Y, T)` returns C_i of each sample, (m,); `derivative(xp, Y, T)` returns dC_i/dY, (m, K), not averaged
        over samples. Y = A[L] and T, labels as one-hot rows, are (m, K) in the network's dtype, of the array module xp
        (numpy or cupy). `name` is what model files and messages call it.

        `cuda`: where C_i is a sum over the outputs, the part of one output and its derivative by y as CUDA C++
        expressions of `y` and `t`, as in `Activation.of`.

        ConfigError for a name that is taken or no identifier, for a `cuda` that is not two texts, and, when it is used,
        for results of another shape and expressions that do not compile.
        """
        check_own("cost", name, COSTS, value, derivative)

        def from_Y(ops: Any, Y: Array, T: Array, G: Array, C: Array, s: Array) -> None:
            if T.ndim == 1:
                s[...] = 0
                ops.subtract_targets(s, T)
                T = ops.xp.subtract(0, s, out=s)
            fill(C, value(ops.xp, Y, T), f"the value of {name}", number=False)
            fill(G, derivative(ops.xp, Y, T), f"the derivative of {name}")

        return cls(name, None, from_Y=from_Y, cuda=expressions(cuda, "('log(cosh(y - t))', 'tanh(y - t)')"))

    def smoothed(self, smoothing: Any) -> Cost:
        """This cost on smoothed targets: (1 - e) t + e/K for cross-entropy (Szegedy et al., 2016), e/2 for binary.

        For e = 0 it is this cost itself. ConfigError for other costs, and for a smoothing that is not in 0..1.
        """
        e = specs.number(self.name, "label_smoothing", smoothing, high=1.0, high_open=False)
        if not e:
            return self
        if self.from_Z is None:
            raise ConfigError(
                f"label_smoothing does not go with cost {self.name!r}",
                "use cross_entropy or binary_cross_entropy, or smooth the targets themselves",
            )
        return self._replace(smoothing=e)


def output_delta(ops: Any, cost: Cost, g: Activation, Z: Array, T: Array, Delta: Array, C: Array) -> None:
    """C_i into C, dC_i/dZ[L] into Delta."""
    xp = ops.xp
    s = ops.scratch("cost 0", Z.shape, Z.dtype), ops.scratch("cost 1", Z.shape, Z.dtype)
    if cost.from_Z is not None:
        cost.from_Z(ops, Z, T, Delta, C, s[0], cost.smoothing)
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


def cross_entropy(ops: Any, Z: Array, T: Array, Delta: Array, C: Array, s: Array, smoothing: float) -> None:
    """C_i = -sum_k t_k ln y_k = ln sum_k exp(z_k) - sum_k t_k z_k, y = softmax(z); Delta = y - t   (source 5).

    The rows of T sum to 1. Smoothed by e, (1 - e) t + e/K stands for t.
    """
    xp = ops.xp
    r = s.reshape(-1, 1)[: len(Z)]  # one number a row
    Z.max(axis=1, keepdims=True, out=r)
    xp.subtract(Z, r, out=Delta)
    ops.dot_targets(T, Delta, C)
    if smoothing:
        rest = ops.scratch("smoothing", C.shape, C.dtype)
        Delta.sum(axis=1, out=rest)
        xp.multiply(rest, smoothing / Z.shape[1], out=rest)
        xp.multiply(C, 1 - smoothing, out=C)
        xp.add(C, rest, out=C)
    xp.exp(Delta, out=Delta)
    Delta.sum(axis=1, keepdims=True, out=r)
    xp.divide(Delta, r, out=Delta)
    _subtract_smoothed(ops, Delta, T, smoothing, Z.shape[1])
    xp.log(r, out=r)
    xp.subtract(r[:, 0], C, out=C)


def binary_cross_entropy(ops: Any, Z: Array, T: Array, Delta: Array, C: Array, s: Array, smoothing: float) -> None:
    """C_i = -sum_k (t_k ln y_k + (1 - t_k) ln(1 - y_k)), y = sigmoid(z); Delta = y - t   (source 5).

    Each term is (step(z_k) - t_k) z_k + ln(1 + exp(-|z_k|)), so that nothing large is subtracted from something large.
    Smoothed by e, (1 - e) t + e/2 stands for t.
    """
    xp = ops.xp
    xp.greater(Z, 0, out=s)
    _subtract_smoothed(ops, s, T, smoothing, 2)
    xp.multiply(s, Z, out=s)
    xp.absolute(Z, out=Delta)
    xp.negative(Delta, out=Delta)
    xp.exp(Delta, out=Delta)
    xp.log1p(Delta, out=Delta)
    xp.add(s, Delta, out=s)
    s.sum(axis=1, out=C)
    sigmoid(xp, Z, Delta, None)
    _subtract_smoothed(ops, Delta, T, smoothing, 2)


def _subtract_smoothed(ops: Any, M: Array, T: Array, smoothing: float, classes: int) -> None:
    ops.subtract_targets(M, T, 1 - smoothing)
    if smoothing:
        ops.xp.subtract(M, smoothing / classes, out=M)


def squared_error(ops: Any, Y: Array, T: Array, G: Array, C: Array, s: Array) -> None:
    """C_i = 1/2 ||y - t||^2, summed over the outputs; dC_i/dy = y - t   (source 5, linear regression; source 2)."""
    xp = ops.xp
    G[...] = Y
    ops.subtract_targets(G, T)
    xp.multiply(G, G, out=s)
    s.sum(axis=1, out=C)
    xp.multiply(C, 0.5, out=C)


def norm(ops: Any, Y: Array, T: Array, G: Array, C: Array, s: Array) -> None:
    """C_i = ||y - t||; dC_i/dy = (y - t) / ||y - t||, and 0 where y = t   (source 4, its Q; source 3, summed).

    Rows are divided by their largest entry first, so that no square leaves the range of the dtype.
    """
    xp = ops.xp
    G[...] = Y
    ops.subtract_targets(G, T)
    largest = ops.scratch("norm", (len(G), 1), G.dtype)
    xp.absolute(G, out=s)
    s.max(axis=1, keepdims=True, out=largest)
    xp.equal(largest, 0, out=s[:, :1])
    xp.add(largest, s[:, :1], out=largest)  # 1 where y = t
    xp.divide(G, largest, out=G)
    xp.multiply(G, G, out=s)
    s.sum(axis=1, out=C)
    xp.sqrt(C, out=C)
    xp.equal(C, 0, out=s[:, 0])
    xp.add(C, s[:, 0], out=s[:, 0])
    xp.divide(G, s[:, :1], out=G)
    xp.multiply(C, largest[:, 0], out=C)


def huber(delta: float, ops: Any, Y: Array, T: Array, G: Array, C: Array, s: Array) -> None:
    """C_i = sum_k c (|e| - c/2) with e = y_k - t_k and c = min(|e|, delta); dC_i/dy = e cut to -delta..delta.

    So e^2/2 up to delta, and delta (|e| - delta/2) from there on (Huber, 1964).
    """
    xp = ops.xp
    c = ops.scratch("huber", Y.shape, Y.dtype)
    G[...] = Y
    ops.subtract_targets(G, T)
    xp.absolute(G, out=s)
    xp.minimum(s, delta, out=c)
    xp.maximum(G, -delta, out=G)
    xp.minimum(G, delta, out=G)
    xp.multiply(s, c, out=s)
    xp.multiply(c, c, out=c)
    xp.multiply(c, 0.5, out=c)
    xp.subtract(s, c, out=s)
    s.sum(axis=1, out=C)


def mae(ops: Any, Y: Array, T: Array, G: Array, C: Array, s: Array) -> None:
    """C_i = sum_k |y_k - t_k|, the absolute error; dC_i/dy = sign(y - t), 0 at 0."""
    xp = ops.xp
    G[...] = Y
    ops.subtract_targets(G, T)
    xp.absolute(G, out=s)
    s.sum(axis=1, out=C)
    xp.sign(G, out=G)


def _huber(delta: float = 1.0) -> Cost:
    delta = specs.number("huber", "delta", delta, low_open=True)
    return Cost(
        "huber" if delta == 1 else f"huber:delta={delta!r}",
        None,
        from_Y=functools.partial(huber, delta),
        parameter=delta,
    )


# By name: what makes the cost; its arguments are the settings of "huber:delta=0.5".
MAKERS: dict[str, Callable[..., Cost]] = {
    "cross_entropy": lambda: Cost("cross_entropy", ("softmax",), from_Z=cross_entropy),
    "binary_cross_entropy": lambda: Cost("binary_cross_entropy", ("sigmoid",), from_Z=binary_cross_entropy),
    "squared_error": lambda: Cost("squared_error", None, from_Y=squared_error),
    "norm": lambda: Cost("norm", None, from_Y=norm),
    "huber": _huber,
    "mae": lambda: Cost("mae", None, from_Y=mae),
}
COSTS: dict[str, Cost] = {name: make() for name, make in MAKERS.items()}
_CANONICAL = {"softmax": "cross_entropy", "sigmoid": "binary_cross_entropy"}


def choose_cost(cost: Cost | str | None, output: str) -> Cost:
    """A cost as it is, or by name ("huber:delta=0.5"), for an output function; None is the canonical one.

    An illegal pair is a ConfigError.
    """
    if cost is None:
        cost = _CANONICAL.get(output, "squared_error")
    if not isinstance(cost, Cost):
        cost = specs.build("cost", cost, MAKERS)
    if cost.outputs is not None and output not in cost.outputs:
        legal = [c.name for c in COSTS.values() if c.outputs is None or output in c.outputs]
        raise ConfigError(
            f"cost {cost.name!r} does not go with output {output!r}",
            f"use output {' or '.join(map(repr, cost.outputs))}, or one of the costs {', '.join(legal)}",
        )
    return cost
