"""What users hand over, checked once at the door: features X and targets T.

Inside the engine nothing is checked again. Everything here works on NumPy and CuPy arrays alike, on the device where
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .activations import Array
from .backend import array_module, is_cupy, to_host
from .errors import ConfigError, DataError

_CHUNK = 1 << 20  # elements looked at a time, so that a check never needs much memory


@dataclass(frozen=True)
class Samples:
    """Checked data: features X (n, N_0), targets T (n,) or (n, K), weights (n,) or None, and the task to count for."""

    X: Array
    T: Array
    weights: Array | None
    task: str

    def __len__(self) -> int:
        return len(self.X)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(a.nbytes for a in (self.X, self.T, self.weights) if a is not None)

    def take(self, rows: Any) -> Samples:
        """Those of them that `rows`, a slice or indices on the host, names."""
        return Samples(_taken(self.X, rows), _taken(self.T, rows), _taken(self.weights, rows), self.task)

    def on(self, asarray: Callable[[Array], Array]) -> Samples:
        """The same on the device that `asarray` takes arrays to."""
        weights = None if self.weights is None else asarray(self.weights)
        return Samples(asarray(self.X), asarray(self.T), weights, self.task)


def _taken(a: Any, rows: Any) -> Any:
    return None if a is None else a[rows if isinstance(rows, slice) else array_module(a).asarray(rows)]


def features(X: Any, width: int, dtype: np.dtype) -> Array:
    """X as a C-contiguous (m, width) array: uint8 as it is (it means x / 255), everything else in `dtype`.

    X may be anything that NumPy reads as numbers: (m, width), or images (m, h, w). Integers other than uint8, booleans
    and other float types are converted, values kept. An array that fits already is not copied.

    Raises DataError for other dtypes (object, complex, text, dates), another number of dimensions or features, no
    samples, and NaN or infinity (the first one's place is named).
    """
    X = _numeric("X", X)
    if X.ndim < 2:
        raise DataError(
            f"X has {X.ndim} dimension{'s' * (X.ndim != 1)}, shape {X.shape}",
            "pass one row a sample: X.reshape(1, -1) for one sample, X.reshape(-1, 1) for one feature",
        )
    if len(X) == 0:
        raise DataError("X has no samples", "pass at least one row")
    X = X.reshape(len(X), -1) if X.size else X.reshape(len(X), 0)
    if X.shape[1] != width:
        raise DataError(
            f"X has {X.shape[1]} features, the network takes {width}",
            "pass samples of that width, or build the network with layers that begin with the data's",
        )
    return _as_numbers("X", X, dtype, keep_uint8=True)


def targets(T: Any, m: int, K: int, cost: str, dtype: np.dtype) -> Array:
    """T as integer labels (m,) or as rows (m, K) in `dtype`, for m samples, K outputs and a cost by name.

    Integer labels (m,) mean one-hot rows, whatever the cost; where K = 1, (m,) are the targets themselves. Raises
    DataError where a label is outside 0..K-1, targets are not finite, rows do not sum to 1 for cross_entropy, are
    outside 0..1 for binary_cross_entropy, or shapes do not fit.
    """
    T = _numeric("T", T)
    if T.ndim == 0 or len(T) != m:
        raise DataError(
            f"X has {m} samples, T has {len(T) if T.ndim else 'none'}", "pass one target a sample, in the same order"
        )
    whole = T.dtype.kind in "iu"
    if T.ndim == 1 and (K > 1 or (whole and cost == "cross_entropy")):
        if not whole:
            raise DataError(
                f"T has shape ({m},) and dtype {T.dtype}, but the network has {K} outputs",
                "pass integer labels (T.astype(int), if they are whole), or one row of targets a sample",
            )
        return _labels(T, K)
    T = T.reshape(m, 1) if T.ndim == 1 else T
    if T.shape != (m, K):
        cure = "pass labels as a vector: T.ravel()" if T.shape == (m, 1) else f"pass targets of shape ({m}, {K})"
        raise DataError(f"T has shape {T.shape}, the network has {K} outputs", cure)
    T = _as_numbers("T", T, dtype)
    if cost == "cross_entropy":
        total = T.sum(axis=1, dtype=np.float64)
        _refuse_rows(
            (abs(total - 1) > 1e-3) | (T < 0).any(axis=1),
            "T is not a probability distribution at row {}",
            "cross_entropy wants labels, one-hot rows, or probabilities that sum to 1 in each row",
        )
    elif cost == "binary_cross_entropy":
        _refuse_rows(
            ((T < 0) | (T > 1)).any(axis=1),
            "T is outside 0..1 at row {}",
            "binary_cross_entropy wants targets from 0 to 1; scale them, or use squared_error",
        )
    return T


def sample_weights(
    w: Any, m: int, dtype: np.dtype, reduction: str = "mean", what: str = "sample_weight"
) -> np.ndarray | None:
    """The weights of m samples as (m,) in `dtype` on the host; None as it is.

    For the mean, which knows no scale, they are divided by a power of two, exactly, so that the largest is from 1/2 to
    1 and no sum of them leaves the dtype. `what` is what an error calls them.

    Raises DataError for another shape, for weights that are negative or not finite, and where all are 0.
    """
    if w is None:
        return None
    w = np.asarray(to_host(_numeric(what, w)), np.float64)
    if w.shape != (m,):
        raise DataError(f"{what} has shape {w.shape} for {m} samples", "pass one weight a sample")
    _refuse_rows(~np.isfinite(w) | (w < 0), f"{what} is negative or not finite at row {{}}", "pass weights from 0")
    if reduction == "mean":
        w = np.ldexp(w, -int(np.frexp(w.max())[1]))
    with np.errstate(over="ignore", under="ignore"):
        w = w.astype(dtype)
    if not w.any():
        raise DataError(f"all of {what} is 0", "pass a weight above 0 for the samples that count")
    _refuse_rows(np.isinf(w), f"{what} is too large for {dtype} at row {{}}", "divide the weights by their mean")
    return w


def class_weights(given: Any, wanted: Array, outputs: int, output: str) -> np.ndarray:
    """The weight that its class gives each sample, (m,) float64. `wanted` as `targets` left it.

    `given`: "balanced", which is m / (classes there are x samples of the class), or a mapping from label to weight (1
    for labels that are not in it), or the weights of all labels in order. There are classes where there are labels,
    where the output is softmax (rows belong to the class of their largest entry), and under one sigmoid (above 0.5 is
    class 1).

    Raises ConfigError where there are no classes, for anything else given, and weights that are negative or not finite.
    """
    wanted = to_host(wanted)
    if wanted.ndim == 1:
        classes = wanted
    elif output == "sigmoid" and outputs == 1:
        classes = (wanted[:, 0] > 0.5).astype(np.intp)
    elif output == "softmax":
        classes = wanted.argmax(axis=1)
    else:
        raise ConfigError("class_weight without classes", "give labels, or use sample_weight")
    n = max(2, outputs)
    cure = f'give "balanced", or a weight for each label, 0 to {n - 1}, as a mapping or a list'
    weights = np.ones(n)
    if isinstance(given, str) and given == "balanced":
        count = np.bincount(classes, minlength=n)
        weights = len(classes) / np.maximum(1, count * np.count_nonzero(count))
    elif isinstance(given, Mapping):
        for label, weight in given.items():
            if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label < n:
                raise ConfigError(f"class_weight has the label {label!r}", cure)
            weights[label] = _weight(weight, cure)
    elif isinstance(given, (list, tuple, np.ndarray)) and len(given) == n:
        weights[:] = [_weight(weight, cure) for weight in given]
    else:
        raise ConfigError(f"class_weight is {given!r}", cure)
    return weights[classes]


def _weight(value: Any, cure: str) -> float:
    try:
        weight = float("nan") if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError):
        weight = float("nan")
    if not (np.isfinite(weight) and weight >= 0):
        raise ConfigError(f"class_weight holds {value!r}", cure)
    return weight


def _labels(T: Array, K: int) -> Array:
    T = T.copy()  # what is looked at is what is used, whatever another thread writes meanwhile
    low, high = int(T.min()), int(T.max())  # also for CuPy arrays, whose indexing would wrap instead of raising
    if low < 0 or high >= K:
        bad = (T < 0) | (T >= K)
        row = int(bad.argmax())
        raise DataError(
            f"labels must be in 0..{K - 1}, found {int(T[row])} at row {row}",
            "number the classes from 0, or give the network as many outputs as there are classes",
        )
    return T.astype(np.intp, copy=False)


def _numeric(what: str, a: Any) -> Array:
    """`a` as an array of booleans, integers or floats, still in its own dtype."""
    if np.ma.is_masked(a):
        raise DataError(f"{what} has masked values", "fill them in, .filled(...), or remove those samples")
    if is_cupy(a):
        a = array_module(a).asarray(a)  # from another GPU to the current one
    else:
        try:
            a = np.asarray(a)
        except Exception as e:  # whatever somebody's __array__ raises
            lines = str(e).splitlines() or [type(e).__name__]
            raise DataError(
                f"{what} is not an array: {lines[0]}", "pass an array of numbers, rows of equal length"
            ) from None
    if a.dtype.kind not in "biuf":
        raise DataError(
            f"{what} has dtype {a.dtype}",
            "pass real numbers: convert it with .astype(float), sparse data with .toarray()",
        )
    return a


def _as_numbers(what: str, a: Array, dtype: np.dtype, keep_uint8: bool = False) -> Array:
    """`a`, of two dimensions, C-contiguous in `dtype`; no copy where it is that already."""
    wanted = a.dtype if keep_uint8 and a.dtype == np.uint8 else dtype
    if not (a.dtype == wanted and a.flags.c_contiguous and (is_cupy(a) or a.flags.aligned)):
        with np.errstate(over="ignore"):
            converted = a.astype(wanted, order="C")
    else:
        converted = a
    if a.dtype.kind == "f":
        xp = array_module(a)
        step = max(1, _CHUNK // max(1, a.shape[1]))
        for i in range(0, len(a), step):
            finite = xp.isfinite(converted[i : i + step])
            if not bool(finite.all()):
                row, column = divmod(int((~finite).reshape(-1).argmax()), a.shape[1])
                value = float(a[i + row, column])
                if np.isfinite(value):
                    raise DataError(
                        f"{what} holds {value:g} at row {i + row}, column {column}: too large for {wanted}",
                        "scale the data to about -1..1, or use precision float64",
                    )
                raise DataError(
                    f"{what} holds {value} at row {i + row}, column {column}",
                    "remove or fill in missing values first; scale the data if it overflowed",
                )
    return converted


def _refuse_rows(bad: Array, cause: str, cure: str) -> None:
    if bool(bad.any()):
        raise DataError(cause.format(int(bad.argmax())), cure)
