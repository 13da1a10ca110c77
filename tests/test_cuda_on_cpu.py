"""CUDA on the CPU: small kernels run right in every mode, and the same kernels with a bug planted are caught."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import KernelError, Module, Uninitialised

F32, F64 = np.float32, np.float64
NULL = np.uintp(0)
MODES = {
    "plain": (False, 0),
    "seed 1": (False, 1),
    "seed 2": (False, 2),
    "check": (True, 0),
    "check, seed 1": (True, 1),
}


def skip_or_fail():
    if reason := cuda_on_cpu.unavailable():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@pytest.fixture(scope="module", autouse=True)
def _available():
    skip_or_fail()


def numbers(n, dtype=F32):
    return np.arange(1, n + 1).astype(dtype)


# ---- planted bugs ---------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A kernel k in which EITHER(right, wrong) plants the bug, and what each way of running must make of it.

    plain: "error", it raises; "wrong", some seed of 0, 1, 2 raises or gives a wrong result; "unseen", it need not.
    check: what the error says, or "wrong". at: a part of the source line that it tells.
    """

    text: str
    arguments: Callable
    expected: Callable  # of the arguments: what the last one shall be
    plain: str
    check: str
    at: str = "EITHER"
    grid: tuple = (1,)
    block: tuple = (64,)

    def run(self, function, **seed):
        """Whether the result is right."""
        arguments = self.arguments()
        arrays = [a.array if isinstance(a, Uninitialised) else a for a in arguments]
        expected = self.expected(*(a.copy() for a in arrays))
        function(self.grid, self.block, arguments, **seed)
        return np.array_equal(arrays[-1], expected)


def x_to_y(n=64, dtype=F32):
    return lambda: [numbers(n, dtype), np.zeros(n, dtype)]


