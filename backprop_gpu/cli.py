"""The command line: train, evaluate, predict, gradcheck, example, bench, doctor.

Data goes to stdout, everything else to stderr; `--json` prints one JSON object as the last line of stdout. Exit codes:
0 done, 1 bad data, file or run, 2 bad flag or configuration, 129 hung up, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
import numpy as np

from . import __version__, backend, checkpoint, datasets, files, report, specs, training
from .activations import HIDDEN, OUTPUT
from .batches import KINDS, check_seed
from .costs import COSTS, MAKERS, REDUCTIONS
from .errors import BackendError, BackpropGPUError, ConfigError, DataError, lookup
from .examples import EXAMPLES
from .gradient_checks import DIRECTIONS, EPS, TOLERANCE, check_everything, gradient_check, sample_problem
from .history import Run
from .initializers import INITIALIZERS
from .interrupts import answer
from .network import PRECISIONS, Network
from .optimizers import OPTIMIZERS, Optimizer, choose_optimizer
from .resume import ON_ERROR, digest
from .schedules import SCHEDULES, Warmup, choose_schedule

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


class Setting(Name):
    """NAME or NAME:key=value,... of a table, checked by what will read it."""

    def __init__(self, what: str, names: Iterable[str], read: Callable[[str], Any]) -> None:
        super().__init__(what, names)
        self._read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, if it can be read."""
        self._read(value)
        return str(value)


class PerLayer(click.ParamType):
    """One value for all layers, or one a layer with commas between."""

    def __init__(self, one: click.ParamType) -> None:
        self.name = one.name
        self._one = one

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str | None:
        """The choices, for --help."""
        return self._one.get_metavar(param, ctx) if isinstance(self._one, Name) else "SHARE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A value, or a list of them."""
        parts = [self._one.convert(part.strip(), param, ctx) for part in str(value).split(",")]
        return parts if len(parts) > 1 else parts[0]


class BatchSize(click.ParamType):
    """An integer, or `full`."""

    name = "size"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """The choices, for --help."""
        return "INTEGER|full"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """The size."""
        one: Any = click.INT
        return "full" if value == "full" else int(one.convert(value, param, ctx))


class ClassWeight(click.ParamType):
    """`balanced`, or the weights of all classes with commas between."""

    name = "class weight"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """The choices, for --help."""
        return "balanced|W0,W1,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | list[float]:
        """The weights."""
        if value == "balanced":
            return "balanced"
        one: Any = click.FLOAT
        return [float(one.convert(part.strip(), param, ctx)) for part in str(value).split(",")]


