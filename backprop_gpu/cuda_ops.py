"""The engine's instruction set on CuPy: `numpy_ops`, name for name and argument for argument, on device arrays.

Matrix products are cuBLAS's, through `cupy.matmul`; everything else is a kernel of `kernels/`, compiled when it is
first needed. Nothing here waits for the device or copies to or from it but `step_rows`, which is called once an epoch,
and after the first step nothing is allocated: scratch memory is kept, one set a thread and device. Functions of one's
own that come without CUDA expressions run as plain CuPy lines, which allocate.
"""

from __future__ import annotations

import functools
import math
import re
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cupy as cp
import cupy as xp  # the array module, under the name that code for both backends uses
import numpy as np

from . import backend, costs, cuda_source, dropout, grids
from .activations import IDENTITY, Activation, Array
from .costs import Cost
from .errors import ConfigError
from .optimizers import SGD, AdaDelta, AdaGrad, Adam, AdamW, Lion, NAdam, Optimizer, RMSProp, Slots
from .regularization import Regularization

__all__ = [
    "affine", "affine_activate", "counting", "dot_targets", "drop", "gather", "hidden_delta", "measure", "output",
    "output_delta", "regularize", "scratch", "share", "step_rows", "subtract_targets", "update", "weight_gradient",
    "xp",
]  # fmt: skip

OPTIONS = ("--std=c++17",)  # for all of them: each other tuple would cost a run of the compiler of its own
NARROW = 64  # columns up to which a thread counts a row, as in measure.cu; on longer ones a warp does
LONG_ROW = 1024  # columns up to which a warp works on a row; on longer ones a block does

# ---------------------------------------------------------------------------------------------- memory and launches

_thread = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: Any) -> Array:
    """An uninitialised array that the next call with the same name and dtype, in this thread, hands out again."""
    return _kept(name, math.prod(shape), np.dtype(dtype), cp.empty).reshape(shape)


def _kept(name: str, size: int, dtype: np.dtype[Any], make: Callable[..., Array]) -> Array:
    """The first `size` elements of this thread's vector of that name and dtype, made anew where it is too short."""
    kept: dict[Any, Any] = _thread.__dict__
    key = name, dtype, cp.cuda.runtime.getDevice()
    if key not in kept or kept[key].size < size:
        kept[key] = make(size, dtype=dtype)
    return kept[key][:size]


def counting(n: int) -> Array:
    """0, 1, ..., n - 1."""
    return _kept("counting", n, np.dtype(np.int64), cp.arange)


class _Kernel(NamedTuple):
    name: str
    function: Any
    parameters: tuple[cuda_source.Parameter, ...]


def kernel_of(file: str, name: str, dtype: np.dtype[Any], **defines: str) -> _Kernel:
    """A kernel of kernels/<file>, for that dtype and those macros."""
    real = "float" if dtype == np.float32 else "double"
    return _module(cp.cuda.runtime.getDevice(), file, (("REAL", real), *defines.items()))[name]


@functools.cache
def _module(device: int, file: str, defines: tuple[tuple[str, str], ...]) -> dict[str, _Kernel]:
    """The kernels of a file, compiled for the device on which they are first asked for."""
    source = cuda_source.text(file, **dict(defines))
    module = cp.RawModule(code=source, options=OPTIONS)
    try:
        return {
            name: _Kernel(name, module.get_function(name), parameters)
            for name, parameters in cuda_source.signatures(source).items()
        }
    except cp.cuda.compiler.CompileException as e:
        if own := [text for name, text in defines if name.startswith("OWN_")]:
            told = next((line for line in str(e).splitlines() if "error" in line), str(e))
            theirs = " and ".join(re.findall(r"return (.*?); }", " ".join(own)))
            raise ConfigError(f"CUDA expressions of your own do not compile: {told.strip()}", f"mend {theirs}") from e
        raise
    except Exception as e:
        if not backend.in_memory_instead(e):
            raise
        return _module.__wrapped__(device, file, defines)