CASES = {
    "missing __syncthreads, read after write": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            __shared__ float s[64];
            s[threadIdx.x] = x[threadIdx.x];
            EITHER(__syncthreads();,)
            y[threadIdx.x] = s[63 - threadIdx.x];
        }""",
        x_to_y(),
        lambda x, y: x[::-1],
        plain="wrong",
        check="read of memory never written: shared memory 's', index 63 of 64",
        at="y[threadIdx.x] = s",
    ),
    "missing __syncthreads, read after an older write": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            __shared__ float s[64];
            s[threadIdx.x] = 0;
            __syncthreads();
            s[threadIdx.x] = x[threadIdx.x];
            EITHER(__syncthreads();,)
            y[threadIdx.x] = s[63 - threadIdx.x];
        }""",
        x_to_y(),
        lambda x, y: x[::-1],
        plain="wrong",
        check=r"race: a write, after a read by thread \(63,0,0\) of block \(0,0,0\).*'s', index 0 of 64",
        at="s[threadIdx.x] = x",
    ),
    "missing __syncthreads, write after read": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            __shared__ float s[64];
            float v = x[threadIdx.x];
            for (int i = 0; i < 2; ++i) {
                s[threadIdx.x] = v;
                __syncthreads();
                v = s[(threadIdx.x + 1) % 64];
                EITHER(__syncthreads();,)
            }
            y[threadIdx.x] = v;
        }""",
        x_to_y(),
        lambda x, y: np.roll(x, -2),
        plain="wrong",
        check="race: a write, after a read by thread",
        at="s[threadIdx.x] = v",
    ),
    "missing __syncwarp": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            __shared__ float s[32];
            s[threadIdx.x] = 0;
            __syncwarp();
            s[threadIdx.x] = x[threadIdx.x];
            EITHER(__syncwarp();,)
            y[threadIdx.x] = s[31 - threadIdx.x];
        }""",
        x_to_y(32),
        lambda x, y: x[::-1],
        plain="wrong",
        check="race: a write, after a read",
        at="s[threadIdx.x] = x",
        block=(32,),
    ),
    "__syncwarp where two warps meet": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            __shared__ float s[64];
            s[threadIdx.x] = 0;
            __syncthreads();
            s[threadIdx.x] = x[threadIdx.x];
            EITHER(__syncthreads(), __syncwarp());
            y[threadIdx.x] = s[63 - threadIdx.x];
        }""",
        x_to_y(),
        lambda x, y: x[::-1],
        plain="wrong",
        check="race: a write, after a read",
        at="s[threadIdx.x] = x",
    ),
    "a shuffle in place of __syncwarp": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            __shared__ float s[32];
            s[threadIdx.x] = x[threadIdx.x];
            EITHER(__syncwarp(), __shfl_sync(~0u, 1, 0));
            y[threadIdx.x] = s[31 - threadIdx.x];
        }""",
        x_to_y(32),
        lambda x, y: x[::-1],
        plain="unseen",
        check="race: a read, after a write",
        at="y[threadIdx.x] = s",
        block=(32,),
    ),
    "a warp reads what another wrote after its own __syncwarp": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            __shared__ float s[64];
            s[threadIdx.x] = x[threadIdx.x];
            EITHER(__syncthreads(), __syncwarp());
            if (threadIdx.x >= 32) y[threadIdx.x] = s[threadIdx.x - 32];
        }""",
        x_to_y(),
        lambda x, y: np.append(np.zeros(32), x[:32]),
        plain="wrong",
        check=r"race: a read, after a write by thread \(0,0,0\)",
        at="y[threadIdx.x] = s",
    ),
    "a warp writes what another read": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            __shared__ float s;
            if (threadIdx.x == 0) s = x[0];
            __syncthreads();
            y[threadIdx.x] = s;
            EITHER(__syncthreads(), __syncwarp());
            if (threadIdx.x == 0) s = 5;
        }""",
        x_to_y(),
        lambda x, y: np.ones(64),
        plain="wrong",
        check="race: a write, after a read",
        at="s = 5",
    ),
    "missing atomic": Case(
        """
        extern "C" __global__ void k(int* count) {
            EITHER(atomicAdd(count, 1), *count += 1);
        }""",
        lambda: [np.zeros(1, np.int32)],
        lambda count: [256],
        plain="unseen",
        check=r"race: a read, after a write by thread \(0,0,0\) of block \(0,0,0\).*argument 0 'count', index 0 of 1",
        grid=(4,),
    ),
    "plain write beside an atomic": Case(
        """
        extern "C" __global__ void k(int* count) {
            if (threadIdx.x == 63) *count = 100;
            EITHER(__syncthreads();,)
            atomicAdd(count, 1);
        }""",
        lambda: [np.zeros(1, np.int32)],
        lambda count: [164],
        plain="wrong",
        check="race: a write, after a write",
        at="*count = 100",
    ),
    "atomic after a plain write": Case(
        """
        extern "C" __global__ void k(int* count) {
            if (threadIdx.x == 0) *count = 100;
            EITHER(__syncthreads();,)
            atomicAdd(count, 1);
        }""",
        lambda: [np.zeros(1, np.int32)],
        lambda count: [164],
        plain="wrong",
        check="race: a write, after a write",
        at="atomicAdd",
    ),
    "lost update": Case(
        """
        extern "C" __global__ void k(int* count) {
            const int before = EITHER(0, *count);
            __syncthreads();
            EITHER(atomicAdd(count, 1 + before), *count = before + 1);
        }""",
        lambda: [np.zeros(1, np.int32)],
        lambda count: [64],
        plain="wrong",
        check="race: a write, after a write",
    ),
    "plain read beside an atomic": Case(
        """
        extern "C" __global__ void k(int* count, int* y) {
            atomicAdd(count, 1);
            EITHER(__syncthreads();,)
            if (threadIdx.x == 63) y[0] = *count;
        }""",
        lambda: [np.zeros(1, np.int32), np.zeros(1, np.int32)],
        lambda count, y: [64],
        plain="wrong",
        check="race: a read, after a write",
        at="= *count",
    ),
    "in-place read of the neighbour": Case(
        """
        extern "C" __global__ void k(float* x, int n, float* y) {
            const int i = blockIdx.x * blockDim.x + threadIdx.x;
            float* out = EITHER(y, x);
            if (i + 1 < n) out[i] = x[i + 1] * 2;
            y[i] = out[i];
        }""",
        lambda: [numbers(64), np.int32(64), np.zeros(64, F32)],
        lambda x, n, y: np.append(x[1:] * 2, 0),
        plain="wrong",
        check="race: a write, after a read|race: a read, after a write",
        at="out[i] = x[i + 1]",
        grid=(2,),
        block=(32,),
    ),
    "global read one too far": Case(
        'extern "C" __global__ void k(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + EITHER(0, 1)]; }',
        x_to_y(),
        lambda x, y: x,
        plain="error",
        check="out-of-bounds read of 4 bytes: argument 0 'x', index 64 of 64",
    ),
    "global read one too far, before the next multiple of 16 bytes": Case(
        'extern "C" __global__ void k(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + EITHER(0, 1)]; }',
        x_to_y(61),
        lambda x, y: x,
        plain="wrong",
        check="out-of-bounds read of 4 bytes: argument 0 'x', index 61 of 61",
        block=(61,),
    ),
    "global write one too far": Case(
        'extern "C" __global__ void k(const float* x, float* y) { y[threadIdx.x + EITHER(0, 1)] = x[threadIdx.x]; }',
        x_to_y(),
        lambda x, y: x,
        plain="error",
        check="out-of-bounds write of 4 bytes: argument 1 'y', index 64 of 64",
    ),
    "global write one too far, before the next multiple of 16 bytes": Case(
        'extern "C" __global__ void k(const double* x, double* y) { y[threadIdx.x + EITHER(0, 1)] = x[threadIdx.x]; }',
        x_to_y(61, F64),
        lambda x, y: x,
        plain="error",
        check="out-of-bounds write of 8 bytes: argument 1 'y', index 61 of 61",
        block=(61,),
    ),
    "16-byte read over the end": Case(
        """
        extern "C" __global__ void k(const float* x, int n, float* y) {
            const int i = 4 * threadIdx.x;
            if (i EITHER(+ 3,) < n) {
                const float4 v = *reinterpret_cast<const float4*>(x + i);
                y[i] = v.x; y[i + 1] = v.y; y[i + 2] = v.z; y[i + 3] = v.w;
            } else for (int j = i; j < n; ++j) y[j] = x[j];
        }""",
        lambda: [numbers(61), np.int32(61), np.zeros(61, F32)],
        lambda x, n, y: x,
        plain="error",
        check="out-of-bounds read of .* bytes: argument 0 'x', index 61 of 61",
        at="float4 v",
        block=(16,),
    ),
    "16-byte copy over the end": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            if (threadIdx.x < EITHER(15, 16))
                reinterpret_cast<float4*>(y)[threadIdx.x] = reinterpret_cast<const float4*>(x)[threadIdx.x];
        }""",
        lambda: [numbers(61), np.zeros(64, F32)],
        lambda x, y: np.append(x[:60], [0] * 4),
        plain="wrong",
        check="out-of-bounds read of .* bytes: argument 0 'x', index 61 of 61",
        at="reinterpret_cast<float4*>",
        block=(32,),
    ),
    "negative index": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            y[int(threadIdx.x) - EITHER(0, 1)] = x[threadIdx.x];
        }""",
        x_to_y(),
        lambda x, y: x,
        plain="error",
        check="out-of-bounds write of 4 bytes: argument 1 'y', index -1 of 64",
    ),
    "unsigned index below zero": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            EITHER(if (threadIdx.x > 0),) y[threadIdx.x] = x[threadIdx.x - 1];
        }""",
        x_to_y(),
        lambda x, y: np.append(0, x[:-1]),
        plain="error",
        check="out-of-bounds read: address 0x.*, far from every array",
    ),
    "shared index out of range": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            __shared__ float s[64];
            s[threadIdx.x + EITHER(0, 1)] = x[threadIdx.x];
            y[threadIdx.x] = s[threadIdx.x + EITHER(0, 1)];
        }""",
        x_to_y(),
        lambda x, y: x,
        plain="error",
        check=r"index 64 is out of the bounds of 'float \[64\]'",
    ),
    "shared index out of range, by a pointer, before the next multiple of 16 bytes": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            __shared__ float s[61];
            float* p = s;
            p[threadIdx.x + EITHER(0, 1)] = x[threadIdx.x];
            y[threadIdx.x] = p[threadIdx.x + EITHER(0, 1)];
        }""",
        x_to_y(61),
        lambda x, y: x,
        plain="error",
        check="out-of-bounds write of 4 bytes: shared memory 's', index 61 of 61",
        block=(61,),
    ),
    "inner index of a shared tile out of range": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            __shared__ float tile[4][16];
            tile[0][threadIdx.x] = x[threadIdx.x];
            if (threadIdx.x < 16) y[threadIdx.x] = tile[EITHER(0, 1)][int(threadIdx.x) - EITHER(0, 16)];
        }""",
        lambda: [numbers(16), np.zeros(16, F32)],
        lambda x, y: x,
        plain="unseen",
        check=r"index -16 is out of the bounds of 'float \[16\]'",
        block=(16,),
    ),
    "index of a local array out of range": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            float a[4] = {x[0], x[1], x[2], x[3]};
            for (int i = 0; i < 4; ++i) a[(i + threadIdx.x) % EITHER(4, 5)] += 1;
            for (int i = 0; i < 4; ++i) y[4 * threadIdx.x + i] = a[i];
        }""",
        lambda: [numbers(4), np.zeros(256, F32)],
        lambda x, y: np.tile(x + 1, 64),
        plain="wrong",
        check=r"index 4 is out of the bounds of 'float \[4\]'",
    ),
    "null pointer": Case(
        """
        extern "C" __global__ void k(const float* x, const float* b, float* y) {
            y[threadIdx.x] = x[threadIdx.x] + EITHER((b ? b[threadIdx.x] : 0.f), b[threadIdx.x]);
        }""",
        lambda: [numbers(64), NULL, np.zeros(64, F32)],
        lambda x, b, y: x,
        plain="error",
        check="out-of-bounds read: a null pointer",
    ),
    "misaligned 16-byte access, the array": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            if (EITHER(reinterpret_cast<unsigned long long>(x) % 16, 0) == 0)
                reinterpret_cast<float4*>(y)[threadIdx.x] = reinterpret_cast<const float4*>(x)[threadIdx.x];
            else
                for (int i = 0; i < 4; ++i) y[4 * threadIdx.x + i] = x[4 * threadIdx.x + i];
        }""",
        lambda: [numbers(65)[1:], np.zeros(64, F32)],
        lambda x, y: x,
        plain="unseen",
        check="misaligned access to 'const struct float4', which needs a multiple of 16: argument 0 'x', index 0 of 64",
        at="reinterpret_cast<const float4*>",
        block=(16,),
    ),
    "misaligned 16-byte access, the index": Case(
        """
        struct alignas(16) Pack { double v[2]; };
        extern "C" __global__ void k(const double* x, double* y) {
            const Pack p = *reinterpret_cast<const Pack*>(x + 2 * threadIdx.x + EITHER(0, 1));
            y[2 * threadIdx.x] = p.v[0];
            y[2 * threadIdx.x + 1] = p.v[1];
        }""",
        lambda: [numbers(65, F64), np.zeros(64, F64)],
        lambda x, y: x[:64],
        plain="wrong",
        check="misaligned access to 'const struct Pack', which needs a multiple of 16: argument 0 'x', index 1 of 65",
        block=(32,),
    ),
    "integer overflow in an index": Case(
        """
        extern "C" __global__ void k(const float* x, int big, float* y) {
            const auto i = EITHER((long long)big, big) + int(threadIdx.x);
            y[threadIdx.x] = x[i - big];
        }""",
        lambda: [numbers(64), np.int32(2**31 - 1), np.zeros(64, F32)],
        lambda x, big, y: x,
        plain="unseen",
        check=r"integer overflow in \+, type 'int'",
    ),
    "wrong pitch, too long": Case(
        """
        extern "C" __global__ void k(const float* x, int columns, float* y) {
            float sum = 0;
            for (int j = 0; j < columns; ++j) sum += x[int(threadIdx.x) * (columns + EITHER(0, 1)) + j];
            y[threadIdx.x] = sum;
        }""",
        lambda: [numbers(64 * 5), np.int32(5), np.zeros(64, F32)],
        lambda x, columns, y: x.reshape(64, 5).sum(1),
        plain="error",
        check="out-of-bounds read of 4 bytes: argument 0 'x', index 320 of 320",
    ),
    "wrong pitch, too short": Case(
        """
        extern "C" __global__ void k(const float* x, int columns, float* y) {
            float sum = 0;
            for (int j = 0; j < columns; ++j) sum += x[int(threadIdx.x) * (columns - EITHER(0, 1)) + j];
            y[threadIdx.x] = sum;
        }""",
        lambda: [numbers(64 * 5), np.int32(5), np.zeros(64, F32)],
        lambda x, columns, y: x.reshape(64, 5).sum(1),
        plain="wrong",
        check="wrong",
    ),
    "uninitialised shared memory": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            __shared__ float s[64];
            if (threadIdx.x < EITHER(64, 63)) s[threadIdx.x] = x[threadIdx.x];
            __syncthreads();
            y[threadIdx.x] = s[threadIdx.x];
        }""",
        x_to_y(),
        lambda x, y: x,
        plain="wrong",
        check="read of memory never written: shared memory 's', index 63 of 64",
        at="y[threadIdx.x] = s",
    ),
    "shared memory of the last block": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            __shared__ float s;
            if (threadIdx.x == 0 EITHER(, && blockIdx.x == 0)) s = x[blockIdx.x];
            __syncthreads();
            y[blockIdx.x * blockDim.x + threadIdx.x] = s;
        }""",
        lambda: [np.full(4, 7, F32), np.zeros(256, F32)],
        lambda x, y: np.full(256, 7),
        plain="wrong",
        check="read of memory never written: shared memory 's'",
        at="= s;",
        grid=(4,),
    ),
    "uninitialised global memory": Case(
        'extern "C" __global__ void k(const float* x, float* y) { y[threadIdx.x] EITHER(=, +=) x[threadIdx.x]; }',
        lambda: [numbers(64), Uninitialised(np.zeros(64, F32))],
        lambda x, y: x,
        plain="wrong",
        check="read of memory never written: argument 1 'y', index 0 of 64",
    ),
    "atomic on uninitialised memory": Case(
        """
        extern "C" __global__ void k(int* y) {
            EITHER(y[threadIdx.x] = 0;,)
            atomicAdd(y + threadIdx.x, 1);
        }""",
        lambda: [Uninitialised(np.zeros(64, np.int32))],
        lambda y: np.ones(64),
        plain="wrong",
        check="read of memory never written: argument 0 'y', index 0 of 64",
        at="atomicAdd",
    ),
    "global memory that nobody writes": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            EITHER(, if (threadIdx.x)) y[threadIdx.x] = x[threadIdx.x];
        }""",
        lambda: [numbers(64), Uninitialised(np.zeros(64, F32))],
        lambda x, y: x,
        plain="wrong",
        check="wrong",
    ),
    "divergent barrier": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            if (threadIdx.x < EITHER(64, 40)) {
                __syncthreads();
                y[threadIdx.x] = x[threadIdx.x];
            } else {
                __syncthreads();  // the other
                y[threadIdx.x] = 0;
            }
        }""",
        x_to_y(),
        lambda x, y: x,
        plain="error",
        check="divergent barrier: others wait in the __syncthreads at line 4",
        at="the other",
    ),
    "divergent __syncwarp": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            if (threadIdx.x < EITHER(32, 16)) {
                __syncwarp();
                y[threadIdx.x] = x[threadIdx.x];
            } else {
                __syncwarp();  // the other
                y[threadIdx.x] = 0;
            }
        }""",
        x_to_y(32),
        lambda x, y: x,
        plain="error",
        check="warp collective while lanes 0xffff wait in another at line 4",
        at="the other",
        block=(32,),
    ),
    "shuffle under two masks": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            const unsigned mask = EITHER(~0u, (threadIdx.x < 16 ? 0xffffffu : ~0u));
            y[threadIdx.x] = __shfl_xor_sync(mask, x[threadIdx.x], 1);
        }""",
        x_to_y(32),
        lambda x, y: x.reshape(16, 2)[:, ::-1].ravel(),
        plain="error",
        check="warp collective with mask 0xffffffff while lanes 0xffff wait in another at line 4 with mask 0xffffff",
        at="__shfl_xor_sync",
        block=(32,),
    ),
    "exit before a shuffle": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            EITHER(, if (threadIdx.x >= 16) return;)
            y[threadIdx.x] = __shfl_down_sync(~0u, x[threadIdx.x], 16);
        }""",
        x_to_y(32),
        lambda x, y: np.append(x[16:], x[16:]),
        plain="error",
        check="shuffle from lane 16, which has ended or takes no part",
        at="__shfl_down_sync",
        block=(32,),
    ),
    "shuffle from an absent lane": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            y[threadIdx.x] = __shfl_down_sync(~0u, x[threadIdx.x], 8, EITHER(16, 32));
        }""",
        x_to_y(48),
        lambda x, y: np.hstack([np.append(part[8:], part[8:]) for part in x.reshape(3, 16)]),
        plain="error",
        check="shuffle from lane 16, which has ended or takes no part",
        block=(48,),
    ),
    "shuffle under a mask that leaves the caller out": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            y[threadIdx.x] = __shfl_xor_sync(EITHER(~0u, 0xffffu), x[threadIdx.x], 1);
        }""",
        x_to_y(32),
        lambda x, y: x.reshape(16, 2)[:, ::-1].ravel(),
        plain="error",
        check="lane 16 calls a warp collective whose mask 0xffff leaves it out",
        block=(32,),
    ),
    "deadlock": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            EITHER(, if (threadIdx.x < 16)) __syncwarp();
            __syncthreads();
            y[threadIdx.x] = x[threadIdx.x];
        }""",
        x_to_y(),
        lambda x, y: x,
        plain="error",
        check=r"deadlock in block 0: 64 threads wait for ever.*thread \(0,0,0\) waits in a warp collective at line 3",
    ),
    "two blocks write one element": Case(
        'extern "C" __global__ void k(float* y) { if (threadIdx.x == 0) y[EITHER(blockIdx.x, 0)] = blockIdx.x; }',
        lambda: [np.zeros(4, F32)],
        lambda y: np.arange(4),
        plain="wrong",
        check=r"race: a write, after a write by thread \(0,0,0\) of block \(0,0,0\)",
        grid=(4,),
    ),
    "a block reads what another writes": Case(
        """
        extern "C" __global__ void k(const float* x, float* y, float* z) {
            const int i = blockIdx.x * blockDim.x + threadIdx.x;
            y[i] = x[i];
            __syncthreads();
            z[i] = y[EITHER(i ^ 1, (i + 64) % 256)];
        }""",
        lambda: [np.ones(256, F32), np.zeros(256, F32), np.zeros(256, F32)],
        lambda x, y, z: x,
        plain="wrong",
        check="race: a ",
        at="",
        grid=(4,),
    ),
    "a block reads what an earlier one wrote": Case(
        """
        extern "C" __global__ void k(const float* x, float* y, float* z) {
            const int i = blockIdx.x * blockDim.x + threadIdx.x;
            y[i] = x[i];
            __syncthreads();
            z[i] = y[EITHER(i, threadIdx.x)];
        }""",
        lambda: [np.ones(256, F32), np.zeros(256, F32), np.zeros(256, F32)],
        lambda x, y, z: x,
        plain="wrong",
        check=r"block \(1, 0, 0\).*race: a read, after a write by thread .* of block \(0,0,0\)",
        grid=(4,),
    ),
    "a block writes what others have read": Case(
        """
        extern "C" __global__ void k(float* x, float* y) {
            const float v = x[EITHER(blockIdx.x, 0)];
            __syncthreads();
            if (blockIdx.x == 1 && threadIdx.x == 0) x[EITHER(1, 0)] = 5;
            y[blockIdx.x * blockDim.x + threadIdx.x] = v;
        }""",
        lambda: [np.ones(4, F32), np.zeros(256, F32)],
        lambda x, y: np.ones(256),
        plain="wrong",
        check="race: a write, after a read",
        at="= 5",
        grid=(4,),
    ),
    "write through a pointer to const": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            float* p = EITHER(y, const_cast<float*>(x));
            p[threadIdx.x] = x[threadIdx.x] + 1;
        }""",
        x_to_y(),
        lambda x, y: x + 1,
        plain="error",
        check="write through a pointer to const: argument 0 'x', index 0 of 64",
        at="p[threadIdx.x] =",
    ),
    "division by zero": Case(
        'extern "C" __global__ void k(const int* x, int* y) { y[threadIdx.x] = 64 / (x[threadIdx.x] - EITHER(0, 1)); }',
        x_to_y(64, np.int32),
        lambda x, y: 64 // x,
        plain="error",
        check="division by zero",
    ),
    "shift by too much": Case(
        """
        extern "C" __global__ void k(const int* x, int* y) {
            y[threadIdx.x] = x[threadIdx.x] >> (threadIdx.x EITHER(% 32,));
        }""",
        x_to_y(64, np.int32),
        lambda x, y: x >> np.arange(64) % 32,
        plain="unseen",
        check="shift by a negative number or by too many bits",
    ),
    "missing dynamic shared memory": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            EITHER(__shared__ float s[64];, extern __shared__ float s[];)
            s[threadIdx.x] = x[threadIdx.x];
            y[threadIdx.x] = s[threadIdx.x];
        }""",
        x_to_y(),
        lambda x, y: x,
        plain="error",
        check="'s' is dynamic shared memory, of which the launch gives none",
        at="",
    ),
    "stack overflow": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            volatile float big[EITHER(100, 20000)];
            big[threadIdx.x] = x[threadIdx.x];
            y[threadIdx.x] = big[threadIdx.x];
        }""",
        x_to_y(),
        lambda x, y: x,
        plain="error",
        check="the thread's stack of 64 KiB is full",
        at="",
    ),
    "failed assertion": Case(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            assert(x[0] EITHER(>, <) 0);
            y[threadIdx.x] = x[0];
        }""",
        x_to_y(),
        lambda x, y: np.ones(64),
        plain="error",
        check="assertion failed",
    ),
}
NAMES = list(CASES)


