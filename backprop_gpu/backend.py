"""The shim between NumPy and CuPy: which array module and operations to use on this machine, and why.

`choose("auto")` takes CuPy where a GPU has just been seen to run a kernel, else NumPy, and keeps the reason. `examine`
tries the GPU and names the fault it meets. Nothing here imports cupy before it is asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np

from . import blas, cuda_source, gpu_faults
from .activations import Array
from .errors import BackendError, ConfigError, lookup

log = logging.getLogger("backprop_gpu")
log.addHandler(logging.NullHandler())

WHEELS = ("cupy-cuda12x", "cupy-cuda13x")
CAPABILITY = (7, 0)  # the least compute capability that the kernels are written for
COMPUTE_MODES = {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}
# The kinds of fault, in the order in which a trial meets them, and what each is.
FAULTS = {
    "fork": "a process forked after CUDA had started",
    "cupy": "CuPy is not installed",
    "packages": "CuPy is installed twice, damaged, too old, or built for something else than this driver",
    "driver": "no driver, one too old, or no device",
    "gpu": "a GPU too old, closed to this process, or sick",
    "libraries": "NVRTC, the CUDA headers or cuBLAS are missing",
    "cache": "CuPy's folder of compiled kernels cannot be used",
}
CACHE_CURE = "set CUPY_CACHE_IN_MEMORY=1, or CUPY_CACHE_DIR to a folder that can be written"
DEFAULT_MODE = "let an administrator run nvidia-smi -c DEFAULT"
LIBRARIES_CURE = "pip install {}: it brings CUDA's compiler, headers and libraries"
_NAMES = {name: name for name in ("auto", "numpy", "cupy")}
_NOT_STARTED, _INSUFFICIENT_DRIVER, _DEVICES_UNAVAILABLE, _NO_DEVICE = 3, 35, 46, 100  # of cudaError_t
_DAMAGED = "INVALID_IMAGE"  # stands in what the driver says of a compiled kernel that is none


@dataclass(frozen=True)
class Backend:
    """An array module, its operations, and how they came to be chosen.

    `name` is "numpy" or "cupy"; `xp` the array module; `ops` the module of operations; `device` in words; `index` the
    CUDA device's number (None on NumPy); `reason` one line that says why this backend, `cure` one that says what would
    make it a GPU, where something would. `fast`: on NumPy, whether numba compiles the operations (see `fast_ops`).
    """

    name: str
    xp: ModuleType
    ops: ModuleType
    device: str
    reason: str
    index: int | None = None
    cure: str = ""
    fast: bool = False

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which arrays of this backend are made and used; errors of CUDA leave it as BackendErrors."""
        if self.index is None:
            return blas.threads.kept(1 if self.fast else None)
        _refuse_where_cuda_is_gone()
        return self._on_device()

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        device = self.xp.cuda.Device(self.index)
        device.__enter__()
        try:
            with gpu_faults.told(self.xp):
                yield
        finally:
            if not gpu_faults.lost():
                device.__exit__()

    def asarray(self, a: Array) -> Array:
        """`a`, from wherever it is, on this backend's device; no copy where it is there already."""
        if self.index is None:
            return a.get() if is_cupy(a) else a
        _refuse_where_cuda_is_gone()
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


def guarded(*arrays: object) -> contextlib.AbstractContextManager[None]:
    """In which such arrays are looked at: with CuPy's among them errors of CUDA leave it as BackendErrors."""
    for a in arrays:
        if is_cupy(a):
            _refuse_where_cuda_is_gone()
            return gpu_faults.told(array_module(a))
    return contextlib.nullcontext()


def as_kind_of(X: object, a: Array) -> Array:
    """`a` as the kind of array that X is, NumPy or CuPy; no copy where it is that already."""
    if is_cupy(X):
        return array_module(X).asarray(a)
    return to_host(a)


def to_host(a: Array) -> np.ndarray:
    """`a` as a NumPy array."""
    if is_cupy(a):
        _refuse_where_cuda_is_gone()
        return a.get()
    return np.asarray(a)


