"""Optimizers: rules that turn theta, its gradient g and the rule's slots into the next theta.

The formulas, argument names and defaults are PyTorch's. A rule is a frozen set of hyper-parameters; the slots (one flat
vector each, as long as theta, zero at the start) belong to the training run. `apply` works in place on any stretch of
the flat vectors, for the rules are elementwise; `s` holds two scratch arrays, `c` what `coefficients` gave for this
step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

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
        """ConfigError where a hyper-parameter does not survive in the dtype of theta."""

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
        try:
            number = math.nan if isinstance(value, (str, bytes)) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (math.isfinite(number) and (low < number if low_open else low <= number) and number < high):
            wanted = f"{'above' if low_open else 'from'} {low:g}" + ("" if math.isinf(high) else f" to below {high:g}")
            raise ConfigError(f"{type(self).__name__}: {name} is {value!r}", f"give a finite number {wanted}")
        return number


_RANGES = {  # lower end, upper end (excluded), whether the lower end is excluded too
    "lr": (0.0, math.inf, True),
    "momentum": (0.0, 1.0, False),
    "weight_decay": (0.0, math.inf, False),
    "betas": (0.0, 1.0, False),
    "eps": (0.0, math.inf, True),
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
            xp.multiply(v, self.momentum, out=v)
            xp.add(v, g, out=v)
            step = v
            if self.nesterov:
                xp.multiply(v, self.momentum, out=s[0])
                step = xp.add(g, s[0], out=s[0])
        xp.multiply(step, lr, out=s[0])
        xp.subtract(theta, s[0], out=theta)


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

    def check(self, dtype: np.dtype[Any]) -> None:
        """ConfigError where eps' of the first step vanishes in the dtype of theta: 0 / 0 would follow."""
        if self.coefficients(self.lr, 1)[2] < np.finfo(dtype).tiny:
            raise ConfigError(
                f"{type(self).__name__}: eps {self.eps:g} vanishes in {dtype}", "give a larger eps; 1e-8 is usual"
            )

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
        xp.subtract(g, m, out=k)
        xp.multiply(k, 1 - beta1, out=k)
        xp.add(m, k, out=m)
        xp.multiply(g, g, out=k)
        xp.multiply(k, 1 - beta2, out=k)
        xp.multiply(v, beta2, out=v)
        xp.add(v, k, out=v)
        if self.amsgrad:
            v = xp.maximum(slots[2], v, out=slots[2])
        xp.sqrt(v, out=k)
        xp.add(k, eps, out=k)
        xp.divide(m, k, out=k)
        xp.multiply(k, rate, out=k)
        xp.subtract(theta, k, out=theta)


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019).

    theta <- theta (1 - lr weight_decay) first, then Adam's step with the gradient as it is. Like PyTorch, the decay
    takes in the biases.
    """

    weight_decay: float = 1e-2

    decoupled = True


def _plus_decay(xp: Any, g: Array, weight_decay: float, theta: Array, out: Array) -> Array:
    xp.multiply(theta, weight_decay, out=out)
    return xp.add(g, out, out=out)


# By name: the learning rate where none is given, which suits MNIST-sized networks; the rule at a learning rate.
OPTIMIZERS: dict[str, tuple[float, Callable[[float], Optimizer]]] = {
    "sgd": (0.3, SGD),
    "momentum": (0.1, lambda lr: SGD(lr, momentum=0.9)),
    "nesterov": (0.1, lambda lr: SGD(lr, momentum=0.9, nesterov=True)),
    "adam": (2e-3, Adam),
    "adamw": (2e-3, AdamW),
}


def choose_optimizer(optimizer: Optimizer | str, lr: float | None = None) -> Optimizer:
    """An optimizer as it is, or one by name at lr (None: the name's usual one)."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    usual, rule = lookup("optimizer", optimizer, OPTIMIZERS)
    return rule(usual if lr is None else lr)
