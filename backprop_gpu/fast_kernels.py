"""What `fast_ops` runs: loops that numba compiles, over parts of arrays, in threads.

A kernel `name(parts, ...)` runs `_name` on parts of rows, columns or elements, a thread each; with one part it starts
no thread. Slices are taken before loops: LLVM makes vector code of them only so. What a call does without is an empty
array: a kernel would be compiled anew for None, and its parts for a literal 0, which is `none` here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic, overload

from . import blas
from .activations import LEAKY_SLOPE

if numba.config.DISABLE_JIT:  # `_multiply` is nothing then
    raise ImportError("NUMBA_DISABLE_JIT is set")


class _Cache(FunctionCache):
    """numba's, where a file that is damaged is no file, and a disk that is full is no error."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # of pickle, in any of its ways
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


def njit(f: Any = None, **how: Any) -> Any:
    """`numba.njit` of a kernel, which is compiled once and kept."""
    if f is None:
        return functools.partial(njit, **how)
    made = numba.njit(f, error_model="numpy", nogil=True, **how)
    made._cache = _Cache(f)
    return made


_serial = njit
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


@_serial(fastmath={"reassoc"})
def _norm2(a: Any) -> float:
    """||a||^2 of a vector, summed in its dtype."""
    total = a.dtype.type(0)
    for j in range(a.size):
        total += a[j] * a[j]
    return total


def _exponentiate(d: Any) -> None:
    """d = exp(d), a vector of numbers that are not above 0."""


@overload(_exponentiate)
def _exponentiate_of(d):  # type: ignore[no-untyped-def]
    def by_the_library(d):  # type: ignore[no-untyped-def]
        for j in range(d.size):
            d[j] = math.exp(d[j])

    # Vector code, as a call of the library is not. The numbers are expf's of Cephes (S. Moshier): exp(d) is 2^n exp(x),
    # ln 2 in two parts, so that n ln 2 is taken off exactly.
    LOG2_E, LN2, REST_OF_LN2 = map(np.float32, (1.44269504, 0.693359375, -2.12194440e-4))
    LEAST, HALF, ONE = map(np.float32, (-87.0, 0.5, 1.0))
    P0, P1, P2 = map(np.float32, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3))
    P3, P4, P5 = map(np.float32, (4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1))

    def by_a_polynomial(d):  # type: ignore[no-untyped-def]
        for j in range(d.size):
            x = LEAST if d[j] < LEAST else d[j]
            n = np.floor(x * LOG2_E + HALF)
            x = x - n * LN2 - n * REST_OF_LN2
            y = ((((P0 * x + P1) * x + P2) * x + P3) * x + P4) * x + P5
            power = np.int32((np.int32(n) + 127) << 23).view(np.float32)
            d[j] = (y * x * x + x + ONE) * power

    return by_a_polynomial if d.dtype == types.float32 else by_the_library


