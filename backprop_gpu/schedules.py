"""Schedules: the learning rate over a run. A schedule maps a step (from 0) and the count of steps to a factor on lr."""

from __future__ import annotations

import math
from collections.abc import Callable

from .errors import lookup

Schedule = Callable[[int, int], float]


def constant(step: int, total: int) -> float:
    """1 at every step."""
    return 1.0


def cosine(step: int, total: int) -> float:
    """(1 + cos(pi step / total)) / 2: from 1 at the first step to nearly 0 at the last (Loshchilov, Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * step / total))


SCHEDULES: dict[str, Schedule] = {"constant": constant, "cosine": cosine}


def choose_schedule(schedule: Schedule | str | None) -> Schedule:
    """A schedule as it is, one by name, or `constant` for None."""
    if callable(schedule):
        return schedule
    return lookup("schedule", "constant" if schedule is None else schedule, SCHEDULES)
