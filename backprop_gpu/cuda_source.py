"""The text of the CUDA kernels in `kernels/`: where it lies, headers put in their place, and what each kernel takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .activations import OUTPUT, Activation
from .costs import MAKERS, Cost
from .errors import BackendError

_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"\n', re.M)
_KERNEL = re.compile(r'extern "C" __global__ (?:__launch_bounds__\([^()]*\) )?void (\w+)\(([^)]*)\)')
_TYPES = {
    "unsigned char": np.uint8,
    "unsigned short": np.uint16,
    "int": np.int32,
    "unsigned": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "float": np.float32,
    "double": np.float64,
}


class Parameter(NamedTuple):
    """A parameter of a kernel: an array or a scalar of `dtype`."""

    name: str
    dtype: np.dtype[Any]
    is_array: bool


def read(name: str) -> str:
    """The text of kernels/<name>, from an installed package, an editable install or a plain checkout alike."""
    here = Path(__file__).resolve().parent
    for folder in (here / "kernels", here.parent / "kernels"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    raise BackendError(f"the kernel file {name} is missing from this installation", "install backprop_gpu again")


def text(name: str, **defines: str) -> str:
    """What the compiler gets: the defines, then kernels/<name> with each header once where it is first included.

    Nothing is left to include, for CuPy's kernel cache goes by this text alone and would run the old binary of an
    edited header.
    """
    seen: set[str] = set()

    def put(match: re.Match[str]) -> str:
        header = match[1]
        if header in seen:
            return ""
        seen.add(header)
        return _INCLUDE.sub(put, read(header).replace("#pragma once\n", ""))

    return "".join(f"#define {k} {v}\n" for k, v in defines.items()) + _INCLUDE.sub(put, read(name))


def signatures(source: str) -> dict[str, tuple[Parameter, ...]]:
    """The parameters of each kernel in a text from `text`."""
    types = dict(_TYPES)
    for name, macro in (("real", "REAL"), ("SOURCE", "SOURCE"), ("TARGET", "TARGET")):
        if chosen := re.search(rf"^#define {macro} ([\w ]+)$", source, re.M):
            types[name] = types[chosen[1]]
    return {name: tuple(_parameter(p, types) for p in listed.split(",")) for name, listed in _KERNEL.findall(source)}


def _parameter(declared: str, types: dict[str, Any]) -> Parameter:
    words = [word for word in declared.replace("*", " * ").split() if word not in ("const", "__restrict__")]
    return Parameter(words[-1], np.dtype(types[" ".join(words[:-1]).removesuffix(" *")]), "*" in words)


def is_compiled(f: Activation) -> bool:
    """Whether kernels know f, by the table in activations.cuh or by its CUDA expressions."""
    return f.cuda is not None or OUTPUT.get(f.name) == f


def activation(f: Activation, macro: str = "ACTIVATION") -> dict[str, str]:
    """What stands before the text of a kernel in which `macro` is f."""
    if f.cuda is None:
        return {macro: f"f_{f.name}"}
    value, derivative = f.cuda
    name = f"f_own_{macro.lower()}"
    own = (
        f"struct {name} {{ static constexpr bool from_Z = {str(f.derivative_from == 'Z').lower()}, rows = false; "
        f"static __device__ real value(real z) {{ return {value}; }} "
        f"static __device__ real derivative(real {f.derivative_from.lower()}) {{ return {derivative}; }} }};"
    )
    return {f"OWN_{macro}": own, macro: name}


def is_compiled_cost(cost: Cost) -> bool:
    """Whether kernels know the cost, by costs.cuh and output_delta.cu or by its CUDA expressions."""
    return cost.cuda is not None or _name(cost) in MAKERS


def cost(cost: Cost) -> dict[str, str]:
    """What stands before the text of a kernel in which COST is `cost`."""
    if cost.cuda is None:
        return {"COST": f"cost_{_name(cost)}"}
    value, derivative = cost.cuda
    own = (
        f"struct cost_own {{ static __device__ real value(real y, real t, real) {{ return {value}; }} "
        f"static __device__ real derivative(real y, real t, real) {{ return {derivative}; }} }};"
    )
    return {"OWN_COST": own, "COST": "cost_own"}


def _name(cost: Cost) -> str:
    return cost.name.partition(":")[0]
