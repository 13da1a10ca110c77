"""One training step on the CPU, in this library and in its peers: microseconds, same network, data and mathematics.

    python -m benchmarks.peers [--out FILE]     all cells and libraries, some 15 minutes
    ... --quick             three cells, few repetitions, only threads tuned, nothing that compiles for long: no record
    ... --cells NAME ...    such as 784-100-10/128/adam
    ... --libraries ...     such as numpy torch
    ... --threads N         pin everything to N CPUs; default: all that this process may use
    ... --repetitions N     of each program in each cell; default 9
    ... --anyway            take times even on a machine that is busy

In the clock of a step: the rows of the step, which a permutation names, gathered and scaled to 0..1; forward (ReLU,
softmax); mean cross-entropy; backward; the optimizer's update; the step's loss kept. All in float32. The clock starts
when nothing is under way, and stops when everything is done. Outside of it: reading the data, drawing the permutation,
compiling, and the first steps after the others' turn.

Peers: NumPy as a tutorial writes it, scikit-learn's MLPClassifier.partial_fit, PyTorch eager and compiled, JAX with a
call a step and with a scan over 64 steps (16 large ones). Each is tuned, per cell: data as uint8 (gathered, then
divided) or as float32 already divided (before the clock), one thread or all, the foreach or the fused optimizer, XLA's
options; the quickest setting is taken and told. This library is tuned over threads alone; it is handed as many steps
as JAX's scan, for `train` hands its executor whole epochs, while peers that take a step a call are called for each.
A row says whether numba compiled its operations (`fast`) or not (`numpy`), and is an error where that is not so.
scikit-learn gathers by a shuffle of its own.

Each library and number of threads is a process of its own, pinned to its CPUs; all but one sleep while that one is
timed. Programs are timed in turn, A/B/C, C/B/A, ...; a ratio is of two times of one repetition. Every time starts from
the same initial parameters. A program whose first 20 losses stray from the float64 reference is rejected: it is told,
not timed, and counts nowhere. (scikit-learn's Adam adds eps elsewhere than all others, and is held to a reference that
does so, too.) The floor is `backprop_gpu.bench.Floor`: the step's matrix products alone, and the
optimizer's state once through memory. On a GPU `benchmarks.gpu_peers` is what compares.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from . import record
from .gpu_peers import one_line
from .peer_programs import (
    CELLS,
    CHECKED,
    LOSS_LIMIT,
    LR,
    MOMENTUM,
    QUICK,
    Cell,
    Choices,
    Fast,
    Jax,
    Library,
    Ours,
    ScikitLearn,
    Torch,
    Training,
    Tutorial,
    reference,
    strayed,
)

ROOT = Path(__file__).resolve().parent.parent
LEAST = 0.15  # seconds of a program in a repetition
REST = 0.1  # seconds between turns: the threads of OpenBLAS and OpenMP spin for a while after work
TUNED = 0.15  # seconds to judge a setting by
LONG = ("compiled", "jit")  # programs that a quick look leaves out
PATIENCE = 180.0  # seconds after which a worker is taken to hang

# -------------------------------------------------------------------------------------------------- the libraries


class Kind(NamedTuple):
    """A library by its name here: what serves it, as whose its rows count, the module it needs, its environment.

    `early_epsilon`: which Adam it has, see `reference`.
    """

    serves: Callable[[], Library]
    of: str
    needs: str
    environment: Mapping[str, str]
    programs: Sequence[str]
    early_epsilon: bool = False


KINDS = {
    "numpy": Kind(Ours, "backprop_gpu", "numpy", {"BACKPROP_GPU_FAST": "0"}, Ours.programs),
    "fast": Kind(Fast, "backprop_gpu", "numba", {"BACKPROP_GPU_FAST": "1"}, Fast.programs),
    "textbook": Kind(Tutorial, "textbook", "numpy", {}, Tutorial.programs),
    "sklearn": Kind(ScikitLearn, "sklearn", "sklearn", {}, ScikitLearn.programs, True),
    "torch": Kind(Torch, "torch", "torch", {}, Torch.programs),
    "jax": Kind(Jax, "jax", "jax", {"JAX_PLATFORMS": "cpu"}, Jax.programs),
}

# ------------------------------------------------------------------------------------------------ a worker's process


class Server:
    """Answers orders about one library: what `Worker.ask` sends is answered by the method of the same name."""

    def __init__(self, library: Library) -> None:
        self.lib = library
        self.trainings: dict[str, Training] = {}

    def answer(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """What is asked for, or {"error": why not}."""
        arguments = dict(order)
        try:
            found: dict[str, Any] = getattr(self, arguments.pop("do"))(**arguments)
        except Exception as e:
            return {"error": one_line(e)}
        return found

    def tune(self, program: str, cell: str, quick: bool, like: Mapping[str, Any]) -> dict[str, Any]:
        """The quickest setting of a program in a cell, which is kept; what was tried, and its first losses.

        `like`: settings that are not to be tuned; `quick`: none are.
        """
        of = Cell.of(cell)
        given = self.lib.choices(program)
        choices = Choices(
            {name: (like[name],) if name in like else values[: 1 if quick else None] for name, values in given.items()}
        )
        build = functools.partial(self.lib.build, program, of)
        best, tried, failed = tuned(build, choices)
        if best is None:
            raise RuntimeError(failed[0])
        self.trainings[program], setting = best
        losses = self.trainings[program].first_losses()
        told = getattr(self.trainings[program], "told", None)
        us = min(us for _, us in tried)
        return {
            "setting": setting, "us": us, "steps": self.trainings[program].steps, "losses": losses,
            "tried": tried, "failed": failed, **({"told": told} if told else {}),
        }  # fmt: skip

    def time(self, program: str, runs: int) -> dict[str, Any]:
        """Seconds of so many runs, from the initial parameters, after a run that is not timed."""
        return {"seconds": clocked(self.trainings[program], runs)}

    def drop(self, programs: Sequence[str]) -> dict[str, Any]:
        """Let go of programs."""
        for program in programs:
            self.trainings.pop(program, None)
        return {}


def tuned(
    build: Callable[[Mapping[str, Any]], Training], choices: Choices
) -> tuple[tuple[Training, dict[str, Any]] | None, list[tuple[dict[str, Any], float]], list[str]]:
    """The quickest of a program's settings, built; all that were tried, with microseconds a step; what failed.

    One choice is tuned after the other, with the best of those before.
    """
    setting = {name: values[0] for name, values in choices.items()}
    best: tuple[Training, dict[str, Any]] | None = None
    tried: list[tuple[dict[str, Any], float]] = []
    failed: list[str] = []
    least = math.inf

    def attempt(candidate: dict[str, Any]) -> None:
        nonlocal best, least
        try:
            training = build(candidate)
            us = 1e6 * quick_look(training)
        except Exception as e:
            failed.append(one_line(e))
            return
        tried.append((candidate, us))
        if us < least:
            best, least = (training, candidate), us

    attempt(setting)
    for name, values in choices.items():
        base = best[1] if best else setting
        for value in values[1:]:
            attempt({**base, name: value})
    return best, tried, failed


def quick_look(training: Training, seconds: float = TUNED) -> float:
    """Seconds a step, the least of some runs, after one that compiles and warms up."""
    least, end = math.inf, time.perf_counter() + seconds
    training.reset()
    training.run()
    training.wait()
    end = time.perf_counter() + seconds
    while least is math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        training.run()
        training.wait()
        least = min(least, time.perf_counter() - start)
    return least / training.steps


def clocked(training: Training, runs: int) -> float:
    """Seconds of so many runs."""
    training.reset()
    training.run()
    training.wait()
    start = time.perf_counter()
    for _ in range(runs):
        training.run()
    training.wait()
    return time.perf_counter() - start


def serve(kind: str) -> int:
    """A worker: an order a line on stdin, an answer a line on what was stdout; stdout itself is stderr's now."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)

        def say(words: Mapping[str, Any]) -> None:
            channel.write(json.dumps(words) + "\n")
            channel.flush()

        try:
            server = Server(KINDS[kind].serves())
        except Exception as e:
            say({"error": one_line(e)})
            return 1
        say({"versions": record.versions(), "affinity": record.affinity(), "blas": threads_told()})
        for line in sys.stdin:
            say(server.answer(json.loads(line)))
    return 0


