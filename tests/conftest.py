"""Fixtures: the backends that one suite runs on, and MNIST."""

import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes: each takes one thread, and so do those that it starts
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # numba's threads wait without turning

import fake_cupy
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import backprop_gpu as bp
from backprop_gpu import backend as backends

settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("suite")


def pytest_collection_finish(session):
    """Thousands of tests live as long as the process: each collection of garbage would look through them again."""
    gc.collect()
    gc.freeze()


RAN = set()  # the tests that began in this process


@pytest.fixture(autouse=True)
def _counted(request):
    RAN.add(request.node.nodeid)


def all_ran(request, names):
    """Whether every test of the file of `request`, whose names are given, has run in this process, itself included."""
    here = [item for item in request.session.items if item.path == request.path]
    return names == {item.function.__name__ for item in here} and {item.nodeid for item in here} <= RAN


REQUIRED = os.environ.get("BACKPROP_GPU_REQUIRE") == "1"


def pytest_make_parametrize_id(config, val, argname):
    """No bytes in a test's name: archives hold the time of day, and a name shall stay what it is."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def _numpy_unless_a_test_says_otherwise(monkeypatch):
    """Also in the processes that tests start; so the suite means the same on a machine with a GPU, or with numba."""
    monkeypatch.setenv("BACKPROP_GPU_BACKEND", "numpy")
    monkeypatch.setenv("BACKPROP_GPU_FAST", "0")
    monkeypatch.delenv("BACKPROP_GPU_DEVICE", raising=False)
    monkeypatch.delenv("BACKPROP_GPU_EXECUTOR", raising=False)
    monkeypatch.delenv("BACKPROP_GPU_DATA_LIMIT", raising=False)


def real_gpu():
    """The CuPy backend; where there is no GPU the test is skipped, or fails if one is required."""
    try:
        return backends.choose("cupy")
    except bp.BackendError as e:
        if REQUIRED:
            pytest.fail(f"BACKPROP_GPU_REQUIRE=1, but {e.cause}")
        pytest.skip(f"no GPU: {e.cause}")


@pytest.fixture(params=["numpy", "fake cupy", pytest.param("cupy", marks=pytest.mark.gpu)])
def backend(request):
    """Each backend in turn: NumPy, CuPy's Python on a stand-in, CuPy on a real GPU."""
    if request.param == "numpy":
        yield backends.choose("numpy")
    elif request.param == "fake cupy":
        with fake_cupy.installed():
            yield backends.choose("cupy")
    else:
        yield real_gpu()


@pytest.fixture(scope="session")
def mnist():
    return bp.datasets.load("mnist")


@pytest.fixture
def rng():
    return np.random.default_rng(20240904)
