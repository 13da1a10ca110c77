"""Checkpoints: one safetensors file with a network and, where it is in training, all that the run needs to go on.

Tensors `layer.1.weight` (N_1, N_0), `layer.1.bias` (N_1,), ... in the network's dtype, readable by any safetensors
tool; metadata `format`, `format_version`, `config`, the `sha256` of each tensor (JSON), and that of these metadata. Of
a run besides, see `RunState`: vectors in the layout of `net.theta`, among them the optimizer's slots; the history;
metadata `run`, `progress`, `where` and `clock` (JSON). What the clock says is in the metadata alone: equal runs have
equal tensors.

A file is trusted in nothing before it is checked: header, settings, names, dtypes and shapes, then size, digests and
numbers. It is never unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

from . import files
from .activations import OUTPUT, Activation
from .backend import choose, to_host
from .batches import steps_per_epoch
from .costs import MAKERS, Cost, choose_cost
from .errors import CheckpointError, ConfigError, lookup
from .initializers import INITIALIZERS
from .network import Network, Views, natural_task, precision_on

FORMAT, VERSION = "backprop_gpu", "3"
MAX_HEADER = 1 << 20
MOST_WORDS = 200  # of what a file says, in an error
SETTINGS = ("layers", "hidden", "output", "init", "bias", "precision", "seed", "dropout")  # of a network
_ADDED_IN_2 = {"dropout": 0.0}
MOST_DEEP = 32  # objects and lists within each other
_METADATA = {"format", "format_version", "config", "sha256"}
_OF_METADATA = "sha256_of_metadata"
_OF_A_RUN = {"run", "progress", "where", "clock"}
_DTYPES = {"float32": "F32", "float64": "F64", "int64": "I64", "uint64": "U64"}
_FOREIGN = {  # what a file begins with
    b"\x80": "a pickle",
    b"PK\x03\x04": "a zip archive, as PyTorch, Keras and NumPy write them",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
}
_SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".h5", ".hdf5", ".keras", ".ckpt", ".npz", ".npy", ".joblib", ".onnx")

COLUMNS = ("train_cost", "train_accuracy", "validation_cost", "validation_accuracy", "lr", "steps", "gradient_norms")
ENDS = ("epochs", "gradient", "still", "patience", "time", "callback")  # why a run is over
_LISTS = {"slots", "vectors", "columns"}  # of which the metadata tell names and number
_PROGRESS = {
    "epochs", "epoch", "position", "step", "lr", "lr_epochs", "samples", "stopped", "best_epoch", "gradient_error",
    "retreats", "good_epoch", "first_cost", "began", "stop", "put_off", *_LISTS,
}  # fmt: skip


@dataclass
class RunState:
    """Where a run of `train` stands: all that another process needs to go on with it, bit for bit.

    `settings`: what must not be another when it goes on, by name, in JSON's words; among them `samples`, `batch_size`,
    `frozen` and `seed`. `epochs`: how many it shall be. `epoch`: how many are closed, and in the history; `position`:
    steps done of the one after these; `step`: of the whole run; `lr`: of the last one, made by a schedule over
    `lr_epochs` epochs. `samples`, `stopped`, `best_epoch`, `gradient_error`, `retreats`: of the `History`.

    `slots`: the optimizer's, each as long as what is trained, the end of theta. `vectors`, each as long as theta:
    "best" (parameters so far, where patience asks for them), "last" (where the run is over, and the network has the
    best), "start" (where the epoch under way began). Of a run that may retreat, "good": where it would go back to, the
    end of epoch `good_epoch`, with the slots "good.1", ... and the best parameters "good.best"; `first_cost` is the
    mean cost of its first step. `measured` (position, 2): what the steps of the epoch under way were judged by.
    `columns`: of the history, `COLUMNS`, an entry an epoch.

    `stop`: whether a callback has set it in the epoch under way; `put_off`: how many of its steps no graph could take.
    `began`: the SHA-256 of the parameters that it began with. `where`: backend, device, rung and versions, on which the
    last bits depend. `clock`: `seconds` of each epoch, `under_way` of the one after these, `elapsed` in all.
    """

    settings: dict[str, Any]
    epochs: int
    epoch: int = 0
    position: int = 0
    step: int = 0
    lr: float = 0.0
    lr_epochs: int = 0
    samples: int = 0
    stopped: str | None = None
    best_epoch: int | None = None
    gradient_error: float | None = None
    retreats: list[int] = field(default_factory=list)
    good_epoch: int = 0
    first_cost: float | None = None
    slots: list[np.ndarray] = field(default_factory=list)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    measured: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    began: str = ""
    stop: bool = False
    put_off: int = 0
    where: dict[str, Any] = field(default_factory=dict)
    clock: dict[str, Any] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        """Of this run."""
        return steps_per_epoch(self.settings["samples"], self.settings["batch_size"])

    def finished(self, epochs: int) -> bool:
        """Whether nothing is left to do for a run of so many epochs."""
        return self.stopped is not None and (self.stopped != "epochs" or epochs == self.epochs)

    @property
    def stands(self) -> tuple[Any, ...]:
        """What tells it from the same run at another moment."""
        return self.step, self.epoch, self.position, self.stopped, self.epochs, len(self.retreats)

    def progress(self) -> dict[str, Any]:
        """The metadata of that name."""
        told = {key: getattr(self, key) for key in _PROGRESS - _LISTS}
        return {
            **told, "slots": len(self.slots), "vectors": sorted(self.vectors), "columns": sorted(self.columns),
        }  # fmt: skip

    def tensors(self) -> dict[str, np.ndarray]:
        """All of it that is arrays, by name. `random`: the key of the generator that draws the epoch under way."""
        stream = min(self.epoch + 1, self.epochs)
        return {
            **{f"optimizer.{k}": slot for k, slot in enumerate(self.slots, 1)},
            **{f"run.{name}": vector for name, vector in self.vectors.items()},
            **{f"history.{name}": column for name, column in self.columns.items()},
            "run.measured": self.measured,
            "run.random": np.array([self.settings["seed"], stream], np.uint64),
        }


class Checkpoint(NamedTuple):
    """A file's content: the network, the run it is in, if it is in one, and the version of the format."""

    net: Network
    run: RunState | None
    version: str


