"""The script for a real card, part by part, on the stand-in for CuPy: only its clock and memory pool are made up."""

import contextlib
import csv
import functools
import io
import json
import os
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import fake_cublaslt
import fake_cupy
import numpy as np
import pytest
from test_wide import Lent

import backprop_gpu as bp
from backprop_gpu import backend as backends
from backprop_gpu import cublaslt

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


@pytest.fixture
def fake(card, monkeypatch):
    """The stand-in for cuBLASLt."""
    fake = fake_cublaslt.Library()
    fake.issue = fake_cupy.issue
    monkeypatch.setattr(cublaslt, "load", lambda: fake)
    monkeypatch.setattr(cublaslt, "Library", Lent)
    return fake


@pytest.fixture
def step_cases(on_gpu):
    return on_gpu.gpu_step_cases


def test_cases_agree_with_numpy_and_reach_every_kernel(on_gpu, fake, step_cases, monkeypatch):
    products, close = set(), step_cases.Uncaptured.close

    def closing(its):
        products.update(name for name, _ in its.plan.products)
        close(its)

    monkeypatch.setattr(step_cases.Uncaptured, "close", closing)
    fake_cupy.Counts.kernels.clear()
    be = backends.choose("cupy")
    n, wrong = on_gpu.run_cases(be, dtypes=[F32])
    assert wrong == []
    assert n == 4 * len(list(on_gpu.cases(F32, 2, 3)))
    n, wrong = on_gpu.run_step_cases(be)
    assert wrong == []
    assert n == len(list(step_cases.step_cases(80)))
    assert on_gpu.kernel_names() - fake_cupy.Counts.kernels <= {"probe"}
    assert products == {"forward", "hidden_delta", "weight_gradient"}


def test_shares_are_the_whole(on_gpu, step_cases):
    every = list(step_cases.step_cases(80))
    shares = [list(on_gpu._shared(every, (i, 3))) for i in range(3)]
    assert sorted(map(str, every)) == sorted(str(case) for share in shares for case in share)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_an_old_gpu_gets_no_cases_that_it_cannot_run(step_cases):
    assert {case.precision for case in step_cases.step_cases(75)} == {"float32", "float64"}
    assert {case.precision for case in step_cases.step_cases(80)} == {"float32", "float64", "tf32", "bf16"}


def case_named(step_cases, name, precision="float32"):
    return next(c for c in step_cases.step_cases(80) if (c.name, c.precision) == (name, precision))


@pytest.mark.parametrize("name", ["update", "measure"])
def test_a_wrong_step_is_found(card, step_cases, monkeypatch, name):
    """What NumPy is made to do otherwise is what the kernels do wrong."""
    ops = backends.choose("numpy").ops
    real = getattr(ops, name)

    def a_little_off(*args):
        result = real(*args)
        args[1 if name == "update" else -1][0] += 1e-3
        return result

    monkeypatch.setattr(ops, name, a_little_off)
    what = step_cases.run_case(case_named(step_cases, "penalties"))
    assert [line.split()[0] for line in what] == (["theta"] if name == "update" else ["costs"])


@pytest.mark.parametrize("poison", [True, False])
def test_steps_begin_on_poison(card, step_cases, monkeypatch, poison):
    seen, begin = [], step_cases.Uncaptured.begin

    def looked_at(its, *args):
        seen.append(np.isnan(its._vectors["work"].get()).all())
        begin(its, *args)

    monkeypatch.setattr(step_cases.Uncaptured, "begin", looked_at)
    assert step_cases.run_case(case_named(step_cases, "penalties"), poison) == []
    assert seen == [poison]


def test_a_step_that_falls_back_is_found(on_gpu, card, step_cases, monkeypatch):
    def broken(*args):
        raise RuntimeError("no such launch")

    case = case_named(step_cases, "penalties")
    monkeypatch.setattr(step_cases, "step_cases", lambda arch: [case])
    monkeypatch.setattr(step_cases.Uncaptured, "_enqueue", broken)
    n, (wrong,) = on_gpu.run_step_cases(backends.choose("cupy"))
    assert n == 1
    assert "no such launch" in wrong


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


