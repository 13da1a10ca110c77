"""The shim: which backend, why, and what is said when CuPy cannot be used; stubs behave as real CuPy was seen to."""

import importlib.metadata
import logging
import sys
import types
import warnings

import fake_cupy
import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu import backend as backends


@pytest.fixture(autouse=True)
def _auto_is_auto(monkeypatch):
    monkeypatch.delenv("BACKPROP_GPU_BACKEND")


class CUDARuntimeError(RuntimeError):
    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class DynamicLibNotFoundError(RuntimeError):
    pass


class CompileException(Exception):  # noqa: N818 - CuPy's name
    pass


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


def stub(**changes):
    """The stand-in for CuPy with some of its parts replaced, by dotted name."""
    cupy = fake_cupy.module()
    for name, value in changes.items():
        *path, last = name.split("__")
        owner = cupy
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    return cupy


INSUFFICIENT = CUDARuntimeError(
    35, "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
)
NO_NVRTC = DynamicLibNotFoundError("Failure finding libnvrtc.so\nsearched: ...")


def kernel_that_gives_8(code, name):
    def launch(grid, block, args):
        args[0][0] = 8

    return launch


ROWS = [
    (
        "no driver",
        {"cuda__runtime__getDeviceCount": raising(INSUFFICIENT), "cuda__runtime__driverGetVersion": lambda: 0},
        "there is no NVIDIA driver",
        "install the driver",
    ),
    (
        "driver too old",
        {"cuda__runtime__getDeviceCount": raising(INSUFFICIENT), "cuda__runtime__driverGetVersion": lambda: 11040},
        "the NVIDIA driver is too old: it runs CUDA up to 11.4",
        "update the driver",
    ),
    (
        "driver, no device",
        {
            "cuda__runtime__getDeviceCount": raising(
                CUDARuntimeError(100, "cudaErrorNoDevice: no CUDA-capable device is detected")
            )
        },
        "there is no CUDA device",
        "CUDA_VISIBLE_DEVICES",
    ),
    (
        "sick driver",
        {"cuda__runtime__getDeviceCount": raising(CUDARuntimeError(999, "cudaErrorUnknown: unknown error"))},
        "CUDA does not start: CUDARuntimeError: cudaErrorUnknown",
        "nvidia-smi",
    ),
    (
        "no NVRTC",
        {"RawKernel": raising(NO_NVRTC)},
        "the GPU does not run kernels: DynamicLibNotFoundError",
        "[ctk]",
    ),
    (
        "kernel does not compile",
        {"RawKernel": raising(CompileException("no kernel image is available"))},
        "the GPU does not run kernels: CompileException: no kernel image",
        "nvidia-smi",
    ),
    ("wrong result", {"RawKernel": kernel_that_gives_8}, "the GPU computes wrong results", "nvidia-smi"),
    (
        "zero devices",
        {"cuda__runtime__getDeviceCount": lambda: 0},
        "there is no CUDA device 0: 0 found",
        "CUDA_VISIBLE",
    ),
    ("too old", {"__version__": "13.6.0"}, "CuPy 13.6.0 is too old", "pip install -U"),
]


