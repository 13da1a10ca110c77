"""The shim between NumPy and CuPy: which array module and operations to use on this machine, and why.

`choose("auto")` takes CuPy where a GPU has just been seen to run a kernel, else NumPy, and keeps the reason. Nothing
here imports cupy before it is asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .activations import Array
from .errors import BackendError, ConfigError, lookup

log = logging.getLogger("backprop_gpu")

WHEELS = ("cupy-cuda12x", "cupy-cuda13x")
_NAMES = {name: name for name in ("auto", "numpy", "cupy")}


@dataclass(frozen=True)
class Backend:
    """An array module, its operations, and how they came to be chosen.

    `name` is "numpy" or "cupy"; `xp` the array module; `ops` the module of operations; `device` in words; `index` the
    CUDA device's number (None on NumPy); `reason` one line that says why this backend, `cure` one that says what would
    make it a GPU, where something would.
    """

    name: str
    xp: ModuleType
    ops: ModuleType
    device: str
    reason: str
    index: int | None = None
    cure: str = ""

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which arrays of this backend are made and used."""
        if self.index is None:
            return contextlib.nullcontext()
        return self.xp.cuda.Device(self.index)

    def asarray(self, a: Array) -> Array:
        """`a`, from wherever it is, on this backend's device; no copy where it is there already."""
        if self.index is None:
            return a.get() if is_cupy(a) else a
        return self.xp.asarray(a)

    def zeros(self, n: int, dtype: Any) -> Array:
        """A vector of n zeros that starts at a 64-byte boundary."""
        if self.index is not None:
            return self.xp.zeros(n, dtype)  # CuPy's memory pool aligns to 512 bytes
        room = np.zeros(n * np.dtype(dtype).itemsize + 64, np.uint8)
        start = -room.ctypes.data % 64
        return room[start : start + n * np.dtype(dtype).itemsize].view(dtype)


def is_cupy(a: object) -> bool:
    """Whether `a` is a CuPy array, told without importing cupy."""
    return type(a).__module__.partition(".")[0] == "cupy"


def array_module(a: object) -> Any:
    """The array module that `a` belongs to: cupy, which is imported then, or numpy."""
    return importlib.import_module("cupy") if is_cupy(a) else np


def as_kind_of(X: object, a: Array) -> Array:
    """`a` as the kind of array that X is, NumPy or CuPy; no copy where it is that already."""
    if is_cupy(X):
        return array_module(X).asarray(a)
    return to_host(a)


def to_host(a: Array) -> np.ndarray:
    """`a` as a NumPy array."""
    return a.get() if is_cupy(a) else np.asarray(a)


def choose(name: str = "auto") -> Backend:
    """The backend `name`: "auto", "numpy" or "cupy".

    "auto" looks at BACKPROP_GPU_BACKEND, then takes CuPy where a GPU is usable and NumPy elsewhere; BACKPROP_GPU_DEVICE
    picks the GPU (0). Why it is NumPy is kept in `reason` and told once: in the log where CuPy is not installed, as a
    RuntimeWarning where it is installed but unusable.

    Raises ConfigError for an unknown name or device, BackendError for "cupy" without a usable GPU.
    """
    name = lookup("backend", name, _NAMES)
    if name == "auto":
        name = lookup("backend (BACKPROP_GPU_BACKEND)", os.environ.get("BACKPROP_GPU_BACKEND") or "auto", _NAMES)
    if name == "numpy":
        return _numpy("NumPy was asked for")
    index = _device_index()
    found = _probe(index)
    if isinstance(found, _Unusable):
        if name == "cupy":
            raise BackendError(found.cause, found.cure)
        _tell_once(found)
        return _numpy(found.cause, found.cure)
    cupy, device = found
    return Backend("cupy", cupy, importlib.import_module(".cuda_ops", __package__), device, "a GPU runs kernels", index)


