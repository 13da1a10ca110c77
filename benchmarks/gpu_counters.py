"""Hardware counters of the kernels of training steps A and B, by Nsight Compute: see `gpu_recipe`.

    python -m benchmarks.gpu_counters [FILE]    a line of JSON a kernel, to stdout and to the file
    python -m benchmarks.gpu_counters --run     what is profiled: a step of each, kernel by kernel

A kernel is run again and again until all counters are read, each time on what lay there before; caches stay as they
are, as in a graph, and so do clocks. Durations are those of a kernel alone on the device.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import gpu_steps
from .gpu_recipe import RECIPES, printed
from .gpu_step_cases import Uncaptured

ROOT = Path(__file__).resolve().parent.parent
PROFILED = tuple((recipe, precision) for recipe in "AB" for precision in ("float32", "tf32"))
SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats")
METRICS = {  # what a row calls them, and Nsight Compute
    "duration_ns": "gpu__time_duration.sum",
    "processors_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "memory_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1_percent": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "warps_active_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",  # the occupancy that is achieved
    "warps_possible_percent": "sm__maximum_warps_per_active_cycle_pct",
    "registers": "launch__registers_per_thread",
    "waves": "launch__waves_per_multiprocessor",
    "memory_bytes": "dram__bytes.sum",
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")  # cycles a warp waits an issue
STALLS = 4  # of the reasons, the largest
DONE = "profiled: "  # before what was launched, in JSON, when all of it was

Emit = Callable[[dict[str, Any]], None]


class Told(NamedTuple):
    """A row for each kernel that was profiled; if there is none, why, and whether Nsight Compute refused."""

    rows: list[dict[str, Any]]
    why: str = ""
    refused: bool = False


def find() -> str | None:
    """The path of ncu, or None."""
    places = [*sorted(glob.glob("/usr/local/cuda*/bin")), *sorted(glob.glob("/opt/nvidia/nsight-compute/*"))]
    return shutil.which("ncu") or shutil.which("ncu", path=os.pathsep.join(places))


def counters(emit: Emit, seconds: float = 60) -> Told:
    """A row for each kernel of the steps goes to `emit`."""
    tool = find()
    if tool is None:
        return Told([], "Nsight Compute (ncu) is not installed", refused=True)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [
            tool, "--csv", "--page", "raw", "--print-units", "base", "--print-kernel-base", "function",
            "--log-file", str(log), "--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none",
            *(word for section in SECTIONS for word in ("--section", section)), "--metrics", ",".join(METRICS.values()),
            sys.executable, "-m", "benchmarks.gpu_counters", "--run",
        ]  # fmt: skip
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
            said = done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            said = f"it took more than {seconds:.0f} s"
        told = read(log.read_text(encoding="utf-8", errors="replace") if log.exists() else "", said)
    for row in told.rows:
        emit(row)
    return told


def read(log: str, said: str) -> Told:
    """What Nsight Compute wrote into its log, and the program that it ran had to say."""
    errors = [line.removeprefix("==ERROR==").strip() for line in log.splitlines() if line.startswith("==ERROR==")]
    lines = list(csv.reader(line for line in log.splitlines() if line.startswith('"')))
    launched = [line.removeprefix(DONE) for line in said.splitlines() if line.startswith(DONE)]
    if len(lines) < 3 or not launched:
        last = [line for line in said.splitlines() if line.strip()][-3:]
        return Told([], " / ".join(errors or last) or "no kernel was profiled", refused=bool(errors))
    names, _, *values = lines  # the second tells units
    launches = json.loads(launched[0])
    rows = [_row(dict(zip(names, line, strict=False))) for line in values]
    if [row["kernel"] for row in rows] != [launch["kernel"] for launch in launches]:
        return Told([], f"{len(launches)} kernels were launched, and {len(rows)} profiled, which are not the same")
    return Told([{**launch, **row} for launch, row in zip(launches, rows, strict=True)])


def _row(columns: dict[str, str]) -> dict[str, Any]:
    """Of one kernel; None for a metric that this card does not have."""
    stalls = {match[1]: _number(text) or 0.0 for name, text in columns.items() if (match := STALL.fullmatch(name))}
    return {
        "kernel": re.sub(r"\W.*", "", columns["Kernel Name"]),
        "grid": columns.get("Grid Size"), "block": columns.get("Block Size"),
        **{key: _number(columns.get(name, "")) for key, name in METRICS.items()},
        "stalls": dict(sorted(stalls.items(), key=lambda one: -one[1])[:STALLS]),
    }  # fmt: skip


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def run() -> Iterator[dict[str, Any]]:
    """Launch a step of each kind, profiled, after one that is not; yields what was launched, in order."""
    for name, precision in PROFILED:
        recipe = RECIPES[name]
        executor = gpu_steps.executor_of(recipe, Uncaptured, precision)
        xp = executor.problem.net.backend.xp
        with executor.problem.net.backend.active(), contextlib.closing(executor):
            gpu_steps.begin(recipe, executor)
            executor.run(0, 1)
            xp.cuda.get_current_stream().synchronize()
            xp.cuda.runtime.profilerStart()
            executor._enqueue(recipe.m, 0)
            xp.cuda.get_current_stream().synchronize()
            xp.cuda.runtime.profilerStop()
            for o in executor.plan.operations:
                what = {"recipe": name, "precision": precision, "kernel": o.kernel, "equation": o.equation}
                yield {**what, "flop": o.flop, "bytes": o.bytes, "tile": o.tile and str(o.tile)}


def main() -> int:
    """Results to stdout, and to a file where one is named."""
    if sys.argv[1:] == ["--run"]:
        print(DONE + json.dumps(list(run())), flush=True)
        return 0
    told = counters(printed(*sys.argv[1:2]))
    if not told.rows:
        print(told.why, file=sys.stderr)
    return 0 if told.rows else 1


if __name__ == "__main__":
    sys.exit(main())