def choose(name: str = "auto") -> Backend:
    """The backend `name`: "auto", "numpy" or "cupy".

    "auto" looks at BACKPROP_GPU_BACKEND, then takes CuPy where a GPU is usable and NumPy elsewhere; BACKPROP_GPU_DEVICE
    picks the GPU (0). Why it is NumPy is kept in `reason` and told once: in the log where CuPy is not installed, as a
    RuntimeWarning where it is installed but unusable.

    Raises ConfigError for an unknown name or device; BackendError for "cupy" without a usable GPU, and for "auto" too
    in a process that was forked after CUDA had started.
    """
    name = lookup("backend", name, _NAMES)
    if name == "auto":
        name = lookup("backend (BACKPROP_GPU_BACKEND)", os.environ.get("BACKPROP_GPU_BACKEND") or "auto", _NAMES)
    if name == "numpy":
        return _numpy("NumPy was asked for")
    index = device_index()
    found = examine(index)
    if found.fault is None:
        ops = importlib.import_module(".cuda_ops", __package__)
        return Backend("cupy", found.cupy, ops, found.card["name"], "a GPU runs kernels", index)
    if name == "cupy" or found.fault.kind == "fork":
        raise BackendError(found.fault.cause, found.fault.cure)
    _tell_once(found.fault)
    return _numpy(found.fault.cause, found.fault.cure)


def _numpy(reason: str, cure: str = "") -> Backend:
    trouble = no_fast(os.environ.get("BACKPROP_GPU_FAST") or "auto")
    ops = importlib.import_module(".numpy_ops" if trouble else ".fast_ops", __package__)
    return Backend("numpy", np, ops, "CPU", reason, cure=cure, fast=not trouble)


@functools.cache
def no_fast(wanted: str) -> str:
    """Why NumPy's operations run without numba, else nothing; `wanted`: "auto", "1" or "0".

    Raises ConfigError for another wish, and where "1" cannot be.
    """
    if wanted not in ("auto", "0", "1"):
        raise ConfigError(f"BACKPROP_GPU_FAST is {wanted!r}", "set it to 1, 0 or auto")
    if wanted == "0":
        return "BACKPROP_GPU_FAST is 0"
    try:
        importlib.import_module(".fast_ops", __package__)
    except Exception as e:  # numba tells in several ways that it does not go with this NumPy, Python or machine
        trouble, cure = f"numba: {_line(e)}", "pip install -U numba numpy, or unset it"
        if getattr(e, "name", None) == "numba":
            trouble, cure = "numba is not installed", "pip install numba, or unset it"
        elif "no locator" in str(e):
            trouble, cure = "numba may write its cache nowhere", "set NUMBA_CACHE_DIR to a folder that can be written"
        if wanted == "1":
            raise ConfigError(f"BACKPROP_GPU_FAST is 1, but {trouble}", cure) from None
        return trouble
    return ""


def device_index() -> int:
    """The GPU that BACKPROP_GPU_DEVICE names, else 0. Raises ConfigError."""
    text = os.environ.get("BACKPROP_GPU_DEVICE") or "0"
    if not text.isdecimal():
        raise ConfigError(f"BACKPROP_GPU_DEVICE is {text!r}", "set it to the number of a GPU: 0, 1, ...")
    return int(text)


# ------------------------------------------------------------------------------------------ the trial of a GPU


@dataclass(frozen=True)
class Fault:
    """What keeps a GPU from being used: its kind, a key of FAULTS, and one line each of cause and cure."""

    kind: str
    cause: str
    cure: str


@dataclass(frozen=True)
class Machine:
    """What the trial of a GPU found: CuPy, if it imports; facts about the card, if there is one; the first fault."""

    cupy: Any = None
    card: dict[str, Any] = field(default_factory=dict)
    fault: Fault | None = None


AFTER_FORK = Fault("fork", "CUDA does not survive a fork", "start processes with multiprocessing.get_context('spawn')")
_cuda_started = False
_forked = False


def _mark_child() -> None:
    global _forked
    _forked = _forked or _cuda_started


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_child)


def _refuse_where_cuda_is_gone() -> None:
    if _forked:
        raise BackendError(AFTER_FORK.cause, AFTER_FORK.cure)
    gpu_faults.refuse_if_lost()


@functools.cache
def _tell_once(fault: Fault) -> None:
    if fault.kind == "cupy":
        log.info("training on NumPy: %s", fault.cause)
    else:
        warnings.warn(f"training on NumPy: {fault.cause}. {fault.cure}", RuntimeWarning, stacklevel=3)


def examine(index: int) -> Machine:
    """What a trial of CUDA device `index` finds. Never raises; each device is tried once a process."""
    return Machine(fault=AFTER_FORK) if _forked else _probe(index)


