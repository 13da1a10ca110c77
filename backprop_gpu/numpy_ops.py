"""The engine's instruction set on NumPy: the reference for `cuda_ops`, with the same names and signatures.

Shapes: batch arrays are C-contiguous (m, N_l), a sample a row; W is (N_l, N_(l-1)), b is (N_l,). Every operation writes
into arrays it is given. Scratch memory is kept from step to step, one set a thread, so that after the first step
nothing is allocated; elementwise work goes block by block, so that a block is still in the cache for its next pass.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy as xp  # the array module, under the name that code for both backends uses

from . import blas, costs, dropout
from .activations import Activation, Array
from .blas import matmul
from .costs import Cost
from .optimizers import Optimizer, Slots
from .recording import Tape, noted
from .regularization import Regularization

__all__ = [
    "affine", "affine_activate", "counting", "dot_targets", "drop", "gather", "hidden_delta", "measure", "output",
    "output_delta", "regularize", "scratch", "share", "step_rows", "subtract_targets", "update", "weight_gradient",
    "xp",
]  # fmt: skip

# Elements a block: of 2^13..2^18 and unblocked, best or near it for Adam on 0.4 M and 5.8 M float32 parameters (Zen 3).
BLOCK = 1 << 17
HUGE_STEP = 1e12

Rule = Callable[[tuple[float, ...]], Any]  # applies a rule with the coefficients of a step

_thread = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: Any) -> Array:
    """An uninitialised array that the next call with the same name and dtype, in this thread, hands out again."""
    a = _kept(name, math.prod(shape), np.dtype(dtype), np.empty).reshape(shape)
    tape: Tape | None = getattr(_thread, "tape", None)
    return tape.watched(a) if tape else a


@contextlib.contextmanager
def recording(tape: Tape) -> Iterator[None]:
    """Within it scratch memory, too, is watched by this tape (in this thread)."""
    _thread.tape = tape
    try:
        yield
    finally:
        del _thread.tape


def _kept(name: str, size: int, dtype: np.dtype[Any], make: Callable[..., Array]) -> Array:
    """The first `size` elements of this thread's vector of that name and dtype, made anew where it is too short."""
    kept: dict[Any, Any] = _thread.__dict__
    key = name, dtype
    if key not in kept or kept[key].size < size:
        kept[key] = make(size, dtype=dtype)
    return kept[key][:size]


def counting(n: int) -> Array:
    """0, 1, ..., n - 1."""
    return _kept("counting", n, np.dtype(np.intp), np.arange)


def gather(data: Array, rows: Array | slice, out: Array) -> None:
    """out = data[rows], or data[rows] / 255 where data is uint8 and out is not. `rows`: valid indices, or a slice."""
    if data.dtype == out.dtype:
        picked = out
    else:
        picked = scratch("gather", out.shape, data.dtype)
    if isinstance(rows, slice):
        picked[...] = data[rows]
    else:
        np.take(data, rows, axis=0, out=picked, mode="clip")  # any other mode copies the whole output once more
    if picked is not out:
        np.copyto(out, picked)
        np.divide(out, 255, out=out)


def affine(W: Array, A_below: Array, b: Array | None, Z: Array) -> None:
    """Z = W A_below + b."""
    matmul(A_below, W.T, out=Z)
    if b is not None:
        np.add(Z, b, out=Z)


def affine_activate(W: Array, A_below: Array, b: Array | None, f: Activation, Z: Array, A: Array) -> None:
    """Z = W A_below + b, A = f(Z). Z and A may be one array; then only A is left in it."""
    matmul(A_below, W.T, out=Z)
    activate(b, f, Z, A)


def activate(b: Array | None, f: Activation, Z: Array, A: Array) -> None:
    """Z = Z + b, A = f(Z), as in `affine_activate`."""
    for rows, s in _row_blocks(Z):
        z = Z[rows]
        if b is not None:
            np.add(z, b, out=z)
        f.value(np, z, z if A is Z else A[rows], s)


def drop(F: Array, rate: float, draw: tuple[int, int], layer: int, mask: Array, A: Array) -> None:
    """mask = 1 / (1 - rate) or 0, drawn by (seed, step) and layer (see `dropout`); A = mask ⊙ F."""
    dropout.fill_mask(sys.modules[__name__], rate, draw, layer, mask)
    np.multiply(F, mask, out=A)


def output(g: Activation, Z: Array, A: Array) -> None:
    """A = g(Z), for output functions, softmax over rows among them."""
    for rows, s in _row_blocks(Z):
        g.value(np, Z[rows], A[rows], s)


def share(w: Array, out: Array) -> None:
    """out = w_i / sum w, the part of each sample in the mean cost; all 0 where w is."""
    whole = scratch("whole", (1,), w.dtype)
    np.add.reduce(w, keepdims=True, out=whole)
    np.maximum(whole, np.finfo(w.dtype).tiny, out=whole)
    np.divide(w, whole, out=out)


