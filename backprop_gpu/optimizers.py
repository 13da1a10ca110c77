"""Optimizers: rules that turn theta, its gradient g and the rule's slots into the next theta.

The formulas, argument names and defaults are PyTorch's. A rule is a frozen set of hyper-parameters; the slots (one flat
vector each, as long as theta, zero at the start) belong to the training run. `apply` works in place on any stretch of
the flat vectors, for the rules are elementwise; `s` holds two scratch arrays, `c` what `coefficients` gave for this
step. `xp` is an array module, and may have `axpby(a, x, b, y)`, y <- a x + b y, and `descend(y, a, x)`, y <- y - a x.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from . import specs
from .activations import Array
from .errors import ConfigError, lookup

Slots = tuple[Array, ...]


@dataclass(frozen=True)
class Optimizer:
    """What every rule has: a learning rate, the number of its slots, and the rule.

    Raises ConfigError for a learning rate that is not a finite number above 0, or another hyper-parameter out of range.
    """

    lr: float

    weight_decay = 0.0  # a field where the rule has it
    eps = math.inf  # likewise

    @property
    def slots(self) -> int:
        """How many vectors of the size of theta the rule keeps from step to step."""
        raise NotImplementedError

    def coefficients(self, lr: float, t: int) -> tuple[float, ...]:
        """The scalars of step t (counted from 1) at learning rate lr."""
        raise NotImplementedError

    def apply(
        self, xp: Any, theta: Array, g: Array, slots: Slots, c: tuple[float, ...], s: tuple[Array, Array]
    ) -> None:
        """One step, in place; g is only read."""
        raise NotImplementedError

    def check(self, dtype: np.dtype[Any]) -> None:
        """ConfigError where the least eps of any step vanishes in the dtype of theta: 0 / 0 would follow."""
        if self._least_eps() < np.finfo(dtype).tiny:
            raise ConfigError(
                f"{type(self).__name__}: eps {self.eps:g} vanishes in {dtype}", "give a larger eps; 1e-8 is usual"
            )

    def _least_eps(self) -> float:
        return self.eps

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "betas":
                value = self._pair(value)
            elif field.name in _RANGES:
                value = self._number(field.name, value)
            else:
                value = bool(value)
            object.__setattr__(self, field.name, value)

    def _pair(self, value: Any) -> tuple[float, ...]:
        if not (isinstance(value, (tuple, list)) and len(value) == 2):
            raise ConfigError(f"{type(self).__name__}: betas is {value!r}", "give two numbers, such as (0.9, 0.999)")
        return tuple(self._number("betas", beta) for beta in value)

    def _number(self, name: str, value: Any) -> float:
        """`value` as a Python float: any other kind would change the dtype of what it is multiplied with."""
        low, high, low_open = _RANGES[name]
        return specs.number(type(self).__name__, name, value, low, high, low_open)


_RANGES = {  # lower end, upper end (excluded), whether the lower end is excluded too
    "lr": (0.0, math.inf, True),
    "momentum": (0.0, 1.0, False),
    "weight_decay": (0.0, math.inf, False),
    "betas": (0.0, 1.0, False),
    "alpha": (0.0, 1.0, False),
    "rho": (0.0, 1.0, False),
    "eps": (0.0, math.inf, True),
    "lr_decay": (0.0, math.inf, False),
    "momentum_decay": (0.0, math.inf, False),
}


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent, with momentum and Nesterov's form of it on request.

        g <- g + weight_decay theta
        v <- momentum v + g
        theta <- theta - lr g                    without momentum   (source 3; source 4, eq. 29)
        theta <- theta - lr v                    with momentum      (Polyak, 1964; Sutskever et al., 2013)
        theta <- theta - lr (g + momentum v)     with nesterov

    On the command line `sgd`, `momentum` (0.9) and `nesterov` (0.9).
    """

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not self.momentum:
            raise ConfigError("SGD: nesterov without momentum", "give momentum too, 0.9 is usual")

    @property
    def slots(self) -> int:
        """One, v, with momentum; else none."""
        return 1 if self.momentum else 0

    def coefficients(self, lr: float, t: int) -> tuple[float, ...]:
        """(lr,)."""
        return (lr,)

    def apply(
        self, xp: Any, theta: Array, g: Array, slots: Slots, c: tuple[float, ...], s: tuple[Array, Array]
    ) -> None:
        """One step, in place; g is only read."""
        (lr,) = c
        if self.weight_decay:
            g = _plus_decay(xp, g, self.weight_decay, theta, s[1])
        step = g
        if self.momentum:
            (v,) = slots
            _blend(xp, v, self.momentum, g, 1.0, s[0])
            step = v
            if self.nesterov:
                xp.multiply(v, self.momentum, out=s[0])
                step = xp.add(g, s[0], out=s[0])
        _descend(xp, theta, lr, step, s[0])


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015), with AMSGrad (Reddi et al., 2018) on request; m, v are the slots, t counts from 1.

        g <- g + weight_decay theta
        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        theta <- theta - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    With amsgrad the largest v so far takes the place of v in the last line.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    weight_decay: float = 0.0

    decoupled: ClassVar[bool] = False

    def _least_eps(self) -> float:
        return self.coefficients(self.lr, 1)[2]

    @property
    def slots(self) -> int:
        """m and v, and the largest v with amsgrad."""
        return 3 if self.amsgrad else 2

    def coefficients(self, lr: float, t: int) -> tuple[float, ...]:
        """AdamW's decay; rate and eps' in rate m / (sqrt(v) + eps'), the order of Kingma and Ba, section 2."""
        beta1, beta2 = self.betas
        root = math.sqrt(1 - beta2**t)
        return 1 - lr * self.weight_decay, lr * root / (1 - beta1**t), self.eps * root

    def apply(
        self, xp: Any, theta: Array, g: Array, slots: Slots, c: tuple[float, ...], s: tuple[Array, Array]
    ) -> None:
        """One step, in place; g is only read."""
        m, v = slots[:2]
        decay, rate, eps = c
        beta1, beta2 = self.betas
        if self.weight_decay and self.decoupled:
            xp.multiply(theta, decay, out=theta)
        elif self.weight_decay:
            g = _plus_decay(xp, g, self.weight_decay, theta, s[1])
        k = s[0]
        _blend(xp, m, beta1, g, 1 - beta1, k)
        _average_square(xp, v, g, beta2, k)
        if self.amsgrad:
            v = xp.maximum(slots[2], v, out=slots[2])
        xp.sqrt(v, out=k)
        xp.add(k, eps, out=k)
        xp.divide(m, k, out=k)
        _descend(xp, theta, rate, k, k)


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019).

    theta <- theta (1 - lr weight_decay) first, then Adam's step with the gradient as it is. Like PyTorch, the decay
    takes in the biases.
    """

    weight_decay: float = 1e-2

    decoupled = True


@dataclass(frozen=True)
class AdaGrad(Optimizer):
    """AdaGrad (Duchi, Hazan and Singer, 2011); G is the slot, t counts from 1. PyTorch's Adagrad, G starting at zero.

        g <- g + weight_decay theta
        G <- G + g^2
        theta <- theta - lr / (1 + (t - 1) lr_decay) g / (sqrt(G) + eps)

    On MNIST-sized networks 0.03 is a good start.
    """

    lr: float = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    eps: float = 1e-10

    @property
    def slots(self) -> int:
        """One, G."""
        return 1

    def coefficients(self, lr: float, t: int) -> tuple[float, ...]:
        """(the decayed lr,)."""
        return (lr / (1 + (t - 1) * self.lr_decay),)

    def apply(
        self, xp: Any, theta: Array, g: Array, slots: Slots, c: tuple[float, ...], s: tuple[Array, Array]
    ) -> None:
        """One step, in place; g is only read."""
        (G,), (rate,), k = slots, c, s[0]
        if self.weight_decay:
            g = _plus_decay(xp, g, self.weight_decay, theta, s[1])
        xp.multiply(g, g, out=k)
        xp.add(G, k, out=G)
        xp.sqrt(G, out=k)
        xp.add(k, self.eps, out=k)
        xp.divide(g, k, out=k)
        _descend(xp, theta, rate, k, k)


@dataclass(frozen=True)
class RMSProp(Optimizer):
    """RMSProp (Tieleman and Hinton, 2012), centered (Graves, 2013) and with momentum on request; PyTorch's RMSprop.

        g <- g + weight_decay theta
        v <- alpha v + (1 - alpha) g^2
        a <- alpha a + (1 - alpha) g                         with centered, then v - a^2 takes the place of v below
        b <- momentum b + g / (sqrt(v) + eps)
        theta <- theta - lr b

    Where rounding makes v - a^2 negative, it counts as 0 (PyTorch's root of it is not a number). Slots: v, then a
    where centered, then b where there is momentum. On MNIST-sized networks 0.003 is a good start.
    """

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False

    @property
    def slots(self) -> int:
        """v, and a with centered, and b with momentum."""
        return 1 + self.centered + bool(self.momentum)

    def _least_eps(self) -> float:
        return self.eps * 1e-18 if self.centered else self.eps  # v - a^2 may be 0 where g is large: g / eps is finite

    def coefficients(self, lr: float, t: int) -> tuple[float, ...]:
        """(lr,)."""
        return (lr,)

    def apply(
        self, xp: Any, theta: Array, g: Array, slots: Slots, c: tuple[float, ...], s: tuple[Array, Array]
    ) -> None:
        """One step, in place; g is only read."""
        v, (lr,), k = slots[0], c, s[0]
        if self.weight_decay:
            g = _plus_decay(xp, g, self.weight_decay, theta, s[1])
        _average_square(xp, v, g, self.alpha, k)
        if self.centered:
            a = slots[1]
            _blend(xp, a, self.alpha, g, 1 - self.alpha, k)
            xp.multiply(a, a, out=k)
            xp.subtract(v, k, out=k)
            v = xp.maximum(k, 0, out=k)
        xp.sqrt(v, out=k)
        xp.add(k, self.eps, out=k)
        step = xp.divide(g, k, out=k)
        if self.momentum:
            b = slots[-1]
            _blend(xp, b, self.momentum, k, 1.0, k)
            step = b
        _descend(xp, theta, lr, step, k)


@dataclass(frozen=True)
class AdaDelta(Optimizer):
    """AdaDelta (Zeiler, 2012); v, D are the slots.

        g <- g + weight_decay theta
        v <- rho v + (1 - rho) g^2
        d <- sqrt(D + eps) / sqrt(v + eps) g
        D <- rho D + (1 - rho) d^2
        theta <- theta - lr d

    On MNIST-sized networks 2 is a good start.
    """

    lr: float = 1.0
    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: float = 0.0

    @property
    def slots(self) -> int:
        """v and D."""
        return 2

    def coefficients(self, lr: float, t: int) -> tuple[float, ...]:
        """(lr,)."""
        return (lr,)

    def apply(
        self, xp: Any, theta: Array, g: Array, slots: Slots, c: tuple[float, ...], s: tuple[Array, Array]
    ) -> None:
        """One step, in place; g is only read."""
        (v, D), (lr,), (d, k) = slots, c, s
        if self.weight_decay:
            g = _plus_decay(xp, g, self.weight_decay, theta, k)
        _average_square(xp, v, g, self.rho, d)
        xp.add(v, self.eps, out=d)
        xp.sqrt(d, out=d)
        xp.divide(g, d, out=d)  # the last use of g, so k is free
        xp.add(D, self.eps, out=k)
        xp.sqrt(k, out=k)
        xp.multiply(d, k, out=d)
        _average_square(xp, D, d, self.rho, k)
        _descend(xp, theta, lr, d, d)


@dataclass(frozen=True)
class NAdam(Optimizer):
    """Adam with Nesterov's momentum (Dozat, 2016); m, v are the slots, t counts from 1.

        g <- g + weight_decay theta
        mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2),    M_t = mu_1 mu_2 ... mu_t
        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        n = mu_(t+1) m / (1 - M_(t+1)) + (1 - mu_t) g / (1 - M_t)
        theta <- theta - lr n / (sqrt(v / (1 - beta2^t)) + eps)

    On MNIST-sized networks 0.003 is a good start.
    """

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum_decay: float = 4e-3

    _last: ClassVar[tuple[int, float]] = (0, 1.0)  # (t, M_t) of the last call, on the object: see _product

    def _least_eps(self) -> float:
        return self.coefficients(self.lr, 1)[3]

    @property
    def slots(self) -> int:
        """m and v."""
        return 2

    def coefficients(self, lr: float, t: int) -> tuple[float, ...]:
        """Factors of m and of g, rate and eps', where the step is rate (factor m + factor g) / (sqrt(v) + eps')."""
        M, next_mu = self._product(t), self._mu(t + 1)
        root = math.sqrt(1 - self.betas[1] ** t)
        return next_mu / (1 - M * next_mu), (1 - self._mu(t)) / (1 - M), lr * root, self.eps * root

    def _mu(self, t: int) -> float:
        return self.betas[0] * (1 - 0.5 * 0.96 ** (t * self.momentum_decay))

    def _product(self, t: int) -> float:
        """M_t, multiplied in the order 1..t from wherever it starts, so that the bits are the same; one factor a step.

        Once 1 - M is 1, M stays what it is. What is remembered is replaced as a whole, so it is right in every thread.
        """
        at, M = self._last if self._last[0] <= t else (0, 1.0)
        while at < t and M > 1e-20:
            at += 1
            M *= self._mu(at)
        object.__setattr__(self, "_last", (t, M))
        return M

    def apply(
        self, xp: Any, theta: Array, g: Array, slots: Slots, c: tuple[float, ...], s: tuple[Array, Array]
    ) -> None:
        """One step, in place; g is only read."""
        (m, v), (of_m, of_g, rate, eps), (k, n) = slots, c, s
        beta1, beta2 = self.betas
        if self.weight_decay:
            g = _plus_decay(xp, g, self.weight_decay, theta, n)
        _blend(xp, m, beta1, g, 1 - beta1, k)
        _average_square(xp, v, g, beta2, k)
        xp.multiply(g, of_g, out=n)  # g may be n
        xp.multiply(m, of_m, out=k)
        xp.add(n, k, out=n)
        xp.sqrt(v, out=k)
        xp.add(k, eps, out=k)
        xp.divide(n, k, out=n)
        _descend(xp, theta, rate, n, n)


@dataclass(frozen=True)
class Lion(Optimizer):
    """Lion (Chen et al., 2023, "Symbolic discovery of optimization algorithms"); m is the slot, sign(0) = 0.

        c = beta1 m + (1 - beta1) g
        theta <- theta - lr (sign(c) + weight_decay theta)
        m <- beta2 m + (1 - beta2) g

    On MNIST-sized networks 0.0005 is a good start.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    @property
    def slots(self) -> int:
        """One, m."""
        return 1

    def coefficients(self, lr: float, t: int) -> tuple[float, ...]:
        """(1 - lr weight_decay, lr)."""
        return 1 - lr * self.weight_decay, lr

    def apply(
        self, xp: Any, theta: Array, g: Array, slots: Slots, c: tuple[float, ...], s: tuple[Array, Array]
    ) -> None:
        """One step, in place; g is only read."""
        (m,), (decay, lr), (k, n) = slots, c, s
        beta1, beta2 = self.betas
        xp.multiply(m, beta1, out=k)
        xp.multiply(g, 1 - beta1, out=n)
        xp.add(k, n, out=k)
        xp.sign(k, out=k)
        xp.multiply(k, lr, out=k)
        if self.weight_decay:
            xp.multiply(theta, decay, out=theta)
        xp.subtract(theta, k, out=theta)
        _blend(xp, m, beta2, g, 1 - beta2, n)


