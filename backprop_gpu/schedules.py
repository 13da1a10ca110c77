"""Schedules: the learning rate over a run. A schedule maps a step (from 0) and the count of steps to a factor on lr.

Lengths are in steps from 1 on; below 1 they are fractions of the whole run, rounded up to whole steps. x stands for
step / total. Source 5 names learning rate schedules without formulas; theirs are from the papers named here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import specs
from .errors import ConfigError

Schedule = Callable[[int, int], float]


def during(schedule: Schedule, costs: Sequence[float]) -> Schedule:
    """The schedule of the epoch that follows epochs of these costs: what its method `during` says, else itself.

    `costs`: one an epoch so far, of validation data where there are any, else of training data.
    """
    follow = getattr(schedule, "during", None)
    return schedule if follow is None else follow(costs)


def _keep(schedule: Any, **checks: Callable[[str, str, Any], Any]) -> None:
    """Replace each parameter by what its check makes of it."""
    for name, check in checks.items():
        object.__setattr__(schedule, name, check(type(schedule).__name__, name, getattr(schedule, name)))


_from_0_to_1 = partial(specs.number, high=1.0, high_open=False)
_above_0_to_1 = partial(specs.number, high=1.0, low_open=True, high_open=False)


def _length(owner: str, name: str, value: Any) -> float:
    """An integer, in steps, or a fraction of the run."""
    length = specs.number(owner, name, value, low_open=True)
    if length < 1:
        return length
    if not length.is_integer():
        raise ConfigError(f"{owner}: {name} is {value!r}", "give whole steps, or a fraction of the run below 1")
    return int(length)


def _steps(length: float, total: int) -> int:
    """A length in whole steps, 1 or more; it is rounded first, for 0.07 of 100 steps is 7, though 0.07 * 100 > 7."""
    return max(1, math.ceil(round(length * total, 6))) if length < 1 else int(length)


def _count(owner: str, name: str, value: Any) -> int:
    count = specs.number(owner, name, value)
    if not count.is_integer():
        raise ConfigError(f"{owner}: {name} is {value!r}", "give an integer from 0")
    return int(count)


@dataclass(frozen=True)
class Constant:
    """`factor` at every step. Raises ConfigError for one that is not from 0."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        _keep(self, factor=specs.number)

    def __call__(self, step: int, total: int) -> float:
        """The factor of a step."""
        return self.factor


constant = Constant()


