"""The shim: which backend, why, and what is said when CuPy cannot be used; stubs behave as real CuPy was seen to."""

import importlib.metadata
import logging
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import fake_cupy
import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu import backend as backends
from backprop_gpu import cuda_source


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch, tmp_path):
    has(monkeypatch)
    monkeypatch.delenv("BACKPROP_GPU_BACKEND")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "0")
    for name, value in (("cache_trouble", ""), ("_cuda_started", False), ("_forked", False)):
        monkeypatch.setattr(backends, name, value)


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


def properties(capability=(9, 0), name=b"NVIDIA Fake"):
    major, minor = capability
    facts = {"name": name, "major": major, "minor": minor, "multiProcessorCount": 132, "totalGlobalMem": 80 * 2**30}
    return lambda index: facts


def compute_mode(mode):
    return {"cuda__runtime__cudaDevAttrComputeMode": 20, "cuda__runtime__deviceGetAttribute": lambda what, index: mode}


def device_that(error):
    class Device:
        def __init__(self, index=0):
            pass

        __enter__ = raising(error)

        def __exit__(self, *args):
            pass

    return Device


def array_that(error):
    """`asarray` whose arrays cannot be added to: the first of CuPy's own kernels."""
    return lambda a: type("Array", (), {"__add__": raising(error)})()


