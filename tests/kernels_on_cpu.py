"""The CUDA kernels as functions on the CPU: built when first asked for, or ahead, several texts at a time."""

import concurrent.futures
import functools
import os

import cuda_on_cpu
import pytest
from cuda_on_cpu import KernelError

__all__ = ["KernelError", "build_ahead", "function", "require", "unwritten"]

TEXTS = 12  # built together: fewer cost more each, more keep a test waiting


class Unit:
    """Several texts on their way to a library, begun beside the tests, or by the test that needs them first."""

    def __init__(self, texts, check, pool):
        self.build = functools.partial(cuda_on_cpu.Module, texts, check=check, lines=False)
        self.begun = pool.submit(self.build)

    @functools.cached_property
    def module(self):
        return self.build() if self.begun.cancel() else self.begun.result()


_ahead = {}  # (text, check): its unit, its number there


def require():
    """Skip the test where kernels cannot run on this CPU; in CI that is a failure."""
    if why := cuda_on_cpu.unavailable():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no CUDA on this CPU: {why}")


@functools.cache
def function(code, name, check):
    """The kernel `name` of a text, called as (grid, block, args, shared_mem=, seed=)."""
    if (code, check) in _ahead:
        unit, number = _ahead[code, check]
        return unit.module.function(name, number)
    return _module(code, check).function(name)


@functools.cache
def _module(code, check):
    return cuda_on_cpu.Module(code, check=check, lines=False)


def build_ahead(*parts):
    """Build texts beside the tests; a test waits for what it needs. `parts`: pairs (texts, check)."""
    if cuda_on_cpu.unavailable():
        return
    pool = concurrent.futures.ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) - 1))
    for every, check in parts:
        mine = [text for text in dict.fromkeys(every) if (text, check) not in _ahead]
        for texts in (mine[i : i + TEXTS] for i in range(0, len(mine), TEXTS)):
            unit = Unit(texts, check, pool)
            _ahead.update({(text, check): (unit, i) for i, text in enumerate(texts)})
    pool.shutdown(wait=False)


def unwritten(array):
    """An argument that the kernel must write before it reads it, where that is checked."""
    return cuda_on_cpu.Uninitialised(array)
