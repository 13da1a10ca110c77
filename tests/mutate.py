"""Breaks the formulas one at a time (a sign, a factor, a transpose, a statement) and shows which test turns red.

    python tests/mutate.py                       150 mutants, drawn with seed 0 from all modules
    python tests/mutate.py --seed 1 --count 40
    python tests/mutate.py --all --module costs  every mutant of backprop_gpu/costs.py
    python tests/mutate.py --list                all mutants there are, without a run
    python tests/mutate.py --equivalent          those of EQUIVALENT: each should survive

It works on a copy of the repository in a temporary directory, never on the tree itself. The sites are found in the
syntax trees of the modules in SCOPE; what numba compiles is not among them, for its cache knows files alone. Each
mutant meets the tests of its module in the order of PLAN, quickest first, up to the first that turns red; one that
makes them hang is killed too. Tests that are red without a mutant do not count. The exit status is 1 where a mutant
survives that EQUIVALENT does not name.

Wants a system with fork: the libraries are imported once, each mutant is tested in a child.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import itertools
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "backprop_gpu"
COPIED = (PACKAGE, "kernels", "tests", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE")

# Module: the functions and classes whose formulas are broken, as patterns; "module" is what stands outside of both.
SCOPE = {
    "network": "forward backward Views.* _padded Batch.* Network._place Network.to Network.weight_mask Network._page "
    "Network._scores Network.predict Network.carry_over Network.parameter_count forward_chunks natural_task",
    "activations": "* module",
    "costs": "*",
    "dropout": "* module",
    "regularization": "*",
    "initializers": "* module",
    "batches": "generator epoch_plan split_off steps_per_epoch module",
    "numpy_ops": "* module",
    "recording": "* module",
    "blas": "_Threads.* matmul cores module",
    "cuda_ops": "* module",
    "cuda_source": "*",
    "executors": "Eager.* Replay.* Graph.* _Order.* device_of choose _found",
    "plan": "Workspace.* Plan.* arithmetic_of precision_of",
    "tiles": "Tile.* choose_tile",
    "grids": "* module",
    "tally": "Tally.* GraphTally.* _Forward.*",
    "driver": "launch_early _packed",
    "training": "train evaluate _as_it_ended",
    "loop": "Loop.* recall evaluation whole _gradient_norms _norm lr_of",
    "resume": "Checkpoints.* _difference described digests digest whereabouts",
    "checkpoint": "RunState.* write before_trained _fill _tensors_of _in_order",
    "files": "replace _locked _sweep _remove_if_stale _flush",
    "gpu_faults": "*",
    "stopping": "*",
    "inputs": "sample_weights class_weights",
    "optimizers": "* module",
    "schedules": "* module",
}
NOT_FORMULAS = (  # the checks of what users give, and what only tells
    "*.of check_own_name fill *.check *.__post_init__ *._pair *._number *._least_eps choose_* _hooks _length _count "
    "_keep *.__repr__ *.__len__ *.smoothed"
).split()

OPERATIONS = {  # of an array module, or methods of arrays
    "add": "subtract", "subtract": "add", "multiply": "divide", "divide": "multiply", "maximum": "minimum",
    "minimum": "maximum", "greater": "greater_equal", "greater_equal": "greater", "equal": "not_equal", "exp": "expm1",
    "expm1": "exp", "log": "log1p", "log1p": "log", "sqrt": "positive", "square": "positive", "absolute": "positive",
    "negative": "positive", "tanh": "positive", "sign": "positive", "right_shift": "left_shift",
    "bitwise_xor": "bitwise_or", "bitwise_and": "bitwise_or", "argmax": "argmin", "max": "min", "min": "max",
    "sum": "mean", "all": "any", "any": "all", "isfinite": "isnan", "cos": "sin", "ceil": "floor", "floor": "ceil",
    "cumsum": "cumprod", "zeros": "ones", "logical_and": "logical_or", "count_nonzero": "size",
}  # fmt: skip
GUARDED = "cuda_ops", "cuda_source"  # whose checks count too: nothing behind them looks at what a kernel is given
BUILTINS = {"max": "min", "min": "max", "abs": "float", "round": "int"}
BINARY = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.Pow: ("**", "*"),
    ast.FloorDiv: ("//", "/"), ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"), ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"), ast.Mod: ("%", "/"),
}  # fmt: skip
COMPARISONS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}  # fmt: skip
ORDERED = {"matmul", "subtract", "divide"}  # the order of whose arguments matters
NO_FORMULA_STATEMENTS = r"super|object\.|warnings|_?check|lookup|_refuse|_call|whole_steps|save|rule\.check|inputs\."
NO_FORMULA_CALLS = {
    "_refuse_rows",
    "perf_counter",
    "lookup",
    "number",
    "isinstance",
    "warn",
    "DivergenceError",
    "property",
    "dataclass",
    "TypeVar",
}

_OPERATIONS, _GRADIENTS = "tests/test_operations.py", "tests/test_gradients.py"
_KERNELS, _DEVICE = "tests/test_kernels.py", ("tests/test_device_training.py",)
_ONE_SIZE = "not float32 and not 1-1 and not 1-31 and not 33-1 and not 3-257 and not 127-10"
_QUICK = "own_functions dropout regularization weights network layers stopping training inputs"


def _plan(first: str, *later: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Stages, each the arguments of pytest: the files of these names, what is said, and the rest of the quick files."""
    rest = [name for name in _QUICK.split() if name not in first.split()]
    quick, slow = (tuple(f"tests/test_{name}.py" for name in names) for names in (first.split(), rest))
    return [stage for stage in (quick, *later, slow) if stage]