INSUFFICIENT = CUDARuntimeError(
    35, "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
)
BUSY = CUDARuntimeError(46, "cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or unavailable")
NO_NVRTC = DynamicLibNotFoundError("Failure finding libnvrtc.so\nsearched: ...")
NO_CUBLAS = ImportError('Failure finding "libcublasLt.so.13 or libcublasLt.so.12": No such file: libcublasLt.so.13')
NO_HEADERS = CompileException(
    'cuda_fp16.h(129): catastrophic error: cannot open source file "vector_types.h"\n\n'
    '1 catastrophic error detected in the compilation of "x.cu".\nCompilation terminated.\n'
)


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
        "the NVIDIA driver is too old: it runs CUDA up to 11.4, CuPy wants 13.0",
        "update the driver",
    ),
    (
        "CuPy for a newer CUDA",
        {"cuda__runtime__getDeviceCount": raising(INSUFFICIENT), "cuda__runtime__driverGetVersion": lambda: 12080},
        "CuPy is built for CUDA 13.0, the driver runs CUDA up to 12.8",
        "pip uninstall -y cupy-cuda12x cupy-cuda13x, then pip install 'cupy-cuda12x[ctk]'; or update the driver",
    ),
    ("ROCm", {"cuda__runtime__is_hip": True}, "this CuPy 14.0.0 is built for AMD's ROCm", "pip uninstall -y"),
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
    ("no cuBLAS", {"matmul": raising(NO_CUBLAS)}, "the GPU does not run kernels: ImportError: Failure", "[ctk]"),
    (
        "no cuBLAS on Windows",
        {"matmul": raising(ImportError('Failure finding "cublas64_12.dll"'))},
        "the GPU does not run kernels: ImportError: Failure",
        "[ctk]",
    ),
    (
        "no headers",
        {"asarray": array_that(NO_HEADERS)},
        "the GPU does not run kernels: CompileException: cuda_fp16.h(129): catastrophic error: cannot open source file",
        "[ctk]",
    ),
    (
        "cuBLAS gives nonsense",
        {"matmul": lambda a, b: fake_cupy.module().asarray(np.zeros((2, 2), np.float32))},
        "the GPU computes wrong results",
        "nvidia-smi",
    ),
    (
        "GPU too old",
        {"cuda__runtime__getDeviceProperties": properties((6, 1))},
        "NVIDIA Fake has compute capability 6.1; the kernels need 7.0",
        "take a newer GPU",
    ),
    ("prohibited", compute_mode(2), "the compute mode of GPU 0 is prohibited", "nvidia-smi -c DEFAULT"),
    (
        "exclusive and taken",
        {"cuda__Device": device_that(BUSY), **compute_mode(3)},
        "another process holds GPU 0, whose compute mode is exclusive process",
        "wait for that process",
    ),
    (
        "busy",
        {"cuda__Device": device_that(BUSY), **compute_mode(0)},
        "the GPU does not run kernels: CUDARuntimeError: cudaErrorDevicesUnavailable",
        "the process that holds the GPU",
    ),
    (
        "damaged kernel in the cache",
        {"RawKernel": raising(RuntimeError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid"))},
        "the GPU does not run kernels: RuntimeError: CUDA_ERROR_INVALID_IMAGE",
        "CUPY_CACHE_IN_MEMORY=1",
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


def has(monkeypatch, *distributions):
    """These distributions are installed, and one that is not CuPy's."""

    def one(name):
        return types.SimpleNamespace(version="14.2.0", read_text=lambda file: f"Metadata-Version: 2.4\nName: {name}\n")

    monkeypatch.setattr(importlib.metadata, "distributions", lambda: [one(name) for name in (*distributions, "numpy")])


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
        has(monkeypatch, *distributions)

    with fake_cupy.installed():
        sys.modules.pop("cupy")
        yield set_up


ABSENT = ModuleNotFoundError("No module named 'cupy'", name="cupy")
NO_FOLDER = NotADirectoryError(20, "Not a directory", "/root/.cupy/kernel_cache")
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
        (NO_FOLDER, ["cupy-cuda12x"], "CuPy does not import: NotADirectoryError", "CUPY_CACHE_IN_MEMORY=1"),
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
    has(monkeypatch, "cupy_cuda12x", "cupy-cuda13x", "cupy-xarray")
    cupy = stub(cuda__runtime__getDeviceCount=raising(CUDARuntimeError(100, "cudaErrorNoDevice: none")))
    with fake_cupy.installed(cupy), pytest.raises(bp.BackendError) as e:
        backends.choose("cupy")
    assert e.value.cause == "there is no CUDA device; several CuPy packages are installed"
    assert e.value.cure.startswith("pip uninstall -y cupy-cuda12x cupy-cuda13x, then pip install 'cupy-cuda1")


def test_packages_beside_cupy_do_not_clash_with_it(monkeypatch):
    has(monkeypatch, "cupy-cuda12x", "cupy-xarray")
    assert backends.cupy_packages() == {"cupy-cuda12x": "14.2.0", "cupy-xarray": "14.2.0"}
    assert backends.cupy_builds() == ["cupy-cuda12x"]
    has(monkeypatch, "cupy", "cupy-rocm-7-0")
    assert backends.cupy_builds() == ["cupy", "cupy-rocm-7-0"]


def test_the_warning_of_cupy_at_its_import_does_not_escape(monkeypatch):
    real = backends.importlib.import_module

    def import_and_warn(name, *args):
        if name == "cupy":
            warnings.warn("CuPy may not function correctly because multiple CuPy packages are installed", stacklevel=2)
        return real(name, *args)

    monkeypatch.setattr(backends.importlib, "import_module", import_and_warn)
    with fake_cupy.installed():
        assert backends.choose("cupy").name == "cupy"


def test_the_line_of_an_error_that_says_most():
    framed = "=======\nFailed to import CuPy.\n\nOriginal error:\n  ImportError: libcudart.so: no such file\n======="
    assert backends._line(ImportError(framed)) == "ImportError: ImportError: libcudart.so: no such file"
    assert backends._line(CompileException('x.cu(1): error: "y" is undefined\n\n1 error detected.\n')) == (
        'CompileException: x.cu(1): error: "y" is undefined'
    )
    assert backends._line(RuntimeError("first\nlast\n=====\n")) == "RuntimeError: last"
    assert backends._line(RuntimeError()) == "RuntimeError"


def test_a_device_file_that_may_not_be_opened(monkeypatch):
    unknown = CUDARuntimeError(304, "cudaErrorOperatingSystem: OS call failed")
    monkeypatch.setattr(backends.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    monkeypatch.setattr(backends.os, "access", lambda path, mode: not path.startswith("/dev/nvidia"))
    with fake_cupy.installed(stub(cuda__runtime__getDeviceCount=raising(unknown))):
        with pytest.raises(bp.BackendError, match=r"this user may not use /dev/nvidia0: .*OS call") as e:
            backends.choose("cupy")
        assert e.value.cure == "give this user the right to read and write /dev/nvidia0"


def test_a_slice_of_a_card(monkeypatch):
    monkeypatch.setenv("BACKPROP_GPU_DEVICE", "1")
    named = properties(name=b"NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    with fake_cupy.installed(stub(cuda__runtime__getDeviceProperties=named)):
        with pytest.raises(bp.BackendError, match="there is no CUDA device 1: 1 found") as e:
            backends.choose("cupy")
        assert "one MIG slice" in e.value.cure
        assert backends.examine(0).card["mig"] == "1g.10gb"


def test_facts_that_cupy_does_not_tell_are_none():
    nothing = stub(cuda__runtime__getDeviceProperties=raising(RuntimeError("no")), **compute_mode(77))
    with fake_cupy.installed(nothing):
        assert backends.choose("cupy").device == "CUDA device 0"
        card = backends.examine(0).card
    assert {key for key, value in card.items() if value is None} == set(card) - {"index", "name"}


# ------------------------------------------------------------------------------------------ fork, and the kernel cache

FORK = """
import os, sys, warnings
import fake_cupy
import backprop_gpu as bp
from backprop_gpu import backend

warnings.simplefilter("ignore")  # newer Pythons warn of a fork where BLAS has threads

def told(f):
    try:
        f()
    except bp.BackendError as e:
        return f"{e.cause}. {e.cure}"
    return "went on"

with fake_cupy.installed():
    chosen = backend.choose(sys.argv[1])
    if not (pid := os.fork()):
        if not (pid := os.fork()):  # a grandchild remembers
            for f in (lambda: backend.choose("auto"), lambda: backend.choose("cupy"), chosen.active,
                      lambda: chosen.asarray([1.0]), lambda: backend.choose("numpy").active()):
                print(told(f), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
        os._exit(0)
    os.waitpid(pid, 0)
    print(told(lambda: backend.choose("cupy").active()), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("before", ["cupy", "numpy"])
def test_fork(before):
    """After CUDA has started a forked child may use NumPy alone; otherwise a fork changes nothing."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", FORK, before],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refusal = "CUDA does not survive a fork. start processes with multiprocessing.get_context('spawn')"
    expected = [refusal] * 4 if before == "cupy" else ["went on"] * 4
    assert done.stdout.splitlines() == [*expected, "went on", "went on"]


def in_memory():
    return os.environ["CUPY_CACHE_IN_MEMORY"] == "1"


def test_a_kernel_cache_that_can_be_written_is_left_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "not" / "yet"))
    with caplog.at_level(logging.INFO, "backprop_gpu"), fake_cupy.installed():
        assert backends.choose("cupy").name == "cupy"
    assert not in_memory()
    assert not caplog.records
    assert not list(tmp_path.iterdir())  # looked at, not made


def import_in(monkeypatch, cupy):
    """`cupy` is what an import gives, not yet imported; the environment as that import sees it."""
    seen = {}
    real = backends.importlib.import_module

    def import_module(name, *args):
        if name == "cupy":
            seen.update({k: v for k, v in os.environ.items() if k.startswith("CUPY_CACHE")})
            sys.modules["cupy"] = cupy
        return real(name, *args)

    sys.modules.pop("cupy")
    monkeypatch.setattr(backends.importlib, "import_module", import_module)
    return seen


@pytest.mark.parametrize("folder", ["file", "file/kernels", "link", "locked", "locked/kernels", ""])
def test_a_kernel_cache_that_cannot_be_written(folder, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "locked").mkdir()
    real = os.access
    locked = str(tmp_path / "locked")  # as root sees no locked folders
    monkeypatch.setattr(backends.os, "access", lambda path, mode: path != locked and real(path, mode))
    cache = str(tmp_path / folder) if folder else ""
    monkeypatch.setenv("CUPY_CACHE_DIR", cache)
    with caplog.at_level(logging.INFO, "backprop_gpu"), fake_cupy.installed() as cupy:
        seen = import_in(monkeypatch, cupy)
        assert backends.choose("auto").name == "cupy"
        assert backends.choose("cupy").name == "cupy"
    assert seen["CUPY_CACHE_IN_MEMORY"] == "1"
    assert os.path.isdir(seen["CUPY_CACHE_DIR"])  # importing CuPy fails otherwise
    assert (seen["CUPY_CACHE_DIR"] == cache) == (folder == "locked")
    assert [r.getMessage() for r in caplog.records] == [
        f"CuPy keeps its compiled kernels in memory: the folder {cache or repr('')} cannot be written"
    ]


def test_who_keeps_kernels_in_memory_needs_no_folder_to_be_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(backends.os, "access", lambda path, mode: False)
    assert backends.unwritable_cache() == f"the folder {tmp_path} cannot be written"
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    assert backends.unwritable_cache() == ""
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "missing"))
    assert backends.unwritable_cache()


