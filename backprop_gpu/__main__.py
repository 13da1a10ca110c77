"""`python -m backprop_gpu` is `backprop-gpu`, and starts it: without a word where it is stopped on the way."""

import os
import signal


def main() -> None:
    """Run the command line on the program's arguments, and exit."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, lambda which, frame: os._exit(128 + which))  # until the command line knows better
    from .cli import main as command_line

    try:
        command_line()
    finally:  # all is said and done
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
