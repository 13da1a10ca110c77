"""The errors of this library: each is one line of cause and one line of cure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

V = TypeVar("V")


class BackpropGPUError(Exception):
    """What every error of this library derives from.

    `cause` says what is wrong, `cure` what to do about it; each is one line, and `str(error)` is both.
    """

    def __init__(self, cause: str, cure: str) -> None:
        super().__init__(cause, cure)
        self.cause = cause
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.cause}\n{self.cure}"


class DataError(BackpropGPUError, ValueError):
    """Data that cannot be trained on or read: shapes, dtypes, labels, non-finite values, damaged files."""


class ConfigError(BackpropGPUError, ValueError):
    """A setting that makes no sense: an unknown name, an impossible width, an illegal pair."""


class BackendError(BackpropGPUError, RuntimeError):
    """The backend that was asked for cannot be used on this machine."""


class CheckpointError(BackpropGPUError, OSError):
    """A model file that cannot be written, read or trusted. `errno` is the system's, where there was one."""

    def __init__(self, cause: str, cure: str, errno: int | None = None) -> None:
        super().__init__(cause, cure)
        self.errno = errno

    def __reduce__(self) -> tuple[type[CheckpointError], tuple[str, str, int | None]]:
        return type(self), (self.cause, self.cure, self.errno)


class DivergenceError(BackpropGPUError, ArithmeticError):
    """Training left the finite numbers. The network holds the parameters from before that step.

    Attributes: `epoch` and `step` (both counted from 1; `step` over the whole run), `learning_rate` of that step, and
    `cost`, the mean cost of the step before it; None where it is the first.
    """

    def __init__(self, epoch: int, step: int, learning_rate: float, cost: float | None = None) -> None:
        before = "" if cost is None else f" (cost before it {cost:g})"
        super().__init__(
            f"training diverged in epoch {epoch}, step {step}, learning rate {learning_rate:g}{before}: "
            "the cost, its gradient's squared norm or the step's outcome is not finite",
            "lower the learning rate (a third of it is a good next try), scale the inputs to about -1..1, "
            "or use the initialiser meant for the activation",
        )
        self.epoch = epoch
        self.step = step
        self.learning_rate = learning_rate
        self.cost = cost

    def __reduce__(self) -> tuple[type[DivergenceError], tuple[int, int, float, float | None]]:
        return type(self), (self.epoch, self.step, self.learning_rate, self.cost)


def lookup(what: str, name: object, table: Mapping[str, V]) -> V:
    """The entry `name` of a table; an unknown name is a ConfigError that offers the nearest known ones."""
    if isinstance(name, str) and name in table:
        return table[name]
    near = difflib.get_close_matches(name.lower(), table, n=2) if isinstance(name, str) else []
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ConfigError(f"unknown {what} {name!r}", f"{hint}known: {', '.join(table)}")
