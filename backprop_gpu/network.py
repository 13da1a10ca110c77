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

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import backend as backends
from . import inputs
from .activations import HIDDEN, OUTPUT, SOFTMAX, Activation, Array
from .batches import check_seed, generator
from .costs import REDUCTIONS, Cost, choose_cost
from .errors import ConfigError, DataError, lookup
from .initializers import INITIALIZERS
from .regularization import Regularization
from .specs import number

PRECISIONS: dict[str, np.dtype[Any]] = {  # and the dtype of theta
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "tf32": np.dtype(np.float32),
    "bf16": np.dtype(np.float32),
}
GPU_ONLY = ("tf32", "bf16")  # how the products of training steps are computed there; all else is float32
MAX_WEIGHTS = 1 << 36  # 256 GiB in float32; more is a slip of the keyboard
CHUNK_ROWS = 1024  # samples a pass when there is no gradient to take

# ---------------------------------------------------------------------------------------------- the equations


def forward(ops: Any, net: Network, batch: Batch) -> None:
    """Forward propagation: from A[0] to Z[L] (source 5, "Forward propagation algorithm"; source 4, eqs. 2-3).

    A[L] = g(Z[L]) is left to those who need it: the costs work from Z[L].
    """
    W, b, f, Z, A, F, L = net.W, net.b, net.f, batch.Z, batch.A, batch.F, net.L
    for l in range(1, L):
        ops.affine_activate(W[l], A[l - 1], b[l], f[l], Z[l], F[l])  # Z[l] = W[l] A[l-1] + b[l], A[l] = f(Z[l])
        if batch.mask[l] is not None:  # with dropout A[l] = mask ⊙ f(Z[l])
            ops.drop(F[l], net.rates[l], batch.draw, l, batch.mask[l], A[l])
    ops.affine(W[L], A[L - 1], b[L], Z[L])  # Z[L] = W[L] A[L-1] + b[L]


def backward(
    ops: Any, net: Network, batch: Batch, T: Array, w: float | Array, cost: Cost, gradient: Views, frozen: int = 0
) -> None:
    """Backpropagation: from Z[L] to every dW[l] and db[l], l > frozen (source 5, "Back Propagation Algorithm").

    What its loop assigns to delta[l] is delta[l-1]. The part w of each sample in the cost, 1/m when all count the same,
    is folded into Delta[L], once, so that dW and db need none.
    """
    W, f, Z, F, A, Delta, L = net.W, net.f, batch.Z, batch.F, batch.A, batch.Delta, net.L
    dW, db = gradient.W, gradient.b
    ops.output_delta(cost, net.g, Z[L], T, w, Delta[L], batch.C, db[L])  # Delta[L] = w dC_i/dZ[L], db[L] = Delta[L] 1
    for l in range(L, frozen, -1):
        ops.weight_gradient(Delta[l], A[l - 1], dW[l])  # dW[l] = Delta[l] A[l-1]^T
        if l > frozen + 1:  # Delta[l-1] = f'(Z[l-1]) ⊙ (W[l]^T Delta[l]), db[l-1] = Delta[l-1] 1
            ops.hidden_delta(W[l], Delta[l], f[l - 1], Z[l - 1], F[l - 1], batch.mask[l - 1], Delta[l - 1], db[l - 1])


# ------------------------------------------------------------------------------------------------- the storage


class Views:
    """W[1..L] and b[1..L] as views of one flat vector, in the order W1, b1, W2, b2, ...; W[0] and b[0] are None.

    b[l] is None where layer l has no bias. Each tensor starts at a 64-byte boundary; the elements between are zero and
    stay zero.
    """

    def __init__(self, flat: Array, layers: Sequence[int], biased: Sequence[bool]) -> None:
        places, _ = Views.places(layers, biased, flat.dtype)
        W: list[Any] = [None]
        b: list[Any] = [None]
        for n_out, n_in, (at_W, at_b) in zip(layers[1:], layers, places, strict=False):
            W.append(flat[at_W : at_W + n_out * n_in].reshape(n_out, n_in))
            b.append(None if at_b is None else flat[at_b : at_b + n_out])
        self.W, self.b = tuple(W), tuple(b)

    @staticmethod
    def places(
        layers: Sequence[int], biased: Sequence[bool], dtype: np.dtype[Any]
    ) -> tuple[list[tuple[int, int | None]], int]:
        """Where W[l] and b[l] begin in the flat vector, b None without bias, l = 1..L; its size, padding included."""
        found: list[tuple[int, int | None]] = []
        start = 0
        for n_out, n_in, bias in zip(layers[1:], layers, biased, strict=False):
            at_b = start + _padded(n_out * n_in, dtype)
            found.append((start, at_b if bias else None))
            start = at_b + (_padded(n_out, dtype) if bias else 0)
        return found, start

    @staticmethod
    def size(layers: Sequence[int], biased: Sequence[bool], dtype: np.dtype[Any]) -> int:
        """How many elements the flat vector has, padding included."""
        return Views.places(layers, biased, dtype)[1]


