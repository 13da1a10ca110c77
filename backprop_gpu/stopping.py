"""When a run ends before its epochs are over, and with which parameters."""

from __future__ import annotations

import math
import operator
import time
from typing import Any

from .errors import ConfigError
from .network import Network
from .specs import number


class Ending:
    """The rules of one run, looked at after every epoch; a rule that is None is off.

    `gradient_tolerance`: the norm of the whole gradient is at most that (source 4, step 4). `parameter_tolerance`: no
    parameter moved by more in the epoch; 0 is while(theta^(i+1) != theta^i) (source 3). `patience`: so many epochs have
    passed without a lower validation cost; then, and at any other end, the parameters of the best epoch come back.
    `time_limit`: seconds from now; it is looked at after every step.

    Raises ConfigError for values that make no sense.
    """

    def __init__(
        self,
        net: Network,
        patience: int | None,
        gradient_tolerance: float | None,
        parameter_tolerance: float | None,
        time_limit: float | None,
    ) -> None:
        self.net = net
        self.patience = None if patience is None else positive("patience", patience)
        self.gradient_tolerance = _limit("gradient_tolerance", gradient_tolerance)
        self.parameter_tolerance = _limit("parameter_tolerance", parameter_tolerance)
        seconds = _limit("time_limit", time_limit, low_open=True)
        self._deadline = None if seconds is None else time.perf_counter() + seconds
        self._before: Any = None
        self._best: Any = None
        self._best_cost, self._best_epoch, self._last_epoch = math.inf, 0, 0

    def begin_epoch(self) -> None:
        """Keep the parameters that the epoch starts from, if they will be asked for."""
        if self.parameter_tolerance is not None:
            self._before = self.net.theta.copy()

    def late(self) -> bool:
        """Whether the time is over."""
        return self._deadline is not None and time.perf_counter() > self._deadline

    def reason(
        self,
        epoch: int,
        callback: bool,
        gradient_norm: float | None,
        cost: float | None,
        late: bool,
        moving: bool,
    ) -> str:
        """Why the run ends after this epoch; empty where it goes on.

        `cost`: of validation, after the epoch. `moving`: whether any learning rate in the epoch was above 0; where none
        was, to stand still means nothing.
        """
        self._last_epoch = epoch
        if self.patience is not None and cost is not None and cost < self._best_cost:
            self._best_cost, self._best_epoch, self._best = cost, epoch, self.net.theta.copy()
        if callback:
            return "callback"
        if self.gradient_tolerance is not None and (gradient_norm or 0.0) <= self.gradient_tolerance:
            return "gradient"
        if moving and self.parameter_tolerance is not None and self._moved() <= self.parameter_tolerance:
            return "still"
        if self.patience is not None and epoch - self._best_epoch >= self.patience:
            return "patience"
        return "time" if late else ""

    def _moved(self) -> float:
        return float(abs(self.net.theta - self._before).max())

    def restore(self) -> int | None:
        """Give the network the parameters of the best epoch, and say which it was; None without patience."""
        if not self._best_epoch:
            return None
        if self._best_epoch != self._last_epoch:
            self.net.theta[...] = self._best
        return self._best_epoch


def positive(name: str, value: Any) -> int:
    """An integer from 1, or ConfigError."""
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ConfigError(
            f"{name} is {value!r}",
            'give an integer, 1 or more, or "full"' if name == "batch_size" else "give an integer, 1 or more",
        )
    return count


def _limit(name: str, value: Any, low_open: bool = False) -> float | None:
    return None if value is None else number("train", name, value, low_open=low_open)
