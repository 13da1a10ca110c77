"""Training steps ready to be timed, and the clock: exactly the steps that `training.train` runs.

Times are the host's clock between two waits for the device, over as many runs as fill LEAST seconds; what is compared
is run in turn, A/B/A/B, and of the repetitions the median counts.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import training
from .backend import Backend, to_host
from .batches import check_seed, epoch_plan
from .costs import Cost, choose_cost
from .errors import ConfigError, DivergenceError
from .executors import Eager, Problem, choose
from .network import Network
from .optimizers import Optimizer, choose_optimizer
from .regularization import Regularization
from .stopping import positive
from .streaming import room_for

STEPS = 64  # of an epoch, where nobody says how many
LEAST = 0.02  # seconds of a repetition
REPETITIONS = 5  # at least

# --------------------------------------------------------------------------------------------------------- the steps


class Stepping:
    """Training steps of a network, run exactly as `train` runs them, ready to be timed or looked at.

    Trains `net` in place on X (m, N_0) and T, as in `train`, at the rule's own learning rate. The rows of the steps are
    those of `train(..., seed=seed)`, epoch after epoch; an "epoch" here, the stretch between two `begin` of the
    executor, is `steps` steps, or fewer where they would see all samples twice. `order`: instead of that the rows of
    each step, a sequence of index arrays of up to batch_size each, which starts over when it is through. `executor`:
    what makes the executor, `executors.choose` or one of its classes.

    Raises ConfigError and DataError as `train` does. A context manager, which closes it.
    """

    def __init__(
        self,
        net: Network,
        X: Any,
        T: Any,
        rule: Optimizer | str,
        batch_size: int,
        cost: Cost | str | None = None,
        seed: int = 0,
        steps: int = STEPS,
        order: Sequence[np.ndarray] | None = None,
        executor: Callable[[Problem, Optimizer, int, int, int], Eager] = choose,
    ) -> None:
        self.net, self.rule = net, choose_optimizer(rule)
        chosen = choose_cost(cost, net.output)
        samples = training._samples(net, X, T, chosen)
        n, seed = len(samples), check_seed(seed)
        self.batch_size = min(positive("batch_size", batch_size), n)
        most = 2 * n // self.batch_size  # as many rows as an executor's order has room for
        self.steps = min(positive("steps", steps), most) if order is None else len(order)
        self._batches = _drawn(n, self.batch_size, seed) if order is None else _given(order, n, self.batch_size)
        self._epoch, self._t, self._done, self._ends = 0, 1, 0, [0]
        with net.backend.active():
            room = room_for(net, [samples], self.rule, self.batch_size)
            placed = samples.on(net.backend.asarray if room is None else to_host)
            problem = Problem(net, chosen, placed, "mean", Regularization(), 0, room)
            self.executor = executor(problem, self.rule, self.batch_size, seed, self.steps)

    def run(self, k: int) -> None:
        """Run k steps; on a GPU they may still be under way then. Raises DivergenceError where they cannot go on."""
        with self.net.backend.active():
            while k > 0:
                if self._done == len(self._ends) - 1:
                    self._begin()
                taken = self.executor.run(self._done, min(k, len(self._ends) - 1 - self._done))
                if not taken:
                    self._finish()
                self._done += taken
                k -= taken

    def _begin(self) -> None:
        """The next epoch."""
        self._finish()
        self._epoch, self._t = self._epoch + 1, self._t + self._done
        batches = list(itertools.islice(self._batches, self.steps))
        self._ends, self._done = [0, *itertools.accumulate(map(len, batches))], 0
        self.executor.begin(np.concatenate(batches), self._ends, [self.rule.lr] * self.steps, self._t)

    def _finish(self) -> None:
        """The end of an epoch, as `train` has it; here the host hears that a run diverged."""
        self.executor.finish()
        if step := int(self.executor.diverged[0]):
            raise DivergenceError(self._epoch, step, self.rule.lr)

    def wait(self) -> None:
        """Return when the device has done all steps."""
        wait_for(self.net.backend)

    @property
    def losses(self) -> np.ndarray:
        """The mean cost of each step since the last `begin`, before its update, float64. Waits for the device."""
        with self.net.backend.active():
            self._finish()
            sums = to_host(self.executor.measured)[: self._done, 0]
        return sums / np.diff(self._ends)[: self._done]

    def close(self) -> None:
        """Wait for the device, and let go of it."""
        with self.net.backend.active():
            self.executor.close()

    def __enter__(self) -> Stepping:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _drawn(n: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """The rows of each step of `train`, epoch after epoch."""
    for epoch in itertools.count(1):
        order, ends = epoch_plan("shuffled", n, batch_size, seed, epoch)
        yield from np.split(order, ends[1:-1])


def _given(order: Sequence[np.ndarray], n: int, batch_size: int) -> Iterator[np.ndarray]:
    """The rows of each step as a user names them, over and over."""
    batches = [np.asarray(rows, np.int64) for rows in order]
    if not batches:
        raise ConfigError("order holds no steps", "give the rows of at least one")
    for i, rows in enumerate(batches):
        if rows.ndim != 1 or not 1 <= len(rows) <= batch_size or rows.min() < 0 or rows.max() >= n:
            raise ConfigError(
                f"order: step {i + 1} has no rows to train on", f"give 1 to {batch_size} indices below {n} for each"
            )
    if sum(map(len, batches)) > 2 * n:
        raise ConfigError(f"order names more than {2 * n} rows, of {n} samples", "give fewer steps; they start over")
    return itertools.cycle(batches)


def wait_for(be: Backend) -> None:
    """Return when the device has done what it was given."""
    if be.index is not None:
        with be.active():
            be.xp.cuda.get_current_stream().synchronize()


# --------------------------------------------------------------------------------------------------------- the clock


class Program(NamedTuple):
    """Something to time: `run` starts `steps` steps, `wait` returns when all that was started is done."""

    run: Callable[[], Any]
    wait: Callable[[], Any]
    steps: int = 1


@dataclass(frozen=True)
class Times:
    """Seconds a step, one number a repetition."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Their median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The largest less the least, over the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def timed(
    programs: Mapping[str, Program], seconds: float = 2.0, least: float = LEAST, rest: float = 0.0
) -> dict[str, Times]:
    """Each program's times, in turn, until so many seconds have passed for each, REPETITIONS times at least.

    A repetition rests for `rest` seconds, then runs a program as often as it takes to fill `least` seconds.
    """
    often = {name: max(1, round(least / max(clocked(program, 2), 1e-9))) for name, program in programs.items()}
    taken: dict[str, list[float]] = {name: [] for name in programs}
    end = time.perf_counter() + seconds * (1 + rest / max(least, 1e-9)) * len(programs)
    while time.perf_counter() < end or min(map(len, taken.values())) < REPETITIONS:
        for name, program in programs.items():
            time.sleep(rest)
            taken[name].append(clocked(program, often[name]) / program.steps)
    return {name: Times(tuple(times)) for name, times in taken.items()}


def clocked(program: Program, times: int) -> float:
    """Seconds a run."""
    program.wait()
    start = time.perf_counter()
    for _ in range(times):
        program.run()
    program.wait()
    return (time.perf_counter() - start) / times
