"""NVRTC, the compiler that CuPy uses, through ctypes: it needs neither a GPU nor a driver."""

import ctypes
import importlib.util
from pathlib import Path

OPTIONS = ("--std=c++17", "-ftz=true", "--device-as-default-execution-space", "--ptxas-options=-v")  # as CuPy's, and -v


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
    """(whether it compiled, the compiler's log)."""
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