def arguments(kernel: _Kernel, given: Sequence[Any]) -> list[Any]:
    """What the kernel is given, checked and converted: CuPy checks neither types nor strides nor their number.

    Arrays must be C-contiguous and of the dtype that the kernel's text declares, None is a null pointer, numbers are
    converted to what it declares.
    """
    if len(given) != len(kernel.parameters):
        raise TypeError(f"{kernel.name} takes {len(kernel.parameters)} arguments, not {len(given)}")
    converted: list[Any] = []
    for (name, dtype, is_array), a in zip(kernel.parameters, given, strict=True):
        if not is_array:
            converted.append(dtype.type(a))
        elif a is None:
            converted.append(np.uintp(0))
        elif isinstance(a, cp.ndarray) and a.dtype == dtype and a.flags.c_contiguous:
            converted.append(a)
        else:
            raise TypeError(f"{kernel.name}: {name} must be a C-contiguous device array of {dtype}")
    return converted


def launch(kernel: _Kernel, grid: tuple[int, ...], block: tuple[int, ...], *given: Any) -> None:
    """Start a kernel, on arguments as `arguments` wants them."""
    kernel.function(grid, block, tuple(arguments(kernel, given)))


def _same_shape(shape: tuple[int, ...], *arrays: Array | None) -> None:
    for a in arrays:
        if a is not None and a.shape != shape:
            raise ValueError(f"an array has shape {a.shape}, not {shape}")


