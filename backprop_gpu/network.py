"""The multilayer perceptron and its equations.

Notation of source 5; layers are counted 1..L, layer 0 is the input, m samples make a batch:

    Z[l] = W[l] A[l-1] + b[l]         A[l] = f(Z[l]) for l < L,  A[L] = g(Z[L])        A[0] = X
    C    = (1/m) sum_i C_i            Delta[L] = dC_i/dZ[L]     (column i: of sample i, not averaged)
    Delta[l] = f'(Z[l]) ⊙ (W[l+1]^T Delta[l+1])
    dW[l] = Delta[l] A[l-1]^T / m     db[l] = Delta[l] 1 / m

The notes put a sample in a column. Here every batch array is the transpose of that, C-contiguous (m, N_l), a sample a
row, which is how data files hold them; W[l] is (N_l, N_(l-1)) as in the notes. So the product W A of the page is
`A @ W.T` inside the operations.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from . import backend as backends
from . import inputs
from .activations import HIDDEN, OUTPUT, SOFTMAX, Activation, Array
from .batches import check_seed, generator
from .costs import Cost, choose_cost
from .errors import ConfigError, DataError, lookup
from .initializers import INITIALIZERS

PRECISIONS: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64)}
MAX_WEIGHTS = 1 << 36  # 256 GiB in float32; more is a slip of the keyboard
CHUNK_ROWS = 1024  # samples a pass when there is no gradient to take

# ---------------------------------------------------------------------------------------------- the equations


def forward(ops: Any, net: Network, batch: Batch) -> None:
    """Forward propagation: from A[0] to Z[L] (source 5, "Forward propagation algorithm"; source 4, eqs. 2-3).

    A[L] = g(Z[L]) is left to those who need it: the costs work from Z[L].
    """
    W, b, f, Z, A, L = net.W, net.b, net.f, batch.Z, batch.A, net.L
    for l in range(1, L):
        ops.affine_activate(W[l], A[l - 1], b[l], f[l], Z[l], A[l])  # Z[l] = W[l] A[l-1] + b[l], A[l] = f(Z[l])
    ops.affine(W[L], A[L - 1], b[L], Z[L])  # Z[L] = W[L] A[L-1] + b[L]


def backward(ops: Any, net: Network, batch: Batch, T: Array, cost: Cost, gradient: Views) -> None:
    """Backpropagation: from Z[L] to every dW[l] and db[l] (source 5, "Back Propagation Algorithm").

    What its loop assigns to delta[l] is delta[l-1]. The factor 1/m is folded into Delta[L], once, so that dW and db
    need none.
    """
    W, f, Z, A, Delta, L, m = net.W, net.f, batch.Z, batch.A, batch.Delta, net.L, batch.m
    dW, db = gradient.W, gradient.b
    ops.output_delta(cost, net.g, Z[L], T, 1 / m, Delta[L], batch.C)  # Delta[L] = dC_i/dZ[L] / m
    for l in range(L, 0, -1):
        ops.gradients(Delta[l], A[l - 1], dW[l], db[l])  # dW[l] = Delta[l] A[l-1]^T, db[l] = Delta[l] 1
        if l > 1:  # Delta[l-1] = f'(Z[l-1]) ⊙ (W[l]^T Delta[l])
            ops.hidden_delta(W[l], Delta[l], f[l - 1], Z[l - 1], A[l - 1], Delta[l - 1])


# ------------------------------------------------------------------------------------------------- the storage


class Views:
    """W[1..L] and b[1..L] as views of one flat vector, in the order W1, b1, W2, b2, ...; W[0] and b[0] are None.

    Without bias every b[l] is None. Each tensor starts at a 64-byte boundary; the elements between are zero and stay
    zero.
    """

    def __init__(self, flat: Array, layers: Sequence[int], bias: bool) -> None:
        W: list[Any] = [None]
        b: list[Any] = [None]
        start = 0
        for n_out, n_in in zip(layers[1:], layers, strict=False):
            W.append(flat[start : start + n_out * n_in].reshape(n_out, n_in))
            start += _padded(n_out * n_in, flat.dtype)
            b.append(flat[start : start + n_out] if bias else None)
            start += _padded(n_out, flat.dtype) if bias else 0
        self.W, self.b = tuple(W), tuple(b)

    @staticmethod
    def size(layers: Sequence[int], bias: bool, dtype: np.dtype) -> int:
        """How many elements the flat vector has, padding included."""
        return sum(_padded(o * i, dtype) + bias * _padded(o, dtype) for o, i in zip(layers[1:], layers, strict=False))


def _padded(n: int, dtype: np.dtype) -> int:
    line = 64 // dtype.itemsize
    return -(-n // line) * line


class Batch:
    """The arrays of m samples on their way through the network: Z, A, Delta of each layer, and C, each sample's cost.

    Z[l] is A[l] itself where nobody needs Z[l] once A[l] is there: without a gradient to take, or where f' is taken
    from A. Without a gradient to take, only the last layer has a Delta. There is no A[L].
    """

    def __init__(self, net: Network, m: int, gradient: bool, keep_Z: bool = False) -> None:
        xp, dtype = net.backend.xp, net.dtype
        self.m = m
        L = net.L
        self.A: list[Any] = [xp.empty((m, n), dtype) for n in net.layers[:L]]
        self.Z: list[Any] = [None] + [
            xp.empty_like(self.A[l]) if keep_Z or (gradient and net.f[l].derivative_from == "Z") else self.A[l]
            for l in range(1, L)
        ]
        self.Z.append(xp.empty((m, net.layers[L]), dtype))
        self.Delta: list[Any] = [None] + [xp.empty_like(A) if gradient else None for A in self.A[1:]]
        self.Delta.append(xp.empty_like(self.Z[L]))
        self.C = xp.empty(m, dtype)

    def first(self, m: int) -> Batch:
        """The same memory for the first m samples."""
        if m == self.m:
            return self
        part = object.__new__(Batch)
        part.m = m
        part.A = [M[:m] for M in self.A]
        part.Z = [None, *(part.A[l] if self.Z[l] is self.A[l] else self.Z[l][:m] for l in range(1, len(self.A)))]
        part.Z.append(self.Z[-1][:m])
        part.Delta = [None if M is None else M[:m] for M in self.Delta]
        part.C = self.C[:m]
        return part


# ------------------------------------------------------------------------------------------------- the network


class Network:
    """A multilayer perceptron of widths N_0/N_1/.../N_L.

    `layers`: all widths, input first, two at least. `hidden`: activation of the layers before the last
    (`activations.HIDDEN`); `output`: output function g, softmax or any of them. `init`: initialiser of the weights;
    biases start at 0. `precision`: "float32" or "float64". `seed`: 0..2^64-1, draws the initial theta, the same on
    every backend. `backend`: "auto", "numpy" or "cupy" (see `backend.choose`).

    Attributes: `layers` (list of widths), `L`; `theta`, one flat vector (see `Views`), and its views `W[l]` and `b[l]`;
    the functions `f[l]` and `g`; `dtype`, `backend`. `task` says what `predict` returns, "labels", "binary",
    "multilabel" or "regression", and `cost` names the cost: what training last used, before that what `output`
    suggests.

    Raises ConfigError for settings that make no sense, BackendError for a backend that cannot be used.
    """

    def __init__(
        self,
        layers: Sequence[int],
        hidden: str = "relu",
        output: str = "softmax",
        init: str = "he",
        bias: bool = True,
        precision: str = "float32",
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        self.layers = _widths(layers)
        self.L = len(self.layers) - 1
        self.hidden, self.output, self.init = hidden, output, init
        self.bias, self.precision = bool(bias), precision
        self.dtype = lookup("precision", precision, PRECISIONS)
        if hidden == SOFTMAX.name:
            raise ConfigError(
                "softmax acts on whole rows, so it is no hidden activation", f"use one of {', '.join(HIDDEN)}"
            )
        self.f: list[Any] = [None] + [lookup("hidden activation", hidden, HIDDEN)] * (self.L - 1)
        self.g: Activation = lookup("output function", output, OUTPUT)
        self.cost = choose_cost(None, output).name
        self.task = natural_task(self.g, self.layers[-1])
        initializer = lookup("initialiser", init, INITIALIZERS)
        self.seed = check_seed(seed)
        self.backend = backends.choose(backend)

        host = np.zeros(Views.size(self.layers, self.bias, self.dtype), self.dtype)
        rng = generator(self.seed, 0)
        for W in Views(host, self.layers, self.bias).W[1:]:
            W[...] = initializer(rng, W.shape)
        self._place(host)

    def _place(self, host: np.ndarray) -> None:
        with self.backend.active():
            self._theta = self.backend.zeros(host.size, self.dtype)
            self._theta[...] = self.backend.asarray(host)
        self._views = Views(self._theta, self.layers, self.bias)

    @property
    def theta(self) -> Array:
        """All parameters, one flat vector on the backend's device; write into it, it cannot be replaced."""
        return self._theta

    @property
    def W(self) -> tuple[Any, ...]:
        """W[1..L], views of theta, (N_l, N_(l-1)); W[0] is None."""
        return self._views.W

    @property
    def b(self) -> tuple[Any, ...]:
        """b[1..L], views of theta, (N_l,), None without bias; b[0] is None."""
        return self._views.b

    def to(self, backend: str) -> Network:
        """A copy of this network on another backend, with the same theta."""
        other = object.__new__(Network)
        other.__dict__.update(self.__dict__)
        other.layers, other.f = list(self.layers), list(self.f)
        other.backend = backends.choose(backend)
        other._place(backends.to_host(self.theta))
        return other

    def __copy__(self) -> Network:
        return self.to(self.backend.name)  # a shallow copy would share theta

    def __deepcopy__(self, memo: Any) -> Network:
        return self.to(self.backend.name)

    @property
    def parameter_count(self) -> int:
        """N_w + N_b (source 5, "Biases, Weights"); the padding of theta does not count."""
        return sum(p.size for p in (*self.W[1:], *self.b[1:]) if p is not None)

    def summary(self) -> str:
        """The network in a few lines: widths, functions, parameters, where it lives."""
        weights, biases = sum(W.size for W in self.W[1:]), sum(b.size for b in self.b[1:] if b is not None)
        rows = [f"{'layer':>5}  {'W':>13}  {'b':>6}  function"]
        for l in range(1, self.L + 1):
            W, b, f = self.W[l], self.b[l], self.f[l] if l < self.L else self.g
            rows.append(f"{l:5}  {W.shape[0]:>6} x {W.shape[1]:<4}  {'-' if b is None else b.size:>6}  {f.name}")
        return "\n".join(
            [
                f"{'/'.join(map(str, self.layers))} network, {self.L} layers, {self.precision}, "
                f"on {self.backend.name} ({self.backend.device})",
                *rows,
                f"{weights} weights + {biases} biases = {self.parameter_count} parameters",
            ]
        )

    def __repr__(self) -> str:
        return (
            f"Network({self.layers}, hidden={self.hidden!r}, output={self.output!r}, init={self.init!r}, "
            f"bias={self.bias}, precision={self.precision!r}, seed={self.seed}, backend={self.backend.name!r})"
        )

    def forward(self, X: Any) -> Array:
        """The outputs A[L] = g(Z[L]), (m, K) in the network's dtype, as the kind of array (NumPy, CuPy) that X is.

        X: (m, N_0) numbers or images (m, h, w); uint8 is read as x / 255. Raises DataError (see `inputs.features`).
        """
        return self._scores(X, output=True)

    def predict(self, X: Any) -> Array:
        """What the network says of X, by `task`, as the kind of array that X is.

        "labels": the class of the largest output, (m,) integers. "binary" (sigmoid, K = 1): the class, 1 where the
        output is above 0.5, (m,). "multilabel" (sigmoid, K > 1): a row of 0 and 1, (m, K). "regression": the outputs,
        (m, K). Raises DataError as `forward`, and where outputs to decide by are not finite.
        """
        if self.task == "regression":
            return self.forward(X)
        scores = self._scores(X, output=not self.g.increasing)
        bad = ~backends.array_module(scores).isfinite(scores).all(axis=1)
        if bool(bad.any()):
            raise DataError(
                f"the outputs are not finite at row {int(bad.argmax())}",
                "scale X to about -1..1, or look at the parameters",
            )
        if self.task == "labels":
            return scores.argmax(axis=1)
        classes = (scores > 0).astype(np.intp)
        return classes[:, 0] if self.task == "binary" else classes

    def predict_proba(self, X: Any) -> Array:
        """The outputs (m, K), where they are probabilities (output softmax or sigmoid); ConfigError where not."""
        if self.output not in ("softmax", "sigmoid"):
            raise ConfigError(
                f"the outputs of a network with output {self.output!r} are not probabilities",
                "use forward, or build the network with output softmax or sigmoid",
            )
        return self.forward(X)

    def gradients(self, X: Any, T: Any, cost: str | None = None) -> dict[str, Any]:
        """The gradient of the mean cost at theta: {"W": [None, dW1, ...], "b": [None, db1, ...], "cost": C}.

        T: labels (m,), rows (m, K), or (m,) where K = 1; `cost` by name, None for the canonical one. Fresh copies, as
        the kind of array that X is. Raises DataError, ConfigError.
        """
        page = self._page(X, T, cost, keep_Z=False)
        return {"W": page["dW"], "b": page["db"], "cost": page["cost"]}

    def backward(self, X: Any, T: Any, cost: str | None = None) -> dict[str, Any]:
        """Everything on the page of equations: lists "Z", "A", "Delta", "W" (= dW), "b" (= db), and "cost".

        Index 0 of a list is None, but A[0] = X. Delta is the page's: of each sample, not averaged. Shapes (m, N_l), a
        sample a row. Otherwise as `gradients`.
        """
        page = self._page(X, T, cost, keep_Z=True)
        return {"W": page["dW"], "b": page["db"], **{k: page[k] for k in ("cost", "Z", "A", "Delta")}}

    def _page(self, X: Any, T: Any, cost: str | None, keep_Z: bool) -> dict[str, Any]:
        chosen = choose_cost(cost, self.output)
        data = inputs.features(X, self.layers[0], self.dtype)
        m = len(data)
        wanted = inputs.targets(T, m, self.layers[-1], chosen.name, self.dtype)
        be = self.backend
        with be.active(), np.errstate(all="ignore"):
            batch = Batch(self, m, gradient=True, keep_Z=keep_Z)
            flat = be.zeros(self.theta.size, self.dtype)
            gradient = Views(flat, self.layers, self.bias)
            be.ops.gather(be.asarray(data), slice(0, m), batch.A[0])
            forward(be.ops, self, batch)
            backward(be.ops, self, batch, be.asarray(wanted), chosen, gradient)
            value = float(batch.C.mean(dtype=np.float64))
            page: dict[str, Sequence[Any]] = {"dW": gradient.W, "db": gradient.b}
            if keep_Z:
                outputs = be.xp.empty_like(batch.Z[-1])
                be.ops.output(self.g, batch.Z[-1], outputs)
                page.update(Z=batch.Z, A=[*batch.A, outputs], Delta=[None] + [D * m for D in batch.Delta[1:]])
        return {
            "cost": value,
            **{k: [None if a is None else backends.as_kind_of(X, a) for a in v] for k, v in page.items()},
        }

    def _scores(self, X: Any, output: bool) -> Array:
        """A[L] or, without the output function, Z[L], in chunks that bound the memory."""
        data = inputs.features(X, self.layers[0], self.dtype)
        be = self.backend
        with be.active(), np.errstate(all="ignore"):
            result = be.xp.empty((len(data), self.layers[-1]), self.dtype)
            for rows, batch in forward_chunks(self, data):
                if output:
                    be.ops.output(self.g, batch.Z[-1], result[rows])
                else:
                    result[rows] = batch.Z[-1]
        return backends.as_kind_of(X, result)