FULL = OSError(28, "No space left on device")


def test_a_full_disk_while_a_kernel_is_kept(caplog):
    """CuPy reads CUPY_CACHE_IN_MEMORY whenever it compiles."""

    class RawKernel(fake_cupy.RawKernel):
        def __call__(self, *args, **kwargs):
            if not in_memory():
                raise FULL
            super().__call__(*args, **kwargs)

    with caplog.at_level(logging.INFO, "backprop_gpu"), fake_cupy.installed(stub(RawKernel=RawKernel)):
        assert backends.choose("cupy").name == "cupy"
    assert [r.getMessage() for r in caplog.records] == [
        "CuPy keeps its compiled kernels in memory: OSError: [Errno 28] No space left on device"
    ]


def test_a_disk_that_stays_full():
    with fake_cupy.installed(stub(RawKernel=raising(FULL))), pytest.raises(bp.BackendError, match="No space left") as e:
        backends.choose("cupy")
    assert "CUPY_CACHE_IN_MEMORY=1" in e.value.cure


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
    assert backends.wheel() == "'cupy-cuda13x[ctk]'"
    monkeypatch.setattr(backends, "driver_cuda", lambda: 12080)
    assert backends.wheel() == "'cupy-cuda12x[ctk]'"


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
        cuda_source.read("nothing.cu")