class Layers(click.ParamType):
    """All widths of a network, with comma, dash or slash between them."""

    name = "widths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """The widths."""
        parts = re.split(r"[,/-]", str(value).strip())
        if not all(re.fullmatch(r"\s*[0-9]{1,18}\s*", part, re.ASCII) for part in parts):
            raise ConfigError(f"--layers {value!r} is not a list of widths", "give all widths, such as 784,512,10")
        return [int(part) for part in parts]


COST = Setting("cost", COSTS, lambda text: specs.build("cost", text, MAKERS))
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
on_backend = click.option("--backend", "where", type=Name("backend", BACKENDS), default="auto", show_default=True)


PROBLEM = (
    click.option(
        "--data", default="mnist", show_default=True, metavar="mnist|DIR|FILE.npz", help="IDX files or arrays."
    ),
    click.option("--layers", type=Layers(), help="All widths, such as 784,512,10. Default: the data's, 512 between."),
    click.option(
        "--activation",
        type=PerLayer(Name("activation", HIDDEN)),
        default="relu",
        show_default=True,
        help="Of all hidden layers, or one each: relu,tanh.",
    ),
    click.option("--output", type=Name("output function", OUTPUT), help="Default: softmax for labels, else identity."),
    click.option("--cost", type=COST, help="Default: the one that goes with the output."),
    click.option(
        "--init",
        type=PerLayer(Name("initialiser", INITIALIZERS)),
        default="he",
        show_default=True,
        help="Of the weights of all layers, or one each.",
    ),
    click.option("--bias/--no-bias", default=True, show_default=True),
    click.option(
        "--dropout", type=PerLayer(click.FLOAT), default=0.0, show_default=True, help="In hidden layers, or each."
    ),
    click.option(
        "--optimizer",
        type=Setting("optimizer", OPTIMIZERS, choose_optimizer),
        default="adam",
        show_default=True,
        help="With settings: sgd:momentum=0.9,weight_decay=1e-4.",
    ),
    click.option("--lr", type=float, help=f"Default: {', '.join(f'{n} {lr:g}' for n, (lr, _) in OPTIMIZERS.items())}."),
    click.option("--batch-size", type=BatchSize(), default=128, show_default=True),
    click.option("--seed", type=int, default=0, show_default=True),
    on_backend,
    click.option("--precision", type=Name("precision", PRECISIONS), default="float32", show_default=True),
)


@dataclass(frozen=True)
class Setup:
    """What is trained, on what, and how: the values of the flags of PROBLEM."""

    data: str
    layers: list[int] | None
    activation: Any
    output: str | None
    cost: str | None
    init: Any
    bias: bool
    dropout: Any
    optimizer: str
    lr: float | None
    batch_size: int | str
    seed: int
    where: str
    precision: str

    def rule(self) -> Optimizer:
        """The optimizer."""
        return choose_optimizer(self.optimizer, self.lr)

    def network(self, train_set: datasets.Dataset) -> Network:
        """A network for the data; what the flags leave open, the data says."""
        are_labels = train_set.labels.ndim == 1 and train_set.labels.dtype.kind != "f"
        return Network(
            self.layers or [train_set.images.shape[1], 512, _outputs(self.data, train_set.labels, are_labels)],
            hidden=self.activation,
            output=self.output or ("softmax" if are_labels else "identity"),
            init=self.init,
            bias=self.bias,
            precision=self.precision,
            seed=self.seed,
            backend=self.where,
            dropout=self.dropout,
        )


def described(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags of PROBLEM, and their values as its first argument, a Setup."""

    @functools.wraps(command)
    def with_setup(**flags: Any) -> None:
        command(Setup(**{f.name: flags.pop(f.name) for f in dataclasses.fields(Setup)}), **flags)

    for option in reversed(PROBLEM):
        option(with_setup)
    return with_setup


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """Train multilayer perceptrons by backpropagation: on a CUDA GPU with CuPy, on NumPy everywhere else."""