def save_network(net: Network, path: str | os.PathLike[str]) -> None:
    """Write `net` to `path`, atomically: theta, settings, cost and task. Public as `bp.save`.

    A symbolic link is followed to its target. Refused are directories, devices, files that are no models of this
    library, and parameters that are not finite. Raises CheckpointError.
    """
    write(net, path)


def write(net: Network, path: str | os.PathLike[str], run: RunState | None = None) -> None:
    """`save_network`, and the run that `net` is in."""
    from safetensors import SafetensorError
    from safetensors.numpy import save

    target = check_target(path)
    parameters = {name: np.ascontiguousarray(to_host(p)) for name, p in _tensors(net).items()}
    for name, p in parameters.items():
        if not np.isfinite(p).all():
            raise CheckpointError(f"{path} is not written: {name} holds NaN or infinity", "train again, at a lower lr")
    tensors = dict(parameters)
    if run:
        tensors |= {name: np.ascontiguousarray(a) for name, a in run.tensors().items()}
    config = {**{name: getattr(net, name) for name in SETTINGS}, "cost": net.cost, "task": net.task}
    metadata = {
        "format": FORMAT,
        "format_version": VERSION,
        "config": json.dumps(config),
        "sha256": json.dumps({name: _sha256(p) for name, p in tensors.items()}),
    }
    if run:
        metadata |= _told(net, path, run, tensors)
    metadata[_OF_METADATA] = _sha256_of_metadata(metadata)
    try:
        content = save(tensors, metadata)
    except (MemoryError, SafetensorError) as e:
        cause, memory = _first_line(e) if str(e) else "out of memory", "free some memory; " * isinstance(e, MemoryError)
        raise CheckpointError(f"{path} is not written: {cause}", f"{memory}an older file is untouched") from None
    length = int.from_bytes(content[:8], "little")
    header = _in_order(content[8 : 8 + length])
    if len(header) > MAX_HEADER:
        raise CheckpointError(
            f"{path} is not written: its header takes {len(header)} bytes, more than the {MAX_HEADER} that are read",
            "save fewer layers, or a shorter history",
        )
    files.replace(target, [len(header).to_bytes(8, "little"), header, memoryview(content)[8 + length :]])