def planted(wrong):
    choice = "#define EITHER(right, wrong) " + ("wrong" if wrong else "right")
    return [f"{choice}{case.text if case.text[0] == chr(10) else chr(10) + case.text}" for case in CASES.values()]


@pytest.fixture(scope="module")
def module():
    """The cases with or without their bugs, all of them in one unit, built once."""
    built = {}

    def get(wrong, check):
        if (wrong, check) not in built:
            built[wrong, check] = Module(planted(wrong), check=check)
        return built[wrong, check]

    return get


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_without_the_bug_it_is_right_in_every_mode(name, mode, module):
    check, seed = MODES[mode]
    assert CASES[name].run(module(False, check).function("k", NAMES.index(name)), seed=seed)


@pytest.mark.parametrize("name", NAMES)
def test_check_catches_the_bug(name, module):
    case, code = CASES[name], NAMES.index(name)
    function = module(True, True).function("k", code)
    if case.check == "wrong":
        assert not case.run(function)
        return
    with pytest.raises(KernelError, match=case.check) as told:
        case.run(function)
    error = told.value
    assert error.kernel == "k"
    if case.at:
        assert case.at in planted(True)[code].split("\n")[error.line - 1]
        assert f"line {error.line} of text {code}: " in str(error)


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].plain != "unseen"])
def test_a_plain_run_catches_the_bug(name, module):
    case = CASES[name]
    function = module(True, False).function("k", NAMES.index(name))
    if case.plain == "error":
        with pytest.raises(KernelError):
            case.run(function)
        return

    def is_right(seed):
        try:
            return case.run(function, seed=seed)
        except KernelError:
            return False

    assert not all(is_right(seed) for seed in range(3))