_ON_NUMPY = (_OPERATIONS, "-k", f"not fake and {_ONE_SIZE}"), (_OPERATIONS, "-k", "not fake")
_ON_KERNELS = (  # which are compiled once and then kept between runs
    (_OPERATIONS, "-k", f"fake and {_ONE_SIZE}"),
    ("tests/test_own_functions.py",),
    (_KERNELS, "-k", "plain and small"),
    _DEVICE,
    (_KERNELS, "-k", "plain"),
    (_OPERATIONS, "-k", "fake"),
)

# Module: what each mutant of it meets, quickest first.
PLAN = {
    "network": _plan("network layers dropout weights regularization", (_GRADIENTS, "-k", "True-2 or (tanh and False)")),
    "activations": _plan("", *_ON_NUMPY, (_KERNELS, "-k", "expression and (plain or two)")),
    "costs": _plan("own_functions regularization", *_ON_NUMPY, (_KERNELS, "-k", "(expression or ones_own) and plain")),
    "dropout": _plan("dropout", (_KERNELS, "-k", "dropout and plain")),
    "regularization": _plan("regularization"),
    "initializers": _plan("network"),
    "batches": _plan("stopping"),
    "numpy_ops": [*_plan("weights network", *_ON_NUMPY), ("tests/test_memory.py",)],
    "recording": [("tests/test_recording.py",), *_plan("training weights")],
    "blas": [("tests/test_blas.py",), *_plan("training")],
    "cuda_ops": [*_ON_KERNELS],
    "cuda_source": [
        (_KERNELS, "-k", "plain and (gather or launches)"),
        ("tests/test_package.py", "-k", "found"),
        *_ON_KERNELS,
    ],
    "executors": [
        ("tests/test_graph.py", "tests/test_tally.py"),
        ("tests/test_recording.py",),
        _DEVICE,
        ("tests/test_wide.py", "tests/test_bf16_products.py"),
        ("tests/test_streaming.py",),
        *_plan("weights regularization dropout"),
    ],
    "plan": [
        ("tests/test_plan.py", "tests/test_bf16_products.py"),
        ("tests/test_wide.py",),
        _DEVICE,
        ("tests/test_graph.py",),
    ],
    "tiles": [("tests/test_plan.py",), ("tests/test_step_kernels.py", "-k", "plain")],
    "grids": [*_ON_KERNELS, ("tests/test_wide.py", "-k", "parts")],
    "tally": [("tests/test_tally.py",), ("tests/test_streaming.py", "-k", "validation")],
    "driver": [("tests/test_plan.py",)],
    "training": [*_plan("stopping weights", _DEVICE), ("tests/test_resume.py", "-k", "not fake")],
    "loop": [*_plan("stopping weights", ("tests/test_resume.py",), ("tests/test_tally.py",), _DEVICE)],
    "resume": [("tests/test_resume.py", "-k", "not fake")],
    "checkpoint": [("tests/test_checkpoint.py", "-k", "not fake"), ("tests/test_resume.py", "-k", "not fake")],
    "files": [("tests/test_checkpoint.py", "-k", "not fake"), ("tests/test_resume.py", "-k", "not cut")],
    "gpu_faults": [("tests/test_gpu_faults.py",)],
    "stopping": _plan("stopping"),
    "inputs": _plan("weights"),
    "optimizers": _plan("optimizers"),
    "schedules": _plan("schedules"),
}
LIMIT = 600.0  # seconds for a stage without a mutant; with one it may take five times what it took, and 20 more
WRONG_PACKAGE = 71  # a status that pytest has not

