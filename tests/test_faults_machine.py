"""What a machine can do to a run: memory and launches that fail, forks, caches, closed streams, odd paths."""

import contextlib
import errno
import functools
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import fake_cupy
import numpy as np
import pytest
from test_backend import (
    CUDARuntimeError,
    _as_in_a_new_process,  # noqa: F401 - a fixture, for this module too
    in_memory,
    raising,
    stub,
)

import backprop_gpu as bp
from backprop_gpu import backend, cli, cuda_source

TOP = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "backprop_gpu"]


@pytest.fixture(autouse=True)
def _on_numpy(monkeypatch, _as_in_a_new_process):  # noqa: F811 - the fixture above takes the variable away
    monkeypatch.setenv("BACKPROP_GPU_BACKEND", "numpy")


# ------------------------------------------------------------------------------------------ the stand-in's own faults


@pytest.fixture
def cp():
    with fake_cupy.installed() as cupy:
        yield cupy


def prober(cp):
    """probe(x) in the current stream: x[0] = 7."""
    kernel = cp.RawKernel(cuda_source.read("probe.cu"), "probe")
    return lambda x: kernel((1,), (1,), (x,))


def test_memory_runs_out_in_the_words_of_cupy(cp):
    pool = cp.get_default_memory_pool()
    pool.set_limit(size=3072)
    x = cp.zeros(257, np.float64)  # five units of 512 bytes
    assert (pool.get_limit(), pool.used_bytes(), pool.free_bytes()) == (3072, 2560, 0)
    with pytest.raises(cp.cuda.memory.OutOfMemoryError) as e:
        cp.empty(1000, np.uint8)
    words = "Out of memory allocating 1,024 bytes (allocated so far: 2,560 bytes, limit set to: 3,072 bytes)."
    assert str(e.value) == words
    assert isinstance(e.value, MemoryError)
    view = x[3:]
    del x
    assert pool.used_bytes() == 2560
    del view
    assert (pool.used_bytes(), pool.free_bytes(), pool.total_bytes()) == (0, 2560, 2560)
    y, z = cp.empty(2000, np.uint8), cp.asarray(np.zeros(8))
    assert pool.total_bytes() == 2560  # out of what was kept
    del y
    cp.empty(2500, np.uint8)  # which had to give way
    assert pool.total_bytes() == 3072
    del z
    cp.cuda.Stream.null.synchronize()  # with the copy to it
    pool.free_all_blocks()
    assert pool.total_bytes() == 0
    pool.set_limit()
    cp.empty(1 << 20, np.uint8)
    assert pool.total_bytes() == 0


def test_the_device_is_as_large_as_a_test_says():
    with fake_cupy.installed(memory=4096) as cp:
        assert cp.cuda.runtime.memGetInfo() == (4096, 4096)
        x = cp.ones(512)
        assert cp.cuda.runtime.memGetInfo() == (0, 4096)
        with pytest.raises(MemoryError, match=r"allocating 4,096 bytes \(allocated so far: 4,096 bytes\)\.$"):
            x + x


@pytest.mark.parametrize(("text", "limit"), [("1024", 1024), ("25%", 1024)])
def test_the_limit_of_the_environment(monkeypatch, text, limit):
    monkeypatch.setenv("CUPY_GPU_MEMORY_LIMIT", text)
    with fake_cupy.installed(memory=4096) as cp:
        assert cp.get_default_memory_pool().get_limit() == limit
        with pytest.raises(MemoryError, match="limit set to: 1,024 bytes"):
            cp.zeros(200)


def test_the_launch_that_is_to_fail_does_and_others_do_not(cp):
    probe, x = prober(cp), cp.zeros((3, 1), np.int32)
    fake_cupy.fail_launch(2, 701)
    probe(x[0])
    with pytest.raises(cp.cuda.driver.CUDADriverError, match="CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: too many") as e:
        probe(x[1])
    assert e.value.status == 701
    probe(x[2])
    assert x.get().tolist() == [[7], [0], [7]]
    assert fake_cupy.Mode.lost is None


