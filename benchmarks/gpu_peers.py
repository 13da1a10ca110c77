"""The steps of `gpu_recipe` in PyTorch and JAX on the same GPU: microseconds a step, and how exact they are.

    python -m benchmarks.gpu_peers torch --out FILE     a line of JSON a result; so for jax
    ... --seconds S     what does not fit into so many is skipped
    ... --turns FOLDER  take turns with the processes that were given the same folder, see `gpu_recipe.Turns`
    ... --quick         the small recipes, few repetitions, nothing that takes long to compile
    ... --cpu           without a GPU: the mathematics alone, its times mean nothing

PyTorch: eager; all steps in one CUDA graph; the same with forward and loss compiled by `torch.compile`. JAX: one jitted
`lax.scan` over all steps, its body once or 16 times. Each in float32 (TF32 off), tf32, and bf16 products with float32
parameters; what takes long to compile comes last, and only some of it. What strays from the float64 reference is told
as "rejected" and not timed; what fails is told with "error", what there was no time for with "skipped".
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import gpu_recipe
from .gpu_recipe import BETA1, BETA2, CHECKED, EPSILON, LR, PRECISIONS, RECIPES, Check, Program, Recipe, Turns, timed

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 120  # that a library has, if nothing else is said
LONG = {("A", "float32"), ("A", "tf32"), ("B", "float32"), ("B", "tf32"), ("C", "tf32")}  # to be compiled for long

Emit = Callable[[dict[str, Any]], None]


class Trained(NamedTuple):
    """A program that was built: the losses of its first steps from the initial parameters, and its first gradient.

    The gradient is None where another variant with the same products has shown it.
    """

    program: Program
    losses: Sequence[float]
    gradient: Sequence[np.ndarray] | None


class Variant(NamedTuple):
    """A way to train: what its row says, how it is built, and how many seconds must be left to begin with it.

    `long`: it takes long to compile, and comes after all that do not.
    """

    row: dict[str, Any]
    build: Callable[[], Trained]
    needs: float
    long: bool


# ---------------------------------------------------------------------------------------------------- PyTorch


class Torch:
    """PyTorch's variants."""

    name = "torch"

    def __init__(self, cpu: bool) -> None:
        import torch

        if not cpu and not torch.cuda.is_available():
            raise RuntimeError("PyTorch finds no GPU")
        self.torch, self.device = torch, "cpu" if cpu else "cuda"
        X, y = gpu_recipe.data()
        self.X = torch.tensor(X, device=self.device)
        self.y = torch.tensor(y.astype(np.int64), device=self.device)

    def variants(self, recipe: Recipe, quick: bool) -> Iterator[Variant]:
        """Eager and a graph, each in every precision; a graph of what was compiled."""
        graph = f"graph of {recipe.steps}"
        for program in ("eager", graph, f"compiled, {graph}"):
            for precision in PRECISIONS:
                compiled, captured = program.startswith("compiled"), program.endswith(graph)
                if compiled and (quick or (recipe.name, precision) not in LONG):
                    continue
                build = lambda p=precision, k=compiled, c=captured: self.build(recipe, p, k, c)  # noqa: E731
                yield Variant({"program": program, "precision": precision}, build, 20 if compiled else 5, compiled)

    def build(self, recipe: Recipe, precision: str, compiled: bool, captured: bool) -> Trained:
        """Ready to run, and checked to run."""
        torch = self.torch
        if compiled:
            torch._dynamo.reset()  # else the sizes of the recipe before make these sizes variable
        self.set(precision)
        training = TorchTraining(self, recipe, precision, compiled)
        gradient = [g.cpu().numpy() for g in training.gradient(0)[1]]
        run = training.capture() if captured else lambda: (self.set(precision), training.run())
        training.reset()
        run()
        losses = training.losses[:CHECKED].tolist()
        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        return Trained(Program(run, wait, recipe.steps), losses, gradient)

    def set(self, precision: str) -> None:
        """Whether float32 products may be taken in TF32."""
        self.torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