@cli.command()
@described
@click.option(
    "--reduction", type=Name("reduction", REDUCTIONS), default="mean", show_default=True, help="Of the costs."
)
@click.option(
    "--schedule",
    type=Setting("schedule", SCHEDULES, choose_schedule),
    default="cosine",
    show_default=True,
    help="Of lr; with settings: step:every=0.25,factor=0.5.",
)
@click.option("--warmup", type=float, metavar="STEPS", help="Steps, or share of the run, before the schedule begins.")
@click.option("--epochs", type=int, default=10, show_default=True)
@click.option("--batches", type=Name("kind of batches", KINDS), default="shuffled", show_default=True)
@click.option("--class-weight", type=ClassWeight(), help="Of the samples of each class in the cost.")
@click.option("--l1", type=float, default=0.0, help="Penalty l1 sum |w| on the weights.")
@click.option("--l2", type=float, default=0.0, help="Penalty l2/2 sum w^2 on the weights.")
@click.option("--clip-norm", type=float, help="Greatest norm of the gradient.")
@click.option("--clip-value", type=float, help="Greatest size of each of its elements.")
@click.option("--label-smoothing", type=float, default=0.0, help="Share of each target spread over the classes.")
@click.option("--validation", type=float, metavar="SHARE", help="Of the training data, split off to watch.")
@click.option("--patience", type=int, metavar="EPOCHS", help="Stop after so many without lower validation cost.")
@click.option("--gradient-tolerance", type=float, help="Stop when the norm of the whole gradient is this small.")
@click.option("--parameter-tolerance", type=float, help="Stop when no parameter moves more than this in an epoch.")
@click.option("--time-limit", type=float, metavar="SECONDS", help="Stop after the step in which they have passed.")
@click.option("--gradient-norms", is_flag=True, help="Report ||dC/dW|| of each layer after each epoch.")
@click.option("--gradient-error", is_flag=True, help="Compare the first gradient with one in float64.")
@click.option("--pretrained", type=click.Path(path_type=Path), metavar="MODEL", help="Take first layers from it.")
@click.option("--carry-over", type=int, metavar="LAYERS", help="How many, with --pretrained.  [default: 1]")
@click.option(
    "--frozen", type=int, default=0, show_default=True, metavar="LAYERS", help="First layers to keep as they are."
)
@click.option(
    "--save", type=click.Path(path_type=Path), metavar="FILE", help="Keep model and run here, as safetensors."
)
@click.option("--checkpoint-every", metavar="INTERVAL", help="Such as '500 steps', '2 epochs', '5 minutes'.")
@click.option("--resume", is_flag=True, help="Go on from --save, where there is such a file.")
@click.option(
    "--on-checkpoint-error",
    type=Name("choice", ON_ERROR),
    default="raise",
    show_default=True,
    help="Where one cannot be written: end, or warn and go on.",
)
@click.option(
    "--retreats",
    type=int,
    default=0,
    show_default=True,
    metavar="TIMES",
    help="Where the run diverges, go back an epoch and halve lr.",
)
@as_json
def train(
    setup: Setup,
    schedule: str,
    warmup: float | None,
    save: Path | None,
    pretrained: Path | None,
    carry_over: int | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a network and measure it on the test data."""
    rule, factor = setup.rule(), choose_schedule(schedule)
    if warmup is not None:
        factor = Warmup(warmup, factor)
    train_set, test_set = datasets.load(setup.data)
    net = setup.network(train_set)
    if pretrained is not None:
        if save is not None and os.path.realpath(save) == os.path.realpath(pretrained):
            raise ConfigError("--save would replace the model of --pretrained", "save to another file")
        net.carry_over(checkpoint.load_network(pretrained, setup.where), 1 if carry_over is None else carry_over)
    elif carry_over is not None:
        raise ConfigError("--carry-over without --pretrained", "name the model to take layers from")
    if settings["resume"] and save is not None:
        _refuse_another_beginning(net, save)
    if test_set is not None:
        training.check_data(net, *test_set, cost=setup.cost)  # before the training, not after it
    with report.ProgressBar() as bar:
        try:
            history = training.train(
                net,
                *train_set,
                cost=setup.cost,
                optimizer=rule,
                schedule=factor,
                callbacks=[bar],
                batch_size=setup.batch_size,
                seed=setup.seed,
                save=save,
                **settings,
            )
        except Stopped as e:
            if isinstance(e.__context__, BackpropGPUError):  # which the run was ending with
                report.tell(f"{PROGRAM}: {e.__context__.cause}")
            _tell_stopped(e.word, bar.run, save)
            sys.exit(e.code)
    over = history.resumed is not None and bar.run is None  # nothing was left to do
    if history.resumed is not None:
        report.tell(f"the run in {save} {'is over since' if over else 'went on after'} step {history.resumed}")
    if save is not None and not over:
        report.tell(f"saved to {save}")
    seconds = sum(history.seconds)
    tested = training.evaluate(net, *test_set, reduction=settings["reduction"]) if test_set else None
    result: dict[str, Any] = {
        "backend": net.backend.name,
        "device": net.backend.device,
        "precision": setup.precision,
        "executor": history.executor,
        "layers": net.layers,
        "parameters": net.parameter_count,
        "epochs": len(history),
        "steps": history.steps[-1],
        "train_seconds": seconds,
        "samples_per_second": history.samples / seconds if seconds else None,
        "train_cost": history.train_cost[-1],
        "train_accuracy": history.train_accuracy[-1],
        "test_cost": tested.cost if tested else None,
        "test_accuracy": tested.accuracy if tested else None,
        "stopped": history.stopped,
        "seed": setup.seed,
    }
    if history.resumed is not None:
        result["resumed"] = history.resumed
    if history.retreats:
        result["retreats"] = history.retreats
    if settings["validation"] is not None:
        result["validation_cost"] = history.validation_cost
        result["validation_accuracy"] = history.validation_accuracy
        result["best_epoch"] = history.best_epoch
    if settings["gradient_error"]:
        result["gradient_error"] = history.gradient_error
    if settings["gradient_norms"]:
        result["gradient_norms"] = history.gradient_norms
    _print(result, report.summary(result, net.backend.reason), as_json)


def _refuse_another_beginning(net: Network, save: Path) -> None:
    """Parameters taken over from another model are no setting that the file of a run would tell."""
    target = files.resolve(save)
    if not target.is_file() or not target.stat().st_size:
        return
    found = checkpoint.read(save, net.backend.name)
    alike = all(getattr(found.net, name) == getattr(net, name) for name in checkpoint.SETTINGS)
    if alike and found.run and found.run.began != digest(net.theta):
        raise ConfigError(
            f"{save}: the run began with other parameters", "give the --pretrained and --carry-over of then"
        )


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


def _tell_stopped(word: str, run: Run | None, save: Path | None) -> None:
    """Say where training was stopped and what `train` has saved."""
    if run is None:
        report.tell(f"{PROGRAM}: {word} before the first step; nothing saved")
        return
    where = f"after step {run.step}" if run.whole else f"in the middle of step {run.step + 1}"
    if run.saved is None:
        kept = "nothing saved"
    elif run.whole and run.saved == run.step:
        kept = f"the network of that step is saved to {save}"
    else:
        kept = f"{save} holds step {run.saved}"
    report.tell(f"{PROGRAM}: {word} {where}; {kept}")


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
@click.option("--layers", type=Layers(), help="All widths. Default: 5,7,4,3, with --data the data's and 16 between.")
@click.option("--activation", type=PerLayer(Name("activation", HIDDEN)), default="tanh", show_default=True)
@click.option("--output", type=Name("output function", OUTPUT), default="softmax", show_default=True)
@click.option("--cost", type=COST, help="Default: the one that goes with the output.")
@click.option("--reduction", type=Name("reduction", REDUCTIONS), default="mean", show_default=True)
@click.option("--init", type=PerLayer(Name("initialiser", INITIALIZERS)), default="glorot", show_default=True)
@click.option("--bias/--no-bias", default=True, show_default=True)
@click.option("--dropout", type=PerLayer(click.FLOAT), default=0.0, show_default=True, help="Its masks of step 1.")
@click.option("--l1", type=float, default=0.0)
@click.option("--l2", type=float, default=0.0)
@click.option("--label-smoothing", type=float, default=0.0)
@click.option("--data", metavar="mnist|DIR|FILE.npz", help="Its first training samples. Default: random numbers.")
@click.option("--samples", type=click.IntRange(min=1), default=6, show_default=True)
@click.option("--eps", type=float, default=EPS, show_default=True, help="The step of the differences.")
@click.option("--tolerance", type=float, default=TOLERANCE, show_default=True)
@click.option("--directions", type=int, default=DIRECTIONS, show_default=True, help="In large networks.")
@click.option("--seed", type=int, default=0, show_default=True)
@on_backend
@click.option("--precision", type=Name("precision", PRECISIONS), default="float64", show_default=True)
@click.option("--all", "everything", is_flag=True, help="Every activation with every legal pair of output and cost.")
@as_json
def gradcheck(
    layers: list[int] | None,
    activation: Any,
    output: str,
    cost: str | None,
    init: Any,
    bias: bool,
    dropout: Any,
    data: str | None,
    samples: int,
    seed: int,
    where: str,
    precision: str,
    everything: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Hold the gradients of a network against central differences; exit 1 where they do not agree."""
    if everything:
        _refuse_beside_all(click.get_current_context())
        checks = check_everything(seed, precision=precision, backend=where)
        passed = all(found.passed for _, found in checks)
        text = "\n".join(f"{title}: {found.verdict}" for title, found in checks)
        result = {"passed": passed, "checks": [{"title": title, **found.as_dict()} for title, found in checks]}
    else:
        train_set = None if data is None else datasets.load(data)[0]
        if layers is None and train_set is not None:
            are_labels = train_set.labels.ndim == 1 and train_set.labels.dtype.kind != "f"
            layers = [train_set.images.shape[1], 16, _outputs(str(data), train_set.labels, are_labels)]
        net = Network(
            layers or [5, 7, 4, 3],
            hidden=activation,
            output=output,
            init=init,
            bias=bias,
            precision=precision,
            seed=seed,
            backend=where,
            dropout=dropout,
        )
        if train_set is None:
            X, T = sample_problem(net, samples, seed, cost)
        else:
            X, T = train_set.images[:samples], train_set.labels[:samples]
        if dropout:
            settings["dropout"] = seed, 1
        found = gradient_check(net, X, T, cost, seed=seed, **settings)
        passed, text, result = found.passed, str(found), found.as_dict()
    _print(result, text, as_json)
    if not passed:
        sys.exit(1)


def _refuse_beside_all(ctx: click.Context) -> None:
    told = click.core.ParameterSource.COMMANDLINE
    for param in ctx.command.params:
        name = str(param.name)
        kept = ("everything", "seed", "where", "precision", "as_json")
        if name not in kept and ctx.get_parameter_source(name) == told:
            raise ConfigError(f"{param.opts[0]} beside --all, which checks everything", "leave one of the two out")


@cli.command()
@click.argument("name", type=Name("example", EXAMPLES), required=False)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw it: .png, .svg, .pdf (matplotlib).")
@on_backend
@as_json
def example(name: str | None, seed: int, plot: Path | None, where: str, as_json: bool) -> None:
    """Run an observation of the notes, NAME; without a name, list them."""
    if name is None:
        width = max(map(len, EXAMPLES))
        lines = "\n".join(f"{key:{width}}  {one.title}" for key, one in EXAMPLES.items())
        _print({key: one.title for key, one in EXAMPLES.items()}, lines, as_json)
        return
    chosen = EXAMPLES[name]
    if plot is not None and chosen.plot is None:
        drawn = ", ".join(key for key, one in EXAMPLES.items() if one.plot)
        raise ConfigError(f"the example {name} has nothing to draw", f"leave --plot out, or take one of {drawn}")
    result = chosen.run(check_seed(seed), where)
    if plot is not None and chosen.plot is not None:
        chosen.plot(result, plot)
        report.tell(f"drawn to {plot}")
    _print(result, chosen.text(result), as_json)


@cli.command()
@described
@click.option("--seconds", type=float, default=2.0, show_default=True, help="How long steps are timed.")
@click.option("--profile", "taken_apart", is_flag=True, help="Tell where the time of a step goes.")
@click.option("--startup", "started", is_flag=True, help="Tell how long importing and --help take.")
@as_json
def bench(setup: Setup, seconds: float, taken_apart: bool, started: bool, as_json: bool) -> None:
    """Time training steps, and hold them against the least that they could take."""
    from . import bench as benching

    backend.choose(setup.where)  # imports CuPy, where it is used
    imported, _ = benching.resident()
    rule, (train_set, test_set) = setup.rule(), datasets.load(setup.data)
    net = setup.network(train_set)
    m = len(train_set.labels) if setup.batch_size == "full" else setup.batch_size
    steps: Any = (net, *train_set, rule, m, setup.cost, seconds, setup.seed)
    found = benching.bench(*steps)
    above = found.peak_rss - imported if found.peak_rss is not None and imported is not None else None
    result = found.as_dict() | {
        "seed": setup.seed,
        "parameters": net.parameter_count,
        "six_parameters_bytes": 6 * net.parameter_count * net.dtype.itemsize,
        "data_bytes": sum(a.nbytes for a in (*train_set, *(test_set or ()))),
        "peak_rss_above_imports": above,
    }
    texts = [str(found), _memory_text(result)]
    if started:
        start = benching.startup()
        result["startup"] = start.as_dict()
        texts.append(str(start))
    if taken_apart:
        parts = benching.profile(*steps)
        result["profile"] = parts.as_dict()
        texts += ["", str(parts)]
    _print(result, "\n".join(texts), as_json)


def _memory_text(result: dict[str, Any]) -> str:
    """The memory of a `bench`, beside what the data and six vectors of the parameters take."""
    above, data, six = (
        "unknown" if result[key] is None else f"{result[key] / 2**20:.1f} MiB"
        for key in ("peak_rss_above_imports", "data_bytes", "six_parameters_bytes")
    )
    return f"memory     {above} above the imports at most; the data {data}, six times the parameters {six}"


@cli.command()
@click.argument("model", type=click.Path(path_type=Path), required=False)
@on_backend
@as_json
def doctor(model: Path | None, where: str, as_json: bool) -> None:
    """Tell which backend is used and why, and what this machine is made of; or what is in the file MODEL."""
    if model is not None:
        found = report.model(model)
        _print(found, report.model_text(found), as_json)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason is in the report
        fault = None
        try:
            chosen = backend.choose(where)
        except BackendError as e:
            fault, chosen = e, dataclasses.replace(backend.choose("numpy"), reason=e.cause, cure=e.cure)
        found = report.doctor(chosen)
    _print(found, report.doctor_text(found), as_json)
    if fault:
        raise fault


def _row(cell: Any) -> list[Any]:
    return cell if isinstance(cell, list) else [cell]


def _print(result: dict[str, Any], text: str, as_json: bool) -> None:
    print(json.dumps(report.plain(result), allow_nan=False) if as_json else text)
    sys.stdout.flush()


class Stopped(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived: the word for it, and the exit code."""

    def __init__(self, word: str, code: int) -> None:
        super().__init__(word, code)
        self.word = word
        self.code = code


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    words = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
    raise Stopped(words.get(signal.Signals(number), "hung up"), 128 + number)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line on `args` (None: the program's own) and exit."""
    warnings.showwarning = report.warn  # type: ignore[assignment]
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a narrow terminal shows what it can
    with contextlib.suppress(ValueError):  # not in the main thread
        answer(_stop)
    try:
        code = _run(args)
        sys.stdout.flush()
    except Stopped as e:  # a second one, while the first was told
        code = e.code
    except OSError as e:  # of stdout: what goes wrong with files is a BackpropGPUError
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1 if isinstance(e, BrokenPipeError) else _fail(f"stdout: {e.strerror or e}", "free some space", 1)
    try:
        sys.stderr.flush()
    except OSError:  # nobody hears it; else Python tries once more at its end, and exits with 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.exit(code)


def _run(args: Sequence[str] | None) -> int:
    """The exit code of a command; every error but those of stdout has been told."""
    try:
        with _notes_told():
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
    except BackpropGPUError as e:
        return _fail(e.cause, e.cure, 2 if isinstance(e, ConfigError) else 1)
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


@contextlib.contextmanager
def _notes_told() -> Iterator[None]:
    """Tell what is noted on an error, before the error itself is told."""
    try:
        yield
    except Exception as e:
        for note in getattr(e, "__notes__", ()):
            report.tell(f"{PROGRAM}: {note}")
        raise


def _fail(cause: str, cure: str, code: int) -> int:
    report.tell(f"{PROGRAM}: error: {cause}")
    report.tell(f"{PROGRAM}: try: {cure}")
    return code