CLEAN = "cases: 98 run, 0 wrong\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("tools", "wrong", "ok"),
    [(None, 0, None), (None, 1, False), (CLEAN, 0, True), (REPORT, 0, False), ("it took more than 9 s\n", 0, None)]
    + [("it took more than 9 s\n", 1, False)],
)
def test_sanitizer_is_green_only_without_findings(on_gpu, record, monkeypatch, tools, wrong, ok):
    def side_by_side(commands, limit):
        under = {name: command for name, command in commands.items() if command[0] == "compute-sanitizer"}
        assert {name: command[-2] for name, command in under.items()} == {name: name[1] for name in under}
        if under:  # one share of one tool is the one to tell
            return {name: tools if name == ("racecheck", "1/3") else CLEAN for name in under}
        return {name: f"cases: 98 run, {wrong if name == '2/3' else 0} wrong\n" for name in commands}

    monkeypatch.setattr(on_gpu, "find_sanitizer", lambda: tools and "compute-sanitizer")
    monkeypatch.setattr(on_gpu, "_output", lambda *command: "2025.3")
    monkeypatch.setattr(on_gpu, "_side_by_side", side_by_side)
    verdict = on_gpu.sanitizer(record)
    assert verdict.ok is ok
    assert verdict.figures[0] == f"294 cases against NumPy, {wrong} wrong"
    told = results(on_gpu, record, "sanitizer")
    if tools is None:
        assert "not installed" in told[0]["why"]
    else:
        assert {(r["tool"], r["share"]) for r in told} == {
            (tool, share) for tool in on_gpu.TOOLS for share in ("0/3", "1/3", "2/3")
        }


def test_commands_run_side_by_side_and_no_longer_than_they_may(on_gpu):
    texts = on_gpu._side_by_side({i: ["sh", "-c", f"echo {i}; exec sleep {i}"] for i in (0, 60)}, 1)
    assert texts == {0: "0\n", 60: "60\n\nit took more than 1 s\n"}


# ---- architecture functions -----------------------------------------------------------------------------------------


def functions(on_gpu, arch=80):
    rows = []
    return on_gpu.gpu_arch.functions(rows.append, backends.choose("cupy"), arch), rows


def test_functions_of_an_architecture_alone(on_gpu, card):
    fine, rows = functions(on_gpu)
    assert fine
    assert all(row["right"] and row["same_bits"] for row in rows)
    text = (ROOT / "kernels" / "arch.cuh").read_text()
    names = set(re.findall(r"__device__ __forceinline__ \w+ (\w+)\(", text))
    assert names - {"copy_async_commit", "copy_async_wait", "pdl_wait", "pdl_launch"} == {
        row["function"].split()[0] for row in rows
    }
    assert {row["function"].split()[0] for row in functions(on_gpu, 75)[1]} == {"copy_async16"}