class TorchTraining:
    """Parameters, optimizer and batches of one recipe; every step's loss is added to its place in `losses`."""

    def __init__(self, of: Torch, recipe: Recipe, precision: str, compiled: bool) -> None:
        torch, device = of.torch, of.device
        self.torch, self.X, self.y = torch, of.X, of.y
        self.initial = [torch.tensor(P, device=device) for P in gpu_recipe.initial(recipe)]
        self.theta = [P.clone().requires_grad_() for P in self.initial]
        self.rows = torch.tensor(gpu_recipe.order(recipe, recipe.steps), device=device).unbind()
        self.losses = torch.zeros(recipe.steps, device=device)
        self.slots = self.losses.unbind()
        self.optimizer = torch.optim.Adam(
            self.theta, LR, (BETA1, BETA2), EPSILON, fused=True, capturable=device == "cuda"
        )
        loss = torch_loss(torch, device, precision)
        self.loss = torch.compile(loss, dynamic=False) if compiled else loss

    def gradient(self, k: int) -> tuple[Any, tuple[Any, ...]]:
        """Of batch k: the loss, and its gradient by every parameter."""
        loss = self.loss(self.theta, self.X, self.y, self.rows[k])
        return loss.detach(), self.torch.autograd.grad(loss, self.theta)

    def step(self, k: int) -> None:
        """Train with batch k."""
        loss, gradient = self.gradient(k)
        for P, g in zip(self.theta, gradient, strict=True):
            P.grad = g
        self.optimizer.step()
        self.slots[k].add_(loss)

    def run(self) -> None:
        """All steps, launched one by one."""
        for k in range(len(self.rows)):
            self.step(k)

    def capture(self) -> Callable[[], None]:
        """All steps in a CUDA graph: what launches it."""
        torch = self.torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for k in range(3):
                self.step(k)  # allocates the optimizer's state, and compiles
        torch.cuda.current_stream().wait_stream(side)
        for P in self.theta:
            P.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        self.graph = graph
        return self.replay

    def replay(self) -> None:
        """All steps, by one launch of the graph; a method, for the graph's arrays live as long as this object."""
        self.graph.replay()

    def reset(self) -> None:
        """Back to the initial parameters, in place: a graph knows the addresses."""
        with self.torch.no_grad():
            for P, start in zip(self.theta, self.initial, strict=True):
                P.copy_(start)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
            self.losses.zero_()


def torch_loss(torch: Any, device: str, precision: str) -> Callable[..., Any]:
    """The function (theta, X, y, rows) -> mean cross-entropy of these rows."""
    linear, relu, cross_entropy = (getattr(torch.nn.functional, f) for f in ("linear", "relu", "cross_entropy"))
    bf16 = precision == "bf16"

    def loss(theta: list[Any], X: Any, y: Any, rows: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=bf16, cache_enabled=False):
            A = X[rows] * (1 / 255)
            for l in range(0, len(theta) - 2, 2):
                A = relu(linear(A, theta[l], theta[l + 1]))
            return cross_entropy(linear(A, theta[-2], theta[-1]), y[rows])

    return loss


# -------------------------------------------------------------------------------------------------------- JAX


class Jax:
    """JAX's variants."""

    name = "jax"

    def __init__(self, cpu: bool) -> None:
        import jax

        if not cpu and jax.default_backend() != "gpu":
            raise RuntimeError("JAX finds no GPU")
        self.jax = jax
        X, y = gpu_recipe.data()
        self.X, self.y = jax.device_put(X), jax.device_put(y.astype(np.int32))

    def variants(self, recipe: Recipe, quick: bool) -> Iterator[Variant]:
        """A scan with its body once, in every precision, or 16 times."""
        for unroll in (1, 16):
            for precision in PRECISIONS:
                unrolled = unroll > 1
                if unrolled and (quick or (recipe.name, precision) not in LONG):
                    continue
                row = {"program": f"scan of {recipe.steps}, unroll={unroll}", "precision": precision}
                build = lambda p=precision, u=unroll: self.build(recipe, p, u)  # noqa: E731
                yield Variant(row, build, 20 if unrolled else 8, unrolled)

    def build(self, recipe: Recipe, precision: str, unroll: int) -> Trained:
        """Ready to run, and checked to run."""
        jax = self.jax
        loss, train = jax_training(jax, precision, unroll)
        rows = jax.device_put(gpu_recipe.order(recipe, recipe.steps).astype(np.int32))
        theta = [jax.device_put(P) for P in gpu_recipe.initial(recipe)]
        zeros = [[jax.numpy.zeros_like(P) for P in theta] for _ in range(2)]
        state = (theta, *zeros, jax.numpy.zeros((), np.float32))
        products = {"float32": "highest", "tf32": "tensorfloat32", "bf16": "bfloat16"}[precision]
        with jax.default_matmul_precision(products):
            gradient = jax.jit(jax.grad(loss))(theta, self.X, self.y, rows[0]) if unroll == 1 else None
            launch = jax.jit(train, donate_argnums=0).lower(state, self.X, self.y, rows).compile()
        gradient = gradient and [np.asarray(g) for g in gradient]
        out = [launch(state, self.X, self.y, rows)]  # the latest (state, losses); a launch takes the state's memory
        losses = np.asarray(out[0][1])[:CHECKED].tolist()

        def run() -> None:
            out[0] = launch(out[0][0], self.X, self.y, rows)

        return Trained(Program(run, lambda: jax.block_until_ready(out[0]), recipe.steps), losses, gradient)


