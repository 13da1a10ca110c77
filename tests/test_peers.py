"""The comparison with other libraries: what it computes, what it rejects, in which turn it times, what it refuses."""

import importlib
import json
import math
import os
import sys

import formulas
import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu import bench
from benchmarks import gpu_recipe, peer_programs, peers, record
from benchmarks.peer_programs import Cell

SMALL = [Cell((784, 16, 10), 32, optimizer) for optimizer in ("sgd", "adam")]
BOTH = pytest.mark.parametrize("cell", SMALL, ids=lambda cell: cell.optimizer)

# ---------------------------------------------------------------------------------------------------- the reference


@BOTH
def test_the_reference_trains_as_the_engine_does_in_float64(cell):
    X, y = gpu_recipe.data()
    net = bp.Network(list(cell.layers), seed=0, precision="float64")
    for l in (1, 2):
        net.W[l][...] = cell.initial()[2 * l - 2]
    rule = peer_programs.our_rule(cell)
    with bench.Stepping(net, X, y, rule, cell.m, order=list(cell.order(20))) as steps:
        steps.run(20)
        np.testing.assert_allclose(peer_programs.reference(cell), steps.losses, rtol=1e-9)


def test_the_reference_of_adam_is_that_of_the_gpu_benchmarks():
    losses, _ = gpu_recipe.reference(SMALL[1].recipe, 5)
    assert peer_programs.reference(SMALL[1], 5) == losses


def test_the_first_loss_is_the_formula():
    cell = SMALL[0]
    X, y = gpu_recipe.data()
    rows = cell.order(1)[0][:3]
    W1, b1, W2, b2 = (P.astype(np.float64) for P in cell.initial())
    costs = []
    for x, label in zip(X[rows] / 255, y[rows], strict=True):
        A = [max(0.0, math.fsum(w * x) + b) for w, b in zip(W1, b1, strict=True)]
        Z = [math.fsum(w * A) + b for w, b in zip(W2, b2, strict=True)]
        costs.append(formulas.cost("cross_entropy", "softmax", Z, np.eye(10)[label]))
    loss, _ = gpu_recipe.loss_and_gradient([W1, b1, W2, b2], X[rows] / 255, y[rows])
    assert loss == pytest.approx(math.fsum(costs) / 3, rel=1e-12)


def test_early_epsilon_is_added_before_the_bias_is_taken_out():
    theta, g, first, second = ([np.array([value])] for value in (1.0, 1e-7, 0.0, 0.0))
    peer_programs.early_epsilon_adam(theta, g, first, second, 1)
    v, s = 0.1 * 1e-7, 0.001 * 1e-14
    assert theta[0][0] == pytest.approx(1 - 1e-3 * math.sqrt(0.001) / 0.1 * v / (math.sqrt(s) + 1e-8), rel=1e-14)
    plain = [np.array([1.0])]
    gpu_recipe.adam(plain, g, [np.zeros(1)], [np.zeros(1)], 1)
    assert abs(plain[0][0] - theta[0][0]) > 1e-4  # it makes a difference


# ----------------------------------------------------------------------------------------------------- the programs

PROGRAMS = [
    (kind, program)
    for kind, of in peers.KINDS.items()
    for program in of.programs
    if program not in ("floor", "compiled")
]


@BOTH
@pytest.mark.parametrize(("kind", "program"), PROGRAMS, ids=[f"{kind}-{program}" for kind, program in PROGRAMS])
def test_every_program_follows_the_reference_in_every_setting(monkeypatch, kind, program, cell):
    pytest.importorskip(peers.KINDS[kind].needs, exc_type=ImportError)
    for name, value in peers.KINDS[kind].environment.items():
        monkeypatch.setenv(name, value)
    library = peers.KINDS[kind].serves()
    exact = peer_programs.reference(cell, early_epsilon=peers.KINDS[kind].early_epsilon)
    choices = library.choices(program)
    start = {name: values[0] for name, values in choices.items()}
    settings = [start, *({**start, name: v} for name, values in choices.items() for v in values[1:])]
    for setting in settings:
        training = library.build(program, cell, setting)
        first = training.first_losses()
        assert "rejected" not in peer_programs.strayed(first, exact), setting
        assert training.first_losses() == pytest.approx(first, rel=1e-5)  # reset is thorough