def _plus_decay(xp: Any, g: Array, weight_decay: float, theta: Array, out: Array) -> Array:
    xp.multiply(theta, weight_decay, out=out)
    return xp.add(g, out, out=out)


def _average_square(xp: Any, v: Array, g: Array, beta: float, s: Array) -> None:
    """v <- beta v + (1 - beta) g^2."""
    xp.multiply(g, g, out=s)
    _blend(xp, v, beta, s, 1 - beta, s)


def _blend(xp: Any, y: Array, b: float, x: Array, a: float, s: Array) -> None:
    """y <- b y + a x, in one pass where xp has `axpby`; s is scratch, x perhaps."""
    if in_one_pass := getattr(xp, "axpby", None):
        in_one_pass(a, x, b, y)
        return
    xp.multiply(y, b, out=y)
    xp.add(y, x if a == 1 else xp.multiply(x, a, out=s), out=y)


def _descend(xp: Any, theta: Array, rate: float, step: Array, s: Array) -> None:
    """theta <- theta - rate step; s is scratch, step perhaps. `rate` may be an array of one number."""
    if in_one_pass := getattr(xp, "descend", None):
        in_one_pass(theta, rate, step)
        return
    xp.multiply(step, rate, out=s)
    xp.subtract(theta, s, out=theta)