WRONG = {
    "copy_async16 of 7 bytes": ("x + 4 * i, bytes)", "x + 4 * i)"),
    "to_tf32": ("to_tf32(__uint_as_float(x[threadIdx.x]))", "x[threadIdx.x] & ~0x1FFFu"),
    "pack_bf16": ("(i + 1) % blockDim.x", "i"),
    "mma_tf32_16x8x8": ("d[i] = all_d[4 * threadIdx.x + i]", "d[i] = 0"),
    "mma_bf16_16x8x16": ("b[i] = all_b[2 * threadIdx.x + i]", "b[i] = all_b[2 * threadIdx.x]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_function_is_found(on_gpu, card, monkeypatch, name):
    for source in ("SOURCE", "SOURCE_80", "PRODUCT"):
        monkeypatch.setattr(on_gpu.gpu_arch, source, getattr(on_gpu.gpu_arch, source).replace(*WRONG[name]))
    fine, rows = functions(on_gpu)
    assert not fine
    assert name in [row["function"] for row in rows if not row["right"]]


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
def test_tests_are_green_only_where_a_gpu_ran_them(on_gpu, card, record, monkeypatch, passed, failed, skipped, ok):
    def run(command, **kwargs):
        assert kwargs["env"]["BACKPROP_GPU_REQUIRE"] == "1"
        Path(next(c for c in command if c.startswith("--junitxml=")).partition("=")[2]).write_text(JUNIT)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(on_gpu.subprocess, "run", run)
    found = {"passed": passed, "failed": failed, "skipped": skipped, "slowest": []}
    monkeypatch.setattr(on_gpu, "junit", lambda path: found)
    assert on_gpu.tests(record).ok is ok
    monkeypatch.setattr(on_gpu.gpu_arch, "functions", lambda *args: True)
    assert on_gpu.kernel_tests(record).ok is ok
    monkeypatch.setattr(on_gpu.gpu_arch, "functions", lambda *args: False)
    assert on_gpu.kernel_tests(record).ok is False


def test_no_test_runs_twice(on_gpu, card, record, monkeypatch):
    asked = []
    monkeypatch.setattr(on_gpu, "_suite", lambda record, which: asked.append(list(which)) or on_gpu.Verdict(True, []))
    on_gpu.kernel_tests(record), on_gpu.tests(record)
    assert asked[1] == [f"--ignore={path}" for path in asked[0]]
    assert all((ROOT / path).is_file() for path in asked[0])


def test_tests_that_take_too_long_leave_what_they_said(on_gpu, record, monkeypatch):
    def run(command, timeout, **kwargs):
        raise subprocess.TimeoutExpired(command, timeout, b"....F... [ 67%]\n")

    monkeypatch.setattr(on_gpu.subprocess, "run", run)
    verdict = on_gpu.tests(record)
    assert verdict.ok is False
    assert verdict.figures == ["there was no time for all tests", "....F... [ 67%]"]


@pytest.mark.parametrize(("cores", "workers"), [(None, "1"), (1, "1"), (4, "3"), (16, "15"), (96, "15")])
def test_a_core_is_left_to_whoever_leads_the_tests(on_gpu, record, monkeypatch, cores, workers):
    asked = []
    monkeypatch.setattr(on_gpu.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(on_gpu.importlib.util, "find_spec", lambda name: name)
    done = subprocess.CompletedProcess([], 3, "", "")
    monkeypatch.setattr(on_gpu.subprocess, "run", lambda command, **kwargs: asked.append(command) or done)
    on_gpu.tests(record)
    assert asked[0][asked[0].index("-n") + 1] == workers


# ---- times, MNIST, counts -------------------------------------------------------------------------------------------


def test_kernels_are_timed_beside_plain_lines_and_copies(on_gpu, card, record):
    rows = functools.partial(on_gpu.kernel_rows, shapes=((5, 7),), networks=((7, 5, 3),))
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
    if drift:
        monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", "eager")
        be = backends.choose("cupy")
        output_delta = be.ops.output_delta

        def off(*args):
            output_delta(*args)
            args[6][...] = args[6] + drift

        monkeypatch.setattr(be.ops, "output_delta", off)
    verdict = on_gpu.mnist(record, (blobs, blobs), (12, 8, 3), 4, 0.9)
    assert verdict.ok is (not drift), verdict
    (curves,) = results(on_gpu, record, "curves")
    assert curves["largest"] == pytest.approx(drift, abs=1e-5)
    assert len(curves["differences"]) == 4
    cupy, numpy = results(on_gpu, record, "run")
    assert (cupy["backend"], numpy["backend"]) == ("cupy", "numpy")
    assert cupy["goal_steps"] in (19, 38, 57, 76)


def test_a_goal_that_is_never_reached_fails(on_gpu, card, record, blobs):
    verdict = on_gpu.mnist(record, (blobs, blobs), (12, 8, 3), 1, 1.01)
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


# ---- cuBLASLt -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0, 60])
def test_the_probe_ends_in_time(on_gpu, monkeypatch, seconds):
    probe, rows, done = on_gpu.gpu_cublaslt, [], []
    monkeypatch.setattr(probe, "_one", lambda emit, card, *what: done.append(what) or True)
    card = types.SimpleNamespace(lib=types.SimpleNamespace(version=120903))
    assert probe.probe(rows.append, card, seconds=seconds)
    skipped = [((r["m"], r["K"], r["N"]), r["precision"], r["boundary"]) for r in rows[1:]]
    assert all(r["skipped"] for r in rows[1:])
    assert [bool(done), bool(skipped)] == [seconds > 0, seconds == 0]
    every = done + skipped
    assert len(every) == len(set(every)) == 5 * 4 + 3 * 4 - 1  # float64 is not at boundaries of 4
    assert all(boundary == 256 for _, _, boundary in every[:20])


# ---- counters -------------------------------------------------------------------------------------------------------

CONNECTED = "==PROF== Connected to process 4711 (/usr/bin/python3.12)\n"
REFUSED = (
    "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters on the "
    "target device 0. For instructions on enabling permissions and to get more information see "
    "https://developer.nvidia.com/ERR_NVGPUCTRPERM\n"
)
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
COLUMNS = {  # name: unit, values of two kernels
    "ID": ("", "0", "1"),
    "Process ID": ("", "4711", "4711"),
    "Kernel Name": ("", "forward", "head"),
    "Block Size": ("", "(256, 1, 1)", "(32, 4, 1)"),
    "Grid Size": ("", "(7, 8, 1)", "(128, 1, 1)"),
    "gpu__time_duration.sum": ("ns", "4,224", "5,056"),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "31.42", "8.5"),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "1.5", "0.7"),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "11", "n/a"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "24.9", "6.2"),
    "launch__registers_per_thread": ("register/thread", "128", "56"),
    STALLED.format("long_scoreboard"): ("inst", "1.25", "9.5"),
    STALLED.format("barrier"): ("inst", "2.5", "0.5"),
    STALLED.format("wait"): ("inst", "0.75", "1"),
    STALLED.format("selected"): ("inst", "1.00", "1"),
    STALLED.format("mio_throttle"): ("inst", "0.1", "0"),
}