def test_after_a_sticky_error_every_call_fails_and_is_counted(cp):
    probe, x = prober(cp), cp.ones((1, 5), np.int32)
    stream, event = cp.cuda.Stream(non_blocking=True), cp.cuda.Event()
    with stream:
        stream.begin_capture()
        probe(x)
        graph = stream.end_capture()
    event.record(stream)
    fake_cupy.fail_launch()
    with pytest.raises(cp.cuda.runtime.CUDARuntimeError, match="cudaErrorIllegalAddress: an illegal memory access"):
        graph.launch()
    before = fake_cupy.Counts.after_loss
    calls = [
        stream.synchronize, event.synchronize, graph.launch, stream.begin_capture, cp.cuda.Stream, x.get, x.sum,
        cp.cuda.runtime.deviceSynchronize, cp.cuda.runtime.memGetInfo, lambda: cp.zeros(3), lambda: event.record(),
        lambda: cp.asarray(np.ones(3)), lambda: cp.cuda.alloc_pinned_memory(3), lambda: stream.wait_event(event),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(cp.cuda.runtime.CUDARuntimeError) as e:
            call()
        assert e.value.status == 700
    module = cp.RawModule(code=cuda_source.read("probe.cu"), options=("--std=c++17",))
    for call in (lambda: probe(x), lambda: module.get_function("probe")):
        with pytest.raises(cp.cuda.driver.CUDADriverError, match="CUDA_ERROR_ILLEGAL_ADDRESS: an illegal"):
            call()
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_EXECUTION_FAILED"):
        cp.matmul(x, x.T)
    assert not stream.done
    assert not event.done
    assert fake_cupy.Counts.after_loss == before + len(calls) + 5


def test_a_launch_that_fails_is_told_late_where_kernels_are_late():
    with fake_cupy.installed(late="kernels") as cp:
        probe, x = prober(cp), cp.zeros(1, np.int32)
        fake_cupy.fail_launch(1, 719)
        probe(x)
        with pytest.raises(cp.cuda.runtime.CUDARuntimeError, match="cudaErrorLaunchFailure: unspecified"):
            cp.cuda.Stream.null.synchronize()
        assert fake_cupy.Mode.lost == 719
    with fake_cupy.installed():
        assert fake_cupy.Mode.lost is None


# ------------------------------------------------------------------------------------------ the trial of a GPU


def test_what_fails_before_cuda_starts_leaves_a_fork_alone(monkeypatch):
    no_device = CUDARuntimeError(100, "cudaErrorNoDevice: no CUDA-capable device is detected")
    with fake_cupy.installed(stub(cuda__runtime__getDeviceCount=raising(no_device))):
        assert backend.examine(0).fault.kind == "driver"
        backend._mark_child()
        assert not backend._forked
        assert backend.examine(0).fault.kind == "driver"


def test_after_a_fork_nothing_comes_from_the_device(monkeypatch):
    with fake_cupy.installed():
        net = bp.Network([3, 2], backend="cupy")
        monkeypatch.setattr(backend, "_forked", True)
        X = np.ones((1, 3), np.float32)
        for use in (
            lambda: backend.to_host(net.theta), lambda: net.to("numpy"), lambda: net.predict(X),
            lambda: bp.train(net, X, np.zeros(1, int), batch_size=1),
        ):  # fmt: skip
            with pytest.raises(bp.BackendError, match="CUDA does not survive a fork") as e:
                use()
            assert "spawn" in e.value.cure


def test_a_fork_from_a_process_where_somebody_else_had_started_cuda():
    not_started = CUDARuntimeError(3, "cudaErrorInitializationError: initialization error")
    with fake_cupy.installed(stub(cuda__runtime__getDeviceCount=raising(not_started))):
        with pytest.raises(bp.BackendError, match=r"CUDA does not start: .*initialization error") as e:
            backend.choose("cupy")
        assert "multiprocessing.get_context('spawn')" in e.value.cure


def test_a_damaged_kernel_in_the_cache_is_compiled_again_in_memory(caplog):
    words = "CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid"

    class RawKernel(fake_cupy.RawKernel):
        def __call__(self, *args, **kwargs):
            if not in_memory():
                raise RuntimeError(words)
            super().__call__(*args, **kwargs)

    with caplog.at_level("INFO", "backprop_gpu"), fake_cupy.installed(stub(RawKernel=RawKernel)):
        assert backend.choose("cupy").name == "cupy"
    (told,) = [r.getMessage() for r in caplog.records]
    assert told == f"CuPy keeps its compiled kernels in memory: RuntimeError: {words}"


def test_random_numbers_of_cupy_which_need_curand_are_never_asked_for():
    for path in (TOP / "backprop_gpu").rglob("*.py"):
        assert not re.search(r"\b(cp|xp|cupy)\.random\b", path.read_text(encoding="utf-8")), path


def test_a_numba_that_may_write_its_cache_nowhere(monkeypatch):
    class Fails:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "backprop_gpu.fast_ops":
                raise RuntimeError("cannot cache function 'gather': no locator available for file 'x.py'")

    monkeypatch.setattr(sys, "meta_path", [Fails, *sys.meta_path])
    monkeypatch.delitem(sys.modules, "backprop_gpu.fast_ops", raising=False)
    backend.no_fast.cache_clear()
    try:
        assert backend.no_fast("auto") == "numba may write its cache nowhere"
        with pytest.raises(bp.ConfigError, match="BACKPROP_GPU_FAST is 1, but numba may write") as e:
            backend.no_fast("1")
        assert "NUMBA_CACHE_DIR" in e.value.cure
    finally:
        backend.no_fast.cache_clear()


# ------------------------------------------------------------------------------------------ an import, and a home

NOWHERE = "/dev/null/nowhere"  # a folder that nobody can make, whoever they are
NO_HOME = dict.fromkeys(
    ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "CUPY_CACHE_DIR", "NUMBA_CACHE_DIR", "MPLCONFIGDIR"),
    NOWHERE,
)