@dataclass(frozen=True)
class Step:
    """factor^floor(step / every): lower by `factor` after each `every` (Ge et al., 2019; PyTorch's StepLR).

    Raises ConfigError for an `every` that is no length, and a factor that is not above 0 to 1.
    """

    every: float = 1 / 3
    factor: float = 0.1

    def __post_init__(self) -> None:
        _keep(self, every=_length, factor=_above_0_to_1)

    def __call__(self, step: int, total: int) -> float:
        """The factor of a step."""
        return self.factor ** (step // _steps(self.every, total))


@dataclass(frozen=True)
class Exponential:
    """final^x: from 1 down to nearly `final` (Senior et al., 2013, "exponential scheduling").

    A `final` above 1 goes up, to look for the largest learning rate that works (Smith, 2017). Raises ConfigError for a
    `final` that is not above 0.
    """

    final: float = 0.01

    def __post_init__(self) -> None:
        _keep(self, final=partial(specs.number, low_open=True))

    def __call__(self, step: int, total: int) -> float:
        """The factor of a step."""
        return self.final ** (step / total)


@dataclass(frozen=True)
class InverseTime:
    """1 / (1 + (1 / final - 1) x): from 1 down to nearly `final` (Robbins and Monro, 1951; Senior et al., 2013).

    Raises ConfigError for a `final` that is not above 0 to 1.
    """

    final: float = 0.1

    def __post_init__(self) -> None:
        _keep(self, final=_above_0_to_1)

    def __call__(self, step: int, total: int) -> float:
        """The factor of a step."""
        return self.final / (self.final + (1 - self.final) * (step / total))  # 1 / final may be too large


@dataclass(frozen=True)
class Polynomial:
    """final + (1 - final) (1 - x)^power: from 1 down to nearly `final` (Liu, Rabinovich and Berg, 2015, "poly").

    Raises ConfigError for a power that is not above 0, and a `final` that is not from 0 to 1.
    """

    power: float = 1.0
    final: float = 0.0

    def __post_init__(self) -> None:
        _keep(self, power=partial(specs.number, low_open=True), final=_from_0_to_1)

    def __call__(self, step: int, total: int) -> float:
        """The factor of a step."""
        return self.final + (1 - self.final) * (1 - step / total) ** self.power


@dataclass(frozen=True)
class Cosine:
    """final + (1 - final) (1 + cos(pi x)) / 2: from 1 down to nearly `final` (Loshchilov and Hutter, 2017).

    Raises ConfigError for a `final` that is not from 0 to 1.
    """

    final: float = 0.0

    def __post_init__(self) -> None:
        _keep(self, final=_from_0_to_1)

    def __call__(self, step: int, total: int) -> float:
        """The factor of a step."""
        return self.final + (1 - self.final) * (0.5 * (1 + math.cos(math.pi * step / total)))


@dataclass(frozen=True)
class CosineRestarts:
    """Cosine from 1 to `final` over and over, each period `growth` times the last (Loshchilov and Hutter, 2017, SGDR).

        final + (1 - final) (1 + cos(pi T_cur / T_i)) / 2,    T_(i+1) = growth T_i

    with T_0 the first period and T_cur the steps since the last restart. Raises ConfigError for a period that is no
    length, a growth below 1, and a `final` that is not from 0 to 1.
    """

    period: float = 0.25
    growth: float = 1.0
    final: float = 0.0

    def __post_init__(self) -> None:
        _keep(self, period=_length, growth=partial(specs.number, low=1.0), final=_from_0_to_1)

    def __call__(self, step: int, total: int) -> float:
        """The factor of a step."""
        current, period = float(step), float(_steps(self.period, total))
        if self.growth == 1:
            current %= period
        while current >= period:
            current -= period
            period *= self.growth
        return self.final + (1 - self.final) * (0.5 * (1 + math.cos(math.pi * current / period)))


@dataclass(frozen=True)
class OneCycle:
    """Up from `start` to 1, then down to `final`, each along half a cosine (Smith, 2018; Smith and Topin, 2018).

        a + (b - a) (1 - cos(pi p)) / 2    from a to b, with p from 0 to 1

    The peak, where lr is reached, is step peak_at total - 1, at least 0; the last step's factor is `final`. It is
    PyTorch's OneCycleLR with anneal_strategy="cos" (whose `final` is start / 1e4), without the cycle of the momentum.
    Raises ConfigError for a value that is not from 0 to 1.
    """

    peak_at: float = 0.3
    start: float = 1 / 25
    final: float = 1e-5

    def __post_init__(self) -> None:
        _keep(self, peak_at=_from_0_to_1, start=_from_0_to_1, final=_from_0_to_1)

    def __call__(self, step: int, total: int) -> float:
        """The factor of a step."""
        peak = max(0.0, self.peak_at * total - 1)
        if step < peak:
            a, b, p = self.start, 1.0, step / peak
        elif step == peak:
            return 1.0
        else:
            a, b, p = 1.0, self.final, (step - peak) / (total - 1 - peak)
        return a + (b - a) * (0.5 * (1 - math.cos(math.pi * p)))


@dataclass(frozen=True)
class Warmup:
    """start + (1 - start) step / n over the first n = `steps`, then the schedule `then` (Goyal et al., 2017).

    `then` is a schedule, or one as text; it sees (step - n, total - n): its fractions are of what is left of the run.
    Raises ConfigError for `steps` that are no length, a `start` that is not from 0 to 1, and a `then` that is no
    schedule.
    """

    steps: float = 0.05
    then: Schedule | str = "constant"
    start: float = 0.0

    def __post_init__(self) -> None:
        _keep(self, steps=_length, then=lambda owner, name, value: choose_schedule(value), start=_from_0_to_1)

    def __call__(self, step: int, total: int) -> float:
        """The factor of a step."""
        n = _steps(self.steps, total)
        if step < n:
            return self.start + (1 - self.start) * (step / n)
        return choose_schedule(self.then)(step - n, total - n)

    def during(self, costs: Sequence[float]) -> Warmup:
        """The same with what `then` is after epochs of these costs."""
        return dataclasses.replace(self, then=during(choose_schedule(self.then), costs))


@dataclass(frozen=True)
class ReduceOnPlateau:
    """Lower by `factor` when the cost has not fallen for more than `patience` epochs (He et al., 2016).

    The rule is that of PyTorch's ReduceLROnPlateau (mode="min", threshold_mode="rel", eps=0). An epoch is good where
    its cost is below (1 - threshold) times the best so far, else bad. After `patience` + 1 bad ones in a row what lr is
    multiplied with becomes `factor` times itself, but at least `minimum`, and for `cooldown` epochs bad ones do not
    count.

    `during` says the schedule of the next epoch, computed anew from all costs so far; the schedule itself is 1. Raises
    ConfigError for a factor that is not from 0 to below 1, `patience` or `cooldown` that are no integers from 0, a
    threshold that is not from 0 to below 1, and a minimum that is not from 0 to 1.
    """

    factor: float = 0.1
    patience: int = 3
    threshold: float = 1e-4
    cooldown: int = 0
    minimum: float = 0.0

    def __post_init__(self) -> None:
        below_1 = partial(specs.number, high=1.0)
        _keep(self, factor=below_1, patience=_count, threshold=below_1, cooldown=_count, minimum=_from_0_to_1)

    def __call__(self, step: int, total: int) -> float:
        """1: before any costs are known."""
        return 1.0

    def during(self, costs: Sequence[float]) -> Schedule:
        """The schedule of the epoch after these costs, one an epoch: the same factor at all its steps."""
        level, best, bad, cooling = 1.0, math.inf, 0, 0
        for cost in costs:
            if cost < best * (1 - self.threshold):
                best, bad = cost, 0
            else:
                bad += 1
            if cooling:
                cooling, bad = cooling - 1, 0
            if bad > self.patience:
                level, bad, cooling = max(level * self.factor, self.minimum), 0, self.cooldown
        return Constant(level)


# By name: what makes the schedule, and whose parameters are the settings that the name takes.
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": Constant,
    "step": Step,
    "exponential": Exponential,
    "inverse_time": InverseTime,
    "polynomial": Polynomial,
    "cosine": Cosine,
    "cosine_restarts": CosineRestarts,
    "warmup": Warmup,
    "one_cycle": OneCycle,
    "plateau": ReduceOnPlateau,
}


def choose_schedule(schedule: Schedule | str | None) -> Schedule:
    """A schedule as it is, one by NAME or NAME:key=value,..., or `constant` for None.

    Raises ConfigError for an unknown name or setting, a value out of range, and a class in the place of a schedule.
    """
    if isinstance(schedule, type):
        raise ConfigError(f"the schedule is the class {schedule.__name__}", f"give one: {schedule.__name__}()")
    if callable(schedule):
        return schedule
    return constant if schedule is None else specs.build("schedule", schedule, SCHEDULES)