# ---- what a text may use --------------------------------------------------------------------------------------------

FEATURES = """
#pragma once
#define TILE 8
template <class T> __device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
    return v;
}
template <class T> __device__ T block_sum(T v) {  // all threads of the block get it
    __shared__ T part[32];
    v = warp_sum(v);
    __syncthreads();
    if (threadIdx.x % warpSize == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? part[threadIdx.x % 32] : T(0));
}
extern "C" __global__ void __launch_bounds__(256) sums(const REAL* __restrict__ x, REAL* __restrict__ y, long long n) {
    REAL sum = 0;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += gridDim.x * (long long)blockDim.x)
        sum += x[i];
    sum = block_sum(sum);
    const REAL again = block_sum(threadIdx.x == 0 ? sum : 0);
    if (threadIdx.x == 0) y[blockIdx.x] = again;
}

// Overloads a kernel's name, as a template.
template <int N> __device__ void transpose(const REAL* x, REAL* y, int rows, int columns) {
    __shared__ REAL tile[N][N + 1];
    const int i = blockIdx.y * N, j = blockIdx.x * N;
    if (i + threadIdx.y < rows && j + threadIdx.x < columns)
        tile[threadIdx.y][threadIdx.x] = x[(i + threadIdx.y) * columns + j + threadIdx.x];
    __syncthreads();
    if (i + threadIdx.x < rows && j + threadIdx.y < columns)
        y[(j + threadIdx.y) * rows + i + threadIdx.x] = tile[threadIdx.x][threadIdx.y];
}
extern "C" __global__ void transpose(const REAL* x, REAL* y, int rows, int columns) {
    transpose<TILE>(x, y, rows, columns);
}

// In shared memory, by one warp: each element is read by two threads before it is written.
extern "C" __global__ void scan(const REAL* x, REAL* y) {
    __shared__ REAL s[32];
    s[threadIdx.x] = x[threadIdx.x];
    __syncwarp();
    for (int d = 1; d < 32; d *= 2) {
        const REAL v = threadIdx.x >= d ? s[threadIdx.x - d] + s[threadIdx.x] : s[threadIdx.x];
        __syncwarp();
        s[threadIdx.x] = v;
        __syncwarp();
    }
    y[threadIdx.x] = s[threadIdx.x];
}

template <class T, int N> struct alignas(N * sizeof(T)) Pack { T v[N]; };
extern "C" __global__ void swap(const REAL* x, REAL* y) {
    __shared__ alignas(16) Pack<REAL, 2> s[2][16];
    for (int i = 0; i < 2; ++i)  // two threads write a struct
        s[i][threadIdx.x / 2].v[threadIdx.x % 2] = x[32 * i + threadIdx.x];
    __syncthreads();
    const auto pair = s[1 - threadIdx.x / 16][threadIdx.x % 16];
    y[2 * threadIdx.x] = pair.v[1];
    y[2 * threadIdx.x + 1] = pair.v[0];
}

extern "C" __global__ void positions(unsigned* y) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    y[block * blockDim.x * blockDim.y * blockDim.z + thread] = threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z +
        1000 * blockIdx.x + 10000 * blockIdx.y + 100000 * blockIdx.z;
}

extern "C" __global__ void shuffles(const REAL* x, REAL* y, int d, int width) {
    const REAL v = x[threadIdx.x];
    y[threadIdx.x] = __shfl_sync(~0u, v, d, width);
    y[32 + threadIdx.x] = __shfl_up_sync(~0u, v, d, width);
    y[64 + threadIdx.x] = __shfl_down_sync(~0u, v, d, width);
    y[96 + threadIdx.x] = __shfl_xor_sync(~0u, v, d, width);
    if (threadIdx.x < 8) y[128 + threadIdx.x] = __shfl_sync(0xffu, v, 7 - threadIdx.x);  // part of a warp
}

extern "C" __global__ void votes(const int* x, unsigned* y) {
    const int p = x[threadIdx.x];
    unsigned* out = y + 9 * threadIdx.x;
    out[0] = __ballot_sync(~0u, p);
    out[1] = __any_sync(~0u, p);
    out[2] = __all_sync(~0u, p);
    out[3] = __syncthreads_count(p);
    out[4] = __syncthreads_or(p);
    out[5] = __syncthreads_and(p);
    out[6] = __syncthreads_count(1);
    out[7] = __syncthreads_or(0);
    out[8] = __syncthreads_and(1);
}

extern "C" __global__ void atomics(int* y, unsigned* u, float* f, unsigned long long* l) {
    const int i = threadIdx.x;
    atomicAdd(y, i), atomicSub(y + 1, i), atomicMax(y + 2, i), atomicMin(y + 3, i), atomicExch(y + 4, 5);
    atomicAnd(u, ~(1u << i % 32)), atomicOr(u + 1, 1u << i % 32), atomicXor(u + 2, 3u), atomicInc(u + 3, 6u);
    atomicCAS(u + 4, 0u, 9u);
    atomicAdd(f, 0.5f), atomicAdd(l, 1ull << 33);
}

extern "C" __global__ void leave_early(const REAL* x, REAL* y, int n) {  // which is no divergence
    __shared__ REAL s[64];
    if (threadIdx.x >= n) return;
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s[n - 1 - threadIdx.x];
}

extern "C" __global__ void dynamic(const REAL* x, REAL* y, int n) {
    extern __shared__ REAL buffer[];
    buffer[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = buffer[n - 1 - threadIdx.x];
}

extern "C" __global__ void vectors(const float4* f, const uchar4* c, const double2* d, float* y) {
    const float4 v = __ldg(f + threadIdx.x), w = make_float4(1, 2, 3, 4);
    const int2 i = make_int2(5, 6);
    y[3 * threadIdx.x] = v.x * w.x + v.y * w.y + v.z * w.z + v.w * w.w + i.y;
    y[3 * threadIdx.x + 1] = c[threadIdx.x].x + c[threadIdx.x].w;
    y[3 * threadIdx.x + 2] = float(d[threadIdx.x].x - d[threadIdx.x].y);
}

// Each with REAL's overload; the last one tells which that is.
extern "C" __global__ void functions(const REAL* x, REAL* y) {
    const REAL v = x[threadIdx.x];
    const REAL all[] = {
        exp(v), expm1(v), exp2(v), log(v), log1p(v), log2(v), log10(v), sqrt(v), cbrt(v), rsqrt(v), sin(v), cos(v),
        tan(v), sinh(v), cosh(v), tanh(v), atan(v), floor(v), ceil(v), trunc(v), rint(v), fabs(-v), abs(-v),
        pow(v, REAL(1.5)), fmax(v, REAL(1)), fmin(v, REAL(1)), max(v, REAL(1)), min(v, REAL(1)), hypot(v, REAL(2)),
        atan2(v, REAL(2)), copysign(v, REAL(-1)), fma(v, v, v), REAL(isfinite(v) && !isnan(v) && !isinf(v)),
        REAL(sizeof(exp(v)) + sizeof(max(v, v)))};
    constexpr int n = sizeof all / sizeof(REAL);
    for (int i = 0; i < n; ++i) y[n * threadIdx.x + i] = all[i];
}

extern "C" __global__ void bits(const unsigned* x, unsigned* y) {
    const unsigned v = x[threadIdx.x];
    const unsigned all[] = {
        __umulhi(v, 0x9E3779B9u), unsigned(__popc(v)), unsigned(__clz(v)), unsigned(__ffs(v)),
        unsigned(__float_as_int(__int_as_float(v & 0x7f7fffff))), max(v, 7u), unsigned(min(int(v), 7)),
        unsigned(__double_as_longlong(__longlong_as_double(0x3ff0000000000000ll)) >> 32)};
    for (int i = 0; i < 8; ++i) y[8 * threadIdx.x + i] = all[i];
}

extern "C" __global__ void rounding(const REAL* x, REAL* y) {
    y[0] = x[0] * x[0] - x[1];  // fused
    y[1] = __fmul_rn(x[0], x[0]) - x[1];
    y[2] = x[2] * REAL(0.5);    // a denormal number
    y[3] = max(x[3], REAL(1));  // of a NaN and 1
    y[4] = x[3] < 1 || !isnan(x[3]);
}
"""
REALS = {"float": F32, "double": F64}