@intrinsic
def _prefetch(typing, address):  # type: ignore[no-untyped-def]
    """Have the cache line of this address fetched."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        f = builder.module.declare_intrinsic("llvm.prefetch", (pointer,), kind)
        read, keep, of_data = number(0), number(3), number(1)
        builder.call(f, [builder.inttoptr(args[0], pointer), read, keep, of_data])
        return context.get_dummy_value()

    return types.void(types.intp), generate


# -------------------------------------------------------------------------------------------------------- operations

AHEAD, LINE = 4, 64  # rows that are fetched early, for they lie anywhere; bytes


@_serial()
def _gather(lo: int, hi: int, data: Any, rows: Any, scale: float, out: Any) -> None:
    scale = out.dtype.type(scale)
    start, stride, size = data.ctypes.data, data.strides[0], data.shape[1] * data.itemsize
    for i in range(lo, hi):
        if i + AHEAD < hi:
            row = start + rows[i + AHEAD] * stride
            for at in range(0, size, LINE):
                _prefetch(row + at)
        to, of = out[i], data[rows[i]]
        for j in range(to.size):
            to[j] = of[j] / scale


@_threaded()
def gather(parts: int, data: Any, rows: Any, scale: float, out: Any) -> None:
    """out = data[rows] / scale."""
    m, none = len(out), 0 * parts
    if parts == 1:
        _gather(none, m, data, rows, scale, out)
    else:
        for p in prange(parts):
            _gather(m * p // parts, m * (p + 1) // parts, data, rows, scale, out)


@_serial()
def _affine(
    r0: int, r1: int, c0: int, c1: int, W: Any, A_below: Any, b: Any, f: int, Z: Any, A: Any, norm2: Any
) -> None:
    k, n = W.shape[1], Z.shape[1]
    _multiply(PLAIN, TRANSPOSED, r1 - r0, c1 - c0, k, A_below[r0:], k, W[c0:], k, Z[r0:, c0:], n)
    total = 0.0
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
            if norm2.size > 0:
                total += _norm2(z)
    if norm2.size > 0:
        norm2[0] = total


@_threaded()
def affine(parts: int, by_rows: bool, W: Any, A_below: Any, b: Any, f: int, Z: Any, A: Any, norm2: Any) -> None:
    """Z = W A_below + b, A = f(Z); b may be empty, and A, where only A is wanted, in Z.

    norm2 (parts, 1): for ||A||^2 of each part, where A is in Z; (parts, 0): it is not wanted.
    """
    (m, n), none = Z.shape, 0 * parts
    if parts == 1:
        _affine(none, m, none, n, W, A_below, b, f, Z, A, norm2[0])
    else:
        for p in prange(parts):
            if by_rows:
                _affine(m * p // parts, m * (p + 1) // parts, none, n, W, A_below, b, f, Z, A, norm2[p])
            else:
                _affine(none, m, n * p // parts, n * (p + 1) // parts, W, A_below, b, f, Z, A, norm2[p])


@_serial()
def _hidden_delta(
    r0: int, r1: int, c0: int, c1: int, W: Any, Delta: Any, A: Any, f: int, mask: Any, out: Any, sums: Any, norm2: Any
) -> None:
    k, n = W.shape
    _multiply(PLAIN, PLAIN, r1 - r0, c1 - c0, k, Delta[r0:], k, W[:, c0:], n, out[r0:, c0:], n)
    of_columns, total = sums[c0:c1], 0.0
    of_columns[:] = 0
    for i in range(r0, r1):
        d = out[i, c0:c1]
        if mask.size > 0:
            of_mask = mask[i, c0:c1]
            for j in range(d.size):
                d[j] *= of_mask[j]
        _differentiate(d, A[i, c0:c1], f)
        _add(of_columns, d)
        if norm2.size > 0:
            total += _norm2(d)
    if norm2.size > 0:
        norm2[0] = total


@_threaded()
def hidden_delta(
    parts: int, by_rows: bool, W: Any, Delta: Any, A: Any, f: int, mask: Any, out: Any, sums: Any, db: Any, norm2: Any
) -> None:
    """out = mask f'(Z) (W^T Delta), db = out 1; mask and db may be empty. `sums`: (parts, N_l), to work with.

    norm2: for ||out||^2 of each part, as in `affine`.
    """
    (m, n), none = out.shape, 0 * parts
    if parts == 1:
        _hidden_delta(none, m, none, n, W, Delta, A, f, mask, out, sums[0], norm2[0])
    else:
        for p in prange(parts):
            if by_rows:
                r0, r1 = m * p // parts, m * (p + 1) // parts
                _hidden_delta(r0, r1, none, n, W, Delta, A, f, mask, out, sums[p], norm2[p])
            else:
                c0, c1 = n * p // parts, n * (p + 1) // parts
                _hidden_delta(none, m, c0, c1, W, Delta, A, f, mask, out, sums[0], norm2[p])
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
    (n, k), none = dW.shape, 0 * parts
    if parts == 1:
        _weight_gradient(none, n, none, k, Delta, A_below, dW)
    else:
        for p in prange(parts):
            if by_rows:
                _weight_gradient(n * p // parts, n * (p + 1) // parts, none, k, Delta, A_below, dW)
            else:
                _weight_gradient(none, n, k * p // parts, k * (p + 1) // parts, Delta, A_below, dW)


@_serial()
def _cross_entropy(lo: int, hi: int, Z: Any, T: Any, part: float, w: Any, Delta: Any, C: Any, sums: Any) -> None:
    K, zero = Z.shape[1], Z.dtype.type(0)
    for i in range(lo, hi):
        z, d = Z[i], Delta[i]
        largest = z[0]
        for k in range(1, K):
            largest = largest if largest >= z[k] or largest != largest else z[k]
        for k in range(K):
            d[k] = z[k] - largest
        C[i] = d[T[i]]
    _exponentiate(Delta.reshape(Delta.size)[lo * K : hi * K])
    sums[:] = 0
    for i in range(lo, hi):
        d, total = Delta[i], zero
        for k in range(K):
            total += d[k]
        C[i] = math.log(total) - C[i]
        of_sample = w[i] if w.size > 0 else Z.dtype.type(part)
        scale = of_sample / total
        for k in range(K):
            d[k] *= scale
        d[T[i]] -= of_sample
        _add(sums, d)


@_threaded()
def cross_entropy(parts: int, Z: Any, T: Any, part: float, w: Any, Delta: Any, C: Any, sums: Any, db: Any) -> None:
    """C; Delta = w (softmax(Z) - T), T labels; db = Delta 1. w empty: `part` instead. `sums`: (parts, K)."""
    m, none = len(Z), 0 * parts
    if parts == 1:
        _cross_entropy(none, m, Z, T, part, w, Delta, C, sums[0])
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
    n, none = g.size, 0 * parts
    if parts == 1:
        sums[0] = _squares(none, n, g)
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
    n, none = theta.size, 0 * parts
    if parts == 1:
        _update(none, n, rule, theta, g, s0, s1, s2, h)
    else:
        for p in prange(parts):
            _update(n * p // parts, n * (p + 1) // parts, rule, theta, g, s0, s1, s2, h)