# Mutants that change no behaviour, and why: (module, line with the mutant in it), or (module, line as it is) for every
# mutant of that line, in both without a comment. A dropped statement reads "pass  # its first line".
_SCRATCH = "another scratch array, free there too"
_HEED = "decides only when a copy is kept to go back to, far from where it is needed"
_PRODUCT = "spares a product with 1"
_TUNED = "how work is shared out, for speed"
EQUIVALENT: dict[tuple[str, str], str] = {
    ("costs", "cost.from_Y(ops, Y, T, Delta, C, s[1])"): _SCRATCH,
    ("costs", "cost.from_Z(ops, Z, T, Delta, C, s[1], cost.smoothing)"): _SCRATCH,
    ("costs", "xp.greater_equal(Z, 0, out=s)"): "differs where z = 0 alone, and is multiplied by z",
    ("costs", "xp.equal(largest, 0, out=s[:, :2])"): "one more column of scratch, written anew before it is read",
    ("costs", "xp.subtract(largest, s[:, :1], out=largest)"): "-1 for 1 where y = t: 0 is divided and multiplied by it",
    ("costs", "xp.subtract(C, s[:, 0], out=s[:, 0])"): "-1 for 1 where y = t: 0 is divided by it",
    ("numpy_ops", "BLOCK = 1 << 17"): "how much is done at a time, for speed",
    ("numpy_ops", "HUGE_STEP = 1e12"): _HEED,
    ("numpy_ops", "risky = max(lr, 2.0) * reach > HUGE_STEP or lr * rule.weight_decay >= 1"): _HEED,
    ("numpy_ops", "risky = max(lr, 1.0) * reach >= HUGE_STEP or lr * rule.weight_decay >= 1"): _HEED,
    ("numpy_ops", "risky = max(lr, 1.0) * reach > HUGE_STEP or lr * rule.weight_decay > 1"): _HEED,
    ("numpy_ops", "risky = max(lr, 1.0) * reach > HUGE_STEP or lr * rule.weight_decay >= 2"): _HEED,
    ("numpy_ops", "reach = 2 + math.sqrt(norm2)"): _HEED,
    ("numpy_ops", "reach = 1 + float(norm2)"): _HEED,
    ("numpy_ops", "reach += rule.weight_decay * float(float(np.dot(theta, theta)))"): _HEED,
    ("grids", "MOST_BLOCKS = 1024"): _TUNED,
    ("grids", "MOST_PARTS = 256"): _TUNED,
    ("grids", "CHUNK = 256"): _TUNED,
    ("grids", "FILLED = 128"): _TUNED,
    ("cuda_ops", "NARROW = 64"): _TUNED,
    ("cuda_ops", "LONG_ROW = 1024"): _TUNED,
    (
        "tally",
        "sums = be.zeros(2 * math.ceil(len(samples) * CHUNK_ROWS), np.dtype(np.float64)).reshape(-1, 2)",
    ): "more rows of zeros",
    (
        "tally",
        "be.ops.output_delta(self.cost, net.g, Z, T, 2.0, batch.Delta[-1], batch.C)",
    ): "of Delta, which is not used",
    ("tally", "room = None if is_cupy(samples.X) else 1"): "too little for a batch, as 0",
    (
        "tally",
        "super().__init__(problem, SGD(1.0), chunk, 0, len(self.ends) - 1)",
    ): "nothing is trained or dropped; rows to spare",
    (
        "executors",
        "if self.feed and (most != 1 or self.feed.rest(i) == 1):",
    ): "when the next chunk is fetched, for speed",
    ("plan", "rows = 1 if m < 2 * self.device.processors else HEAD_WARPS"): _TUNED,
    ("tally", "self.t = 2"): "there is no step to come back to",
    ("tally", "i += self._launch(i, n + i)"): "where the data ends there are no more steps",
    (
        "cuda_ops",
        'pairs = out if chunks == 1 else scratch("pairs", (chunks, 3), np.float64)',
    ): "more scratch than is used",
    ("cuda_ops", "elif scale == 2:"): _PRODUCT,
    ("numpy_ops", "elif scale == 2:"): _PRODUCT,
    ("cuda_ops", "m, n = len(out), out.size / len(out)"): "a whole number all the same, and made an integer",
    (
        "cuda_ops",
        'return scratch("spare 1", M.shape, M.dtype), scratch("spare 0", M.shape, M.dtype)',
    ): "one scratch array for the other",
    ("stopping", "return self._deadline is not None and time.perf_counter() >= self._deadline"): "one tick of a clock",
    ("optimizers", "while at < t and M > 1.1e-20:"): "how small a product counts as none",
    ("optimizers", "weight_decay = 0.0"): "every rule has a field of that name",
    ("optimizers", '"sgd": (0.33, SGD),'): "a recommendation, no formula",
    (
        "schedules",
        "return max(1, math.ceil(round(length * total, 7))) if length < 1 else int(length)",
    ): "digits of a guard",
}


