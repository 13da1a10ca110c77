"""What must not be torn apart: steps by signals, and a network by two runs."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:  # signals are looked after before anything is imported that takes time
    from .network import Network

HANGUP: int | None = getattr(signal, "SIGHUP", None)  # of a terminal that goes away; Windows has no such signal
STOPPING: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, *([] if HANGUP is None else [HANGUP]))
_in_training: set[int] = set()
_in_training_lock = threading.Lock()


def answer(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Let `handler` answer STOPPING, but for signals that are ignored, as in the background of a script.

    Raises ValueError outside the main thread, as signal.signal does.
    """
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


@contextlib.contextmanager
def alone(net: Network) -> Iterator[None]:
    """ConfigError where this very network is being trained already, by another thread or further up."""
    with _in_training_lock:
        if id(net) in _in_training:
            raise ConfigError("this network is being trained already", "train a copy of it: copy.deepcopy(net)")
        _in_training.add(id(net))
    try:
        yield
    finally:
        with _in_training_lock:
            _in_training.discard(id(net))


class WholeSteps:
    """Holds back Ctrl-C, and SIGTERM and SIGHUP where the program handles them, until `deliver` between two steps.

    A second signal is not held back, unless it is SIGHUP: of a terminal that goes away one comes from the shell and one
    from the kernel. Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._waiting: int | None = None

    def __enter__(self) -> WholeSteps:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._hold)
        return self

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self._waiting is not None:
            if number == HANGUP:
                return
            self._waiting = None
            self._handlers[number](number, frame)
        self._waiting = number

    @property
    def waiting(self) -> bool:
        """Whether a signal is held."""
        return self._waiting is not None

    def deliver(self) -> None:
        """Let a held signal do what it would have done."""
        if self._waiting is not None:
            number, self._waiting = self._waiting, None
            self._handlers[number](number, None)

    def __exit__(self, *raised: object) -> None:
        for which, handler in self._handlers.items():
            signal.signal(which, handler)
        self.deliver()