def test_scikit_learn_takes_all_its_steps_when_it_is_timed():
    pytest.importorskip("sklearn")
    cell = SMALL[0]
    training = peers.KINDS["sklearn"].serves().build("partial_fit", cell, {})
    training.reset()
    for _ in range(40):  # more than the data holds
        training.run()
        assert training.model.shuffle
        assert training.at % (training.steps * cell.m) == 0
    assert training.model.loss_ < 0.5


@pytest.mark.parametrize(("kind", "fast"), [("fast", "0"), ("numpy", "1")])
def test_no_row_goes_by_a_name_that_is_not_its_own(monkeypatch, kind, fast):
    if fast == "1":
        pytest.importorskip("numba")
    monkeypatch.setenv("BACKPROP_GPU_FAST", fast)
    with pytest.raises(RuntimeError, match=f"BACKPROP_GPU_FAST is not {1 - int(fast)}"):
        peers.KINDS[kind].serves().build(kind, SMALL[0], {})


def test_the_floor_is_run_as_often_as_a_run_has_steps():
    training = peers.KINDS["numpy"].serves().build("floor", SMALL[0], {})
    count = []
    training.floor.run = lambda: count.append(1)
    training.run()
    assert len(count) == training.steps == SMALL[0].chunk
    assert training.first_losses() == []


# ------------------------------------------------------------------------------------------------------- rejection


def test_momentum_of_another_size_is_rejected(monkeypatch):
    cell = SMALL[0]
    exact = peer_programs.reference(cell)
    training = peer_programs.TutorialTraining(cell, "float32")
    assert "rejected" not in peer_programs.strayed(training.first_losses(), exact)
    monkeypatch.setattr(peer_programs, "MOMENTUM", 0.8)
    off = [abs(mine / wanted - 1) for mine, wanted in zip(training.first_losses(), exact, strict=True)]
    at = next(i for i, error in enumerate(off) if error > peer_programs.LOSS_LIMIT)
    assert 2 <= at < 8  # the first two losses know no momentum
    found = peer_programs.strayed(training.first_losses(), exact)
    assert found["rejected"] == f"loss {at + 1} off by {off[at]:.2g}"
    assert found["loss_error"] > 10 * peer_programs.LOSS_LIMIT


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        ([2.0, 1.0], None),
        ([2.0, 1.0005], None),
        ([2.0, 1.01], "loss 2 off by 0.01"),
        ([math.nan, 1.0], "loss 1 off by nan"),
        ([2.0], "1 losses, not 2"),
        ([2.0, 1.0, 7.0], None),  # only so many are compared
    ],
)
def test_strayed(losses, why):
    assert peer_programs.strayed(losses, [2.0, 1.0]).get("rejected") == why
    json.dumps(peer_programs.strayed(losses, [2.0, 1.0]), allow_nan=False)


class InProcess:
    """Stands in for a worker's process: the same server, here; `seconds` are those of the programs, by kind."""

    seconds = None
    wrong = ()

    def __init__(self, kind, threads, cpus):
        self.kind, self.threads, self.cpus, self.process, self.hello = kind, threads, cpus, None, {}

    def start(self):
        pass

    end = close = start

    def ask(self, do, seconds=0, **order):
        if do == "drop":
            return {}
        if do == "time":
            assert self.kind not in self.wrong
            return {"seconds": self.seconds[self.kind] * order["runs"] * 8}
        cell = Cell.of(order["cell"])
        losses = peer_programs.reference(cell)
        if self.kind in self.wrong:
            losses[7] *= 1.01
        us = 1e6 * self.seconds[self.kind] * (1 + 0.1 * self.threads)
        setting = {"data": "uint8"}
        return {
            "setting": setting, "us": us, "steps": 8, "losses": losses, "tried": [[setting, us]], "failed": [],
        }  # fmt: skip


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(peers, "Worker", InProcess)
    monkeypatch.setattr(peers, "REST", 0)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "numba" else "there")
    monkeypatch.setattr(InProcess, "seconds", {"numpy": 2e-3, "textbook": 1e-3, "sklearn": 3e-3})