def _told(net: Network, path: str | os.PathLike[str], run: RunState, tensors: dict[str, Any]) -> dict[str, str]:
    """The metadata of a run; CheckpointError where nobody could read them, or the tensors, again."""
    parts = {"run": run.settings, "progress": run.progress(), "where": run.where, "clock": run.clock}
    try:
        metadata = {key: json.dumps(part, sort_keys=True, allow_nan=False) for key, part in parts.items()}
        wanted = _tensors_of(net, _run_of(net, *(_object(metadata[key]) for key in sorted(_OF_A_RUN))))
        for name, (dtype, shape) in wanted.items():
            if (_DTYPES.get(tensors[name].dtype.name), tensors[name].shape) != (dtype, shape):
                raise ValueError(f"{name} is not of {dtype} {shape}")
    except _NO_MODEL as e:
        raise CheckpointError(
            f"{path} is not written, for it could not be read again: {_first_line(e)}",
            "leave what callbacks are shown as it is, but for run.stop; an older file is untouched",
        ) from None
    return metadata


Own = Sequence[Activation | Cost]


def load_network(path: str | os.PathLike[str], backend: str = "auto", own: Own = ()) -> Network:
    """The network in a model file, or in a checkpoint of a run. Public as `bp.load`.

    `own`: the activations and costs of one's own that the network was built or trained with; the file has only their
    names.

    Raises CheckpointError for a file that is missing, damaged, no model of this library, or of a later format version;
    ConfigError and BackendError as `backend.choose`.
    """
    return read(path, backend, own).net


def read(path: str | os.PathLike[str], backend: str = "auto", own: Own = ()) -> Checkpoint:
    """As `load_network`, with the run that the network is in."""
    choose(backend)  # what is wrong with the backend is not the file's fault
    if not isinstance(own, (list, tuple)) or not all(type(f) in (Activation, Cost) for f in own):
        raise ConfigError(f"own is {own!r}", "give a list of activations and costs")
    if len({f.name for f in own}) != len(own):
        raise ConfigError("own has two functions of one name", "load with those the network was made with")
    try:
        path = Path(path)
    except TypeError:
        raise CheckpointError(f"{path!r} is no path", "give the name of a file, a str or a Path") from None
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before it is opened: opening a pipe would wait for ever
            raise _bad(path, "is not a regular file")
        with path.open("rb") as file:
            return _load(path, file, backend, own)
    except CheckpointError:
        raise
    except MemoryError:
        raise _bad(path, "does not fit into memory") from None
    except (OSError, ValueError) as e:  # ValueError: a null byte in the name
        reason, errno = getattr(e, "strerror", None) or e, getattr(e, "errno", None)
        raise CheckpointError(f"{path} cannot be read: {reason}", "check the path and its permissions", errno) from None


# What comes of metadata that are none of ours; a ConfigError is a ValueError, and an OverflowError an ArithmeticError.
_NO_MODEL = (ValueError, TypeError, AttributeError, KeyError, RecursionError, OverflowError)