class Mutant(NamedTuple):
    """`before`, at bytes start..end of the module, becomes `after`."""

    module: str
    line: int
    start: int
    end: int
    before: str
    after: str
    where: str  # the function
    was: str  # the line where it begins
    now: str  # the same line with the mutant

    def __str__(self) -> str:
        before, after = (" ".join(s.split()) for s in (self.before, self.after))
        rest = "" if self.after == "pass" else f" | {self.now}"
        return f"{self.module}.py:{self.line} {self.where}: {before} -> {after}{rest}"

    @property
    def reason(self) -> str | None:
        """Why it is equivalent, where EQUIVALENT says so."""
        return EQUIVALENT.get((self.module, self.now), EQUIVALENT.get((self.module, self.was)))


# ---------------------------------------------------------------------------------------------------- the sites


class _Sites(ast.NodeVisitor):
    """Collects the mutants of one module."""

    def __init__(self, module: str, source: bytes) -> None:
        self.module, self.source = module, source
        self.lines = source.splitlines(keepends=True)
        self.offsets = [0]
        for line in self.lines:
            self.offsets.append(self.offsets[-1] + len(line))
        self.scope: list[str] = []
        self.found: list[Mutant] = []
        self.patterns = SCOPE[module].split()

    # -- where a node stands, and what it says

    def span(self, node: ast.AST) -> tuple[int, int]:
        return (
            self.offsets[node.lineno - 1] + node.col_offset,  # type: ignore[attr-defined]
            self.offsets[node.end_lineno - 1] + node.end_col_offset,  # type: ignore[attr-defined]
        )

    def text(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.source[start:end].decode()

    @property
    def inside(self) -> bool:
        name = ".".join(self.scope)
        if not self.scope or self.scope[-1][0].isupper():  # a module's or a class's own lines
            return "module" in self.patterns
        if any(fnmatch.fnmatch(name, p) or fnmatch.fnmatch(name.split(".")[0], p) for p in NOT_FORMULAS):
            return False
        return any(fnmatch.fnmatch(name, p) or fnmatch.fnmatch(name.split(".")[0], p) for p in self.patterns)

    def add(self, start: int, end: int, after: str) -> None:
        if not self.inside:
            return
        line = self.source[:start].count(b"\n")
        was, before = self.lines[line].decode().strip(), self.source[start:end].decode()
        now = (self.lines[line][: start - self.offsets[line]] + after.encode()).decode().lstrip()
        now += self.source[end : self.offsets[line + 1]].decode().rstrip()
        was, now = was.split("  # ")[0], now.split("  # ")[0]
        if after == "pass":
            now = f"pass  # {was}"
        where = ".".join(self.scope) or "(module)"
        self.found.append(Mutant(self.module, line + 1, start, end, before, after, where, was, now))

    def replace(self, node: ast.AST, after: str) -> None:
        self.add(*self.span(node), after)

    def between(self, left: ast.AST, right: ast.AST, old: str, new: str) -> None:
        """Replace the operator between two nodes."""
        start, end = self.span(left)[1], self.span(right)[0]
        at = self.source[start:end].decode()
        found = re.search(rf"(?<![\w*/<>=]){re.escape(old)}(?![*/<>=\w])", at)
        if found:
            offset = start + len(at[: found.start()].encode())
            self.add(offset, offset + len(old), new)

    # -- what is no formula

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.scope.append(node.name)
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)
        self.scope.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.scope.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self.scope.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    visit_Assert = visit_ExceptHandler = visit_JoinedStr = visit_Import = visit_ImportFrom = visit_Raise  # type: ignore[assignment]

    def visit_If(self, node: ast.If) -> None:
        if not isinstance(node.body[-1], ast.Raise):  # else it is a check
            self.condition(node.test)
            for statement in node.body:
                self.visit(statement)
        elif self.module in GUARDED:
            self.replace(node.test, "False")
        for statement in node.orelse:
            self.visit(statement)

    def visit_Return(self, node: ast.Return | ast.Lambda) -> None:
        value = node.value if isinstance(node, ast.Return) else node.body
        if isinstance(value, ast.Tuple):
            self.neighbours(value.elts)
        self.generic_visit(node)

    visit_Lambda = visit_Return  # type: ignore[assignment]

    def neighbours(self, nodes: list[ast.expr]) -> None:
        """Exchange each two that stand side by side."""
        for first, second in itertools.pairwise(nodes):
            if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
                self.add(self.span(first)[0], self.span(second)[1], f"{self.text(second)}, {self.text(first)}")

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.condition(node.test)
        self.visit(node.body)
        self.visit(node.orelse)

    def condition(self, test: ast.AST) -> None:
        if not isinstance(test, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
            self.replace(test, f"not ({self.text(test)})")
        self.visit(test)

    # -- what is

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            if not re.match(NO_FORMULA_STATEMENTS, self.text(node.value.func)):
                self.replace(node, "pass")
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        if all(isinstance(t, ast.Subscript) for t in node.targets):
            self.replace(node, "pass")
        if self.text(node.targets[0]) not in ("__all__", "_RANGES"):
            self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.replace(node, "pass")
        if type(node.op) in BINARY:
            old, new = BINARY[type(node.op)]
            self.between(node.target, node.value, old + "=", new + "=")
        self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        f = node.func
        name = f.attr if isinstance(f, ast.Attribute) else f.id if isinstance(f, ast.Name) else ""
        if name in NO_FORMULA_CALLS:
            return
        if isinstance(f, ast.Attribute):
            end = self.span(f)[1]
            if name in OPERATIONS and not (name == "sum" and self.text(f.value) in ("math",)):
                self.add(end - len(name.encode()), end, OPERATIONS[name])
            if name == "reduce" and isinstance(f.value, ast.Attribute) and f.value.attr in OPERATIONS:
                end = self.span(f.value)[1]
                self.add(end - len(f.value.attr), end, OPERATIONS[f.value.attr])
            if name == "sqrt" and self.text(f.value) == "math":
                self.found.pop() if self.inside else None
                self.replace(f, "float")
        elif name in BUILTINS:
            self.replace(f, BUILTINS[name])
        if name in ORDERED:
            self.neighbours(node.args[:2])
        if name == "launch" and len(node.args) > 3:  # the arguments behind kernel, grid and block
            self.neighbours(node.args[2 if isinstance(node.args[1], ast.Starred) else 3 :])
        if name == "_same_shape":
            for a in node.args[1:]:
                if not isinstance(a, ast.Starred):
                    self.replace(a, "None")
        if name == "matmul":
            for a in node.args:
                if isinstance(a, ast.Name):
                    self.replace(a, f"{a.id}.T")
        self.visit(f)
        for argument in node.args:
            self.visit(argument)
        for keyword in node.keywords:
            if keyword.arg == "axis" and isinstance(keyword.value, ast.Constant):
                self.replace(keyword.value, "0" if keyword.value.value else "1")
            elif keyword.arg not in ("dtype", "mode"):
                self.visit(keyword.value)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        lists = (ast.List, ast.ListComp, ast.JoinedStr, ast.Tuple)
        if type(node.op) in BINARY and not isinstance(node.left, lists) and not isinstance(node.right, lists):
            self.between(node.left, node.right, *BINARY[type(node.op)])
            if (
                isinstance(node.op, (ast.Add, ast.Sub))
                and isinstance(node.right, ast.Constant)
                and node.right.value == 1
                and isinstance(node.left, ast.Name)
            ):
                self.replace(node, node.left.id)  # l - 1 -> l
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        left = node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            if type(op) in COMPARISONS:
                self.between(left, right, *COMPARISONS[type(op)])
            left = right
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between(left, right, old, new)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if not (isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant)):
            self.replace(node, self.text(node.operand))
            self.visit(node.operand)
        elif isinstance(node.operand.value, (int, float)):
            self.replace(node, self.text(node.operand))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr == "T" and self.text(node.value) not in ("self", "samples", "problem", "part"):
            self.replace(node, self.text(node.value))
        self.visit(node.value)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)
        if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, int):
            self.replace(node.slice, str(1 - node.slice.value) if node.slice.value in (0, 1) else "0")
        else:
            self.visit(node.slice)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return
        if isinstance(value, int):
            self.replace(node, str(value + 1) if value < 256 else hex(value ^ 4))
        else:
            self.replace(node, {0.0: "1.0", 0.5: "1.0", 1.0: "2.0"}.get(value, repr(value * 1.1)))