def _padded(n: int, dtype: np.dtype) -> int:
    line = 64 // dtype.itemsize
    return -(-n // line) * line


class Batch:
    """The arrays of m samples on their way through the network: Z, A, Delta of each layer, and C, each sample's cost.

    F[l] is f(Z[l]), and A[l] itself but where dropout comes between: there A[l] = mask[l] ⊙ F[l], the masks those of
    training step `draw` = (seed, step). Z[l] is F[l] itself where nobody needs Z[l] once F[l] is there: without a
    gradient to take, or where f' is taken from A. Without a gradient to take, only the last layer has a Delta. There is
    no A[L].
    """

    def __init__(
        self, net: Network, m: int, gradient: bool, keep_Z: bool = False, draw: tuple[int, int] | None = None
    ) -> None:
        xp, dtype = net.backend.xp, net.dtype
        self.m, self.draw = m, draw
        L = net.L
        self.A: list[Any] = [xp.empty((m, n), dtype) for n in net.layers[:L]]
        dropped = [draw is not None and rate > 0 for rate in net.rates]
        self.mask: list[Any] = [xp.empty_like(A) if d else None for A, d in zip(self.A, dropped, strict=True)]
        self.F: list[Any] = [xp.empty_like(A) if d else A for A, d in zip(self.A, dropped, strict=True)]
        self.Z: list[Any] = [None] + [
            xp.empty_like(self.F[l]) if keep_Z or (gradient and net.f[l].derivative_from == "Z") else self.F[l]
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
        return self.through(lambda M: M[:m], m)

    def through(self, f: Callable[[Array], Array], m: int | None = None) -> Batch:
        """A batch of f(M) for each array M, of m samples (None: of as many)."""
        part = object.__new__(Batch)
        part.m, part.draw = self.m if m is None else m, self.draw
        made: dict[int, Array] = {}  # what is one array here is one array there

        def each(M: Any) -> Any:
            if M is not None and id(M) not in made:
                made[id(M)] = f(M)
            return None if M is None else made[id(M)]

        for name in ("A", "mask", "F", "Z", "Delta"):
            setattr(part, name, [each(M) for M in getattr(self, name)])
        part.C = each(self.C)
        return part


# ------------------------------------------------------------------------------------------------- the network


@dataclass(frozen=True)
class Layer:
    """One layer of a network; None means what the network says for all its layers.

    `width`: N_l. `activation`: of a hidden layer, or the output function in the last. `bias`: whether it has one.
    `init`: the initialiser of its weights. `dropout`: the share of its units dropped in training, of a hidden layer.
    """

    width: int
    activation: str | Activation | None = None
    bias: bool | None = None
    init: str | None = None
    dropout: float | None = None


class Network:
    """A multilayer perceptron of widths N_0/N_1/.../N_L.

    `layers`: all widths, input first, two at least; each but the first may be a `Layer`. Without a hidden layer it is
    linear, logistic or softmax regression. `hidden`: activation of the layers before the last (`activations.HIDDEN`, or
    an `Activation`). `output`: output function g, softmax or any of them. `init`: initialiser of the weights; biases
    start at 0. `bias`: whether there are any. `dropout`: the share of hidden units dropped in a training step (see
    `dropout`). `hidden` and `dropout` may be lists, one entry for each of the L - 1 hidden layers, `init` and `bias`
    one for each of the L layers. `precision`: "float32", "float64", or on a GPU "tf32" or "bf16", in which the products
    of training steps take operands of 11 or 8 bits; everything else, predictions included, is float32 then. `seed`:
    0..2^64-1, draws the initial theta, the same on every backend. `backend`: "auto", "numpy" or "cupy" (see
    `backend.choose`).

    Attributes: `layers` (list of widths), `L`; `theta`, one flat vector (see `Views`), and its views `W[l]` and `b[l]`;
    the functions `f[l]` and `g`, the dropout `rates[l]`; `hidden`, `output`, `init`, `bias`, `dropout` as above, lists
    where layers differ; `dtype`, `backend`. `task` says what `predict` returns, "labels", "binary", "multilabel" or
    "regression", and `cost` names the cost (`criterion` is it): what training last used, before that what `output`
    suggests.

    Raises ConfigError for settings that make no sense, BackendError for a backend that cannot be used.
    """

    def __init__(
        self,
        layers: Sequence[int | Layer],
        hidden: str | Activation | Sequence[str | Activation] = "relu",
        output: str | Activation = "softmax",
        init: str | Sequence[str] = "he",
        bias: bool | Sequence[bool] = True,
        precision: str = "float32",
        seed: int = 0,
        backend: str = "auto",
        dropout: float | Sequence[float] = 0.0,
    ) -> None:
        specs = _specs(layers)
        self.layers = _widths([spec.width for spec in specs])
        self.L = L = len(self.layers) - 1
        self.precision = precision
        self.dtype = lookup("precision", precision, PRECISIONS)
        between, trained = specs[1:-1], specs[1:]
        own = [spec.activation for spec in between]
        self.f: list[Any] = [
            None,
            *_per_layer("hidden", hidden, own, lambda f: _function("hidden activation", f, HIDDEN)),
        ]
        self.g = _function("output function", output if specs[-1].activation is None else specs[-1].activation, OUTPUT)
        self.biased: list[bool] = _per_layer("bias", bias, [spec.bias for spec in trained], _flag)
        by_name: dict[str, Any] = {}
        for f in (*self.f[1:], self.g):
            if by_name.setdefault(f.name, f) != f:
                raise ConfigError(f"two activations are called {f.name!r}", "give one of them another name")
        inits = _per_layer("init", init, [spec.init for spec in trained], _initializer)
        self.init = _alike(inits)
        self.rates = [0.0, *_per_layer("dropout", dropout, [spec.dropout for spec in between], _rate)]
        if specs[-1].dropout:
            raise ConfigError("dropout in the last layer would drop outputs", "give it to hidden layers")
        self.criterion: Cost = choose_cost(None, self.g.name)
        self.task = natural_task(self.g, self.layers[-1])
        self.seed = check_seed(seed)
        self.backend = backends.choose(backend)
        if precision in GPU_ONLY and self.backend.name == "numpy":
            raise ConfigError(
                f"precision {precision} is a mode of GPUs, and this runs on NumPy: {self.backend.reason}",
                "use precision float32",
            )

        host = np.zeros(Views.size(self.layers, self.biased, self.dtype), self.dtype)
        rng = generator(self.seed, 0)
        for W, name in zip(Views(host, self.layers, self.biased).W[1:], inits, strict=True):
            W[...] = INITIALIZERS[name](rng, W.shape)
        self._place(host)
        assert len(self.rates) == len(self.f) == L

    def _place(self, host: np.ndarray) -> None:
        with self.backend.active():
            self._theta = self.backend.zeros(host.size, self.dtype)
            self._theta[...] = self.backend.asarray(host)
        self._views = Views(self._theta, self.layers, self.biased)

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

    @property
    def hidden(self) -> Any:
        """The name of the hidden layers' activation, or a list of names where they differ."""
        return _alike([f.name for f in self.f[1:]])

    @property
    def output(self) -> str:
        """The name of the output function."""
        return self.g.name

    @property
    def bias(self) -> Any:
        """Whether the layers have biases, or a list where they differ."""
        return _alike(self.biased)

    @property
    def dropout(self) -> Any:
        """The dropout rate of the hidden layers, or a list where they differ."""
        return _alike(self.rates[1:])

    @property
    def cost(self) -> str:
        """The name of the cost that training last used, before that of the one that goes with the output."""
        return self.criterion.name

    def to(self, backend: str, precision: str | None = None) -> Network:
        """A copy of this network on another backend, and in another precision if one is given, with the same theta.

        On NumPy "tf32" and "bf16" become "float32".
        """
        other = object.__new__(Network)
        other.__dict__.update(self.__dict__)
        other.layers, other.f = list(self.layers), list(self.f)
        other.biased, other.rates, other.init = list(self.biased), list(self.rates), copy.copy(self.init)
        other.backend = backends.choose(backend)
        precision = precision_on(other.backend.name, self.precision if precision is None else precision)
        other.precision, other.dtype = precision, lookup("precision", precision, PRECISIONS)
        host = np.zeros(Views.size(self.layers, self.biased, other.dtype), other.dtype)
        views = Views(host, self.layers, self.biased)
        for mine, its in zip((*self.W, *self.b), (*views.W, *views.b), strict=True):
            if mine is not None:
                its[...] = _converted(backends.to_host(mine), other.dtype)
        other._place(host)
        return other

    def carry_over(self, other: Network, layers: int) -> None:
        """Take W and b of the first `layers` layers from another network, as from one that was pre-trained.

        Source 5, "Neural Networks": the layers before the output pre-process its inputs, and "the preprocessing could
        be done by a previously built model". To keep them as they are, train with `frozen=layers`.

        Raises ConfigError where the two networks differ in the shapes, the biases or the activations of those layers.
        """
        if not isinstance(other, Network):
            raise ConfigError(f"{other!r} is no network", "give the one to take layers from")
        try:
            layers = operator.index(layers)
        except TypeError:
            layers = 0
        if not 1 <= layers <= min(self.L, other.L):
            raise ConfigError(
                f"layers to carry over: {layers}", f"give 1 to {min(self.L, other.L)}: both networks have those"
            )
        for l in range(1, layers + 1):
            f, g = (net.f[l] if l < net.L else net.g for net in (self, other))
            if self.W[l].shape != other.W[l].shape or self.biased[l - 1] != other.biased[l - 1] or f != g:
                raise ConfigError(
                    f"layer {l} is {_layer_text(self, l)} here and {_layer_text(other, l)} there",
                    "carry over layers of one shape and activation only",
                )
        pairs = [(self.W[l], other.W[l]) for l in range(1, layers + 1)]
        pairs += [(self.b[l], other.b[l]) for l in range(1, layers + 1) if self.biased[l - 1]]
        values = [_converted(backends.to_host(its), self.dtype) for _, its in pairs]
        with self.backend.active():
            for (mine, _), value in zip(pairs, values, strict=True):
                mine[...] = self.backend.asarray(value)

    def __copy__(self) -> Network:
        return self.to(self.backend.name)  # a shallow copy would share theta

    def __deepcopy__(self, memo: Any) -> Network:
        return self.to(self.backend.name)

    @property
    def parameter_count(self) -> int:
        """N_w + N_b (source 5, "Biases, Weights"); the padding of theta does not count."""
        return sum(p.size for p in (*self.W[1:], *self.b[1:]) if p is not None)

    def summary(self) -> str:
        """The network in a few lines: N_0/N_1/.../N_L, each layer, N_w + N_b, where it lives.

        Layers are counted as source 5 counts them: by their sets of adjustable parameters.
        """
        weights, biases = sum(W.size for W in self.W[1:]), sum(b.size for b in self.b[1:] if b is not None)
        rows = [f"{'layer':>5}  {'W':>13}  {'b':>6}  function"]
        for l in range(1, self.L + 1):
            W, b, f = self.W[l], self.b[l], self.f[l] if l < self.L else self.g
            dropout = f", dropout {self.rates[l]:g}" if l < self.L and self.rates[l] else ""
            rows.append(
                f"{l:5}  {W.shape[0]:>6} x {W.shape[1]:<4}  {'-' if b is None else b.size:>6}  {f.name}{dropout}"
            )
        return "\n".join(
            [
                f"{'/'.join(map(str, self.layers))} network, {self.L} layer{'s' * (self.L > 1)}, {self.precision}, "
                f"on {self.backend.name} ({self.backend.device})",
                *rows,
                f"N_w + N_b = {weights} weights + {biases} biases = {self.parameter_count} parameters",
            ]
        )

    def __repr__(self) -> str:
        return (
            f"Network({self.layers}, hidden={self.hidden!r}, output={self.output!r}, init={self.init!r}, "
            f"bias={self.bias}, precision={self.precision!r}, seed={self.seed}, backend={self.backend.name!r}"
            + (f", dropout={self.dropout!r})" if any(self.rates) else ")")
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

    def gradients(
        self,
        X: Any,
        T: Any,
        cost: Cost | str | None = None,
        *,
        reduction: str = "mean",
        sample_weight: Any = None,
        l1: float = 0.0,
        l2: float = 0.0,
        label_smoothing: float = 0.0,
        dropout: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """The gradient of the cost at theta: {"W": [None, dW1, ...], "b": [None, db1, ...], "cost": C}.

        T: labels (m,), rows (m, K), or (m,) where K = 1; `cost` as it is or by name, None for the canonical one. With
        weights w (m,) of the samples, 1 where none are given, C is sum w_i C_i / sum w_i for `reduction` "mean"
        (source 5) and sum w_i C_i for "sum" (source 3); l1 and l2 add penalties (see `Regularization`),
        `label_smoothing` smooths the targets (see `Cost.smoothed`), `dropout` = (seed, step) drops what that training
        step would drop. Fresh copies, as the kind of array that X is. Raises DataError, ConfigError.
        """
        page = self._page(
            X, T, cost, reduction, sample_weight, Regularization(l1, l2), label_smoothing, dropout, keep_Z=False
        )
        return {"W": page["dW"], "b": page["db"], "cost": page["cost"]}

    def backward(
        self,
        X: Any,
        T: Any,
        cost: Cost | str | None = None,
        *,
        reduction: str = "mean",
        sample_weight: Any = None,
        l1: float = 0.0,
        l2: float = 0.0,
        label_smoothing: float = 0.0,
        dropout: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """Everything on the page of equations: lists "Z", "A", "Delta", "W" (= dW), "b" (= db), and "cost".

        Index 0 of a list is None, but A[0] = X. Delta is the page's: of each sample, neither averaged nor weighted.
        Shapes (m, N_l), a sample a row. Otherwise as `gradients`.
        """
        page = self._page(
            X, T, cost, reduction, sample_weight, Regularization(l1, l2), label_smoothing, dropout, keep_Z=True
        )
        return {"W": page["dW"], "b": page["db"], **{k: page[k] for k in ("cost", "Z", "A", "Delta")}}

    def _page(
        self,
        X: Any,
        T: Any,
        cost: Cost | str | None,
        reduction: str,
        sample_weight: Any,
        penalties: Regularization,
        label_smoothing: float,
        draw: tuple[int, int] | None,
        keep_Z: bool,
    ) -> dict[str, Any]:
        chosen = choose_cost(cost, self.output).smoothed(label_smoothing)
        check_reduction(reduction)
        with backends.guarded(X, T, sample_weight):
            data = inputs.features(X, self.layers[0], self.dtype)
            m = len(data)
            wanted = inputs.targets(T, m, self.layers[-1], chosen.name, self.dtype)
            weights = inputs.sample_weights(sample_weight, m, self.dtype, reduction)
        draw = _draw(draw)
        be = self.backend
        with be.active(), np.errstate(all="ignore"):
            batch = Batch(self, m, gradient=True, keep_Z=keep_Z, draw=draw)
            flat = be.zeros(self.theta.size, self.dtype)
            gradient = Views(flat, self.layers, self.biased)
            wanted = be.asarray(wanted)
            w: Any = 1.0 / m if reduction == "mean" else 1.0
            if weights is not None:
                w = be.xp.array(be.asarray(weights))
                if reduction == "mean":
                    be.ops.share(w, w)
            be.ops.gather(be.asarray(data), slice(0, m), batch.A[0])
            forward(be.ops, self, batch)
            page: dict[str, Any] = {}
            if keep_Z:
                backward(be.ops, self, batch, wanted, 1.0, chosen, gradient)  # for the Deltas without w
                page["Delta"] = [None if D is None else D.copy() for D in batch.Delta]
            backward(be.ops, self, batch, wanted, w, chosen, gradient)
            value = float((batch.C * be.xp.asarray(w, np.float64)).sum(dtype=np.float64))
            if penalties:
                is_weight = self.weight_mask()
                value += penalties.penalty(be.xp, self.theta, is_weight)
                be.ops.regularize(penalties, self.theta, is_weight, flat)
            page.update(dW=gradient.W, db=gradient.b)
            if keep_Z:
                outputs = be.xp.empty_like(batch.Z[-1])
                be.ops.output(self.g, batch.Z[-1], outputs)
                page.update(Z=batch.Z, A=[*batch.A, outputs])
        return {
            "cost": value,
            **{k: [None if a is None else backends.as_kind_of(X, a) for a in v] for k, v in page.items()},
        }

    def weight_mask(self) -> Array:
        """A vector like theta, 1 at every weight, 0 at biases and between tensors."""
        mask = self.backend.zeros(self.theta.size, self.dtype)
        for W in Views(mask, self.layers, self.biased).W[1:]:
            W[...] = 1
        return mask

    def _scores(self, X: Any, output: bool) -> Array:
        """A[L] or, without the output function, Z[L], in chunks that bound the memory."""
        with backends.guarded(X):
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


def precision_on(backend: str, precision: str) -> str:
    """The precision of a network that is taken to a backend: NumPy has no use for those of GPUs alone."""
    return "float32" if backend == "numpy" and precision in GPU_ONLY else precision


def check_reduction(reduction: str) -> None:
    """ConfigError unless it is one of `costs.REDUCTIONS`."""
    lookup("reduction", reduction, dict.fromkeys(REDUCTIONS))


def _specs(layers: Any) -> list[Layer]:
    """Each entry of `layers` as a Layer; the first says no more than its width."""
    try:
        specs = [layer if isinstance(layer, Layer) else Layer(layer) for layer in layers]
    except TypeError:
        raise ConfigError(f"layers is {layers!r}", "give all widths as integers, such as [784, 100, 10]") from None
    if specs and specs[0] != Layer(specs[0].width):
        raise ConfigError("the first layer is the input: it has no settings", "give its width alone")
    return specs


def _per_layer(what: str, value: Any, own: list[Any], convert: Callable[[Any], Any]) -> list[Any]:
    """One converted entry a layer: the layer's own, or else that of `value`, one for all or a list."""
    if isinstance(value, Sequence) and not isinstance(value, (str, Activation)):
        if len(value) != len(own):
            raise ConfigError(
                f"{what} has {len(value)} entries for {len(own)} layers", "give one value, or one a layer"
            )
        values = list(value)
    else:
        values = [convert(value)] * len(own)
    return [convert(v if o is None else o) for v, o in zip(values, own, strict=True)]


def _alike(values: list[Any]) -> Any:
    """The value that all layers have, else the list."""
    return values[0] if values and values.count(values[0]) == len(values) else list(values)


def _function(what: str, f: Any, table: dict[str, Activation]) -> Activation:
    if isinstance(f, Activation):
        if table is HIDDEN and not f.elementwise:
            f = f.name
        else:
            return f
    if f == SOFTMAX.name and table is HIDDEN:
        raise ConfigError(
            "softmax acts on whole rows, so it is no hidden activation", f"use one of {', '.join(HIDDEN)}"
        )
    return lookup(what, f, table)


def _flag(value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ConfigError(f"bias is {value!r}", "give True or False")
    return bool(value)


def _rate(value: Any) -> float:
    return number("layer", "dropout", value, high=1.0)


def _converted(p: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Parameters in another dtype; ConfigError where finite ones are too large for it."""
    with np.errstate(over="ignore"):
        converted = p.astype(dtype)
    if (np.isinf(converted) & np.isfinite(p)).any():
        raise ConfigError(f"parameters of the network are too large for {dtype}", "keep it in float64")
    return converted


def _draw(dropout: Any) -> tuple[int, int] | None:
    """(seed, step) of the masks to use; None for none."""
    if dropout is None:
        return None
    try:
        seed, step = dropout
        step = operator.index(step)
    except (TypeError, ValueError):
        step = -1
    if not 0 <= step < 2**63:
        raise ConfigError(f"dropout is {dropout!r}", "give (seed, step), the masks of a training step, or None")
    return check_seed(seed), step


def _initializer(name: Any) -> str:
    lookup("initialiser", name, INITIALIZERS)
    return str(name)


def _layer_text(net: Network, l: int) -> str:
    f = net.f[l] if l < net.L else net.g
    return f"{' x '.join(map(str, net.W[l].shape))} {f.name}{'' if net.biased[l - 1] else ' without bias'}"


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
