"""The file that a run is kept in: when it is written, what has to be the same to go on from it, and what it tells."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import blas, checkpoint
from .activations import OUTPUT, Array
from .backend import Backend, guarded, to_host
from .checkpoint import MOST_WORDS, Checkpoint, RunState
from .costs import MAKERS, Cost
from .errors import CheckpointError, ConfigError
from .inputs import Samples
from .network import Network

ON_ERROR = ("raise", "warn")
_UNITS = {"step": 0, "epoch": 0, "second": 1, "minute": 60, "hour": 3600}  # seconds in it


@dataclass(frozen=True)
class Interval:
    """So many steps or epochs of the run, or so many seconds; the other two are None."""

    steps: int | None = None
    epochs: int | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, text: Any) -> Interval:
        """ "500 steps", "2 epochs", "90 seconds", "5 minutes", "1 hour"; ConfigError for anything else."""
        found = isinstance(text, str) and re.fullmatch(
            r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*(step|epoch|second|minute|hour)s?\s*", text, re.ASCII
        )
        if found and float(found[1]) > 0:
            count, unit = found[1], found[2]
            if _UNITS[unit]:
                return cls(seconds=float(count) * _UNITS[unit])
            if count.isdigit():
                return cls(**{f"{unit}s": int(count)})
        raise ConfigError(f"checkpoint_every is {text!r}", 'write "500 steps", "2 epochs" or "5 minutes"')


class Checkpoints:
    """The file `path`, written each `every` (None: only at the end) and read again to go on.

    `on_error`: whether a write that fails while the run is under way ends the run, "raise", or is told by a warning.
    Raises ConfigError and CheckpointError for what cannot be.
    """

    def __init__(self, path: str | os.PathLike[str], every: Any, on_error: str) -> None:
        self.path = Path(checkpoint.check_target(path))
        self.name = os.fspath(path)
        self.every = Interval() if every is None else Interval.of(every)
        if on_error not in ON_ERROR:
            raise ConfigError(f"on_checkpoint_error is {on_error!r}", 'write "raise" or "warn"')
        self.on_error = on_error
        self.saved: tuple[Any, ...] | None = None  # where the run stood when it was written last
        self._known: tuple[int, ...] | None = None  # by what the file of then is known again
        self._written = time.monotonic()
        self._threads = blas.threads.now()  # outside of a run, which sets it from product to product

    def until(self, step: int) -> int | None:
        """How many steps may be taken after `step` before it has to be looked whether a checkpoint is due."""
        return self.every.steps and self.every.steps - step % self.every.steps

    def due(self, step: int) -> bool:
        """Whether it is after that step of the run."""
        return (self.every.steps is not None and step % self.every.steps == 0) or self._late()

    def due_after_epoch(self, epoch: int) -> bool:
        """Whether it is after that epoch."""
        return (self.every.epochs is not None and epoch % self.every.epochs == 0) or self._late()

    def _late(self) -> bool:
        return self.every.seconds is not None and time.monotonic() - self._written >= self.every.seconds

    def write(self, net: Network, state: Callable[[], RunState], last: bool) -> None:
        """Write it, unless the run stands where it stood. `last`: the run ends here. Raises CheckpointError."""
        self._written, step = time.monotonic(), ""
        try:
            with self._as_checkpoint_errors():
                run = state()
                step = f" of step {run.step}"
                if run.stands != self.saved or self.kept() is None:
                    self._replace(net, run)
        except CheckpointError as e:
            if last or self.on_error == "raise":
                raise
            warnings.warn(f"no checkpoint{step}: {e.cause}; the run goes on", stacklevel=2)

    @contextlib.contextmanager
    def _as_checkpoint_errors(self) -> Iterator[None]:
        """While a state is gathered and written."""
        try:
            yield
        except MemoryError:
            raise CheckpointError(f"{self.name} is not written: out of memory", "free some memory") from None
        except (TypeError, ValueError) as e:
            raise CheckpointError(f"{self.name} is not written: {_shown(e)}", "leave the history as it is") from e

    def _replace(self, net: Network, run: RunState) -> None:
        before = self._seen()
        try:
            checkpoint.write(net, self.path, run)
        finally:
            if (now := self._seen()) not in (None, before):  # also where its directory could not be flushed
                self.saved, self._known = run.stands, now

    def kept(self) -> int | None:
        """After which step the run is in the file; None where there is none, or another's by now."""
        return self.saved[0] if self.saved and self._seen() == self._known else None

    def _seen(self) -> tuple[int, ...] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def read(self, net: Network, cost: Cost, settings: Mapping[str, Any], epochs: int) -> Checkpoint | None:
        """What `net` is to go on from; None where there is nothing yet. `net` stays as it is.

        Raises CheckpointError for a file that cannot be trusted or holds no run, ConfigError for a run with other
        settings.
        """
        self._known = self._seen()
        try:
            if not self.path.stat().st_size:
                return None
        except FileNotFoundError:
            return None
        own = {f.name: f for f in (*net.f[1:], net.g) if f.name not in OUTPUT}
        costs = [cost] if cost.name.partition(":")[0] not in MAKERS else []
        found = checkpoint.read(self.path, net.backend.name, [*own.values(), *costs])
        run = found.run
        if run is None:
            raise CheckpointError(
                f"{self.name} holds a network, but no run to go on with", "leave resume out, or save to another file"
            )
        here, there = ({name: getattr(of, name) for name in checkpoint.SETTINGS} for of in (net, found.net))
        if other := _difference(here, there) or _difference(settings, run.settings):
            name, mine, its = map(_shown, other)
            shown = "other data" if name.partition(" ")[0] in _DATA else f"{mine}, not {its}"
            raise ConfigError(f"{name} is {shown} as in the run that {self.name} holds", _SAME)
        if epochs < run.epochs:
            raise ConfigError(f"epochs is {epochs}, not {run.epochs} as in the run that {self.name} holds", _MORE)
        self.saved = run.stands
        return found

    def begin_anew(self) -> None:
        """Warn where the file holds a run that is not over, and that this one will replace."""
        step = checkpoint.unfinished(self.path)
        if step is not None:
            warnings.warn(
                f"{self.name} holds a run that is not over, after step {step}: what this one saves will replace it "
                "(resume goes on with it)",
                stacklevel=3,
            )

    def whereabouts(self, be: Backend, executor: str) -> dict[str, Any]:
        """On what the last bits of a run depend beside its settings."""
        rung = executor.partition(":")[0]  # without the reason
        rung = rung.replace("replay", "eager") if be.name == "numpy" else rung  # the same bits
        rung = rung.replace(", data streamed", "")
        found: dict[str, Any] = {"executor": executor, "backend": be.name, "device": be.device, "rung": rung}
        found["numpy"] = np.__version__  # which draws the orders everywhere
        if be.name == "cupy":
            return {**found, "cupy": be.xp.__version__}
        found |= {"blas": blas.core(), "threads": self._threads}
        return {**found, "numba_threads": be.ops.threads()} if be.fast else found

    def compare(self, run: RunState, where: Mapping[str, Any]) -> None:
        """Warn where the last bits will not be those of a run that was never stopped."""
        keys = [key for key in where if key != "executor" and where[key] != run.where.get(key)]
        other = [f"{key} {where[key]}, not {_shown(run.where.get(key))}" for key in keys]
        if other:
            warnings.warn(
                f"the run goes on elsewhere than it began ({'; '.join(other)}): its last bits may differ from those "
                "of a run that was never stopped",
                stacklevel=2,
            )