def threads_told() -> list[dict[str, Any]] | None:
    """What threadpoolctl finds of BLAS and OpenMP in this process; None where it is not installed."""
    try:
        import threadpoolctl
    except ImportError:
        return None
    wanted = "user_api", "internal_api", "version", "num_threads", "architecture", "threading_layer"
    return [{key: pool[key] for key in wanted if key in pool} for pool in threadpoolctl.threadpool_info()]


# ------------------------------------------------------------------------------------------------------- the parent


class WorkerError(Exception):
    """A worker that failed, hangs, or has died; in one line."""


class Worker:
    """A process for one library and number of threads, pinned to as many of the `cpus`. Started when first asked."""

    def __init__(self, kind: str, threads: int, cpus: Sequence[int], command: Sequence[str] | None = None) -> None:
        self.kind, self.threads, self.cpus = kind, threads, list(cpus)[:threads]
        self.command = list(command or [sys.executable, "-m", "benchmarks.peers", "--worker", kind])
        self.process: subprocess.Popen[str] | None = None
        self.hello: dict[str, Any] = {}
        self.deaths = 0

    def start(self) -> None:
        """Start the process; it imports its library while we go on."""
        pools = ("OPENBLAS", "OMP", "MKL", "NUMBA")
        environment = record.environment(
            **{f"{pool}_NUM_THREADS": str(self.threads) for pool in pools}, **KINDS[self.kind].environment
        )
        self.log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        with pinned(self.cpus):
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self.log,
            )  # fmt: skip
        self.answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(self.process.stdout, self.answers), daemon=True).start()
        self.hello = {}

    @staticmethod
    def _read(lines: Iterable[str], answers: queue.SimpleQueue[str]) -> None:
        for line in lines:
            answers.put(line)
        answers.put("")  # it has ended

    def ask(self, do: str, seconds: float = PATIENCE, **order: Any) -> dict[str, Any]:
        """What the worker answers; WorkerError where it cannot, or does not within so many seconds."""
        if self.process is None:
            if self.deaths > 1:
                raise WorkerError("its process has ended twice")
            self.start()
        if not self.hello:
            self.hello = self._answer(seconds)
        assert self.process is not None
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # no answer tells as much
            self.process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self.process.stdin.flush()
        return self._answer(seconds)

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            line = self.answers.get(timeout=seconds)
        except queue.Empty:
            self.end()
            raise WorkerError(f"no answer within {seconds:.0f} s") from None
        if not line:
            code, tail = self.end()
            raise WorkerError(f"its process ended with code {code}{': ' + tail if tail else ''}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def end(self) -> tuple[int | None, str]:
        """End the process, if there is one; its code, and the last line it wrote to stderr."""
        process, self.process, self.hello = self.process, None, {}
        if process is None:
            return None, ""
        self.deaths += 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)  # one that has closed its stdout has a code of its own
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError, AttributeError):
                pipe.close()  # type: ignore[union-attr]
        self.log.seek(0)
        lines = self.log.read().splitlines()
        self.log.close()
        return code, lines[-1][:300] if lines else ""

    def close(self) -> None:
        """Let the process end by itself; kill it if it does not."""
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        self.end()