WATCH = """
import os, sys
import ctypes, gzip, importlib, numpy
bad, changes = [], os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
KINDS = ("os.mkdir", "os.rmdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate", "os.chmod",
         "os.fork", "os.exec", "os.posix_spawn", "os.putenv", "os.unsetenv", "shutil.", "tempfile.", "socket.",
         "subprocess.", "ctypes.dlopen", "signal.")
def watch(event, args):
    if event.startswith(KINDS) or (event == "open" and args[2] & changes):
        bad.append((event, args))
sys.addaudithook(watch)
import backprop_gpu
for name in backprop_gpu.__all__:
    getattr(backprop_gpu, name)
heavy = {"cupy", "numba", "rich", "click", "safetensors"} & set(sys.modules)
sys.exit(f"did {bad}, imported {heavy}" if bad or heavy else 0)
"""


def process(*command, code=0, stdin=None, **kwargs):
    env = {**os.environ, **kwargs.pop("env", {})}
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=60, check=False, errors="replace", **kwargs
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_an_import_changes_nothing_whatever_the_home(tmp_path):
    process(sys.executable, "-B", "-c", WATCH, cwd=tmp_path, env=NO_HOME)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def npz(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"x_{part}": rng.random((30, 4)).astype(np.float32) for part in ("train", "test")}
    np.savez(tmp_path / "d.npz", **arrays, y_train=np.arange(30) % 3, y_test=np.arange(30) % 3)
    return tmp_path / "d.npz"


TRAIN = ("train", "--data", "d.npz", "--layers", "4,6,3", "--epochs", "1")


def test_a_run_without_a_home_writes_its_model_and_nothing_else(npz):
    env = {**NO_HOME, "BACKPROP_GPU_BACKEND": "", "PYTHONDONTWRITEBYTECODE": "1"}
    process(*COMMAND, *TRAIN, "--save", "m", cwd=npz.parent, env=env)
    assert sorted(p.name for p in npz.parent.iterdir()) == ["d.npz", "m"]


# ------------------------------------------------------------------------------------------ streams and terminals


def shell(line, *args, **kwargs):
    """A line of bash with "$@" for the command."""
    return process("bash", "-c", f"set -o pipefail; {line}", "bash", *COMMAND, *args, **kwargs)


def test_a_reader_that_reads_nothing_is_no_error_to_talk_of(npz):
    done = shell('"$@" | head -c0', *TRAIN, code=1, cwd=npz.parent)
    assert (done.stdout, done.stderr) == ("", "")


def test_no_stream_at_all_is_no_reason_not_to_train(npz):
    shell('"$@" <&- >&- 2>&-', *TRAIN, "--save", "m", cwd=npz.parent)
    assert bp.load(npz.parent / "m", "numpy").layers == [4, 6, 3]


def test_what_nobody_hears_on_stderr_changes_nothing(npz):
    batch = ("--batch-size", "100", "--save", "m", "--json")  # a warning, and where it was saved
    done = shell('"$@" 2>/dev/full', *TRAIN, *batch, cwd=npz.parent)
    assert json.loads(done.stdout)["epochs"] == 1