def output_delta(
    cost: Cost, g: Activation, Z: Array, T: Array, w: float | Array, Delta: Array, C: Array, db: Array | None = None
) -> None:
    """C = C_i of each sample, (m,); Delta = w_i dC_i/dZ[L], w (m,) or one number; db = Delta 1 where there is a db.

    T: labels (m,) or rows (m, K).
    """
    costs.output_delta(sys.modules[__name__], cost, g, Z, T, Delta, C)
    np.multiply(Delta, w if isinstance(w, float) else w.reshape(-1, 1), out=Delta)
    _sum_columns(Delta, db)


def _sum_columns(Delta: Array, db: Array | None) -> None:
    """db = Delta 1."""
    if db is not None:
        np.matmul(_kept("ones", len(Delta), Delta.dtype, np.ones), Delta, out=db)


def hidden_delta(
    W: Array, Delta: Array, f: Activation, Z: Array, A: Array, mask: Array | None, out: Array, db: Array | None = None
) -> None:
    """out = f'(Z) ⊙ (W^T Delta), where W and Delta are the layer above's; db = out 1 where there is a db.

    f' is taken from A or Z as f says. With dropout A = f(Z) is what was there before it, and out = mask ⊙ f'(Z) ⊙
    (W^T Delta).
    """
    matmul(Delta, W, out=out)
    differentiate(f, Z, A, mask, out, db)


def differentiate(f: Activation, Z: Array, A: Array, mask: Array | None, out: Array, db: Array | None) -> None:
    """out = mask ⊙ f'(Z) ⊙ out, db = out 1, as in `hidden_delta`."""
    if mask is not None:
        np.multiply(out, mask, out=out)
    if f.derivative is not None:
        K = Z if f.derivative_from == "Z" else A
        for rows, (D, *s) in _row_blocks(out):
            f.derivative(np, K[rows], D, s)
            np.multiply(out[rows], D, out=out[rows])
    _sum_columns(out, db)


def weight_gradient(Delta: Array, A_below: Array, dW: Array) -> None:
    """dW = Delta A_below^T. The 1/m stands in Delta already."""
    matmul(Delta.T, A_below, out=dW)


def measure(task: str, g: Activation, Z: Array, T: Array, C: Array, w: Array | None, out: Array) -> None:
    """out = [sum of w_i C_i (w None: of C_i), number of samples predicted right], two float64.

    See `Network.task` for what is right.
    """
    if w is not None:
        C = np.multiply(w, C, out=scratch("weighted", C.shape, np.float64), dtype=np.float64)
    np.add.reduce(C, dtype=np.float64, keepdims=True, out=out[:1])
    if task == "regression":
        return
    right = scratch("right", C.shape, np.bool_)
    if task == "labels":
        scores = Z
        if not g.increasing:
            scores = scratch("outputs", Z.shape, Z.dtype)
            output(g, Z, scores)
        label = np.argmax(scores, axis=1, out=scratch("label", C.shape, np.intp))
        wanted = T if T.ndim == 1 else np.argmax(T, axis=1, out=scratch("wanted label", C.shape, np.intp))
        np.equal(label, wanted, out=right)
    else:
        is_one = np.greater(Z, 0, out=scratch("is one", Z.shape, np.bool_))
        wanted = np.greater(T, 0.5, out=scratch("wanted one", Z.shape, np.bool_))
        np.logical_and.reduce(np.equal(is_one, wanted, out=is_one), axis=1, out=right)
    np.add.reduce(right, dtype=np.float64, keepdims=True, out=out[1:])


def regularize(regularization: Regularization, theta: Array, is_weight: Array, g: Array) -> None:
    """Add the penalties' derivative to the flat gradient g, then clip it, in place: see `Regularization`."""
    regularization.apply(sys.modules[__name__], theta, is_weight, g)


class _Step(NamedTuple):
    t: int
    lr: float
    coefficients: tuple[float, ...]


class _Steps:
    """Item i is what `update` needs of the i-th of some steps, made when it is asked for."""

    def __init__(self, rule: Optimizer, lrs: Sequence[float], t: int) -> None:
        self.rule, self.lrs, self.t = rule, lrs, t

    def __getitem__(self, i: int) -> _Step:
        t, lr = self.t + i, self.lrs[i]
        return _Step(t, lr, self.rule.coefficients(lr, t))


def step_rows(rule: Optimizer, lrs: Sequence[float], t: int) -> Any:
    """What `update` needs of the steps t, t + 1, ... (from 1) at these learning rates."""
    return _Steps(rule, lrs, t)


def update(
    rule: Optimizer, theta: Array, gradient: Array, slots: Slots, row: Any, measured: Array, diverged: Array,
    apply: Rule | None = None,
) -> bool:  # fmt: skip
    """Apply `rule` to the flat vectors, as the step that `row` of `step_rows` says, unless the run has diverged.

    The first step whose cost (measured[0]), squared gradient norm or outcome is not finite is latched in diverged[0];
    that step and all after it leave theta and slots as they are. Returns False where it is known that nothing was
    applied. `apply`: what `prepared` gave for these vectors, else it is prepared here.
    """
    norm2 = float(np.dot(gradient, gradient))
    apply = apply or prepared(rule, theta, gradient, slots)
    return guarded(rule, theta, norm2, slots, row, measured, diverged, apply)


