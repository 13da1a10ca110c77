"""The engine's instruction set on NumPy arrays with numba: what `numpy_ops` does in passes in one, in threads.

Names and signatures are those of `numpy_ops`, which is the reference, and does what is not here: functions of exp and
log, which its passes make faster than a loop, and rare cases. Each product is made in parts, one a thread, that depend
on its shape and the number of threads alone, by OpenBLAS with one thread each; what follows elementwise is done to a
part while it is in the cache.

numba compiles a kernel when it is first needed, which takes some seconds, and keeps it in its cache (NUMBA_CACHE_DIR).
Importing this raises ImportError where numba or OpenBLAS is missing, and what numba raises where it cannot work.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import numba
import numpy as np

from . import fast_kernels as kernels
from . import numpy_ops
from .activations import Activation, Array
from .costs import COSTS, Cost
from .numpy_ops import (  # noqa: F401 - the rest of the instruction set
    Rule,
    counting,
    dot_targets,
    drop,
    output,
    recording,
    regularize,
    scratch,
    share,
    step_rows,
    subtract_targets,
    xp,
)
from .optimizers import SGD, AdaDelta, AdaGrad, Adam, AdamW, Lion, NAdam, Optimizer, RMSProp, Slots
from .recording import Tape, noted

# The work that is worth one more thread, whose start takes some 3 us (Zen 3, OpenMP): multiply-adds of a product,
# elements of a pass, elements that are gathered, exponentials.
PRODUCT, PASS, GATHERED, EXPONENTIALS = 250_000, 30_000, 10_000, 1200

_alone = False


def _in_a_child() -> None:
    global _alone
    _alone = True  # OpenMP's threads are not there after a fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_child)


numba.get_num_threads()  # ValueError where numba finds no threads; their kind is known from here on
# numba's own threads, taken where there is neither OpenMP nor TBB, end a process whose threads run kernels at once.
_SHARED = numba.threading_layer() != "workqueue"


def threads() -> int:
    """How many threads a kernel may use."""
    return 1 if _alone or not _SHARED else numba.get_num_threads()


def parts(work: int, worth: int) -> int:
    """In how many parts so much work is done, a part being worth a thread."""
    return max(1, min(threads(), work // worth))


@functools.cache
def no_norms(count: int) -> Array:
    """For the squares of so many parts that nobody wants."""
    return np.empty((count, 0))


@functools.cache
def empty(ndim: int, dtype: np.dtype[Any]) -> Array:
    """For what a kernel does without."""
    return np.empty((0,) * ndim, dtype)


def _given(vector: Array | None, like: Array) -> Array:
    return empty(1, like.dtype) if vector is None else vector


def gather(data: Array, rows: Array | slice, out: Array) -> None:
    """As `numpy_ops.gather`."""
    if data.dtype == np.uint8 and data.ndim == 2 and out.dtype != np.uint8 and not isinstance(rows, slice):
        noted(kernels.gather, parts(out.size, GATHERED), data, rows, 255.0, out)
    else:
        numpy_ops.gather(data, rows, out)


# In how many parts a product is made, and whether these are rows of its result, else columns: as measured (Zen 3, two
# threads) for m of 32 to 1024 and widths of 10 to 2048.


def affine_parts(m: int, n: int, k: int) -> tuple[int, bool]:
    """Of Z (m, n) = A W^T, W (n, k)."""
    return parts(m * n * k, PRODUCT), m >= n


def delta_parts(m: int, n: int, k: int) -> tuple[int, bool]:
    """Of Delta W, W (k, n): rows, for the elementwise part likes whole ones."""
    count = parts(m * n * k, PRODUCT)
    return count, m >= 4 * count


def gradient_parts(m: int, n: int, k: int) -> tuple[int, bool]:
    """Of dW (n, k) of m samples: rows, so that the thread that makes one updates it, too, but for few and long sums."""
    return parts(m * n * k, PRODUCT), n >= 256 or m < n


def affine(W: Array, A_below: Array, b: Array | None, Z: Array) -> None:
    """Z = W A_below + b."""
    count, by_rows = affine_parts(len(Z), *W.shape)
    noted(kernels.affine, count, by_rows, W, A_below, _given(b, Z), kernels.NONE, Z, empty(2, Z.dtype), no_norms(count))


def affine_activate(W: Array, A_below: Array, b: Array | None, f: Activation, Z: Array, A: Array) -> None:
    """Z = W A_below + b, A = f(Z). Z and A may be one array; then only A is left in it."""
    if f.name in kernels.VALUES:
        count, by_rows = affine_parts(len(Z), *W.shape)
        how, apart = kernels.VALUES[f.name], empty(2, Z.dtype) if A is Z else A
        noted(kernels.affine, count, by_rows, W, A_below, _given(b, Z), how, Z, apart, no_norms(count))
    else:
        affine(W, A_below, b, Z)
        numpy_ops.activate(None, f, Z, A)


def output_delta(
    cost: Cost, g: Activation, Z: Array, T: Array, w: float | Array, Delta: Array, C: Array, db: Array | None = None
) -> None:
    """As `numpy_ops.output_delta`."""
    if cost != COSTS["cross_entropy"] or T.ndim != 1:
        numpy_ops.output_delta(cost, g, Z, T, w, Delta, C, db)
        return
    count = parts(Z.size, EXPONENTIALS)
    part, of_sample = (w, empty(1, Z.dtype)) if isinstance(w, float) else (0.0, w)
    sums = scratch("sums", (count, Z.shape[1]), Z.dtype)
    noted(kernels.cross_entropy, count, Z, T, part, of_sample, Delta, C, sums, _given(db, Z))


def hidden_delta(
    W: Array, Delta: Array, f: Activation, Z: Array, A: Array, mask: Array | None, out: Array, db: Array | None = None
) -> None:
    """As `numpy_ops.hidden_delta`."""
    count, by_rows = delta_parts(len(out), W.shape[1], len(W))
    sums = scratch("sums", (count, out.shape[1]), out.dtype)
    dropped = empty(2, out.dtype) if mask is None else mask
    known = f.name in kernels.DERIVATIVES
    how = kernels.DERIVATIVES[f.name] if known else kernels.NONE
    of_db = _given(db if known else None, out)
    noted(kernels.hidden_delta, count, by_rows, W, Delta, A, how, dropped, out, sums, of_db, no_norms(count))
    if not known:
        numpy_ops.differentiate(f, Z, A, None, out, db)


def weight_gradient(Delta: Array, A_below: Array, dW: Array) -> None:
    """dW = Delta A_below^T. The 1/m stands in Delta already."""
    count, by_rows = gradient_parts(len(Delta), *dW.shape)
    noted(kernels.weight_gradient, count, by_rows, Delta, A_below, dW)


def measure(task: str, g: Activation, Z: Array, T: Array, C: Array, w: Array | None, out: Array) -> None:
    """As `numpy_ops.measure`."""
    if task == "labels" and g.increasing and T.ndim == 1:
        noted(kernels.count_labels, Z, T, C, _given(w, C), out)
    else:
        numpy_ops.measure(task, g, Z, T, C, w, out)


def update(
    rule: Optimizer, theta: Array, gradient: Array, slots: Slots, row: Any, measured: Array, diverged: Array,
    apply: Rule | None = None,
) -> bool:  # fmt: skip
    """As `numpy_ops.update`."""
    count = parts(theta.size, PASS)
    sums = scratch("squares", (count,), np.float64)
    kernels.squares(count, gradient, sums)
    apply = apply or prepared(rule, theta, gradient, slots)
    return numpy_ops.guarded(rule, theta, float(sums[0]), slots, row, measured, diverged, apply)


def prepared(rule: Optimizer, theta: Array, gradient: Array, slots: Slots, tape: Tape | None = None) -> Rule:
    """What applies `rule` with the coefficients that it is given. Needs no tape but for a rule of one's own."""
    if numbers(rule) is None:
        return numpy_ops.prepared(rule, theta, gradient, slots, tape)
    kind, h, given = rule_vectors(rule, theta, slots)
    end, cut = 1 + len(rule.coefficients(rule.lr, 1)), parts(theta.size, PASS)

    def apply(c: tuple[float, ...]) -> None:
        h[1:end] = c
        kernels.update(cut, kind, theta, gradient, *given, h)

    return apply


