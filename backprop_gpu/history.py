"""A training run as its user sees it: the history that it leaves, the state that callbacks are shown, the callbacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from . import blas
from .errors import ConfigError
from .network import Network


@dataclass
class History:
    """What happened, one entry an epoch in each list.

    `train_cost`, `train_accuracy`: means over the epoch's training steps, each step measured before its update (with
    reduction "sum" the sum of the costs), without penalties. `validation_cost`, `validation_accuracy`: after the epoch.
    Accuracies are None for regression, validation without data. `gradient_norms`: where asked for, ||dC/dW[l]|| of each
    layer l = 1..L, of the gradient over all the training data after the epoch. `lr`: of the epoch's last step. `steps`:
    done so far. `seconds`: the epoch's wall time, validation and gradient norms left out.

    `samples`: how many the steps have seen, each as often as it was. `stopped` says why the run ended: "epochs",
    "gradient", "still", "patience", "time" or "callback". `best_epoch` is the one whose parameters the network has,
    where `patience` was given. `executor`: how steps were run, "eager", "replay", "compiled" or "graph" (see
    `executors`), with ", numba" where it compiles the operations, and ", data streamed" where the data stays on the
    host (see `streaming`), and `plan` the operations of a graph's step (see `plan.Plan.describe`).
    `gradient_error`: where asked for, see `train`. `retreats`: the steps in which the run diverged and went back.
    `resumed`: the step after which it went on from a file.
    """

    epoch: list[int] = field(default_factory=list)
    train_cost: list[float] = field(default_factory=list)
    train_accuracy: list[float | None] = field(default_factory=list)
    validation_cost: list[float | None] = field(default_factory=list)
    validation_accuracy: list[float | None] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    gradient_norms: list[list[float] | None] = field(default_factory=list)
    samples: int = 0
    stopped: str | None = None
    best_epoch: int | None = None
    executor: str | None = None
    plan: str | None = None
    gradient_error: float | None = None
    retreats: list[int] = field(default_factory=list)
    resumed: int | None = None

    def __len__(self) -> int:
        """How many epochs."""
        return len(self.epoch)


@dataclass
class Run:
    """A training run as callbacks see it.

    `epoch`, from 1, is under way or just over; `step` says how many steps of the whole run are done, `lr` is the last
    one's. Set `stop` to end the run after this epoch. `whole` is False only while a step is under way: then theta may
    be between two steps. `saved`: how many steps were done when the run was last written to its file.
    """

    net: Network
    epochs: int
    steps_per_epoch: int
    history: History
    epoch: int = 0
    step: int = 0
    lr: float = 0.0
    stop: bool = False
    whole: bool = True
    saved: int | None = None


class OnStep(Protocol):
    """What is called after every step.

    On a GPU each is waited for then. One with an attribute `each_step` that is False is called after several steps at
    once instead, which may still be under way on the GPU: it is not to look at theta.
    """

    def on_step(self, run: Run) -> Any:
        """`run.step` steps are done."""


Callback = Callable[[Run], Any] | OnStep
Hook = Callable[[Run], Any]


def hooks(callbacks: Any) -> tuple[list[Hook], list[Hook]]:
    """What to call after each step, and after each epoch."""
    if not isinstance(callbacks, (list, tuple)) or not all(callable(c) or hasattr(c, "on_step") for c in callbacks):
        raise ConfigError(
            f"callbacks is {callbacks!r}",
            "give a list of functions of the run, or of objects with a method on_step(run)",
        )
    return [c.on_step for c in callbacks if hasattr(c, "on_step")], [c for c in callbacks if callable(c)]


def call(callback: Hook, run: Run) -> None:
    """Call it; what it raises says where."""
    try:
        with blas.threads.lent():
            callback(run)
    except Exception as e:
        e.add_note(
            f"raised by the callback {callback!r} in epoch {run.epoch}, after step {run.step}; "
            "the network is at that whole step"
        )
        raise
