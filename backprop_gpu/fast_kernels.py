"""What `fast_ops` runs: loops that numba compiles, over parts of arrays, in threads.

A kernel `name(parts, ...)` runs `_name` on parts of rows, columns or elements, a thread each; with one part it starts
no thread. Slices are taken before loops: LLVM makes vector code of them only so. What a call does without is an empty
array: a kernel would be compiled anew for None.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from numba import prange, types
from numba.extending import overload

from . import blas
from .activations import LEAKY_SLOPE

if numba.config.DISABLE_JIT:  # `_multiply` is nothing then
    raise ImportError("NUMBA_DISABLE_JIT is set")

_serial = functools.partial(numba.njit, cache=True, error_model="numpy", nogil=True)
_threaded = functools.partial(_serial, parallel=True)  # assign to no slice there: that starts threads, too

# ---------------------------------------------------------------------------------------------------------- products

ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112  # of CBLAS


def _external(name: str, real: Any) -> Any:
    """A product of OpenBLAS's, to be called from compiled code."""
    found = blas.routines()
    if found is None:
        raise ImportError("NumPy does not come with OpenBLAS here")
    address = ctypes.cast(getattr(found, name), ctypes.c_void_p).value
    symbol = f"backprop_gpu_{name}"
    llvmlite.binding.add_symbol(symbol, address)
    size, order, pointer = types.int64 if found.wide else types.int32, types.int32, types.voidptr
    operand = (pointer, size)
    return types.ExternalFunction(
        symbol, types.void(order, order, order, size, size, size, real, *operand, *operand, real, *operand)
    )


_PRODUCTS = {types.float32: _external("sgemm", types.float32), types.float64: _external("dgemm", types.float64)}


def _multiply(a_T: int, b_T: int, m: int, n: int, k: int, a: Any, lda: int, b: Any, ldb: int, c: Any, ldc: int) -> None:
    """c (m, n) = a b, either operand transposed where its flag says so; ld: from row to row in memory."""


@overload(_multiply)
def _multiply_of(a_T, b_T, m, n, k, a, lda, b, ldb, c, ldc):  # type: ignore[no-untyped-def]
    gemm, real = _PRODUCTS[c.dtype], np.float32 if c.dtype == types.float32 else np.float64

    def multiply(a_T, b_T, m, n, k, a, lda, b, ldb, c, ldc):  # type: ignore[no-untyped-def]
        gemm(ROW_MAJOR, a_T, b_T, m, n, k, real(1), a.ctypes, lda, b.ctypes, ldb, real(0), c.ctypes, ldc)

    return multiply


# ------------------------------------------------------------------------------------------------------- activations

# Functions that one loop makes; the others are NONE here, and made by NumPy.
NONE, RELU, LEAKY = 0, 1, 2
FROM_SIGMOID, FROM_TANH, FROM_ELU = 3, 4, 5  # derivatives, from A
VALUES = {"identity": NONE, "relu": RELU, "leaky_relu": LEAKY}
DERIVATIVES = {
    "identity": NONE, "relu": RELU, "leaky_relu": LEAKY, "sigmoid": FROM_SIGMOID, "tanh": FROM_TANH, "elu": FROM_ELU
}  # fmt: skip


@_serial()
def _activate(a: Any, f: int) -> None:
    """a = f(a), a vector."""
    zero, slope = a.dtype.type(0), a.dtype.type(LEAKY_SLOPE)
    if f == RELU:
        for j in range(a.size):
            a[j] = zero if a[j] <= zero else a[j]
    elif f == LEAKY:
        for j in range(a.size):
            a[j] = slope * a[j] if a[j] <= zero else a[j]


@_serial()
def _differentiate(d: Any, a: Any, f: int) -> None:
    """d = f' d, taken from a = f(z); two vectors."""
    zero, one, slope = a.dtype.type(0), a.dtype.type(1), a.dtype.type(LEAKY_SLOPE)
    if f == RELU:
        for j in range(d.size):
            d[j] *= one if a[j] > zero else zero
    elif f == LEAKY:
        for j in range(d.size):
            d[j] *= one if a[j] > zero else slope
    elif f == FROM_SIGMOID:
        for j in range(d.size):
            d[j] *= a[j] * (one - a[j])
    elif f == FROM_TANH:
        for j in range(d.size):
            d[j] *= one - a[j] * a[j]
    elif f == FROM_ELU:
        for j in range(d.size):
            d[j] *= one if a[j] > zero else a[j] + one