def on_terminal(*args, until=None, **env):
    """What a terminal on stderr shows, what comes on stdout, and the exit code; it goes away once it shows `until`."""
    ours, theirs = pty.openpty()
    command = subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, **env})
    with command as started:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how Linux ends it
            while until is None or until not in shown:
                if not (piece := os.read(ours, 4096)):
                    break
                shown += piece
        os.close(ours)
        out = started.stdout.read()
    return shown, out, started.returncode


ODD_TERMINALS = {
    "narrow": {"PYTHONIOENCODING": "cp1252", "COLUMNS": "30"},
    "dumb": {"TERM": "dumb"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("kind", ODD_TERMINALS)
def test_terminals_that_can_do_little_are_told_in_ascii_without_colours(npz, kind, monkeypatch):
    monkeypatch.chdir(npz.parent)
    shown, _, code = on_terminal(*TRAIN, **ODD_TERMINALS[kind], NO_COLOR="1")
    assert code == 0
    assert b"1/1" in shown
    assert shown.isascii()
    assert not re.search(rb"\x1b\[[\d;]*m", shown)  # neither bold
    assert (b"\x1b" in shown) == (kind != "dumb")


def test_a_terminal_that_goes_away_does_not_end_the_training(npz, monkeypatch):
    monkeypatch.chdir(npz.parent)
    shown, out, code = on_terminal(*TRAIN[:-1], "300", "--json", until=b"epoch 1/300", NO_COLOR="1")
    assert code == 0
    assert json.loads(out)["epochs"] == 300
    assert len(shown) < 9000  # and more was to come than a terminal holds


def test_no_bar_where_colours_are_forced_on_what_is_no_terminal(npz):
    assert process(*COMMAND, *TRAIN, cwd=npz.parent, env={"FORCE_COLOR": "1"}).stderr == ""


def test_letters_that_stdout_has_not_are_escaped():
    done = process(*COMMAND, "doctor", env={"PYTHONIOENCODING": "ascii", "BACKPROP_GPU_NOTE": "数ü"})
    assert r"BACKPROP_GPU_NOTE=\u6570\xfc" in done.stdout


# ------------------------------------------------------------------------------------------ paths

TOO_LONG = {
    "a component": "a" * 256,
    "a component in bytes": "é" * 128,
    "a path": "a/" * 2500 + "x",
}


def told(capsys, *args):
    """Exit code 1, and two lines."""
    assert cli._run([str(a) for a in args]) == 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert [line.partition(":")[2].split(":")[0] for line in lines] == [" error", " try"]
    return lines[0]


@pytest.mark.parametrize("path", TOO_LONG.values(), ids=TOO_LONG)
def test_paths_that_are_too_long(npz, path, capsys, monkeypatch):
    monkeypatch.chdir(npz.parent)
    bp.save(bp.Network([4, 3]), "m")
    assert "there is no dataset" in told(capsys, "train", "--data", path)
    for args in (
        ("train", "--data", f"{path}.npz"), (*TRAIN, "--save", path), (*TRAIN, "--pretrained", path),
        ("evaluate", path, "--data", "d.npz"), ("predict", path, "x.npy"), ("predict", "m", path),
        ("predict", "m", f"{path}.npy"),
    ):  # fmt: skip
        assert "File name too long" in told(capsys, *args)
    for call in (functools.partial(bp.load, path), functools.partial(bp.save, bp.Network([2, 2]), path)):
        with pytest.raises(bp.CheckpointError) as e:
            call()
        assert e.value.errno == errno.ENAMETOOLONG
    assert sorted(p.name for p in npz.parent.iterdir()) == ["d.npz", "m"]


def test_names_as_long_as_may_be(tmp_path):
    net = bp.Network([2, 2], seed=3)
    for name in ("b" * 255, "é" * 127):
        bp.save(net, tmp_path / name)
        np.testing.assert_array_equal(bp.load(tmp_path / name).theta, net.theta)


def test_a_relative_path_means_where_the_run_began(npz, monkeypatch):
    monkeypatch.chdir(npz.parent)
    (npz.parent / "elsewhere").mkdir()
    train, _ = bp.datasets.load("d.npz")
    bp.train(bp.Network([4, 3]), *train, epochs=2, save="m", callbacks=[lambda run: os.chdir(npz.parent / "elsewhere")])
    assert (npz.parent / "m").exists()
    assert not list((npz.parent / "elsewhere").iterdir())


def test_names_that_the_locale_cannot_read(npz):
    """Python hands them over as they are; they go back to the system unchanged, and to the terminal escaped."""
    place = npz.parent / "Zahlen äöü 数字"
    place.mkdir()
    npz.rename(place / "d.npz")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    args = ("train", "--data", place / "d.npz", "--layers", "4,3", "--epochs", "1", "--save", place / "modèle")
    done = process(*COMMAND, *args, cwd=npz.parent, env=plain)
    assert re.search(r"^saved to .*Zahlen .*mod\\udcc3\\udca8le$", done.stderr, re.MULTILINE)
    assert bp.load(place / "modèle", "numpy").layers == [4, 3]


ELSEWHERE = """
import os, sys
sys.path.insert(0, ".")
import backprop_gpu as bp
os.chdir("/")
from backprop_gpu import cuda_source
assert "Zahlen" in bp.datasets.__file__
assert "probe" in cuda_source.read("probe.cu")
try:
    bp.datasets.load("mnist")
except bp.DataError as e:
    sys.exit("has no file train-images" not in str(e))
"""


def test_a_checkout_with_an_odd_name_found_by_a_relative_path(tmp_path):
    place = tmp_path / "Zahlen äöü 数字"
    place.mkdir()
    (place / "kernels").symlink_to(TOP / "kernels")
    package = place / "backprop_gpu"
    (package / "datasets").mkdir(parents=True)
    for path in (TOP / "backprop_gpu").rglob("*.py"):
        (package / path.relative_to(TOP / "backprop_gpu")).write_bytes(path.read_bytes())
    (package / "datasets" / "mnist").mkdir()
    process(sys.executable, "-B", "-c", ELSEWHERE, cwd=place, env={"PYTHONPATH": ""})


# ------------------------------------------------------------------------------------------ steps on a GPU, and numba


def data(n=60):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, 20)).astype(np.uint8), rng.integers(0, 5, n)


