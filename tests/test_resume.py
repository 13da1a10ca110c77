"""Runs that are kept in a file: cut anywhere, they go on to the last bit; nothing is lost, and nothing is mixed up."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import fake_cupy
import killed
import numpy as np
import pytest
from safetensors.numpy import load as load_tensors

import backprop_gpu as bp
from backprop_gpu import backend as backends
from backprop_gpu import checkpoint, executors, files, loop, report
from backprop_gpu.backend import to_host
from backprop_gpu.batches import epoch_plan
from backprop_gpu.resume import Checkpoints, Interval, digest

SLOW = os.environ.get("BACKPROP_GPU_SLOW") == "1"


class Cut(BaseException):
    """Like a signal: no error."""


class CutAfter:
    """A callback that stops the run after a step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, run):
        if run.step == self.step:
            raise Cut


OF_METADATA = "sha256_of_metadata"


class Thetas:
    """The parameters after each step."""

    def __init__(self):
        self.thetas = []

    def on_step(self, run):
        self.thetas.append(to_host(run.net.theta).copy())


def contents(path):
    """All of a checkpoint but what the clock said."""
    content = Path(path).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    told = {key: text for key, text in header["__metadata__"].items() if key not in ("clock", "format", OF_METADATA)}
    metadata = {key: json.loads(text) for key, text in told.items()}
    return metadata, {name: (a.dtype, a.shape, a.tobytes()) for name, a in load_tensors(content).items()}


def remembered(history):
    """A history without what the clock said, and without where it was resumed."""
    return {key: value for key, value in vars(history).items() if key not in ("seconds", "resumed", "plan", "executor")}


X = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
T = (X[:, 0] > 0).astype(np.int64) + (X[:, 1] > 0.3)
STEPS, EPOCHS = 4, 3  # of 14 samples


def train(path, backend="numpy", layers=(4, 6, 3), network=None, data=(X, T), resume=False, callbacks=(), **settings):
    net = bp.Network(list(layers), seed=3, backend=backend, **(network or {}))
    history = bp.train(
        net, *data, save=path, resume=resume, callbacks=list(callbacks),
        **{"epochs": EPOCHS, "batch_size": 14, "optimizer": "adam", **settings},
    )  # fmt: skip
    return net, history


def cut(path, step, **settings):
    with pytest.raises(Cut):
        train(path, callbacks=[CutAfter(step)], **settings)


