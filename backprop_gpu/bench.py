"""What a training step takes, in a report: its time and its share of the least time, work, memory, and its parts.

`bench` holds the steps of `stepping` against the floor of `floors`, `profile` tells where a step's time goes, `startup`
how long the package takes to start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, blas, floors
from .backend import Backend
from .costs import Cost, choose_cost
from .executors import Eager
from .floors import Floor, FloorTimes, floor, products_of
from .network import GPU_ONLY, Network
from .optimizers import Optimizer, choose_optimizer
from .specs import number
from .stepping import Program, Stepping, Times, timed, wait_for

__all__ = [
    "Bench", "Floor", "FloorTimes", "Profile", "Program", "Startup", "Stepping", "Times", "bench", "floor", "profile",
    "resident", "startup", "timed",
]  # fmt: skip

TURNS, REST = 10, 0.05  # on a CPU: of each program, and seconds before each
TOGETHER, QUICK = 16, 500_000_000  # on a CPU: steps of a run at most, and the FLOP that are enough for one

# ------------------------------------------------------------------------------------------------------ the report


@dataclass(frozen=True)
class Bench:
    """A training step, measured. Times are in seconds, sizes in bytes.

    `step`: its times; `floor`: the least it could take, None where that is not known. `flop`: of the products alone.
    `bytes`: read and written, where each product's operands and result, and the state in the update, cross the memory
    once. `workspace_bytes`: what a run keeps beside data and parameters, at most. `allocated_bytes`: what a step takes
    and gives back once all is warm, small Python objects included; `device_allocations`: how often it asks for device
    memory, None without a device. `executor`: the rung (see `executors`). `threads`: of BLAS, None where unknown.
    `peak_rss`: the largest resident memory of this process up to the end of the first steps, None where unknown.
    """

    layers: list[int]
    batch_size: int
    optimizer: str
    cost: str
    precision: str
    backend: str
    device: str
    executor: str
    threads: int | None
    versions: dict[str, str]
    step: Times
    floor: FloorTimes | None
    flop: int
    bytes: int
    workspace_bytes: int
    allocated_bytes: int
    device_allocations: int | None
    peak_rss: int | None

    @property
    def samples_per_second(self) -> float:
        """Of whole batches."""
        return self.batch_size / self.step.median

    @property
    def gflops(self) -> float:
        """GFLOP/s of the products over the time of the whole step."""
        return self.flop / self.step.median / 1e9

    @property
    def products_share(self) -> float | None:
        """The part of a step's time that its products alone would take."""
        return None if self.floor is None else self.floor.products_seconds / self.step.median

    @property
    def floor_share(self) -> float | None:
        """Likewise, with the state's way through memory: 1 would be a step that is all floor."""
        return None if self.floor is None else self.floor.seconds / self.step.median

    def as_dict(self) -> dict[str, Any]:
        """For JSON; times in microseconds a step."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("step", "floor")}
        found |= {
            "step_us": 1e6 * self.step.median,
            "step_spread": self.step.spread,
            "step_times_us": [1e6 * seconds for seconds in self.step.seconds],
            "samples_per_second": self.samples_per_second,
            "gflops": self.gflops,
            "products_share": self.products_share,
            "floor_share": self.floor_share,
        }
        names = ("floor_us", "floor_products_us", "floor_memory_us", "floor_products")
        if self.floor is None:
            return found | dict.fromkeys(names)
        seconds = (self.floor.seconds, self.floor.products_seconds, self.floor.memory_seconds)
        products = [
            {"equation": p.equation, "shape": list(p.shape), "us": 1e6 * p.seconds, "gflops": p.gflops,
             "layout": p.layout, "threads": p.threads}
            for p in self.floor.products
        ]  # fmt: skip
        return found | dict(zip(names, [*(1e6 * s for s in seconds), products], strict=True))

    def __str__(self) -> str:
        mib = 1 << 20
        allocations = f"{self.allocated_bytes / 1024:.1f} KiB"
        if self.device_allocations is not None:
            allocations += f" on the host, {self.device_allocations} allocations on the device"
        threads = "" if self.threads is None else f", {self.threads} BLAS threads"
        rows = [
            ("network", f"{'/'.join(map(str, self.layers))}, {self.precision}, batches of {self.batch_size}"),
            ("step", f"{self.cost}, {self.optimizer}"),
            ("runs on", f"{self.backend} ({self.device}), {self.executor}{threads}"),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
            ("a step", f"{1e6 * self.step.median:.1f} us, spread {100 * self.step.spread:.1f} % "
                       f"of {len(self.step.seconds)} repetitions{_noisy(self.step)}"),
            ("samples/s", f"{self.samples_per_second:.0f}"),
            *self._floor_rows(),
            ("work", f"{self.flop / 1e6:.1f} MFLOP in products ({self.gflops:.1f} GFLOP/s), "
                     f"{self.bytes / mib:.2f} MiB through memory"),
            ("allocated", f"{allocations}, within a step"),
            ("workspace", f"{self.workspace_bytes / mib:.2f} MiB"),
        ]  # fmt: skip
        return "\n".join(f"{name:<10} {text}" for name, text in rows)

    def _floor_rows(self) -> list[tuple[str, str]]:
        if self.floor is None:
            return [("floor", f"not known in {self.precision}")]
        f, products = self.floor, 100 * (self.products_share or 0)
        rows = [
            ("floor", f"{1e6 * f.seconds:.1f} us, {100 * (self.floor_share or 0):.1f} % of the step: products "
                      f"{1e6 * f.products_seconds:.1f} us ({products:.1f} %), state {1e6 * f.memory_seconds:.1f} us "
                      f"({f.state_bytes / 2**20:.2f} MiB at {f.copy_bandwidth / 1e9:.1f} GB/s)"),
        ]  # fmt: skip
        for p in f.products:
            threads = "" if p.threads is None else f", threads {p.threads}"
            rows.append(
                ("", f"{p.equation:<18} {' x '.join(map(str, p.shape)):<18} {1e6 * p.seconds:9.1f} us "
                     f"{p.gflops:8.1f} GFLOP/s  {p.layout}{threads}")
            )  # fmt: skip
        return rows


def _noisy(times: Times) -> str:
    return "  (noisy: above 10 %)" if times.spread > 0.1 else ""


def bench(
    net: Network,
    X: Any,
    T: Any,
    rule: Optimizer | str,
    batch_size: int,
    cost: Cost | str | None = None,
    seconds: float = 2.0,
    seed: int = 0,
) -> Bench:
    """Measure the training steps of `net` on X and T for about so many seconds, and as long for its floor.

    The network is trained by that. Arguments as those of `Stepping`. Steps and floor are timed in turn. Raises
    ConfigError, DataError and DivergenceError as `train` does.
    """
    seconds = number("bench", "seconds", seconds, low_open=True)
    rule, be = choose_optimizer(rule), net.backend
    with contextlib.ExitStack() as stack:
        ready, workspace, allocated, on_device = _warmed(net, X, T, rule, batch_size, cost, seed)
        stack.enter_context(ready)
        m, peak = ready.batch_size, resident()[1]
        products = [product for product, _ in products_of(net.layers, m)]
        flop = sum(p.flop for p in products)
        # Graphs hold many steps, and a compiled function takes many.
        at_once = ready.steps if be.index is not None else max(1, min(ready.steps, TOGETHER, QUICK // flop))
        programs = {"step": Program(lambda: ready.run(at_once), ready.wait, at_once)}
        least = None if net.precision in GPU_ONLY else stack.enter_context(Floor(net, m, rule))
        if least:
            programs |= floors.programs_of(least)
        if be.index is None:  # threads of OpenBLAS and OpenMP hold their cores for a while after work
            times = timed(programs, seconds, seconds / TURNS, min(REST, seconds))
        else:
            times = timed(programs, seconds)
        executor = ready.executor.told
    state = (3 + 2 * rule.slots) * net.theta.nbytes
    return Bench(
        layers=net.layers, batch_size=m, optimizer=repr(rule), cost=choose_cost(cost, net.output).name,
        precision=net.precision, backend=be.name, device=be.device, executor=executor,
        threads=blas.threads.now() if be.index is None else None, versions=_versions(be), step=times["step"],
        floor=floors.times_of(least, times) if least else None, flop=flop,
        bytes=state + sum(p.elements for p in products) * net.dtype.itemsize, workspace_bytes=workspace,
        allocated_bytes=allocated, device_allocations=on_device, peak_rss=peak,
    )  # fmt: skip


def _versions(be: Backend) -> dict[str, str]:
    found = {"backprop_gpu": __version__, "python": platform.python_version(), "numpy": np.__version__}
    return found if be.index is None else found | {"cupy": str(be.xp.__version__)}


FEW = 4  # steps over which memory is watched


def _warmed(
    net: Network, X: Any, T: Any, rule: Optimizer, batch_size: int, cost: Cost | str | None, seed: int
) -> tuple[Stepping, int, int, int | None]:
    """Steps that are warm, their workspace, and what a step allocates: bytes on the host, how often on the device."""
    be = net.backend
    pool = None if be.index is None else be.xp.get_default_memory_pool()
    before = pool.used_bytes() if pool else 0
    with _traced():
        ready = Stepping(net, X, T, rule, batch_size, cost, seed)
        try:
            ready.run(min(FEW, ready.steps))
            ready.wait()
            workspace = tracemalloc.get_traced_memory()[1]
            ready.run(ready.steps - min(FEW, ready.steps) + 1)  # every size of graph; the next epoch has begun
            ready.wait()
            if pool:
                workspace = pool.used_bytes() - before - _placed_bytes(ready)
            now = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            with _counted(pool, be) as asked:
                ready.run(min(FEW, ready.steps - 1))
                ready.wait()
            allocated = tracemalloc.get_traced_memory()[1] - now
        except BaseException:
            ready.close()
            raise
    return ready, workspace, allocated, len(asked) if pool else None


def _placed_bytes(ready: Stepping) -> int:
    """Of the data that went to the device; what lay there before is not counted, and neither is streamed data."""
    problem = ready.executor.problem
    return problem.samples.nbytes if problem.room is None else 0


@contextlib.contextmanager
def _traced() -> Iterator[None]:
    """Memory is traced, NumPy's too."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