def compared(kinds, **more):
    with peers.Comparison(kinds, [0, 1], 3, **more) as comparison:
        return {(row["library"], row["program"]): row for row in comparison.cell(SMALL[0])}


def test_the_rows_of_a_cell(in_process):
    rows = compared(["numpy", "fast", "textbook", "sklearn"])
    assert rows["backprop_gpu", "fast"]["error"] == "not installed: numba"
    ours, tutorial = rows["backprop_gpu", "numpy"], rows["textbook", "textbook"]
    assert ours["us"] == pytest.approx(2000)
    assert ours["threads"] == 1  # the quicker number
    assert len(ours["tuning"]) == 2
    assert ours["floor_share"] == pytest.approx(1)  # here the floor takes as long
    assert rows["backprop_gpu", "floor"]["threads"] == 2
    assert tutorial["ratio"] == pytest.approx(0.5)
    assert tutorial["n"] == len(tutorial["times_us"]) == 3
    assert "ratio_fast" not in tutorial
    found = peers.summary(rows.values())["numpy"]
    assert found["cells"] == {
        SMALL[0].name: {"library": "textbook", "program": "textbook", "ratio": pytest.approx(0.5)}
    }
    assert found["lost"] == [SMALL[0].name]


def test_what_is_wrong_is_told_and_neither_timed_nor_counted(in_process, monkeypatch):
    monkeypatch.setattr(InProcess, "wrong", ("textbook",))
    rows = compared(["numpy", "textbook", "sklearn"])
    tutorial = rows["textbook", "textbook"]
    assert tutorial["rejected"] == "loss 8 off by 0.01"
    assert not {"us", "times_us", "ratio"} & set(tutorial)
    assert "REJECTED: loss 8 off by 0.01" in peers.line(tutorial)
    best = peers.summary(rows.values())["numpy"]["cells"][SMALL[0].name]
    assert (best["library"], best["ratio"]) == ("sklearn", pytest.approx(1.5))


def test_a_quick_look_leaves_out_what_compiles_for_long(in_process, monkeypatch):
    monkeypatch.setattr(InProcess, "seconds", {"numpy": 1.0, "torch": 1.0, "jax": 1.0})
    assert {program for _, program in compared(["torch", "jax"], quick=True)} == {"eager", "scan"}


def test_one_thread_is_not_tried_for_large_steps_nor_for_the_floor(in_process):
    comparison = peers.Comparison(["numpy"], [0, 1], 1)
    assert comparison.threads("numpy", Cell.of("784-100-10/128/sgd")) == [1, 2]
    assert comparison.threads("numpy", Cell.of("784-512-512-10/1024/sgd")) == [2]
    assert comparison.threads("floor", Cell.of("784-100-10/128/sgd")) == [2]


# ------------------------------------------------------------------------------------------------ turns and ratios


def test_programs_are_timed_in_turn_and_every_other_time_backwards():
    calls, rests = [], []
    times, failed = peers.interleaved(
        "abc", lambda name: calls.append(name) or len(calls), 3, lambda: rests.append(len(calls))
    )
    assert "".join(calls) == "abccbaabc"
    assert rests == list(range(9))
    assert times == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}
    assert failed == {}


def test_a_program_that_fails_on_its_way_has_no_times_and_stops_nobody():
    calls = []

    def clock(name):
        calls.append(name)
        if name == "b" and calls.count("b") == 2:
            raise peers.WorkerError("no answer")
        return 1.0

    times, failed = peers.interleaved("abc", clock, 3, lambda: None)
    assert "".join(calls) == "abccbaac"
    assert times == {"a": [1.0] * 3, "c": [1.0] * 3}
    assert failed == {"b": "no answer"}