def forward_chunks(net: Network, data: Array) -> Iterator[tuple[slice, Batch]]:
    """Forward propagation of `data` (from `inputs.features`), chunk by chunk: which rows, and a Batch with Z[L]."""
    be = net.backend
    whole = Batch(net, min(len(data), CHUNK_ROWS), gradient=False)
    for i in range(0, len(data), CHUNK_ROWS):
        rows = slice(i, min(i + CHUNK_ROWS, len(data)))
        batch = whole.first(rows.stop - i)
        be.ops.gather(be.asarray(data[rows]), slice(0, batch.m), batch.A[0])
        forward(be.ops, net, batch)
        yield rows, batch


def natural_task(g: Activation, K: int) -> str:
    """What a network predicts before it is trained on anything: see `Network.predict`."""
    if g.name == "softmax":
        return "labels"
    if g.name == "sigmoid":
        return "binary" if K == 1 else "multilabel"
    return "regression"


def _widths(layers: Any) -> list[int]:
    try:
        widths = [operator.index(n) for n in layers]
    except TypeError:
        raise ConfigError(f"layers is {layers!r}", "give all widths as integers, such as [784, 100, 10]") from None
    if len(widths) < 2 or min(widths) < 1:
        raise ConfigError(f"layers is {widths}", "give two widths at least, each 1 or more, such as [784, 100, 10]")
    if sum(o * i for o, i in zip(widths[1:], widths, strict=False)) > MAX_WEIGHTS:
        raise ConfigError(f"layers is {widths}: more than {MAX_WEIGHTS} weights", "give smaller widths")
    return widths