@contextlib.contextmanager
def pinned(cpus: Sequence[int]) -> Iterator[None]:
    """Within it, processes that are started are bound to these CPUs, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


Times = dict[Any, list[float]]


def interleaved(
    programs: Sequence[Any], clock: Callable[[Any], float], repetitions: int, rest: Callable[[], object]
) -> tuple[Times, dict[Any, str]]:
    """Times of each program, one a repetition: in turn, A/B/C, then C/B/A, and so on, with a rest before each.

    Returns them, and why those failed that did, which have none.
    """
    times: Times = {program: [] for program in programs}
    failed: dict[Any, str] = {}
    for r in range(repetitions):
        for program in programs if r % 2 == 0 else reversed(programs):
            if program in failed:
                continue
            rest()
            try:
                times[program].append(clock(program))
            except WorkerError as e:
                failed[program] = str(e)
                del times[program]
    return times, failed


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Their time over ours within each repetition: the median, and its spread, see `record.summary`."""
    found = record.summary([a / b for a, b in zip(theirs, ours, strict=True)])
    return {"ratio": found["median"], "spread": found["spread"]}


class Comparison:
    """All cells of a run: the workers, and how patiently they are timed."""

    def __init__(self, kinds: Sequence[str], cpus: Sequence[int], repetitions: int, quick: bool = False) -> None:
        self.repetitions, self.quick = repetitions, quick
        self.least = LEAST / 3 if quick else LEAST
        self.missing = [kind for kind in kinds if importlib.util.find_spec(KINDS[kind].needs) is None]
        self.all, counts = len(cpus), sorted({1, len(cpus)})
        self.workers = {
            (kind, threads): Worker(kind, threads, cpus)
            for kind in kinds
            for threads in counts
            if kind not in self.missing
        }
        self.kinds = list(kinds)

    def __enter__(self) -> Comparison:
        for worker in self.workers.values():
            worker.start()
        for worker in self.workers.values():  # nobody imports while times are taken
            with contextlib.suppress(WorkerError):
                worker.ask("drop", programs=[])
        return self

    def __exit__(self, *raised: object) -> None:
        for worker in self.workers.values():
            if worker.process is not None and worker.process.stdin is not None:
                with contextlib.suppress(OSError):
                    worker.process.stdin.close()  # all of them end at once
        for worker in self.workers.values():
            worker.end()

    def cell(self, cell: Cell) -> list[dict[str, Any]]:
        """The rows of a cell: each program checked, tuned and timed."""
        exact = {
            early: reference(cell, early_epsilon=early)
            for early in {KINDS[kind].early_epsilon and cell.optimizer == "adam" for kind in self.kinds}
        }
        time.sleep(REST)
        rows = [
            row
            for kind in self.kinds
            for row in self.tune(kind, cell, exact[KINDS[kind].early_epsilon and cell.optimizer == "adam"])
        ]
        able = [i for i, row in enumerate(rows) if "us" in row]
        runs = {i: max(1, math.ceil(self.least * 1e6 / (rows[i]["us"] * rows[i]["steps"]))) for i in able}

        def clock(i: int) -> float:
            row = rows[i]
            answer = self.workers[row["kind"], row["threads"]].ask("time", program=row["program"], runs=runs[i])
            seconds: float = answer["seconds"]
            return 1e6 * seconds / (runs[i] * row["steps"])

        times, failed = interleaved(able, clock, self.repetitions, lambda: time.sleep(REST))
        for i, why in failed.items():
            rows[i]["error"] = why
        for i, row in enumerate(rows):
            row.pop("us", None)
            if i in times:
                row |= timed_row(times[i]) | {"runs": runs[i]}
        for (kind, _), worker in self.workers.items():
            with contextlib.suppress(WorkerError):
                worker.ask("drop", programs=KINDS[kind].programs)
        return compared(rows)

    def tune(self, kind: str, cell: Cell, exact: Sequence[float]) -> Iterator[dict[str, Any]]:
        """A row for each program of a library, with its quickest setting, and what it is timed by."""
        first: dict[str, Any] = {}
        for program in KINDS[kind].programs:
            later = bool(first) and program == "compiled"
            if self.quick and program in LONG:
                continue
            row = {
                "cell": {"name": cell.name, "layers": list(cell.layers), "m": cell.m, "optimizer": cell.optimizer},
                "library": KINDS[kind].of, "program": program, "kind": kind, "steps": 0, "flop": cell.flop,
            }  # fmt: skip
            if kind in self.missing:
                yield row | {"error": f"not installed: {KINDS[kind].needs}"}
                continue
            # What compiles for long takes the threads and the data that eager steps are quickest with.
            like = {"data": first["setting"]["data"]} if later else {}
            found, errors = [], []
            for threads in [first["threads"]] if later else self.threads(program, cell):
                try:
                    answer = self.workers[kind, threads].ask(
                        "tune", program=program, cell=cell.name, quick=self.quick, like=like
                    )
                    found.append({"threads": threads, **answer})
                except WorkerError as e:
                    errors.append(f"{threads} threads: {e}")
                time.sleep(REST)
            if not found:
                yield row | {"error": "; ".join(errors)}
                continue
            best = min(found, key=lambda answer: answer["us"])
            row["tuning"] = [
                {"threads": answer["threads"], **setting, "us": us}
                for answer in found
                for setting, us in answer["tried"]
            ]
            row |= {key: best[key] for key in ("threads", "setting", "steps", "told") if key in best}
            row["tuned_us"] = best["us"]
            first = first or row
            if program != "floor":
                row |= strayed(best["losses"], exact)
            yield row if "rejected" in row else row | {"us": best["us"]}

    def threads(self, program: str, cell: Cell) -> list[int]:
        """The numbers of threads to try: the floor chooses by itself, and one does not do for a step of 3 GFLOP."""
        return [self.all] if program == "floor" or cell.flop > 3e9 else sorted({1, self.all})


