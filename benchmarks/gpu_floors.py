"""What no kernel can beat on this card: launches, barriers, copies, arithmetic.

    python -m benchmarks.gpu_floors [FILE]      a line of JSON a result

Times are device times between CUDA events unless a name says host; the cost of one of many (a node, a barrier, a pass)
is the slope between a short and a long run, so that what is paid once is out of it. Each figure is the median of
REPEATS. A measurement that fails is told with "error", and the next one follows.
"""

from __future__ import annotations

import ctypes
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

REPEATS = 7
BLOCKS = (1, 8, 64, 132)
NODES = (50, 250)  # of the short and the long chain
COOPERATIVE, PROGRAMMATIC = 2, 6  # ids of launch attributes: CU_LAUNCH_ATTRIBUTE_...

SOURCE = r"""
typedef unsigned u32;
typedef unsigned long long u64;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void add(float4& sum, float4 v) { sum.x += v.x; sum.y += v.y; sum.z += v.z; sum.w += v.w; }
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- nodes: each depends on the one before, through x
extern "C" __global__ void plain(float* x) { x[blockIdx.x * blockDim.x + threadIdx.x] += 1.0f; }

extern "C" __global__ void programmatic(float* x) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    x[blockIdx.x * blockDim.x + threadIdx.x] += 1.0f;
}

// ---- barriers
extern "C" __global__ void grid_barriers(u32* arrived, int n) {
    for (int i = 1; i <= n; i++) {
        __syncthreads();
        if (threadIdx.x == 0) {
            u32 seen;
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(arrived) : "memory");
            do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
            while (seen < i * gridDim.x);
        }
        __syncthreads();
    }
}

#define CLUSTER_BARRIERS(C) \
    extern "C" __global__ void __cluster_dims__(C, 1, 1) cluster_barriers_##C(u32* done, int n) { \
        for (int i = 0; i < n; i++) cluster_barrier(); \
        if (threadIdx.x == 0) done[blockIdx.x] = n; \
    }
CLUSTER_BARRIERS(8)
CLUSTER_BARRIERS(4)
CLUSTER_BARRIERS(2)

// ---- distributed shared memory: each block reads, or writes, 32 KiB of its right neighbour n times
template <bool WRITE> __device__ __forceinline__ void remote(float* out, int n) {
    __shared__ float4 buffer[2048];
    u32 rank, at, size;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    for (int i = threadIdx.x; i < 2048; i += blockDim.x) buffer[i] = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
    cluster_barrier();
    rank = (rank + 1) % size;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(buffer)), "r"(rank));
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f), v[4];
    for (int pass = 0; pass < n; pass++)
        for (int i = threadIdx.x; i < 2048; i += 4 * blockDim.x) {
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 place = at + 16 * (i + j * blockDim.x);
                if (WRITE)
                    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %1, %1, %1};"
                        :: "r"(place), "f"(pass + 2.0f) : "memory");
                else
                    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                        : "=f"(v[j].x), "=f"(v[j].y), "=f"(v[j].z), "=f"(v[j].w) : "r"(place));
            }
            #pragma unroll
            for (int j = 0; j < 4; j++) if (!WRITE) add(sum, v[j]);
        }
    cluster_barrier();
    if (WRITE) sum = buffer[threadIdx.x];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum.x + sum.y + sum.z + sum.w;
}
extern "C" __global__ void __cluster_dims__(8, 1, 1) remote_reads(float* out, int n) { remote<false>(out, n); }
extern "C" __global__ void __cluster_dims__(8, 1, 1) remote_writes(float* out, int n) { remote<true>(out, n); }

// ---- memory: `n` passes over `size` float4, past L1
extern "C" __global__ void copies(const float4* from, float4* to, int size, int n) {
    int stride = gridDim.x * blockDim.x;
    for (int pass = 0; pass < n; pass++)
        for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += 4 * stride) {
            float4 v[4];
            #pragma unroll
            for (int j = 0; j < 4; j++)
                if (i + j * stride < size)
                    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                        : "=f"(v[j].x), "=f"(v[j].y), "=f"(v[j].z), "=f"(v[j].w) : "l"(from + i + j * stride));
            #pragma unroll
            for (int j = 0; j < 4; j++)
                if (i + j * stride < size)
                    asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};"
                        :: "l"(to + i + j * stride), "f"(v[j].x), "f"(v[j].y), "f"(v[j].z), "f"(v[j].w) : "memory");
        }
}

extern "C" __global__ void reads(const float4* from, float* out, int size, int n) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    int stride = gridDim.x * blockDim.x;
    for (int pass = 0; pass < n; pass++)
        for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += 4 * stride) {
            float4 v[4] = {};
            #pragma unroll
            for (int j = 0; j < 4; j++)
                if (i + j * stride < size)
                    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                        : "=f"(v[j].x), "=f"(v[j].y), "=f"(v[j].z), "=f"(v[j].w) : "l"(from + i + j * stride));
            #pragma unroll
            for (int j = 0; j < 4; j++) add(sum, v[j]);
        }
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum.x + sum.y + sum.z + sum.w;
}

// ---- arithmetic: independent accumulators in registers
extern "C" __global__ void ffma(float* out, float a, float b, int n) {
    float c[16];
    #pragma unroll
    for (int j = 0; j < 16; j++) c[j] = threadIdx.x + j;
    for (int i = 0; i < n; i++)
        #pragma unroll
        for (int k = 0; k < 8; k++)
            #pragma unroll
            for (int j = 0; j < 16; j++) c[j] = fmaf(c[j], a, b);
    float sum = 0.0f;
    #pragma unroll
    for (int j = 0; j < 16; j++) sum += c[j];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

#define MMA(NAME, SHAPE) \
    extern "C" __global__ void NAME(float* out, u32 a, u32 b, int n) { \
        float d[8][4] = {}; \
        u32 A[4] = {a + threadIdx.x, a, a + threadIdx.x, a}, B[2] = {b + threadIdx.x, b}; \
        for (int i = 0; i < n; i++) { \
            _Pragma("unroll") for (int k = 0; k < 4; k++) { \
                _Pragma("unroll") for (int j = 0; j < 8; j++) \
                    asm volatile("mma.sync.aligned." SHAPE " {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" \
                        : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3]) \
                        : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B[0]), "r"(B[1])); \
            } \
        } \
        float sum = 0.0f; \
        _Pragma("unroll") for (int j = 0; j < 8; j++) sum += d[j][0] + d[j][1] + d[j][2] + d[j][3]; \
        out[blockIdx.x * blockDim.x + threadIdx.x] = sum; \
    }
MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
"""

