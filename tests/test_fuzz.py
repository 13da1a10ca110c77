"""The readers among damaged files, some hundreds each; and the fuzzer itself, which must see what is planted for it."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import fuzz
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backprop_gpu as bp
from backprop_gpu.datasets import idx

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="files in memory alone are Linux's")


@pytest.mark.parametrize(("name", "examples"), [("idx", 300), ("npy", 250), ("npz", 200), ("model", 200)])
def test_of_a_damaged_file_comes_an_error_or_what_is_in_it(name, examples):
    reader, tally = fuzz.READERS[name], fuzz.Tally()

    @settings(max_examples=examples, derandomize=True, database=None)
    @given(run=st.integers(0, 2**62))
    def feed(run):
        content = reader.draw(0, run)
        with fuzz.Stage() as stage:  # memory is traced no longer than is needed: it takes time
            fuzz.examine(reader, content, stage, tally)

    feed()
    assert tally.accepted > 5
    assert len(tally.causes) > 15


def test_the_same_run_has_the_same_input():
    for reader in fuzz.READERS.values():
        reader.made = []
        inputs = [reader.draw(3, run) for run in range(20)]
        assert len(set(inputs)) > 15
        reader.made = []
        assert [reader.draw(3, run) for run in range(20)] == inputs


@pytest.mark.parametrize(("name", "accepted"), [("idx", 10), ("npy", 8), ("npz", 2), ("model", 7)])
def test_what_inputs_are_made_of_is_sound(name, accepted):
    reader, tally = fuzz.READERS[name], fuzz.Tally()
    with fuzz.Stage() as stage:
        for content in reader.seeds:
            fuzz.examine(reader, content, stage, tally)
    assert tally.accepted == accepted


def believe_the_header(patch):
    patch.setattr(idx, "DEFLATE_LIMIT", 1 << 40)


def read_anything(patch):
    patch.setattr(fuzz.READERS["npy"], "read", np.load)


def give_zeros_for_what_is_damaged(patch):
    def read(path):
        try:
            return bp.datasets.read_idx(path, 3)
        except bp.DataError:
            return np.zeros((1, 1, 1), np.uint8)

    patch.setattr(fuzz.READERS["idx"], "read", read)


def talk(patch):
    def read(path):
        raise bp.DataError(f"{path} holds\n{path.read_bytes()!r}", "look at it")

    patch.setattr(fuzz.READERS["npz"], "read", read)


def take_every_number(patch):
    patch.setattr(np, "isfinite", lambda a: np.ones(np.shape(a), bool))


@pytest.mark.parametrize(
    ("name", "plant", "words"),
    [
        ("idx", believe_the_header, "bytes of memory for a file of"),
        ("npy", read_anything, "another error than DataError"),
        ("idx", give_zeros_for_what_is_damaged, "another array than the file's"),
        ("npz", talk, "an error of other than two lines"),
        ("model", take_every_number, "parameters that are not finite"),
    ],
)
def test_what_is_planted_is_found_and_kept(tmp_path, monkeypatch, name, plant, words):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert fuzz.READERS[name].seeds
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(fuzz.Finding, match=words) as e:
            fuzz.fuzz(name, 2000)
    (kept,) = tmp_path.iterdir()
    assert f"kept in {kept}" in str(e.value)
    run = int(kept.name.rpartition("-")[2])
    assert kept.read_bytes() == fuzz.READERS[name].draw(0, run)
    assert fuzz.fuzz(name, 1, first=run).runs == 1  # what is not planted does not find it


PLANTED = """
import os, sys
import fuzz
fuzz.PATIENCE = 0.5
reader, parent = fuzz.READERS["idx"], os.getpid()
sound = reader.read
def read(path):
    if os.getpid() != parent and path.stat().st_size == 16:
        {}
    return sound(path)
reader.read = read
sys.exit(fuzz.main(["idx", "--runs", "300"]))
"""


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("pass", "300 runs in"),
        ("os.abort()", "the process ended with status -6"),
        ("while True: pass", "no answer within 0.5 s"),
    ],
    ids=["nothing", "crash", "hang"],
)
def test_from_the_command_line_also_crashes_and_hangs_are_found(tmp_path, fault, words):
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", PLANTED.format(fault)], env=env, capture_output=True, text=True, check=False
    )
    assert words in done.stdout, done.stdout + done.stderr
    assert done.returncode == (fault != "pass")
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert sizes == [16] * (fault != "pass")