def test_ratios_are_within_a_repetition():
    drifting = [1.0, 2.0, 4.0, 8.0]  # the machine slows down for all
    assert peers.ratios([3 * t for t in drifting], drifting) == {"ratio": 3.0, "spread": 0.0}
    assert peers.ratios([1.0, 2.0, 9.0], [1.0, 1.0, 1.0])["ratio"] == 2.0


def test_the_summary_takes_the_quickest_peer_of_each_cell():
    def row(cell, library, program, us, **more):
        return {"cell": {"name": cell}, "library": library, "program": program, "us": us, "times_us": [us], **more}

    rows = [
        row("A", "backprop_gpu", "numpy", 10.0, floor_share=0.25),
        row("A", "torch", "eager", 40.0, ratio=4.0),
        row("A", "jax", "scan", 20.0, ratio=2.0, ratio_fast=5.0),
        row("B", "backprop_gpu", "numpy", 10.0, floor_share=1.0),
        row("B", "torch", "eager", 5.0, ratio=0.5),
        {"cell": {"name": "B"}, "library": "jax", "program": "scan", "rejected": "loss 1 off by 1"},
    ]
    found = peers.summary(rows)
    assert found["numpy"]["geometric_mean"] == pytest.approx(1.0)
    assert found["numpy"]["lost"] == ["B"]
    assert found["numpy"]["floor_share"] == pytest.approx(0.5)
    assert found["fast"]["geometric_mean"] == pytest.approx(5.0)
    assert found["fast"]["floor_share"] is None
    assert peers.summary_lines(found)[:2] == [
        "numpy: the best peer takes 1.00 x ours, geometric mean of 2 cells; the floor is 50 % of ours",
        "  where we lose: B",
    ]
    assert peers.geometric_mean([]) is None


# --------------------------------------------------------------------------------------------------------- tuning


class Timed(peer_programs.Training):
    """Takes, on a clock of its own, what its setting says."""

    steps = 4

    def __init__(self, now, a, b):
        if (a, b) == (2, 0):
            raise ValueError("no such setting")
        self.now, self.seconds = now, {1: 0.4, 3: 0.2}[a] + {0: 0.4, 1: 0.0}[b]

    def reset(self):
        pass

    def run(self):
        self.now[0] += self.seconds


def test_tuning_takes_the_quickest_setting_and_tells_what_failed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(peers.time, "perf_counter", lambda: now[0])
    build = lambda setting: Timed(now, **setting)  # noqa: E731
    best, tried, failed = peers.tuned(build, peer_programs.Choices(a=(1, 2, 3), b=(0, 1)))
    assert best[1] == {"a": 3, "b": 1}
    assert [setting for setting, _ in tried] == [{"a": 1, "b": 0}, {"a": 3, "b": 0}, {"a": 3, "b": 1}]
    assert [us for _, us in tried] == pytest.approx([200_000, 150_000, 50_000])
    assert failed == ["ValueError: no such setting"]
    best, _, failed = peers.tuned(build, peer_programs.Choices(a=(2,), b=(0,)))
    assert best is None
    assert failed == ["ValueError: no such setting"]


def test_the_clock_counts_the_runs_and_neither_the_reset_nor_the_first(monkeypatch):
    now, done = [0.0], []
    monkeypatch.setattr(peers.time, "perf_counter", lambda: now[0])
    training = Timed(now, 1, 0)
    training.reset = lambda: done.append("reset")
    training.wait = lambda: done.append("wait")
    assert peers.clocked(training, 3) == pytest.approx(3 * 0.8)
    assert done == ["reset", "wait", "wait"]


# -------------------------------------------------------------------------------------------------------- workers