Emit = Callable[[dict[str, Any]], None]
Figures = dict[str, Any]
Case = tuple[dict[str, Any], Callable[[], Figures]]  # what is measured, and what measures it


# ------------------------------------------------------------------------------------------- launches by the driver


class Value(ctypes.Union):
    """CUlaunchAttributeValue."""

    _fields_ = [("pad", ctypes.c_char * 64), ("flag", ctypes.c_int), ("aligned", ctypes.c_uint64)]


class Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", Value)]


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)), ("n_attributes", ctypes.c_uint),
    ]  # fmt: skip


class Launch:
    """A launch by cuLaunchKernelEx, its arguments packed once: call it as often as you like.

    `attribute`: the id of a launch attribute to set to 1. Arguments are CuPy arrays and NumPy scalars.
    """

    def __init__(
        self, driver: Any, kernel: Any, grid: int, block: int, args: tuple, stream: Any, attribute: int | None = None
    ) -> None:
        self.driver, self.function = driver, ctypes.c_void_p(kernel.kernel.ptr)
        self.args, self.packed = args, [_packed(arg) for arg in args]  # kept: the launch knows their addresses alone
        self.parameters = (ctypes.c_void_p * len(args))(*(ctypes.addressof(value) for value in self.packed))
        self.attributes = (Attribute * 1)()
        if attribute is not None:
            self.attributes[0].id, self.attributes[0].value.flag = attribute, 1
        one = ctypes.c_uint * 3
        self.config = Config(
            one(grid, 1, 1), one(block, 1, 1), 0, stream.ptr, self.attributes, int(attribute is not None)
        )
        self.reference = ctypes.byref(self.config)

    def __call__(self) -> None:
        """Launch, or add a node where the stream captures."""
        code = self.driver.cuLaunchKernelEx(self.reference, self.function, self.parameters, None)
        if code:
            raise RuntimeError(f"cuLaunchKernelEx: CUDA error {code}")


def _packed(arg: Any) -> Any:
    if isinstance(arg, np.float32):
        return ctypes.c_float(arg)
    if isinstance(arg, np.int32):
        return ctypes.c_int(arg)
    if isinstance(arg, np.uint32):
        return ctypes.c_uint(arg)
    return ctypes.c_void_p(arg.data.ptr)