KINDS = {
    "plain": {},
    "without slots": {"optimizer": bp.SGD(0.1)},
    "one slot": {"optimizer": "momentum", "schedule": "one_cycle"},
    "three slots": {"optimizer": "adam:amsgrad=true", "network": {"precision": "float64"}},
    "nadam": {"optimizer": "nadam", "batches": "chunks"},
    "masks": {"network": {"dropout": 0.3}, "label_smoothing": 0.1},
    "penalties": {"l2": 0.01, "clip_norm": 0.5, "reduction": "sum", "optimizer": bp.SGD(0.01)},
    "weights": {"class_weight": "balanced", "batches": "in_order"},
    "patience": {"validation": 0.3, "patience": 1, "optimizer": bp.Adam(0.5), "epochs": 6},
    "patience kept": {"validation": 0.3, "patience": 5},
    "plateau": {"schedule": "plateau:patience=0,threshold=0.9", "validation": (X[:9], T[:9])},
    "plateau of the training": {"schedule": "plateau:patience=0,threshold=0.9"},
    "tolerances": {"parameter_tolerance": 1e-9, "gradient_tolerance": 1e-9, "gradient_norms": True},
    "frozen": {"frozen": 1, "gradient_error": True},
    "regression": {"network": {"output": "identity"}, "data": (X, X[:, :3]), "gradient_norms": True},
    "one batch": {"batch_size": "full", "epochs": 9},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_cut_goes_on_to_the_same_bits(backend, tmp_path, kind):
    settings = {"backend": backend.name, **KINDS[kind]}
    net, history = train(tmp_path / "whole", **settings)
    wanted = contents(tmp_path / "whole")
    last = history.steps[-1]
    for step in range(1, last, 1 if backend.name == "numpy" else 4):
        path = tmp_path / str(step)
        cut(path, step, **settings)
        again, told = train(path, resume=True, **settings)
        assert contents(path) == wanted
        assert remembered(told) == remembered(history)
        assert told.resumed == step
        np.testing.assert_array_equal(to_host(again.theta), to_host(net.theta))
        assert (again.cost, again.task) == (net.cost, net.task)


@pytest.mark.parametrize("rung", ["eager", "replay", "compiled"])
def test_on_every_rung_of_numpy(tmp_path, monkeypatch, rung):
    """As a run that is cut again and again, after a step each time; its steps are taken many at a time else."""
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", rung)
    monkeypatch.setenv("BACKPROP_GPU_FAST", "1" if rung == "compiled" else "0")
    _, history = train(tmp_path / "whole")
    assert history.executor.startswith(rung)
    path = tmp_path / "cut"
    for step in range(1, STEPS * EPOCHS + 1):
        with pytest.raises(Cut):
            train(path, resume=True, callbacks=[CutAfter(step)])
    train(path, resume=True)
    assert contents(path) == contents(tmp_path / "whole")


def test_a_run_whose_data_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKPROP_GPU_DATA_LIMIT", "500")
    with fake_cupy.installed():
        _, history = train(tmp_path / "whole", backend="cupy")
        assert "streamed" in history.executor
        for step in (1, 3, 6, 8, 11):
            cut(tmp_path / "cut", step, backend="cupy")
            train(tmp_path / "cut", backend="cupy", resume=True)
            assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_more_epochs_than_before(tmp_path):
    """A run that is over goes on, with patience from its last parameters, not from its best ones."""
    for settings in ({}, {"validation": 0.3, "patience": 9, "optimizer": bp.Adam(0.3)}):
        _, wanted = train(tmp_path / "whole", **{**settings, "epochs": 5})
        path = tmp_path / f"m{len(settings)}"
        net, _ = train(path, **{**settings, "epochs": 2})
        np.testing.assert_array_equal(bp.load(path, "numpy").theta, net.theta)
        _, told = train(path, resume=True, **{**settings, "epochs": 5})
        assert contents(path) == contents(tmp_path / "whole")
        assert remembered(told) == remembered(wanted)
        assert told.resumed == 2 * told.steps[0]


def test_a_run_that_is_over_is_not_taken_up_again(tmp_path):
    net, history = train(tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    other = bp.Network([4, 6, 3], seed=3, backend="numpy")
    told = bp.train(
        other, X, T, save=tmp_path / "m", resume=True, epochs=EPOCHS, batch_size=14, optimizer="adam",
        callbacks=[lambda run: pytest.fail("an epoch")],
    )  # fmt: skip
    np.testing.assert_array_equal(other.theta, net.theta)
    assert remembered(told) == remembered(history)
    assert told.seconds == pytest.approx(history.seconds, abs=1e-6)
    assert (tmp_path / "m").read_bytes() == before


def test_a_run_that_is_not_over_is_not_replaced_without_a_word(tmp_path):
    cut(tmp_path / "m", 6)
    with pytest.warns(UserWarning, match=r"m holds a run that is not over, after step 6: .*will replace it \(resume"):
        train(tmp_path / "m")
    train(tmp_path / "m")  # over: nothing to be told
    bp.save(bp.Network([4, 6, 3]), tmp_path / "m")
    train(tmp_path / "m")  # no run at all


def test_what_ended_a_run_ends_it_for_good(tmp_path):
    settings = {"validation": 0.3, "patience": 1, "optimizer": bp.Adam(0.5)}
    _, history = train(tmp_path / "m", **{**settings, "epochs": 20})
    assert history.stopped == "patience"
    told = train(tmp_path / "m", resume=True, **{**settings, "epochs": 30})[1]
    assert remembered(told) == remembered(history)


def test_time_that_is_over_stays_over(tmp_path, monkeypatch):
    """A limit on the time counts what went before; a run that it ends within an epoch is over."""
    cut(tmp_path / "m", 2, time_limit=1e5)
    monkeypatch.setattr("backprop_gpu.stopping.time.perf_counter", lambda: time.monotonic() + 2e5)
    _, history = train(tmp_path / "m", time_limit=1e5, resume=True)
    assert (history.stopped, history.steps) == ("epochs", [4, 8, 12])  # the clock of the file says otherwise
    cut(tmp_path / "n", 2, time_limit=1e5)
    started = loop.Loop.go_on_from

    def later(self, found):
        found.run.clock["elapsed"] = 1e5
        started(self, found)

    monkeypatch.setattr(loop.Loop, "go_on_from", later)
    _, history = train(tmp_path / "n", time_limit=1e5, resume=True)
    assert (history.stopped, history.steps) == ("time", [3])
    again = train(tmp_path / "n", time_limit=1e5, resume=True)[1]
    assert remembered(again) == remembered(history)
    monkeypatch.undo()
    cut(tmp_path / "o", 4, time_limit=1e5)  # all steps of the epoch are taken, and it is not closed
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "go_on_from", later)
        _, history = train(tmp_path / "o", time_limit=1e5, resume=True)
    assert (history.stopped, history.steps) == ("time", [4])


@pytest.mark.parametrize("content", [None, b""], ids=["none", "empty"])
def test_where_there_is_no_file_the_run_begins(tmp_path, content):
    if content is not None:
        (tmp_path / "m").write_bytes(content)
    _, history = train(tmp_path / "m", resume=True)
    assert history.resumed is None
    train(tmp_path / "whole")
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")


OTHER = {
    "lr of optimizer is 0.5, not 0.002": {"optimizer": bp.Adam(0.5)},
    "betas of optimizer is [0.8, 0.9], not [0.9, 0.999]": {"optimizer": bp.Adam(2e-3, betas=(0.8, 0.9))},
    "optimizer is SGD, not Adam": {"optimizer": bp.SGD(0.1)},
    "schedule is Cosine, not Constant": {"schedule": "cosine"},
    "batch_size is 7, not 14": {"batch_size": 7},
    "batches is in_order, not shuffled": {"batches": "in_order"},
    "seed is 1, not 0": {"seed": 1},
    "layers is [4, 7, 3], not [4, 6, 3]": {"layers": (4, 7, 3)},
    "hidden is tanh, not relu": {"network": {"hidden": "tanh"}},
    "output is sigmoid, not softmax": {"network": {"output": "sigmoid"}, "cost": "squared_error"},
    "init is glorot, not he": {"network": {"init": "glorot"}},
    "bias is False, not True": {"network": {"bias": False}},
    "precision is float64, not float32": {"network": {"precision": "float64"}},
    "dropout is 0.5, not 0.0": {"network": {"dropout": 0.5}},
    "cost is squared_error, not cross_entropy": {"cost": "squared_error"},
    "reduction is sum, not mean": {"reduction": "sum"},
    "l1 is 0.1, not 0.0": {"l1": 0.1},
    "l2 is 0.1, not 0.0": {"l2": 0.1},
    "clip_norm is 1.0, not None": {"clip_norm": 1.0},
    "clip_value is 1.0, not None": {"clip_value": 1.0},
    "label_smoothing is 0.1, not 0.0": {"label_smoothing": 0.1},
    "frozen is 1, not 0": {"frozen": 1},
    "retreats is 2, not 0": {"retreats": 2},
    "time_limit is 9.0, not None": {"time_limit": 9},
    "parameter_tolerance is 0.0, not None": {"parameter_tolerance": 0},
    "gradient_tolerance is 0.0, not None": {"gradient_tolerance": 0},
    "gradient_norms is True, not False": {"gradient_norms": True},
    "gradient_error is True, not False": {"gradient_error": True},
    "validation is other data": {"validation": (X, T)},
    "X of data is other data": {"data": (X + 1, T)},
    "T of data is other data": {"data": (X, T[::-1].copy())},
    "weights of data is other data": {"sample_weight": np.arange(1, 51)},
    "samples is 49, not 50": {"data": (X[1:], T[1:])},
    "epochs is 2, not 3": {"epochs": 2},
}


@pytest.mark.parametrize("words", OTHER)
def test_other_settings_are_refused_by_name(tmp_path, words):
    path = tmp_path / "m"
    cut(path, 5)
    before = path.read_bytes()
    with pytest.raises(bp.ConfigError) as e:
        train(path, resume=True, **OTHER[words])
    assert e.value.cause.startswith(words), e.value.cause
    assert path.read_bytes() == before


def test_patience_is_a_setting(tmp_path):
    cut(tmp_path / "m", 5, validation=0.3)
    with pytest.raises(bp.ConfigError, match="patience is 3, not None"):
        train(tmp_path / "m", resume=True, validation=0.3, patience=3)


def test_a_schedule_of_ones_own_is_known_by_what_it_makes(tmp_path):
    cut(tmp_path / "m", 5, schedule=lambda step, total: 1 / (step + 1))
    with pytest.raises(bp.ConfigError, match="the schedule makes lr"):
        train(tmp_path / "m", resume=True, schedule=lambda step, total: 1 / (step + 2))
    train(tmp_path / "m", resume=True, schedule=lambda step, total: 1 / (step + 1))


def test_functions_of_ones_own_go_on(tmp_path):
    square = bp.Activation.of("square", lambda xp, Z: Z * Z, lambda xp, Z: 2 * Z)
    own = bp.Cost.of("own", lambda xp, Y, T: ((Y - T) ** 2).sum(axis=1), lambda xp, Y, T: 2 * (Y - T))
    settings = {"network": {"hidden": square, "output": "tanh"}, "cost": own, "optimizer": bp.SGD(0.01)}
    train(tmp_path / "whole", **settings)
    cut(tmp_path / "m", 5, **settings)
    train(tmp_path / "m", resume=True, **settings)
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")


def test_a_network_without_a_run_is_nothing_to_go_on_from(tmp_path):
    bp.save(bp.Network([4, 6, 3], backend="numpy"), tmp_path / "m")
    with pytest.raises(bp.CheckpointError, match="no run to go on with"):
        train(tmp_path / "m", resume=True)


@pytest.mark.parametrize("settings", [{"resume": True}, {"checkpoint_every": "2 epochs"}])
def test_without_a_file_there_is_nothing_to_keep(settings):
    with pytest.raises(bp.ConfigError, match="without save"):
        train(None, **settings)


def test_nothing_of_the_network_changes_where_the_file_is_bad(tmp_path):
    cut(tmp_path / "m", 5)
    content = bytearray((tmp_path / "m").read_bytes())
    content[-1] ^= 1
    (tmp_path / "m").write_bytes(content)
    net = bp.Network([4, 6, 3], seed=3, backend="numpy")
    before = net.theta.copy()
    with pytest.raises(bp.CheckpointError, match="is not what was saved"):
        bp.train(net, X, T, epochs=3, batch_size=14, save=tmp_path / "m", resume=True)
    np.testing.assert_array_equal(net.theta, before)


def test_elsewhere_is_told(tmp_path):
    cut(tmp_path / "m", 5)
    with fake_cupy.installed(), pytest.warns(UserWarning, match=r"elsewhere than it began \(backend cupy, not numpy"):
        train(tmp_path / "m", backend="cupy", resume=True)


@pytest.mark.parametrize(("first", "then"), [("eager", "replay"), ("replay", "eager"), ("replay", "compiled")])
def test_of_two_rungs_with_the_same_bits_nothing_is_told(tmp_path, monkeypatch, first, then):
    path, other = tmp_path / "m", then == "compiled"
    monkeypatch.setenv("BACKPROP_GPU_FAST", "1" if other else "0")
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", first)
    train(tmp_path / "whole")
    cut(path, 5)
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", then)
    told = pytest.warns(UserWarning, match=r"elsewhere than it began \(rung compiled, numba, not eager, numba\)")
    with told if other else contextlib.nullcontext():
        _, history = train(path, resume=True)
    assert history.executor.startswith(then)
    if not other:
        assert contents(path)[1] == contents(tmp_path / "whole")[1]


@pytest.mark.parametrize(
    ("backend", "executor", "rung"),
    [
        ("numpy", "eager", "eager"), ("numpy", "replay: numba is not installed", "eager"),
        ("numpy", "compiled, numba", "compiled, numba"), ("cupy", "eager: no memory", "eager"),
        ("cupy", "graph, TF32, data streamed", "graph, TF32"), ("cupy", "replay", "replay"),
    ],
)  # fmt: skip
def test_on_what_the_last_bits_depend(tmp_path, backend, executor, rung):
    with fake_cupy.installed() as cp:
        be = backends.choose(backend)
        found = Checkpoints(tmp_path / "m", None, "raise").whereabouts(be, executor)
        assert (found["rung"], found["executor"], found["numpy"]) == (rung, executor, np.__version__)
        assert found.get("cupy") == (None if backend == "numpy" else cp.__version__)
        assert ("threads" in found) == ("blas" in found) == (backend == "numpy")
        assert found.get("numba_threads") == (be.ops.threads() if be.fast else None)


def test_a_digest_is_of_dtype_shape_and_elements():
    a = np.zeros((2, 3), np.float32)
    others = [a.astype(np.int32), a.reshape(3, 2), a.ravel(), a.astype(">f4"), a.astype(np.float64), -a, a[:1]]
    assert len({digest(b) for b in (a, *others)}) == 1 + len(others)
    assert digest(np.zeros((3, 2), np.float32).T) == digest(a)


# ------------------------------------------------------------------------------------------- when it is written


@pytest.fixture
def written(monkeypatch):
    """The steps after which a file was written."""
    steps, plain = [], checkpoint.write

    def noted(net, path, run=None):
        steps.append(run.step)
        plain(net, path, run)

    monkeypatch.setattr(checkpoint, "write", noted)
    return steps


@pytest.mark.parametrize(
    ("every", "wanted"),
    [
        ("5 steps", [5, 10, 12]),
        ("1 step", list(range(1, 13))),
        ("4 steps", [4, 8, 12, 12]),  # after the epoch's last step, and when the run is over
        ("2 epochs", [8, 12]),
        ("1 epoch", [4, 8, 12]),
        ("1 hour", [12]),
        ("0.000001 seconds", list(range(1, 13))),
        (None, [12]),
    ],
)
def test_when_a_checkpoint_is_due(backend, tmp_path, written, every, wanted):
    looks = [CutAfter(99)] if every and "seconds" in every else []  # steps are looked after one by one
    train(tmp_path / "m", checkpoint_every=every, callbacks=looks, backend=backend.name)
    assert [step for i, step in enumerate(written) if step not in written[:i]] == sorted(set(wanted))
    assert bp.load(tmp_path / "m", "numpy").layers == [4, 6, 3]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("500 steps", Interval(steps=500)), (" 1 epoch ", Interval(epochs=1)), ("5 minutes", Interval(seconds=300)),
        ("1.5hours", Interval(seconds=5400)), ("90 second", Interval(seconds=90)),
    ],
)  # fmt: skip
def test_intervals(text, wanted):
    assert Interval.of(text) == wanted