@functools.cache
def _probe(index: int) -> Machine:
    global _cuda_started
    if trouble := unwritable_cache():
        _keep_kernels_in_memory(trouble)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of several CuPy packages: `_or_several_packages` tells
            cupy = importlib.import_module("cupy")
        _ = cupy.cuda.runtime.getDeviceCount  # a half-removed CuPy is an empty namespace package
    except Exception as e:
        return Machine(fault=_or_several_packages(_no_import(e)))
    card: dict[str, Any] = {}
    fault = _wrong_build(cupy) or _no_device(cupy, index)
    if fault is None:
        card = _card(cupy, index)
        fault = _refusal(card) or _failure(cupy, card)
    if cache_trouble:
        log.info("CuPy keeps its compiled kernels in memory: %s", cache_trouble)
    _cuda_started = _cuda_started or fault is None
    return Machine(cupy, card, fault and _or_several_packages(fault))


def _or_several_packages(fault: Fault) -> Fault:
    """The fault; where several packages bring CuPy, whatever is wrong starts there, and so does the cure."""
    if len(cupy_builds()) < 2:
        return fault
    return replace(fault, cause=f"{fault.cause}; several CuPy packages are installed", cure=one_build())


def _no_import(e: Exception) -> Fault:
    builds = cupy_builds()
    absent = isinstance(e, AttributeError) or (isinstance(e, ModuleNotFoundError) and e.name == "cupy")
    if absent and builds:
        cure = f"pip install --force-reinstall --no-deps {builds[0]}"
        return Fault("packages", f"CuPy's files are missing although {builds[0]} is installed", cure)
    if absent:
        there = "" if driver_cuda() else "this machine has no NVIDIA driver; on one that has: "
        return Fault("cupy", "CuPy is not installed", f"{there}pip install {wheel()}")
    cause = f"CuPy does not import: {_line(e)}"
    if _is_of_the_disk(e):
        return Fault("cache", cause, CACHE_CURE)
    if "numpy" in str(e).lower():
        return Fault("packages", cause, "pip install -U numpy")
    kind = "libraries" if _names_a_library(e) else "packages"
    return Fault(kind, cause, f"pip install --force-reinstall {wheel()}")


def _wrong_build(cupy: ModuleType) -> Fault | None:
    version = str(getattr(cupy, "__version__", "0"))
    if getattr(cupy.cuda.runtime, "is_hip", False):
        return Fault("packages", f"this CuPy {version} is built for AMD's ROCm", one_build())
    if version.partition(".")[0].isdecimal() and int(version.partition(".")[0]) < 14:
        return Fault("packages", f"CuPy {version} is too old", f"pip install -U {wheel()}")
    return None


def _no_device(cupy: ModuleType, index: int) -> Fault | None:
    try:
        n = cupy.cuda.runtime.getDeviceCount()
    except Exception as e:
        status = getattr(e, "status", None)
        if status == _INSUFFICIENT_DRIVER:  # also what no driver at all gives
            return _old_driver(cupy)
        if locked := [p for p in glob.glob("/dev/nvidia*") if not os.access(p, os.R_OK | os.W_OK)]:
            cure = f"give this user the right to read and write {locked[0]}"
            return Fault("driver", f"this user may not use {locked[0]}: {_line(e)}", cure)
        if status == _NO_DEVICE:
            cure = "look at CUDA_VISIBLE_DEVICES and nvidia-smi -L; a card in MIG mode needs a slice"
            return Fault("driver", "there is no CUDA device", cure)
        cure = "check the driver with nvidia-smi, or restart the machine"
        if status == _NOT_STARTED:  # what a fork leaves of CUDA that somebody else had started
            cure = f"if this process was forked from one that uses CUDA, {AFTER_FORK.cure}; else {cure}"
        return Fault("driver", f"CUDA does not start: {_line(e)}", cure)
    if index < n:
        return None
    cure = "set BACKPROP_GPU_DEVICE to one that exists, or look at CUDA_VISIBLE_DEVICES"
    if n and _card(cupy, 0)["mig"]:
        cure = "a process sees one MIG slice: name it in CUDA_VISIBLE_DEVICES (nvidia-smi -L) and take device 0"
    return Fault("driver", f"there is no CUDA device {index}: {n} found", cure)