class Card:
    """The device, its driver library, the kernels, and a stream for all of it, which must be the current one."""

    def __init__(self) -> None:
        import cupy

        self.cupy, self.driver = cupy, ctypes.CDLL("libcuda.so.1")
        launch = self.driver.cuLaunchKernelEx
        launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        module = cupy.RawModule(code=SOURCE, options=("-std=c++17",))
        self.kernel = functools.cache(module.get_function)
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.processors = cupy.cuda.Device().attributes["MultiProcessorCount"]

    def launch(self, name: str, grid: int, block: int, *args: Any, attribute: int | None = None) -> Launch:
        """What launches a kernel on the card's stream."""
        return Launch(self.driver, self.kernel(name), grid, block, args, self.stream, attribute)

    def capture(self, record: Callable[[], None]) -> Any:
        """A graph of what `record` launches on the card's stream."""
        self.stream.begin_capture()
        try:
            record()
        finally:
            graph = self.stream.end_capture()
        return graph

    def microseconds(self, work: Callable[[], None], prepare: Callable[[], None] = lambda: None) -> float:
        """Device time of what `work` launches: median of REPEATS, after one that warms up."""
        event, times = self.cupy.cuda.Event, []
        for _ in range(REPEATS + 1):
            prepare()
            self.stream.synchronize()
            start, end = event(), event()
            start.record(self.stream)
            work()
            end.record(self.stream)
            end.synchronize()
            times.append(1e3 * self.cupy.cuda.get_elapsed_time(start, end))
        return statistics.median(times[1:])

    def slope(self, work: Callable[[int], Callable[[], None]], few: int, many: int, **how: Any) -> float:
        """Microseconds that each more of n takes: between work(few) and work(many)."""
        short, long = (self.microseconds(work(n), **how) for n in (few, many))
        return (long - short) / (many - few)

    def host(self, call: Callable[[], Any], n: int = 200) -> Figures:
        """Microseconds that the host is busy with a call; n in a row, fewer than the queue of launches holds."""
        times = []
        for _ in range(REPEATS + 1):
            self.stream.synchronize()
            start = time.perf_counter()
            for _ in range(n):
                call()
            times.append(1e6 * (time.perf_counter() - start) / n)
        self.stream.synchronize()
        return {"us": statistics.median(times[1:]), "max_us": max(times[1:])}


# ------------------------------------------------------------------------------------------------------ graph nodes


def nodes(card: Card) -> Iterator[Case]:
    """A kernel in a chain of kernels that depend on each other; two beside each other between a fork and a join."""
    for blocks in BLOCKS:
        for kind in ("plain", "programmatic", "fork and join"):
            yield {"name": "node", "kind": kind, "blocks": blocks}, lambda k=kind, b=blocks: node(card, k, b)


def node(card: Card, kind: str, blocks: int) -> Figures:
    """The slope over the length of a chain; "right" where every kernel saw what the one before had written."""
    x, y = (card.cupy.zeros(blocks * 128, np.float32) for _ in range(2))
    launches = [0]

    def chain(n: int) -> Callable[[], None]:
        record = {"plain": serial, "programmatic": serial, "fork and join": forked}[kind]
        graph = card.capture(lambda: record(card, kind, blocks, x, y, n))
        graph.upload(card.stream)

        def work() -> None:
            graph.launch(card.stream)
            launches[0] += n

        return work

    us = card.slope(chain, *NODES)
    card.stream.synchronize()
    right = bool((x == launches[0]).all()) and (kind != "fork and join" or bool((y == launches[0]).all()))
    return {"us": us, "right": right, "kernels": 2 if kind == "fork and join" else 1}


def serial(card: Card, kind: str, blocks: int, x: Any, y: Any, n: int) -> None:
    """Launch n kernels on x, one after another."""
    launch = card.launch(kind, blocks, 128, x, attribute=PROGRAMMATIC if kind == "programmatic" else None)
    for _ in range(n):
        launch()


def forked(card: Card, kind: str, blocks: int, x: Any, y: Any, n: int) -> None:
    """Launch n times a kernel on x and, on a second stream, one on y; each pair waits for the pair before."""
    cuda, kernel = card.cupy.cuda, card.kernel("plain")
    side = cuda.Stream(non_blocking=True)
    for _ in range(n):
        fork, join = (cuda.Event(disable_timing=True) for _ in range(2))
        fork.record(card.stream)
        side.wait_event(fork)
        kernel((blocks,), (128,), (x,))
        with side:
            kernel((blocks,), (128,), (y,))
        join.record(side)
        card.stream.wait_event(join)


# --------------------------------------------------------------------------------------------------- graphs, host