def timed_row(us: Sequence[float]) -> dict[str, Any]:
    """What a row says of its times."""
    found = record.summary(us)
    return {
        "us": found["median"], "min_us": found["min"], "max_us": found["max"], "spread": found["spread"],
        "range": found["range"], "n": found["n"], "noisy": found["noisy"], "times_us": list(us),
    }  # fmt: skip


def is_ours(row: Mapping[str, Any], program: str) -> bool:
    """Whether this is the row of this library's program."""
    return row["library"] == "backprop_gpu" and row["program"] == program


def is_peer(row: Mapping[str, Any]) -> bool:
    """Whether this is another library's row, with times."""
    return row["library"] != "backprop_gpu" and "times_us" in row


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a cell with their ratios to ours, NumPy's ("ratio") and `fast`'s; ours with the floor's share."""
    timed = [row for row in rows if "times_us" in row]
    numpy, fast, floor = (
        next((row["times_us"] for row in timed if is_ours(row, program)), None)
        for program in ("numpy", "fast", "floor")
    )
    for row in timed:
        for key, ours in (("ratio", numpy), ("ratio_fast", fast)):
            if ours is not None and (is_peer(row) or row["program"] == "fast"):
                found = ratios(row["times_us"], ours)
                row |= {key: found["ratio"], f"{key}_spread": found["spread"]}
        if floor is not None and (is_ours(row, "numpy") or is_ours(row, "fast")):
            found = ratios(floor, row["times_us"])
            row |= {"floor_share": found["ratio"], "floor_share_spread": found["spread"]}
    return rows


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Over all cells: the geometric mean of the best peer's time over ours, where we lose, and the share of the floor.

    The best peer of a cell is the one whose median is least.
    """
    by_cell: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_cell.setdefault(row["cell"]["name"], []).append(row)
    found: dict[str, Any] = {}
    for program, key in (("numpy", "ratio"), ("fast", "ratio_fast")):
        best = {}
        for name, of_cell in by_cell.items():
            peers = [row for row in of_cell if is_peer(row) and key in row]
            if peers:
                least = min(peers, key=lambda row: row["us"])
                best[name] = {"library": least["library"], "program": least["program"], "ratio": least[key]}
        shares = [row["floor_share"] for row in rows_of(by_cell, program) if "floor_share" in row]
        found[program] = {
            "cells": best,
            "geometric_mean": geometric_mean([cell["ratio"] for cell in best.values()]),
            "lost": [name for name, cell in best.items() if cell["ratio"] < 1],
            "floor_share": geometric_mean(shares),
        }
    return found


def rows_of(by_cell: Mapping[str, Sequence[Mapping[str, Any]]], program: str) -> list[Mapping[str, Any]]:
    """This library's rows of a program."""
    return [row for rows in by_cell.values() for row in rows if is_ours(row, program)]