@pytest.fixture(scope="module")
def features():
    built = {}

    def get(real, mode):
        check, seed = MODES[mode]
        if check not in built:
            built[check] = Module([f"#define REAL {real}\n{FEATURES}" for real in REALS], check=check)

        def launch(name, grid, block, args, **options):
            code = list(REALS).index(real)
            built[check].function(name, code)(grid, block, args, seed=seed, **options)

        return launch

    return get


@pytest.fixture(params=REALS)
def real(request):
    return request.param


@pytest.fixture(params=MODES)
def launch(request, features, real):
    return features(real, request.param)


@pytest.fixture
def dtype(real):
    return REALS[real]


@pytest.mark.parametrize(("grid", "block", "n"), [(1, 32, 1), (3, 64, 1000), (2, 256, 31)])
def test_sums_by_shuffles_and_shared_memory(launch, dtype, grid, block, n):
    x, y = numbers(n, dtype), Uninitialised(np.zeros(grid, dtype))
    launch("sums", (grid,), (block,), (x, y, np.int64(n)))
    assert y.array.sum() == n * (n + 1) / 2


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (8, 8), (9, 23)])
def test_tiles_in_two_dimensions(launch, dtype, rows, columns):
    x, y = numbers(rows * columns, dtype).reshape(rows, columns), np.zeros((columns, rows), dtype)
    launch("transpose", (-(-columns // 8), -(-rows // 8)), (8, 8), (x, y, np.int32(rows), np.int32(columns)))
    assert np.array_equal(y, x.T)


def test_a_warp_meets_by_syncwarp(launch, dtype):
    x, y = numbers(32, dtype), np.zeros(32, dtype)
    launch("scan", (1,), (32,), (x, y))
    assert np.array_equal(y, x.cumsum())


def test_shared_memory_of_structs(launch, dtype):
    x, y = numbers(64, dtype), np.zeros(64, dtype)
    launch("swap", (1,), (32,), (x, y))
    assert np.array_equal(y, np.roll(x, 32).reshape(32, 2)[:, ::-1].ravel())


def test_three_dimensions(launch):
    y = np.zeros(2 * 3 * 4 * 5 * 4 * 2, np.uint32)
    launch("positions", (2, 3, 4), (5, 4, 2), (y,))
    bz, by, bx, tz, ty, tx = np.unravel_index(np.arange(y.size), (4, 3, 2, 2, 4, 5))
    assert np.array_equal(y, tx + 10 * ty + 100 * tz + 1000 * bx + 10000 * by + 100000 * bz)


@pytest.mark.parametrize(("d", "width"), [(0, 32), (1, 32), (5, 32), (3, 8), (1, 2), (7, 16)])
def test_shuffles(launch, dtype, d, width):
    x, y = numbers(32, dtype), np.zeros(136, dtype)
    launch("shuffles", (1,), (32,), (x, y, np.int32(d), np.int32(width)))
    lane = np.arange(32)
    start = lane // width * width
    for k, source in enumerate([start + d % width, lane - d, lane + d, lane ^ d]):
        inside = (start <= source) & (source < start + width)
        assert np.array_equal(y[32 * k : 32 * k + 32], x[np.where(inside, source, lane)])
    assert np.array_equal(y[128:], x[7::-1])


@pytest.mark.parametrize("votes", [np.zeros(64), np.ones(64), np.arange(64) == 40, np.arange(64) % 3])
def test_votes(launch, votes):
    x, y = votes.astype(np.int32), np.zeros((64, 9), np.uint32)
    launch("votes", (1,), (64,), (x, y))
    for half in (0, 32):
        warp = x[half : half + 32] != 0
        ballot = sum(1 << lane for lane in range(32) if warp[lane])
        expected = [ballot, warp.any(), warp.all(), (x != 0).sum(), x.any(), x.all(), 64, 0, 1]
        assert (y[half : half + 32] == expected).all()


def test_atomics(launch):
    y, u = np.zeros(5, np.int32), np.array([2**32 - 1, 0, 0, 0, 0], np.uint32)
    f, l = np.zeros(1, F32), np.zeros(1, np.uint64)
    launch("atomics", (2,), (64,), (y, u, f, l))
    assert y.tolist() == [2 * 2016, -2 * 2016, 63, 0, 5]
    assert u.tolist() == [0, 2**32 - 1, 0, 128 % 7, 9]
    assert f[0] == 64
    assert l[0] == 128 << 33


def test_dynamic_shared_memory(launch, dtype):
    for n in (64, 32, 128):
        x, y = numbers(n, dtype), np.zeros(n, dtype)
        launch("dynamic", (1,), (n,), (x, y, np.int32(n)), shared_mem=x.nbytes)
        assert np.array_equal(y, x[::-1])


@pytest.mark.parametrize("n", [64, 63, 32, 1])
def test_barriers_do_not_wait_for_threads_that_have_ended(launch, dtype, n):
    x, y = numbers(n, dtype), np.zeros(n, dtype)
    launch("leave_early", (1,), (64,), (x, y, np.int32(n)))
    assert np.array_equal(y, x[::-1])


def test_vector_types(launch):
    f, c, d = numbers(128), np.arange(128, dtype=np.uint8), numbers(64, F64) ** 2
    y = np.zeros((32, 3), F32)
    launch("vectors", (1,), (32,), (f, c, d, y))
    assert np.array_equal(y[:, 0], f.reshape(32, 4) @ np.array([1, 2, 3, 4], F32) + 6)
    assert np.array_equal(y[:, 1], c[0::4].astype(F32) + c[3::4])
    assert np.array_equal(y[:, 2], d[0::2] - d[1::2])


def test_functions(launch, dtype):
    v = np.linspace(0.1, 3, 32).astype(dtype)
    one = np.ones_like(v)
    y = np.zeros((32, 34), dtype)
    launch("functions", (1,), (32,), (v, y))
    names = (
        "exp expm1 exp2 log log1p log2 log10 sqrt cbrt rsqrt sin cos tan sinh cosh tanh arctan floor ceil trunc rint"
    )
    expected = [1 / np.sqrt(v) if name == "rsqrt" else getattr(np, name)(v) for name in names.split()]
    expected += [v, v, v**1.5, np.maximum(v, 1), np.minimum(v, 1), np.maximum(v, 1), np.minimum(v, 1), np.hypot(v, 2)]
    expected += [np.arctan2(v, 2), -v, v * v + v, one, 2 * v.itemsize * one]
    np.testing.assert_allclose(y.T, expected, rtol=4 * np.finfo(dtype).eps, atol=4 * np.finfo(dtype).eps)


def test_bits(launch):
    x = np.array([1, 2, 3, 0x80000000, 0xFFFFFFFF, 0x12345678] + [5] * 26, np.uint32)
    y = np.zeros((32, 8), np.uint32)
    launch("bits", (1,), (32,), (x, y))
    for v, row in zip(x.tolist(), y.tolist(), strict=True):
        signed = v - 2**32 if v >= 2**31 else v
        assert row == [
            v * 0x9E3779B9 >> 32,
            v.bit_count(),
            32 - v.bit_length(),
            (v & -v).bit_length(),
            v & 0x7F7FFFFF,
            max(v, 7),
            min(signed, 7) % 2**32,
            0x3FF00000,
        ]


@pytest.mark.parametrize("mode", MODES)
def test_rounding_of_float(features, mode):
    a = F32(1 + 2**-12)
    x = np.array([a, a * a, 2.0**-130, np.nan], F32)
    y = np.zeros(5, F32)
    features("float", mode)("rounding", (1,), (1,), (x, y))
    assert y.tolist() == [F64(a) ** 2 - F64(a * a), 0, 0, 1, 0]
    assert x[2] * F32(1) > 0  # and Python's arithmetic is as it was


@pytest.mark.parametrize("mode", MODES)
def test_denormal_doubles_stay(features, mode):
    x, y = np.array([0, 0, 2.0**-1030, np.nan]), np.zeros(5)
    features("double", mode)("rounding", (1,), (1,), (x, y))
    assert y[2] == 2.0**-1031


# ---- arguments ------------------------------------------------------------------------------------------------------

HOST = """
// extern "C" __global__ void not_a_kernel(float* x) {}
extern "C" __global__ void scale(const float* __restrict__ x, float* y, long long n, float a, bool twice) {
    for (long long i = threadIdx.x; i < n; i += blockDim.x) y[i] = x[i] * a * (twice ? 2 : 1);
}
extern "C" __global__ void where(const unsigned char* a, const double* b, unsigned long long* y) {
    y[0] = reinterpret_cast<unsigned long long>(a) % 16;
    y[1] = reinterpret_cast<unsigned long long>(b) % 16;
}
extern "C" __global__ void double_in_place(float* x, const float* y) { x[threadIdx.x] += y[threadIdx.x]; }
extern "C" __global__ void order(int* ticket, int* y) {
    y[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(ticket, 1);
}
extern "C" __global__ void endless(int* y, int step) {
    for (int i = 0; i < 10; i += step) y[0] ^= 1;
}
extern "C" __global__ void nothing() {}
extern "C" __global__ void flags(const bool* x, unsigned char* y) { y[threadIdx.x] = x[threadIdx.x]; }
"""


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "check"])
def host(request):
    return Module(HOST, check=request.param)


def scale_arguments():
    return {"x": numbers(8), "y": np.zeros(8, F32), "n": np.int64(8), "a": F32(3), "twice": np.True_}


def test_arguments_that_fit(host):
    args = scale_arguments()
    host.function("scale")((1,), (32,), tuple(args.values()))
    assert np.array_equal(args["y"], args["x"] * 6)
    assert host.names() == ["scale", "where", "double_in_place", "order", "endless", "nothing", "flags"]
    host.function("nothing")((1,), (1,), ())


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("x", numbers(8, F64), "argument 0 'x': the kernel wants an array of float32, given an array of float64"),
        ("x", numbers(8, np.int32), "argument 0 'x': the kernel wants an array of float32, given an array of int32"),
        ("x", numbers(8).astype(">f4"), "argument 0 'x': the kernel wants an array of float32, given an array of >f4"),
        ("x", F32(1), "the kernel wants an array of float32, given a scalar float32"),
        ("x", 0, "given a Python int"),
        ("x", None, "given a Python NoneType"),
        ("x", np.uintp(16), "given a scalar uint64"),
        ("x", np.int64(0), "given a scalar int64"),
        ("x", numbers(16)[::2], "argument 0 'x': the array is not C-contiguous"),
        ("y", np.frombuffer(bytes(32), F32), "argument 1 'y': the kernel may write the array, which is read-only"),
        ("n", np.int32(8), "argument 2 'n': the kernel wants a scalar int64, given a scalar int32"),
        ("n", np.uint64(8), "argument 2 'n': the kernel wants a scalar int64, given a scalar uint64"),
        ("n", 8, "argument 2 'n': the kernel wants a scalar int64, given a Python int"),
        ("n", numbers(8), "argument 2 'n': the kernel wants a scalar int64, given an array of float32"),
        ("a", F64(3), "argument 3 'a': the kernel wants a scalar float32, given a scalar float64"),
        ("twice", np.uint8(1), "argument 4 'twice': the kernel wants a scalar bool, given a scalar uint8"),
    ],
)
def test_arguments_that_do_not_fit(host, name, value, told):
    with pytest.raises(KernelError, match=told) as error:
        host.function("scale")((1,), (32,), tuple({**scale_arguments(), name: value}.values()))
    assert error.value.kernel == "scale"
    assert error.value.argument == list(scale_arguments()).index(name)