@_serial()
def _copy(a: Any, b: Any) -> None:
    """a = b, two vectors."""
    for j in range(a.size):
        a[j] = b[j]


@_serial()
def _add(a: Any, b: Any) -> None:
    """a = a + b, two vectors."""
    for j in range(a.size):
        a[j] += b[j]


# -------------------------------------------------------------------------------------------------------- operations


@_serial()
def _gather(lo: int, hi: int, data: Any, rows: Any, scale: float, out: Any) -> None:
    scale = out.dtype.type(scale)
    for i in range(lo, hi):
        to, of = out[i], data[rows[i]]
        for j in range(to.size):
            to[j] = of[j] / scale


@_threaded()
def gather(parts: int, data: Any, rows: Any, scale: float, out: Any) -> None:
    """out = data[rows] / scale."""
    m = len(out)
    if parts == 1:
        _gather(0, m, data, rows, scale, out)
    else:
        for p in prange(parts):
            _gather(m * p // parts, m * (p + 1) // parts, data, rows, scale, out)


@_serial()
def _affine(r0: int, r1: int, c0: int, c1: int, W: Any, A_below: Any, b: Any, f: int, Z: Any, A: Any) -> None:
    k, n = W.shape[1], Z.shape[1]
    _multiply(PLAIN, TRANSPOSED, r1 - r0, c1 - c0, k, A_below[r0:], k, W[c0:], k, Z[r0:, c0:], n)
    for i in range(r0, r1):
        z = Z[i, c0:c1]
        if b.size > 0:
            _add(z, b[c0:c1])
        if A.size > 0:
            a = A[i, c0:c1]
            a[:] = z
            _activate(a, f)
        else:
            _activate(z, f)


@_threaded()
def affine(parts: int, by_rows: bool, W: Any, A_below: Any, b: Any, f: int, Z: Any, A: Any) -> None:
    """Z = W A_below + b, A = f(Z); b may be empty, and A, where only A is wanted, in Z."""
    m, n = Z.shape
    if parts == 1:
        _affine(0, m, 0, n, W, A_below, b, f, Z, A)
    else:
        for p in prange(parts):
            if by_rows:
                _affine(m * p // parts, m * (p + 1) // parts, 0, n, W, A_below, b, f, Z, A)
            else:
                _affine(0, m, n * p // parts, n * (p + 1) // parts, W, A_below, b, f, Z, A)


@_serial()
def _hidden_delta(
    r0: int, r1: int, c0: int, c1: int, W: Any, Delta: Any, A: Any, f: int, mask: Any, out: Any, sums: Any
) -> None:
    k, n = W.shape
    _multiply(PLAIN, PLAIN, r1 - r0, c1 - c0, k, Delta[r0:], k, W[:, c0:], n, out[r0:, c0:], n)
    total = sums[c0:c1]
    total[:] = 0
    for i in range(r0, r1):
        d = out[i, c0:c1]
        if mask.size > 0:
            of_mask = mask[i, c0:c1]
            for j in range(d.size):
                d[j] *= of_mask[j]
        _differentiate(d, A[i, c0:c1], f)
        _add(total, d)


@_threaded()
def hidden_delta(
    parts: int, by_rows: bool, W: Any, Delta: Any, A: Any, f: int, mask: Any, out: Any, sums: Any, db: Any
) -> None:
    """out = mask f'(Z) (W^T Delta), db = out 1; mask and db may be empty. `sums`: (parts, N_l), to work with."""
    m, n = out.shape
    if parts == 1:
        _hidden_delta(0, m, 0, n, W, Delta, A, f, mask, out, sums[0])
    else:
        for p in prange(parts):
            if by_rows:
                _hidden_delta(m * p // parts, m * (p + 1) // parts, 0, n, W, Delta, A, f, mask, out, sums[p])
            else:
                _hidden_delta(0, m, n * p // parts, n * (p + 1) // parts, W, Delta, A, f, mask, out, sums[0])
    if db.size > 0:
        _copy(db, sums[0])
        if by_rows:
            for p in range(1, parts):
                _add(db, sums[p])


@_serial()
def _weight_gradient(r0: int, r1: int, c0: int, c1: int, Delta: Any, A_below: Any, dW: Any) -> None:
    m, n, k = len(Delta), Delta.shape[1], dW.shape[1]
    _multiply(TRANSPOSED, PLAIN, r1 - r0, c1 - c0, m, Delta[:, r0:], n, A_below[:, c0:], k, dW[r0:, c0:], k)


@_threaded()
def weight_gradient(parts: int, by_rows: bool, Delta: Any, A_below: Any, dW: Any) -> None:
    """dW = Delta A_below^T."""
    n, k = dW.shape
    if parts == 1:
        _weight_gradient(0, n, 0, k, Delta, A_below, dW)
    else:
        for p in prange(parts):
            if by_rows:
                _weight_gradient(n * p // parts, n * (p + 1) // parts, 0, k, Delta, A_below, dW)
            else:
                _weight_gradient(0, n, k * p // parts, k * (p + 1) // parts, Delta, A_below, dW)


@_serial()
def _cross_entropy(lo: int, hi: int, Z: Any, T: Any, part: float, w: Any, Delta: Any, C: Any, sums: Any) -> None:
    K, zero = Z.shape[1], Z.dtype.type(0)
    sums[:] = 0
    for i in range(lo, hi):
        z, d = Z[i], Delta[i]
        largest, total = z[0], zero
        for k in range(1, K):
            largest = largest if largest >= z[k] or largest != largest else z[k]
        for k in range(K):
            d[k] = math.exp(z[k] - largest)
            total += d[k]
        C[i] = math.log(total) - (z[T[i]] - largest)
        of_sample = w[i] if w.size > 0 else Z.dtype.type(part)
        for k in range(K):
            d[k] = d[k] / total * of_sample
        d[T[i]] -= of_sample
        _add(sums, d)


@_threaded()
def cross_entropy(parts: int, Z: Any, T: Any, part: float, w: Any, Delta: Any, C: Any, sums: Any, db: Any) -> None:
    """C; Delta = w (softmax(Z) - T), T labels; db = Delta 1. w empty: `part` instead. `sums`: (parts, K)."""
    m = len(Z)
    if parts == 1:
        _cross_entropy(0, m, Z, T, part, w, Delta, C, sums[0])
    else:
        for p in prange(parts):
            _cross_entropy(m * p // parts, m * (p + 1) // parts, Z, T, part, w, Delta, C, sums[p])
    if db.size > 0:
        _copy(db, sums[0])
        for p in range(1, parts):
            _add(db, sums[p])


@_serial()
def count_labels(Z: Any, T: Any, C: Any, w: Any, out: Any) -> None:
    """out = [sum of w C (w empty: of C), number of rows of Z whose largest entry is the label's]."""
    cost, right = 0.0, 0
    for i in range(len(Z)):
        z, label = Z[i], 0
        for k in range(1, z.size):
            if z[k] > z[label] or (z[k] != z[k] and z[label] == z[label]):
                label = k
        right += label == T[i]
        cost += np.float64(C[i]) * (np.float64(w[i]) if w.size > 0 else 1.0)
    out[0], out[1] = cost, right


# ------------------------------------------------------------------------------------------------------------- rules

CHUNK = 1024  # squares that are added in the dtype of theta


@_serial(fastmath={"reassoc"})
def _squares(lo: int, hi: int, g: Any) -> float:
    total = 0.0
    for start in range(lo, hi, CHUNK):
        part, of_part = g[start : min(start + CHUNK, hi)], g.dtype.type(0)
        for i in range(part.size):
            of_part += part[i] * part[i]
        total += of_part
    return total


@_threaded()
def squares(parts: int, g: Any, sums: Any) -> None:
    """sums[0] = ||g||^2; `sums`: (parts,), float64."""
    n = g.size
    if parts == 1:
        sums[0] = _squares(0, n, g)
    else:
        for p in prange(parts):
            sums[p] = _squares(n * p // parts, n * (p + 1) // parts, g)
        for p in range(1, parts):
            sums[0] += sums[p]


SGD, MOMENTUM, NESTEROV, ADAGRAD, RMSPROP, ADADELTA, ADAM, AMSGRAD, NADAM, LION = range(10)


@_serial()
def _update(lo: int, hi: int, rule: int, theta: Any, g: Any, s0: Any, s1: Any, s2: Any, h: Any) -> None:
    """See `optimizers` for the formulas, `fast_ops` for h."""
    theta, g, s0, s1, s2 = theta[lo:hi], g[lo:hi], s0[lo:hi], s1[lo:hi], s2[lo:hi]
    zero, one = theta.dtype.type(0), theta.dtype.type(1)
    decay = h[0]  # coupled: g + decay theta is the gradient
    if rule == SGD:
        lr = h[1]
        for i in range(theta.size):
            theta[i] -= lr * (g[i] + decay * theta[i])
    elif rule == MOMENTUM:
        lr, momentum = h[1], h[2]
        for i in range(theta.size):
            v = momentum * s0[i] + (g[i] + decay * theta[i])
            s0[i] = v
            theta[i] -= lr * v
    elif rule == NESTEROV:
        lr, momentum = h[1], h[2]
        for i in range(theta.size):
            d = g[i] + decay * theta[i]
            v = momentum * s0[i] + d
            s0[i] = v
            theta[i] -= lr * (d + momentum * v)
    elif rule == ADAGRAD:
        rate, eps = h[1], h[2]
        for i in range(theta.size):
            d = g[i] + decay * theta[i]
            G = s0[i] + d * d
            s0[i] = G
            theta[i] -= rate * (d / (np.sqrt(G) + eps))
    elif rule == RMSPROP:
        lr, alpha, rest, eps, momentum, centered = h[1], h[2], h[3], h[4], h[5], h[6]
        for i in range(theta.size):
            d = g[i] + decay * theta[i]
            v = alpha * s0[i] + rest * (d * d)
            s0[i] = v
            if centered > zero:
                a = alpha * s1[i] + rest * d
                s1[i] = a
                v = max(v - a * a, zero)
            step = d / (np.sqrt(v) + eps)
            if momentum > zero:
                step += momentum * s2[i]
                s2[i] = step
            theta[i] -= lr * step
    elif rule == ADADELTA:
        lr, rho, rest, eps = h[1], h[2], h[3], h[4]
        for i in range(theta.size):
            d = g[i] + decay * theta[i]
            v = rho * s0[i] + rest * (d * d)
            s0[i] = v
            d = d / np.sqrt(v + eps) * np.sqrt(s1[i] + eps)
            s1[i] = rho * s1[i] + rest * (d * d)
            theta[i] -= lr * d
    elif rule == ADAM:
        kept, rate, eps, rest1, beta2, rest2 = h[1], h[2], h[3], h[4], h[5], h[6]
        kept = kept if decay == zero else one  # one of the two decays
        for i in range(theta.size):
            d = g[i] + decay * theta[i]
            m = s0[i] + rest1 * (d - s0[i])
            v = beta2 * s1[i] + rest2 * (d * d)
            s0[i], s1[i] = m, v
            theta[i] = kept * theta[i] - rate * (m / (np.sqrt(v) + eps))
    elif rule == AMSGRAD:
        kept, rate, eps, rest1, beta2, rest2 = h[1], h[2], h[3], h[4], h[5], h[6]
        kept = kept if decay == zero else one  # one of the two decays
        for i in range(theta.size):
            d = g[i] + decay * theta[i]
            m = s0[i] + rest1 * (d - s0[i])
            v = beta2 * s1[i] + rest2 * (d * d)
            s0[i], s1[i] = m, v
            largest = max(s2[i], v)
            s2[i] = largest
            theta[i] = kept * theta[i] - rate * (m / (np.sqrt(largest) + eps))
    elif rule == NADAM:
        of_m, of_g, rate, eps, rest1, beta2, rest2 = h[1], h[2], h[3], h[4], h[5], h[6], h[7]
        for i in range(theta.size):
            d = g[i] + decay * theta[i]
            m = s0[i] + rest1 * (d - s0[i])
            v = beta2 * s1[i] + rest2 * (d * d)
            s0[i], s1[i] = m, v
            theta[i] -= rate * ((of_g * d + of_m * m) / (np.sqrt(v) + eps))
    elif rule == LION:
        kept, lr, beta1, rest1, beta2, rest2 = h[1], h[2], h[3], h[4], h[5], h[6]
        for i in range(theta.size):
            c = beta1 * s0[i] + rest1 * g[i]
            sign = one if c > zero else (-one if c < zero else c)
            theta[i] = kept * theta[i] - lr * sign
            s0[i] = beta2 * s0[i] + rest2 * g[i]


@_threaded()
def update(parts: int, rule: int, theta: Any, g: Any, s0: Any, s1: Any, s2: Any, h: Any) -> None:
    """One step of a rule, in place; slots that it has not are empty, h holds its numbers."""
    n = theta.size
    if parts == 1:
        _update(0, n, rule, theta, g, s0, s1, s2, h)
    else:
        for p in prange(parts):
            _update(n * p // parts, n * (p + 1) // parts, rule, theta, g, s0, s1, s2, h)