def csv_text(columns=COLUMNS):
    """As `ncu --csv --page raw` writes it."""
    out = io.StringIO()
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return CONNECTED + '==PROF== Profiling "forward": 0%....100% - 18 passes\n' + out.getvalue()


OF_A = {"recipe": "A", "precision": "tf32"}
LAUNCHED = f"profiled: {json.dumps([{**OF_A, 'kernel': 'forward'}, {**OF_A, 'kernel': 'head'}])}\n"


def test_counters_are_read(on_gpu):
    forward, head = on_gpu.gpu_counters.read(csv_text(), "a warning\n" + LAUNCHED).rows
    assert forward["duration_ns"] == 4224
    assert forward["processors_percent"] == 31.42
    assert forward["registers"] == 128
    assert (forward["recipe"], forward["grid"], forward["block"]) == ("A", "(7, 8, 1)", "(256, 1, 1)")
    assert list(forward["stalls"].items()) == [
        ("barrier", 2.5),
        ("long_scoreboard", 1.25),
        ("selected", 1),
        ("wait", 0.75),
    ]
    assert head["l2_percent"] is None  # a metric that the card does not have
    assert head["l1_percent"] is None  # and one that is not there
    assert next(iter(head["stalls"])) == "long_scoreboard"


@pytest.mark.parametrize(
    ("log", "said", "refused", "why"),
    [
        (CONNECTED + REFUSED, LAUNCHED, True, "ERR_NVGPUCTRPERM - The user does not have permission"),
        (CONNECTED, "Traceback\nKeyError: 'lost'\n", False, "KeyError: 'lost'"),
        ("", "", False, "no kernel was profiled"),
        (csv_text(), LAUNCHED.replace("head", "delta"), False, "not the same"),
    ],
)
def test_counters_that_cannot_be_read(on_gpu, record, monkeypatch, log, said, refused, why):
    told = on_gpu.gpu_counters.read(log, said)
    assert told.rows == []
    assert told.refused == refused
    assert why in told.why
    monkeypatch.setattr(on_gpu.gpu_counters, "counters", lambda emit, seconds: told)
    verdict = on_gpu.counters(record)
    assert verdict.ok is (None if refused else False)
    assert why in verdict.figures[0]
    assert why in results(on_gpu, record, "counters")[0]["why"]


def test_without_nsight_compute_there_are_no_counters(on_gpu, record, monkeypatch):
    monkeypatch.setattr(on_gpu.gpu_counters, "find", lambda: None)
    assert on_gpu.counters(record) == (None, ["not run: Nsight Compute (ncu) is not installed"])


NCU = """#!/bin/sh
for word; do
    case $before in --log-file) log=$word;; esac
    before=$word
done
cat > "$log" <<'EOF'
{log}EOF
echo '{launched}'
"""