_DATA = ("X", "T", "weights", "validation")
_SAME = "go on with the same settings, or save to another file"
_MORE = "give as many epochs or more, or save to another file"


def _difference(here: Mapping[str, Any], there: Mapping[str, Any], inside: str = "") -> tuple[str, Any, Any] | None:
    """The first setting that differs: its name, its value in each."""
    for name in dict.fromkeys([*here, *there]):
        mine, its = here.get(name), there.get(name)
        if mine == its:
            continue
        if isinstance(mine, dict) and isinstance(its, dict) and mine.get("name") == its.get("name"):
            if found := _difference(mine, its, f" of {name}"):
                return found
            continue
        mine, its = (v.get("name", v) if isinstance(v, dict) else v for v in (mine, its))
        return f"{name}{inside}", mine, its
    return None


def _shown(value: Any) -> str:
    """What a file says, in a line."""
    return " ".join(str(value).split())[:MOST_WORDS]


def described(value: Any) -> Any:
    """A setting in JSON's words: a rule or schedule by name and fields, a function of one's own by its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: described(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"name": type(value).__name__, **fields}
    if isinstance(value, (tuple, list)):
        return [described(v) for v in value]
    if isinstance(value, np.generic):
        return described(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def digests(samples: Samples) -> dict[str, str | None]:
    """SHA-256 of the data as it is trained on: X, T and weights."""
    return {
        name: None if a is None else digest(a)
        for name, a in zip(_DATA, (samples.X, samples.T, samples.weights), strict=False)
    }


def digest(a: Array) -> str:
    """SHA-256 of an array: dtype, shape and elements."""
    with guarded(a):
        host = np.ascontiguousarray(to_host(a))
    found = hashlib.sha256(f"{host.dtype.str}{host.shape}".encode())
    found.update(host.data)
    return found.hexdigest()
