"""What a benchmark's record holds beside its times: the conditions they were taken under, and their summary."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROC_STAT = Path("/proc/stat")
LIBRARIES = ("backprop-gpu", "numpy", "numba", "torch", "jax", "jaxlib", "scikit-learn", "scipy", "threadpoolctl")
VARIABLES = ("OPENBLAS_", "OMP_", "MKL_", "NUMBA_", "XLA_", "BACKPROP_GPU_")  # how the names begin that are recorded
UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # each would choose kernels, or their blocks, for the CPU of another
BUSY = 0.10  # the share of the CPUs' time that others may take
NOISY = 0.10  # a larger spread is flagged


class LoadedError(SystemExit):
    """Others are at work on this machine: a line of cause, a line of cure. Not caught, it ends the program with 1."""


# ------------------------------------------------------------------------------------------------------- conditions


def conditions(unset: Sequence[str] = ()) -> dict[str, Any]:
    """What the figures depend on: when, which command and commit, versions, CPU, load, BLAS, environment.

    `unset`: variables that are taken out of the environment of what is measured.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(),
        **commit(),
        "versions": versions(),
        "doctor": doctor(),
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "affinity": affinity(),
        "cpu_mhz": cpu_mhz(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "busy_before": busy(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
        "unset": {name: os.environ.get(name) for name in unset},
    }


def command() -> str:
    """The command line, as it is to be typed from the root of the repository."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else " ".join(["python", Path(sys.argv[0]).name])
    return " ".join([program, *sys.argv[1:]])


def commit() -> dict[str, Any]:
    """The commit of the repository, and whether files differ from it; None where git does not tell."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        head, changes = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
        return {"commit": head, "dirty": bool(changes)}
    return {"commit": None, "dirty": None}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that are compared; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def doctor() -> dict[str, Any]:
    """What `backprop-gpu doctor` tells, BLAS and its threads among it, or why it does not."""
    told = subprocess.run(
        [sys.executable, "-m", "backprop_gpu", "doctor", "--json"],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    if told.returncode:
        return {"error": told.stderr.strip()[-300:]}
    found: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return found


def cpu_model() -> str:
    """The CPU's name."""
    names = _of_cpuinfo("model name")
    return names[0] if names else platform.processor()


def cpu_mhz() -> list[float]:
    """The clock of each CPU at this moment, where the system tells; else nothing."""
    return [float(mhz) for mhz in _of_cpuinfo("cpu MHz")]


def _of_cpuinfo(key: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key]


def affinity() -> list[int]:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def environment(**more: str) -> dict[str, str]:
    """The environment for what is measured: this one without `UNSET`, and with more."""
    return {name: value for name, value in os.environ.items() if name not in UNSET} | more


# ------------------------------------------------------------------------------------------------------------- load


def busy(seconds: float = 0.5, sleep: Callable[[float], object] = time.sleep) -> float | None:
    """The share of all CPUs' time, 0..1, that was not idle during so many seconds; None where the system has no count.

    While this waits, this process does nothing: what is counted is the others' work, a hypervisor's theft included.
    """
    try:
        before = _jiffies()
        sleep(seconds)
        after = _jiffies()
    except (OSError, ValueError, IndexError):
        return None
    whole = sum(after) - sum(before)
    idle = sum(after[3:5]) - sum(before[3:5])
    return 1 - idle / whole if whole > 0 else 0.0


def _jiffies() -> list[int]:
    """Of all CPUs since the start: user, nice, system, idle, iowait, irq, softirq, steal."""
    name, *counts = PROC_STAT.read_text().splitlines()[0].split()
    if name != "cpu":
        raise ValueError("no line of all CPUs")
    return [int(count) for count in counts[:8]]


def refuse_if_loaded(anyway: bool = False) -> None:
    """Raise LoadedError where others keep the CPUs busy, more than 10 % of them, unless `anyway`.

    It is measured, over half a second, for the load average lags by minutes; that is asked where nothing else tells.
    To be called before any work is started.
    """
    if anyway:
        return
    share = busy()
    if share is None and hasattr(os, "getloadavg"):
        share = os.getloadavg()[0] / (os.cpu_count() or 1)
    if share is not None and share > BUSY:
        raise LoadedError(
            f"this machine is busy: {100 * share:.0f} % of its CPU time goes to other work\n"
            "wait until it is idle, or take the times anyway with --anyway"
        )


# ------------------------------------------------------------------------------------------------ times and records


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Of one figure's repetitions: median, min, max, spread, range, n, and whether it is noisy, spread above 10 %.

    The spread is the middle half of the times over their median, (q75 - q25) / median with the quartiles interpolated
    between the sorted times: one interrupted repetition among many does not move it, a machine that wavers does. The
    range is (max - min) / median.
    """
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [median] * 3
    spread = (high - low) / median
    return {
        "median": median, "min": min(times), "max": max(times), "spread": spread,
        "range": (max(times) - min(times)) / median, "n": len(times), "noisy": spread > NOISY,
    }  # fmt: skip


def write(path: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Write a record as JSON, whole or not at all."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            json.dump(record, f, indent=1)
            f.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
