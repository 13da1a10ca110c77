"""This project's own training steps A to D on a GPU, per rung of execution and precision: see `gpu_recipe`.

python -m benchmarks.gpu_steps [FILE]       a line of JSON a row, to stdout and to the file
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
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
from .gpu_recipe import LR, RECIPES, Check, Program, Recipe

Emit = Callable[[dict[str, Any]], None]
RUNGS: tuple[tuple[str, type[Eager], str], ...] = (
    ("graph", Graph, "float32"), ("graph", Graph, "tf32"), ("graph", Graph, "bf16"), ("eager", Eager, "float32"),
)  # fmt: skip


def steps(emit: Emit, recipes: Iterator[Recipe] | None = None) -> bool:
    """A row for each recipe, rung and precision; whether every one follows the reference."""
    right = True
    for recipe in recipes or RECIPES.values():
        check, programs, rows = Check(recipe), {}, {}
        for rung, executor_class, precision in RUNGS:
            key = rung, precision
            try:
                executor = _executor(recipe, executor_class, precision)
                with executor.problem.net.backend.active():
                    rows[key] = check(precision, *_first(recipe, executor))
                    programs[key] = _program(recipe, executor)
                rows[key] |= {"executor": executor.rung, "plan": executor.description}
            except Exception as e:
                rows[key] = {"error": f"{type(e).__name__}: {e}"[:300]}
        times = gpu_recipe.timed(programs)
        for (rung, precision), row in rows.items():
            right &= "rejected" not in row and "error" not in row
            emit(
                {"recipe": recipe.name, "library": "backprop_gpu", "program": rung, "precision": precision, **row,
                 **times.get((rung, precision), {})}
            )  # fmt: skip
    return right


def _executor(recipe: Recipe, kind: type[Eager], precision: str) -> Eager:
    X, y = gpu_recipe.data()
    net = bp.Network(list(recipe.layers), precision=precision, seed=0, backend="cupy")
    with net.backend.active():
        samples = Samples(X, y.astype(np.int64), None, "labels").on(net.backend.asarray)
        problem = Problem(net, COSTS["cross_entropy"], samples, "mean", Regularization(), 0)
        return kind(problem, bp.Adam(LR), recipe.m, 0, recipe.steps)


def _begin(recipe: Recipe, executor: Eager) -> None:
    order = gpu_recipe.order(recipe, recipe.steps).ravel()
    executor.begin(order, [recipe.m * i for i in range(recipe.steps + 1)], [LR] * recipe.steps, 1)


def _run(recipe: Recipe, executor: Eager) -> None:
    done = 0
    while done < recipe.steps:
        done += executor.run(done, recipe.steps - done, False)
    executor.finish()


def _first(recipe: Recipe, executor: Eager) -> tuple[list[float], list[np.ndarray]]:
    """The losses of the first steps, and the gradient of the first one."""
    net = executor.problem.net
    order = gpu_recipe.order(recipe, recipe.steps).ravel()
    ends = [recipe.m * i for i in range(recipe.steps + 1)]
    views = Views(to_host(executor._first_gradient(order, ends)), net.layers, net.biased)
    _begin(recipe, executor)
    _run(recipe, executor)
    gradient = [g for l in range(1, net.L + 1) for g in (views.W[l], views.b[l])]
    return (to_host(executor.measured)[: recipe.steps, 0] / recipe.m).tolist(), gradient


def _program(recipe: Recipe, executor: Eager) -> Program:
    """The same steps again and again, from wherever theta is."""
    stream = executor.problem.net.backend.xp.cuda.get_current_stream()
    _begin(recipe, executor)
    if isinstance(executor, Graph):
        first = executor._state.copy()

        def replay() -> None:
            executor._state[...] = first
            done = 0
            while done < recipe.steps:
                done += executor.run(done, recipe.steps - done, False)

        return Program(replay, stream.synchronize, recipe.steps)
    return Program(lambda: _run(recipe, executor), stream.synchronize, recipe.steps)


def main() -> int:
    """Results to stdout, and to a file where one is named."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else None

    def emit(row: dict[str, Any]) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        if path is not None:
            with path.open("a", encoding="utf-8") as f:
                f.write(line + "\n")

    return 0 if steps(emit) else 1


if __name__ == "__main__":
    sys.exit(main())