@pytest.mark.parametrize(
    "text", ["", "steps", "0 steps", "-1 steps", "1.5 epochs", "5", "5 weeks", "9" * 99 + " steps", 5]
)
def test_intervals_that_are_none(tmp_path, text):
    with pytest.raises(bp.ConfigError, match="checkpoint_every is"):
        train(tmp_path / "m", checkpoint_every=text)


def test_a_checkpoint_changes_nothing(tmp_path):
    train(tmp_path / "a")
    train(tmp_path / "b", checkpoint_every="1 step")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# --------------------------------------------------------------------------------------------- when it fails


@pytest.fixture
def full(monkeypatch):
    """A disk that is full while `full.now`."""
    plain = os.fsync

    def fsync(file):
        if fsync.now:
            raise OSError(28, "No space left on device")
        plain(file)

    fsync.now = True
    monkeypatch.setattr(os, "fsync", fsync)
    return fsync


def test_a_checkpoint_that_fails_ends_the_run_with_the_old_file_whole(tmp_path, full):
    full.now = False
    cut(tmp_path / "m", 5)
    before, full.now = (tmp_path / "m").read_bytes(), True
    with pytest.raises(bp.CheckpointError, match="No space left") as e:
        train(tmp_path / "m", resume=True, checkpoint_every="2 steps")
    assert e.value.errno == 28
    assert e.value.__notes__ == [f"{tmp_path / 'm'} holds the run after step 5"]
    assert (tmp_path / "m").read_bytes() == before
    assert os.listdir(tmp_path) == ["m"]


def test_a_checkpoint_that_fails_may_be_a_warning_but_the_last_one_is_not(tmp_path, full):
    def later(run):
        full.now = run.epoch == 3

    kept = {"checkpoint_every": "2 epochs", "on_checkpoint_error": "warn", "callbacks": [later]}
    with pytest.raises(bp.CheckpointError, match="No space left"):
        train(tmp_path / "m", **kept)
    full.now = True
    kept["callbacks"] = [lambda run: setattr(full, "now", run.epoch < 3)]
    with pytest.warns(UserWarning, match="no checkpoint of step 8: .*No space left on device; the run goes on"):
        train(tmp_path / "n", **kept)
    assert report.model(tmp_path / "n")["run"]["step"] == 12


def test_what_to_do_then_is_one_of_two(tmp_path):
    with pytest.raises(bp.ConfigError, match="on_checkpoint_error is 'ignore'"):
        train(tmp_path / "m", on_checkpoint_error="ignore")


def test_an_error_in_a_callback_loses_nothing(tmp_path):
    def fails(run):
        if run.epoch == 2:
            raise KeyError("oh")

    with pytest.raises(KeyError) as e:
        train(tmp_path / "m", callbacks=[fails])
    assert e.value.__notes__[-1] == f"{tmp_path / 'm'} holds the run after step 8"
    called = []
    train(tmp_path / "m", callbacks=[lambda run: called.append(run.epoch)], resume=True)
    assert called == [2, 3]  # the epoch is closed once more
    train(tmp_path / "whole")
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")


def test_an_error_in_a_callback_and_a_full_disk(tmp_path, full):
    def fails(run):
        raise KeyError("oh")

    with pytest.raises(KeyError) as e:
        train(tmp_path / "m", callbacks=[fails])
    assert "the run could not be saved" in e.value.__notes__[-1]


def test_a_second_signal_while_saving_leaves_the_old_file(tmp_path, monkeypatch):
    cut(tmp_path / "m", 2)
    before = (tmp_path / "m").read_bytes()

    def twice(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it went on")

    monkeypatch.setattr(os, "replace", twice)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "m", resume=True, checkpoint_every="3 steps")
    assert (tmp_path / "m").read_bytes() == before
    assert os.listdir(tmp_path) == ["m"]


def test_a_signal_while_the_run_ends_comes_after_the_save(tmp_path, monkeypatch):
    plain = os.replace

    def once(*args):
        os.kill(os.getpid(), signal.SIGINT)
        plain(*args)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "m")
    assert checkpoint.read(tmp_path / "m", "numpy").run.stopped == "epochs"


# --------------------------------------------------------------------------------------------- divergence

SCHEDULE = {"optimizer": bp.SGD(0.1), "cost": "squared_error", "network": {"output": "identity"}}


def burst(step, total):
    """A learning rate that makes parameters in the seventh step whose cost, in the eighth, is not finite."""
    return 1e30 if step == 6 else 1.0


def test_a_run_that_diverges_leaves_the_file_before_it(tmp_path):
    with pytest.raises(bp.DivergenceError) as e:
        train(tmp_path / "m", schedule=burst, checkpoint_every="1 epoch", **SCHEDULE)
    assert (e.value.epoch, e.value.step) == (2, 8)
    assert e.value.cost == pytest.approx(0.5, abs=0.5)
    assert f"(cost before it {e.value.cost:g})" in e.value.cause
    assert e.value.__notes__ == [f"{tmp_path / 'm'} holds the run after step 4"]
    assert checkpoint.read(tmp_path / "m", "numpy").run.step == 4


def test_without_an_earlier_one_it_leaves_the_last_finite_state(backend, tmp_path):
    net = bp.Network([4, 6, 3], output="identity", seed=3, backend=backend.name)
    with pytest.raises(bp.DivergenceError):
        bp.train(
            net, X, T, "squared_error", bp.SGD(0.1), burst, EPOCHS, 14, save=tmp_path / "m"
        )  # fmt: skip
    found = checkpoint.read(tmp_path / "m", "numpy")
    assert found.run.step == 7
    np.testing.assert_array_equal(found.net.theta, to_host(net.theta))
    assert np.isfinite(found.net.theta).all()


class Halved:
    """1e30 in the seventh step, unless it has been seen twice."""

    def __init__(self, times):
        self.times = times

    def __call__(self, step, total):
        if step == 6 and self.times > 0:
            self.times -= 1
            return 1e30
        return 1.0


