"""The benchmarks' faces: README tables and plots from made-up records, and time to accuracy with made-up libraries."""

import io
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu.datasets import Dataset

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def benchmarks():
    """The modules under test, found where they are in a checkout."""
    before = sys.path[:]
    sys.path.insert(0, str(ROOT))
    try:
        import benchmarks.plots
        import benchmarks.report
        import benchmarks.time_to_accuracy

        return benchmarks
    finally:
        sys.path[:] = before


@pytest.fixture
def report(benchmarks):
    return benchmarks.report


@pytest.fixture
def to_accuracy(benchmarks):
    return benchmarks.time_to_accuracy


# ---------------------------------------------------------------------------------------------------------- tables

CONDITIONS = {
    "date": "2026-11-23T05:00:00+00:00", "command": "python -m benchmarks.peers", "cpu": "Abacus", "affinity": [0, 1],
    "versions": {"numpy": "2.4.6", "torch": "2.13.0", "numba": None},
}  # fmt: skip
SMALL = {"layers": [784, 100, 10], "m": 128, "optimizer": "sgd"}
WIDE = {"layers": [784, 512, 512, 10], "m": 1024, "optimizer": "adam"}


def timed(cell, library, program, times, **more):
    us = sorted(times)[len(times) // 2]
    return {
        "cell": cell, "library": library, "program": program, "us": us, "spread": 0.01, "noisy": False,
        "times_us": times, **more,
    }  # fmt: skip


def peers_record(**more):
    rows = [
        timed(SMALL, "backprop_gpu", "numpy", [100.0, 102.0, 101.0]),
        timed(SMALL, "backprop_gpu", "fast", [50.0, 51.0, 50.5]),
        timed(SMALL, "backprop_gpu", "floor", [40.0, 40.8, 40.4]),
        timed(SMALL, "torch", "eager", [200.0, 204.0, 202.0]),
        timed(SMALL, "torch", "compiled", [150.0, 153.0, 151.5], spread=0.2, noisy=True),
        {"cell": SMALL, "library": "jax", "program": "scan", "rejected": "losses off by 0.3"},
        timed(WIDE, "backprop_gpu", "numpy", [1000.0, 1000.0, 1000.0]),
        {"cell": WIDE, "library": "backprop_gpu", "program": "fast", "error": "not installed: numba"},
        timed(WIDE, "torch", "eager", [600.0, 600.0, 600.0]),
        timed(WIDE, "jax", "scan", [900.0, 900.0, 900.0]),
    ]
    return {"conditions": {**CONDITIONS, **more}, "rows": rows}


PEERS = """\
| network | batch | optimizer | ours, NumPy | ours, fast | PyTorch | JAX | best peer / ours | floor / ours |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| 784-100-10 | 128 | SGD | 101 | 50.5 | 152* |  | 1.50 / 3.00 | 40% / 80% |
| 784-512-512-10 | 1024 | Adam | 1000 |  | 600 | 900 | 0.60 |  |

Geometric mean of best peer / ours: **0.95** (NumPy), **3.00** (fast). Above 1 ours is quicker.
Microseconds a step; where two figures stand, NumPy alone / with `fast`; `*`: spread above 10 %.
Without a time: JAX, scan (rejected: losses off by 0.3) in 784-100-10 @ 128 SGD.
Without a time: ours, fast (error: not installed: numba) in 784-512-512-10 @ 1024 Adam.
Abacus, 2 cores; numpy 2.4.6, torch 2.13.0; 2026-11-23, n = 3; repeated by `python -m benchmarks.peers` \
([record](LINK)).

![samples a second over batch size](benchmarks/records/throughput.svg)
![share of the floor in every cell](benchmarks/records/floor.svg)"""


def test_the_table_of_peers(report):
    assert report.peers(peers_record(), "LINK") == PEERS


def test_a_rejected_row_is_in_no_ratio_even_with_times(report):
    record = peers_record()
    record["rows"].append(timed(SMALL, "jax", "jit", [1.0, 1.0, 1.0], rejected="losses off by 9"))
    text = report.peers(record, "LINK")
    assert "| 1.50 / 3.00 |" in text
    assert "JAX, jit (rejected: losses off by 9) in 784-100-10 @ 128 SGD." in text


def test_ratios_are_taken_within_a_repetition(report):
    fast, slow = timed(SMALL, "a", "a", [1.0, 10.0, 100.0]), timed(SMALL, "b", "b", [2.0, 20.0, 500.0])
    assert report.ratio(slow, fast) == 2


def test_a_row_that_fails_everywhere_is_told_once(report):
    cells = [SMALL, WIDE]
    record = {"rows": [{"cell": cell, "library": "jax", "program": "scan", "error": "hangs"} for cell in cells]}
    assert report.untimed(report.cells(record)) == ["Without a time: JAX, scan (error: hangs) in all cells."]


def accuracy_record():
    def row(library, program, median, **more):
        found = {"library": library, "program": program, "threads": 2, "min": median - 0.1, "max": median + 0.2}
        cold = {"n": 3, "failures": 0, "median": median + 1, "spread": 0.0}
        return {**found, "median": median, "spread": 0.01, "n": 20, "failures": 0, "cold": cold, **more}

    never = {"n": 3, "failures": 3}
    return {
        "conditions": {**CONDITIONS, "command": "python -m benchmarks.time_to_accuracy"},
        "goal": 0.98,
        "recipe": {"layers": [784, 256, 10], "batch_size": 125, "optimizer": "Adam", "rates": [0.002, 0.001]},
        "rows": [
            row("backprop_gpu", "NumPy alone", 4.0),
            {"library": "backprop_gpu", "program": "with the extra `fast`", "missing": "numba is not installed"},
            row("PyTorch", "eager", 6.0, spread=0.3, failures=2),
            {"library": "NumPy", "program": "textbook", "threads": 1, "n": 20, "failures": 20, "cold": never},
        ],
    }


TIME_TO_ACCURACY = """\
| library | threads | seconds to 98 % | min to max | of ours | failures | cold start, s |
| --- | --- | --- | --- | --- | --- | --- |
| backprop_gpu, NumPy alone | 2 | 4.00 | 3.90 to 4.20 | 1.00 | 0 of 20 | 5.00 |
| PyTorch, eager | 2 | 6.00* | 5.90 to 6.20 | 1.50 | 2 of 20 | 7.00 |
| NumPy, textbook | 1 | never |  |  | 20 of 20 | never (3 of 3 failed) |

784-256-10, batches of 125, Adam at 0.002, 0.001, an epoch each. Median over the seeds that reached the goal; `*`: \
spread above 10 %.
Without a time: backprop_gpu, with the extra `fast` (missing: numba is not installed).
Abacus, 2 cores; numpy 2.4.6, torch 2.13.0; 2026-11-23, n = 20; repeated by `python -m benchmarks.time_to_accuracy` \
([record](LINK))."""


def test_the_table_of_time_to_accuracy(report):
    assert report.time_to_accuracy(accuracy_record(), "LINK") == TIME_TO_ACCURACY


def test_the_table_of_bench(report):
    row = {
        "layers": [784, 100, 10], "batch_size": 128, "optimizer": "Adam", "step_us": 512.4, "step_spread": 0.2,
        "samples_per_second": 249804.6, "gflops": 118.6, "floor_share": None,
    }  # fmt: skip
    text = report.bench(
        {"conditions": CONDITIONS, "rows": [row, {**row, "step_spread": 0.05, "floor_share": 0.5}]}, "LINK"
    )
    assert text.splitlines()[2:4] == [
        "| 784-100-10 | 128 | Adam | 512* | 249805 | 119 |  |",
        "| 784-100-10 | 128 | Adam | 512 | 249805 | 119 | 50% |",
    ]


# ---------------------------------------------------------------------------------------------------------- README

README = """\
# A project

<!-- benchmarks: peers -->
<!-- end -->
Prose between.
<!-- benchmarks: time_to_accuracy -->
old
<!-- end -->
The end.
"""


@pytest.fixture
def project(tmp_path):
    """A root with README and a record of peers."""
    (tmp_path / "benchmarks" / "records").mkdir(parents=True)
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    put(tmp_path, "peers-cpu-2026-11-23.json", peers_record())
    return tmp_path


def put(root, name, record):
    (root / "benchmarks" / "records" / name).write_text(json.dumps(record), encoding="utf-8")


def written(report, root, monkeypatch):
    monkeypatch.setattr(report.plots, "draw", lambda cells, folder: [])
    assert report.main([], root) == 0
    return (root / "README.md").read_text(encoding="utf-8")


def test_readme_is_written_and_agrees_with_the_records_then(report, project, monkeypatch, capsys):
    assert report.main(["--check"], project) == 1
    table = PEERS.replace("LINK", "benchmarks/records/peers-cpu-2026-11-23.json")
    assert written(report, project, monkeypatch) == README.replace(
        "peers -->\n", f"peers -->\n{table}\n"
    ).replace("old\n", "Not measured yet.\n")  # fmt: skip
    capsys.readouterr()
    assert report.main(["--check"], project) == 0
    assert capsys.readouterr().out == ""


def test_a_typed_figure_is_found(report, project, monkeypatch, capsys):
    path = project / "README.md"
    path.write_text(written(report, project, monkeypatch).replace("| 50.5 |", "| 5.5 |"), encoding="utf-8")
    capsys.readouterr()
    assert report.main(["--check"], project) == 1
    diff = capsys.readouterr().out
    assert "-| 784-100-10 | 128 | SGD | 101 | 5.5 |" in diff
    assert "+| 784-100-10 | 128 | SGD | 101 | 50.5 |" in diff
    assert "| 5.5 |" in path.read_text(encoding="utf-8")  # it writes nothing


def test_the_newest_record_counts(report, project, monkeypatch):
    put(project, "peers-cpu-2026-11-24.json", peers_record(date="2026-11-24T01:00:00+00:00"))
    put(project, "peers-zzz-2026-11-22.json", peers_record(date="2026-11-22T01:00:00+00:00"))
    text = written(report, project, monkeypatch)
    assert "peers-cpu-2026-11-24.json" in text
    assert "2026-11-22" not in text


@pytest.mark.parametrize(
    "readme",
    [
        README.replace("<!-- end -->\nThe", "The"),
        README.replace("time_to_accuracy", "unheard_of"),
        README.replace("<!-- benchmarks: peers -->\n<!-- end -->\n", ""),
        README + "<!-- benchmarks: peers -->\n<!-- end -->\n",
    ],
    ids=["open", "unknown", "missing", "twice"],
)
def test_bad_markers_are_an_error_of_two_lines(report, project, readme, capsys):
    (project / "README.md").write_text(readme, encoding="utf-8")
    assert report.main(["--check"], project) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_record_that_is_not_json_is_an_error_of_two_lines(report, project, capsys):
    (project / "benchmarks" / "records" / "bench-cpu.json").write_text("{")
    assert report.main([], project) == 1
    assert "bench-cpu.json is not JSON" in capsys.readouterr().err


def test_this_readme_agrees_with_its_records(report, capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- plots


def test_both_plots_are_written_the_same_each_time(report, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    cells = report.cells(peers_record())
    (tmp_path / "again").mkdir()
    first, again = report.plots.draw(cells, tmp_path), report.plots.draw(cells, tmp_path / "again")
    assert [path.name for path in first] == ["throughput.svg", "floor.svg"]
    for path, other in zip(first, again, strict=True):
        assert path.read_bytes() == other.read_bytes()
        assert path.stat().st_size < 200_000
    assert all(name in first[0].read_text() for name in ("ours, fast", "ours, NumPy", "PyTorch", "JAX"))
    assert "784-100-10 @ 128 SGD" in first[1].read_text()


def test_lines_are_samples_a_second(report):
    found = report.plots.lines(report.cells(peers_record())[:1], ["ours, fast", "PyTorch", "JAX"])
    assert found == {
        "ours, fast": [(128, pytest.approx(128e6 / 50.5))],
        "PyTorch": [(128, pytest.approx(128e6 / 151.5))],
    }


def test_labels_do_not_overlap(report):
    found = report.plots.spread_out({"a": 0.5, "b": 0.51, "c": 0.99, "d": 1.0, "e": 0.1}, 0.1)
    heights = [found[name] for name in "eabcd"]
    assert (np.diff(heights) >= 0.1 - 1e-12).all()
    assert (found["e"], found["d"]) == (0.1, 1.0)


# ------------------------------------------------------------------------------------------------ time to accuracy


class FakeWorker:
    """A library that takes 1 s an epoch and reaches the goal after as many epochs as the seed says, 3 at most."""

    def __init__(self, name, log, error):
        self.name, self.log, self.error = name, log, error

    def ask(self, do, seconds, seed, choice):
        assert (do, choice) == ("train", "ab".index(self.name))
        self.log.append((seed, self.name))
        if (self.name, seed) == ("b", 3):
            raise self.error("no answer within 300 s")
        epochs = min(seed, 2) + 1
        return {"seconds": float(epochs), "accuracies": [0.9] * (epochs - 1) + [0.98 if seed < 3 else 0.979]}


def test_seeds_go_in_turn_and_failures_are_counted(to_accuracy, monkeypatch):
    log, told = [], []
    monkeypatch.setattr(to_accuracy, "PAUSE", 0)
    found = to_accuracy.measured(
        {name: FakeWorker(name, log, to_accuracy.peers.WorkerError) for name in "ab"}, {"a": 0, "b": 1}, range(5),
        told.append,
    )  # fmt: skip
    assert log == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b"), (3, "b"), (3, "a"), (4, "a"), (4, "b")]
    assert [(found[name]["n"], found[name]["failures"], found[name]["median"]) for name in "ab"] == [(5, 2, 2.0)] * 2
    assert [run["seed"] for run in found["b"]["runs"]] == list(range(5))  # failures are never dropped
    assert told[3] == "seed 1, a: 2.00 s, 90.00 98.00 %"
    assert "no answer" in told[6]
    assert told[7].endswith("not reached")


def test_without_a_seed_that_reaches_the_goal_there_is_no_median(to_accuracy):
    found = to_accuracy.summarised([{"seconds": 1.0, "accuracies": [0.5]}, {"error": "broken"}])
    assert (found["n"], found["failures"]) == (2, 2)
    assert "median" not in found


class FakeModel:
    """Trains by nothing, and has the test accuracies it is given."""

    early_epsilon = False

    def __init__(self, accuracies):
        self.left, self.seen = iter(accuracies), []

    def train(self, train, test, seed, after):
        for accuracy in self.left:
            self.seen.append(accuracy)
            if after(accuracy):
                return


@pytest.mark.parametrize("accuracies", [[0.97, 0.98, 0.99], [0.97, 0.975]])
def test_training_ends_with_the_epoch_that_reaches_the_goal(to_accuracy, accuracies):
    kit = to_accuracy.Kit(None, lambda net: FakeModel(accuracies))
    run = to_accuracy.until_goal(kit, None, None, 0)
    assert run["accuracies"] == accuracies[:2]
    assert run["seconds"] > 0


SLOW = """
import json, sys, time
print(json.dumps({"there": True}), flush=True)
order = json.loads(sys.stdin.readline())
time.sleep(0.2)
print(json.dumps({"seconds": 0.1, "accuracies": [0.98], "order": order}), flush=True)
"""


def started(to_accuracy, text):
    return lambda name, threads: to_accuracy.peers.Worker(
        name, threads, to_accuracy.record.affinity(), [sys.executable, "-c", text]
    )


def test_a_cold_start_is_timed_from_outside(to_accuracy):
    run = to_accuracy.cold_start("textbook", 1, 1, 7, started(to_accuracy, SLOW))
    assert (run["seed"], run["train_seconds"], run["accuracies"]) == (7, 0.1, [0.98])
    assert run["order"] == {"do": "train", "seed": 7, "choice": 1}
    assert run["seconds"] > 0.2


def test_a_process_that_ends_or_hangs_is_an_error(to_accuracy, monkeypatch):
    run = to_accuracy.cold_start("textbook", 1, 0, 0, started(to_accuracy, "raise SystemExit(3)"))
    assert "code 3" in run["error"]
    assert to_accuracy.summarised([run])["failures"] == 1
    monkeypatch.setattr(to_accuracy, "PATIENCE", 0.1)
    run = to_accuracy.cold_start("textbook", 1, 0, 0, started(to_accuracy, "import time; time.sleep(60)"))
    assert run["error"].startswith("no answer")


def test_a_library_serves_and_what_it_prints_is_no_answer(to_accuracy, small, monkeypatch):
    class Loud(FakeModel):
        def train(self, *args):
            print("noise")
            super().train(*args)

    out, here = (
        io.StringIO(),
        types.SimpleNamespace(dup=lambda fd: 9, dup2=lambda *fds: None, fdopen=lambda *a, **k: out),
    )
    monkeypatch.setattr(to_accuracy, "os", here)
    orders = '{"do": "train", "seed": 0, "choice": 0}\n{"do": "dance"}\n'
    monkeypatch.setattr(to_accuracy.sys, "stdin", io.StringIO(orders))
    monkeypatch.setattr(bp.datasets, "load", lambda name: small)
    kit = to_accuracy.Kit(lambda data: data, lambda net: Loud([0.5, 0.99]))
    library = to_accuracy.Library("textbook", "a", "b", lambda: kit)
    to_accuracy.serve(library)
    there, run, error = map(json.loads, out.getvalue().splitlines())
    assert there == {"there": True}
    assert run["accuracies"] == [0.5, 0.99]
    assert "dance" in error["error"]


class Announced:
    """A worker that has only its first answer."""

    def __init__(self, first):
        self.first, self.closed = first, False

    def ask(self, do, seconds):
        assert do == "warm"
        return self.first

    def close(self):
        self.closed = True


def test_the_quicker_number_of_threads_is_kept(to_accuracy, monkeypatch):
    monkeypatch.setattr(to_accuracy.record, "affinity", lambda: [0, 1, 2])

    def said(seconds, choice):
        return Announced({"epoch_seconds": seconds, "choice": choice, "tried": [{"epoch_seconds": seconds}]})

    workers = {3: said(2.0, 0), 1: said(1.0, 1)}
    row, kept = to_accuracy.warmed("textbook", lambda name, threads: workers[threads])
    assert (row["threads"], row["setting"], kept) == (1, {"data": "uint8"}, workers[1])
    assert row["tuning"] == [{"threads": 3, "epoch_seconds": 2.0}, {"threads": 1, "epoch_seconds": 1.0}]
    assert (workers[3].closed, workers[1].closed) == (True, False)


def test_what_strays_or_breaks_is_told_and_not_timed(to_accuracy):
    for said in ({"rejected": "cost off by 0.3", "epoch_seconds": 1.0}, {"error": "RuntimeError: no"}):
        row, kept = to_accuracy.warmed("textbook", lambda name, threads, said=said: Announced(said))
        assert kept is None
        assert row.items() >= said.items()


def test_a_package_that_is_not_there_is_told(to_accuracy, monkeypatch):
    monkeypatch.setattr(to_accuracy.importlib.util, "find_spec", lambda name: None)
    row, kept = to_accuracy.warmed("fast", start=None)
    assert (row["missing"], kept) == ("numba is not installed", None)


# A tenth of the pixels and of the rows, so that it takes no time.
@pytest.fixture
def small(to_accuracy, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(to_accuracy, "LAYERS", [64, 16, 10])
    monkeypatch.setattr(to_accuracy, "BATCH_SIZE", 20)
    X, y = rng.integers(0, 256, (240, 64), np.uint8), rng.integers(0, 10, 240, np.uint8)
    return Dataset(X, y), Dataset(X[:40], y[:40])


PACKAGES = {"numpy": None, "textbook": None, "sklearn": "sklearn", "torch": "torch", "jax": "jax"}


@pytest.mark.parametrize("name", PACKAGES)
def test_every_library_takes_the_steps_of_the_reference(to_accuracy, small, name):
    if PACKAGES[name]:
        pytest.importorskip(PACKAGES[name], reason=f"{PACKAGES[name]} is not installed")
    library = to_accuracy.LIBRARIES[name]
    for setting in library.settings:
        kit = library.kit(**setting)
        found = to_accuracy.check(kit, *small)
        assert "rejected" not in found, (setting, found)
        assert ("told" in found) is (name == "numpy")
        run = to_accuracy.until_goal(kit, *map(kit.place, small), seed=1)
        assert len(run["accuracies"]) == len(to_accuracy.RATES)


def test_no_row_goes_by_a_name_that_is_not_its_own(to_accuracy, small):
    with pytest.raises(RuntimeError, match="numba does not compile"):
        to_accuracy.check(to_accuracy.LIBRARIES["fast"].kit(), *small)


def test_the_quickest_setting_is_kept_and_what_fails_is_told(to_accuracy, small, monkeypatch):
    seconds = {"a": 3.0, "b": None, "c": 1.0, "d": 2.0}

    def warm_up(kit, *data):
        if seconds[kit] is None:
            raise ValueError("no such option")
        return seconds[kit]

    monkeypatch.setattr(bp.datasets, "load", lambda name: small)
    monkeypatch.setattr(to_accuracy, "warm_up", warm_up)
    monkeypatch.setattr(to_accuracy, "check", lambda kit, *data: {"of": kit})
    settings = [{"name": name} for name in seconds]
    found = to_accuracy.Server(to_accuracy.Library("textbook", "", "", lambda name: name, settings)).warm()
    assert (found["choice"], found["epoch_seconds"], found["of"]) == (2, 1.0, "c")
    assert found["failed"] == ["ValueError: no such option"]
    assert [tried["name"] for tried in found["tried"]] == ["a", "c", "d"]
    broken = to_accuracy.Server(to_accuracy.Library("textbook", "", "", lambda name: name, settings[1:2]))
    assert broken.warm() == {"error": "ValueError: no such option"}


def test_a_wrong_rate_and_a_wrong_order_are_rejected(to_accuracy, small, monkeypatch):
    def wrong(**changes):
        class Wrong(to_accuracy.Textbook):
            def train(self, *args):
                with pytest.MonkeyPatch.context() as patch:
                    for name, value in changes.items():
                        patch.setattr(to_accuracy, name, value)
                    super().train(*args)

        return to_accuracy.check(to_accuracy.textbook_kit("uint8")._replace(make=Wrong), *small)

    rates, order = to_accuracy.RATES, to_accuracy.order
    assert "rejected" not in wrong()
    assert "rejected" in wrong(RATES=(rates[0], 1.5 * rates[1]))  # in the second epoch alone
    assert "rejected" in wrong(order=lambda n, seed, epoch: order(n, seed, epoch)[::-1])
    assert "rejected" in wrong(BETA1=0.8)


def test_all_see_the_rows_that_training_sees(to_accuracy):
    rows = to_accuracy.order(10 * to_accuracy.BATCH_SIZE, 3, 2)
    assert rows.shape == (10, to_accuracy.BATCH_SIZE)
    plan, _ = bp.batches.epoch_plan("shuffled", rows.size, to_accuracy.BATCH_SIZE, 3, 2)
    assert (rows.ravel() == plan).all()
    assert 60_000 % to_accuracy.BATCH_SIZE == 0