def graphs(card: Card) -> Iterator[Case]:
    """The launch of a graph of K steps of 3 nodes: host and device time."""
    for kind in ("plain", "programmatic"):
        for steps in (1, 16, 64):
            yield (
                {"name": "graph", "kind": kind, "steps": steps, "nodes": 3 * steps},
                (lambda k=kind, n=steps: graph_launch(card, k, n)),
            )


def graph_launch(card: Card, kind: str, steps: int, n: int = 20) -> Figures:
    """n launches in a row, host and device clock."""
    x = card.cupy.zeros(64 * 128, np.float32)
    graph = card.capture(lambda: serial(card, kind, 64, x, x, 3 * steps))
    graph.upload(card.stream)
    host = card.host(lambda: graph.launch(card.stream), n)

    def work() -> None:
        for _ in range(n):
            graph.launch(card.stream)

    us = card.microseconds(work) / n
    return {"host_us": host["us"], "host_max_us": host["max_us"], "us": us, "us_a_step": us / steps}


def hosts(card: Card) -> Iterator[Case]:
    """What a launch costs the host, in the ways there are."""
    cupy, x = card.cupy, card.cupy.zeros(128, np.float32)
    plain, float32 = card.kernel("plain"), np.float32
    A, B, C = cupy.ones((128, 100), float32), cupy.ones((100, 10), float32), cupy.empty((128, 10), float32)
    version = ctypes.c_int()
    ways: dict[str, Callable[[], Any]] = {
        "RawKernel": lambda: plain((1,), (128,), (x,)),
        "cuLaunchKernelEx by ctypes": card.launch("plain", 1, 128, x),
        "cupy.matmul(out=)": lambda: cupy.matmul(A, B, out=C),
        "cupy.add(out=)": lambda: cupy.add(x, x, out=x),
        "a driver call by ctypes": lambda: card.driver.cuDriverGetVersion(ctypes.byref(version)),
        "an empty call": lambda: None,
    }
    for name, call in ways.items():
        yield {"name": "host", "call": name}, lambda call=call: card.host(call)


# ---------------------------------------------------------------------------------------------------------- barriers


def barriers(card: Card) -> Iterator[Case]:
    """A barrier over all blocks of a cooperative grid, and over the blocks of a cluster."""
    for threads in (128, 512):
        for blocks in (8, card.processors):
            yield (
                {"name": "grid barrier", "blocks": blocks, "threads": threads},
                (lambda b=blocks, t=threads: grid_barrier(card, b, t)),
            )
        for cluster in (2, 4, 8):
            for clusters in (1, 15):
                yield (
                    {"name": "cluster barrier", "blocks": cluster, "clusters": clusters, "threads": threads},
                    (lambda c=cluster, n=clusters, t=threads: cluster_barrier(card, c, n, t)),
                )


def grid_barrier(card: Card, blocks: int, threads: int) -> Figures:
    """The slope over the number of barriers in one launch."""
    arrived = card.cupy.zeros(1, np.uint32)

    def work(n: int) -> Callable[[], None]:
        return card.launch("grid_barriers", blocks, threads, arrived, np.int32(n), attribute=COOPERATIVE)

    us = card.slope(work, 100, 1100, prepare=lambda: arrived.fill(0))
    return {"us": us, "right": int(arrived[0]) == 1100 * blocks}


def cluster_barrier(card: Card, cluster: int, clusters: int, threads: int) -> Figures:
    """The slope over the number of barriers in one launch."""
    done = card.cupy.zeros(cluster * clusters, np.uint32)

    def work(n: int) -> Callable[[], None]:
        return card.launch(f"cluster_barriers_{cluster}", cluster * clusters, threads, done, np.int32(n))

    us = card.slope(work, 100, 1100)
    return {"us": us, "right": bool((done == 1100).all())}


# ------------------------------------------------------------------------------------------------ memory, arithmetic


def memory(card: Card) -> Iterator[Case]:
    """Bytes a nanosecond, GB/s: of a neighbour's shared memory in a cluster of 8, of L2, of memory."""
    for name in ("remote_reads", "remote_writes"):
        for clusters in (1, 15):
            yield (
                {"name": "distributed shared memory", "kind": name, "clusters": clusters},
                (lambda n=name, c=clusters: remote(card, n, c)),
            )
    for kind in ("reads", "copies"):
        for mib in (4, 8, 16, 1024):
            yield {"name": "memory", "kind": kind, "MiB": mib}, lambda k=kind, n=mib: transfer(card, k, n << 20)