def test_the_number_of_arguments(host):
    args = tuple(scale_arguments().values())
    for wrong in (args[:-1], (*args, np.int32(1)), ()):
        with pytest.raises(KernelError, match=f"{len(wrong)} arguments given, the kernel takes 5"):
            host.function("scale")((1,), (32,), wrong)


def test_booleans_are_bytes_to_the_kernel_but_bytes_are_no_booleans(host):
    x, y = np.array([True, False]), np.zeros(2, bool)
    host.function("flags")((1,), (2,), (x, y))
    assert y.tolist() == [True, False]
    with pytest.raises(KernelError, match="wants an array of bool, given an array of uint8"):
        host.function("flags")((1,), (2,), (np.array([2, 0], np.uint8), y))


def test_arrays_keep_their_alignment(host):
    data, doubles = np.zeros(100, np.uint8), np.zeros(101)
    for i in range(17):
        a, b, y = data[i : i + 10 + i], doubles[i:], np.zeros(2, np.uint64)
        host.function("where")((1,), (1,), (a, b, y))
        assert y.tolist() == [a.ctypes.data % 16, b.ctypes.data % 16]


def test_one_array_given_twice(host):
    x = numbers(8)
    host.function("double_in_place")((1,), (8,), (x, x))
    assert np.array_equal(x, 2 * numbers(8))
    args = {**scale_arguments(), "x": x, "y": x}  # a pointer to const, and one that writes
    host.function("scale")((1,), (32,), tuple(args.values()))
    assert np.array_equal(x, 12 * numbers(8))