def _load(path: Path, file: BinaryIO, backend: str, own: Own) -> Checkpoint:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    size = os.fstat(file.fileno()).st_size
    head = _read_header(file, size)
    if head is None:
        file.seek(0)
        _refuse_foreign_format(path, file.read(8))
    try:
        header = _object(head[8:])
        metadata = header.pop("__metadata__")
        if metadata["format"] != FORMAT:
            raise _bad(path, f"is a safetensors file, but of {_short(metadata['format'])}, not of {FORMAT}")
        version = metadata["format_version"]
        if version not in ("1", "2", VERSION):
            raise CheckpointError(
                f"{path} has format version {_short(version)}, this library reads up to {VERSION!r}",
                "install a newer backprop_gpu",
            )
        if version == VERSION and metadata.pop(_OF_METADATA) != _sha256_of_metadata(metadata):
            raise _bad(path, "is damaged: its metadata are not what was saved")
        config = _object(metadata["config"])
        if version == "1":
            config = {**config, **_ADDED_IN_2}
        digests = _object(metadata["sha256"])
        shapes = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        in_training = version == VERSION and set(metadata) == _METADATA | _OF_A_RUN
        if (
            set(config) != {*SETTINGS, "cost", "task"}
            or not (in_training or set(metadata) == _METADATA)
            or set(digests) != set(shapes)
        ):
            raise ValueError("it has more or fewer entries than it should")
        _refuse_lying_size(config["layers"], size, len(shapes))
        _refuse_unknown(path, config, own)
        net = _from_config(config, backend, own)
        run = _run_of(net, *(_object(metadata[key]) for key in sorted(_OF_A_RUN))) if in_training else None
    except CheckpointError:
        raise
    except KeyError as e:
        raise _bad(path, f"is not a model of {FORMAT}: it has no {_short(e.args[0])}") from None
    except _NO_MODEL as e:
        raise _bad(path, f"is not a model of {FORMAT}: {_first_line(e)}") from None
    tensors = _tensors(net)
    wanted = {name: (_DTYPES[net.dtype.name], p.shape) for name, p in tensors.items()}
    wanted |= _tensors_of(net, run) if run else {}
    if shapes != wanted:
        odd = min(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
        raise _bad(path, f"does not hold the tensors that its settings call for: see {_short(odd)}")
    announced = sum(math.prod(shape) * (4 if dtype == "F32" else 8) for dtype, shape in wanted.values())
    if size != len(head) + announced:
        raise _bad(path, f"is damaged: {size} bytes, and not {len(head) + announced}")
    try:
        values = load(head + file.read())
    except (SafetensorError, TypeError, ValueError) as e:
        raise _bad(path, f"is damaged: {_first_line(e)}") from None
    for name, value in values.items():
        if _sha256(value) != digests[name]:
            raise _bad(path, f"is damaged: {name} is not what was saved")
        # Of steps that were taken, what a slot sums up may overflow, and what is measured beside them may be anything.
        slot = name.startswith("optimizer.") or name[len("run.good.") :].isdigit()
        finite = ~np.isnan(value) if slot else np.isfinite(value)
        if not (name.startswith("history.") or finite.all()):
            raise _bad(path, f"holds NaN or infinity in {name}")
    for name, p in tensors.items():
        p[...] = net.backend.asarray(values[name])
    if run:
        _fill(path, run, values)
    return Checkpoint(net, run, version)


def _run_of(net: Network, clock: Any, progress: Any, settings: Any, where: Any) -> RunState:
    """The run that the metadata describe, its arrays still missing; KeyError, TypeError, ValueError where none."""
    if set(progress) != _PROGRESS:
        raise ValueError("the run's progress has more or fewer entries than it should")
    run = RunState(settings, **{key: progress[key] for key in _PROGRESS - _LISTS})
    run.clock, run.where = clock, where
    for key, low, high in (
        ("samples", 1, 2**53), ("batch_size", 1, settings["samples"]), ("frozen", 0, net.L - 1), ("seed", 0, 2**64 - 1),
    ):  # fmt: skip
        _whole(key, settings[key], low, high)
    steps = run.steps_per_epoch
    _whole("epochs", run.epochs, 1, 2**53)
    _whole("epoch", run.epoch, 0, run.epochs)
    _whole("position", run.position, 0, 0 if run.epoch == run.epochs or run.stopped else steps)
    at = run.epoch * steps + run.position
    _whole("step", run.step, 1 if run.stopped not in (None, "epochs") else at, at)
    _whole("lr_epochs", run.lr_epochs, 1 if run.step else 0, run.epochs)
    _whole("samples", run.samples, 0, run.epochs * settings["samples"])
    _whole("slots", progress["slots"], 0, 99)
    if type(run.began) is not str or type(where.get("executor")) is not str:
        raise ValueError("the run's beginning or place is nothing to be told")
    if not (run.stopped is None or run.stopped in ENDS):
        raise ValueError(f"the run ended by {_short(run.stopped)}")
    if (run.stopped is None) == (run.epoch == run.epochs) and run.stopped in (None, "epochs"):
        raise ValueError(f"the run is over by {run.stopped} after {run.epoch} of {run.epochs} epochs")
    _whole("put_off", run.put_off, 0, run.position)
    if type(run.stop) is not bool:
        raise ValueError(f"the run's stop is {_short(run.stop)}")
    if run.best_epoch is not None:
        _whole("best_epoch", run.best_epoch, 1, run.epoch)
    for step in run.retreats:
        _whole("retreats", step, 1, run.epochs * steps)
    _whole("good_epoch", run.good_epoch, 0, run.epoch)
    numbers = [run.lr, clock["under_way"], clock["elapsed"], *clock["seconds"]]
    numbers += [] if run.gradient_error is None else [run.gradient_error]
    if not all(type(x) in (int, float) and math.isfinite(x) and x >= 0 for x in numbers):
        raise ValueError("the run's lr or clock are no numbers from 0")
    if not (run.first_cost is None or (type(run.first_cost) in (int, float) and math.isfinite(run.first_cost))):
        raise ValueError("the run's first cost is no number")
    if len(clock["seconds"]) not in (1, run.epoch):
        raise ValueError("the run's clock does not fit its epochs")
    run.slots = [np.zeros(0)] * progress["slots"]
    run.vectors = dict.fromkeys(progress["vectors"], np.zeros(0))
    run.columns = dict.fromkeys(progress["columns"], np.zeros(0))
    known = {"best", "last", "start", "good", "good.best", *(f"good.{k}" for k in range(1, len(run.slots) + 1))}
    if not (run.vectors.keys() <= known and run.columns.keys() <= set(COLUMNS)):
        raise ValueError("the run has vectors or columns that nobody knows")
    wanted = {"train_cost", "lr", "steps"} | ({"validation_cost"} if settings["validation"] and run.epoch else set())
    if not wanted <= run.columns.keys():
        raise ValueError("the run's history lacks a column")
    remembered = {"good", *(f"good.{k}" for k in range(1, len(run.slots) + 1))} if settings["retreats"] else set()
    if settings["parameter_tolerance"] is not None and run.position:
        remembered.add("start")
    if not remembered <= run.vectors.keys():
        raise ValueError("the run lacks what it has to remember")
    return run


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"the run's {name} is {_short(value)}, not from {low} to {high}")


