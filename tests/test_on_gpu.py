"""The script for a real card, part by part, on the stand-in for CuPy: only its clock and memory pool are made up."""

import contextlib
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import fake_cupy
import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu import backend as backends

ROOT = Path(__file__).resolve().parent.parent
F32 = np.dtype(np.float32)


@pytest.fixture(scope="module")
def on_gpu():
    before = sys.path[:]
    sys.path.insert(0, str(ROOT))
    try:
        import benchmarks.on_gpu as module
    finally:
        sys.path[:] = before
    return module


@pytest.fixture
def card(monkeypatch, on_gpu):
    """The stand-in, and what it lacks: events, graphs, a pool."""

    def device_times(call, launches=20, repeats=9):
        for _ in range(2):
            call()
        return [2e-6] * repeats, "graph"

    @contextlib.contextmanager
    def counted_allocations(cupy, counts):
        def count(make):
            def counted(*args, **kwargs):
                counts["allocations"] += 1
                return make(*args, **kwargs)

            return counted

        monkeypatch.setattr(cupy, "empty", count(cupy.empty))
        monkeypatch.setattr(cupy, "empty_like", count(cupy.empty_like))
        yield lambda: 1 << 20

    monkeypatch.setattr(on_gpu, "device_times", device_times)
    monkeypatch.setattr(on_gpu, "counted_allocations", counted_allocations)
    with fake_cupy.installed() as cupy:
        yield cupy


@pytest.fixture
def record(on_gpu, tmp_path):
    return on_gpu.Record(tmp_path, "a part")


@pytest.fixture(scope="module")
def blobs():
    """Three classes that a small network tells apart."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    images = (rng.integers(0, 60, (600, 12)) + 150 * (np.arange(12) % 3 == labels[:, None])).astype(np.uint8)
    return bp.datasets.Dataset(images, labels)


def results(on_gpu, record, what):
    return [r for r in on_gpu.read(record.path.parent) if r["what"] == what]


# ---- cases ----------------------------------------------------------------------------------------------------------


OF_WHOLE_STEPS = {"forward", "head", "delta", "gradients", "advance", "step_shares"}
OF_WHOLE_STEPS |= {"step_gather_bytes", "step_gather_reals"}  # run by graphs, not by operations


def test_cases_agree_with_numpy_and_reach_every_kernel(on_gpu, card):
    fake_cupy.Counts.kernels.clear()
    n, wrong = on_gpu.run_cases(backends.choose("cupy"), dtypes=[F32])
    assert wrong == []
    assert n == 4 * len(list(on_gpu.cases(F32, 2, 3)))
    assert on_gpu.kernel_names() - fake_cupy.Counts.kernels <= {"probe"} | OF_WHOLE_STEPS


def test_cases_find_a_wrong_result_and_one_that_raises(on_gpu, card, monkeypatch):
    be = backends.choose("cupy")
    share = be.ops.share

    def a_little_off(w, out):
        share(w, out)
        out[...] = out * 1.001

    def broken(*args):
        raise RuntimeError("no\nsuch thing")

    monkeypatch.setattr(be.ops, "share", a_little_off)
    monkeypatch.setattr(be.ops, "drop", broken)
    _, wrong = on_gpu.run_cases(be, [(33, 31)], [F32])
    assert len(wrong) == 2
    assert wrong[0] == "drop, 33 x 31 float32: RuntimeError: no such thing"
    assert wrong[1].startswith("share, 33 x 31 float32: result 0 is off by ")


def test_a_result_that_nobody_wrote_is_wrong(on_gpu, card, monkeypatch):
    be = backends.choose("cupy")
    monkeypatch.setattr(be.ops, "share", lambda w, out: None)
    assert on_gpu.run_cases(be, [(33, 31)], [F32])[1] == ["share, 33 x 31 float32: result 0 is off by nan"]


# ---- sanitizer ------------------------------------------------------------------------------------------------------

REPORT = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void activate<1>(const float *, float *, float *, long long, int)+0x160 in activate.cu:19
=========     by thread (0,0,0) in block (0,0,0)
=========     Access to 0x7f00 is out of bounds
=========     Device Frame: bias_activate+0x90 in activate.cu:30
=========     Saved host backtrace up to driver entry point at kernel launch time
=========
========= Uninitialized __global__ memory read of size 16 bytes
=========     at void cutlass::Kernel2<gemm>(T1::Params)+0x160
=========     by thread (1,0,0) in block (0,0,0)
=========
cases: 98 run, 1 wrong
========= ERROR SUMMARY: 2 errors
"""


