"""Processes that are killed: saves at each of their system calls or at random, training runs at random.

    python tests/killed.py saves --at "every call" | random [--kills 1000]
    python tests/killed.py runs [--cuts 100]

prints a line of JSON: how many were killed, and what was lost. Linux alone: a save is followed with ptrace(2), from one
system call to the next, entry and return each.
"""

import argparse
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "BACKPROP_GPU_BACKEND": "numpy", "BACKPROP_GPU_FAST": "0"}
TRACEME, SYSCALL, SETOPTIONS, GOOD = 0, 24, 0x4200, 1  # GOOD: stops at system calls can be told from signals


def saves(folder, at, kills=1000, seed=0):
    """In a process of its own, whose forks are killed."""
    return _apart("saves", "--folder", folder, "--at", at, "--kills", kills, "--seed", seed)


def runs(folder, cuts, seed=0):
    """Likewise."""
    return _apart("runs", "--folder", folder, "--cuts", cuts, "--seed", seed)


def _apart(*args):
    command = [sys.executable, __file__, *map(str, args)]
    done = subprocess.run(command, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _fork(work):
    """A child that does `work` and is gone."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as e:
            os.write(2, f"{type(e).__name__}: {e}\n".encode())
            os._exit(1)
    return child


def _saves(folder, at, kills, seed):
    import backprop_gpu as bp

    path, rng = Path(folder) / "m", random.Random(seed)
    old, new = (bp.Network([6, 5, 3], backend="numpy", seed=s) for s in (1, 2))
    bp.save(new, path)  # everything is imported
    found = {"kills": 0, "old": 0, "new": 0, "lost": [], "left_behind": 0}

    def look(k):
        try:
            theta = bp.load(path, "numpy").theta
            kind = next((n for n, net in (("old", old), ("new", new)) if np.array_equal(theta, net.theta)), None)
        except bp.CheckpointError as e:
            kind = None
            print(e, file=sys.stderr)
        if kind is None:
            found["lost"].append(k)
        else:
            found[kind] += 1
        found["kills"] += 1

    if at == "every call":
        k, over = 1, False
        while not over:
            bp.save(old, path)
            over = _killed_at(lambda: bp.save(new, path), k)
            if not over:
                look(k)
            k += 1
    else:

        def work():
            while True:
                bp.save(new, path)
                bp.save(old, path)

        for k in range(kills):
            child = _fork(work)
            time.sleep(rng.uniform(0, 0.04))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            look(k)
    bp.save(old, path)  # sweeps
    found["left_behind"] = len(os.listdir(folder)) - 1
    return found


def _killed_at(work, k):
    """Do `work` in a child that is killed at the k-th stop at a system call in it; True where there are fewer."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes, ptrace.restype = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p], ctypes.c_long

    def followed():
        if ptrace(TRACEME, 0, None, None):
            raise OSError(ctypes.get_errno(), "ptrace is not to be had")
        os.kill(os.getpid(), signal.SIGSTOP)
        work()
        os.kill(os.getpid(), signal.SIGSTOP)

    child = _fork(followed)
    _, status = os.waitpid(child, 0)
    if not os.WIFSTOPPED(status):
        raise OSError("the child could not be followed")
    ptrace(SETOPTIONS, child, None, GOOD)
    stops = 0
    while True:
        ptrace(SYSCALL, child, None, None)
        _, status = os.waitpid(child, 0)
        assert os.WIFSTOPPED(status), status
        over = os.WSTOPSIG(status) == signal.SIGSTOP
        stops += os.WSTOPSIG(status) == signal.SIGTRAP | 0x80
        if over or stops == k:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return over


def _runs(folder, cuts, seed):
    """Runs that are killed at random moments until they are over, each beside one that never was."""
    import backprop_gpu as bp

    rng, data = random.Random(seed), np.random.default_rng(seed)
    X, T = data.normal(size=(400, 10)), data.integers(0, 3, 400)
    found = {"cuts": cuts, "kills": 0, "runs": 0, "different": []}

    def train(path, resume=True):
        net = bp.Network([10, 8, 3], backend="numpy", dropout=0.1)
        settings = {"validation": 0.2, "patience": 50, "schedule": "cosine", "gradient_norms": True}
        bp.train(
            net, X, T, epochs=12, batch_size=8, save=path, checkpoint_every="7 steps", resume=resume, **settings
        )  # fmt: skip

    start = time.perf_counter()
    train(Path(folder) / "whole", resume=False)
    took, wanted = time.perf_counter() - start, _tensors(Path(folder) / "whole")
    while found["kills"] < cuts:
        path = Path(folder) / f"cut{found['runs']}"
        while True:
            child = _fork(lambda path=path: train(path))
            time.sleep(rng.uniform(0, took / 2))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0
                break
            found["kills"] += 1
        if _tensors(path) != wanted:
            found["different"].append(found["runs"])
        found["runs"] += 1
        path.unlink()
    return found


def _tensors(path):
    from safetensors.numpy import load

    return {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in load(path.read_bytes()).items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["saves", "runs"])
    parser.add_argument("--at", choices=["every call", "random"], default="random")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder")
    given = parser.parse_args()
    os.environ |= ONE_THREAD
    with tempfile.TemporaryDirectory() as own:
        where = given.folder or own
        of = (
            _saves(where, given.at, given.kills, given.seed)
            if given.what == "saves"
            else _runs(where, given.cuts, given.seed)
        )
    print(json.dumps(of))