def sites(module: str, root: Path) -> list[Mutant]:
    """All mutants of a module, in the order of its lines; those that are no Python are left out."""
    source = (root / PACKAGE / f"{module}.py").read_bytes()
    visitor = _Sites(module, source)
    visitor.visit(ast.parse(source))
    return sorted({m for m in visitor.found if _compiles(broken(source, m))}, key=lambda m: m[1:])


def broken(source: bytes, mutant: Mutant) -> bytes:
    """The module with the mutant in it."""
    return source[: mutant.start] + mutant.after.encode() + source[mutant.end :]


def _compiles(source: bytes) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def draw(mutants: dict[str, list[Mutant]], count: int, seed: int) -> list[Mutant]:
    """About `count` of them, from each module its share, at least four."""
    rng = random.Random(seed)
    whole = sum(map(len, mutants.values()))
    chosen: list[Mutant] = []
    for those in mutants.values():
        share = max(4, round(count * len(those) / max(1, whole)))
        chosen += sorted(rng.sample(those, min(len(those), share)), key=lambda m: m[1:])
    return chosen


# ------------------------------------------------------------------------------------------------------ the runs


class Tests:
    """The tests, in a copy of the repository."""

    def __init__(self, copy: Path) -> None:
        self.copy = copy
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (ROOT / name).exists():
                shutil.copy2(ROOT / name, copy / name)
        self.red_before: list[str] = []  # tests that are red without any mutant
        self.seconds: dict[tuple[str, ...], float] = {}  # that each stage takes without a mutant, once that is known

    def run(self, arguments: tuple[str, ...], more: tuple[str, ...] = ("-x",)) -> tuple[int | None, str]:
        """pytest's exit status, None where it hangs, and what it wrote."""
        shutil.rmtree(self.copy / ".hypothesis", ignore_errors=True)
        deselected = [f"--deselect={test}" for test in self.red_before]
        command = [
            "-q",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",
            "-m",
            "not gpu and not slow",
            "--hypothesis-seed=0",
            "--tb=no",
        ]
        told = self.copy / "told.txt"
        pid = os.fork()
        if pid == 0:
            os.setsid()
            self._child([*command, *more, *deselected, *arguments], told)
        deadline = time.monotonic() + (20 + 5 * self.seconds[arguments] if arguments in self.seconds else LIMIT)
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status), told.read_text(errors="replace")
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return None, told.read_text(errors="replace")
            time.sleep(0.02)

    def _child(self, arguments: list[str], told: Path) -> None:
        status = 70
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where this runs in the background
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.chdir(self.copy)
            os.environ["PYTHONPATH"] = str(self.copy)
            sys.path[:] = [str(self.copy), *(p for p in sys.path if p not in (str(ROOT), str(ROOT / "tests"), ""))]
            out = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            import pytest

            status = int(pytest.main(arguments, plugins=[_NoShrinking()]))
            package = sys.modules.get(PACKAGE)
            if package is not None and not str(package.__file__).startswith(str(self.copy)):
                print(f"{PACKAGE} came from {package.__file__}, not from the copy")
                status = WRONG_PACKAGE
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def meet(self, mutant: Mutant) -> str | None:
        """The test that turns red with the mutant, None where none does."""
        path = self.copy / PACKAGE / f"{mutant.module}.py"
        source = path.read_bytes()
        for stage in PLAN[mutant.module]:
            self.without_mutant(stage)
            self._write(path, broken(source, mutant))
            try:
                status, output = self.run(stage)
            finally:
                self._write(path, source)
            if status is None:
                return f"hangs in {' '.join(stage)}"
            if status == WRONG_PACKAGE:
                raise SystemExit(output)
            if status != 0:
                red = _red(output)
                return red[0] if red else f"the import (status {status})"
        return None

    def without_mutant(self, stage: tuple[str, ...]) -> None:
        """Learn, once, which tests of the stage are red already."""
        if stage in self.seconds:
            return
        start = time.monotonic()
        status, output = self.run(stage, ())
        self.seconds[stage] = time.monotonic() - start
        if status not in (0, 1):
            raise SystemExit(f"{' '.join(stage)}: does not run without a mutant (status {status}):\n{output}")
        for test in _red(output):
            print(f"red without a mutant, does not count: {test}")
            self.red_before.append(test)

    def _write(self, path: Path, source: bytes) -> None:
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):  # its time and size might fit the new text
            compiled.unlink()
        path.write_bytes(source)