@pytest.mark.parametrize("n", [1, 4, 8])
def test_a_step_whose_trial_fails_is_not_taken_twice(n):
    """Its kernels are run once before they are recorded; where that fails, steps are eager."""
    thetas = []
    with fake_cupy.installed():
        for told in (contextlib.nullcontext(), pytest.warns(UserWarning, match="no CUDA graph")):
            net = bp.Network([20, 16, 5], seed=1, backend="cupy")
            with told:
                bp.train(net, *data(), batch_size=25, epochs=2)
            thetas.append(backend.to_host(net.theta))
            fake_cupy.fail_launch(n, 701)
    np.testing.assert_allclose(*thetas, rtol=1e-4, atol=1e-6)


def test_data_is_streamed_where_the_pool_of_cupy_is_bounded():
    with fake_cupy.installed() as cp:
        net = bp.Network([20, 16, 5], backend="cupy")
        cp.get_default_memory_pool().set_limit(size=300_000)
        with pytest.warns(UserWarning, match="does not fit into the GPU's memory"):
            assert "streamed" in bp.train(net, *data(20_000), epochs=1, batch_size=100).executor


def test_a_disk_that_is_full_when_a_step_is_compiled(caplog):
    class RawModule(fake_cupy.RawModule):
        def get_function(self, name):
            if not in_memory():
                raise OSError(28, "No space left on device")
            return super().get_function(name)

    with caplog.at_level("INFO", "backprop_gpu"), fake_cupy.installed(stub(RawModule=RawModule)):
        bp.train(bp.Network([20, 5], backend="cupy"), *data(), epochs=1, batch_size=60)
    (told,) = [r.getMessage() for r in caplog.records]
    assert told == "CuPy keeps its compiled kernels in memory: OSError: [Errno 28] No space left on device"


SQUARES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
import numpy as np
from backprop_gpu import fast_kernels
out = np.empty(1)
fast_kernels.squares(2, np.ones(1000), out)
assert out[0] == 1000
"""


@pytest.mark.slow
def test_a_cache_of_numba_that_is_full_or_damaged(tmp_path):
    pytest.importorskip("numba")
    if trouble := backend.no_fast("auto"):
        pytest.skip(trouble)

    def squares(most_bytes):
        process(sys.executable, "-c", SQUARES, str(most_bytes), env={"NUMBA_CACHE_DIR": str(tmp_path)})

    squares(2000)
    assert not list(tmp_path.rglob("*.nbc"))
    for kind in ("*.nbi", "*.nbc"):
        squares(1 << 30)
        files = list(tmp_path.rglob(kind))
        assert files
        for file in files:
            os.truncate(file, file.stat().st_size // 2)
        squares(1 << 30)
