"""The package as a whole: what importing it does, who may import cupy, both sets of operations, kernels, the wheel."""

import ast
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import backprop_gpu as bp
from backprop_gpu import cuda_source

TOP = Path(__file__).resolve().parent.parent
PACKAGE = Path(bp.__file__).parent
MAY_IMPORT_CUPY = {"backend.py", "cuda_ops.py", "cublaslt.py", "executors.py", "distributed.py"}

WATCH = """
import sys
bad = []
def watch(event, args):
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        bad.append((event, args))
    if event.startswith(("socket.", "subprocess.", "os.mkdir", "os.rename", "os.remove", "ctypes.dlopen")):
        bad.append((event, args))
import ctypes, numpy, gzip  # what numpy and the standard library do is theirs
sys.addaudithook(watch)
import backprop_gpu
eager = [name for name in sys.modules if name.startswith("backprop_gpu.")]
for name in backprop_gpu.__all__:
    getattr(backprop_gpu, name)
heavy = {"cupy", "numba", "click", "rich", "safetensors", "matplotlib", "sklearn", "backprop_gpu.bench"}
heavy &= set(sys.modules)
sys.exit(f"did {bad}, imported {heavy} in the end and {eager} at once" if bad or heavy or eager else 0)
"""


def test_importing_imports_modules_when_they_are_used_and_touches_nothing():
    done = subprocess.run([sys.executable, "-B", "-c", WATCH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_there_in_any_order_and_no_others_are():
    assert set(bp.__all__) < set(dir(bp))
    assert (bp.schedules.__name__, bp.load.__name__) == ("backprop_gpu.schedules", "load_network")
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = bp.trian
    code = "import backprop_gpu.cli, backprop_gpu as bp; assert callable(bp.gradient_check) and callable(bp.train)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def imported(node):
    """The module names that a node of the syntax tree imports, by statement, import_module or sys.modules."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [a.value for a in node.args if isinstance(a, ast.Constant)]
    if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("sys.modules"):
        return [ast.literal_eval(node.slice)] if isinstance(node.slice, ast.Constant) else []
    return []


def test_only_the_backend_imports_cupy():
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in imported(node):
                if name.partition(".")[0] in ("cupy", "cupyx"):
                    assert path.name in MAY_IMPORT_CUPY, f"{path}:{node.lineno} imports {name}"
                    seen.add(path.name)
    assert seen == {"backend.py", "cuda_ops.py", "cublaslt.py"}


def signatures(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (names,) = (
        ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"
    )
    functions = {n.name: ast.unparse(n.args) + " -> " + ast.unparse(n.returns) for n in tree.body if hasattr(n, "args")}
    return {name: functions.get(name) for name in names}


def test_both_sets_of_operations_have_the_same_names_and_signatures():
    numpy_ops, cuda_ops = signatures(PACKAGE / "numpy_ops.py"), signatures(PACKAGE / "cuda_ops.py")
    # NumPy's executors prepare a rule once; a GPU's update is a kernel.
    numpy_ops["update"] = numpy_ops["update"].replace(", apply: Rule | None=None", "")
    assert numpy_ops == cuda_ops
    assert {"gather", "affine_activate", "output_delta", "hidden_delta", "weight_gradient", "update"} <= set(numpy_ops)


def test_no_pickle():
    for path in [*PACKAGE.rglob("*.py"), *(TOP / "benchmarks").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text, path
        assert "allow_pickle=True" not in text, path


def test_public_names_are_documented():
    for name in bp.__all__:
        thing = getattr(bp, name)
        assert thing.__doc__, name
        for attribute, value in vars(thing).items() if isinstance(thing, type) else ():
            if not attribute.startswith("_") and callable(value):
                assert value.__doc__, f"{name}.{attribute}"


# ------------------------------------------------------------------------------------------ kernels and wheel

KERNELS = sorted(p.name for p in (TOP / "kernels").glob("*.cu"))


def test_kernels_are_found_in_this_installation():
    assert KERNELS
    for name in KERNELS:
        assert cuda_source.read(name) == (TOP / "kernels" / name).read_text(encoding="utf-8")


TRAIN = """
import sys, backprop_gpu as bp
from backprop_gpu import cuda_source
assert bp.__file__.startswith(sys.argv[1]), bp.__file__
assert "probe" in cuda_source.read("probe.cu")
train, test = bp.datasets.load("mnist")
net = bp.Network([784, 16, 10])
history = bp.train(net, train.images[:2000], train.labels[:2000], epochs=2)
assert history.steps == [16, 32] and history.train_cost[1] < history.train_cost[0]
bp.save(net, "model.safetensors")
assert bp.load("model.safetensors").predict(test.images[:5]).shape == (5,)
"""


def test_the_wheel_trains_in_a_fresh_environment(tmp_path):
    """Built from a copy of the sources, without the network; the fresh environment borrows the dependencies alone."""
    source = tmp_path / "source"
    unwanted = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    shutil.copytree(TOP, source, ignore=unwanted)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")

    fresh = tmp_path / "venv"
    venv.create(fresh, with_pip=False, symlinks=True)
    (site,) = fresh.glob("lib/python*/site-packages")
    install = ["install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    import numpy

    (site / "borrowed.pth").write_text(str(Path(numpy.__file__).parent.parent))
    done = subprocess.run(
        [str(fresh / "bin" / "python"), "-c", TRAIN, str(site)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (site / "backprop_gpu" / "kernels" / "probe.cu").is_file()
    assert (site / "backprop_gpu" / "datasets" / "mnist" / "NOTICE").is_file()
    assert (site / "backprop_gpu" / "py.typed").is_file()


def test_the_readme_names_tests_that_exist():
    named = re.findall(r"`((?:sources/)?test_\w+\.py)::(\w+)`", (TOP / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (TOP / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_a_plain_checkout_trains(tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("backprop_gpu", "kernels"):
        shutil.copytree(TOP / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(checkout)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_tests_that_hold_what_the_readme_promises_are_there():
    table = (TOP / "README.md").read_text(encoding="utf-8").split("### What can go wrong")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 35
    for row in rows:
        named = re.findall(r"`(test_\w+)::(test_\w+)`", row.split("|")[3])
        assert named, row
        for file, name in named:
            assert f"\ndef {name}(" in (TOP / "tests" / f"{file}.py").read_text(encoding="utf-8"), (file, name)
