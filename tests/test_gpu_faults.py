"""What a GPU can do to a run in the middle of it: memory that is not there, and a context that is lost."""

import copy
import itertools
import subprocess
import sys
import warnings

import fake_cupy
import numpy as np
import pytest
from conftest import real_gpu

import backprop_gpu as bp
from backprop_gpu import checkpoint, gpu_faults
from backprop_gpu.backend import to_host


@pytest.fixture(autouse=True)
def _not_lost(monkeypatch):
    monkeypatch.setattr(gpu_faults, "_lost", "")


RNG = np.random.default_rng(0)
X, T = RNG.integers(0, 256, (60, 20)).astype(np.uint8), RNG.integers(0, 5, 60)


def network():
    return bp.Network([20, 16, 5], seed=1, backend="cupy")


class Thetas:
    """The parameters after each step, and before the first."""

    def __init__(self, net):
        self.net, self.all = net, [to_host(net.theta).copy()]

    def on_step(self, run):
        self.all.append(to_host(self.net.theta).copy())


@pytest.mark.parametrize("rung", ["graph", "eager"])
def test_no_memory_for_a_step(monkeypatch, rung):
    """Wherever it runs out, the parameters are those of a whole step, and with more memory the run is what it was."""
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", rung)
    with fake_cupy.installed() as cp:
        whole = network()
        seen = Thetas(whole)
        bp.train(whole, X, T, epochs=2, batch_size=25, callbacks=[seen], validation=(X, T))
        steps = {theta.tobytes() for theta in seen.all}
        refused, limit = [], 0
        while True:
            pool = cp.get_default_memory_pool()
            net = network()
            pool.free_all_blocks()
            pool.set_limit(size=pool.used_bytes() + limit)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of graphs that there is no memory for
                    bp.train(net, X, T, epochs=2, batch_size=25, validation=(X, T))
            except bp.BackendError as e:
                refused.append(e)
            else:
                break
            finally:
                pool.set_limit(size=0)
            assert to_host(net.theta).tobytes() in steps
            limit += 2048
        assert len(refused) > 9
        np.testing.assert_array_equal(to_host(net.theta), to_host(whole.theta))
        found = refused[5]
        assert "out of GPU memory with batches of 25 samples: Out of memory allocating" in found.cause
        assert "limit set to:" in found.cause
        assert "bytes of the GPU are free" in found.cause
        assert "take a smaller batch_size, 12 say" in found.cure


def test_no_memory_for_an_evaluation_or_a_network():
    with fake_cupy.installed() as cp:
        net = network()
        pool = cp.get_default_memory_pool()
        pool.set_limit(size=pool.used_bytes() + 512)
        for call in (lambda: bp.evaluate(net, X, T), lambda: net.predict(X), network, lambda: net.gradients(X, T)):
            with pytest.raises(bp.BackendError, match="out of GPU memory: "):
                call()


def test_after_out_of_memory_the_half_of_a_batch_fits():
    with fake_cupy.installed() as cp:
        net = network()
        pool = cp.get_default_memory_pool()
        pool.set_limit(size=pool.used_bytes() + 17_000)
        batch_size, tried = 60, []
        while True:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    bp.train(net, X, T, epochs=1, batch_size=batch_size)
                break
            except bp.BackendError:
                tried.append(batch_size)
            batch_size //= 2
        assert tried
        assert batch_size


LOSSES = [700, 719, 214]


@pytest.mark.parametrize("status", LOSSES)
@pytest.mark.parametrize("rung", ["graph", "eager"])
@pytest.mark.parametrize("late", ["copies", "kernels"])
def test_a_context_that_is_lost(monkeypatch, tmp_path, rung, status, late):
    """The error names what happened, no call of CUDA follows, and the last checkpoint is whole and named."""
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", rung)
    path = tmp_path / "m"

    def fail(run):
        if run.epoch == 1:
            fake_cupy.Mode.late = late
            fake_cupy.fail_launch(2, status)

    with fake_cupy.installed():
        net = network()
        with pytest.raises(bp.BackendError, match="the context of the GPU is lost: ") as e:
            bp.train(
                net, X, T, epochs=3, batch_size=25, callbacks=[fail], save=path, checkpoint_every="1 epoch",
                validation=(X, T),
            )  # fmt: skip
        after = fake_cupy.Counts.after_loss
        assert "start the process again" in e.value.cure
        assert e.value.__notes__ == [f"{path} holds the run after step 3"]
        assert len(str(e.value).splitlines()) == 2
        del e
        for call in (lambda: net.predict(X), lambda: bp.train(net, X, T), network, lambda: bp.save(net, path)):
            with pytest.raises(bp.BackendError, match="the context of the GPU is lost"):
                call()
        assert fake_cupy.Counts.after_loss == after
        monkeypatch.setattr(gpu_faults, "_lost", "")
    assert checkpoint.read(path, "numpy").run.step == 3


