"""NVRTC, the compiler that CuPy uses, through ctypes: it needs neither a GPU nor a driver."""

import ctypes
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

OPTIONS = ("--std=c++17", "-ftz=true", "--device-as-default-execution-space", "--ptxas-options=-v")  # as CuPy's, and -v


class Usage(NamedTuple):
    """What one kernel takes: registers and bytes of stack and spills a thread, bytes of shared memory a block."""

    registers: int
    stack: int
    spills: int
    shared: int


def load():
    """The NVRTC of the nvidia-cuda-nvrtc-cu12 wheel, or None where that is not installed."""
    spec = importlib.util.find_spec("nvidia.cuda_nvrtc") if importlib.util.find_spec("nvidia") else None
    found = sorted(Path(place).glob("lib/libnvrtc.so.1?") for place in spec.submodule_search_locations) if spec else []
    paths = [path for group in found for path in group]
    return ctypes.CDLL(str(paths[0])) if paths else None


def architectures(nvrtc):
    """What the library compiles for: 70, 80, ...."""
    n = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(n))
    archs = (ctypes.c_int * n.value)()
    nvrtc.nvrtcGetSupportedArchs(archs)
    return list(archs)


def compile_for(nvrtc, source, name, arch):
    """(whether it compiled, the compiler's log). Several threads may compile at a time."""
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    options = [o.encode() for o in (*OPTIONS, f"--gpu-architecture=sm_{arch}")]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return status == 0, log.value.decode()


def usage(log):
    """{kernel: Usage}, from the log of a program that compiled; functions that a kernel calls count as its own."""
    kernels = {}
    for report in re.split(r"Compiling entry function ", log)[1:]:
        name = re.match(r"'(\w+)'", report)[1]
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        shared = re.search(r"(\d+) bytes smem", report)
        kernels[name] = Usage(
            registers=int(re.search(r"Used (\d+) registers", report)[1]),
            stack=sum(int(stack) for stack, _, _ in frames),
            spills=sum(int(stores) + int(loads) for _, stores, loads in frames),
            shared=int(shared[1]) if shared else 0,
        )
    return kernels