def test_findings_in_our_kernels_are_told_from_those_in_others(on_gpu):
    assert {"bias_activate", "update", "column_sums"} <= on_gpu.kernel_names()
    found = on_gpu.findings(REPORT, on_gpu.kernel_names())
    assert found["ran"]
    assert found["cases_wrong"] == 1
    assert [one["kernels"] for one in found["ours"]] == [["bias_activate"]]
    assert found["ours"][0]["text"][0] == "Invalid __global__ write of size 4 bytes"
    assert found["foreign"] == {"Kernel2": 1}


def test_a_race_names_its_kernel(on_gpu):
    race = (
        "========= Error: Race reported between Write access at column_sums+0x90 and Read access at column_sums+0xa0\n"
        "cases: 98 run, 0 wrong\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    )
    assert [one["kernels"] for one in on_gpu.findings(race, {"column_sums"})["ours"]] == [["column_sums"]]


def test_a_tool_that_the_machine_refuses_says_why(on_gpu):
    found = on_gpu.findings("========= Error: Target application terminated\n", {"update"})
    assert not found["ran"]
    assert "Target application terminated" in found["why"]


@pytest.mark.parametrize(
    ("tools", "wrong", "ok"), [(None, 0, None), ("clean", 0, True), ("findings", 0, False), (None, 1, False)]
)
def test_sanitizer_is_green_only_without_findings(on_gpu, record, monkeypatch, tools, wrong, ok):
    printed = f"cases: 98 run, {wrong} wrong\n"
    done = subprocess.CompletedProcess([], wrong, printed, "")
    monkeypatch.setattr(on_gpu.subprocess, "run", lambda *args, **kwargs: done)
    monkeypatch.setattr(on_gpu, "find_sanitizer", lambda: tools and "compute-sanitizer")
    text = REPORT if tools == "findings" else printed + "========= ERROR SUMMARY: 0 errors\n"
    monkeypatch.setattr(on_gpu, "_side_by_side", lambda *args: dict.fromkeys(on_gpu.TOOLS, text))
    verdict = on_gpu.sanitizer(record)
    assert verdict.ok is ok
    if tools is None:
        assert "not installed" in results(on_gpu, record, "sanitizer")[0]["why"]


# ---- tests ----------------------------------------------------------------------------------------------------------

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.a" name="good" time="0.5"/>
<testcase classname="tests.a" name="bad" time="2"><failure message="assert 1 == 2&#10;more">text</failure></testcase>
<testcase classname="tests.a" name="absent" time="0"><skipped message="no GPU: none"/></testcase>
<testcase classname="tests.a" name="other" time="0"><skipped message="no g++"/></testcase>
</testsuite></testsuites>"""


def test_junit_counts_and_names(on_gpu, tmp_path):
    (tmp_path / "junit.xml").write_text(JUNIT)
    found = on_gpu.junit(tmp_path / "junit.xml")
    assert found["passed"] == 1
    assert found["failed"] == [{"test": "tests.a::bad", "why": "assert 1 == 2"}]
    assert found["skipped"] == {"no GPU: none": 1, "no g++": 1}
    assert found["slowest"][0]["test"] == "tests.a::bad"


@pytest.mark.parametrize(
    ("passed", "failed", "skipped", "ok"),
    [(3, [], {}, True), (3, [], {"no g++": 1}, True), (3, [], {"no GPU: none": 1}, False), (0, [], {}, False)]
    + [(3, [{"test": "t", "why": "w"}], {}, False)],
)
def test_tests_are_green_only_where_a_gpu_ran_them(on_gpu, record, monkeypatch, passed, failed, skipped, ok):
    def run(command, **kwargs):
        assert kwargs["env"]["BACKPROP_GPU_REQUIRE"] == "1"
        Path(next(c for c in command if c.startswith("--junitxml=")).partition("=")[2]).write_text(JUNIT)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(on_gpu.subprocess, "run", run)
    found = {"passed": passed, "failed": failed, "skipped": skipped, "slowest": []}
    monkeypatch.setattr(on_gpu, "junit", lambda path: found)
    assert on_gpu.tests(record).ok is ok


# ---- times, MNIST, counts -------------------------------------------------------------------------------------------


def test_kernels_are_timed_beside_plain_lines_and_copies(on_gpu, card, record):
    rows = functools.partial(on_gpu.kernel_rows, batches=(5,), widths=(7,), networks=((7, 5, 3),))
    verdict = on_gpu.kernels(record, rows, large=1 << 10)
    timed = results(on_gpu, record, "kernel")
    assert verdict.ok, verdict
    assert len(timed) == 28
    for r in timed:
        assert r["us"] == pytest.approx(2)
        assert r["plain"]["us"] == pytest.approx(2), r
        assert r["gain"] == pytest.approx(1)
        assert r["GBps"] == pytest.approx(r["bytes"] / 2e-6 / 1e9)
        assert r["launches"] == (
            2 if r["kernel"].startswith(("update", "output_delta")) or "clip" in r["kernel"] else 1
        )
    assert {"bytes": 5 * 784 * 5 + 8 * 5}.items() <= timed[0].items()
    assert card.matmul is not None


def test_a_row_that_fails_is_told_and_the_next_is_timed(on_gpu, card, record):
    def broken():
        raise ValueError("bad row")

    good = on_gpu.Row("good", "1", lambda: None, broken, 8)
    verdict = on_gpu.kernels(record, lambda be: iter([on_gpu.Row("bad", "1", broken, None, 8), good]), large=1 << 10)
    assert verdict.ok is False
    assert "failed: bad 1: ValueError: bad row" in verdict.figures
    bad, good = results(on_gpu, record, "kernel")
    assert bad["error"] == good["plain_error"] == "ValueError: bad row"
    assert good["us"] == pytest.approx(2)


@pytest.mark.parametrize("drift", [0, 1e-3])
def test_mnist_compares_two_curves(on_gpu, card, record, blobs, monkeypatch, drift):
    monkeypatch.setattr(on_gpu, "CURVES", 1e-4)
    monkeypatch.setattr(on_gpu, "BATCH", 32)
    monkeypatch.setattr(on_gpu, "step_time", functools.partial(on_gpu.step_time, steps=2, repeats=2))
    if drift:
        monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", "eager")
        be = backends.choose("cupy")
        output_delta = be.ops.output_delta

        def off(*args):
            output_delta(*args)
            args[6][...] = args[6] + drift

        monkeypatch.setattr(be.ops, "output_delta", off)
    verdict = on_gpu.mnist(record, (blobs, blobs), (12, 8, 3), 4, 0.9, [((12, 8, 3), 16)])
    assert verdict.ok is (not drift), verdict
    (curves,) = results(on_gpu, record, "curves")
    assert curves["largest"] == pytest.approx(drift, abs=1e-5)
    assert len(curves["differences"]) == 4
    cupy, numpy = results(on_gpu, record, "run")
    assert (cupy["backend"], numpy["backend"]) == ("cupy", "numpy")
    assert cupy["goal_steps"] in (19, 38, 57, 76)
    assert results(on_gpu, record, "step")[0]["batch"] == 16


def test_a_goal_that_is_never_reached_fails(on_gpu, card, record, blobs):
    verdict = on_gpu.mnist(record, (blobs, blobs), (12, 8, 3), 1, 1.01, [])
    assert verdict.ok is False
    assert "never 101 %" in verdict.figures[0]


def test_counts_of_a_step(on_gpu, card, record, blobs):
    verdict = on_gpu.counts(record, blobs, (12, 8, 3), 300)
    assert verdict.ok, verdict
    plain, everything = results(on_gpu, record, "counts")
    assert (plain["launches_a_step"], plain["products_a_step"]) == (10, 5)
    assert everything["launches_a_step"] > plain["launches_a_step"]
    assert plain["same_bits"]


@pytest.mark.parametrize("kind", ["allocations", "copies"])
def test_counts_see_one_allocation_and_one_copy(on_gpu, card, record, blobs, monkeypatch, kind):
    ops = backends.choose("cupy").ops
    measure = ops.measure

    def costly(*args):
        measure(*args)
        ops.cp.empty(1, F32) if kind == "allocations" else float(args[-1][0])

    monkeypatch.setattr(ops, "measure", costly)
    verdict = on_gpu.counts(record, blobs, (12, 8, 3), 300)
    assert verdict.ok is False
    assert [epoch[kind] for epoch in results(on_gpu, record, "counts")[0]["within_epochs"]] == [2, 2]


def test_counting_leaves_nothing_behind(on_gpu, card):
    before = card.matmul, card.asarray, dict(vars(card.ndarray))
    with on_gpu.counted_calls(card, on_gpu.collections.Counter()):
        assert card.matmul is not before[0]
    assert card.asarray is before[1]
    assert dict(vars(card.ndarray)) == before[2]


def test_two_seeds_are_not_taken_for_one(on_gpu, card, record, blobs, monkeypatch):
    seeds = iter(range(100))
    count_run = on_gpu.count_run

    def another(*args, **settings):
        monkeypatch.setattr(on_gpu, "SEED", next(seeds))
        return count_run(*args, **settings)

    monkeypatch.setattr(on_gpu, "count_run", another)
    assert on_gpu.counts(record, blobs, (12, 8, 3), 300).ok is False


# ---- all parts ------------------------------------------------------------------------------------------------------

STANDS_IN = """
import json, os, signal, sys, time
directory, part = sys.argv[1:]
def tell(**r):
    with open(os.path.join(directory, "results.jsonl"), "a") as f:
        f.write(json.dumps({"part": part, **r}) + "\\n")
if part == "tests":
    print("Segmentation fault", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if part == "sanitizer":
    time.sleep(60)
tell(what="verdict", ok=None if part == "mnist" else part != "kernels", figures=["all | well"])
"""


def test_a_part_that_fails_dies_or_hangs_does_not_stop_the_next(on_gpu, tmp_path, monkeypatch, capsys):
    (tmp_path / "part.py").write_text(STANDS_IN)
    monkeypatch.setitem(on_gpu.LIMITS, "sanitizer", 1)
    code = on_gpu.run_all(tmp_path / "out", [sys.executable, str(tmp_path / "part.py")])
    assert code == 1
    verdicts = {r["part"]: r["ok"] for r in on_gpu.read(tmp_path / "out") if r["what"] == "verdict"}
    assert verdicts == {
        "environment": True, "tests": False, "sanitizer": False, "kernels": False, "mnist": None, "counts": True,
        "floors": True, "cublaslt": True, "steps": True,
    }  # fmt: skip
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "| tests | failed | 0 | it ended with code -9<br>Segmentation fault |" in text
    assert "| sanitizer | failed | 1 | it took more than 1 s |" in text
    assert "| mnist | not run |" in text
    assert "all \\| well" in text
    assert capsys.readouterr().out.endswith("failed: kernels, sanitizer, tests\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.jsonl", "summary.md"]


def test_a_part_that_raises_leaves_a_verdict(on_gpu, tmp_path, monkeypatch):
    def raises(record):
        record("first", value=np.float32(1.5))
        raise KeyError("lost")

    monkeypatch.setitem(on_gpu.PARTS, "counts", raises)
    assert on_gpu.run_part(tmp_path, "counts") == 1
    first, verdict = on_gpu.read(tmp_path)
    assert first["value"] == 1.5
    assert verdict["ok"] is False
    assert verdict["figures"][0] == "KeyError: 'lost'"


def test_all_limits_together_stay_below_18_minutes(on_gpu):
    assert sum(on_gpu.LIMITS.values()) < 18 * 60
    assert set(on_gpu.LIMITS) == set(on_gpu.PARTS)


def test_the_table_of_kernels_marks_what_is_doubtful(on_gpu):
    steady, shaky = ({"us": 2.0, "spread": spread} for spread in (0.01, 0.5))
    row = {"part": "kernels", "what": "kernel", "kernel": "drop", "shape": "1", "launches": 1, "how": "graph", **shaky}
    row |= {"plain": steady, "plain_how": "eager", "gain": 1.0, "GBps": 5.0, "share_of_memory": 0.5, "copy_us": 1.0}
    assert "| drop | 1 | 1 | 2.00 ! | 2.00 eager | 1.0 | 5 | 50% | 1.00 |" in on_gpu.summary([row])


@pytest.mark.parametrize("arguments", [[], ["a", "b", "c"], ["a", "nonsense"], ["--help"]])
def test_usage(on_gpu, arguments, capsys):
    assert on_gpu.main(arguments) == 2
    assert capsys.readouterr().err.startswith("usage: ")


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_without_a_gpu_the_script_names_cause_and_cure(tmp_path):
    there = tmp_path / "a folder"
    there.mkdir()
    (there / "cupy.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')\n")
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(there)}
    script = str(ROOT / "benchmarks" / "on_gpu.sh")
    done = subprocess.run(["bash", script, "the results"], cwd=there, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == ""
    assert "no GPU: CuPy does not import" in done.stdout
    assert "cure: pip install" in done.stdout
    lines = [json.loads(line) for line in (there / "the results" / "results.jsonl").read_text().splitlines()]
    assert [line["what"] for line in lines] == ["environment", "verdict", "time"]
    assert lines[0]["versions"]["numpy"]
    assert "| tests | not run |" in (there / "the results" / "summary.md").read_text()
    assert subprocess.run(["bash", script], capture_output=True, env=environment).returncode == 2
