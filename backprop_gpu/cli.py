"""The command line: train, evaluate, predict, doctor.

Data goes to stdout, everything else to stderr; `--json` prints one JSON object as the last line of stdout. Exit codes:
0 done, 1 bad data, file or run, 2 bad flag or configuration, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
import numpy as np

from . import __version__, backend, checkpoint, datasets, report, training
from .activations import HIDDEN, OUTPUT
from .costs import COSTS
from .errors import BackpropGPUError, ConfigError, DataError, lookup
from .initializers import INITIALIZERS
from .network import PRECISIONS, Network
from .optimizers import OPTIMIZERS, choose_optimizer
from .schedules import SCHEDULES

PROGRAM = "backprop-gpu"
BACKENDS = ("auto", "numpy", "cupy")
MOST_CLASSES = 65536  # where the data's labels set the number of outputs


class Name(click.ParamType):
    """One name of a table; an unknown one is answered with the nearest."""

    def __init__(self, what: str, names: Iterable[str]) -> None:
        self.name = what
        self._names = {name: name for name in names}

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """The choices, for --help."""
        return "|".join(self._names)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name, if it is one."""
        return lookup(self.name, value, self._names)


class Layers(click.ParamType):
    """All widths of a network, with comma, dash or slash between them."""

    name = "widths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """The widths."""
        parts = re.split(r"[,/-]", str(value).strip())
        if not all(re.fullmatch(r"\s*[0-9]{1,18}\s*", part, re.ASCII) for part in parts):
            raise ConfigError(f"--layers {value!r} is not a list of widths", "give all widths, such as 784,512,10")
        return [int(part) for part in parts]


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
on_backend = click.option("--backend", "where", type=Name("backend", BACKENDS), default="auto", show_default=True)


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """Train multilayer perceptrons by backpropagation: on a CUDA GPU with CuPy, on NumPy everywhere else."""


@cli.command()
@click.option("--data", default="mnist", show_default=True, metavar="mnist|DIR|FILE.npz", help="IDX files or arrays.")
@click.option("--layers", type=Layers(), help="All widths, such as 784,512,10. Default: the data's, with 512 between.")
@click.option(
    "--activation", type=Name("activation", HIDDEN), default="relu", show_default=True, help="Of hidden layers."
)
@click.option("--output", type=Name("output function", OUTPUT), help="Default: softmax for labels, else identity.")
@click.option("--cost", type=Name("cost", COSTS), help="Default: the one that goes with the output.")
@click.option("--init", type=Name("initialiser", INITIALIZERS), default="he", show_default=True, help="Of the weights.")
@click.option("--bias/--no-bias", default=True, show_default=True)
@click.option("--optimizer", type=Name("optimizer", OPTIMIZERS), default="adam", show_default=True)
@click.option("--lr", type=float, help=f"Default: {', '.join(f'{n} {lr:g}' for n, (lr, _) in OPTIMIZERS.items())}.")
@click.option("--schedule", type=Name("schedule", SCHEDULES), default="cosine", show_default=True, help="Of lr.")
@click.option("--epochs", type=int, default=10, show_default=True)
@click.option("--batch-size", type=int, default=128, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@on_backend
@click.option("--precision", type=Name("precision", PRECISIONS), default="float32", show_default=True)
@click.option("--save", type=click.Path(path_type=Path), metavar="FILE", help="Write the model here, as safetensors.")
@as_json
def train(
    data: str,
    layers: list[int] | None,
    activation: str,
    output: str | None,
    cost: str | None,
    init: str,
    bias: bool,
    optimizer: str,
    lr: float | None,
    schedule: str,
    epochs: int,
    batch_size: int,
    seed: int,
    where: str,
    precision: str,
    save: Path | None,
    as_json: bool,
) -> None:
    """Train a network and measure it on the test data."""
    rule = choose_optimizer(optimizer, lr)
    train_set, test_set = datasets.load(data)
    are_labels = train_set.labels.ndim == 1 and train_set.labels.dtype.kind != "f"
    net = Network(
        layers or [train_set.images.shape[1], 512, _outputs(data, train_set.labels, are_labels)],
        hidden=activation,
        output=output or ("softmax" if are_labels else "identity"),
        init=init,
        bias=bias,
        precision=precision,
        seed=seed,
        backend=where,
    )
    if test_set is not None:
        training.check_data(net, *test_set, cost=cost)  # before the training, not after it
    with report.ProgressBar() as bar:
        try:
            history = training.train(
                net,
                *train_set,
                cost=cost,
                optimizer=rule,
                schedule=schedule,
                epochs=epochs,
                batch_size=batch_size,
                callbacks=[bar],
                seed=seed,
                save=save,
            )
        except Stopped as e:
            _tell_stopped(e.word, bar.run, save)
            sys.exit(e.code)
    if save is not None:
        report.tell(f"saved to {save}")
    seconds = sum(history.seconds)
    tested = training.evaluate(net, *test_set) if test_set else None
    result = {
        "backend": net.backend.name,
        "device": net.backend.device,
        "precision": precision,
        "layers": net.layers,
        "parameters": net.parameter_count,
        "epochs": len(history),
        "steps": history.steps[-1],
        "train_seconds": seconds,
        "samples_per_second": len(history) * len(train_set.labels) / seconds,
        "train_cost": history.train_cost[-1],
        "train_accuracy": history.train_accuracy[-1],
        "test_cost": tested.cost if tested else None,
        "test_accuracy": tested.accuracy if tested else None,
        "seed": seed,
    }
    _print(result, report.summary(result, net.backend.reason), as_json)


def _outputs(data: str, labels: np.ndarray, are_labels: bool) -> int:
    """How many outputs the targets of a dataset call for."""
    if not are_labels:
        return math.prod(labels.shape[1:])
    top = int(labels.argmax())
    if int(labels[top]) >= MOST_CLASSES:
        raise DataError(
            f"{data}: label {int(labels[top])} at row {top}", f"number the classes from 0 to {MOST_CLASSES - 1} at most"
        )
    return max(1, int(labels[top]) + 1)


def _tell_stopped(word: str, run: training.Run | None, save: Path | None) -> None:
    """Say where training was stopped and what `train` has saved."""
    step = run.step if run else 0
    if run and not run.whole:
        report.tell(f"{PROGRAM}: {word} in the middle of step {step + 1}; nothing saved")
    elif save is not None and step:
        report.tell(f"{PROGRAM}: {word} after step {step}; the network of that step is saved to {save}")
    else:
        report.tell(f"{PROGRAM}: {word} after step {step}; nothing saved")


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", default="mnist", show_default=True, metavar="mnist|DIR|FILE.npz", help="Its test part is used.")
@on_backend
@as_json
def evaluate(model: Path, data: str, where: str, as_json: bool) -> None:
    """Measure a saved MODEL on test data."""
    net = checkpoint.load_network(model, where)
    _, test_set = datasets.load(data)
    if test_set is None:
        raise DataError(f"{data} has no test data", "save x_test and y_test in it")
    tested = training.evaluate(net, *test_set)
    result = {"test_cost": tested.cost, "test_accuracy": tested.accuracy, "samples": len(test_set.labels)}
    accuracy = "" if tested.accuracy is None else f", accuracy {100 * tested.accuracy:.2f} %"
    _print(result, f"{result['samples']} samples: cost {tested.cost:.4f}{accuracy}", as_json)


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--proba", is_flag=True, help="The probabilities too.")
@on_backend
@as_json
def predict(model: Path, file: Path, proba: bool, where: str, as_json: bool) -> None:
    """Predict the samples of FILE, IDX images or a .npy array, with a saved MODEL: a line each."""
    net = checkpoint.load_network(model, where)
    X = datasets.read_npy(file) if file.suffix == ".npy" else datasets.read_idx(file, 3)
    columns = {"predictions": net.predict(X)}
    if proba:
        columns["probabilities"] = net.predict_proba(X)
    result = report.plain(columns)
    lines = ("\t".join(" ".join(map(str, _row(cell))) for cell in row) for row in zip(*result.values(), strict=True))
    _print(result, "\n".join(lines), as_json)


@cli.command()
@on_backend
@as_json
def doctor(where: str, as_json: bool) -> None:
    """Tell which backend is used and why, and what this machine is made of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason is in the report
        found = report.doctor(backend.choose(where))
    _print(found, report.doctor_text(found), as_json)