def test_a_retreat_goes_back_to_the_start_of_the_epoch_with_half_the_rate(backend, tmp_path):
    class Halving:
        """What it would have been: the first epoch, then half."""

        def __call__(self, step, total):
            return 1.0 if step < 4 else 0.25

    where = {"backend": backend.name, **SCHEDULE}
    wanted, straight = train(tmp_path / "a", schedule=Halving(), **where)
    with pytest.warns(UserWarning, match=r"training diverged in epoch 2, step 8.*back to the start of epoch 2") as told:
        net, history = train(tmp_path / "b", schedule=Halved(2), retreats=3, **where)
    assert len(told) == 2
    np.testing.assert_array_equal(to_host(net.theta), to_host(wanted.theta))
    assert history.retreats == [8, 8]
    assert history.lr == straight.lr == [0.1, 0.025, 0.025]
    assert history.train_cost == straight.train_cost
    assert history.steps == [4, 8, 12]


def test_what_an_epoch_has_to_cost_less_than(tmp_path):
    """To be gone back to: than the first step, by the mean of its samples."""
    _, history = train(tmp_path / "m", retreats=1, batch_size="full")
    assert checkpoint.read(tmp_path / "m", "numpy").run.first_cost == history.train_cost[0]


def test_retreats_come_to_an_end(tmp_path):
    with pytest.warns(UserWarning, match=r"\d of 2 times") as told, pytest.raises(bp.DivergenceError) as e:
        train(tmp_path / "m", schedule=burst, retreats=2, **SCHEDULE)
    assert len(told) == 2
    assert e.value.learning_rate == 0.1 / 4


