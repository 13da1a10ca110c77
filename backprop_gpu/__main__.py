"""`python -m backprop_gpu` is `backprop-gpu`. A signal on the way there, or after all, ends it without a word."""

import os
from types import FrameType

from .interrupts import answer


def main() -> None:
    """Run the command line on the program's arguments, and exit."""
    answer(_leave)
    from .cli import main as command_line

    try:
        command_line()
    finally:
        answer(_leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


if __name__ == "__main__":
    main()