def test_a_worker_answers_through_a_pipe_that_prints_do_not_disturb(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    before = record.affinity()
    worker = peers.Worker("textbook", 1, before)
    try:
        answer = worker.ask("tune", program="textbook", cell=SMALL[0].name, quick=True, like={"data": "uint8"})
        assert len(answer["tried"]) == 1
        assert answer["setting"] == {"data": "uint8"}
        assert "rejected" not in peer_programs.strayed(answer["losses"], peer_programs.reference(SMALL[0]))
        assert worker.ask("time", program="textbook", runs=1)["seconds"] > 0
        with pytest.raises(peers.WorkerError, match="KeyError"):
            worker.ask("time", program="another", runs=1)
        if hasattr(os, "sched_setaffinity"):
            assert worker.hello["affinity"] == before[:1]
        assert record.affinity() == before
    finally:
        worker.close()


HELLO = "import sys, time, os; print('{}', flush=True); sys.stdin.readline(); "


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (HELLO + "time.sleep(60)", "no answer within 1 s"),
        (HELLO + "sys.exit('killed by its library')", "its process ended with code 1: killed by its library"),
        ("import os; os._exit(3)", "its process ended with code 3"),
        ('print(\'{"error": "ImportError: no such"}\', flush=True); input()', "ImportError: no such"),
    ],
)
def test_a_worker_that_fails_or_hangs_is_told_and_not_asked_for_ever(script, why):
    worker = peers.Worker("textbook", 1, record.affinity(), [sys.executable, "-c", script])
    try:
        with pytest.raises(peers.WorkerError) as raised:
            worker.ask("time", seconds=1, program="textbook", runs=1)
        assert str(raised.value) == why
        worker.end()
        worker.deaths = 2
        with pytest.raises(peers.WorkerError, match="ended twice"):
            worker.ask("time", seconds=1, program="textbook", runs=1)
    finally:
        worker.close()


# ---------------------------------------------------------------------------------------------------- the command


