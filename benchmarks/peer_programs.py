"""The training steps that `peers` times, in every library: what is trained, the reference, and the programs.

A step gathers the rows that a permutation names, scales them to 0..1, goes forward (ReLU, softmax), and backward from
the mean cross-entropy, updates the parameters by SGD with momentum or Adam, and keeps its loss; in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import backprop_gpu as bp
from backprop_gpu import bench

from . import gpu_recipe
from .gpu_recipe import BETA1, BETA2, EPSILON, Recipe, loss_and_gradient

MOMENTUM, LR = 0.9, {"sgd": 0.1, "adam": 1e-3}
CHECKED = 20  # steps whose losses are compared
# Of a loss, in parts of it, or of 0.1 where it is smaller. Float32 strays by 1e-7 to 5e-4 in 20 steps, most in wide
# networks with Adam; momentum 0.89 instead of 0.9 by 1e-2 and more, beta1 0.8 instead of 0.9 by 1e-2.
LOSS_LIMIT = 2e-3

# ------------------------------------------------------------------------------------------------------- the steps


class Cell(NamedTuple):
    """What is trained: a network of these widths, m samples a step, by "sgd" (with momentum) or "adam"."""

    layers: tuple[int, ...]
    m: int
    optimizer: str

    @classmethod
    def of(cls, name: str) -> Cell:
        """The cell of a name such as 784-100-10/128/adam; ValueError for what is none."""
        widths, m, optimizer = name.split("/")
        if optimizer not in LR:
            raise ValueError(f"{optimizer!r} is neither sgd nor adam")
        return cls(tuple(map(int, widths.split("-"))), int(m), optimizer)

    @property
    def name(self) -> str:
        """As `of` reads it."""
        return f"{'-'.join(map(str, self.layers))}/{self.m}/{self.optimizer}"

    @property
    def recipe(self) -> Recipe:
        """What `gpu_recipe` makes the initial parameters and the order of rows from."""
        return Recipe(self.name, self.layers, self.m)

    @property
    def weights(self) -> int:
        """How many weights the network has."""
        return sum(a * b for a, b in zip(self.layers[1:], self.layers, strict=False))

    @property
    def flop(self) -> int:
        """Floating-point operations in a step's products: W A, Delta A^T, and W^T Delta but for layer 1."""
        return 2 * self.m * (3 * self.weights - self.layers[0] * self.layers[1])

    @property
    def chunk(self) -> int:
        """Steps of a run, where nothing else says: a power of two, of some milliseconds."""
        return 1 << max(0, min(6, int(math.log2(2e9 / self.flop))))

    @property
    def scan(self) -> int:
        """Steps of one call where a call takes many."""
        return 64 if self.flop < 1e9 else 16

    @property
    def pool(self) -> int:
        """How many steps' rows there are before they repeat: whole scans, about an epoch."""
        return max(1, len(gpu_recipe.data()[0]) // self.m // self.scan) * self.scan

    def order(self, steps: int | None = None) -> np.ndarray:
        """The rows of each step, (steps, m), all of the pool where no number is given."""
        return gpu_recipe.order(self.recipe, self.pool if steps is None else steps)

    def initial(self) -> list[np.ndarray]:
        """[W[1], b[1], W[2], b[2], ...] of `bp.Network(layers, seed=0)`, float32."""
        return gpu_recipe.initial(self.recipe)


NETWORKS = (
    ("784-100-10", (32, 128, 1024)), ("784-512-512-10", (128, 1024)), ("784-2048-2048-10", (256,)),
)  # fmt: skip
CELLS = [Cell.of(f"{widths}/{m}/{rule}") for widths, sizes in NETWORKS for m in sizes for rule in LR]
QUICK = [Cell.of(name) for name in ("784-100-10/128/sgd", "784-100-10/128/adam", "784-512-512-10/128/adam")]


def reference(cell: Cell, steps: int = CHECKED, early_epsilon: bool = False) -> list[float]:
    """The loss of each of the first steps, in float64, with NumPy.

    `early_epsilon`: Adam as scikit-learn has it, see `early_epsilon_adam`.
    """
    X, y = gpu_recipe.data()
    theta = [P.astype(np.float64) for P in cell.initial()]
    first, second = [np.zeros_like(P) for P in theta], [np.zeros_like(P) for P in theta]
    adam = early_epsilon_adam if early_epsilon else gpu_recipe.adam
    losses = []
    for t, rows in enumerate(cell.order(steps), 1):
        loss, g = loss_and_gradient(theta, X[rows] / 255.0, y[rows])
        losses.append(loss)
        if cell.optimizer == "adam":
            adam(theta, g, first, second, t)
        else:
            momentum(theta, g, first)
    return losses


def early_epsilon_adam(
    theta: list[np.ndarray], g: list[np.ndarray], first: list[np.ndarray], second: list[np.ndarray], t: int
) -> None:
    """Adam with eps added before the bias of the second moment is taken out, in place.

    So eps is larger by 1 / sqrt(1 - beta2^t), which moves the losses of wide networks by 3e-3 in 20 steps.
    """
    for P, dP, v, s in zip(theta, g, first, second, strict=True):
        v += (1 - BETA1) * (dP - v)
        s += (1 - BETA2) * (dP * dP - s)
        P -= LR["adam"] * math.sqrt(1 - BETA2**t) / (1 - BETA1**t) * v / (np.sqrt(s) + EPSILON)


def momentum(theta: list[np.ndarray], g: list[np.ndarray], velocity: list[np.ndarray]) -> None:
    """A step of SGD with momentum, in place."""
    for P, dP, v in zip(theta, g, velocity, strict=True):
        v *= MOMENTUM
        v += dP
        P -= LR["sgd"] * v


def strayed(losses: Sequence[float], exact: Sequence[float]) -> dict[str, Any]:
    """How far the losses are off, and under "rejected" why that is too far."""
    mine, wanted = np.array(losses[: len(exact)], np.float64), np.array(exact)
    if len(mine) < len(wanted):
        return {"loss_error": None, "rejected": f"{len(mine)} losses, not {len(wanted)}"}
    errors = np.abs(mine - wanted) / np.maximum(wanted, 0.1)
    error = float(errors.max())
    if error <= LOSS_LIMIT:
        return {"loss_error": error}
    at = int(np.argmax(~(errors <= LOSS_LIMIT)))  # NaN is off, too
    return {"loss_error": error if math.isfinite(error) else None, "rejected": f"loss {at + 1} off by {errors[at]:.2g}"}


# ---------------------------------------------------------------------------------------------------- the programs


class Training:
    """A program that trains a cell: `run` takes the next `steps` steps, whose losses `losses` tells."""

    steps: int

    def reset(self) -> None:
        """Back to the initial parameters, and to the first step."""
        raise NotImplementedError

    def run(self) -> None:
        """The next steps; they may still be under way after it."""
        raise NotImplementedError

    def losses(self) -> list[float]:
        """Of the last run's steps."""
        raise NotImplementedError

    def wait(self) -> None:
        """Return when every step is done."""

    def first_losses(self) -> list[float]:
        """The losses of the first steps from the initial parameters."""
        self.reset()
        found: list[float] = []
        while len(found) < CHECKED:
            self.run()
            found += self.losses()
        return found[:CHECKED]


class Choices(dict[str, Sequence[Any]]):
    """What may be set in a program, and to what; the first value of each is where tuning starts."""


class Library:
    """What a worker process measures: `programs`, `choices` of each, and `build`."""

    programs: Sequence[str] = ()

    def choices(self, program: str) -> Choices:
        """The settings to tune over."""
        return Choices()

    def build(self, program: str, cell: Cell, setting: Mapping[str, Any]) -> Training:
        """Ready to run, but for compiling, which the first run does."""
        raise NotImplementedError


DATA = ("float32", "uint8")


@functools.cache
def images(form: str) -> np.ndarray:
    """MNIST's training images, as bytes or as float32 in 0..1."""
    X = gpu_recipe.data()[0]
    return X if form == "uint8" else X.astype(np.float32) / 255


class Ours(Library):
    """This library's own steps, as `train` runs them, and the floor."""

    programs: Sequence[str] = ("numpy", "floor")
    fast = False

    def build(self, program: str, cell: Cell, setting: Mapping[str, Any]) -> Training:
        """The steps, or what they cannot do without."""
        return FloorTraining(cell) if program == "floor" else OurTraining(cell, self.fast)


class Fast(Ours):
    """The same with the extra `fast`."""

    programs = ("fast",)
    fast = True


def checked(net: bp.Network, fast: bool) -> bp.Network:
    """`net`; RuntimeError where numba compiles its operations and that is not wanted, or the other way round."""
    if net.backend.fast != fast:
        how = "compiles" if net.backend.fast else "does not compile"
        raise RuntimeError(f"numba {how} the operations here: BACKPROP_GPU_FAST is not {int(fast)}")
    return net


def our_rule(cell: Cell) -> bp.SGD | bp.Adam:
    """The cell's optimizer."""
    return bp.Adam(LR["adam"]) if cell.optimizer == "adam" else bp.SGD(LR["sgd"], momentum=MOMENTUM)


class OurTraining(Training):
    """`bench.Stepping` over the cell's rows."""

    def __init__(self, cell: Cell, fast: bool) -> None:
        self.cell, self.steps = cell, cell.scan  # `train` runs an epoch
        self.order = list(cell.order())
        self.net = checked(bp.Network(list(cell.layers), seed=0, backend="numpy"), fast)
        self.theta = np.array(self.net.theta)
        self.stepping: bench.Stepping | None = None

    def reset(self) -> None:
        """Another `Stepping`, for a used one holds the optimizer's state."""
        if self.stepping is not None:
            self.stepping.close()
        self.net.theta[...] = self.theta
        X, y = gpu_recipe.data()
        rule = our_rule(self.cell)
        self.stepping = bench.Stepping(self.net, X, y, rule, self.cell.m, order=self.order)

    def run(self) -> None:
        """The next steps."""
        assert self.stepping is not None
        self.stepping.run(self.steps)

    def losses(self) -> list[float]:
        """Of the last run's steps."""
        assert self.stepping is not None
        found: list[float] = self.stepping.losses[-self.steps :].tolist()
        return found

    @property
    def told(self) -> str:
        """How the steps are run."""
        assert self.stepping is not None
        return self.stepping.executor.told


class FloorTraining(Training):
    """`bench.Floor` in the place of steps; it computes no losses."""

    def __init__(self, cell: Cell) -> None:
        self.steps = cell.chunk
        net = bp.Network(list(cell.layers), seed=0, backend="numpy")
        self.floor = bench.Floor(net, cell.m, our_rule(cell))

    def reset(self) -> None:
        """Nothing is kept."""

    def run(self) -> None:
        """As often as a run has steps."""
        for _ in range(self.steps):
            self.floor.run()

    def first_losses(self) -> list[float]:
        """None."""
        return []


class Tutorial(Library):
    """NumPy, as a good tutorial writes it."""

    programs = ("textbook",)

    def choices(self, program: str) -> Choices:
        """The form of the data."""
        return Choices(data=DATA)

    def build(self, program: str, cell: Cell, setting: Mapping[str, Any]) -> Training:
        """The tutorial's network."""
        return TutorialTraining(cell, setting["data"])


class TutorialTraining(Training):
    """Forward, backward and update, new arrays each step."""

    def __init__(self, cell: Cell, form: str) -> None:
        self.cell, self.steps = cell, cell.chunk
        self.X, self.y, self.order = images(form), gpu_recipe.data()[1].astype(np.int64), cell.order()

    def reset(self) -> None:
        """Parameters and the optimizer's moments."""
        theta = self.cell.initial()
        self.theta, self.t = theta, 0
        self.v, self.s = [[np.zeros_like(P) for P in theta] for _ in range(2)]
        self.kept: list[float] = []

    def run(self) -> None:
        """The next steps."""
        self.kept = [self.step(self.order[self.t % len(self.order)]) for _ in range(self.steps)]

    def losses(self) -> list[float]:
        """Of the last run's steps."""
        return [float(loss) for loss in self.kept]

    def step(self, rows: np.ndarray) -> float:
        """One step of training; its loss."""
        X, y, m = self.X[rows], self.y[rows], len(rows)
        if X.dtype == np.uint8:
            X = X.astype(np.float32) / 255
        W, b = self.theta[0::2], self.theta[1::2]
        A = [X]
        for l in range(len(W) - 1):
            A.append(np.maximum(A[l] @ W[l].T + b[l], 0))
        Z = A[-1] @ W[-1].T + b[-1]
        P = np.exp(Z - Z.max(axis=1, keepdims=True))
        P /= P.sum(axis=1, keepdims=True)
        loss = -np.log(P[np.arange(m), y]).mean()
        Delta = P
        Delta[np.arange(m), y] -= 1
        Delta /= m
        gradient: list[np.ndarray] = []
        for l in reversed(range(len(W))):
            gradient = [Delta.T @ A[l], Delta.sum(axis=0), *gradient]
            if l:
                Delta = (Delta @ W[l]) * (A[l] > 0)
        self.update(gradient)
        return loss

    def update(self, gradient: list[np.ndarray]) -> None:
        """SGD with momentum, or Adam."""
        self.t += 1
        lr, t = LR[self.cell.optimizer], self.t
        for i, g in enumerate(gradient):
            if self.cell.optimizer == "sgd":
                self.v[i] = MOMENTUM * self.v[i] + g
                self.theta[i] = self.theta[i] - lr * self.v[i]
            else:
                self.v[i] = BETA1 * self.v[i] + (1 - BETA1) * g
                self.s[i] = BETA2 * self.s[i] + (1 - BETA2) * g**2
                v, s = self.v[i] / (1 - BETA1**t), self.s[i] / (1 - BETA2**t)
                self.theta[i] = self.theta[i] - lr * v / (np.sqrt(s) + EPSILON)


class ScikitLearn(Library):
    """MLPClassifier.partial_fit."""

    programs = ("partial_fit",)

    def __init__(self) -> None:
        import sklearn.neural_network

        self.classifier = sklearn.neural_network.MLPClassifier

    def build(self, program: str, cell: Cell, setting: Mapping[str, Any]) -> Training:
        """A classifier with our parameters."""
        return ScikitTraining(self.classifier, cell)


class ScikitTraining(Training):
    """A call of partial_fit takes several steps; it gathers their rows from those it is given, by its own shuffle."""

    def __init__(self, classifier: Any, cell: Cell) -> None:
        self.cell, self.steps = cell, min(64, 4 * cell.chunk)
        self.X, self.y = images("float32"), gpu_recipe.data()[1]
        self.model = classifier(
            cell.layers[1:-1], solver=cell.optimizer, alpha=0.0, batch_size=cell.m, momentum=MOMENTUM,
            nesterovs_momentum=False, learning_rate_init=LR[cell.optimizer], beta_1=BETA1, beta_2=BETA2,
            epsilon=EPSILON, random_state=0, tol=0.0, n_iter_no_change=2**31,
        )  # fmt: skip
        self.model.partial_fit(self.X[: cell.m], self.y[: cell.m], classes=np.arange(10))  # makes its arrays

    def reset(self) -> None:
        """Our parameters in the place of its own, and no optimizer: the next call makes one."""
        theta = self.cell.initial()
        for mine, W in zip(self.model.coefs_, theta[0::2], strict=True):
            mine[...] = W.T
        for mine, b in zip(self.model.intercepts_, theta[1::2], strict=True):
            mine[...] = b
        vars(self.model).pop("_optimizer", None)
        self.at, self.model.shuffle = 0, True

    def run(self) -> None:
        """One call."""
        size = self.steps * self.cell.m
        if self.at + size > len(self.X):
            self.at = 0
        rows = slice(self.at, min(self.at + size, len(self.X)))
        self.model.partial_fit(self.X[rows], self.y[rows])
        self.at = rows.stop

    def first_losses(self) -> list[float]:
        """One step a call, and no shuffle."""
        self.reset()
        self.model.shuffle, found = False, []
        for rows in self.cell.order(CHECKED):
            self.model.partial_fit(self.X[rows], self.y[rows])
            found.append(float(self.model.loss_))
        return found


class Torch(Library):
    """PyTorch."""

    programs = ("eager", "compiled")

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.y = torch.tensor(gpu_recipe.data()[1].astype(np.int64))

    @functools.cache  # noqa: B019  (as long as the process)
    def images(self, form: str) -> Any:
        """MNIST, as bytes or as float32 in 0..1."""
        return self.torch.tensor(images(form))

    def choices(self, program: str) -> Choices:
        """The optimizer's form, and that of the data."""
        return Choices(optimizer=("fused", "foreach" if program == "eager" else "compiled"), data=DATA)

    def build(self, program: str, cell: Cell, setting: Mapping[str, Any]) -> Training:
        """Eager, or compiled afresh: else the sizes of the cell before make these sizes variable."""
        if program == "eager":
            return TorchTraining(self, cell, **setting)
        self.torch._dynamo.reset()
        return (CompiledStep if setting["optimizer"] == "compiled" else CompiledGradient)(self, cell, **setting)


def torch_loss(torch: Any, as_bytes: bool) -> Callable[..., Any]:
    """The function (theta, X, y, rows) -> mean cross-entropy of these rows of X, bytes or scaled already."""
    linear, relu, cross_entropy = (getattr(torch.nn.functional, f) for f in ("linear", "relu", "cross_entropy"))

    def loss(theta: list[Any], X: Any, y: Any, rows: Any) -> Any:
        A = X.index_select(0, rows)
        if as_bytes:
            A = A * (1 / 255)
        for l in range(0, len(theta) - 2, 2):
            A = relu(linear(A, theta[l], theta[l + 1]))
        return cross_entropy(linear(A, theta[-2], theta[-1]), y.index_select(0, rows))

    return loss


class TorchTraining(Training):
    """As PyTorch's tutorials train: loss, backward, the optimizer's step, each operation launched by Python."""

    def __init__(self, of: Torch, cell: Cell, data: str, optimizer: str) -> None:
        self.torch, self.cell, self.steps, self.form = of.torch, cell, cell.chunk, optimizer
        self.X, self.y = of.images(data), of.y
        self.rows = of.torch.tensor(cell.order()).unbind()
        self.loss = torch_loss(of.torch, data == "uint8")

    def reset(self) -> None:
        """Parameters and optimizer."""
        self.theta = [self.torch.tensor(P).requires_grad_() for P in self.cell.initial()]
        self.t, form = 0, {} if self.form == "compiled" else {self.form: True}
        if self.cell.optimizer == "adam":
            self.optimizer = self.torch.optim.Adam(self.theta, LR["adam"], (BETA1, BETA2), EPSILON, **form)
        else:
            self.optimizer = self.torch.optim.SGD(self.theta, LR["sgd"], MOMENTUM, **form)

    def run(self) -> None:
        """The next steps."""
        n = len(self.rows)
        self.kept = [self.step(self.rows[t % n]) for t in range(self.t, self.t + self.steps)]
        self.t += self.steps

    def losses(self) -> list[float]:
        """Of the last run's steps."""
        return [float(loss) for loss in self.kept]

    def step(self, rows: Any) -> Any:
        """One step; its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.theta, self.X, self.y, rows)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class CompiledGradient(TorchTraining):
    """Loss and gradient are one compiled function, the optimizer is the fused one."""

    def __init__(self, of: Torch, cell: Cell, data: str, optimizer: str) -> None:
        super().__init__(of, cell, data, optimizer)
        self.compiled = of.torch.compile(of.torch.func.grad_and_value(self.loss), dynamic=False)

    def step(self, rows: Any) -> Any:
        """One step; its loss."""
        with self.torch.no_grad():
            gradient, loss = self.compiled(self.theta, self.X, self.y, rows)
        for P, g in zip(self.theta, gradient, strict=True):
            P.grad = g
        self.optimizer.step()
        return loss


class CompiledStep(TorchTraining):
    """The whole step is one compiled function."""

    def __init__(self, of: Torch, cell: Cell, data: str, optimizer: str) -> None:
        super().__init__(of, cell, data, optimizer)
        torch, lr, adam = of.torch, LR[cell.optimizer], cell.optimizer == "adam"
        gradient_of = torch.func.grad_and_value(self.loss)

        def step(theta: list[Any], v: list[Any], s: list[Any], t: Any, X: Any, y: Any, rows: Any) -> Any:
            gradient, loss = gradient_of(theta, X, y, rows)
            t.add_(1)
            for i, g in enumerate(gradient):
                if adam:
                    v[i].lerp_(g, 1 - BETA1)
                    s[i].lerp_(g * g, 1 - BETA2)
                    theta[i].sub_(lr * (v[i] / (1 - BETA1**t)) / ((s[i] / (1 - BETA2**t)).sqrt() + EPSILON))
                else:
                    v[i].mul_(MOMENTUM).add_(g)
                    theta[i].sub_(lr * v[i])
            return loss

        self.compiled = torch.compile(step, dynamic=False)

    def reset(self) -> None:
        """Parameters and the optimizer's moments."""
        torch = self.torch
        self.theta = [torch.tensor(P) for P in self.cell.initial()]
        self.v, self.s = ([torch.zeros_like(P) for P in self.theta] for _ in range(2))
        self.t, self.done = 0, torch.zeros((), dtype=torch.float32)

    def step(self, rows: Any) -> Any:
        """One step; its loss."""
        with self.torch.no_grad():
            return self.compiled(self.theta, self.v, self.s, self.done, self.X, self.y, rows)


class Jax(Library):
    """JAX."""

    programs = ("jit", "scan")
    # What XLA leaves out on a CPU unless asked: microkernels for products, and sums in another order.
    options: Sequence[dict[str, bool]] = ({}, {"xla_cpu_use_xnnpack": True, "xla_cpu_enable_fast_math": True})

    def __init__(self) -> None:
        import jax

        self.jax = jax
        self.y = jax.device_put(gpu_recipe.data()[1].astype(np.int32))

    @functools.cache  # noqa: B019  (as long as the process)
    def images(self, form: str) -> Any:
        """MNIST, as bytes or as float32 in 0..1."""
        return self.jax.device_put(images(form))

    def choices(self, program: str) -> Choices:
        """The form of the data, and XLA's options."""
        return Choices(data=DATA, options=self.options)

    def build(self, program: str, cell: Cell, setting: Mapping[str, Any]) -> Training:
        """Compiled."""
        return JaxTraining(self, cell, program == "scan", **setting)


class JaxTraining(Training):
    """A call a step, or a call for all steps of a scan; the memory of the state before is given to the state after."""

    def __init__(self, of: Jax, cell: Cell, scan: bool, data: str, options: Mapping[str, Any]) -> None:
        jax = self.jax = of.jax
        self.cell, self.X, self.y = cell, of.images(data), of.y
        self.steps = cell.scan if scan else cell.chunk
        order = cell.order().astype(np.int32)
        self.rows = [jax.device_put(rows) for rows in (order.reshape(-1, cell.scan, cell.m) if scan else order)]
        step = jax_step(jax, cell, self.X.dtype == np.uint8)

        def many(state: Any, X: Any, y: Any, order: Any) -> tuple[Any, Any]:
            return jax.lax.scan(lambda state, rows: step(state, X, y, rows), state, order)

        self.calls = 1 if scan else self.steps
        self.reset()
        lowered = jax.jit(many if scan else step, donate_argnums=0).lower(self.state, self.X, self.y, self.rows[0])
        self.call = lowered.compile(compiler_options=dict(options) or None)

    def reset(self) -> None:
        """Parameters, and the optimizer's moments."""
        jnp = self.jax.numpy
        theta = [jnp.array(P) for P in self.cell.initial()]
        slots = [[jnp.zeros_like(P) for P in theta] for _ in range(2 if self.cell.optimizer == "adam" else 1)]
        self.state, self.at = (theta, slots, jnp.zeros((), np.float32)), 0

    def run(self) -> None:
        """The next steps."""
        self.kept = []
        for _ in range(self.calls):
            self.state, loss = self.call(self.state, self.X, self.y, self.rows[self.at])
            self.kept.append(loss)
            self.at = (self.at + 1) % len(self.rows)

    def wait(self) -> None:
        """Return when every step is done."""
        self.jax.block_until_ready((self.state, self.kept))

    def losses(self) -> list[float]:
        """Of the last run's steps."""
        return [float(loss) for losses in self.kept for loss in np.atleast_1d(losses)]


def jax_loss(jax: Any, as_bytes: bool) -> Callable[..., Any]:
    """The function (theta, X, y, rows) -> mean cross-entropy of these rows of X, bytes or scaled already."""

    def loss(theta: list[Any], X: Any, y: Any, rows: Any) -> Any:
        A = X.at[rows].get(mode="promise_in_bounds")
        if as_bytes:
            A = A.astype(np.float32) * np.float32(1 / 255)
        for l in range(0, len(theta), 2):
            Z = A @ theta[l].T + theta[l + 1]
            A = jax.nn.relu(Z)
        hot = jax.nn.one_hot(y.at[rows].get(mode="promise_in_bounds"), Z.shape[1])
        return (jax.nn.logsumexp(Z, axis=1) - (Z * hot).sum(axis=1)).mean()

    return loss


def jax_step(jax: Any, cell: Cell, as_bytes: bool) -> Callable[..., Any]:
    """The function (state, X, y, rows) -> (state, loss), state = (theta, slots, t)."""
    jnp, lr, loss = jax.numpy, LR[cell.optimizer], jax_loss(jax, as_bytes)

    def step(state: Any, X: Any, y: Any, rows: Any) -> tuple[Any, Any]:
        theta, slots, t = state
        cost, gradient = jax.value_and_grad(loss)(theta, X, y, rows)
        t = t + 1
        if cell.optimizer == "sgd":
            (v,) = slots
            v = [MOMENTUM * v + g for v, g in zip(v, gradient, strict=True)]
            return ([P - lr * v for P, v in zip(theta, v, strict=True)], [v], t), cost
        v, s = slots
        v = [BETA1 * v + (1 - BETA1) * g for v, g in zip(v, gradient, strict=True)]
        s = [BETA2 * s + (1 - BETA2) * g * g for s, g in zip(s, gradient, strict=True)]
        unbiased = [(v / (1 - BETA1**t), s / (1 - BETA2**t)) for v, s in zip(v, s, strict=True)]
        theta = [P - lr * v / (jnp.sqrt(s) + EPSILON) for P, (v, s) in zip(theta, unbiased, strict=True)]
        return (theta, [v, s], t), cost

    return step
