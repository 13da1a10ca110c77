"""`doctor`: what it tells of a machine, and that it names every fault that can keep a GPU from being used."""

import importlib.metadata
import json
import types

import fake_cupy
import numpy as np
import pytest
from test_backend import (
    ABSENT,
    INSUFFICIENT,
    NO_NVRTC,
    ROWS,
    _as_in_a_new_process,  # noqa: F401 - a fixture, for this module too
    compute_mode,
    has,
    no_cupy,  # noqa: F401 - a fixture
    properties,
    raising,
    stub,
)

from backprop_gpu import backend, report

KINDS = ["fork", "cupy", "packages", "driver", "gpu", "libraries", "cache"]
OF_ROW = {
    "no driver": "driver",
    "driver too old": "driver",
    "CuPy for a newer CUDA": "packages",
    "ROCm": "packages",
    "driver, no device": "driver",
    "sick driver": "driver",
    "no NVRTC": "libraries",
    "no cuBLAS": "libraries",
    "no cuBLAS on Windows": "libraries",
    "no headers": "libraries",
    "kernel does not compile": "gpu",
    "wrong result": "gpu",
    "cuBLAS gives nonsense": "gpu",
    "GPU too old": "gpu",
    "prohibited": "gpu",
    "exclusive and taken": "gpu",
    "busy": "gpu",
    "damaged kernel in the cache": "cache",
    "zero devices": "driver",
    "too old": "packages",
}
NVRTC = {"cuda__nvrtc": types.SimpleNamespace(getVersion=lambda: (12, 9))}
H100 = {
    "cuda__runtime__getDeviceProperties": properties(name=b"NVIDIA H100 80GB HBM3 MIG 1g.10gb"),
    "cuda__runtime__memGetInfo": lambda: (60 * 2**30, 80 * 2**30),
    **compute_mode(0),
    **NVRTC,
}


def doctor(cupy=None, where="numpy"):
    """What is told, as JSON and as text, with `cupy` for CuPy."""
    with fake_cupy.installed(cupy):
        found = report.doctor(backend.choose(where))
    assert [f["fault"] for f in found["faults"]] == KINDS
    for f in found["faults"]:
        assert f["found"] == (f["cure"] is not None)
        assert f["found"] <= (f["says"] is not None)
    text = report.doctor_text(found)
    assert text.count("\nfault ") == sum(f["found"] for f in found["faults"])
    assert text.count("\nno fault ") == 1
    return json.loads(json.dumps(found, allow_nan=False)), text


def faults(found):
    return {f["fault"]: f for f in found["faults"] if f["found"]}


@pytest.fixture(autouse=True)
def _a_driver(monkeypatch):
    monkeypatch.setattr(backend, "driver_cuda", lambda: 13010)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_each_fault_is_named_with_its_cure(row):
    name, changes, cause, cure = row
    cupy = stub(**{**NVRTC, **{k: v for k, v in changes.items() if k != "__version__"}})
    cupy.__version__ = changes.get("__version__", cupy.__version__)
    found, text = doctor(cupy)
    (fault,) = faults(found).values()
    assert fault["fault"] == OF_ROW[name]
    assert fault["says"].startswith(cause)
    assert cure in fault["cure"]
    assert f"fault        {fault['fault']}: {fault['says']}; cure: {fault['cure']}\n" in text


def test_no_cupy(no_cupy, monkeypatch):  # noqa: F811 - a fixture
    no_cupy(ABSENT)
    found = report.doctor(backend.choose("auto"))
    assert set(faults(found)) == {"cupy"}
    assert faults(found)["cupy"]["cure"] == "pip install 'cupy-cuda13x[ctk]'"
    assert "no fault     fork, cache; not looked for: packages, driver, gpu, libraries\n" in report.doctor_text(found)
    assert found["gpu"] is None
    assert found["rung"] == {"name": "numpy", "reason": "CuPy is not installed"}
    assert {found["versions"][name] for name in ("nvrtc", "cuda_runtime", "cupy-cuda12x", "cupy-cuda13x")} == {None}
    assert found["versions"]["cuda_driver"] == "13.1"
    monkeypatch.setattr(backend, "driver_cuda", lambda: 0)
    assert set(faults(report.doctor(backend.choose("auto")))) == {"cupy", "driver"}


def test_a_gpu_that_works():
    found, text = doctor(stub(**H100), "cupy")
    assert not faults(found)
    assert {f["says"] for f in found["faults"]} == {None}
    assert found["gpu"] == {
        "index": 0,
        "name": "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "compute_capability": "9.0",
        "multiprocessors": 132,
        "memory_total": 80 * 2**30,
        "memory_free": 60 * 2**30,
        "compute_mode": "default",
        "mig": "1g.10gb",
    }
    assert (found["versions"]["nvrtc"], found["versions"]["cuda_runtime"]) == ("12.9", "13.0")
    assert found["rung"]["name"] == "graph"
    assert "\nno fault     fork, cupy, packages, driver, gpu, libraries, cache\n" in text
    assert (
        "\nGPU          0: NVIDIA H100 80GB HBM3 MIG 1g.10gb, compute capability 9.0, 132 multiprocessors, "
        "80.0 GiB of memory, 60.0 GiB of it free, compute mode default, MIG slice 1g.10gb\n" in text
    )


def test_a_gpu_that_runs_kernels_has_its_libraries_whatever_nvrtc_says():
    found, _text = doctor(stub(cuda__nvrtc=None), "cupy")
    assert found["versions"]["nvrtc"] is None
    assert not faults(found)


