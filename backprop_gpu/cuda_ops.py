"""The engine's instruction set on CuPy: `numpy_ops`, name for name and argument for argument, on device arrays.

Plain CuPy lines, each one or a few launches; they stand until a CUDA kernel of `kernels/` takes the place of each.
Nothing here waits for the device or copies to or from the host.
"""

from __future__ import annotations

import sys
from typing import Any

import cupy as cp
import cupy as xp  # the array module, under the name that code for both backends uses
import numpy as np

from . import costs, dropout
from .activations import Activation, Array
from .costs import Cost
from .optimizers import Optimizer, Slots

__all__ = [
    "affine", "affine_activate", "counting", "dot_targets", "drop", "gather", "gradients", "hidden_delta", "measure",
    "output", "output_delta", "scratch", "share", "subtract_targets", "update", "xp",
]  # fmt: skip


def scratch(name: str, shape: tuple[int, ...], dtype: Any) -> Array:
    """An uninitialised array from CuPy's memory pool."""
    return cp.empty(shape, dtype)


def _like(M: Array, n: int) -> tuple[Array, ...]:
    return tuple(cp.empty_like(M) for _ in range(n))


def counting(n: int) -> Array:
    """0, 1, ..., n - 1."""
    return cp.arange(n)


def gather(data: Array, rows: Array | slice, out: Array) -> None:
    """out = data[rows], or data[rows] / 255 where data is uint8 and out is not. `rows`: valid indices, or a slice."""
    out[...] = data[rows]
    if data.dtype != out.dtype:
        cp.divide(out, 255, out=out)


def affine(W: Array, A_below: Array, b: Array | None, Z: Array) -> None:
    """Z = W A_below + b."""
    cp.matmul(A_below, W.T, out=Z)
    if b is not None:
        cp.add(Z, b, out=Z)


def affine_activate(W: Array, A_below: Array, b: Array | None, f: Activation, Z: Array, A: Array) -> None:
    """Z = W A_below + b, A = f(Z). Z and A may be one array; then only A is left in it."""
    affine(W, A_below, b, Z)
    f.value(cp, Z, A, _like(Z, 2))


def drop(F: Array, rate: float, draw: tuple[int, int], layer: int, mask: Array, A: Array) -> None:
    """mask = 1 / (1 - rate) or 0, drawn by (seed, step) and layer (see `dropout`); A = mask ⊙ F."""
    dropout.fill_mask(sys.modules[__name__], rate, draw, layer, mask)
    cp.multiply(F, mask, out=A)


def output(g: Activation, Z: Array, A: Array) -> None:
    """A = g(Z), for output functions, softmax over rows among them."""
    g.value(cp, Z, A, _like(Z, 2))


def share(w: Array, out: Array) -> None:
    """out = w_i / sum w, the part of each sample in the mean cost; all 0 where w is."""
    cp.divide(w, cp.maximum(w.sum(), float(np.finfo(w.dtype).tiny)), out=out)


def output_delta(cost: Cost, g: Activation, Z: Array, T: Array, w: float | Array, Delta: Array, C: Array) -> None:
    """C = C_i of each sample, (m,); Delta = w_i dC_i/dZ[L], w (m,) or one number. T: labels (m,) or rows (m, K)."""
    costs.output_delta(sys.modules[__name__], cost, g, Z, T, Delta, C)
    cp.multiply(Delta, w if isinstance(w, float) else w.reshape(-1, 1), out=Delta)


def hidden_delta(W: Array, Delta: Array, f: Activation, Z: Array, A: Array, mask: Array | None, out: Array) -> None:
    """out = f'(Z) ⊙ (W^T Delta), where W and Delta are the layer above's; f' is taken from A or Z as f says.

    With dropout A = f(Z) is what was there before it, and out = mask ⊙ f'(Z) ⊙ (W^T Delta).
    """
    cp.matmul(Delta, W, out=out)
    if mask is not None:
        cp.multiply(out, mask, out=out)
    if f.derivative is not None:
        D, *s = _like(out, 3)
        f.derivative(cp, Z if f.derivative_from == "Z" else A, D, s)
        cp.multiply(out, D, out=out)


def gradients(Delta: Array, A_below: Array, dW: Array, db: Array | None) -> None:
    """dW = Delta A_below^T, db = Delta 1. The 1/m stands in Delta already."""
    cp.matmul(Delta.T, A_below, out=dW)
    if db is not None:
        Delta.sum(axis=0, out=db)


def measure(task: str, g: Activation, Z: Array, T: Array, C: Array, w: Array | None, out: Array) -> None:
    """out = [sum of w_i C_i (w None: of C_i), number of samples predicted right], two float64.

    See `Network.task` for what is right.
    """
    out[0] = (C if w is None else w.astype(cp.float64) * C).sum(dtype=cp.float64)
    if task == "labels":
        scores = Z
        if not g.increasing:
            scores = cp.empty_like(Z)
            output(g, Z, scores)
        wanted = T if T.ndim == 1 else T.argmax(axis=1)
        out[1] = (scores.argmax(axis=1) == wanted).sum()
    elif task in ("binary", "multilabel"):
        out[1] = ((Z > 0) == (T > 0.5)).all(axis=1).sum()


def update(
    rule: Optimizer, theta: Array, gradient: Array, slots: Slots, lr: float, t: int, measured: Array, diverged: Array
) -> bool:
    """Apply `rule` to the flat vectors as step t (from 1), unless the run has left the finite numbers.

    As in `numpy_ops.update`, but decided on the device, so that nobody waits: always returns True.
    """
    norm2 = cp.dot(gradient, gradient)
    finite = cp.isfinite(measured[0]) & cp.isfinite(norm2)
    old = theta, *slots
    new = tuple(v.copy() for v in old)
    rule.apply(cp, new[0], gradient, new[1:], rule.coefficients(lr, t), _like(theta, 2))
    for v in new:
        finite = finite & cp.isfinite(v).all()
    diverged[0] = cp.where((diverged[0] == 0) & ~finite, t, diverged[0])
    live = diverged[0] == 0
    for kept, v in zip(old, new, strict=True):
        kept[...] = cp.where(live, v, kept)
    return True


def dot_targets(T: Array, M: Array, out: Array) -> None:
    """out_i = sum_k t_k M_ik; labels T pick one entry a row."""
    if T.ndim == 1:
        out[...] = M[counting(len(T)), T]
    else:
        (T * M).sum(axis=1, out=out)


def subtract_targets(M: Array, T: Array, scale: float = 1.0) -> None:
    """M = M - scale T, in place; labels T stand for one-hot rows."""
    if T.ndim == 1:
        M[counting(len(T)), T] -= scale
    elif scale == 1:
        cp.subtract(M, T, out=M)
    else:
        cp.subtract(M, T * scale, out=M)