@contextlib.contextmanager
def _counted(pool: Any, be: Backend) -> Iterator[list[int]]:
    """The sizes that are asked of the device's memory."""
    asked: list[int] = []

    def allocate(size: int) -> Any:
        asked.append(size)
        return pool.malloc(size)

    with be.xp.cuda.using_allocator(allocate) if pool else contextlib.nullcontext():
        yield asked


def resident() -> tuple[int | None, int | None]:
    """Bytes of this process in memory, now and at most so far; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None, None
    told = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
    now, most = (int(told[key][0]) << 10 if key in told else None for key in ("VmRSS", "VmHWM"))
    return now, most


# ------------------------------------------------------------------------------------------- the step, taken apart

# The operations of the seam (see `numpy_ops`), and which of their arguments is the result.
RESULTS = {
    "gather": 2, "affine": 3, "affine_activate": 5, "drop": 5, "output_delta": 5, "weight_gradient": 2,
    "hidden_delta": 6, "measure": 6, "share": 1, "regularize": 3, "update": 1,
}  # fmt: skip


SHOWN = 0.001  # the least share that is printed; smaller ones are those of the short batch


@dataclass(frozen=True)
class Part:
    """An operation of a step with a result of that shape: calls and seconds a step, and its share of the step."""

    operation: str
    shape: tuple[int, ...]
    calls: float
    seconds: float
    share: float


@dataclass(frozen=True)
class Profile:
    """Where the time of a step goes: its operations, the longest first, and the seconds of a whole step.

    Each operation is clocked by itself, on a GPU with a wait for the device, so that `seconds` is more than a step
    takes that nobody watches. What is between the operations is no part.
    """

    seconds: float
    steps: int
    parts: tuple[Part, ...]

    @property
    def between(self) -> float:
        """The share of what is no operation: Python, and the watch itself."""
        return 1 - sum(part.share for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; times in microseconds a step."""
        parts = [
            {"operation": p.operation, "shape": list(p.shape), "calls": p.calls, "us": 1e6 * p.seconds,
             "share": p.share}
            for p in self.parts
        ]  # fmt: skip
        return {"us": 1e6 * self.seconds, "steps": self.steps, "between": self.between, "parts": parts}

    def __str__(self) -> str:
        lines = [f"{'operation':<16} {'result':<12} {'calls':>6} {'us a step':>10} {'share':>7}"]
        lines += [
            f"{p.operation:<16} {' x '.join(map(str, p.shape)):<12} {p.calls:6.4g} {1e6 * p.seconds:10.1f} "
            f"{100 * p.share:5.1f} %"
            for p in self.parts
            if p.share >= SHOWN
        ]
        between = f"{1e6 * self.seconds * self.between:10.1f} {100 * self.between:5.1f} %"
        return "\n".join([*lines, f"{'between them':<36} {between}"])