def test_nsight_compute_is_asked(on_gpu, record, monkeypatch, tmp_path):
    tool = tmp_path / "ncu"
    tool.write_text(NCU.format(log=csv_text(), launched=LAUNCHED.strip()))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    verdict = on_gpu.counters(record)
    assert verdict.ok, verdict
    assert [r["kernel"] for r in results(on_gpu, record, "counters")] == ["forward", "head"]
    assert "head: 5.1 us, 8 % of processors, 0 % of l2, 1 % of memory, 6 % of warps" in verdict.figures[1]


def test_what_is_profiled_is_a_step_of_each(on_gpu, card, monkeypatch):
    calls = []
    for name in ("profilerStart", "profilerStop"):
        monkeypatch.setattr(card.cuda.runtime, name, lambda name=name: calls.append(name), raising=False)
    recipe = on_gpu.gpu_recipe.Recipe("A", (784, 7, 10), 5)
    monkeypatch.setitem(on_gpu.gpu_recipe.RECIPES, "A", recipe)
    monkeypatch.setattr(on_gpu.gpu_counters, "PROFILED", (("A", "float32"), ("A", "tf32")))
    launched = []
    for what in on_gpu.gpu_counters.run():
        launched.append((what["precision"], what["kernel"]))
        json.dumps(what)
    assert launched == [(p, k) for p in ("float32", "tf32") for k in ("forward", "head", "gradients")]
    assert calls == ["profilerStart", "profilerStop"] * 2


# ---- turns and peers ------------------------------------------------------------------------------------------------


def test_who_takes_times_is_alone(on_gpu, tmp_path):
    """Four build at a time and time in between; nobody waits for ever, who times least of all."""
    turns, inside, seen = [on_gpu.gpu_recipe.Turns(tmp_path) for _ in range(4)], [], []

    def work(mine):
        for _ in range(20):
            for kind in ("building", "timing"):
                with getattr(mine, kind)():
                    inside.append(kind)
                    seen.append(sorted(inside))
                    threading.Event().wait(0.001)
                    inside.remove(kind)

    threads = [threading.Thread(target=work, args=(mine,), daemon=True) for mine in turns]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert [those for those in seen if "timing" in those and len(those) > 1] == []
    assert ["building"] * 2 in [those[:2] for those in seen]


def test_who_builds_lets_the_one_who_waits_to_time(on_gpu, tmp_path):
    import fcntl

    builder, timer = (on_gpu.gpu_recipe.Turns(tmp_path) for _ in range(2))
    order = []

    def time_it():
        with timer.timing():
            order.append("timing")

    def is_in_line():
        with (tmp_path / "gate").open("a") as gate:
            try:
                fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    with builder.building():
        waits = threading.Thread(target=time_it, daemon=True)
        waits.start()
        assert any(is_in_line() or waits.join(0.01) for _ in range(6000))
        order.append("built")
    with builder.building():
        order.append("building")
    assert order == ["built", "timing", "building"]
    waits.join()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no list of open files")
