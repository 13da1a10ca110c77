"""This project's own training steps A to D on a GPU, per rung of execution and precision: see `gpu_recipe`.

python -m benchmarks.gpu_steps [FILE]                       a line of JSON a row, to stdout and to the file
python -m benchmarks.gpu_steps --build RECIPE PRECISION     its kernels alone, into CuPy's cache on disk
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import backprop_gpu as bp
from backprop_gpu.backend import to_host
from backprop_gpu.costs import COSTS
from backprop_gpu.executors import Eager, Graph, Problem
from backprop_gpu.inputs import Samples
from backprop_gpu.network import Views
from backprop_gpu.regularization import Regularization

from . import gpu_recipe
from .gpu_recipe import ALONE, LR, PRECISIONS, RECIPES, Check, Program, Recipe, Turns, printed

ROOT = Path(__file__).resolve().parent.parent
Emit = Callable[[dict[str, Any]], None]
RUNGS: tuple[tuple[str, type[Eager], str], ...] = (
    ("graph", Graph, "float32"), ("graph", Graph, "tf32"), ("graph", Graph, "bf16"), ("eager", Eager, "float32"),
)  # fmt: skip


def steps(emit: Emit, recipes: Sequence[Recipe] = tuple(RECIPES.values()), turns: Turns = ALONE) -> bool:
    """A row for each recipe, rung and precision; whether every one follows the reference."""
    right = True
    for recipe in recipes:
        programs, rows = {}, {}
        with turns.building():
            check = Check(recipe)
        for rung, executor_class, precision in RUNGS:
            key = rung, precision
            with turns.building():
                try:
                    executor = executor_of(recipe, executor_class, precision)
                    with executor.problem.net.backend.active():
                        rows[key] = check(precision, *_first(recipe, executor))
                        programs[key] = _program(recipe, executor)
                    rows[key] |= {"executor": executor.rung, "plan": executor.description}
                except Exception as e:
                    rows[key] = {"error": f"{type(e).__name__}: {e}"[:300]}
        with turns.timing():
            times = gpu_recipe.timed(programs)
        for (rung, precision), row in rows.items():
            right &= "rejected" not in row and "error" not in row
            emit(
                {"recipe": recipe.name, "library": "backprop_gpu", "program": rung, "precision": precision, **row,
                 **times.get((rung, precision), {})}
            )  # fmt: skip
    return right


def build_ahead(limit: float) -> None:
    """Compile the kernels of all graphs, each in a process: NVRTC takes a second or more for one, on one core.

    Stops after `limit` seconds. What does not compile is told when it is to run.
    """
    end = time.monotonic() + limit

    def build(name: str, precision: str) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu_steps", "--build", name, precision]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, cwd=ROOT, capture_output=True, timeout=max(0.1, end - time.monotonic()))

    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as pool:
        for name in reversed(RECIPES):  # the largest data first
            for precision in PRECISIONS:
                pool.submit(build, name, precision)


def executor_of(recipe: Recipe, kind: type[Eager], precision: str) -> Eager:
    """What trains the recipe's network on the recipe's data."""
    X, y = gpu_recipe.data()
    net = bp.Network(list(recipe.layers), precision=precision, seed=0, backend="cupy")
    with net.backend.active():
        samples = Samples(X, y.astype(np.int64), None, "labels").on(net.backend.asarray)
        problem = Problem(net, COSTS["cross_entropy"], samples, "mean", Regularization(), 0)
        return kind(problem, bp.Adam(LR), recipe.m, 0, recipe.steps)


def begin(recipe: Recipe, executor: Eager) -> None:
    """An epoch of the recipe's steps."""
    order = gpu_recipe.order(recipe, recipe.steps).ravel()
    executor.begin(order, [recipe.m * i for i in range(recipe.steps + 1)], [LR] * recipe.steps, 1)


def _run(recipe: Recipe, executor: Eager) -> None:
    done = 0
    while done < recipe.steps:
        done += executor.run(done, recipe.steps - done)
    executor.finish()


def _first(recipe: Recipe, executor: Eager) -> tuple[list[float], list[np.ndarray]]:
    """The losses of the first steps, and the gradient of the first one."""
    net = executor.problem.net
    order = gpu_recipe.order(recipe, recipe.steps).ravel()
    ends = [recipe.m * i for i in range(recipe.steps + 1)]
    views = Views(to_host(executor._first_gradient(order, ends)), net.layers, net.biased)
    begin(recipe, executor)
    _run(recipe, executor)
    gradient = [g for l in range(1, net.L + 1) for g in (views.W[l], views.b[l])]
    return (to_host(executor.measured)[: recipe.steps, 0] / recipe.m).tolist(), gradient


def _program(recipe: Recipe, executor: Eager) -> Program:
    """The same steps again and again, from wherever theta is."""
    stream = executor.problem.net.backend.xp.cuda.get_current_stream()
    begin(recipe, executor)
    if isinstance(executor, Graph):
        first = executor._state.copy()

        def replay() -> None:
            executor._state[...] = first
            done = 0
            while done < recipe.steps:
                done += executor.run(done, recipe.steps - done)

        return Program(replay, stream.synchronize, recipe.steps)
    return Program(lambda: _run(recipe, executor), stream.synchronize, recipe.steps)


def main() -> int:
    """Results to stdout, and to a file where one is named."""
    if sys.argv[1:2] == ["--build"]:
        recipe, precision = RECIPES[sys.argv[2]], sys.argv[3]
        executor = executor_of(recipe, Graph, precision)
        with executor.problem.net.backend.active():
            _first(recipe, executor)
        return 0
    return 0 if steps(printed(*sys.argv[1:2])) else 1


if __name__ == "__main__":
    sys.exit(main())