class CUDARuntimeError(RuntimeError):
    __module__ = "cupy_backends.cuda.api.runtime"

    def __init__(self, status=None):
        super().__init__("oh\nno")
        if status is not None:
            self.status = status


class CUDADriverError(CUDARuntimeError):
    __module__ = "cupy_backends.cuda.api.driver"


class CUBLASError(CUDARuntimeError):
    __module__ = "cupy_backends.cuda.libs.cublas"


class NVRTCError(CUDARuntimeError):
    __module__ = "cupy_backends.cuda.libs.nvrtc"


class Device:
    """CuPy, as far as it is asked what is wrong."""

    def __init__(self, error=None):
        self.error, self.asked, self.cuda = error, 0, self

    def Device(self):
        return self

    def synchronize(self):
        self.asked += 1
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    "name",
    "ECC_UNCORRECTABLE=214 NVLINK_UNCORRECTABLE=220 CONTAINED=226 ILLEGAL_ADDRESS=700 LAUNCH_TIMEOUT=702 ASSERT=710 "
    "HARDWARE_STACK_ERROR=714 ILLEGAL_INSTRUCTION=715 MISALIGNED_ADDRESS=716 INVALID_ADDRESS_SPACE=717 INVALID_PC=718 "
    "LAUNCH_FAILED=719 TENSOR_MEMORY_LEAK=721 MPS_CLIENT_TERMINATED=810 EXTERNAL_DEVICE=911".split(),
)
def test_errors_after_which_no_call_works(name):
    """By the documentation of cudaError_t, and of CUresult; the device, which is lost, is not asked."""
    cp = Device()
    assert gpu_faults.loses(CUDARuntimeError(int(name.partition("=")[2])), cp)
    assert cp.asked == 0
    with pytest.raises(bp.BackendError) as e:
        gpu_faults.refuse_if_lost()
    assert e.value.cause == "the context of the GPU is lost: oh"


@pytest.mark.parametrize(
    "e", [CUDARuntimeError(), CUDARuntimeError(999), CUBLASError(13), CUBLASError(2), NVRTCError(2)], ids=repr
)
def test_where_an_error_does_not_say_why_the_device_is_asked(e):
    cp = Device()
    assert not gpu_faults.loses(e, cp)
    cp.error = CUDARuntimeError(701)
    assert not gpu_faults.loses(e, cp)
    cp.error = CUDARuntimeError(700)
    assert gpu_faults.loses(e, cp)
    assert cp.asked == 3
    assert gpu_faults.loses(e, cp)
    assert cp.asked == 3  # it is known now


def test_errors_of_memory_and_of_others_lose_nothing():
    cp = Device(CUDARuntimeError(700))
    of_memory = CUDARuntimeError(2), CUDADriverError(2), CUBLASError(3), MemoryError()
    assert not any(gpu_faults.loses(e, cp) for e in (*of_memory, RuntimeError(), ValueError()))
    assert cp.asked == 0


@pytest.mark.parametrize(
    ("batch_size", "cause", "cure"),
    [
        (None, "out of GPU memory: oh", "take smaller batches, or"),
        (1, "out of GPU memory with batches of 1 samples: oh", "take smaller batches, or"),
        (2, "out of GPU memory with batches of 2 samples: oh", "take a smaller batch_size, 1 say, or"),
    ],
)
def test_what_is_told_where_memory_runs_out(batch_size, cause, cure):
    with pytest.raises(bp.BackendError) as e, gpu_faults.told(Device(), batch_size):
        raise CUDARuntimeError(2)
    assert e.value.cause == cause
    assert e.value.cure.startswith(cure)