@pytest.mark.filterwarnings("ignore:training diverged")
def test_a_run_that_retreats_goes_on_to_the_same_bits(backend, tmp_path):
    """Slots too go back; a run cut within the epoch knows where that began, and how often it went back."""
    settings = {"retreats": 60, "optimizer": bp.SGD(1e12, momentum=0.5), "epochs": 6, "backend": backend.name}
    settings |= {"network": {"output": "identity"}, "cost": "squared_error", "layers": (4, 3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, history = train(tmp_path / "whole", **settings)
        assert len(history.retreats) > 3
        for step in range(1, 24, 3):
            cut(tmp_path / "m", step, **settings)
            _, told = train(tmp_path / "m", resume=True, **settings)
            assert contents(tmp_path / "m") == contents(tmp_path / "whole")
            assert told.retreats == history.retreats


def test_the_number_of_retreats_is_one(tmp_path):
    for number in (-1, 1.5, "many"):
        with pytest.raises(bp.ConfigError, match="retreats is"):
            train(tmp_path / "m", retreats=number)


# ------------------------------------------------------------------------------------------------ processes


def test_a_save_that_is_killed_at_any_of_its_system_calls_loses_nothing(tmp_path):
    found = killed.saves(tmp_path, at="every call")
    assert found["lost"] == []
    assert found["kills"] >= 2 * 20  # before and after each call
    assert found["old"] > 10
    assert found["new"] >= 4
    assert found["left_behind"] == 0


def test_a_save_that_is_killed_at_random_loses_nothing(tmp_path):
    found = killed.saves(tmp_path, at="random", kills=1000 if SLOW else 60)
    assert found["lost"] == []
    assert found["old"]
    assert found["new"]
    assert found["left_behind"] == 0


def test_a_training_process_that_is_killed_at_random_goes_on_to_the_same_bits(tmp_path):
    found = killed.runs(tmp_path, cuts=100 if SLOW else 8)
    assert found["different"] == []
    assert found["kills"] >= found["cuts"]


def test_killed_by_the_kernel_the_command_line_goes_on(tmp_path):
    """Whole processes: SIGKILL, SIGTERM, then to the end; beside one that was never stopped."""
    rng = np.random.default_rng(1)
    arrays = {"x_train": rng.normal(size=(4000, 20)), "y_train": rng.integers(0, 4, 4000)}
    np.savez(tmp_path / "d.npz", **arrays)
    command = [sys.executable, "-m", "backprop_gpu", "train", "--data", str(tmp_path / "d.npz"), "--layers", "20,30,4"]
    command += ["--epochs", "60", "--batch-size", "20", "--json", "--checkpoint-every", "50 steps"]

    def start(name, *more):
        return subprocess.Popen([*command, "--save", str(tmp_path / name), *more], stdout=-1, stderr=-1, text=True)

    def kept(process, before):
        """Wait for a checkpoint."""
        while process.poll() is None and (
            not (tmp_path / "cut").exists() or os.stat(tmp_path / "cut").st_ino == before
        ):
            time.sleep(0.01)

    whole = start("whole")
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        before = os.stat(tmp_path / "cut").st_ino if (tmp_path / "cut").exists() else None
        with start("cut", "--resume") as process:
            kept(process, before)
            process.send_signal(number)
            process.communicate(timeout=60)
        assert process.returncode == code
    with start("cut", "--resume") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert whole.communicate(timeout=120)[1] == f"saved to {tmp_path / 'whole'}\n"
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert json.loads(out)["resumed"] > 0
    assert f"the run in {tmp_path / 'cut'} went on after step {json.loads(out)['resumed']}" in err


# ---------------------------------------------------------------------------------------------------- files


def test_what_killed_writers_left_is_swept_and_what_lives_is_not(tmp_path):
    (tmp_path / f"{files.PREFIX}1-abc{files.SUFFIX}").write_bytes(b"dead")
    (tmp_path / "other.tmp").write_bytes(b"somebody's")
    file, alive = files._locked(tmp_path)
    with file:
        bp.save(bp.Network([2, 2], backend="numpy"), tmp_path / "m")
        assert sorted(os.listdir(tmp_path)) == sorted([alive.name, "m", "other.tmp"])


def test_where_there_are_no_locks_the_age_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_lock", lambda file: None)
    for name, age in (("young", 0), ("old", 2 * files.MOST_AGE)):
        path = tmp_path / f"{files.PREFIX}{name}{files.SUFFIX}"
        path.write_bytes(b"")
        os.utime(path, (time.time() - age,) * 2)
    bp.save(bp.Network([2, 2], backend="numpy"), tmp_path / "m")
    assert sorted(os.listdir(tmp_path)) == [f"{files.PREFIX}young{files.SUFFIX}", "m"]


def test_a_sweeper_that_comes_between_creation_and_lock(tmp_path, monkeypatch):
    plain, swept = files._lock, []

    def after_a_sweep(file):
        if not swept:
            swept.extend(tmp_path.iterdir())
            swept[0].unlink()
        return plain(file)

    monkeypatch.setattr(files, "_lock", after_a_sweep)
    file, temporary = files._locked(tmp_path)
    with file:
        assert [temporary] == list(tmp_path.iterdir())
        assert temporary != swept[0]


def test_two_writers_and_a_reader(tmp_path):
    """Whatever the reader finds is one of the two, whole."""
    script = """
import sys
import backprop_gpu as bp
net = bp.Network([30, 40, 5], backend="numpy")
for i in range(150):
    net.theta[net.theta != 0] = float(sys.argv[2])
    bp.save(net, sys.argv[1])
"""
    path = tmp_path / "m"
    writers = [subprocess.Popen([sys.executable, "-c", script, str(path), str(n)]) for n in (1, 2)]
    seen = set()
    while any(process.poll() is None for process in writers):
        if path.exists():
            theta = bp.load(path, "numpy").theta
            seen.add(tuple(np.unique(theta[theta != 0]).tolist()))
    assert [process.returncode for process in writers] == [0, 0]
    assert seen <= {(1.0,), (2.0,)}
    assert os.listdir(tmp_path) == ["m"]


def test_a_directory_that_cannot_be_flushed(tmp_path, monkeypatch):
    plain, net = os.fsync, bp.Network([2, 2], backend="numpy")

    def fails(number):
        def fsync(file):
            if os.path.isdir(f"/proc/self/fd/{file}"):
                raise OSError(number, os.strerror(number))
            plain(file)

        return fsync

    monkeypatch.setattr(os, "fsync", fails(22))  # a file system that has no such thing
    bp.save(net, tmp_path / "m")
    monkeypatch.setattr(os, "fsync", fails(5))
    with pytest.raises(bp.CheckpointError, match="is written, but its directory cannot be flushed"):
        bp.save(net, tmp_path / "m")
    assert bp.load(tmp_path / "m", "numpy").layers == [2, 2]


def test_weights_that_are_not_contiguous_are_saved_as_they_are(tmp_path):
    """The library that writes tensors mixes up what is not in C's order."""
    net = bp.Network([5, 3, 2], seed=1, backend="numpy")
    views = net._views
    views.W = (None, np.asfortranarray(net.W[1]), net.W[2][::-1][::-1])
    bp.save(net, tmp_path / "m")
    np.testing.assert_array_equal(bp.load(tmp_path / "m", "numpy").theta, net.theta)
    np.testing.assert_array_equal(load_tensors((tmp_path / "m").read_bytes())["layer.1.weight"], net.W[1])


def test_too_many_layers_for_a_header_that_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_HEADER", 2000)
    bp.save(bp.Network([2, 2], backend="numpy"), tmp_path / "m")
    with pytest.raises(bp.CheckpointError, match="its header takes"):
        bp.save(bp.Network([2] * 40, backend="numpy"), tmp_path / "n")
    assert os.listdir(tmp_path) == ["m"]


def test_the_seconds_of_very_many_epochs_are_told_as_their_mean(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "MOST_SECONDS", 2)
    _, history = train(tmp_path / "m")
    told = train(tmp_path / "m", resume=True)[1]
    assert told.seconds == pytest.approx([sum(history.seconds) / 3] * 3, abs=1e-5)


def test_where_the_path_leads_is_found_at_once(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    train("m", checkpoint_every="1 epoch", callbacks=[lambda run: os.chdir("there") if run.epoch == 1 else None])
    assert checkpoint.read(tmp_path / "m", "numpy").run.step == 12
    assert os.listdir(tmp_path / "there") == []


def test_backends_are_told_of_what_is_in_a_file(tmp_path):
    train(tmp_path / "m")
    found = report.model(tmp_path / "m")
    assert found["run"]["where"]["backend"] == backends.choose("numpy").name
    assert found["run"]["history"]["steps"] == [4, 8, 12]
    text = report.model_text(found)
    for words in ("4/6/3, 51 parameters", "3 of 3 epochs, 12 of 12 steps: over", "Adam(", "steps 12"):
        assert words in text


# ------------------------------------------------------------------------------------------- files that are forged


def forge(path, part, change):
    """Change a part of the metadata; digests stay as they fit."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    of = json.loads(header["__metadata__"][part])
    header["__metadata__"][part] = json.dumps({**of, **change} if isinstance(change, dict) else change)
    del header["__metadata__"][OF_METADATA]
    own = json.dumps(header["__metadata__"], sort_keys=True)
    header["__metadata__"][OF_METADATA] = hashlib.sha256(own.encode()).hexdigest()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


DEEP = functools.reduce(lambda inner, _: [inner], range(60), {})


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("progress", {"position": 4}), ("progress", {"position": 5}), ("progress", {"step": 9}),
        ("progress", {"samples": 10**9}), ("progress", {"stopped": "x"}), ("progress", {"stopped": "epochs"}),
        ("progress", {"best_epoch": 9}), ("progress", {"retreats": [0]}), ("progress", {"good_epoch": 9}),
        ("progress", {"began": 1}), ("progress", {"lr": -1}), ("progress", {"vectors": ["x"]}),
        ("progress", {"columns": ["lr"]}), ("progress", {"more": 1}), ("progress", {"epoch": 0}),
        ("progress", {"epochs": 1}), ("progress", {"stop": 0}), ("progress", {"put_off": 2}),
        ("progress", {"first_cost": "1"}), ("progress", {"slots": 2}), ("progress", {"slots": 10**9}),
        ("clock", {"seconds": [1, 2, 3]}), ("clock", {"elapsed": "1"}), ("clock", {"seconds": [-1]}),
        ("where", []), ("where", {"executor": 1}), ("sha256", []), ("run", {"seed": 1}), ("run", {"frozen": 2}),
        ("run", {"samples": 0}), ("run", {"batch_size": 51}), ("run", {"retreats": 1}), ("run", {"validation": {}}),
        ("run", {"parameter_tolerance": 0}), ("run", []), ("config", []), ("progress", {"lr": 10**400}),
        ("progress", {"gradient_error": 10**400}), ("progress", {"first_cost": 10**400}),
        ("progress", {"lr_epochs": 0}), ("progress", {"lr_epochs": 5}),
        ("clock", {"elapsed": 10**400}), ("clock", {"under_way": 10**400}),
        ("run", {"optimizer": DEEP}), ("where", {"more": DEEP}), ("progress", {"retreats": [DEEP]}),
    ],
)  # fmt: skip
def test_a_forged_run_is_refused(tmp_path, part, change):
    cut(tmp_path / "m", 5, optimizer="momentum", epochs=4)
    bp.load(tmp_path / "m", "numpy")
    if change == {"validation": {}}:
        change = {"validation": {"X": "0"}}
    forge(tmp_path / "m", part, change)
    with pytest.raises(bp.CheckpointError) as e:
        bp.load(tmp_path / "m", "numpy")
    assert len(str(e.value).splitlines()) == 2


@pytest.mark.parametrize("progress", [[], 7, {"step": "6"}, {"step": True}, {"stopped": "time"}])
def test_before_a_file_is_replaced_it_is_believed_in_nothing(tmp_path, progress):
    cut(tmp_path / "m", 6)
    forge(tmp_path / "m", "progress", progress)
    assert checkpoint.unfinished(tmp_path / "m") is None
    train(tmp_path / "m")


def test_settings_that_nobody_has_are_other_settings(tmp_path):
    """Their names go into no line as they are; a null is a difference of none."""
    cut(tmp_path / "m", 5)
    forge(tmp_path / "m", "run", {"": "a\n" + "\x1b" * 999})
    with pytest.raises(bp.ConfigError) as e:
        train(tmp_path / "m", resume=True)
    assert len(str(e.value).splitlines()) == 2
    assert len(e.value.cause) < 600
    cut(tmp_path / "n", 5)
    optimizer = checkpoint.read(tmp_path / "n", "numpy").run.settings["optimizer"]
    forge(tmp_path / "n", "run", {"optimizer": {**optimizer, "more": None}})
    with pytest.raises(bp.ConfigError, match=r"l2 is 0\.5"):
        train(tmp_path / "n", resume=True, l2=0.5)


def test_what_a_file_says_does_not_drive_the_terminal(tmp_path):
    cut(tmp_path / "m", 5)
    forge(tmp_path / "m", "where", {"device": "a\nb\x1b[31m"})
    text = report.model_text(report.model(tmp_path / "m"))
    assert "\x1b" not in text
    assert "device a\\nb" in text


def test_a_file_for_which_there_is_no_memory(tmp_path, monkeypatch):
    cut(tmp_path / "m", 5)

    def none(content):
        raise MemoryError

    monkeypatch.setattr("safetensors.numpy.load", none)
    with pytest.raises(bp.CheckpointError, match="does not fit into memory"):
        bp.load(tmp_path / "m", "numpy")
    monkeypatch.setattr("safetensors.numpy.save", lambda *args: none(args))
    with pytest.raises(bp.CheckpointError, match="is not written: out of memory"):
        bp.save(bp.Network([2, 2], backend="numpy"), tmp_path / "m")


# ------------------------------------------------------------------------------------- state that is easily forgotten


class Stops:
    """A callback that sets `run.stop` at step 5."""

    def on_step(self, run):
        run.stop = run.stop or run.step == 5


def test_a_stop_that_is_set_is_kept(tmp_path):
    _, history = train(tmp_path / "whole", callbacks=[Stops()])
    assert history.stopped == "callback"
    with pytest.raises(Cut):
        train(tmp_path / "m", callbacks=[Stops(), CutAfter(6)])
    _, told = train(tmp_path / "m", resume=True)
    assert remembered(told) == remembered(history)


def test_costs_below_zero_and_settings_without_an_end(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Own:
        limit: float = float("inf")

        def __call__(self, step, total):
            return 1.0

    own = bp.Cost.of("own", lambda xp, Y, T: ((Y - T) ** 2).sum(axis=1) - 100, lambda xp, Y, T: 2 * (Y - T))
    settings = {"cost": own, "network": {"output": "tanh"}, "retreats": 1, "schedule": Own(), "optimizer": bp.SGD(0.01)}
    train(tmp_path / "whole", **settings)
    cut(tmp_path / "m", 9, **settings)
    assert checkpoint.read(tmp_path / "m", "numpy", own=[own]).run.first_cost < 0
    train(tmp_path / "m", resume=True, **settings)
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")


def test_a_time_limit_within_an_epoch_that_something_else_ends(tmp_path):
    class Slow:
        def on_step(self, run):
            if run.step == 6:
                time.sleep(0.3)

        def __call__(self, run):
            run.stop = run.epoch == 2

    _, history = train(tmp_path / "m", time_limit=0.25, callbacks=[Slow()])
    assert (history.stopped, history.steps) == ("callback", [4, 6])
    assert remembered(train(tmp_path / "m", time_limit=0.25, resume=True)[1]) == remembered(history)


def test_the_seed_of_the_network_and_that_of_the_run(tmp_path):
    cut(tmp_path / "m", 5)
    net = bp.Network([4, 6, 3], seed=99, backend="numpy")
    with pytest.raises(bp.ConfigError, match="seed is 99, not 3"):
        bp.train(net, X, T, None, "adam", epochs=EPOCHS, batch_size=14, save=tmp_path / "m", resume=True)


def test_a_schedule_of_ones_own_is_known_between_epochs_too(tmp_path):
    cut(tmp_path / "m", 4, schedule=lambda step, total: 1.0)
    train(tmp_path / "n", schedule=lambda step, total: 1 / total, epochs=2)
    with pytest.raises(bp.ConfigError, match="the schedule makes lr"):
        train(tmp_path / "m", resume=True, schedule=lambda step, total: 0.123)
    train(tmp_path / "n", resume=True, schedule=lambda step, total: 1 / total, epochs=3)  # stretched


def test_the_clock_goes_on(tmp_path):
    class Slow:
        def on_step(self, run):
            time.sleep(0.02)
            if run.step == 6:
                raise KeyError

    with pytest.raises(KeyError):
        train(tmp_path / "m", callbacks=[Slow()])
    clock = checkpoint.read(tmp_path / "m", "numpy").run.clock
    assert clock["under_way"] >= 0.04
    assert clock["elapsed"] >= 0.12
    _, history = train(tmp_path / "m", resume=True)
    assert history.seconds[1] >= 0.04
    assert checkpoint.read(tmp_path / "m", "numpy").run.clock["elapsed"] >= 0.12


def test_without_memory_nothing_is_half_taken_over(tmp_path, monkeypatch):
    with fake_cupy.installed() as cp:
        cut(tmp_path / "m", 5, backend="cupy", layers=(4, 600, 3))
        net = bp.Network([4, 600, 3], seed=3, backend="cupy")
        before, pool, plain = to_host(net.theta).copy(), cp.get_default_memory_pool(), loop.Loop.go_on_from

        def without_memory(self, found):
            pool.free_all_blocks()
            pool.set_limit(size=pool.used_bytes() + 20_000)
            try:
                plain(self, found)
            finally:
                pool.set_limit(size=0)

        monkeypatch.setattr(loop.Loop, "go_on_from", without_memory)
        with pytest.raises(bp.BackendError, match="out of GPU memory"):
            bp.train(net, X, T, None, "adam", epochs=EPOCHS, batch_size=14, save=tmp_path / "m", resume=True)
        np.testing.assert_array_equal(to_host(net.theta), before)


def test_a_finished_run_tells_cost_and_task(tmp_path):
    train(tmp_path / "m", cost="squared_error")
    net = bp.Network([4, 6, 3], seed=3, backend="numpy")
    bp.train(net, X, T, "squared_error", "adam", None, EPOCHS, 14, save=tmp_path / "m", resume=True)
    assert (net.cost, net.task) == ("squared_error", "labels")


def test_a_signal_at_the_end_of_an_epoch_stops_there(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "m", callbacks=[lambda run: os.kill(os.getpid(), signal.SIGINT)])
    run = checkpoint.read(tmp_path / "m", "numpy").run
    assert (run.step, run.epoch, run.position) == (4, 1, 0)


def test_a_signal_and_a_full_disk(tmp_path, full):
    with pytest.raises(bp.CheckpointError, match="No space left"):
        train(tmp_path / "m", callbacks=[lambda run: os.kill(os.getpid(), signal.SIGINT)])


def test_the_best_epoch_is_the_first_of_equals(tmp_path):
    settings = {"validation": (X, T), "patience": 9, "schedule": lambda step, total: 1e-30, "epochs": 3}
    with pytest.warns(UserWarning, match="no progress"):
        _, history = train(tmp_path / "whole", **settings)
    assert history.best_epoch == 1
    cut(tmp_path / "m", 6, **settings)
    with pytest.warns(UserWarning, match="no progress"):
        assert train(tmp_path / "m", resume=True, **settings)[1].best_epoch == 1


def test_odd_things_under_the_names_of_temporary_files_stay(tmp_path):
    (tmp_path / "thesis").write_bytes(b"all is well")
    (tmp_path / f"{files.PREFIX}link{files.SUFFIX}").symlink_to(tmp_path / "thesis")
    os.mkfifo(tmp_path / f"{files.PREFIX}pipe{files.SUFFIX}")
    before = sorted(os.listdir(tmp_path))
    bp.save(bp.Network([2, 2], backend="numpy"), tmp_path / "m")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "m"])
    assert (tmp_path / "thesis").read_bytes() == b"all is well"


def test_a_lock_that_is_held_counts_more_than_age(tmp_path):
    file, alive = files._locked(tmp_path)
    with file:
        os.utime(alive, (0, 0))
        bp.save(bp.Network([2, 2], backend="numpy"), tmp_path / "m")
        assert alive.exists()


@pytest.mark.parametrize("kind", ["patience", "retreats"])
def test_cut_at_any_line_the_file_is_whole(tmp_path, kind):
    """As by a second signal, which waits for nothing: what is there can be read, and goes on to the same bits."""
    settings = {
        "patience": {"validation": 0.3, "patience": 5, "optimizer": bp.Adam(0.5), "epochs": 2, "batch_size": 18},
        "retreats": {
            "retreats": 60, "optimizer": bp.SGD(1e12, momentum=0.5), "epochs": 2, "network": {"output": "identity"},
            "cost": "squared_error", "layers": (4, 3), "batch_size": 25, "checkpoint_every": "2 steps",
        },
    }[kind]  # fmt: skip
    watched = {loop.__file__, files.__file__.replace("files", "stopping")}

    def traced(line):
        """Train, cut at that line of the loop's; whether there was such a line."""
        count, on = 0, False

        def each(frame, event, arg):
            nonlocal count
            count += event == "line"
            if count == line and event == "line":
                raise Cut
            return each

        def look(frame, event, arg):
            nonlocal on
            on = on or (frame.f_code.co_name == "go" and frame.f_code.co_filename == loop.__file__)
            return each if on and frame.f_code.co_filename in watched else None

        before = sys.gettrace()
        sys.settrace(look)
        try:
            train(tmp_path / "m", **settings)
        except Cut:
            return True
        finally:
            sys.settrace(before)
        return False

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(tmp_path / "whole", **settings)
        wanted, line = contents(tmp_path / "whole"), 1
        while traced(line):
            train(tmp_path / "m", resume=True, **settings)
            assert contents(tmp_path / "m") == wanted, line
            (tmp_path / "m").unlink()
            line += 1 if SLOW else (7 if kind == "patience" else 97)
        assert line > 200


# ------------------------------------------------------------------------------- what is written can be read again


@pytest.mark.filterwarnings("ignore:training diverged")
@pytest.mark.parametrize("patience", [None, 9])
def test_retreats_of_a_run_that_is_validated(backend, tmp_path, patience):
    """Without patience no epoch is the best, nor are its parameters kept."""
    settings = {"validation": 0.3, "patience": patience, "batch_size": 10, "backend": backend.name, **SCHEDULE}
    net, history = train(tmp_path / "m", schedule=Halved(1), retreats=2, **settings)
    assert history.retreats == [8]
    assert history.best_epoch == (patience and 1 + int(np.argmin(history.validation_cost)))
    np.testing.assert_array_equal(checkpoint.read(tmp_path / "m", "numpy").net.theta, to_host(net.theta))


@pytest.mark.parametrize("watched", [False, True], ids=["", "watched"])
@pytest.mark.parametrize("at", [2, 3, 4])
def test_after_a_divergence_the_file_can_be_read_and_no_callback_saw_that_step(backend, tmp_path, watched, at):
    odd, seen = X.copy(), []
    order, ends = epoch_plan("shuffled", 50, 14, 0, 1)
    odd[order[ends[at - 1]]] = 1e30

    class Watch:
        each_step = watched

        def on_step(self, run):
            seen.append(run.step)

    with pytest.raises(bp.DivergenceError) as e:
        train(tmp_path / "m", data=(odd, X[:, :3]), callbacks=[Watch()], backend=backend.name, **SCHEDULE)
    assert e.value.step == at
    run = checkpoint.read(tmp_path / "m", "numpy").run
    assert run.step == at - 1 >= run.put_off
    assert not watched or seen == list(range(1, at))


def test_steps_that_were_put_off_are_counted_on(tmp_path, monkeypatch):
    """Where there are many, the rest of the epoch is taken one by one."""
    odd = X.copy()
    order, ends = epoch_plan("shuffled", 50, 14, 0, 1)
    odd[order[[ends[1], ends[3]]]] *= 1e7
    with fake_cupy.installed():
        found = []
        for first in (3, 4):
            cut(tmp_path / str(first), first, data=(odd, T), backend="cupy")
        found.append(checkpoint.read(tmp_path / "3", "numpy").run.put_off)
        with pytest.raises(Cut):
            train(tmp_path / "3", data=(odd, T), backend="cupy", resume=True, callbacks=[CutAfter(4)])
        found += [checkpoint.read(tmp_path / name, "numpy").run.put_off for name in "34"]
        launches = []
        for many in (2, 1):
            monkeypatch.setattr(executors, "MANY", many)
            cut(tmp_path / str(many), 2, data=(odd, T), backend="cupy", epochs=1)
            before = fake_cupy.Counts.graph_launches
            train(tmp_path / str(many), data=(odd, T), backend="cupy", epochs=1, resume=True)
            launches.append(fake_cupy.Counts.graph_launches - before)
    assert found == [1, 2, 2]
    assert launches[1] == 0 < launches[0]


@pytest.mark.parametrize("truth", [np.True_, 1, "yes"])
def test_a_run_may_be_stopped_by_any_truth(tmp_path, truth):
    class Stop:
        def on_step(self, run):
            if run.step == 2:
                run.stop = truth
            if run.step == 3:
                raise Cut

    with pytest.raises(Cut):
        train(tmp_path / "m", callbacks=[Stop()])
    assert checkpoint.read(tmp_path / "m", "numpy").run.stop is True
    assert train(tmp_path / "m", resume=True)[1].stopped == "callback"


def test_what_a_run_would_go_back_to_is_whole_or_that_of_before(tmp_path, monkeypatch):
    plain = loop.Loop._keep_start

    def without_memory(self):
        class Bad:
            def copy(self):
                raise MemoryError("no copy")

        slots = self.executor.slots
        if self._closed:
            self.executor.slots = slots[0], Bad()
        try:
            plain(self)
        finally:
            self.executor.slots = slots

    settings = {"retreats": 1, "optimizer": bp.Adam(0.05)}
    train(tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_keep_start", without_memory)
        with pytest.raises(MemoryError, match="no copy"):
            train(tmp_path / "m", **settings)
    train(tmp_path / "m", resume=True, **settings)
    assert contents(tmp_path / "m") == contents(tmp_path / "whole")


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    def meddle(run):
        if run.epoch == 3:
            run.history.train_cost[0] = None

    with pytest.raises(bp.CheckpointError, match="could not be read again: the run's history lacks a column") as e:
        train(tmp_path / "m", callbacks=[meddle], checkpoint_every="1 epoch")
    assert e.value.__notes__ == [f"{tmp_path / 'm'} holds the run after step 8"]
    assert checkpoint.read(tmp_path / "m", "numpy").run.step == 8


def test_more_epochs_than_a_file_may_tell(tmp_path):
    with pytest.raises(bp.ConfigError, match="epochs is 1152921504606846976"):
        train(tmp_path / "m", epochs=2**60)


def test_memory_that_is_missing_while_a_checkpoint_is_made_is_like_a_full_disk(tmp_path, monkeypatch):
    plain, failed = loop.Loop.state, []

    def sometimes(self):
        if self.run.step == 6:
            failed.append(True)
            raise MemoryError
        return plain(self)

    monkeypatch.setattr(loop.Loop, "state", sometimes)
    with pytest.warns(UserWarning, match=r"no checkpoint: .*m is not written: out of memory; the run goes on"):
        train(tmp_path / "m", checkpoint_every="3 steps", on_checkpoint_error="warn")
    assert failed
    with pytest.raises(bp.CheckpointError, match="is not written: out of memory"):
        train(tmp_path / "m", checkpoint_every="3 steps")


@pytest.mark.parametrize("before", [True, False], ids=["before a new step", "after some"])
def test_a_run_that_is_given_more_epochs_and_cut_again(tmp_path, before):
    """The file's learning rate is one of the shorter run."""
    settings = {"schedule": "cosine", "batch_size": "full"}
    for name in ("straight", "m"):
        cut(tmp_path / name, 2, **settings)
    train(tmp_path / "straight", resume=True, **{**settings, "epochs": 7})

    class Late:
        def __call__(self, run):
            if run.epoch == (2 if before else 4):
                raise Cut

    with pytest.raises(Cut):
        train(tmp_path / "m", resume=True, callbacks=[Late()], checkpoint_every="1 epoch", **{**settings, "epochs": 7})
    train(tmp_path / "m", resume=True, **{**settings, "epochs": 7})
    assert contents(tmp_path / "m") == contents(tmp_path / "straight")
    with pytest.raises(bp.ConfigError, match="epochs is 6, not 7"):
        train(tmp_path / "m", resume=True, **{**settings, "epochs": 6})


def test_more_epochs_a_retreat_and_the_same_step_again(tmp_path):
    """The learning rate of a step is that of the run that took it last."""

    class AfterARetreat(CutAfter):
        def on_step(self, run):
            if run.history.retreats:
                super().on_step(run)

    class Burst:
        """Falling to 0 in the end, as long as nothing diverges in the eighth step."""

        def __init__(self, times=0):
            self.times = times

        def __call__(self, step, total):
            if step == 6 and self.times:
                self.times -= 1
                return 1e30
            return 1 - step / total

    settings = {**SCHEDULE, "retreats": 2}
    cut(tmp_path / "m", 6, schedule=Burst(), **settings)
    with pytest.warns(UserWarning, match="training diverged"), pytest.raises(Cut):
        train(tmp_path / "m", resume=True, epochs=6, schedule=Burst(1), callbacks=[AfterARetreat(6)], **settings)
    assert checkpoint.read(tmp_path / "m", "numpy").run.lr_epochs == 6
    train(tmp_path / "m", resume=True, epochs=6, schedule=Burst(), **settings)


# ------------------------------------------------------------------------------------- who raised it, and what is told


@pytest.mark.parametrize("error", [bp.CheckpointError("mine", "oh"), bp.DivergenceError(1, 2, 0.1, None)], ids=repr)
@pytest.mark.parametrize("every_step", [True, False])
def test_errors_of_callbacks_are_never_taken_for_those_of_the_run(tmp_path, error, every_step):
    class Fails:
        def on_step(self, run):
            if every_step and run.step == 7:
                raise error

        def __call__(self, run):
            if run.epoch == 2:
                raise error

    cut(tmp_path / "m", 5)
    with pytest.raises(type(error)) as e:
        train(tmp_path / "m", resume=True, callbacks=[Fails()], retreats=0)
    assert e.value is error
    step = 7 if every_step else 8
    assert error.__notes__[-1] == f"{tmp_path / 'm'} holds the run after step {step}"
    assert checkpoint.read(tmp_path / "m", "numpy").run.step == step
    del error.__notes__
    with pytest.raises(type(error)):
        train(tmp_path / "n", callbacks=[Fails()], retreats=3)
    assert checkpoint.read(tmp_path / "n", "numpy").run.retreats == []
    del error.__notes__


@pytest.mark.parametrize("saved", [True, False])
def test_where_an_error_ends_it_the_network_is_at_the_step_that_is_told(tmp_path, saved):
    """Also where a graph has put off a step that is out of the ordinary, and nobody has waited for it."""
    odd, seen = X.copy(), Thetas()
    order, ends = epoch_plan("shuffled", 50, 8, 0, 1)
    odd[order[ends[1]]] *= 1e7

    class Fails:
        each_step = False

        def on_step(self, run):
            if run.step >= 3:
                raise KeyError(run.step)

    with fake_cupy.installed():
        train(tmp_path / "whole", data=(odd, T), backend="cupy", batch_size=8, callbacks=[seen], epochs=1)
        net = bp.Network([4, 6, 3], seed=3, backend="cupy")
        with pytest.raises(KeyError) as e:
            bp.train(
                net, odd, T, optimizer="adam", epochs=1, batch_size=8, callbacks=[Fails()],
                save=tmp_path / "m" if saved else None,
            )  # fmt: skip
        np.testing.assert_array_equal(to_host(net.theta), seen.thetas[e.value.args[0] - 1])
    assert f"after step {e.value.args[0]}; the network is at that whole step" in e.value.__notes__[0]


@pytest.mark.parametrize("every", [None, "3 steps"])
def test_a_callbacks_error_and_a_divergence_that_nobody_has_waited_for(tmp_path, every):
    """A file from before the divergence is better than one of the step before it."""
    odd = X.copy()
    order, ends = epoch_plan("shuffled", 50, 8, 0, 1)
    odd[order[ends[4]]] = 1e30

    class Fails:
        each_step = False

        def on_step(self, run):
            if run.step > 5:
                raise KeyError("mine")

    with fake_cupy.installed(), pytest.raises(KeyError) as e:
        train(
            tmp_path / "m", data=(odd, X[:, :3]), callbacks=[Fails()], backend="cupy", batch_size=8,
            checkpoint_every=every, **SCHEDULE,
        )  # fmt: skip
    step = 3 if every else 4
    assert "training diverged in epoch 1, step 5" in e.value.__notes__[-2]
    assert e.value.__notes__[-1] == f"{tmp_path / 'm'} holds the run after step {step}"
    assert checkpoint.read(tmp_path / "m", "numpy").run.step == step


def test_nothing_is_said_of_a_file_that_is_not_there_any_more(tmp_path):
    """It is written again, and where that cannot be, nobody is told that it is there."""

    class Removes:
        def __init__(self, content=None):
            self.content = content

        def on_step(self, run):
            if run.step == 5:
                (tmp_path / "m").unlink()
                if self.content:
                    (tmp_path / "m").write_bytes(self.content)
                raise KeyError("oh")

    with pytest.raises(KeyError) as e:
        train(tmp_path / "m", checkpoint_every="1 step", callbacks=[Removes()])
    assert e.value.__notes__[-1] == f"{tmp_path / 'm'} holds the run after step 5"
    assert checkpoint.read(tmp_path / "m", "numpy").run.step == 5
    (tmp_path / "m").unlink()
    with pytest.raises(KeyError) as e:
        train(tmp_path / "m", checkpoint_every="1 step", callbacks=[Removes(b"precious")])
    assert "the run could not be saved: " in e.value.__notes__[-1]
    assert (tmp_path / "m").read_bytes() == b"precious"


def test_a_file_that_goes_before_a_signal_at_the_same_step_is_written_again(tmp_path, monkeypatch):
    plain = Checkpoints.write

    def gone(self, *args):
        plain(self, *args)
        if not args[-1]:
            (tmp_path / "m").unlink()
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Checkpoints, "write", gone)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "m", checkpoint_every="6 steps")
    assert checkpoint.read(tmp_path / "m", "numpy").run.step == 6


def test_a_terminal_that_hangs_up_twice_is_one_that_hangs_up_once(tmp_path, monkeypatch):
    """A shell and the kernel each send it, within one step."""
    calls, plain, steps = [], executors.Eager._update, []

    def handler(number, frame):
        calls.append(number)
        raise Cut

    def update(self, *args):
        steps.append(args)
        for _ in range(3 if len(steps) == 5 else 0):
            os.kill(os.getpid(), signal.SIGHUP)
        return plain(self, *args)

    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", "eager")
    monkeypatch.setattr(executors.Eager, "_update", update)
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with pytest.raises(Cut):
            train(tmp_path / "m")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert calls == [signal.SIGHUP]
    assert checkpoint.read(tmp_path / "m", "numpy").run.step == 5


def test_a_programs_own_handler_finds_the_network_at_the_step_that_is_told(tmp_path):
    """One that goes on: also where a graph has put off steps that nobody has waited for."""
    odd, seen, found = X.copy(), Thetas(), []
    order, ends = epoch_plan("shuffled", 50, 8, 0, 1)
    odd[order[ends[1]]] *= 1e7

    class Signals:
        each_step = False

        def on_step(self, run):
            self.run = run
            if run.step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    with fake_cupy.installed():
        train(tmp_path / "whole", data=(odd, T), backend="cupy", batch_size=8, callbacks=[seen], epochs=1)
        net, signals = bp.Network([4, 6, 3], seed=3, backend="cupy"), Signals()
        before = signal.signal(signal.SIGTERM, lambda *_: found.append((signals.run.step, to_host(net.theta).copy())))
        try:
            bp.train(net, odd, T, optimizer="adam", epochs=1, batch_size=8, callbacks=[signals])
        finally:
            signal.signal(signal.SIGTERM, before)
    ((step, theta),) = found
    assert step == 4
    np.testing.assert_array_equal(theta, seen.thetas[3])


def test_a_directory_that_cannot_be_flushed_holds_the_run_nevertheless(tmp_path, monkeypatch):
    def fails(target):
        raise bp.CheckpointError("cannot be flushed", "check the disk", 5)

    monkeypatch.setattr(files, "_flush", fails)
    with pytest.raises(bp.CheckpointError, match="cannot be flushed") as e:
        train(tmp_path / "m", checkpoint_every="5 steps")
    assert e.value.__notes__ == [f"{tmp_path / 'm'} holds the run after step 5"]
    with pytest.warns(UserWarning, match="no checkpoint of step 5: cannot be flushed"), pytest.raises(KeyError) as e:
        train(
            tmp_path / "n", checkpoint_every="5 steps", on_checkpoint_error="warn",
            callbacks=[lambda run: {}["oh"] if run.epoch == 2 else None],
        )  # fmt: skip
    assert e.value.__notes__[-1] == f"{tmp_path / 'n'} holds the run after step 8"


def test_a_second_signal_only_while_saving_saves_nothing_else(tmp_path, monkeypatch):
    cut(tmp_path / "m", 2)
    before, plain, times = (tmp_path / "m").read_bytes(), os.replace, []

    def twice(*args):
        times.append(1)
        if len(times) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        plain(*args)

    monkeypatch.setattr(os, "replace", twice)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "m", resume=True, checkpoint_every="3 steps")
    assert (tmp_path / "m").read_bytes() == before


@pytest.mark.filterwarnings("error:training diverged")
def test_a_warning_of_a_retreat_that_is_an_error_finds_the_run_at_a_whole_step(backend, tmp_path):
    """Nothing is left of the step that diverged, whether a graph took it or not."""
    where = {"backend": backend.name, **SCHEDULE}
    train(tmp_path / "whole", epochs=1, **where)
    with pytest.raises(UserWarning, match="training diverged"):
        train(tmp_path / "m", schedule=Halved(1), retreats=3, **where)
    found = checkpoint.read(tmp_path / "m", "numpy")
    assert (found.run.step, found.run.retreats) == (4, [8])
    np.testing.assert_array_equal(found.net.theta, checkpoint.read(tmp_path / "whole", "numpy").net.theta)
    net = bp.Network([4, 6, 3], output="identity", seed=3, backend=backend.name)
    before = to_host(net.theta).copy()
    with pytest.raises(UserWarning, match=r"training diverged in epoch 1, step [2-9]"):
        bp.train(net, X * 1e3, X[:, :3], "squared_error", bp.SGD(0.1), batch_size=7, retreats=3)
    np.testing.assert_array_equal(to_host(net.theta), before)


@pytest.mark.parametrize("path", [3, None, b"m"])
def test_what_is_no_path_is_no_file(path):
    for call in (lambda: bp.load(path, "numpy"), lambda: bp.save(bp.Network([2, 2], backend="numpy"), path)):
        with pytest.raises(bp.CheckpointError) as e:
            call()
        assert len(str(e.value).splitlines()) == 2