def test_the_cells_are_twelve_and_read_as_they_are_written():
    assert len(set(peers.CELLS)) == 12
    assert [Cell.of(cell.name) for cell in peers.CELLS] == peers.CELLS
    assert set(peers.QUICK) < set(peers.CELLS)
    for cell in peers.CELLS:
        assert cell.pool % cell.scan == cell.scan % cell.chunk == 0
        assert cell.pool * cell.m <= 60_000 or cell.pool == cell.scan
    for text in ("784-10", "784-10/32/lion", "a/32/adam"):
        with pytest.raises(ValueError):
            Cell.of(text)


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--repetitions", "0"], ["--libraries", "theano"]])
def test_flags_that_make_no_sense_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        peers.parsed(arguments)
    assert raised.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_record_has_rows_settings_and_conditions(in_process, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(record, "conditions", lambda unset: {"date": "now", "unset": list(unset)})
    monkeypatch.setattr(record, "refuse_if_loaded", lambda anyway: None)
    out = tmp_path / "peers.json"
    arguments = ["--cells", *(cell.name for cell in SMALL), "--libraries", "numpy", "textbook"]
    assert peers.main([*arguments, "--repetitions", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["kind"] == "peers"
    assert found["conditions"]["unset"] == ["OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"]
    assert [row["cell"]["optimizer"] for row in found["rows"]] == ["sgd"] * 3 + ["adam"] * 3
    assert all(len(row["times_us"]) == 2 for row in found["rows"])
    assert found["summary"]["numpy"]["geometric_mean"] == pytest.approx(0.5)
    assert "numpy: the best peer takes 0.50 x ours" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- the record


@pytest.fixture
def stat(monkeypatch, tmp_path):
    """A /proc/stat of which the share that is not idle, while it is watched, can be said."""
    file = tmp_path / "stat"
    monkeypatch.setattr(record, "PROC_STAT", file)

    def passing(share):
        file.write_text("cpu  1000 0 500 9000 100 0 0 0 0 0\ncpu0 1 2 3 4\n")
        after = f"cpu  {1000 + round(100 * share)} 0 500 {9000 + round(100 * (1 - share))} 100 0 0 0 0 0\n"
        monkeypatch.setattr(record.busy, "__defaults__", (0.5, lambda seconds: file.write_text(after)))

    return passing


def test_a_loaded_machine_is_refused_unless_told_otherwise(stat):
    stat(0.25)
    assert record.busy() == pytest.approx(0.25)
    stat(0.25)
    with pytest.raises(record.LoadedError) as raised:
        record.refuse_if_loaded()
    cause, cure = str(raised.value).split("\n")
    assert cause == "this machine is busy: 25 % of its CPU time goes to other work"
    assert "--anyway" in cure
    record.refuse_if_loaded(anyway=True)


def test_an_idle_machine_is_not_refused(stat):
    stat(0.05)
    record.refuse_if_loaded()


def test_waiting_for_disks_is_idle_and_theft_is_not(monkeypatch, tmp_path):
    file = tmp_path / "stat"
    monkeypatch.setattr(record, "PROC_STAT", file)
    file.write_text("cpu  0 0 0 0 0 0 0 0 0 0\n")
    assert record.busy(0, lambda _: file.write_text("cpu  0 0 0 50 25 0 0 25 9 9\n")) == pytest.approx(0.25)


def test_without_a_count_the_load_average_is_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "PROC_STAT", tmp_path / "none")
    monkeypatch.setattr(record.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(record.os, "getloadavg", lambda: (2.0, 0, 0), raising=False)
    assert record.busy(0) is None
    with pytest.raises(record.LoadedError, match="50 %"):
        record.refuse_if_loaded()
    monkeypatch.delattr(record.os, "getloadavg")
    record.refuse_if_loaded()


def test_the_program_ends_with_1_on_a_loaded_machine(stat, capsys):
    stat(1.0)
    with pytest.raises(SystemExit) as raised:
        peers.main([])
    assert str(raised.value.code).startswith("this machine is busy")  # a text as code is printed, and 1 is returned


def test_one_interrupted_repetition_is_no_noise_and_a_wavering_machine_is():
    steady = record.summary([1.0, 1.01, 1.0, 0.99, 1.0, 1.02, 5.0])
    assert (steady["median"], steady["min"], steady["max"], steady["n"]) == (1.0, 0.99, 5.0, 7)
    assert steady["spread"] == pytest.approx(0.015)
    assert not steady["noisy"]
    assert steady["range"] == pytest.approx(4.01)
    assert record.summary([1.0, 1.2, 1.0, 1.2, 1.0, 1.2])["noisy"]
    alone = record.summary([3.0])
    assert (alone["median"], alone["spread"], alone["noisy"]) == (3.0, 0, False)


def test_a_record_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "record.json"
    record.write(path, {"a": [1, 2]})
    assert path.read_text() == '{\n "a": [\n  1,\n  2\n ]\n}\n'
    with pytest.raises(TypeError):
        record.write(path, {"a": 1, "b": object()})
    assert json.loads(path.read_text()) == {"a": [1, 2]}
    assert list(tmp_path.iterdir()) == [path]


def test_conditions_tell_what_was_set_and_what_was_taken_out(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.delenv("OPENBLAS_L2_SIZE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(record, "busy", lambda: 0.0)
    found = record.conditions(record.UNSET)
    assert found["unset"] == {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_L2_SIZE": None}
    assert found["environment"]["OMP_NUM_THREADS"] == "1"
    assert found["doctor"]["blas"]["name"]
    assert found["versions"]["numpy"] == np.__version__
    assert found["affinity"] == record.affinity()
    assert {"date", "command", "commit", "dirty", "cpu", "cpus", "cpu_mhz", "load_before"} <= set(found)
    json.dumps(found)
    assert "OPENBLAS_CORETYPE" not in record.environment()
    assert record.environment(A="1")["A"] == "1"


def test_a_command_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert record.commit() == {"commit": None, "dirty": None}


def test_the_help_says_what_is_in_the_clock(capsys):
    with pytest.raises(SystemExit):
        peers.parsed(["--help"])
    assert "In the clock of a step" in capsys.readouterr().out
    assert importlib.import_module("benchmarks.peers") is peers