def kernel_source(name: str) -> str:
    """The text of kernels/<name>, from an installed package, an editable install or a plain checkout alike."""
    here = Path(__file__).resolve().parent
    for folder in (here / "kernels", here.parent / "kernels"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    raise BackendError(f"the kernel file {name} is missing from this installation", "install backprop_gpu again")


def _numpy(reason: str, cure: str = "") -> Backend:
    return Backend("numpy", np, importlib.import_module(".numpy_ops", __package__), "CPU", reason, cure=cure)


def _device_index() -> int:
    text = os.environ.get("BACKPROP_GPU_DEVICE") or "0"
    if not text.isdecimal():
        raise ConfigError(f"BACKPROP_GPU_DEVICE is {text!r}", "set it to the number of a GPU: 0, 1, ...")
    return int(text)


@dataclass(frozen=True)
class _Unusable:
    cause: str
    cure: str
    installed: bool = True


@functools.cache
def _tell_once(found: _Unusable) -> None:
    if found.installed:
        warnings.warn(f"training on NumPy: {found.cause}. {found.cure}", RuntimeWarning, stacklevel=3)
    else:
        log.info("training on NumPy: %s", found.cause)


@functools.cache
def _probe(index: int) -> tuple[ModuleType, str] | _Unusable:
    """CuPy and the device's name, or why there is no usable GPU. Never raises."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            cupy = importlib.import_module("cupy")
            count = cupy.cuda.runtime.getDeviceCount  # a half-removed CuPy is an empty namespace package
        except Exception as e:
            return _no_import(e)
    note = (
        "; several CuPy packages are installed" if any("multiple CuPy packages" in str(w.message) for w in told) else ""
    )
    cure = _one_wheel() if note else ""
    version = str(getattr(cupy, "__version__", "0"))
    if version.partition(".")[0].isdecimal() and int(version.partition(".")[0]) < 14:
        return _Unusable(f"CuPy {version} is too old{note}", cure or f"pip install -U {_wheel()}")
    try:
        n = count()
    except Exception as e:
        return _no_device(e, cupy, note, cure)
    if index >= n:
        return _Unusable(
            f"there is no CUDA device {index}: {n} found{note}",
            cure or "set BACKPROP_GPU_DEVICE to one that exists, or look at CUDA_VISIBLE_DEVICES",
        )
    try:
        with cupy.cuda.Device(index):
            x = cupy.zeros(1, dtype=cupy.int32)
            cupy.RawKernel(kernel_source("probe.cu"), "probe")((1,), (1,), (x,))
            result = int(x[0])
            name = cupy.cuda.runtime.getDeviceProperties(index)["name"]
    except Exception as e:
        return _Unusable(f"the GPU does not run kernels: {_line(e)}{note}", cure or _cure_of_kernel(e))
    if result != 7:
        return _Unusable(
            f"the GPU computes wrong results{note}", cure or "check the GPU and its driver with nvidia-smi"
        )
    return cupy, name.decode() if isinstance(name, bytes) else str(name)


def _no_import(e: Exception) -> _Unusable:
    installed = [wheel for wheel in WHEELS if _is_installed(wheel)]
    absent = isinstance(e, ModuleNotFoundError) and e.name == "cupy"
    if installed and (absent or isinstance(e, AttributeError)):
        return _Unusable(
            f"CuPy's files are missing although {installed[0]} is installed",
            _one_wheel() if len(installed) > 1 else f"pip install --force-reinstall --no-deps {installed[0]}",
        )
    if absent or isinstance(e, AttributeError):
        there = "" if driver_cuda() else "this machine has no NVIDIA driver; on one that has: "
        return _Unusable("CuPy is not installed", f"{there}pip install {_wheel()}", installed=False)
    if "numpy" in str(e).lower():
        return _Unusable(f"CuPy does not import: {_line(e)}", "pip install -U numpy")
    return _Unusable(f"CuPy does not import: {_line(e)}", f"pip install --force-reinstall {_wheel()}")


def _no_device(e: Exception, cupy: ModuleType, note: str, cure: str) -> _Unusable:
    status = getattr(e, "status", None)
    if status == 35:  # cudaErrorInsufficientDriver: also what no driver at all gives
        try:
            driver = cupy.cuda.runtime.driverGetVersion()
        except Exception:
            driver = 0
        if driver:
            cause = f"the NVIDIA driver is too old: it runs CUDA up to {driver // 1000}.{driver % 1000 // 10}"
            return _Unusable(cause + note, cure or f"update the driver, or pip install {_wheel(driver)}")
        return _Unusable(f"there is no NVIDIA driver{note}", cure or "install the driver, or go on with NumPy")
    if status == 100:  # cudaErrorNoDevice
        return _Unusable(f"there is no CUDA device{note}", cure or "look at CUDA_VISIBLE_DEVICES and nvidia-smi")
    return _Unusable(
        f"CUDA does not start: {_line(e)}{note}", cure or "check the driver with nvidia-smi, or restart the machine"
    )


def _cure_of_kernel(e: Exception) -> str:
    if type(e).__name__ == "DynamicLibNotFoundError" or "nvrtc" in str(e).lower():
        return f"pip install {_wheel()}: it brings the compiler and headers that CuPy needs"
    return "check with nvidia-smi that the GPU is free and works"


def _one_wheel() -> str:
    return f"pip uninstall -y {' '.join(WHEELS)}, then pip install {_wheel()}"


def _wheel(driver: int | None = None) -> str:
    """What to give pip for the driver on this machine."""
    return f"'cupy-cuda{'13x' if (driver or driver_cuda()) >= 13000 else '12x'}[ctk]'"


def driver_cuda() -> int:
    """The newest CUDA that the installed driver runs, as 1000 major + 10 minor; 0 without a driver."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def _is_installed(distribution: str) -> bool:
    import importlib.metadata  # costs more than the rest of this package together

    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _line(e: Exception) -> str:
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[-1].strip()}" if lines else type(e).__name__