def rule_vectors(rule: Optimizer, theta: Array, slots: Slots) -> tuple[int, Array, list[Array]]:
    """What `kernels.update` needs of a rule that has `numbers`: which it is, h, and three slots, empty where unused.

    h holds the coupled decay, the coefficients of a step, still 0, and the rule's own numbers.
    """
    kind, decay, own = numbers(rule) or (0, 0.0, ())
    h = np.array([decay, *[0.0] * len(rule.coefficients(rule.lr, 1)), *own], theta.dtype)
    none = np.empty(0, theta.dtype)
    if isinstance(rule, RMSProp):  # v, then what averages the gradient, then what averages the steps
        rest = iter(slots[1:])
        return kind, h, [slots[0], next(rest) if rule.centered else none, next(rest) if rule.momentum else none]
    return kind, h, [*slots, none, none, none][:3]


def numbers(rule: Optimizer) -> tuple[int, float, tuple[float, ...]] | None:
    """The kernel's number of a rule, its coupled decay, and the numbers that come after the step's coefficients."""
    decay, kind = rule.weight_decay, type(rule)
    if kind is SGD:
        assert isinstance(rule, SGD)
        which = kernels.NESTEROV if rule.nesterov else kernels.MOMENTUM if rule.momentum else kernels.SGD
        return which, decay, (rule.momentum,)
    if kind is AdaGrad:
        return kernels.ADAGRAD, decay, (rule.eps,)
    if kind is RMSProp:
        assert isinstance(rule, RMSProp)
        return kernels.RMSPROP, decay, (rule.alpha, 1 - rule.alpha, rule.eps, rule.momentum, float(rule.centered))
    if kind is AdaDelta:
        assert isinstance(rule, AdaDelta)
        return kernels.ADADELTA, decay, (rule.rho, 1 - rule.rho, rule.eps)
    if kind in (Adam, AdamW):
        assert isinstance(rule, Adam)
        (beta1, beta2), coupled = rule.betas, 0.0 if rule.decoupled else decay
        return kernels.AMSGRAD if rule.amsgrad else kernels.ADAM, coupled, (1 - beta1, beta2, 1 - beta2)
    if kind is NAdam:
        assert isinstance(rule, NAdam)
        beta1, beta2 = rule.betas
        return kernels.NADAM, decay, (1 - beta1, beta2, 1 - beta2)
    if kind is Lion:
        assert isinstance(rule, Lion)
        beta1, beta2 = rule.betas
        return kernels.LION, 0.0, (beta1, 1 - beta1, beta2, 1 - beta2)
    return None