def test_one_start_is_one_array_as_long_as_the_longest(host):
    x = numbers(8)
    host.function("double_in_place")((1,), (8,), (x[:4], x))
    assert np.array_equal(x, 2 * numbers(8))
    host.function("double_in_place")((1,), (8,), (x, x[:4]))
    assert np.array_equal(x, 4 * numbers(8))
    with pytest.raises(KernelError, match="argument 0 'x', index 4 of 4"):
        host.function("double_in_place")((1,), (8,), (x[:4], numbers(8)))


def test_arrays_that_overlap(host):
    x = numbers(9)
    told = "arguments 0 'x' and 1 'y' overlap, but start at different addresses"
    for pair in ((x[:8], x[1:]), (x[1:], x[:8]), (x, x[3:5])):
        with pytest.raises(KernelError, match=told):
            host.function("double_in_place")((1,), (2,), pair)
    host.function("double_in_place")((1,), (4,), (x[:4], x[4:]))
    assert x.tolist() == [6, 8, 10, 12, 5, 6, 7, 8, 9]


def test_empty_arrays(host):
    args = {**scale_arguments(), "x": numbers(0), "y": np.zeros((0, 3), F32), "n": np.int64(0)}
    host.function("scale")((1,), (32,), tuple(args.values()))
    with pytest.raises(KernelError, match="argument 0 'x', index 0 of 0"):
        host.function("scale")((1,), (32,), tuple({**args, "n": np.int64(1)}.values()))


def test_uninitialised_memory_reads_as_nan_in_a_plain_run():
    args = {**scale_arguments(), "x": Uninitialised(numbers(8))}
    Module(HOST).function("scale")((1,), (32,), tuple(args.values()))
    assert np.isnan(args["y"]).all()
    assert np.array_equal(args["x"].array, numbers(8))  # a const array is left as it was


@pytest.mark.parametrize(
    ("grid", "block", "shared", "told"),
    [
        ((0,), (32,), 0, "grid"),
        ((1, 65536), (32,), 0, "grid"),
        ((1,), (1025,), 0, "block"),
        ((1,), (1, 1, 65), 0, "block"),
        ((1,), (32, 33), 0, "1056 threads, at most 1024"),
        ((65535, 65535), (1,), 0, "blocks, too many"),
        ((1, 1, 1, 1), (1,), 0, "grid"),
        ((1,), (), 0, "block"),
        ((1,), (1,), 227 * 1024 + 1, "232449 bytes of dynamic shared memory, at most 232448"),
    ],
)
def test_launches_that_no_gpu_would_take(host, grid, block, shared, told):
    with pytest.raises(KernelError, match=told):
        host.function("nothing")(grid, block, (), shared_mem=shared)


