"""What the command line shows: the progress bar, the summary of a run, and what this machine is made of."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import math
import os
import platform
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import __version__
from .backend import WHEELS, Backend, driver_cuda
from .training import Run

STOPPED = {
    "gradient": "the norm of the gradient",
    "still": "parameters that stand still",
    "patience": "the validation cost, which fell no more",
    "time": "the time limit",
    "callback": "a callback",
}


class ProgressBar:
    """A callback of `train` that shows steps, cost and accuracy on stderr if that is a terminal, else nothing."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, color_system=None if os.environ.get("NO_COLOR") else "auto")
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, epoch="", last="")
        self._shown = 0.0
        self.run: Run | None = None

    def __enter__(self) -> ProgressBar:
        if not self._progress.disable:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if not self._progress.disable:
            self._progress.stop()

    def on_step(self, run: Run) -> None:
        """After each step; drawn a few times a second at most."""
        self.run = run
        if not self._progress.disable and (now := time.monotonic()) - self._shown > 0.1:
            self._shown = now
            self._update(run)

    def __call__(self, run: Run) -> None:
        """After each epoch."""
        h = run.history
        words = [f"cost {h.train_cost[-1]:.4f}"]
        if (accuracy := h.train_accuracy[-1]) is not None:
            words.append(f"accuracy {accuracy:.2%}")
        if not self._progress.disable:
            self._progress.update(self._task, last=", ".join(words))
            self._update(run)
            self._console.print(f"epoch {run.epoch}/{run.epochs}  {'  '.join(words)}  {h.seconds[-1]:.1f} s")

    def _update(self, run: Run) -> None:
        total = run.epochs * run.steps_per_epoch
        self._progress.update(self._task, total=total, completed=run.step, epoch=f"{run.epoch}/{run.epochs}")


def summary(result: dict[str, Any], reason: str) -> str:
    """The JSON of a training run, for people."""
    lines = [
        f"{'/'.join(map(str, result['layers']))}, {result['parameters']} parameters, {result['precision']}, "
        f"on {result['backend']} ({result['device']}): {reason}",
        f"{result['epochs']} epochs, {result['steps']} steps in {result['train_seconds']:.1f} s, "
        f"{result['samples_per_second']:.0f} samples/s",
        f"training cost {result['train_cost']:.4f}{_percent(', accuracy', result['train_accuracy'])} in the last epoch",
    ]
    if result["stopped"] != "epochs":
        lines.append(f"stopped by {STOPPED[result['stopped']]}")
    if result.get("best_epoch") is not None:
        lines.append(f"the parameters are those of epoch {result['best_epoch']}, the best")
    for epoch, norms in enumerate(result.get("gradient_norms", []), 1):
        lines.append(f"epoch {epoch}: ||dC/dW|| by layer {' '.join(f'{norm:.3g}' for norm in norms)}")
    if result["test_cost"] is not None:
        lines.append(f"test cost {result['test_cost']:.4f}" + _percent(", accuracy", result["test_accuracy"]))
    return "\n".join(lines)


def _percent(what: str, share: float | None) -> str:
    return "" if share is None else f"{what} {100 * share:.2f} %"


def versions(backend: Backend) -> dict[str, str | None]:
    """Versions of what a run depends on; None for what is not installed."""
    found: dict[str, str | None] = {"backprop_gpu": __version__, "python": platform.python_version()}
    for name in ("numpy", "click", "rich", "safetensors", *WHEELS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if backend.name == "cupy":
        found["cuda_runtime"] = _cuda(backend.xp.cuda.runtime.runtimeGetVersion())
    found["cuda_driver"] = _cuda(driver_cuda())
    return found


def _cuda(version: int) -> str | None:
    return f"{version // 1000}.{version % 1000 // 10}" if version else None


def blas() -> dict[str, Any]:
    """The BLAS library under NumPy: name and version; where it tells (OpenBLAS), its kernels and threads."""
    built = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    info: dict[str, Any] = {"name": built.get("name"), "version": built.get("version"), "core": None, "threads": None}
    package = Path(np.__file__).parent
    for library in (*package.parent.glob("numpy.libs/*openblas*"), *package.glob(".dylibs/*openblas*")):
        try:
            loaded = ctypes.CDLL(str(library))
        except OSError:
            continue
        for prefix, suffix in (("scipy_", "64_"), ("", "64_"), ("", "")):
            try:
                core = getattr(loaded, f"{prefix}openblas_get_corename{suffix}")
                threads = getattr(loaded, f"{prefix}openblas_get_num_threads{suffix}")
            except AttributeError:
                continue
            core.restype = ctypes.c_char_p
            info.update(core=core().decode(), threads=int(threads()))
            return info
    return info


def doctor(backend: Backend) -> dict[str, Any]:
    """What this machine is made of, as far as a run depends on it."""
    return {
        "backend": backend.name,
        "reason": backend.reason,
        "cure": backend.cure or None,
        "device": backend.device,
        "versions": versions(backend),
        "blas": blas(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": platform.platform(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }


_VARIABLES = ("BACKPROP_GPU_", "CUDA_VISIBLE_DEVICES", "CUPY_", "OMP_NUM_THREADS", "OPENBLAS_", "MKL_NUM_THREADS")


def doctor_text(found: dict[str, Any]) -> str:
    """`doctor` for people."""
    b, of = found["blas"], dict(found["versions"])
    driver = of.pop("cuda_driver")
    lines = [f"backend      {found['backend']}: {found['reason']}"]
    if found["cure"]:
        lines.append(f"for a GPU    {found['cure']}")
    lines += [
        f"device       {found['device']}, {found['cpus']} CPU cores, {found['platform']}",
        f"BLAS         {b['name']} {b['version']}"
        + (f", {b['core']} kernels, {b['threads']} threads" if b["threads"] else ", threads unknown"),
        *(f"{name:<12} {version or 'not installed'}" for name, version in of.items()),
        f"driver       {'runs CUDA up to ' + driver if driver else 'none for NVIDIA'}",
        *(f"environment  {k}={v}" for k, v in found["environment"].items()),
    ]
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """`value` in JSON's words: NaN and infinities become None, NumPy's numbers and arrays Python's."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tell(line: str) -> None:
    """A line on stderr, if anybody hears it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


def warn(message: Any, *_: Any) -> None:
    """A warning as one line on stderr; in the place of `warnings.showwarning`."""
    tell(f"backprop-gpu: warning: {' '.join(str(message).split())}")