def _tensors_of(net: Network, run: RunState) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a run."""
    dtype, size = _DTYPES[net.dtype.name], net.theta.size
    trained = size - before_trained(net, run.settings["frozen"])
    columns: dict[str, tuple[str, tuple[int, ...]]] = dict.fromkeys(run.columns, ("F64", (run.epoch,)))
    if "gradient_norms" in columns:
        columns["gradient_norms"] = "F64", (run.epoch, net.L)
    columns["steps"] = "I64", (run.epoch,)
    return {
        **{f"optimizer.{k}": (dtype, (trained,)) for k in range(1, len(run.slots) + 1)},
        **{f"run.{name}": (dtype, (trained if name[5:].isdigit() else size,)) for name in run.vectors},
        **{f"history.{name}": column for name, column in columns.items()},
        "run.measured": ("F64", (run.position, 2)),
        "run.random": ("U64", (2,)),
    }


def before_trained(net: Network, frozen: int) -> int:
    """How many elements of theta come before those that are trained: frozen layers come first."""
    return Views.size(net.layers[: frozen + 1], net.biased[:frozen], net.dtype)


def _fill(path: Path, run: RunState, values: dict[str, np.ndarray]) -> None:
    """Give the run its arrays."""
    run.slots = [values[f"optimizer.{k}"] for k in range(1, len(run.slots) + 1)]
    run.vectors = {name: values[f"run.{name}"] for name in run.vectors}
    run.columns = {name: values[f"history.{name}"] for name in run.columns}
    run.measured = values["run.measured"]
    if values["run.random"].tolist() != run.tensors()["run.random"].tolist():
        raise _bad(path, "is damaged: its generator is not the one of its seed and epoch")


def _refuse_foreign_format(path: Path, start: bytes) -> NoReturn:
    kind = next((words for magic, words in _FOREIGN.items() if start.startswith(magic)), None)
    if kind is None and path.suffix.lower() in _SUFFIXES:
        kind = f"a {path.suffix} file by its name"
    if kind:
        raise CheckpointError(
            f"{path} is {kind}: backprop_gpu never unpickles, and reads models from safetensors files alone",
            "give a file that backprop_gpu saved",
        )
    raise _bad(path, "is not a safetensors file, or is truncated")


def _read_header(file: BinaryIO, size: int) -> bytes | None:
    """The length and the header of a safetensors file, or None where it is none."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
        return None
    header = file.read(length)
    return start + header if len(header) == length and header[:1] == b"{" else None


def _from_config(config: dict[str, Any], backend: str, own: Own) -> Network:
    """The network that a file's settings describe, theta still zero; ConfigError, TypeError, ValueError where none."""
    settings = {name: config[name] for name in SETTINGS}
    if not all(type(bias) is bool for bias in _listed(settings["bias"])):
        raise ValueError(f"bias {settings['bias']!r}")
    for name in _listed(settings["init"]):
        lookup("initialiser", name, INITIALIZERS)
    activations = {f.name: f for f in own if isinstance(f, Activation)}
    settings["hidden"] = [activations.get(name, name) for name in _listed(settings["hidden"])]
    if len(settings["hidden"]) == 1:
        settings["hidden"] = settings["hidden"][0]
    settings["output"] = activations.get(settings["output"], settings["output"])
    where = choose(backend).name
    settings["precision"] = precision_on(where, settings["precision"])
    net = Network(**{**settings, "init": "zeros", "backend": where})
    net.init = settings["init"]
    costs = {c.name: c for c in own if isinstance(c, Cost)}
    net.criterion = choose_cost(costs.get(config["cost"], config["cost"]), net.output)
    if config["task"] not in {natural_task(net.g, net.layers[-1]), "labels"}:
        raise ValueError(f"task {config['task']!r} with output {net.output!r}")
    net.task = config["task"]
    return net