def _rows(m: int, K: int) -> tuple[tuple[int], tuple[int, int]]:
    """Grid and block of work on m whole rows of K."""
    block = (32, grids.THREADS // 32) if K <= LONG_ROW else (grids.THREADS, 1)
    return (min(-(-m // block[1]), grids.MOST_BLOCKS),), block


# --------------------------------------------------------------------------------------------------- the operations


def gather(data: Array, rows: Array | slice, out: Array) -> None:
    """out = data[rows], or data[rows] / 255 where data is uint8 and out is not. `rows`: valid indices, or a slice."""
    m, n = len(out), out.size // len(out)
    first, indices = (rows.start, None) if isinstance(rows, slice) else (0, rows)
    _same_shape((m, *data.shape[1:]), out)
    _same_shape((m,), indices)
    kind = {np.dtype(np.uint8): "gather_bytes", np.dtype(np.int64): "gather_labels"}.get(data.dtype, "gather_reals")
    real = np.dtype(np.float32) if kind == "gather_labels" else out.dtype
    kernel = kernel_of("gather.cu", kind, real)
    launch(kernel, (grids.blocks(out.size, out.dtype.itemsize),), (grids.THREADS,), data, indices, first, out, m, n)


def affine(W: Array, A_below: Array, b: Array | None, Z: Array) -> None:
    """Z = W A_below + b."""
    cp.matmul(A_below, W.T, out=Z)
    if b is not None:
        _activate(IDENTITY, b, Z, Z)


def affine_activate(W: Array, A_below: Array, b: Array | None, f: Activation, Z: Array, A: Array) -> None:
    """Z = W A_below + b, A = f(Z). Z and A may be one array; then only A is left in it."""
    cp.matmul(A_below, W.T, out=Z)
    if cuda_source.is_compiled(f):
        _activate(f, b, Z, A)
        return
    if b is not None:
        _activate(IDENTITY, b, Z, Z)
    f.value(cp, Z, A, _spare(Z))


def _activate(f: Activation, b: Array | None, Z: Array, A: Array) -> None:
    """A = f(Z + b), and Z = Z + b where it is another array."""
    m, n = Z.shape
    _same_shape((m, n), A)
    _same_shape((n,), b)
    kernel = kernel_of("activate.cu", "bias_activate", Z.dtype, **cuda_source.activation(f))
    launch(kernel, (grids.blocks(Z.size, Z.dtype.itemsize),), (grids.THREADS,), b, Z, A, m, n)


def drop(F: Array, rate: float, draw: tuple[int, int], layer: int, mask: Array, A: Array) -> None:
    """mask = 1 / (1 - rate) or 0, drawn by (seed, step) and layer (see `dropout`); A = mask ⊙ F."""
    _same_shape(F.shape, mask, A)
    seed, step = draw
    kernel = kernel_of("dropout.cu", "drop", F.dtype)
    grid = (grids.blocks(F.size, 4),)  # four numbers a thread
    limit, scale = dropout.threshold(rate), dropout.scale(rate)
    launch(kernel, grid, (grids.THREADS,), F, mask, A, F.size, limit, scale, layer, step, seed, None, 0)


def output(g: Activation, Z: Array, A: Array) -> None:
    """A = g(Z), for output functions, softmax over rows among them."""
    if not cuda_source.is_compiled(g):
        g.value(cp, Z, A, _spare(Z))
    elif g.elementwise:
        _activate(g, None, Z, A)
    else:
        _same_shape(Z.shape, A)
        launch(kernel_of("softmax.cu", "softmax", Z.dtype), *_rows(*Z.shape), Z, A, *Z.shape)


def share(w: Array, out: Array) -> None:
    """out = w_i / sum w, the part of each sample in the mean cost; all 0 where w is."""
    _same_shape(w.shape, out)
    launch(kernel_of("share.cu", "share", w.dtype), (1,), (1024,), w, out, w.size)


def output_delta(
    cost: Cost, g: Activation, Z: Array, T: Array, w: float | Array, Delta: Array, C: Array, db: Array | None = None
) -> None:
    """C = C_i of each sample, (m,); Delta = w_i dC_i/dZ[L], w (m,) or one number; db = Delta 1 where there is a db.

    T: labels (m,) or rows (m, K).
    """
    m, K = Z.shape
    _same_shape((m, K), Delta, T if T.ndim == 2 else None)
    _same_shape((m,), C, T if T.ndim == 1 else None, None if isinstance(w, float) else w)
    _same_shape((K,), db)
    if not cuda_source.is_compiled(g) or not cuda_source.is_compiled_cost(cost):
        costs.output_delta(sys.modules[__name__], cost, g, Z, T, Delta, C)
        cp.multiply(Delta, w if isinstance(w, float) else w.reshape(-1, 1), out=Delta)
    else:
        defines = {**cuda_source.cost(cost), **cuda_source.activation(g)}
        kernel = kernel_of("output_delta.cu", "output_delta", Z.dtype, **defines)
        targets = (T, None) if T.ndim == 1 else (None, T)
        weight = (None, w) if isinstance(w, float) else (w, 0.0)
        launch(kernel, *_rows(m, K), Z, *targets, *weight, cost.smoothing, cost.parameter, Delta, C, m, K)
    if db is not None:
        _sum_columns(Delta, db)


def _in_strips(
    kernel: _Kernel, M: Array, db: Array | None, before: Sequence[Any] = (), after: Sequence[Any] = ()
) -> None:
    """Launch a kernel that sums M (m, n), or what it makes of M, down the columns, into db if there is one."""
    m, n = M.shape
    across, chunks, chunk_rows, wide = grids.strips(m, n, M.dtype.itemsize)
    partial = db if db is None or chunks == 1 else scratch("partial sums", (chunks, n), M.dtype)
    launch(kernel, (across, chunks), grids.STRIP, *before, M, partial, m, n, chunk_rows, wide, *after)
    if db is not None and chunks > 1:
        kernel = kernel_of("column_sums.cu", "column_sums", M.dtype)
        launch(kernel, (across, 1), grids.STRIP, partial, db, chunks, n, chunks, wide)


def _sum_columns(M: Array, db: Array) -> None:
    _in_strips(kernel_of("column_sums.cu", "column_sums", M.dtype), M, db)


def hidden_delta(
    W: Array, Delta: Array, f: Activation, Z: Array, A: Array, mask: Array | None, out: Array, db: Array | None = None
) -> None:
    """out = f'(Z) ⊙ (W^T Delta), where W and Delta are the layer above's; db = out 1 where there is a db.

    f' is taken from A or Z as f says. With dropout A = f(Z) is what was there before it, and out = mask ⊙ f'(Z) ⊙
    (W^T Delta).
    """
    cp.matmul(Delta, W, out=out)
    _same_shape(out.shape, mask)
    _same_shape(out.shape[1:], db)
    K = Z if f.derivative_from == "Z" else A
    _same_shape(out.shape, K)
    if cuda_source.is_compiled(f):
        if f.derivative is not None or mask is not None:
            kernel = kernel_of("hidden_delta.cu", "hidden_delta", out.dtype, **cuda_source.activation(f))
            _in_strips(kernel, out, db, (K, mask), (None, 0))
            return
    elif f.derivative is not None:
        D = scratch("derivative", out.shape, out.dtype)
        f.derivative(cp, K, D, _spare(out))
        cp.multiply(out, D, out=out)
        if mask is not None:
            cp.multiply(out, mask, out=out)
    if db is not None:
        _sum_columns(out, db)


def weight_gradient(Delta: Array, A_below: Array, dW: Array) -> None:
    """dW = Delta A_below^T. The 1/m stands in Delta already."""
    cp.matmul(Delta.T, A_below, out=dW)


_TASKS = {"labels": 1, "binary": 2, "multilabel": 2}  # as in measure.cu


def measure(task: str, g: Activation, Z: Array, T: Array, C: Array, w: Array | None, out: Array) -> None:
    """out = [sum of w_i C_i (w None: of C_i), number of samples predicted right], two float64.

    See `Network.task` for what is right.
    """
    m, K = Z.shape
    _same_shape((m,), C, w)
    scores = Z
    if task == "labels" and not g.increasing:
        scores = scratch("outputs", Z.shape, Z.dtype)
        output(g, Z, scores)
    chunks, chunk_rows = grids.chunks(m, grids.CHUNK if K <= NARROW else grids.CHUNK // 8)
    pairs = out if chunks == 1 else scratch("pairs", (chunks, 2), np.float64)
    targets = (T, None) if T.ndim == 1 else (None, T)
    kernel = kernel_of("measure.cu", "measure", Z.dtype)
    launch(kernel, (chunks,), (grids.THREADS,), scores, *targets, C, w, _TASKS.get(task, 0), pairs, m, K, chunk_rows)
    if chunks > 1:
        launch(kernel_of("measure.cu", "add_pairs", Z.dtype), (1,), (grids.THREADS,), pairs, out, chunks)


def regularize(regularization: Regularization, theta: Array, is_weight: Array, g: Array) -> None:
    """Add the penalties' derivative to the flat gradient g, then clip it, in place: see `Regularization`."""
    _same_shape(g.shape, theta, is_weight)
    grid, n = (grids.blocks(g.size, g.dtype.itemsize, grids.MOST_PARTS),), g.size
    before, after = (scratch(name, (grids.MOST_PARTS,), np.float64) for name in ("norm before", "norm after"))
    of = regularization
    launch(
        kernel_of("regularize.cu", "penalize", g.dtype), grid, (grids.THREADS,),
        theta, is_weight, g, of.l1, of.l2, of.clip_value or -1.0, before, after, n,
    )  # fmt: skip
    if of.clip_value or of.clip_norm:
        kernel = kernel_of("regularize.cu", "clip", g.dtype)
        launch(kernel, grid, (grids.THREADS,), g, before, after, *grid, of.clip_norm or -1.0, n)


def _adam_settings(rule: Adam) -> tuple[float, ...]:
    beta1, beta2 = rule.betas
    return 1 - beta1, beta2, 1 - beta2, rule.weight_decay, rule.decoupled, rule.amsgrad


class _Rule(NamedTuple):
    """What rules.cuh knows of a class of optimizers."""

    name: str
    settings: Callable[[Any], tuple[float, ...]]  # what it reads in a step behind the coefficients
    places: Callable[[Any], tuple[int, ...]]  # where it finds each slot


_RULES: dict[type[Optimizer], _Rule] = {
    SGD: _Rule("sgd", lambda r: (r.momentum, r.weight_decay, r.nesterov), lambda r: (0,)),
    AdaGrad: _Rule("adagrad", lambda r: (r.weight_decay, r.eps), lambda r: (0,)),
    RMSProp: _Rule(
        "rmsprop",
        lambda r: (r.alpha, 1 - r.alpha, r.eps, r.weight_decay, r.momentum, r.centered),
        lambda r: (0, 1, 2) if r.centered else (0, 2),
    ),
    AdaDelta: _Rule("adadelta", lambda r: (r.rho, 1 - r.rho, r.eps, r.weight_decay), lambda r: (0, 1)),
    Adam: _Rule("adam", _adam_settings, lambda r: (0, 1, 2)),
    AdamW: _Rule("adam", _adam_settings, lambda r: (0, 1, 2)),
    NAdam: _Rule("nadam", lambda r: (1 - r.betas[0], r.betas[1], 1 - r.betas[1], r.weight_decay), lambda r: (0, 1)),
    Lion: _Rule("lion", lambda r: (r.betas[0], 1 - r.betas[0], r.betas[1], 1 - r.betas[1]), lambda r: (0,)),
}


def _rule(rule: Optimizer) -> _Rule:
    if type(rule) not in _RULES:
        raise ConfigError(f"{type(rule).__name__} has no CUDA kernel", "use an optimizer of backprop_gpu, or NumPy")
    return _RULES[type(rule)]


def rule_name(rule: Optimizer) -> str:
    """The rule's struct in rules.cuh."""
    return f"rule_{_rule(rule).name}"


def placed(rule: Optimizer, slots: Slots) -> tuple[Array | None, ...]:
    """The slots where the rule's struct finds them, None where it has none."""
    s: list[Array | None] = [None, None, None]
    for place, slot in zip(_rule(rule).places(rule), slots, strict=False):
        s[place] = slot
    return tuple(s)


def host_rows(rule: Optimizer, lrs: Sequence[float], t: int) -> np.ndarray:
    """What `update` needs of the steps t, t + 1, ... (from 1) at these learning rates: a row each."""
    settings = _rule(rule).settings(rule)
    coefficients = np.array([rule.coefficients(lr, i) for i, lr in enumerate(lrs, t)], np.float64)
    rows = np.empty((len(lrs), 3 + coefficients.shape[1] + len(settings)))
    rows[:, 0], rows[:, 1], rows[:, 2] = range(t, t + len(lrs)), lrs, rule.weight_decay
    rows[:, 3 : 3 + coefficients.shape[1]], rows[:, 3 + coefficients.shape[1] :] = coefficients, settings
    return rows


def step_rows(rule: Optimizer, lrs: Sequence[float], t: int) -> Any:
    """`host_rows` on the device: one copy to it an epoch, made before its first step."""
    return cp.asarray(host_rows(rule, lrs, t))


def update(
    rule: Optimizer, theta: Array, gradient: Array, slots: Slots, row: Any, measured: Array, diverged: Array
) -> bool:
    """Apply `rule` to the flat vectors, as the step that `row` of `step_rows` says, unless the run has diverged.

    As in `numpy_ops.update`, but decided on the device, so that nobody waits: always returns True.
    """
    update_step(rule, theta, gradient, slots, row, measured, diverged)
    return True


def update_step(
    rule: Optimizer,
    theta: Array,
    gradient: Array,
    slots: Slots,
    rows: Array,
    measured: Array,
    diverged: Array | None,
    state: Array | None = None,
    ahead: int = 0,
    copies: tuple[Array, Array] | None = None,
) -> None:
    """`update`, or with a `state` of kernels/step.cuh the step that it says, `rows` and `measured` then all of them.

    `copies`: the table of update.cu (layers, 5), int64, and the vector, uint16, of the weights rounded to bf16.
    """
    s = placed(rule, slots)
    _same_shape(theta.shape, gradient, *s)
    n, define = theta.size, {"RULE": rule_name(rule)}
    parts = (grids.blocks(n, theta.dtype.itemsize, grids.MOST_PARTS),)
    norm2 = scratch("norm2", (grids.MOST_PARTS,), np.float64)
    stop = scratch("stop", (grids.MOST_PARTS,), np.int32)
    where = rows.shape[-1], state, ahead
    kernel = kernel_of("update.cu", "survey", theta.dtype, **define)
    launch(kernel, parts, (grids.THREADS,), theta, gradient, *s, rows, *where, diverged, norm2, stop, n)
    kernel = kernel_of("update.cu", "update", theta.dtype, **define)
    grid = (grids.blocks(n, theta.dtype.itemsize),)
    table, rounded = copies or (None, None)
    launch(
        kernel, grid, (grids.THREADS,), theta, gradient, *s, rows, *where, measured, norm2, stop, *parts, diverged,
        table, 0 if table is None else len(table), rounded, n,
    )  # fmt: skip


# --------------------------------------------------------------------- functions of one's own, and those in plain CuPy


def _spare(M: Array) -> tuple[Array, Array]:
    """Two scratch arrays of the shape of M."""
    return scratch("spare 0", M.shape, M.dtype), scratch("spare 1", M.shape, M.dtype)


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