def test_the_gpu_is_tried_also_where_numpy_was_asked_for():
    found, text = doctor(stub(**H100), "numpy")
    assert (found["backend"], found["reason"]) == ("numpy", "NumPy was asked for")
    assert found["gpu"]["multiprocessors"] == 132
    assert "rung         numpy: NumPy was asked for" in text


def test_packages_are_listed_and_two_that_clash_are_a_fault_even_where_they_work(monkeypatch):
    has(monkeypatch, "cupy_cuda12x", "cupy-cuda13x", "cupy-xarray")
    found, _text = doctor(stub(**H100), "cupy")
    assert {k: v for k, v in found["versions"].items() if k.startswith("cupy")} == dict.fromkeys(
        ["cupy-cuda12x", "cupy-cuda13x", "cupy-xarray"], "14.2.0"
    )
    fault = faults(found).pop("packages")
    assert fault["says"] == "several CuPy packages are installed: cupy-cuda12x, cupy-cuda13x"
    assert fault["cure"] == "pip uninstall -y cupy-cuda12x cupy-cuda13x, then pip install 'cupy-cuda13x[ctk]'"
    assert found["backend"] == "cupy"


def test_nvrtc_is_looked_for_without_a_driver():
    no_driver = {"cuda__runtime__getDeviceCount": raising(INSUFFICIENT), "cuda__runtime__driverGetVersion": lambda: 0}
    found, text = doctor(stub(**no_driver, cuda__nvrtc=types.SimpleNamespace(getVersion=raising(NO_NVRTC))))
    assert set(faults(found)) == {"driver", "libraries"}
    assert faults(found)["libraries"]["says"] == "NVRTC is not found"
    assert "[ctk]" in faults(found)["libraries"]["cure"]
    assert found["versions"]["nvrtc"] is None
    assert "; not looked for: gpu\n" in text
    found, text = doctor(stub(**no_driver, **NVRTC))
    assert set(faults(found)) == {"driver"}
    assert "; not looked for: gpu, libraries\n" in text  # cuBLAS is tried on a GPU


def test_after_a_fork_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(backend, "_forked", True)
    monkeypatch.setattr(backend, "_probe", raising(AssertionError("CUDA was touched")))
    found = report.doctor(backend.choose("numpy"))
    assert set(faults(found)) == {"fork"}
    assert "spawn" in faults(found)["fork"]["cure"]
    assert found["gpu"] is None


def test_a_kernel_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    for _ in range(2):  # also after the first trial has turned the cache off
        found, _text = doctor(stub(**H100), "cupy")
        assert set(faults(found)) == {"cache"}
        assert "kernels cannot be written" in faults(found)["cache"]["says"]
        assert "CUPY_CACHE_IN_MEMORY=1" in faults(found)["cache"]["cure"]
    assert found["backend"] == "cupy"


def test_why_kernels_are_kept_in_memory_is_remembered(monkeypatch):
    monkeypatch.setattr(backend, "cache_trouble", "OSError: No space left on device")
    found, _text = doctor(stub(**H100), "cupy")
    assert faults(found)["cache"]["says"] == "CuPy cannot keep compiled kernels: OSError: No space left on device"


def a_cupy_that_fails_at_everything():
    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceCount=lambda: 1))
    cupy.__getattr__ = raising(AttributeError("no"))
    return cupy


def test_doctor_never_raises(monkeypatch):
    monkeypatch.setenv("BACKPROP_GPU_DEVICE", "first")
    cupy = a_cupy_that_fails_at_everything()
    cupy.__version__ = "14.0.0"
    found, _ = doctor(cupy)
    assert set(faults(found)) == {"gpu", "libraries"}
    cupy.cuda.runtime.getDeviceCount = raising(RuntimeError())
    found, _ = doctor(cupy)
    assert faults(found)["driver"]["says"] == "CUDA does not start: RuntimeError"
    found, _ = doctor(stub(**{**H100, "cuda__runtime__memGetInfo": raising(RuntimeError("lost"))}))
    assert found["gpu"]["memory_free"] is None
    assert found["gpu"]["index"] == 0


def test_versions_of_what_is_not_installed_are_none(monkeypatch):
    def version(name):
        if name == "rich":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = report.versions()
    assert (found["rich"], found["click"]) == (None, "1")
    assert np.isin(["nvrtc", "cuda_runtime", "cuda_driver"], list(found)).all()


def test_numba_s_version_and_whether_it_is_used(monkeypatch):
    found, text = doctor()  # the suite runs without it
    assert found["numba"] == {"used": False, "reason": "BACKPROP_GPU_FAST is 0"}
    assert "\noperations   without numba: BACKPROP_GPU_FAST is 0\n" in text
    assert f"\nnumba        {found['versions']['numba'] or 'not installed'}\n" in text
    monkeypatch.setenv("BACKPROP_GPU_FAST", "auto")
    monkeypatch.setattr(backend, "no_fast", lambda wanted: "numba is not installed")
    found, text = doctor()
    assert found["numba"] == {"used": False, "reason": "numba is not installed"}
    assert "\noperations   without numba: numba is not installed\n" in text
    found, _ = doctor(stub(**H100), "cupy")
    assert found["numba"] == {"used": False, "reason": "they run on a GPU"}


def test_numba_that_compiles(monkeypatch):
    numba = pytest.importorskip("numba")
    if trouble := backend.no_fast("auto"):
        pytest.skip(trouble)
    monkeypatch.setenv("BACKPROP_GPU_FAST", "auto")
    found, text = doctor()
    assert found["numba"] == {"used": True, "reason": None}
    assert found["versions"]["numba"] == numba.__version__
    assert "\noperations   compiled by numba\n" in text
