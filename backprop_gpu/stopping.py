"""When a run ends before its epochs are over, and with which parameters."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Sequence
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
        self.time_limit = _limit("time_limit", time_limit, low_open=True)
        self.best: Any = None  # the parameters of the best epoch so far
        self._best_cost, self._best_epoch, self._last_epoch = math.inf, 0, 0
        self.start(0.0)

    def start(self, elapsed: float) -> None:
        """The run begins, or goes on after so many seconds of it."""
        self._deadline = None if self.time_limit is None else time.perf_counter() + self.time_limit - elapsed

    def go_on(self, costs: Sequence[float | None], best: Any) -> None:
        """Epochs of these validation costs were, and no others; `best`: the parameters of the best of them."""
        if self.patience is None:
            return
        self.best, self._best_cost, self._best_epoch, self._last_epoch = None, math.inf, 0, len(costs)
        for epoch, cost in enumerate(costs, 1):
            if cost is not None and cost < self._best_cost:
                self._best_cost, self._best_epoch, self.best = cost, epoch, best

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
        moved: float | None,
    ) -> str:
        """Why the run ends after this epoch; empty where it goes on.

        `cost`: of validation, after the epoch. `moved`: how far a parameter has moved in it at most; None where no
        learning rate in the epoch was above 0, for to stand still means nothing then.
        """
        self._last_epoch = epoch
        if self.patience is not None and cost is not None and cost < self._best_cost:
            self._best_cost, self._best_epoch, self.best = cost, epoch, self.net.theta.copy()
        if callback:
            return "callback"
        if self.gradient_tolerance is not None and (gradient_norm or 0.0) <= self.gradient_tolerance:
            return "gradient"
        if moved is not None and self.parameter_tolerance is not None and moved <= self.parameter_tolerance:
            return "still"
        if self.patience is not None and epoch - self._best_epoch >= self.patience:
            return "patience"
        return "time" if late else ""

    def outcome(self) -> tuple[int | None, Any]:
        """The best epoch, and its parameters where the network has others; None and None without patience."""
        if not self._best_epoch:
            return None, None
        return self._best_epoch, None if self._best_epoch == self._last_epoch else self.best


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


def natural(name: str, value: Any) -> int:
    """An integer from 0, or ConfigError."""
    try:
        count = operator.index(value)
    except TypeError:
        count = -1
    if count < 0:
        raise ConfigError(f"{name} is {value!r}", "give an integer, 0 or more")
    return count


def _limit(name: str, value: Any, low_open: bool = False) -> float | None:
    return None if value is None else number("train", name, value, low_open=low_open)