def test_a_child_that_has_the_file_open_keeps_no_turn(on_gpu, tmp_path):
    import fcntl

    with on_gpu.gpu_recipe.Turns(tmp_path).building():
        links = {int(fd): Path(f"/proc/self/fd/{fd}").resolve() for fd in os.listdir("/proc/self/fd")}
        copy = os.dup(next(fd for fd, path in links.items() if path == tmp_path / "gpu"))
    with (tmp_path / "gpu").open("a") as gpu:
        fcntl.flock(gpu, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(copy)


WORKER = """#!/bin/sh
name=$3
while [ "$1" != --out ]; do shift; done
echo '{"library": "'$name'", "us": 1}' >> "$2"
if [ $name = jax ]; then exec sleep 60; fi
echo torch says why
exit 3
"""


def test_peers_run_side_by_side_and_are_told_as_they_come(on_gpu, tmp_path, monkeypatch):
    (tmp_path / "python").write_text(WORKER)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(on_gpu.gpu_peers.sys, "executable", str(tmp_path / "python"))
    rows = []
    on_gpu.gpu_peers.peers(rows.append, 1)
    assert {"library": "torch", "us": 1} in rows
    assert {"library": "jax", "us": 1} in rows
    errors = {row["library"]: row for row in rows if "error" in row}
    assert errors["torch"]["error"] == "ended with code 3"
    assert errors["torch"]["tail"] == ["torch says why"]
    assert errors["jax"]["error"] == "more than 1 s"


class Peer:
    """A library whose variants are right, wrong, or too long."""

    def __init__(self, peers, exact):
        self.peers, self.exact, self.built = peers, exact, []

    def variants(self, recipe, quick):
        for program, needs, long in (
            ("slow", 20, True),
            ("slower", 2000, True),
            ("plain", 5, False),
            ("off", 5, False),
        ):
            build = functools.partial(self.build, recipe, program)
            yield self.peers.Variant({"program": program, "precision": "float32"}, build, needs, long)

    def build(self, recipe, program):
        self.built.append((recipe.name, program))
        losses, gradient = self.exact(recipe)
        run = self.peers.Program(lambda: None, lambda: None, recipe.steps)
        return self.peers.Trained(run, [loss + (program == "off") for loss in losses], gradient)


def test_what_takes_long_to_compile_comes_last(on_gpu, monkeypatch):
    exact = functools.cache(lambda recipe: ([1.0] * 5, [np.ones(3)]))
    monkeypatch.setattr(on_gpu.gpu_recipe, "reference", exact)
    library, rows = Peer(on_gpu.gpu_peers, exact), []
    end = on_gpu.time.monotonic() + 100
    on_gpu.gpu_peers.measure(library, rows.append, False, False, end, on_gpu.gpu_recipe.ALONE)
    assert library.built == [(r, p) for r in "ABCD" for p in ("plain", "off")] + [(r, "slow") for r in "ABCD"]
    assert {row["program"] for row in rows if "us" in row} == {"plain", "slow"}
    assert [row["rejected"] for row in rows if row["program"] == "off"] == ["losses off by 1"] * 4
    assert all("less than 2000" in row["skipped"] for row in rows if row["program"] == "slower")
    assert len(rows) == 16


def test_kernels_of_all_graphs_are_built_ahead(on_gpu, monkeypatch):
    asked = []

    def run(command, timeout, **kwargs):
        asked.append(command[-3:])
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(on_gpu.gpu_steps.subprocess, "run", run)
    on_gpu.gpu_steps.build_ahead(9)
    every = [["--build", recipe, precision] for recipe in "ABCD" for precision in ("float32", "tf32", "bf16")]
    assert sorted(asked) == sorted(every)


def test_kernels_of_one_graph_are_built(on_gpu, card, monkeypatch):
    recipe = on_gpu.gpu_recipe.Recipe("A", (784, 7, 10), 5)
    monkeypatch.setitem(on_gpu.gpu_recipe.RECIPES, "A", recipe)
    monkeypatch.setattr(on_gpu.gpu_recipe.Recipe, "steps", 3)
    monkeypatch.setattr(on_gpu.gpu_steps.sys, "argv", ["", "--build", "A", "tf32"])
    fake_cupy.Counts.kernels.clear()
    assert on_gpu.gpu_steps.main() == 0
    assert {"forward", "head", "gradients", "update"} <= fake_cupy.Counts.kernels


def test_own_steps_and_peers_are_one_part(on_gpu, record, monkeypatch):
    def steps(emit, turns):
        with turns.timing():
            emit({"recipe": "A", "precision": "tf32", "library": "backprop_gpu", "program": "graph", "us": 7.0})
        return True

    def peers(emit, seconds, folder):
        with on_gpu.gpu_recipe.Turns(folder).timing():
            emit({"recipe": "A", "precision": "tf32", "library": "jax", "program": "scan", "us": 9.0})

    monkeypatch.setattr(on_gpu.gpu_steps, "build_ahead", lambda limit: None)
    monkeypatch.setattr(on_gpu.gpu_steps, "steps", steps)
    monkeypatch.setattr(on_gpu.gpu_peers, "peers", peers)
    verdict = on_gpu.steps(record)
    assert verdict == (True, ["A tf32: 7.0 us, gradient error nan; best peer 9.0 us, jax scan"])
    assert len(results(on_gpu, record, "step")) == 2


# ---- all parts ------------------------------------------------------------------------------------------------------

STANDS_IN = """
import json, os, signal, sys, time
directory, part, seconds = sys.argv[1:]
def tell(**r):
    with open(os.path.join(directory, "results.jsonl"), "a") as f:
        f.write(json.dumps({"part": part, **r}) + "\\n")
if part == "tests":
    print("Segmentation fault", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if part == "floors":
    tell(what="before")
    time.sleep(60)
tell(what="verdict", ok=None if part == "mnist" else part != "kernels", figures=["all | well"])
"""


@pytest.fixture
def stands_in(tmp_path):
    (tmp_path / "part.py").write_text(STANDS_IN)
    return [sys.executable, str(tmp_path / "part.py")]


def test_a_part_that_fails_dies_or_hangs_does_not_stop_the_next(on_gpu, tmp_path, monkeypatch, capsys, stands_in):
    monkeypatch.setattr(on_gpu, "LIMITS", {**on_gpu.LIMITS, "environment": 5, "floors": 1})
    code = on_gpu.run_all(tmp_path / "out", stands_in)
    assert code == 1
    verdicts = {r["part"]: r["ok"] for r in on_gpu.read(tmp_path / "out") if r["what"] == "verdict"}
    assert verdicts == {
        "environment": True, "floors": False, "kernel_tests": True, "kernels": False, "cublaslt": True, "steps": True,
        "counters": True, "mnist": None, "counts": True, "sanitizer": True, "tests": False,
    }  # fmt: skip
    assert list(verdicts) == list(on_gpu.LIMITS)
    text = (tmp_path / "out" / "summary.md").read_text()
    assert re.search(r"\| tests \| failed \| \d+ \| it ended with code -9<br>Segmentation fault \|", text)
    assert re.search(r"\| floors \| failed \| \d+ \| it took more than \d s \|", text)
    assert [r["what"] for r in on_gpu.read(tmp_path / "out") if r["part"] == "floors"] == ["before", "verdict", "time"]
    assert "| mnist | not run |" in text
    assert "all \\| well" in text
    assert capsys.readouterr().out.endswith("failed: floors, kernels, tests\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.jsonl", "summary.md"]


def test_what_a_part_leaves_over_is_the_next_ones(on_gpu, tmp_path, monkeypatch):
    clock, given = [5.0], []

    def limited(command, seconds):
        given.append((seconds, float(command[-1])))
        on_gpu.Record(tmp_path, command[-2])("verdict", ok=True, figures=["well"])
        clock[0] += 3
        return 0, ""

    monkeypatch.setattr(on_gpu, "LIMITS", {"environment": 100, "kernels": 10, "steps": 1000, "mnist": 0})
    monkeypatch.setattr(on_gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(on_gpu, "_limited", limited)
    assert on_gpu.run_all(tmp_path, ["part"]) == 0
    assert given == [(100, 100), (107, 107), (1104, 1104), (1101, 1101)]


def test_a_part_that_raises_leaves_a_verdict(on_gpu, tmp_path, monkeypatch):
    def raises(record):
        record("first", value=np.float32(1.5))
        raise KeyError("lost")

    monkeypatch.setitem(on_gpu.PARTS, "counts", raises)
    assert on_gpu.run_part(tmp_path, "counts", 9) == 1
    first, verdict = on_gpu.read(tmp_path)
    assert first["value"] == 1.5
    assert verdict["ok"] is False
    assert verdict["figures"][0] == "KeyError: 'lost'"


def test_all_limits_together_are_eight_minutes(on_gpu):
    assert sum(on_gpu.LIMITS.values()) <= 8 * 60
    assert list(on_gpu.LIMITS) == list(on_gpu.PARTS)


def test_the_table_of_kernels_marks_what_is_doubtful(on_gpu):
    steady, shaky = ({"us": 2.0, "spread": spread} for spread in (0.01, 0.5))
    row = {"part": "kernels", "what": "kernel", "kernel": "drop", "shape": "1", "launches": 1, "how": "graph", **shaky}
    row |= {"plain": steady, "plain_how": "eager", "gain": 1.0, "GBps": 5.0, "share_of_memory": 0.5, "copy_us": 1.0}
    assert "| drop | 1 | 1 | 2.00 ! | 2.00 eager | 1.0 | 5 | 50% | 1.00 |" in on_gpu.summary([row])


@pytest.mark.parametrize("arguments", [[], ["a", "floors", "c"], ["a", "nonsense"], ["a", "--cases"]])
def test_usage(on_gpu, arguments, capsys):
    with pytest.raises(SystemExit) as e:
        on_gpu.main(arguments)
    assert e.value.code == 2
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