class _NoShrinking:
    """A plugin: any example that fails will do, so Hypothesis need not look for a small one."""

    def pytest_sessionstart(self) -> None:  # after conftest.py, before the test files
        from hypothesis import Phase, settings

        wanted = settings(settings.default, phases=[Phase.explicit, Phase.generate], database=None)
        settings.register_profile("mutants", wanted)
        settings.load_profile("mutants")


def _red(output: str) -> list[str]:
    """The red tests that pytest's summary names."""
    return re.findall(r"^(?:FAILED|ERROR) (\S+?\.py(?:::.*?)?)(?: - .*)?$", output, re.MULTILINE)


def _import_libraries() -> None:
    """What the tests import besides the package: once, for all children."""
    import click.testing  # noqa: F401
    import hypothesis.extra.numpy
    import hypothesis.strategies  # noqa: F401
    import pytest  # noqa: F401
    import rich.console
    import rich.progress
    import rich.table  # noqa: F401
    import safetensors.numpy  # noqa: F401

    assert PACKAGE not in sys.modules


def _stale(mutants: dict[str, list[Mutant]]) -> Iterator[str]:
    for module, line in EQUIVALENT:
        if module in mutants and not any(line in (m.was, m.now) for m in mutants[module]):
            yield f"EQUIVALENT names what is not there: {module}: {line}"


