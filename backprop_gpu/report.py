"""What the command line shows: the progress bar, the summary of a run, and what this machine is made of."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np

from . import __version__, checkpoint
from . import backend as backends
from . import blas as openblas
from .backend import Backend, Machine
from .errors import ConfigError
from .history import Run

STOPPED = {
    "gradient": "the norm of the gradient",
    "still": "parameters that stand still",
    "patience": "the validation cost, which fell no more",
    "time": "the time limit",
    "callback": "a callback",
}


class ProgressBar:
    """A callback of `train` that shows steps, cost and accuracy on stderr if that is a terminal, else nothing.

    A terminal that goes away ends the showing, and nothing else.
    """

    def __init__(self) -> None:
        # Takes a third of the time in which --help is there, which does without.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        cut = Column(no_wrap=True, overflow="crop")  # else "…", which not every terminal has

        self._console = Console(stderr=True, color_system=None if os.environ.get("NO_COLOR") else "auto")
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}", table_column=cut),
            BarColumn(),
            MofNCompleteColumn(table_column=cut),
            TextColumn("steps", table_column=cut),
            TimeRemainingColumn(table_column=cut),
            TextColumn("{task.fields[last]}", table_column=cut),
            console=self._console,
            transient=True,
            disable=not (self._console.is_terminal and self._console.file.isatty()),  # FORCE_COLOR makes no terminal
        )
        self._task = self._progress.add_task("", total=None, epoch="", last="")
        self._shown = 0.0
        self.run: Run | None = None

    def __enter__(self) -> ProgressBar:
        self._show(self._progress.start)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._show(self._progress.stop)

    def _show(self, draw: Callable[[], object]) -> None:
        if not self._progress.disable:
            try:
                draw()
            except OSError:
                self._progress.disable = True
                with contextlib.suppress(Exception):  # half started or half stopped
                    self._progress.live.stop()

    each_step = False  # it only counts

    def on_step(self, run: Run) -> None:
        """After each step, or several; drawn a few times a second at most."""
        self.run = run
        if not self._progress.disable and (now := time.monotonic()) - self._shown > 0.1:
            self._shown = now
            self._update(run)

    def __call__(self, run: Run) -> None:
        """After each epoch."""
        self.run = run
        h = run.history
        words = [f"cost {h.train_cost[-1]:.4f}"]
        if (accuracy := h.train_accuracy[-1]) is not None:
            words.append(f"accuracy {accuracy:.2%}")
        if not self._progress.disable:
            self._progress.update(self._task, last=", ".join(words))
            self._update(run)
            line = f"epoch {run.epoch}/{run.epochs}  {'  '.join(words)}  {h.seconds[-1]:.1f} s"
            self._show(lambda: self._console.print(line))

    def _update(self, run: Run) -> None:
        total = run.epochs * run.steps_per_epoch
        self._progress.update(self._task, total=total, completed=run.step, epoch=f"{run.epoch}/{run.epochs}")


def summary(result: dict[str, Any], reason: str) -> str:
    """The JSON of a training run, for people."""
    lines = [
        f"{'/'.join(map(str, result['layers']))}, {result['parameters']} parameters, {result['precision']}, "
        f"on {result['backend']} ({result['device']}): {reason}; steps run as {result['executor']}",
        f"{result['epochs']} epochs, {result['steps']} steps in {result['train_seconds']:.1f} s, "
        f"{result['samples_per_second'] or 0:.0f} samples/s",
        f"training cost {result['train_cost']:.4f}{_percent(', accuracy', result['train_accuracy'])} in the last epoch",
    ]
    if result.get("gradient_error") is not None:
        lines.append(f"first gradient {result['gradient_error']:.2g} from float64's, relative")
    if result["stopped"] != "epochs":
        lines.append(f"stopped by {STOPPED[result['stopped']]}")
    if result.get("best_epoch") is not None:
        lines.append(f"the parameters are those of epoch {result['best_epoch']}, the best")
    for epoch, norms in enumerate(result.get("gradient_norms", []), 1):
        lines.append(f"epoch {epoch}: ||dC/dW|| by layer {' '.join(f'{norm:.3g}' for norm in norms)}")
    if result["test_cost"] is not None:
        lines.append(f"test cost {result['test_cost']:.4f}" + _percent(", accuracy", result["test_accuracy"]))
    return "\n".join(map(one_line, lines))


def _percent(what: str, share: float | None) -> str:
    return "" if share is None else f"{what} {100 * share:.2f} %"


def versions(cupy: Any = None) -> dict[str, str | None]:
    """Versions of what a run depends on, CUDA's as `cupy` tells them; None for what is not found."""
    import importlib.metadata  # slow, as rich is

    found: dict[str, str | None] = {"backprop_gpu": __version__, "python": platform.python_version()}
    for name in ("numpy", "numba", "click", "rich", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found |= dict.fromkeys(backends.WHEELS) | backends.cupy_packages()
    found["nvrtc"] = found["cuda_runtime"] = None
    with contextlib.suppress(Exception):
        found["nvrtc"] = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    with contextlib.suppress(Exception):
        found["cuda_runtime"] = backends.cuda_version(cupy.cuda.runtime.runtimeGetVersion())
    driver = backends.driver_cuda()
    found["cuda_driver"] = backends.cuda_version(driver) if driver else None
    return found


def blas() -> dict[str, Any]:
    """The BLAS library under NumPy: name and version; where it tells (OpenBLAS), its kernels and threads."""
    built = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    of_numpy = {"name": built.get("name"), "version": built.get("version")}
    return {**of_numpy, "core": openblas.core(), "threads": openblas.threads.now()}


def doctor(backend: Backend) -> dict[str, Any]:
    """What this machine is made of, as far as a run depends on it, and what keeps a GPU from use; never raises."""
    try:
        index = backends.device_index()
    except ConfigError:
        index = 0
    machine = backends.examine(index)
    found = versions(machine.cupy)
    return {
        "backend": backend.name,
        "reason": backend.reason,
        "cure": backend.cure or None,
        "device": backend.device,
        "rung": rung(backend),
        "numba": numba(backend),
        "gpu": gpu(machine),
        "faults": faults(machine, found),
        "versions": found,
        "blas": blas(),
        "cpus": openblas.cores(),
        "platform": platform.platform(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }


def model(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What is in a model file or a checkpoint, once it has been found sound; CheckpointError says why it is not."""
    net, run, version = checkpoint.read(path, "numpy")
    settings = {name: getattr(net, name) for name in (*checkpoint.SETTINGS, "cost", "task")}
    found = {"file": os.fspath(path), "bytes": os.path.getsize(path), "format_version": version, "sound": True}
    found |= {**settings, "parameters": net.parameter_count, "run": None}
    if run:
        found["run"] = {
            **run.progress(), "steps_per_epoch": run.steps_per_epoch, "settings": run.settings, "where": run.where,
            "clock": run.clock, "history": {name: column.tolist() for name, column in run.columns.items()},
        }  # fmt: skip
    return found


def model_text(found: dict[str, Any]) -> str:
    """`model` for people."""
    run = found["run"]
    lines = [
        f"file         {found['file']}: {found['bytes']} bytes, format {found['format_version']}, "
        "sound: names, shapes, digests, numbers",
        f"network      {'/'.join(map(str, found['layers']))}, {found['parameters']} parameters, {found['precision']}, "
        f"seed {found['seed']}",
        f"functions    hidden {found['hidden']}, output {found['output']}, cost {found['cost']}; "
        f"predicts {found['task']}",
    ]
    if run is None:
        return "\n".join(map(one_line, [*lines, "run          none: a network alone"]))
    total, seconds = run["epochs"] * run["steps_per_epoch"], run["clock"]["elapsed"]
    over = f"over, by {STOPPED.get(run['stopped'], 'its epochs')}" if run["stopped"] else "to go on with resume"
    lines.append(f"run          {run['epoch']} of {run['epochs']} epochs, {run['step']} of {total} steps: {over}")
    told = {key: value for key, value in run["settings"].items() if value not in (None, False, 0) and key != "data"}
    shown = (f"{key} {_setting(value)}" for key, value in told.items() if key != "validation")
    lines.append(f"settings     {', '.join(shown)}")
    of = {key: column[-1] for key, column in run["history"].items() if column and key != "gradient_norms"}
    if of:
        words = (f"{key.replace('_', ' ')} {value:.6g}" for key, value in of.items())
        lines.append(f"last epoch   {', '.join(words)}")
    where = (f"{key} {value}" for key, value in run["where"].items() if key != "rung")
    return "\n".join(map(one_line, [*lines, f"written on   {', '.join(where)}, after {seconds:.1f} s"]))


def _setting(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    fields = (f"{key}={_setting(v)}" for key, v in value.items() if key != "name" and v not in (None, False))
    return f"{value.get('name')}({', '.join(fields)})"


def rung(backend: Backend) -> dict[str, str]:
    """How a run is executed, and why not faster."""
    if backend.name == "numpy":
        return {"name": "numpy", "reason": backend.reason}
    wanted = os.environ.get("BACKPROP_GPU_EXECUTOR") or "auto"
    if wanted == "eager":
        return {"name": "eager kernels", "reason": f"{backend.reason}; BACKPROP_GPU_EXECUTOR is eager"}
    return {"name": "graph", "reason": f"{backend.reason}; steps are recorded as CUDA graphs"}


def numba(backend: Backend) -> dict[str, Any]:
    """Whether numba compiles the operations, and why not."""
    if backend.fast:
        return {"used": True, "reason": None}
    if backend.name != "numpy":
        return {"used": False, "reason": "they run on a GPU"}
    try:
        return {"used": False, "reason": backends.no_fast(os.environ.get("BACKPROP_GPU_FAST") or "auto")}
    except ConfigError as e:
        return {"used": False, "reason": e.cause}


def gpu(machine: Machine) -> dict[str, Any] | None:
    """Facts about the card, if there is one; its free memory (bytes) only where it may be used."""
    if not machine.card:
        return None
    found = {**machine.card, "memory_free": None}
    if machine.fault is None:
        with contextlib.suppress(Exception), machine.cupy.cuda.Device(machine.card["index"]):
            found["memory_free"] = machine.cupy.cuda.runtime.memGetInfo()[0]
    return found


def faults(machine: Machine, found: dict[str, str | None]) -> list[dict[str, Any]]:
    """Each kind of fault that can keep a GPU from being used: whether it was found, what it says, its cure.

    A trial ends at its first fault; kinds that only a later part of it can show say "not looked for".
    """
    first, seen = machine.fault, {}
    if len(builds := backends.cupy_builds()) > 1:
        seen["packages"] = (f"several CuPy packages are installed: {', '.join(builds)}", backends.one_build())
    if (trouble := backends.cache_trouble or backends.unwritable_cache()) and machine.cupy:
        seen["cache"] = (f"CuPy cannot keep compiled kernels: {trouble}", backends.CACHE_CURE)
    if first and first.kind in ("cupy", "packages") and found["cuda_driver"] is None:
        seen["driver"] = ("there is no NVIDIA driver", "install the driver, or go on with NumPy")
    if first and machine.cupy and found["nvrtc"] is None:
        seen["libraries"] = ("NVRTC is not found", backends.LIBRARIES_CURE.format(backends.wheel()))
    if first:
        seen[first.kind] = (first.cause, first.cure)
    kinds = list(backends.FAULTS)
    later = kinds[kinds.index(first.kind) + 1 : kinds.index("cache")] if first else []
    told = []
    for kind in kinds:
        says, cure = seen.get(kind, ("not looked for" if kind in later else None, None))
        told.append({"fault": kind, "found": kind in seen, "says": says, "cure": cure})
    return told


_VARIABLES = ("BACKPROP_GPU_", "CUDA_VISIBLE_DEVICES", "CUPY_", "OMP_NUM_THREADS", "OPENBLAS_", "MKL_NUM_THREADS")


def doctor_text(found: dict[str, Any]) -> str:
    """`doctor` for people."""
    b, of, compiled = found["blas"], dict(found["versions"]), found["numba"]
    driver = of.pop("cuda_driver")
    lines = [
        f"backend      {found['backend']}: {found['reason']}",
        f"rung         {found['rung']['name']}: {found['rung']['reason']}",
        "operations   " + ("compiled by numba" if compiled["used"] else f"without numba: {compiled['reason']}"),
        *(f"fault        {f['fault']}: {f['says']}; cure: {f['cure']}" for f in found["faults"] if f["found"]),
        _no_faults(found["faults"]),
        f"device       {found['device']}, {found['cpus']} CPU cores, {found['platform']}",
        *_gpu_text(found["gpu"]),
        f"BLAS         {b['name']} {b['version']}"
        + (f", {b['core']} kernels, {b['threads']} threads" if b["threads"] else ", threads unknown"),
        *(f"{name:<12} {version or 'not installed'}" for name, version in of.items()),
        f"driver       {'runs CUDA up to ' + driver if driver else 'none for NVIDIA'}",
        *(f"environment  {k}={v}" for k, v in found["environment"].items()),
    ]
    return "\n".join(lines)


def _no_faults(told: list[dict[str, Any]]) -> str:
    absent = [f["fault"] for f in told if not f["found"] and not f["says"]]
    later = [f["fault"] for f in told if not f["found"] and f["says"]]
    return f"no fault     {', '.join(absent) or 'none'}" + (f"; not looked for: {', '.join(later)}" if later else "")


def _gpu_text(card: dict[str, Any] | None) -> list[str]:
    if card is None:
        return []
    gib = {key: f"{(card[key] or 0) / 2**30:.1f} GiB" for key in ("memory_total", "memory_free")}
    words = {
        "compute_capability": f"compute capability {card['compute_capability']}",
        "multiprocessors": f"{card['multiprocessors']} multiprocessors",
        "memory_total": f"{gib['memory_total']} of memory",
        "memory_free": f"{gib['memory_free']} of it free",
        "compute_mode": f"compute mode {card['compute_mode']}",
        "mig": f"MIG slice {card['mig']}",
    }
    known = (text for key, text in words.items() if card[key] is not None)
    return [", ".join([f"GPU          {card['index']}: {card['name']}", *known])]


def plain(value: Any) -> Any:
    """`value` in JSON's words: NaN and infinities become None, NumPy's numbers and arrays Python's."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def one_line(text: str) -> str:
    """`text` without what would break the line or drive the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def tell(line: str) -> None:
    """A line on stderr, if anybody hears it."""
    with contextlib.suppress(OSError):
        print(one_line(line), file=sys.stderr)


def warn(message: Any, *_: Any) -> None:
    """A warning as one line on stderr; in the place of `warnings.showwarning`."""
    tell(f"backprop-gpu: warning: {' '.join(str(message).split())}")