@pytest.mark.parametrize(("changes", "cause", "cure"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_unusable_cupy(changes, cause, cure):
    cupy = stub(**{k: v for k, v in changes.items() if k != "__version__"})
    cupy.__version__ = changes.get("__version__", cupy.__version__)
    with fake_cupy.installed(cupy):
        with pytest.raises(bp.BackendError) as e:
            backends.choose("cupy")
        assert e.value.cause.startswith(cause)
        assert cure in e.value.cure
        assert len(str(e.value).splitlines()) == 2
        with pytest.warns(RuntimeWarning, match="training on NumPy") as told:
            chosen = backends.choose("auto")
        assert len(told) == 1
        assert chosen.name == "numpy"
        assert chosen.reason == e.value.cause
        assert chosen.cure == e.value.cure
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # told once
            assert backends.choose("auto").name == "numpy"


@pytest.fixture
def no_cupy(monkeypatch):
    """A machine where `import cupy` gives what the test sets, and the named distributions are installed."""

    def set_up(error, *distributions):
        class Finder:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name == "cupy":
                    raise error

        monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
        real = importlib.metadata.distribution

        def distribution(name):
            if name.startswith("cupy"):
                if name in distributions:
                    return types.SimpleNamespace(version="14.2.0")
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(importlib.metadata, "distribution", distribution)

    with fake_cupy.installed():
        sys.modules.pop("cupy")
        yield set_up


ABSENT = ModuleNotFoundError("No module named 'cupy'", name="cupy")
OLD_NUMPY = ImportError("numpy.core.multiarray failed to import: CuPy 14 needs NumPy 2")


def test_cupy_absent_is_one_line_in_the_log(no_cupy, caplog):
    no_cupy(ABSENT)
    with caplog.at_level(logging.INFO, "backprop_gpu"):
        for _ in range(3):
            chosen = backends.choose("auto")
    assert [r.getMessage() for r in caplog.records] == ["training on NumPy: CuPy is not installed"]
    assert chosen.reason == "CuPy is not installed"
    with pytest.raises(bp.BackendError) as e:
        backends.choose("cupy")
    assert "pip install 'cupy-cuda1" in e.value.cure


@pytest.mark.parametrize(
    ("error", "distributions", "cause", "cure"),
    [
        (ABSENT, ["cupy-cuda12x"], "CuPy's files are missing although cupy-cuda12x is installed", "--force-reinstall"),
        (
            ABSENT,
            ["cupy-cuda12x", "cupy-cuda13x"],
            "CuPy's files are missing",
            "pip uninstall -y cupy-cuda12x cupy-cuda13x",
        ),
        (OLD_NUMPY, ["cupy-cuda12x"], "CuPy does not import: ImportError: numpy", "pip install -U numpy"),
        (
            ImportError("libcublas.so.12: cannot open"),
            ["cupy-cuda12x"],
            "CuPy does not import: ImportError",
            "reinstall",
        ),
        (
            ModuleNotFoundError("No module named 'fastrlock'", name="fastrlock"),
            ["cupy-cuda12x"],
            "CuPy does not",
            "reinstall",
        ),
    ],
)
def test_cupy_that_does_not_import(no_cupy, error, distributions, cause, cure):
    no_cupy(error, *distributions)
    with pytest.raises(bp.BackendError) as e:
        backends.choose("cupy")
    assert e.value.cause.startswith(cause)
    assert cure in e.value.cure


def test_a_half_removed_cupy_is_an_empty_namespace(no_cupy):
    no_cupy(ABSENT, "cupy-cuda13x")
    sys.modules["cupy"] = types.ModuleType("cupy")
    with pytest.raises(bp.BackendError, match="files are missing although cupy-cuda13x"):
        backends.choose("cupy")


def test_two_wheels_are_named_with_whatever_else_is_wrong(monkeypatch):
    cupy = stub(cuda__runtime__getDeviceCount=raising(CUDARuntimeError(100, "cudaErrorNoDevice: none")))
    real = backends.importlib.import_module

    def import_and_warn(name, *args):
        if name == "cupy":
            warnings.warn("CuPy may not function correctly because multiple CuPy packages are installed", stacklevel=2)
        return real(name, *args)

    monkeypatch.setattr(backends.importlib, "import_module", import_and_warn)
    with fake_cupy.installed(cupy), pytest.raises(bp.BackendError) as e:
        backends.choose("cupy")
    assert e.value.cause == "there is no CUDA device; several CuPy packages are installed"
    assert "pip uninstall -y cupy-cuda12x cupy-cuda13x" in e.value.cure


def test_a_usable_gpu_is_chosen(monkeypatch):
    with fake_cupy.installed() as cupy:
        chosen = backends.choose("auto")
        assert (chosen.name, chosen.device, chosen.index) == ("cupy", "Fake GPU", 0)
        assert chosen.xp is cupy
        assert chosen.reason == "a GPU runs kernels"
        assert backends.choose("numpy").name == "numpy"
        monkeypatch.setenv("BACKPROP_GPU_BACKEND", "numpy")
        assert backends.choose("auto").name == "numpy"
        assert backends.choose("cupy").name == "cupy"
        monkeypatch.setenv("BACKPROP_GPU_BACKEND", "cupy")
        assert backends.choose("auto").name == "cupy"
        monkeypatch.setenv("BACKPROP_GPU_DEVICE", "3")
        with pytest.raises(bp.BackendError, match="there is no CUDA device 3: 1 found"):
            backends.choose("auto")


@pytest.mark.parametrize(("variable", "value"), [("BACKPROP_GPU_BACKEND", "gpu"), ("BACKPROP_GPU_DEVICE", "first")])
def test_variables_that_make_no_sense(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with fake_cupy.installed(), pytest.raises(bp.ConfigError, match=variable):
        backends.choose("auto")


def test_the_wheel_that_fits_the_driver(monkeypatch):
    monkeypatch.setattr(backends, "driver_cuda", lambda: 13010)
    assert backends._wheel() == "'cupy-cuda13x[ctk]'"
    monkeypatch.setattr(backends, "driver_cuda", lambda: 12080)
    assert backends._wheel() == "'cupy-cuda12x[ctk]'"


def test_cupy_absent_is_told_by_what_the_machine_has(no_cupy, monkeypatch):
    no_cupy(ABSENT)
    for driver, cure in (
        (0, "this machine has no NVIDIA driver; on one that has: pip"),
        (13000, "pip install 'cupy-cuda13x"),
    ):
        monkeypatch.setattr(backends, "driver_cuda", lambda driver=driver: driver)
        backends._probe.cache_clear()
        assert backends.choose("auto").cure.startswith(cure)


def test_zeros_start_at_64_bytes():
    backend = backends.choose("numpy")
    for n in (1, 7, 1000):
        for dtype in (np.float32, np.float64):
            z = backend.zeros(n, np.dtype(dtype))
            assert z.ctypes.data % 64 == 0
            assert z.shape == (n,)
            assert not z.any()


def test_missing_kernel_file():
    with pytest.raises(bp.BackendError, match=r"the kernel file nothing\.cu is missing"):
        backends.kernel_source("nothing.cu")