def geometric_mean(ratios: Sequence[float]) -> float | None:
    """The n-th root of the product; None of nothing."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


# --------------------------------------------------------------------------------------------------------- the table


def line(row: Mapping[str, Any]) -> str:
    """A row for people."""
    what = f"  {row['library']:<13}{row['program']:<12}"
    if "error" in row:
        return f"{what} {row['error']}"
    if "rejected" in row:
        return f"{what} REJECTED: {row['rejected']}"
    parts = [f"{row['us']:10.1f} us +-{100 * row['spread'] / 2:3.0f} %{'*' if row['noisy'] else ' '}"]
    for key, of in (("ratio", "NumPy"), ("ratio_fast", "fast")):
        if key in row:
            parts.append(f"{row[key]:6.2f} x {of}")
    if "floor_share" in row:
        parts.append(f"floor {100 * row['floor_share']:3.0f} %")
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    return f"{what}{'  '.join(parts)}  ({', '.join([threads, *map(str, filter(None, row['setting'].values()))])})"


def summary_lines(found: Mapping[str, Any]) -> list[str]:
    """The summary for people."""
    lines = []
    for program, of in found.items():
        if of["geometric_mean"] is None:
            continue
        mean, n = of["geometric_mean"], len(of["cells"])
        said = f"{program}: the best peer takes {mean:.2f} x ours, geometric mean of {n} cell{'s' * (n > 1)}"
        said += f"; the floor is {100 * of['floor_share']:.0f} % of ours" if of["floor_share"] else ""
        lines += [said, f"  where we lose: {', '.join(of['lost']) or 'nowhere'}"]
    return lines


def run(cells: Sequence[Cell], comparison: Comparison, out: Path | None, conditions: dict[str, Any]) -> dict[str, Any]:
    """Measure the cells, print rows as they come, and write the record after each; returns it."""
    result: dict[str, Any] = {
        "kind": "peers", "conditions": conditions,
        "settings": {
            "lr": LR, "momentum": MOMENTUM, "precision": "float32", "checked_steps": CHECKED, "loss_limit": LOSS_LIMIT,
            "repetitions": comparison.repetitions, "least_seconds": comparison.least, "quick": comparison.quick,
        },
        "workers": [], "rows": [], "summary": {},
    }  # fmt: skip
    with comparison:
        for cell in cells:
            print(cell.name, flush=True)
            rows = comparison.cell(cell)
            print(*map(line, rows), sep="\n", flush=True)
            result["rows"] += rows
            result["summary"] = summary(result["rows"])
            result["workers"] = [
                {"kind": kind, "threads": threads, "cpus": worker.cpus, **worker.hello}
                for (kind, threads), worker in comparison.workers.items()
            ]
            if out is not None:
                record.write(out, result)
    print(*summary_lines(result["summary"]), sep="\n")
    return result


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="three cells, few repetitions, little tuning, no torch.compile: a look"
    )
    parser.add_argument("--out", type=Path, help="the record, JSON")
    parser.add_argument("--cells", nargs="+", type=Cell.of, metavar="NAME", help=f"of {CELLS[0].name}, ...")
    parser.add_argument("--libraries", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--threads", type=int, help="the most threads a program may take")
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--anyway", action="store_true", help="on a busy machine, too")
    parser.add_argument("--worker", choices=list(KINDS), help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.threads is not None and not 1 <= asked.threads <= len(record.affinity()):
        parser.error(f"--threads {asked.threads}: this process may use 1 to {len(record.affinity())} CPUs")
    if asked.repetitions is not None and asked.repetitions < 1:
        parser.error("--repetitions must be 1 or more")
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for."""
    asked = parsed(arguments)
    if asked.worker:
        return serve(asked.worker)
    record.refuse_if_loaded(asked.anyway)
    conditions = record.conditions(record.UNSET)
    cpus = record.affinity()[: asked.threads]
    repetitions = asked.repetitions or (3 if asked.quick else 9)
    comparison = Comparison(asked.libraries, cpus, repetitions, asked.quick)
    run(asked.cells or (QUICK if asked.quick else CELLS), comparison, asked.out, conditions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