def remote(card: Card, name: str, clusters: int, threads: int = 512) -> Figures:
    """The slope over passes of 32 KiB: GB/s of one block."""
    out = card.cupy.zeros(8 * clusters * threads, np.float32)
    us = card.slope(lambda n: card.launch(name, 8 * clusters, threads, out, np.int32(n)), 20, 220)
    per_thread = 4 * 220 * 2048 / threads if name == "remote_reads" else 4 * (219 + 2)
    return {"us": us, "GBps_a_block": (32 << 10) / us / 1e3, "right": bool((out == per_thread).all())}


def transfer(card: Card, kind: str, size: int) -> Figures:
    """The slope over passes of `size` bytes, read and, for copies, written elsewhere: GB/s, both counted."""
    cupy, blocks, threads = card.cupy, 4 * card.processors, 512
    few, many = (20, 120) if size < 1 << 28 else (1, 5)
    source = cupy.ones(size // 4, np.float32)
    out = cupy.zeros(size // 4 if kind == "copies" else blocks * threads, np.float32)
    passes = lambda n: card.launch(kind, blocks, threads, source, out, np.int32(size // 16), np.int32(n))  # noqa: E731
    us = card.slope(passes, few, many)
    moved = size * (2 if kind == "copies" else 1)
    right = bool((out == 1).all()) if kind == "copies" else float(out.sum(dtype=np.float64)) == many * size / 4
    return {"us": us, "GBps": moved / us / 1e3, "right": right}


def arithmetic(card: Card) -> Iterator[Case]:
    """TFLOP/s of all processors, from registers alone: float32, and products of matrices by mma.sync."""
    bits = {"mma_tf32": (0x3F800000, 0x3F800000), "mma_bf16": (0x3F803F80, 0x3F803F80)}  # of 1.0, of two of them
    yield (
        {"name": "arithmetic", "kind": "ffma"},
        (lambda: rate(card, "ffma", 2 * 16 * 8, (np.float32(0.999), np.float32(0.001)), 8)),
    )
    for kind, depth in (("mma_tf32", 8), ("mma_bf16", 16)):
        for warps in (4, 8, 16):  # of a processor
            flop = 2 * 16 * 8 * depth  # of a thread, a 32nd of its warp's 8 x 4 products
            yield (
                {"name": "arithmetic", "kind": kind, "warps": warps},
                (lambda k=kind, f=flop, w=warps: rate(card, k, f, tuple(np.uint32(v) for v in bits[k]), w // 4, 128)),
            )


def rate(card: Card, kind: str, flop: float, operands: tuple, blocks: int, threads: int = 256) -> Figures:
    """The slope over rounds; a thread does `flop` a round, `blocks` run on each processor."""
    grid = blocks * card.processors
    out = card.cupy.zeros(grid * threads, np.float32)
    us = card.slope(lambda n: card.launch(kind, grid, threads, out, *operands, np.int32(n)), 500, 4500)
    return {"us": us, "TFLOPps": flop * grid * threads / us / 1e6, "right": bool(card.cupy.isfinite(out).all())}


# --------------------------------------------------------------------------------------------------------------- all

PARTS: tuple[Callable[[Card], Iterator[Case]], ...] = (nodes, graphs, hosts, memory, arithmetic, barriers)


def floors(emit: Emit) -> None:
    """Measure everything; each result goes to `emit` as it comes."""
    try:
        card = Card()
        with card.stream:
            warm_up(card)
    except Exception as e:
        emit({"part": "floors", "name": "card", "error": f"{type(e).__name__}: {e}"[:2000]})
        return
    with card.stream:
        for part in PARTS:
            for what, measure in part(card):
                try:
                    emit({"part": "floors", **what, **measure()})
                except Exception as e:
                    emit({"part": "floors", **what, "error": f"{type(e).__name__}: {e}"[:400]})


def warm_up(card: Card) -> None:
    """Compile, load what will be captured, and let the clocks go up."""
    out = card.cupy.zeros(card.processors * 2048, np.float32)
    for kind in ("plain", "programmatic"):
        card.launch(kind, 1, 128, out)()
    half = np.float32(0.5)
    card.microseconds(card.launch("ffma", 8 * card.processors, 256, out, half, half, np.int32(10_000)))


def main(arguments: list[str]) -> int:
    """Results to a file, or to the standard output."""
    with Path(arguments[0]).open("a", encoding="utf-8") if arguments else sys.stdout as f:
        floors(lambda result: print(json.dumps(result), file=f, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