# ---- running --------------------------------------------------------------------------------------------------------


def test_what_an_error_tells():
    function = Module(CASES["global read one too far"].text.replace("EITHER(0, 1)", "1")).function("k")
    with pytest.raises(KernelError) as told:
        function((1,), (64,), (numbers(64), np.zeros(64, F32)))
    e = told.value
    assert (e.kernel, e.block, e.thread, e.argument, e.index, e.line) == ("k", (0, 0, 0), (63, 0, 0), 0, 64, 1)


@pytest.mark.parametrize("check", [False, True])
def test_an_error_names_its_line_where_the_unit_was_built_without_lines(check):
    text = "\n\n" + CASES["global read one too far"].text.replace("EITHER(0, 1)", "1")
    modules = [Module(text, check, lines=lines) for lines in (True, False)]
    assert modules[0].path != modules[1].path
    told = []
    for module in modules:
        with pytest.raises(KernelError) as e:
            module.function("k")((1,), (64,), (numbers(64), np.zeros(64, F32)))
        told.append(e.value)
    assert str(told[0]) == str(told[1])
    assert told[1].line == 3


def test_a_failed_launch_copies_nothing_back_and_leaves_no_trace(host):
    scale, args = host.function("scale"), scale_arguments()
    for _ in range(3):
        with pytest.raises(KernelError):
            scale((1,), (32,), tuple({**args, "n": np.int64(5000)}.values()))
        assert not args["y"].any()
        assert F32(2.0**-130) * F32(1) > 0
    scale((1,), (32,), tuple(args.values()))
    assert np.array_equal(args["y"], args["x"] * 6)


def test_a_seed_is_an_order(host):
    def order(seed):
        ticket, y = np.zeros(1, np.int32), np.zeros(4 * 96, np.int32)
        host.function("order")((4,), (96,), (ticket, y), seed=seed)
        assert sorted(y) == list(range(y.size))
        return y.reshape(4, 3, 32)

    assert np.array_equal(order(0).ravel(), np.arange(4 * 96))
    assert np.array_equal(order(1), order(1))
    assert not np.array_equal(order(1), order(2))
    y = order(1)
    assert not np.array_equal(y[:, 0, 0], np.sort(y[:, 0, 0]))  # blocks
    assert any(not np.array_equal(b[:, 0], np.sort(b[:, 0])) for b in y)  # warps
    assert all(not np.array_equal(w, np.sort(w)) for w in y.reshape(12, 32))  # lanes
    assert all(np.ptp(w) == 31 for w in y.reshape(12, 32))


def test_an_endless_loop_is_ended(host, monkeypatch):
    monkeypatch.setattr(cuda_on_cpu, "TIME_LIMIT", 0.1)
    y = np.zeros(1, np.int32)
    with pytest.raises(KernelError, match=r"has not ended after 0\.1 s of CPU time") as told:
        host.function("endless")((1,), (1,), (y, np.int32(0)))
    assert "step" in HOST.split("\n")[told.value.line - 1]
    host.function("endless")((1,), (1,), (y, np.int32(1)))


def test_several_texts_do_not_meet():
    first = """#define N 2
        #define warpSize 7
        #define k_helper 1
        struct S { int a; };
        __device__ int helper() { return N; }
        extern "C" __global__ void k(int* y) { y[0] = helper() + warpSize + sizeof(S); }"""
    second = """#ifdef N
        #error N of the other text
        #endif
        struct S { int a, b; };
        __device__ int helper() { return 100; }
        extern "C" __global__ void other(int* y) { y[0] = 0; }
        extern "C" __global__ void k(int* y) { y[0] = helper() + warpSize + sizeof(S); }"""
    module = Module([first, second, first.replace("N 2", "N 3")])
    y = np.zeros(1, np.int32)
    for code, expected in enumerate([13, 140, 14]):
        module.function("k", code)((1,), (1,), (y,))
        assert y[0] == expected
    assert module.names(1) == ["other", "k"]
    with pytest.raises(KernelError, match="no kernel 'other' in this text\nit has k"):
        module.function("other", 2)


# ---- building -------------------------------------------------------------------------------------------------------

GOOD = 'extern "C" __global__ void k(int* y) { y[0] = 1; }'


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("__device__ int f() { return nonsense; }", r"text_1\.cu:2:.*nonsense"),
        ("__device__ int f(int a) { if (a = 1) return 2; return 3; }", r"text_1\.cu:2:.*parentheses"),
        ("__device__ int f(int a) { int b; return a + b; }", r"text_1\.cu:2:.*uninitialized"),
        ("__device__ int f(int a) { if (a) return 1; }", r"text_1\.cu:2:.*return-type"),
        ("__device__ void f() { blockDim.x = 3; }", r"text_1\.cu:2:.*(const|read-only)"),
        ("__device__ int f();\n__device__ int g() { return f(); }", r"f"),
        ("__device__ void f() { __shared__ int a[3], b; a[0] = b = 0; }", "line 2: declare one __shared__ variable"),
    ],
)
def test_texts_that_do_not_compile(bad, told):
    with pytest.raises(KernelError, match=told):
        Module([GOOD, f"// {GOOD}\n{bad}\n" + GOOD.replace("1;", "g() * 0 + 1;" if "g()" in bad else "1;")])


def test_harmless_warnings_are_not_told():
    Module(
        GOOD.replace(
            "y[0] = 1;", "int unused; unsigned u = 3; \n#pragma unroll 4\n for (int i = 0; i < u; ++i) y[0] = i;"
        )
    )


def test_a_line_directive_names_the_file():
    module = Module('#line 7 "kernels/own.cuh"\n' + GOOD.replace("y[0]", "y[5]"))
    with pytest.raises(KernelError, match=r"\n    own.cuh, line 7") as told:
        module.function("k")((1,), (1,), (np.zeros(1, np.int32),))
    assert told.value.line == 7


def test_a_unit_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKPROP_GPU_CUDA_ON_CPU_CACHE", str(tmp_path / "new"))
    path = Module(GOOD).path
    assert [p.name for p in (tmp_path / "new").iterdir()] == [path.name]
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("built again"))
        assert Module(GOOD).path == path
    others = [Module(GOOD, check=True), Module(GOOD.replace("1", "2")), Module(GOOD, options=("-DX",))]
    assert len({path, *(module.path for module in others)}) == 4


def test_two_processes_build_one_unit(tmp_path):
    code = f"import cuda_on_cpu; print(cuda_on_cpu.Module({GOOD!r}).path)"
    environment = {
        **os.environ,
        "BACKPROP_GPU_CUDA_ON_CPU_CACHE": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    shutil.copy(cuda_on_cpu._runtime()[0], tmp_path)
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    paths = {process.communicate()[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(paths) == 1
    assert sorted(re.sub("-.*", "", p.name) for p in tmp_path.iterdir()) == ["runtime", "unit"]


def test_the_cache_belongs_to_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKPROP_GPU_CUDA_ON_CPU_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(KernelError, match="belongs to another user"):
        Module(GOOD)


def test_where_it_is_unavailable(monkeypatch):
    why = cuda_on_cpu.unavailable.__wrapped__
    assert why() is None
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        assert why() == "CUDA on the CPU needs g++"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        assert "needs x86-64 Linux" in why()
    monkeypatch.setattr(cuda_on_cpu, "unavailable", lambda: "no g++ here")
    with pytest.raises(KernelError, match="no g\\+\\+ here"):
        Module(GOOD)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no g"):
        skip_or_fail()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no g"):
        skip_or_fail()