def _old_driver(cupy: ModuleType) -> Fault:
    driver = _known(lambda: cupy.cuda.runtime.driverGetVersion()) or 0
    built = _known(lambda: cupy.cuda.runtime.runtimeGetVersion()) or 0
    if not driver:
        return Fault("driver", "there is no NVIDIA driver", "install the driver, or go on with NumPy")
    if 12000 <= driver < built // 1000 * 1000:  # there is a CuPy for this driver, only not this one
        cause = f"CuPy is built for CUDA {cuda_version(built)}, the driver runs CUDA up to {cuda_version(driver)}"
        return Fault("packages", cause, f"{one_build(driver)}; or update the driver")
    cause = f"the NVIDIA driver is too old: it runs CUDA up to {cuda_version(driver)}, CuPy wants {cuda_version(built)}"
    return Fault("driver", cause, "update the driver, or go on with NumPy")


def _card(cupy: ModuleType, index: int) -> dict[str, Any]:
    """Facts about device `index`, each None where CuPy does not tell; asking starts nothing on the device."""
    runtime = cupy.cuda.runtime
    of = _known(lambda: runtime.getDeviceProperties(index)) or {}
    name = of.get("name", f"CUDA device {index}")
    name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    slice_ = re.search(r"\bMIG (\S+)", name)
    mode = _known(lambda: runtime.deviceGetAttribute(runtime.cudaDevAttrComputeMode, index))
    return {
        "index": index,
        "name": name,
        "compute_capability": f"{of['major']}.{of['minor']}" if "major" in of and "minor" in of else None,
        "multiprocessors": of.get("multiProcessorCount"),
        "memory_total": of.get("totalGlobalMem"),
        "compute_mode": COMPUTE_MODES.get(mode) if mode is not None else None,
        "mig": slice_[1] if slice_ else None,
    }


def _known(ask: Callable[[], Any]) -> Any:
    """What `ask()` gives, None where it raises."""
    try:
        return ask()
    except Exception:
        return None


def _refusal(card: dict[str, Any]) -> Fault | None:
    capability = card["compute_capability"]
    if capability and tuple(map(int, capability.split("."))) < CAPABILITY:
        least = ".".join(map(str, CAPABILITY))
        cause = f"{card['name']} has compute capability {capability}; the kernels need {least}"
        return Fault("gpu", cause, "take a newer GPU (BACKPROP_GPU_DEVICE), or go on with NumPy")
    if card["compute_mode"] == "prohibited":
        return Fault("gpu", f"the compute mode of GPU {card['index']} is prohibited", DEFAULT_MODE)
    return None


def _failure(cupy: ModuleType, card: dict[str, Any], in_memory: bool = False) -> Fault | None:
    """What goes wrong when the device computes."""
    try:
        if _computes(cupy, card["index"]):
            return None
    except Exception as e:
        # A kernel cache that is full, another user's, or damaged.
        if (_is_of_the_disk(e) or _DAMAGED in str(e)) and not in_memory:
            _keep_kernels_in_memory(_line(e))
            return _failure(cupy, card, in_memory=True)
        return _why(e, card)
    return Fault("gpu", "the GPU computes wrong results", "check the GPU and its driver with nvidia-smi")


def _why(e: Exception, card: dict[str, Any]) -> Fault:
    cause = f"the GPU does not run kernels: {_line(e)}"
    if getattr(e, "status", None) == _DEVICES_UNAVAILABLE:
        if card["compute_mode"] != "exclusive process":
            return Fault("gpu", cause, "look with nvidia-smi for the process that holds the GPU")
        cause = f"another process holds GPU {card['index']}, whose compute mode is exclusive process"
        return Fault("gpu", cause, f"wait for that process (nvidia-smi shows it), or {DEFAULT_MODE}")
    if _is_of_the_disk(e):
        return Fault("cache", cause, CACHE_CURE)
    if _DAMAGED in str(e):
        return Fault("cache", cause, f"empty {_cache_folder()}, where a compiled kernel is damaged, or {CACHE_CURE}")
    if _names_a_library(e):
        return Fault("libraries", cause, LIBRARIES_CURE.format(wheel()))
    return Fault("gpu", cause, "check with nvidia-smi that the GPU is free and works")


def _computes(cupy: ModuleType, index: int) -> bool:
    """Whether a kernel of ours (NVRTC), one of CuPy's (CUDA's headers) and a product (cuBLAS) give what they should."""
    with cupy.cuda.Device(index):
        x = cupy.zeros(1, dtype=cupy.int32)
        cupy.RawKernel(cuda_source.read("probe.cu"), "probe")((1,), (1,), (x,))
        M = cupy.asarray(np.array([[0, 1], [2, 3]], np.float32))
        product = cupy.matmul(M, M + 1)
        return int(x[0]) == 7 and product.get().tolist() == [[3, 4], [11, 16]]