def main() -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(description="Break the formulas one at a time; see which test turns red.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--all", action="store_true", help="every mutant, not a sample")
    parser.add_argument("--module", action="append", choices=SCOPE, help="of this module alone; may be repeated")
    parser.add_argument("--match", action="append", help="all mutants whose line of --list holds this; may be repeated")
    parser.add_argument("--equivalent", action="store_true", help="those that EQUIVALENT names, which should survive")
    parser.add_argument("--list", action="store_true", help="list them, run nothing")
    given = parser.parse_args()
    modules = [m for m in given.module or SCOPE if (ROOT / PACKAGE / f"{m}.py").exists()]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the copy is removed then too
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants") as directory:
        copy = Path(directory)
        tests = Tests(copy)
        everything = {module: sites(module, copy) for module in modules}
        stale = list(_stale(everything))
        wanted = {
            module: [
                m
                for m in those
                if any(words in str(m) for words in given.match or [""])
                and (given.list or (m.reason is not None) == given.equivalent)
            ]
            for module, those in everything.items()
        }
        if given.all or given.list or given.equivalent or given.match:
            chosen = [m for those in wanted.values() for m in those]
        else:
            chosen = draw(wanted, given.count, given.seed)
        if given.list:
            print(*chosen, *stale, sep="\n")
            named = sum(m.reason is not None for those in everything.values() for m in those)
            print(f"{len(chosen)} mutants; {named} of all are equivalent")
            return bool(stale)
        _import_libraries()
        survivors, killers = [], Counter[str]()
        for i, mutant in enumerate(chosen):
            start = time.monotonic()
            red = tests.meet(mutant)
            seconds = time.monotonic() - start
            print(f"{i + 1:4}/{len(chosen)} {mutant}   {red or 'SURVIVED'}   ({seconds:.1f} s)", flush=True)
            killers[red.split("::")[0].removeprefix("tests/") if red else "SURVIVED"] += 1
            if red is None:
                survivors.append(mutant)
    print(f"\n{len(chosen)} mutants in {time.monotonic() - began:.0f} s, {len(chosen) - len(survivors)} killed")
    for killer, n in killers.most_common():
        print(f"{n:5}  {killer}")
    for mutant in survivors:
        print(f"SURVIVED {mutant}")
    print(*stale, sep="\n", end="\n" if stale else "")
    return bool(len(survivors) != (len(chosen) if given.equivalent else 0) or stale)


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.exit(main())