def _refuse_unknown(path: Path, config: dict[str, Any], own: Own) -> None:
    """Tell functions of one's own that are wanted, and not here, from a file that is none of ours."""
    known = {*OUTPUT, *MAKERS, *(f.name for f in own)}
    for name in (*_listed(config["hidden"]), config["output"], str(config["cost"]).partition(":")[0]):
        if isinstance(name, str) and name.isidentifier() and name not in known:
            raise CheckpointError(
                f"{path} uses {_short(name)}, an activation or a cost of somebody's own",
                "load it in Python: bp.load(path, own=[...]), with that function in the list",
            )


def _listed(setting: Any) -> list[Any]:
    return setting if isinstance(setting, list) else [setting]


def _object(text: str | bytes) -> dict[str, Any]:
    """An object of JSON, without an entry that stands there twice, and without NaN."""
    found = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    if type(found) is not dict:
        raise ValueError("a part of it is no object of JSON")
    _refuse_deep(found, MOST_DEEP)
    return found


def _refuse_deep(value: Any, most: int) -> None:
    if not most:
        raise ValueError(f"a part of it is nested more than {MOST_DEEP} times")
    for part in value.values() if type(value) is dict else value:
        if type(part) in (dict, list):
            _refuse_deep(part, most - 1)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("an entry stands there twice")
    return dict(pairs)


def _sha256(p: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(p).data).hexdigest()


def _sha256_of_metadata(metadata: dict[str, str]) -> str:
    """Of all but itself."""
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _in_order(header: bytes) -> bytes:
    """The same header, sorted: the library's order is random, and equal networks shall give equal files."""
    ordered = json.dumps(json.loads(header), sort_keys=True, separators=(",", ":")).encode()
    return ordered + b" " * (-len(ordered) % 8)


def _refuse_lying_size(layers: Any, size: int, tensors: int) -> None:
    """No file announces more parameters than it has bytes, or more layers than it has tensors."""
    if len(layers) - 1 > tensors:
        raise ValueError(f"{len(layers) - 1} layers in {tensors} tensors")
    if sum(o * i for o, i in zip(layers[1:], layers, strict=False)) > size:
        raise ValueError(f"layers {layers} do not fit into {size} bytes")


def _tensors(net: Network) -> dict[str, Any]:
    named = {}
    for l in range(1, net.L + 1):
        named[f"layer.{l}.weight"] = net.W[l]
        if net.b[l] is not None:
            named[f"layer.{l}.bias"] = net.b[l]
    return named


def unfinished(path: str | os.PathLike[str]) -> int | None:
    """The step after which a run stands that is in this file, and not over; None where none is to be seen.

    Reads the header alone and believes it: good for a warning.
    """
    try:
        with open(path, "rb") as file:
            head = _read_header(file, os.fstat(file.fileno()).st_size)
        progress = _object(_object((head or b"")[8:])["__metadata__"]["progress"])
        step, stopped = progress["step"], progress["stopped"]
    except (OSError, *_NO_MODEL):
        return None
    return step if type(step) is int and stopped is None else None


def check_target(path: str | os.PathLike[str]) -> Path:
    """Where a file named `path` would really be written; CheckpointError where it could or should not be."""
    target = files.resolve(path)
    try:
        size = target.stat().st_size
        with target.open("rb") as file:
            head = _read_header(file, size)
    except FileNotFoundError:
        return target
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}", "name another file", e.errno) from None
    if size and (head is None or f'"format":"{FORMAT}"'.encode() not in head.replace(b" ", b"")):
        raise CheckpointError(
            f"{path} exists and is no model of {FORMAT}", "name another file, or remove that one first"
        )
    return target


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {what}", "give a file that backprop_gpu saved")


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:MOST_WORDS]


def _short(value: Any) -> str:
    """What a file says, in an error's words."""
    text = repr(value)
    return text if len(text) <= MOST_WORDS else f"{text[:MOST_WORDS]}..."