# By name: the learning rate where none is given, which suits MNIST-sized networks; the maker of the rule, whose
# parameters are the settings that the name takes.
OPTIMIZERS: dict[str, tuple[float, Callable[..., Optimizer]]] = {
    "sgd": (0.3, SGD),
    "momentum": (0.1, lambda lr, momentum=0.9, weight_decay=0.0: SGD(lr, momentum, False, weight_decay)),
    "nesterov": (0.1, lambda lr, momentum=0.9, weight_decay=0.0: SGD(lr, momentum, True, weight_decay)),
    "adagrad": (0.03, AdaGrad),
    "rmsprop": (3e-3, RMSProp),
    "adadelta": (2.0, AdaDelta),
    "adam": (2e-3, Adam),
    "amsgrad": (
        3e-3,
        lambda lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0: Adam(lr, betas, eps, True, weight_decay),
    ),
    "adamw": (2e-3, AdamW),
    "nadam": (3e-3, NAdam),
    "lion": (5e-4, Lion),
}


def choose_optimizer(optimizer: Optimizer | str, lr: float | None = None) -> Optimizer:
    """An optimizer as it is, or one by name or NAME:key=value,... at lr (None: the name's usual one).

    Raises ConfigError for an unknown name or setting, a value out of range, and lr both in the text and beside it.
    """
    if isinstance(optimizer, Optimizer):
        return optimizer
    name, settings = specs.parse("optimizer", optimizer)
    usual, rule = lookup("optimizer", name, OPTIMIZERS)
    given = specs.values(f"optimizer {name}", settings, rule)
    if lr is not None and "lr" in given:
        raise ConfigError(f"the optimizer {optimizer!r} is given lr {lr!r} too", "give the learning rate in one place")
    return rule(**{"lr": usual if lr is None else lr, **given})
