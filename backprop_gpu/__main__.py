"""`python -m backprop_gpu` is `backprop-gpu`. A signal on the way there, or after all, ends it without a word."""

import os
import signal
from types import FrameType

from .interrupts import STOPPING


def main() -> None:
    """Run the command line on the program's arguments, and exit."""
    _leave_at_once()
    from .cli import main as command_line

    try:
        command_line()
    finally:
        _leave_at_once()


def _leave_at_once() -> None:
    """What the signals do, but those that are ignored, as in the background of a script."""
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


if __name__ == "__main__":
    main()
