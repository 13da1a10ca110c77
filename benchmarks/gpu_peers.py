"""The steps of `gpu_recipe` in PyTorch and JAX on the same GPU: microseconds a step, and how exact they are.

    python -m benchmarks.gpu_peers torch --out FILE     a line of JSON a result; so for jax
    ... --quick     the small recipes, few repetitions, nothing that takes long to compile
    ... --cpu       without a GPU: the mathematics alone, its times mean nothing

PyTorch: eager; all steps in one CUDA graph; the same with forward and loss compiled by `torch.compile`. JAX: one jitted
`lax.scan` over all steps, its body once or 16 times. Each in float32 (TF32 off), tf32, and bf16 products with float32
parameters. What strays from the float64 reference is told as "rejected" and not timed; what fails is told with "error",
what there was no time for with "skipped".
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import gpu_recipe
from .gpu_recipe import BETA1, BETA2, CHECKED, EPSILON, LR, PRECISIONS, RECIPES, Check, Program, Recipe, timed

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 100  # seconds a library has
COMPILED = {("A", "float32"), ("A", "tf32"), ("B", "float32"), ("B", "tf32"), ("C", "tf32")}  # by torch.compile

Emit = Callable[[dict[str, Any]], None]


class Trained(NamedTuple):
    """A program that was built: the losses of its first steps from the initial parameters, and its first gradient.

    The gradient is None where another variant with the same products has shown it.
    """

    program: Program
    losses: Sequence[float]
    gradient: Sequence[np.ndarray] | None


class Variant(NamedTuple):
    """A way to train: what its row says, how it is built, and how many seconds must be left to begin with it."""

    row: dict[str, Any]
    build: Callable[[], Trained]
    needs: float = 10


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
        """Eager, a graph, a graph of what was compiled; each in every precision."""
        graph = f"graph of {recipe.steps}"
        for program in ("eager", graph, f"compiled, {graph}"):
            for precision in PRECISIONS:
                compiled, captured = program.startswith("compiled"), program.endswith(graph)
                if compiled and (quick or (recipe.name, precision) not in COMPILED):
                    continue
                build = lambda p=precision, k=compiled, c=captured: self.build(recipe, p, k, c)  # noqa: E731
                yield Variant({"program": program, "precision": precision}, build, 60 if compiled else 10)

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
        """A scan with its body once or 16 times, each in every precision."""
        later = list(RECIPES)[::-1].index(recipe.name)  # recipes that shall not starve
        for unroll in (1,) if quick else (1, min(16, recipe.steps)):
            for precision in PRECISIONS:
                row = {"program": f"scan of {recipe.steps}, unroll={unroll}", "precision": precision}
                build = lambda p=precision, u=unroll: self.build(recipe, p, u)  # noqa: E731
                yield Variant(row, build, 10 if unroll == 1 else 15 + 25 * later)

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


def measure(library: Torch | Jax, emit: Emit, quick: bool, cpu: bool, limit: float) -> None:
    """Every variant of every recipe: built and checked one by one, then timed in turn."""
    end = time.monotonic() + limit
    for recipe in [RECIPES[name] for name in ("AB" if quick or cpu else "ABCD")]:
        what = {"recipe": recipe.name, "layers": recipe.layers, "m": recipe.m, "steps": recipe.steps}
        if end - time.monotonic() < 15:
            emit({**what, "skipped": "no time left"})
            continue
        check, rows, programs = Check(recipe), {}, {}
        for i, variant in enumerate(library.variants(recipe, quick)):
            row, start = {**what, **variant.row}, time.monotonic()
            if end - start < variant.needs:
                emit({**row, "skipped": f"less than {variant.needs:.0f} s left"})
                continue
            try:
                trained = variant.build()
                row |= check(variant.row["precision"], trained.losses, trained.gradient)
            except Exception as e:
                emit({**row, "error": one_line(e)})
                continue
            row["build_seconds"] = time.monotonic() - start
            if "rejected" in row:
                emit(row)
            else:
                rows[i], programs[i] = row, trained.program
        short = quick or cpu or end - time.monotonic() < 20
        for i, times in timed(programs, 3 if short else 9, 0.01 if short else 0.02).items():
            emit({**rows[i], **times})


def one_line(e: BaseException) -> str:
    """The kind of an exception and the beginning of what it says."""
    said = " ".join(str(e).split())
    return f"{type(e).__name__}: {said[:400]}"


def worker(name: str, out: Path, quick: bool, cpu: bool) -> None:
    """One library, in this process; results are appended to `out` as they come."""
    with out.open("a", encoding="utf-8") as f:

        def emit(row: dict[str, Any]) -> None:
            f.write(json.dumps({"part": "peers", "library": name, **row}) + "\n")
            f.flush()

        try:
            version = importlib.metadata.version(name)
            library = LIBRARIES[name](cpu)
        except importlib.metadata.PackageNotFoundError:
            emit({"error": "not installed"})
            return
        except Exception as e:
            emit({"error": one_line(e)})
            return
        emit({"version": version, "device": "cpu" if cpu else "gpu"})
        measure(library, emit, quick, cpu, LIMIT - 10)


# ------------------------------------------------------------------------------------------------- all libraries


def peers(emit: Emit, quick: bool = False) -> None:
    """PyTorch, then JAX, each in a process of its own: every result goes to `emit` as it comes."""
    for name in LIBRARIES:
        with tempfile.TemporaryDirectory() as folder:
            out, log = Path(folder) / "rows.jsonl", Path(folder) / "log"
            out.touch()
            command = [sys.executable, "-m", "benchmarks.gpu_peers", name, "--out", str(out), *["--quick"] * quick]
            code = forward(command, out, log, emit)
            if code != 0:
                why = f"more than {LIMIT} s" if code is None else f"ended with code {code}"
                tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
                emit({"part": "peers", "library": name, "error": why, "tail": tail})


def forward(command: list[str], out: Path, log: Path, emit: Emit) -> int | None:
    """Run a command for LIMIT seconds at most, handing on the lines of `out`; its exit code, None for out of time."""
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    end = time.monotonic() + LIMIT
    with log.open("w") as f, out.open(encoding="utf-8") as rows:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=f, stderr=f, start_new_session=True)
        rest = ""
        try:
            while True:
                ended = process.poll() is not None  # asked before reading: nothing is written after it
                *lines, rest = (rest + rows.read()).split("\n")
                for line in lines:
                    emit(json.loads(line))
                if ended:
                    return process.returncode
                if time.monotonic() > end:
                    return None
                time.sleep(0.2)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()


def main(arguments: list[str]) -> int:
    """One library, as the command line asks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_peers")
    parser.add_argument("library", choices=list(LIBRARIES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    asked = parser.parse_args(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    worker(asked.library, asked.out, asked.quick, asked.cpu)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