def test_how_many_calls_follow_a_loss(monkeypatch):
    """One may ask what it was; none is to wait for the device, or to let go of things on it."""
    with fake_cupy.installed():
        net, before = network(), fake_cupy.Counts.after_loss
        fake_cupy.fail_launch(5)
        with pytest.raises(bp.BackendError, match="lost"):
            bp.train(net, X, T, epochs=1, batch_size=25)
        assert fake_cupy.Counts.after_loss - before <= 1


KINDS_OF_RUNS = {
    "plain": {"validation": (X, T)},
    "norms": {"gradient_norms": True, "gradient_error": True, "clip_norm": 1.0},
    "retreats": {"validation": (X, T), "retreats": 2, "patience": 2, "parameter_tolerance": 0.0},
}


@pytest.mark.filterwarnings("ignore:the data.*streamed")
@pytest.mark.parametrize("kind", KINDS_OF_RUNS)
@pytest.mark.parametrize("streamed", [False, True], ids=["", "streamed"])
@pytest.mark.parametrize("rung", ["graph", "eager"])
def test_wherever_a_context_is_lost_it_is_told_at_once(monkeypatch, tmp_path, rung, streamed, kind):
    """In a step, a recording, an evaluation: no call follows, and no warning; the file goes on."""
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", rung)
    if streamed:
        monkeypatch.setenv("BACKPROP_GPU_DATA_LIMIT", "700")
    settings = {"epochs": 3, "batch_size": 13, "checkpoint_every": "2 steps", **KINDS_OF_RUNS[kind]}
    lost = []
    for at in itertools.count(1, 4 if rung == "graph" else 11):
        monkeypatch.setattr(gpu_faults, "_lost", "")
        with fake_cupy.installed():
            net, before = network(), fake_cupy.Counts.after_loss
            fake_cupy.Mode.late = ("copies", "kernels")[at % 2]
            fake_cupy.fail_launch(at)
            try:
                bp.train(net, X, T, save=tmp_path / str(at), **settings)
                break
            except bp.BackendError as e:
                lost.append((at, e.cause.partition(": ")[0], fake_cupy.Counts.after_loss - before))
    assert len(lost) > 5
    assert {cause for _, cause, _ in lost} == {"the context of the GPU is lost"}
    assert max(calls for *_, calls in lost) <= (rung == "graph")  # a capture is ended
    monkeypatch.setattr(gpu_faults, "_lost", "")
    path = tmp_path / str(lost[len(lost) // 2][0])
    with fake_cupy.installed():
        again = network()
        bp.train(again, X, T, save=path, resume=True, **settings)
        np.testing.assert_array_equal(to_host(again.theta), to_host(net.theta))


def test_data_on_a_gpu_that_is_full_or_lost(tmp_path):
    with fake_cupy.installed() as cp:
        net, pool = network(), cp.get_default_memory_pool()
        there, as_bytes = (cp.asarray(X.astype(np.float64)), cp.asarray(T)), cp.asarray(X)
        calls = (
            lambda: net.predict(there[0]), lambda: net.gradients(*there), lambda: bp.evaluate(net, *there),
            lambda: bp.train(net, *there), lambda: bp.train(net, as_bytes, there[1], validation=0.3),
        )  # fmt: skip
        pool.free_all_blocks()
        for call in calls:
            pool.set_limit(size=pool.used_bytes() + 1500)
            with pytest.raises(bp.BackendError, match="out of GPU memory"):
                call()
            pool.set_limit(size=0)
        fake_cupy.fail_launch(1)
        with pytest.raises(bp.BackendError, match="is lost"):
            bp.train(net, X, T)
        before = fake_cupy.Counts.after_loss
        for call in calls:
            with pytest.raises(bp.BackendError, match="is lost"):
                call()
        assert fake_cupy.Counts.after_loss == before


def test_what_a_callback_did_is_told_with_it(monkeypatch):
    """On a GPU as an error of the GPU; of a network on the CPU it is nobody else's business."""
    with fake_cupy.installed() as cp:

        def greedy(run):
            raise cp.cuda.memory.OutOfMemoryError(10, 20, 30)

        with pytest.raises(bp.BackendError, match="out of GPU memory") as e:
            bp.train(network(), X, T, epochs=1, callbacks=[greedy])
        assert "raised by the callback" in e.value.__notes__[0]
        with pytest.raises(cp.cuda.memory.OutOfMemoryError) as e:
            bp.train(bp.Network([20, 16, 5], backend="numpy"), X, T, epochs=1, callbacks=[greedy])
        assert "raised by the callback" in e.value.__notes__[0]


def test_an_error_that_is_not_sticky_is_told_and_forgotten(monkeypatch):
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", "eager")
    with fake_cupy.installed() as cp:
        net = network()
        fake_cupy.fail_launch(1, 701)
        with pytest.raises(bp.BackendError, match=r"the GPU fails: CUDADriverError: .*LAUNCH_OUT_OF_RESOURCES") as e:
            bp.train(net, X, T, epochs=1, batch_size=25)
        assert isinstance(e.value.__cause__, cp.cuda.driver.CUDADriverError)
        assert not gpu_faults.lost()
        bp.train(net, X, T, epochs=1, batch_size=25)


def test_other_peoples_errors_are_left_alone():
    with fake_cupy.installed(), pytest.raises(MemoryError, match="mine"):
        bp.train(network(), X, T, epochs=1, callbacks=[lambda run: (_ for _ in ()).throw(MemoryError("mine"))])


def test_a_backend_error_travels():
    e = copy.copy(bp.BackendError("a", "b"))
    assert (e.cause, e.cure) == ("a", "b")


# ---------------------------------------------------------------------------------------------- on a real card


@pytest.mark.gpu
def test_a_real_gpu_runs_out_of_memory():
    cp = real_gpu().xp
    pool = cp.get_default_memory_pool()
    try:
        for batch_size in (60_000, 64):
            net = bp.Network([784, 2048, 10], seed=1, backend="cupy")
            before = to_host(net.theta)
            data = RNG.integers(0, 256, (60_000, 784)).astype(np.uint8), RNG.integers(0, 10, 60_000)
            pool.free_all_blocks()
            pool.set_limit(size=pool.used_bytes() + (300 << 20))
            if batch_size == 60_000:  # Z[1] alone takes more
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    with pytest.raises(bp.BackendError, match="out of GPU memory with batches of 60000 samples"):
                        bp.train(net, *data, epochs=1, batch_size=batch_size)
                np.testing.assert_array_equal(to_host(net.theta), before)
            else:
                assert bp.train(net, *data, epochs=1, batch_size=batch_size).stopped == "epochs"
    finally:
        pool.set_limit(size=0)


LOST = """
import sys
import cupy
import numpy as np
import backprop_gpu as bp

nowhere = cupy.RawKernel('extern "C" __global__ void nowhere(int* p) { *p = 1; }', "nowhere")
net = bp.Network([20, 16, 5], backend="cupy")
rng = np.random.default_rng(0)
X, T = rng.random((60, 20), np.float32), rng.integers(0, 5, 60)
try:
    bp.train(
        net, X, T, epochs=3, batch_size=25, save=sys.argv[1], checkpoint_every="1 epoch",
        callbacks=[lambda run: nowhere((1,), (1,), (np.intp(8),)) if run.epoch == 2 else None],
    )
except bp.BackendError as e:
    print(e.cause)
    print(*e.__notes__)
try:
    net.predict(X)
except bp.BackendError as e:
    print(e.cause)
"""


@pytest.mark.gpu
def test_a_real_gpu_whose_context_is_lost(tmp_path):
    """In a process of its own, which comes to an end."""
    real_gpu()
    command = [sys.executable, "-c", LOST, str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout + done.stderr
    assert lines[0] == lines[2]
    assert "the context of the GPU is lost: CUDA" in lines[0] or "cudaErrorIllegalAddress" in lines[0]
    assert lines[1] == f"{tmp_path / 'm'} holds the run after step 3"
    assert checkpoint.read(tmp_path / "m", "numpy").run.step == 3