def profile(
    net: Network,
    X: Any,
    T: Any,
    rule: Optimizer | str,
    batch_size: int,
    cost: Cost | str | None = None,
    seconds: float = 1.0,
    seed: int = 0,
) -> Profile:
    """Where the time of a step goes, one operation after the other (the rung "eager"), over about so many seconds.

    Arguments as those of `bench`. The network is trained by that. Raises ConfigError, DataError and DivergenceError as
    `train` does.
    """
    be, steps = net.backend, 0
    ops = _ClockedOps(be)
    net.backend = dataclasses.replace(be, ops=ops)  # type: ignore[arg-type]
    try:
        with Stepping(net, X, T, rule, batch_size, cost, seed, executor=Eager) as ready:
            ready.run(FEW)
            ready.wait()
            ops.spent.clear()
            start = time.perf_counter()
            while not steps or time.perf_counter() - start < seconds:
                ready.run(1)
                steps += 1
            ready.wait()
            whole = time.perf_counter() - start
    finally:
        net.backend = be
    parts = [
        Part(name, shape, calls / steps, spent / steps, spent / whole)
        for (name, shape), (calls, spent) in ops.spent.items()
    ]
    return Profile(whole / steps, steps, tuple(sorted(parts, key=lambda part: -part.seconds)))