def _names_a_library(e: Exception) -> bool:
    missing = r"nvrtc|lib\w+\.so|\w+\.dll|DLL load failed|cannot open source file"
    return re.search(missing, str(e), re.IGNORECASE) is not None


def _is_of_the_disk(e: Exception) -> bool:
    return isinstance(e, OSError) and e.errno is not None  # without a number: a library that does not load


# ------------------------------------------------------------------------------------------ CuPy's kernel cache

cache_trouble = ""  # why this process keeps its kernels in memory, where it does


def _cache_folder() -> str:
    return os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))  # as CuPy finds it


def unwritable_cache() -> str:
    """Why CuPy cannot write its compiled kernels, else nothing; looks only, and makes no folder."""
    folder = there = _cache_folder()
    if os.environ.get("CUPY_CACHE_IN_MEMORY") == "1" and os.path.isdir(folder):
        return ""
    while there and not os.path.lexists(there):
        there = os.path.dirname(there)
    usable = folder and os.path.isdir(there or os.curdir) and os.access(there or os.curdir, os.W_OK | os.X_OK)
    return "" if usable else f"the folder {folder or repr(folder)} cannot be written"


def in_memory_instead(e: Exception) -> bool:
    """Whether kernels are kept in memory from now on, because CuPy's folder of them fails with `e`."""
    if os.environ.get("CUPY_CACHE_IN_MEMORY") == "1" or not (_is_of_the_disk(e) or _DAMAGED in str(e)):
        return False
    _keep_kernels_in_memory(_line(e))
    log.info("CuPy keeps its compiled kernels in memory: %s", cache_trouble)
    return True


def _keep_kernels_in_memory(trouble: str) -> None:
    global cache_trouble
    cache_trouble = trouble
    os.environ["CUPY_CACHE_IN_MEMORY"] = "1"  # read by each compilation
    if "cupy" not in sys.modules and not os.path.isdir(_cache_folder()):
        # CuPy makes the folder while it is imported, wanted or not, and fails if it cannot: name one that exists.
        os.environ["CUPY_CACHE_DIR"] = os.path.abspath(os.sep)


# ------------------------------------------------------------------------------------------ packages and driver


def cupy_packages() -> dict[str, str]:
    """The installed distributions whose name begins with cupy, and their versions."""
    import importlib.metadata  # costs more than the rest of this package together

    found = {}
    for one in importlib.metadata.distributions():
        text = one.read_text("METADATA") or one.read_text("PKG-INFO") or ""  # parsing each would take long
        if name := re.search(r"^Name: *(cupy\S*)", text, re.IGNORECASE | re.MULTILINE):
            found[name[1].lower().replace("_", "-")] = one.version
    return dict(sorted(found.items()))


def cupy_builds() -> list[str]:
    """Those of them that bring a module `cupy`; where they are several, they overwrite each other."""
    return [name for name in cupy_packages() if re.fullmatch(r"cupy(-cuda\w+|-rocm[-\w]*)?", name)]


def one_build(driver: int | None = None) -> str:
    """The cure for builds of CuPy that do not fit: all of them out, the one that fits the driver in."""
    return f"pip uninstall -y {' '.join(cupy_builds() or WHEELS)}, then pip install {wheel(driver)}"


def wheel(driver: int | None = None) -> str:
    """What to give pip for the driver on this machine."""
    return f"'cupy-cuda{'13x' if (driver or driver_cuda()) >= 13000 else '12x'}[ctk]'"


def cuda_version(number: int) -> str:
    """CUDA's number for a version, in words: 12090 is 12.9."""
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_cuda() -> int:
    """The newest CUDA that the installed driver runs, as 1000 major + 10 minor; 0 without a driver."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def _line(e: Exception) -> str:
    """The one line of an error that says most: compilers tell it first, CuPy frames it in ====, others tell it last."""
    lines = [line.strip() for line in str(e).splitlines() if re.search(r"\w", line)]
    told = [line for line in lines if re.search(r"error: \S", line, re.IGNORECASE)] or lines[-1:]
    return ": ".join([type(e).__name__, *told[:1]])