def guarded(
    rule: Optimizer, theta: Array, norm2: float, slots: Slots, row: Any, measured: Array, diverged: Array, apply: Rule
) -> bool:
    """`update` with a squared gradient norm."""
    t, lr, c = row
    if diverged[0] == 0 and not (math.isfinite(measured[0]) and math.isfinite(norm2)):
        diverged[0] = t
    if diverged[0]:
        return False
    # A step is about lr, or lr times the gradient, and slots hold squares of gradients: only huge ones leave the finite
    # numbers, or a decay that grows.
    reach = 1 + math.sqrt(norm2)
    if rule.weight_decay:
        reach += rule.weight_decay * math.sqrt(float(np.dot(theta, theta)))
    risky = max(lr, 1.0) * reach > HUGE_STEP or lr * rule.weight_decay >= 1
    before = [v.copy() for v in (theta, *slots)] if risky else []
    apply(c)
    if risky and not all(np.isfinite(v).all() for v in (theta, *slots)):
        diverged[0] = t
        for v, old in zip((theta, *slots), before, strict=True):
            v[...] = old
    return not diverged[0]


def prepared(rule: Optimizer, theta: Array, gradient: Array, slots: Slots, tape: Tape | None = None) -> Rule:
    """What applies `rule` with the coefficients that it is given; with an empty tape, by what is recorded on it."""
    scalars = np.zeros(len(rule.coefficients(rule.lr, 1)), theta.dtype)

    def apply(c: tuple[float, ...]) -> None:
        if tape is None:
            _apply(rule, theta, gradient, slots, c)
            return
        scalars[:] = c
        if tape.calls:
            tape.replay()
            return
        with recording(tape):
            watched, g, *rest = map(tape.watched, (theta, gradient, *slots))
            numbers: Any = tuple(scalars[j : j + 1].reshape(()) for j in range(len(c)))
            _apply(rule, watched, g, tuple(rest), numbers)

    return apply


def _apply(rule: Optimizer, theta: Array, gradient: Array, slots: Slots, c: tuple[float, ...]) -> None:
    """`rule`, block by block."""
    for i in range(0, theta.size, BLOCK):
        part = slice(i, min(i + BLOCK, theta.size))
        size = (part.stop - i,)
        s = scratch("block 0", size, theta.dtype), scratch("block 1", size, theta.dtype)
        rule.apply(_passes(), theta[part], gradient[part], tuple(v[part] for v in slots), c, s)


class _WithBlas:
    """NumPy, and sums of vectors by BLAS."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def axpby(self, a: float, x: Array, b: float, y: Array) -> None:
        noted(blas.axpby, a, x, b, y)

    def descend(self, y: Array, a: Any, x: Array) -> None:
        noted(blas.descend, y, a, x)


@functools.cache
def _passes() -> Any:
    """What a rule makes its passes with."""
    return _WithBlas() if blas.routines() else np


def dot_targets(T: Array, M: Array, out: Array) -> None:
    """out_i = sum_k t_k M_ik; labels T pick one entry a row."""
    if T.ndim == 1:
        np.take(M.reshape(-1), _flat(T, M), out=out, mode="clip")
    else:
        s = np.multiply(T, M, out=scratch("targets 0", M.shape, M.dtype))
        np.add.reduce(s, axis=1, out=out)


def subtract_targets(M: Array, T: Array, scale: float = 1.0) -> None:
    """M = M - scale T, in place; labels T stand for one-hot rows."""
    if T.ndim == 1:
        flat, at = M.reshape(-1), _flat(T, M)
        picked = np.take(flat, at, out=scratch("targets 1", T.shape, M.dtype), mode="clip")
        np.subtract(picked, scale, out=picked)
        np.put(flat, at, picked, mode="clip")
    elif scale == 1:
        np.subtract(M, T, out=M)
    else:
        np.subtract(M, np.multiply(T, scale, out=scratch("targets 0", M.shape, M.dtype)), out=M)


def _flat(labels: Array, M: Array) -> Array:
    """The flat index of each row's label in M (m, K)."""
    rows = counting(len(labels))
    at = np.multiply(rows, M.shape[1], out=scratch("flat", labels.shape, np.intp))
    return np.add(at, labels, out=at)


def _row_blocks(M: Array) -> Iterator[tuple[slice, tuple[Array, Array, Array]]]:
    """Cut the rows of M into blocks of about BLOCK elements, each with three scratch arrays of the block's shape."""
    m, n = M.shape
    step = max(1, BLOCK // n)
    for i in range(0, m, step):
        rows = slice(i, min(i + step, m))
        shape = rows.stop - i, n
        yield rows, tuple(scratch(name, shape, M.dtype) for name in ("rows 0", "rows 1", "rows 2"))