class _ClockedOps:
    """A backend's operations, each with a clock around it; everything else of the module as it is.

    `spent`: by operation and shape of the result, how many calls and seconds.
    """

    def __init__(self, be: Backend) -> None:
        self._be = be
        self.spent: dict[tuple[str, tuple[int, ...]], tuple[int, float]] = {}

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._be.ops, name)
        if name in RESULTS:
            operation = self._clocked(name, operation)
        setattr(self, name, operation)  # the next time it is found at once
        return operation

    def _clocked(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*arguments: Any) -> Any:
            start = time.perf_counter()
            got = operation(*arguments)
            wait_for(self._be)
            taken = time.perf_counter() - start
            key = name, arguments[RESULTS[name]].shape
            calls, spent = self.spent.get(key, (0, 0.0))
            self.spent[key] = calls + 1, spent + taken
            return got

        return clocked


# --------------------------------------------------------------------------------------------------------- the start

STARTS = {  # processes, and what Python is told in each
    "numpy": ("-c", "import numpy"),
    "import": ("-c", "import numpy, backprop_gpu"),
    "use": ("-c", "from backprop_gpu import Network, train"),
    "help": ("-m", "backprop_gpu", "--help"),
}


@dataclass(frozen=True)
class Startup:
    """Seconds from a process's start to its end, medians.

    `numpy`: `import numpy`; `package`: that and `import backprop_gpu`, which imports its modules when they are asked
    for; `use`: with those that a training needs; `help`: of --help.
    """

    numpy: float
    package: float
    use: float
    help: float

    @property
    def over_numpy(self) -> tuple[float, float]:
        """Seconds beyond NumPy's: of importing this package, and of what a training imports."""
        return self.package - self.numpy, self.use - self.numpy

    def as_dict(self) -> dict[str, float]:
        """For JSON, in seconds."""
        package, use = self.over_numpy
        return {
            "import_numpy": self.numpy, "import_over_numpy": package, "use_over_numpy": use, "help": self.help,
        }  # fmt: skip

    def __str__(self) -> str:
        package, use = (1e3 * seconds for seconds in self.over_numpy)
        return (
            f"import     {package:.0f} ms beyond the {1e3 * self.numpy:.0f} ms of Python with NumPy, "
            f"{use:.0f} ms with all that a training uses; --help in {1e3 * self.help:.0f} ms"
        )


def startup(repetitions: int = 5) -> Startup:
    """How long this package takes to start, in processes of its own, in turn.

    A first round warms the disk's cache, and writes bytecode where there is none.
    """
    folder = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed is there as bytecode
    taken: dict[str, list[float]] = {name: [] for name in STARTS}
    for _ in range(repetitions + 1):
        for name, arguments in STARTS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, check=True)
            taken[name].append(time.perf_counter() - start)
    return Startup(*(statistics.median(taken[name][1:]) for name in STARTS))