def jax_training(jax: Any, precision: str, unroll: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(theta, X, y, rows) -> mean cross-entropy, and (state, X, y, rows of all steps) -> (state, losses)."""
    jnp = jax.numpy
    dtype = jnp.bfloat16 if precision == "bf16" else jnp.float32

    def loss(theta: list[Any], X: Any, y: Any, rows: Any) -> Any:
        A = (X.at[rows].get(mode="promise_in_bounds") * np.float32(1 / 255)).astype(dtype)
        for l in range(0, len(theta), 2):
            Z = A @ theta[l].T.astype(dtype) + theta[l + 1].astype(dtype)
            A = jax.nn.relu(Z)
        Z = Z.astype(jnp.float32)
        hot = jax.nn.one_hot(y.at[rows].get(mode="promise_in_bounds"), Z.shape[1])
        return (jax.nn.logsumexp(Z, axis=1) - (Z * hot).sum(axis=1)).mean()

    def train(state: Any, X: Any, y: Any, order: Any) -> tuple[Any, Any]:
        def step(state: Any, rows: Any) -> tuple[Any, Any]:
            theta, first, second, t = state
            cost, g = jax.value_and_grad(loss)(theta, X, y, rows)
            t = t + 1
            first = [v + (1 - BETA1) * (dP - v) for v, dP in zip(first, g, strict=True)]
            second = [s + (1 - BETA2) * (dP * dP - s) for s, dP in zip(second, g, strict=True)]
            unbiased = [(v / (1 - BETA1**t), s / (1 - BETA2**t)) for v, s in zip(first, second, strict=True)]
            theta = [P - LR * v / (jnp.sqrt(s) + EPSILON) for P, (v, s) in zip(theta, unbiased, strict=True)]
            return (theta, first, second, t), cost

        return jax.lax.scan(step, state, order, unroll=unroll)

    return loss, train


LIBRARIES = {"torch": Torch, "jax": Jax}


# --------------------------------------------------------------------------------------------------- one library


def measure(library: Torch | Jax, emit: Emit, quick: bool, cpu: bool, end: float, turns: Turns) -> None:
    """Every variant of every recipe, those that take long to compile last: built and checked, then timed.

    Those of a recipe that compile fast are timed in turn. `end`, of `time.monotonic`, is when to be done.
    """
    check = functools.cache(Check)
    recipes = [RECIPES[name] for name in ("AB" if quick or cpu else "ABCD")]
    for long in (False, True):
        for recipe in recipes:
            variants = [variant for variant in library.variants(recipe, quick) if variant.long == long]
            for group in [[variant] for variant in variants] if long else [variants]:
                what = {"recipe": recipe.name, "layers": recipe.layers, "m": recipe.m, "steps": recipe.steps}
                rows, programs = {}, {}
                for i, variant in enumerate(group):
                    with turns.building():  # one by one: whoever is to take times waits for no more
                        row, program = built(variant, lambda r=recipe: check(r), end)
                    if program is None:
                        emit({**what, **row})
                    else:
                        rows[i], programs[i] = {**what, **row}, program
                if not programs:
                    continue
                with turns.timing():
                    short = quick or cpu or end - time.monotonic() < 20
                    times = timed(programs, 3 if short else 9, 0.01 if short else 0.02)
                for i in rows:
                    emit({**rows[i], **times[i]})


def built(variant: Variant, check: Callable[[], Check], end: float) -> tuple[dict[str, Any], Program | None]:
    """The variant's row so far, and the program to be timed, None for one that is wrong or has no time left."""
    start = time.monotonic()
    row: dict[str, Any] = dict(variant.row)
    if end - start < variant.needs:
        return row | {"skipped": f"{max(0.0, end - start):.0f} s left, less than {variant.needs:.0f}"}, None
    try:
        trained = variant.build()
        row["build_seconds"] = time.monotonic() - start
        row |= check()(variant.row["precision"], trained.losses, trained.gradient)
    except Exception as e:
        return row | {"error": one_line(e)}, None
    return row, None if "rejected" in row else trained.program


def one_line(e: BaseException) -> str:
    """The kind of an exception and the beginning of what it says."""
    said = " ".join(str(e).split())
    return f"{type(e).__name__}: {said[:400]}"


def worker(name: str, out: Path, quick: bool, cpu: bool, seconds: float, turns: Turns) -> None:
    """One library, in this process; results are appended to `out` as they come."""
    end = time.monotonic() + seconds
    with out.open("a", encoding="utf-8") as f:

        def emit(row: dict[str, Any]) -> None:
            f.write(json.dumps({"part": "peers", "library": name, **row}) + "\n")
            f.flush()

        try:
            version = importlib.metadata.version(name)
            with turns.building():
                library = LIBRARIES[name](cpu)
        except importlib.metadata.PackageNotFoundError:
            emit({"error": "not installed"})
            return
        except Exception as e:
            emit({"error": one_line(e)})
            return
        emit({"version": version, "device": "cpu" if cpu else "gpu"})
        measure(library, emit, quick, cpu, end, turns)


# ------------------------------------------------------------------------------------------------- all libraries


class Running:
    """A library in a process of its own: the rows that it has written, and what became of it."""

    def __init__(self, command: list[str], folder: Path, name: str) -> None:
        self.name, self.rest = name, ""
        self.out, self.log = folder / f"{name}.jsonl", folder / f"{name}.log"
        self.out.touch()
        self.rows = self.out.open(encoding="utf-8")
        env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        with self.log.open("w") as log:  # of this one's group, so that whoever ends that ends this, too
            self.process = subprocess.Popen(
                [*command, "--out", str(self.out)], cwd=ROOT, env=env, stdout=log, stderr=log
            )

    def forward(self, emit: Emit) -> bool:
        """Hand on the rows that are new; whether more may come."""
        ended = self.process.poll() is not None  # asked before reading: nothing is written after it
        *lines, self.rest = (self.rest + self.rows.read()).split("\n")
        for line in lines:
            emit(json.loads(line))
        return not ended

    def end(self, emit: Emit, seconds: float) -> None:
        """End the process if it has not; tell if it did not end well."""
        code = self.process.poll()
        if code is None:
            self.process.kill()
            self.process.wait()
        self.forward(emit)
        self.rows.close()
        if code != 0:
            why = f"more than {seconds:.0f} s" if code is None else f"ended with code {code}"
            tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            emit({"part": "peers", "library": self.name, "error": why, "tail": tail})


def peers(emit: Emit, seconds: float = SECONDS, folder: Path | None = None, quick: bool = False) -> None:
    """PyTorch and JAX side by side, each in a process of its own: every result goes to `emit` as it comes.

    Both have so many seconds. `folder` holds the locks by which they take turns, with whoever else was given it.
    """
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as own:
        more = ["--seconds", str(max(0.0, seconds - 5)), "--turns", str(folder or own), *["--quick"] * quick]
        every = [
            Running([sys.executable, "-m", "benchmarks.gpu_peers", name, *more], Path(own), name) for name in LIBRARIES
        ]
        try:
            running = every
            while running and time.monotonic() < end:
                time.sleep(0.2)
                running = [library for library in running if library.forward(emit)]
        finally:
            for library in every:
                library.end(emit, seconds)


def main(arguments: list[str]) -> int:
    """One library, as the command line asks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_peers")
    parser.add_argument("peer", choices=list(LIBRARIES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--turns", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    asked = parser.parse_args(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    worker(asked.peer, asked.out, asked.quick, asked.cpu, asked.seconds, Turns(asked.turns))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
