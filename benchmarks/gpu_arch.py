"""Each function of kernels/arch.cuh alone on a GPU, against NumPy, to which its second body, for the CPU, is held, too.

Sums of products are of small whole numbers, which every order adds to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from backprop_gpu import cuda_source
from backprop_gpu.backend import Backend, to_host

SOURCE = r"""
extern "C" __global__ void copy_async(const unsigned* x, unsigned* y, int bytes) {
    __shared__ alignas(16) unsigned copied[128];
    const int i = threadIdx.x;
    pdl_wait();
    copy_async16(copied + 4 * i, x + 4 * i, bytes);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    for (int k = 0; k < 4; ++k) y[4 * i + k] = copied[(4 * i + k + 4) % 128];
    pdl_launch();
}
"""
SOURCE_80 = r"""
extern "C" __global__ void round_tf32(const unsigned* x, unsigned* y) {
    y[threadIdx.x] = to_tf32(__uint_as_float(x[threadIdx.x]));
}
extern "C" __global__ void round_bf16(const unsigned* x, unsigned* y) {
    const int i = threadIdx.x;
    y[i] = pack_bf16(__uint_as_float(x[i]), __uint_as_float(x[(i + 1) % blockDim.x]));
}
"""
PRODUCT = r"""
extern "C" __global__ void NAME_alone(const unsigned* all_a, const unsigned* all_b, float* all_d) {
    unsigned a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; ++i) a[i] = all_a[4 * threadIdx.x + i], d[i] = all_d[4 * threadIdx.x + i];
    for (int i = 0; i < 2; ++i) b[i] = all_b[2 * threadIdx.x + i];
    NAME(d, a, b);
    for (int i = 0; i < 4; ++i) all_d[4 * threadIdx.x + i] = d[i];
}
"""
PRODUCTS = {"mma_tf32_16x8x8": 8, "mma_bf16_16x8x16": 16}  # how many columns a has
LANE = np.arange(32)[:, None]  # of a warp
GROUP, MEMBER = LANE // 4, LANE % 4

Emit = Callable[[dict[str, Any]], None]


def functions(emit: Emit, be: Backend, arch: int) -> bool:
    """A result for each function that a GPU of that architecture has; whether all are right, twice the same bits."""
    text = cuda_source.read("arch.cuh").replace("#pragma once\n", "") + SOURCE
    if arch >= 80:
        text += SOURCE_80 + "".join(PRODUCT.replace("NAME", name) for name in PRODUCTS)
    fine = True
    with be.active():
        module = be.xp.RawModule(code=text, options=be.ops.OPTIONS)
        for name, kernel, threads, given, start, wanted in _cases(arch):
            told: dict[str, Any] = {"function": name}
            try:
                first, second = (_run(be, module.get_function(kernel), threads, given, start) for _ in range(2))
                told |= {"right": bool((first == wanted).all()), "same_bits": bool((first == second).all())}
                fine &= told["right"] and told["same_bits"]
            except Exception as e:
                fine, told["error"] = False, f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
            emit(told)
    return fine


def _run(be: Backend, kernel: Any, threads: int, given: tuple[Any, ...], start: np.ndarray) -> np.ndarray:
    """The words that one block writes over `start`; arguments before it are arrays, and after it numbers."""
    out = be.asarray(start.copy())
    arrays = [be.asarray(a) for a in given if isinstance(a, np.ndarray)]
    kernel((1,), (threads,), (*arrays, out, *(a for a in given if not isinstance(a, np.ndarray))))
    return to_host(out).view(np.uint32)


def _cases(arch: int) -> Iterator[tuple[str, str, int, tuple[Any, ...], np.ndarray, np.ndarray]]:
    """Function, kernel and threads, its arguments and what its output holds before, and the words that are right."""
    rng = np.random.default_rng(0)
    poison = np.full(128, 0xFFFFFFFF, np.uint32)
    x = rng.integers(0, 1 << 32, 128, np.uint32)
    for n in (16, 7, 0):
        landed = x.view(np.uint8).reshape(-1, 16).copy()
        landed[:, n:] = 0
        wanted = np.roll(landed.reshape(-1).view(np.uint32), -4)
        yield f"copy_async16 of {n} bytes", "copy_async", 32, (x, np.int32(n)), poison, wanted
    if arch < 80:
        return
    numbers = rng.normal(size=512).astype(np.float32) * np.exp2(rng.integers(-90, 90, 512)).astype(np.float32)
    words = numbers.view(np.uint32)
    words[:256] &= ~np.uint32(0x1FFF)
    words[:128] |= np.uint32(0x1000)  # halfway between two of tf32; those of bf16:
    words[128:256] = words[128:256] & ~np.uint32(0xFFFF) | np.uint32(0x8000)
    poison = np.full(512, 0xFFFFFFFF, np.uint32)
    yield "to_tf32", "round_tf32", 512, (words,), poison, words + np.uint32(0x1000) & ~np.uint32(0x1FFF)
    half = words + np.uint32(0x7FFF) + (words >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
    yield "pack_bf16", "round_bf16", 512, (words,), poison, half | np.roll(half, -1) << np.uint32(16)
    for name, depth in PRODUCTS.items():
        a, b, c = (rng.integers(-9, 10, shape).astype(np.float32) for shape in ((16, depth), (depth, 8), (16, 8)))
        d = a @ b + c
        at = np.arange(4)
        places = GROUP + 8 * (at >= 2), 2 * MEMBER + at % 2
        given = tuple(_registers(depth, matrix, place) for matrix, place in zip((a, b), _places(depth), strict=True))
        start, wanted = (np.ascontiguousarray(matrix[places]).reshape(-1) for matrix in (c, d))
        yield name, f"{name}_alone", 32, given, start, wanted.view(np.uint32)


def _places(depth: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Rows and columns of the elements of a (16, depth) and b (depth, 8) that a lane holds, by the PTX ISA's tables."""
    if depth == 8:
        i, j = np.arange(4), np.arange(2)
        return (GROUP + 8 * (i % 2), MEMBER + 4 * (i >= 2)), (MEMBER + 4 * j, GROUP + 0 * j)
    i, j = np.arange(8), np.arange(4)
    of_a = GROUP + 8 * (i // 2 % 2), 2 * MEMBER + i % 2 + 8 * (i >= 4)
    return of_a, (2 * MEMBER + j % 2 + 8 * (j >= 2), GROUP + 0 * j)


def _registers(depth: int, matrix: np.ndarray, place: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The words that the lanes hold: one of tf32 each, or two of bf16, that of the smaller k in the lower half."""
    words = np.ascontiguousarray(matrix[place]).view(np.uint32)
    return (words if depth == 8 else words[:, ::2] >> np.uint32(16) | words[:, 1::2]).reshape(-1)