def _row(cell: Any) -> list[Any]:
    return cell if isinstance(cell, list) else [cell]


def _print(result: dict[str, Any], text: str, as_json: bool) -> None:
    print(json.dumps(report.plain(result), allow_nan=False) if as_json else text)
    sys.stdout.flush()


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived: the word for it, and the exit code."""

    def __init__(self, word: str, code: int) -> None:
        super().__init__(word, code)
        self.word = word
        self.code = code


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    if number == signal.SIGINT:
        raise Stopped("interrupted", 130)
    raise Stopped("terminated", 143)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line on `args` (None: the program's own) and exit."""
    warnings.showwarning = report.warn  # type: ignore[assignment]
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a narrow terminal shows what it can
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a script
                signal.signal(number, _stop)
    try:
        code = _run(args)
        sys.stdout.flush()
    except OSError as e:  # of stdout: what goes wrong with files is a BackpropGPUError
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1 if isinstance(e, BrokenPipeError) else _fail(f"stdout: {e.strerror or e}", "free some space", 1)
    sys.exit(code)


def _run(args: Sequence[str] | None) -> int:
    """The exit code of a command; every error but those of stdout has been told."""
    try:
        cli.main(args=args, prog_name=PROGRAM, standalone_mode=False)
    except SystemExit as e:
        return int(e.code or 0)
    except click.exceptions.Exit as e:
        return e.exit_code
    except Stopped as e:
        report.tell(f"{PROGRAM}: {e.word}")
        return e.code
    except click.UsageError as e:
        command = e.ctx.command_path if e.ctx else PROGRAM
        return _fail(e.format_message(), f"see {command} --help", 2)
    except ConfigError as e:
        return _fail(e.cause, e.cure, 2)
    except BackpropGPUError as e:
        return _fail(e.cause, e.cure, 1)
    except MemoryError as e:
        return _fail(f"out of memory: {e}" if str(e) else "out of memory", "take smaller layers or batches", 1)
    except Warning as e:  # python -W error
        return _fail(f"{type(e).__name__}: {e}", "heed it, or drop -W error and PYTHONWARNINGS", 1)
    except OSError:
        raise
    except Exception as e:
        if sys.flags.dev_mode:
            raise
        return _fail(f"unexpected {type(e).__name__}: {e}", "report this bug with what python -X dev shows", 1)
    return 0


def _fail(cause: str, cure: str, code: int) -> int:
    report.tell(f"{PROGRAM}: error: {_one_line(cause)}")
    report.tell(f"{PROGRAM}: try: {_one_line(cure)}")
    return code


def _one_line(text: str) -> str:
    """`text` without what would break the line or drive the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
