"""The kernels of a whole training step, as its plan launches them, against the page's equations in NumPy's float64.

Every array that a step makes is compared, and what it is not to write must stay as it was: between the tensors of
theta, at the ends of rows, behind the last sample, all is NaN.
"""

import dataclasses
import os
import re
from typing import NamedTuple

import fake_cupy
import kernels_on_cpu
import numpy as np
import pytest
from conftest import all_ran
from fake_cublaslt import to_bf16
from test_kernels import MODES, PAIRS, RULES, device  # noqa: F401

import backprop_gpu as bp
from backprop_gpu import backend as backends
from backprop_gpu import cuda_source, numpy_ops
from backprop_gpu import plan as plans
from backprop_gpu.activations import HIDDEN, Activation
from backprop_gpu.backend import to_host
from backprop_gpu.costs import choose_cost
from backprop_gpu.network import Batch, Views, backward, forward
from backprop_gpu.optimizers import SGD, Adam
from backprop_gpu.tiles import _DOUBLE, _FLOAT, _FLOAT_GRADIENTS, Device, Tile

# Of each array, relative to its largest element. A tensor core rounds operands to 11 bits (tf32) or 8 (bf16).
TOLERANCE = {"double": 1e-13, "ffma": 2e-6, "tf32x2": 8e-6, "tf32": 2e-3, "bf16": 2e-2}
TINY = Tile(16, 16, 16, 1, 1, 1, 2)  # the least there is: for what does not depend on the tile
SEED, NUMBER, AHEAD, T_OF_0 = 7, 3, 1, 40  # of dropout; the step of the epoch; of the recording; t of the epoch's first
STEPS = 5


@pytest.fixture(scope="module", autouse=True)
def _built_beside_the_tests(request):
    """Where all of this file will be run, begin to build its kernels now."""
    if sum(item.path == request.path for item in request.session.items) < 300:
        return
    with fake_cupy.installed():
        ops = backends.choose("cupy").ops
        arithmetic = [(case, of in LOOKED_AT) for of in ARITHMETICS for case in cases_of(*of, every=False)]
        options = [(case, True) for case in OPTIONS.values()]
        others = [[(case, looked_at(case)) for case in cases] for cases in (OF_ACTIVATIONS, OF_PAIRS, OF_RULES)]
        parts = []
        for cases in (arithmetic, options, *others):
            parts += [
                ([text for case, _ in cases for text in case.texts(ops)], False),
                ([text for case, its in cases if its for text in case.texts(ops)], True),
            ]
        kernels_on_cpu.build_ahead(*parts)


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, its data, and how a step of it is to be computed."""

    layers: tuple[int, ...] = (12, 9, 11, 5)
    m: int = 9
    arithmetic: str = "ffma"
    tile: Tile = TINY
    precision: str = "float32"
    hidden: object = "tanh"
    output: object = "softmax"
    cost: object = None
    bias: object = True
    dropout: object = 0.0
    data: str = "reals"
    targets: str = "labels"
    weights: str = ""  # of samples: mean, sum
    mean: bool = True
    smoothing: float = 0.0
    frozen: int = 0
    rule: object = None
    models: int = 1
    batch: int = 0  # of a full step, m where it is 0
    few: bool = False  # a sample a block of the head
    task: int | None = None

    @property
    def net(self):
        hidden = self.hidden if isinstance(self.hidden, list) else [self.hidden] * (len(self.layers) - 2)
        return bp.Network(
            self.layers, hidden, self.output, bias=self.bias, precision=self.precision, seed=1, dropout=self.dropout,
            backend="numpy",
        )  # fmt: skip

    @property
    def its_cost(self):
        name = self.output if isinstance(self.output, str) else self.output.name
        cost = choose_cost(None, name) if self.cost is None else self.cost
        return (choose_cost(cost, name) if isinstance(cost, str) else cost).smoothed(self.smoothing)

    def planned(self, ops):
        """Its plan, made once; `ops` are the CuPy backend's."""
        if "_plan" not in self.__dict__:
            rule, slots, size = None, (False,) * 3, 0
            if self.rule is not None:
                rule, size = ops.rule_name(self.rule), ops.host_rows(self.rule, [0.1], 1).shape[1]
                slots = [s is not None for s in ops.placed(self.rule, [0] * self.rule.slots)]
            its = dict(zip(_FLOAT, _FLOAT_GRADIENTS + _FLOAT_GRADIENTS[-1:], strict=True)).get(self.tile, self.tile)
            gpu = Device("a GPU", 80, 10**6 if self.few else 0, 227 << 10, 0.0, 0.0)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(plans, "choose_tile", lambda kernel, *_: self.tile if kernel != "gradients" else its)
                plan = plans.Plan(
                    self.net, self.its_cost, self.shape, gpu, self.arithmetic, rule, slots, size, self.frozen, SEED
                )
            self.__dict__["_plan"] = plan
        return self.__dict__["_plan"]

    @property
    def shape(self):
        task = self.task if self.task is not None else 1 if self.targets == "labels" else 0
        batch = self.batch or self.m
        return plans.Shape(
            self.m, batch, self.n_data, STEPS, self.data, self.targets, bool(self.weights),
            self.weights == "mean" if self.weights else self.mean, 1.0, task, self.models,
        )  # fmt: skip

    @property
    def n_data(self):
        return self.m + 3

    @property
    def first(self):
        """Where the step's part of the order begins: in its second half."""
        return self.n_data + 2

    @property
    def tolerance(self):
        return TOLERANCE["double" if self.precision == "float64" else self.arithmetic]

    def texts(self, ops):
        """What its kernels are compiled from."""
        return [cuda_source.text(o.file, **dict(o.defines)) for o in self.planned(ops).operations]


class Step:
    """A case's vectors, on the device, and its kernels."""

    def __init__(self, case, device, planted=None):  # noqa: F811
        self.case, self.device, self.plan = case, device, case.planned(device.ops)
        net, rng, dtype = case.net, np.random.default_rng(5), case.net.dtype
        self.net, self.dtype, plan = net, dtype, self.plan
        n, n_0, K, models = case.n_data, case.layers[0], case.layers[-1], case.models
        bytes_ = case.data == "bytes"
        data = rng.integers(0, 256, (n, n_0)).astype(np.uint8) if bytes_ else rng.normal(size=(n, n_0)).astype(dtype)
        T = rng.integers(0, K, n)
        if case.targets == "rows":
            rows = {"cross_entropy": rng.dirichlet(np.ones(K), n), "binary_cross_entropy": rng.random((n, K))}
            T = rows.get(case.its_cost.name, rng.normal(size=(n, K))).astype(dtype)
        self.weights = rng.random(n).astype(dtype) + dtype.type(0.1)
        self.theta = np.full((models, plan.parameters), np.nan, dtype)
        for of_model in self.theta:
            views = Views(of_model, net.layers, net.biased)
            for l in range(1, net.L + 1):
                views.W[l][...] = rng.normal(size=views.W[l].shape) / net.layers[l - 1] ** 0.5
                if views.b[l] is not None:
                    views.b[l][...] = 0.3 * rng.normal(size=views.b[l].shape)
        self.order = rng.permuted(np.tile(np.arange(n), (2 * models, 1)), axis=1).reshape(models, 2 * n)
        self.data, self.targets = data, T
        state = [NUMBER - AHEAD, 0, case.first - NUMBER * (case.batch or case.m), T_OF_0]
        size, steps = plan.parameters, STEPS + 1
        vectors = {
            "data": data, "targets": T, "weights": self.weights, "theta": self.theta, "order": self.order,
            "work": np.full((models, plan.workspace.size), np.nan, dtype),
            "gradient": np.full((models, size), np.nan, dtype),
            "state": np.array([state] * models, np.int64).view(np.uint64),
            "measured": np.full((models, steps, 2), np.nan), "layers": plan.table,
        }  # fmt: skip
        if case.rule is not None:
            lrs = [case.rule.lr * 2**model for model in range(models)]
            rows = np.full((models, steps, device.ops.host_rows(case.rule, lrs, 1).shape[1]), np.nan)
            for its, lr in zip(rows, lrs, strict=True):
                its[NUMBER] = device.ops.host_rows(case.rule, [lr], T_OF_0 + NUMBER)[0]
            vectors["rows"] = rows
            for i, there in enumerate(plan.slots):
                if there:
                    slot = np.where(np.isnan(self.theta), self.theta, abs(rng.normal(size=self.theta.shape)) + i % 2)
                    vectors[f"slot {i}"] = slot.astype(dtype)
        self.host = vectors
        self.vectors = {name: device.asarray(a.reshape(-1)) for name, a in vectors.items()}
        self.kernels = {o: self._kernel(o, planted) for o in plan.operations}

    def _kernel(self, o, planted):
        """The kernel of an operation; of the one that a bug is planted in, with that bug."""
        if planted is None or planted.kernel != o.kernel:
            return self.device.ops.kernel_of(o.file, o.kernel, self.dtype, **dict(o.defines))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_source, "read", planted.read)
            # One more define, for what is compiled is remembered by them.
            more = {"PLANTED": re.sub(r"\W", "_", planted.line + planted.by)}
            return self.device.ops.kernel_of(o.file, o.kernel, self.dtype, **dict(o.defines), **more)

    def found(self, argument):
        if not isinstance(argument, plans.Place):
            return AHEAD if argument == plans.AHEAD else argument
        name, start, size = argument
        if name in ("gradient", "trained") or name.startswith("slot"):
            name, start = "theta" if name == "trained" else name, self.plan.start
        # Of several models what follows is theirs; of one, nothing may be touched beyond.
        return self.vectors[name][start : None if self.case.models > 1 else start + size]

    def launch(self, operation, grid=None):
        kernel = self.kernels[operation]
        given = {a: self.found(a) for a in operation.arguments if isinstance(a, plans.Place)}
        if self.case.models > 1:  # which lie between each other's, as no two arrays do
            given = {a: self.device.asarray(to_host(its)) for a, its in given.items()}
        before = {a: to_host(its) for a, its in given.items()} if self.case.models > 1 else {}
        listed = [
            given.get(a, self.found(a)) if isinstance(a, plans.Place) else self.found(a) for a in operation.arguments
        ]
        arguments = self.device.ops.arguments(kernel, listed)
        if operation.shared > 32 << 10:
            kernel.function.max_dynamic_shared_size_bytes = operation.shared
        kernel.function(grid or operation.grid, operation.block, tuple(arguments), shared_mem=operation.shared)
        for place, old in before.items():
            new, all_of_it = to_host(given[place]), to_host(self.found(place))
            changed = new.view(np.uint8).reshape(new.size, -1) != old.view(np.uint8).reshape(new.size, -1)
            if (changed := changed.any(axis=1)).any():
                all_of_it[changed] = new[changed]
                self.found(place)[...] = self.device.asarray(all_of_it)

    def run(self, grids=None):
        """The step; on a GPU once more from where it began, which has to give the same bits."""
        before = {name: to_host(vector) for name, vector in self.vectors.items() if vector is not None}
        runs = []
        for again in range(1 if fake_cupy.is_fake(self.device.xp) else 2):
            if again:
                for name, array in before.items():
                    self.put(name, array)
            for operation in self.plan.operations:
                self.launch(operation, (grids or {}).get(operation.kernel))
            runs.append({name: to_host(self.vectors[name]).tobytes() for name in before})
        assert runs[0] == runs[-1]
        return self

    def put(self, name, array):
        """Other contents for a vector."""
        self.vectors[name][...] = self.device.asarray(np.ascontiguousarray(array).reshape(-1))

    def get(self, name, model=0):
        return to_host(self.vectors[name]).reshape(self.host[name].shape)[model]

    def operation(self, kernel):
        return next(o for o in self.plan.operations if o.kernel == kernel)

    @property
    def unusual(self):
        return int(to_host(self.vectors["state"])[plans.UNUSUAL])

    # ---- what it should be

    def wanted(self, model=0):
        """The arrays of a step by the equations in float64, {(name, layer): array}, and its gradient."""
        case, m = self.case, self.case.m
        net = bp.Network(
            case.layers, self.net.f[1:], self.net.g, bias=self.net.biased, precision="float64", backend="numpy",
            dropout=self.net.rates[1:],
        )  # fmt: skip
        mine = Views(self.theta[model], net.layers, net.biased)
        for its, ours in zip((*net.W[1:], *net.b[1:]), (*mine.W[1:], *mine.b[1:]), strict=True):
            if its is not None:
                its[...] = ours
        rows = self.order[model, case.first : case.first + m]
        batch = Batch(net, m, True, keep_Z=True, draw=(SEED, T_OF_0 + NUMBER) if any(net.rates) else None)
        batch.A[0][...] = self.data[rows] / (255 if case.data == "bytes" else 1)
        T = self.targets[rows]
        w = self.weights[rows].astype(np.float64) if case.weights else np.ones(m)
        part = w / w.sum() if case.shape.mean else w
        flat = np.zeros_like(net.theta)
        with np.errstate(all="ignore"):
            forward(numpy_ops, net, batch)
            gradient = Views(flat, net.layers, net.biased)
            T = T if T.ndim == 1 else T.astype(np.float64)
            backward(numpy_ops, net, batch, T, part, case.its_cost, gradient, case.frozen)
        arrays = {("C", net.L): batch.C, ("w", net.L): w, ("part", net.L): part}
        for l in range(1, net.L + 1):
            arrays |= {("Z", l): batch.Z[l], ("Delta", l): batch.Delta[l]}
            if l < net.L:
                arrays |= {("A", l): batch.A[l], ("F", l): batch.F[l], ("mask", l): batch.mask[l]}
        scores = batch.Z[-1]
        if self.plan._by_output():
            scores = np.empty_like(scores)
            net.g.value(np, batch.Z[-1], scores, [np.empty_like(scores), np.empty_like(scores)])
        return arrays, gradient, scores, T

    def check(self, model=0, gradient=True):
        """Compare all of it."""
        case, plan, L = self.case, self.plan, self.net.L
        arrays, slopes, scores, T = self.wanted(model)
        work = self.get("work", model)
        untouched = np.ones(work.size, bool)
        for (name, l), place in plan.workspace.places.items():
            if name == "right" or self._left(name, l):
                continue
            wide = name not in ("C", "w", "part")
            n = case.layers[l] if wide else 1
            stride = plan.strides[l] if wide else 1
            its = work[place.start : place.start + case.m * stride].reshape(case.m, stride)[:, :n]
            compare(f"{name}[{l}]", its, arrays[name, l].reshape(case.m, n), case.tolerance)
            mine = untouched[place.start : place.start + case.m * stride].reshape(case.m, stride)
            mine[:, :n] = False
        at = plan.workspace.places["right", L].start
        untouched[at : at + case.m] = False
        right = work[at : at + case.m]
        self._check_right(right, scores, T)
        assert np.isnan(work[untouched]).all(), "what is not to be written was"
        self._check_measured(model, work, right)
        if gradient and case.rule is None:
            flat = self.get("gradient", model)
            untouched = np.ones_like(flat)
            its, written = Views(flat, case.layers, self.net.biased), Views(untouched, case.layers, self.net.biased)
            for l in range(case.frozen + 1, L + 1):
                compare(f"dW[{l}]", its.W[l], slopes.W[l], case.tolerance)
                written.W[l][...] = 0
                if its.b[l] is not None:
                    compare(f"db[{l}]", its.b[l], slopes.b[l], case.tolerance)
                    written.b[l][...] = 0
            assert np.isnan(flat[untouched > 0]).all(), "the gradient has more elements than it should"
            same(self.get("theta", model), self.theta[model])

    def _left(self, name, l):
        """Whether a step of this plan has no use for a part of its workspace."""
        case, plan = self.case, self.plan
        return (
            (name == "Delta" and l <= case.frozen)
            or (name == "Z" and l == self.net.L and plan.head_makes_product)
            or (name in ("w", "part") and not case.weights)
            or (name == "part" and not case.shape.mean)
        )

    def _check_right(self, right, scores, T):
        assert np.isin(right, (0, 1)).all()
        task, slack = self.case.shape.task, 3 * self.case.tolerance * abs(scores).max()
        if task == 0:
            assert not right.any()
        elif task == 1:
            labels = T if T.ndim == 1 else T.argmax(axis=1)
            best = np.sort(scores, axis=1)
            sure = best[:, -1] - best[:, -2] > slack if scores.shape[1] > 1 else np.ones(len(scores), bool)
            assert sure.any()
            same(right[sure], (scores.argmax(axis=1) == labels)[sure])
        else:
            sure = (abs(scores) > slack).all(axis=1)
            same(right[sure], ((scores > 0) == (T > 0.5)).all(axis=1)[sure])

    def _check_measured(self, model, work, right):
        case, L, places = self.case, self.net.L, self.plan.workspace.places
        C, w = (work[places[name, L].start :][: case.m].astype(np.float64) for name in ("C", "w"))
        measured = self.get("measured", model)
        np.testing.assert_allclose(measured[NUMBER, 0], (w * C if case.weights else C).sum(), rtol=1e-13)
        assert measured[NUMBER, 1] == right.sum()
        assert np.isnan(np.delete(measured, NUMBER, axis=0)).all()


def same(its, wanted):
    np.testing.assert_array_equal(its, wanted)


def compare(name, its, wanted, tolerance):
    its = its.astype(np.float64)
    assert np.isfinite(its).all(), f"{name} is not finite"
    scale = abs(wanted).max(initial=0) or 1
    error = abs(its - wanted).max(initial=0) / scale
    assert error <= tolerance, f"{name} is off by {error:.2g} of its largest element, {tolerance:g} are allowed"


# ------------------------------------------------------------------------------------------------------- the cases

SHAPES = {  # one that each loop over k goes round more often than there are stages: forward, gradients, delta
    "one": ((1, 1, 1), 1),
    "long rows": ((785, 18, 33, 10), 33),
    "long batch": ((20, 17, 10), 450),
    "wide above": ((9, 17, 400, 3), 20),
}
LARGE = {"127": ((100, 127, 100, 10), 257), "785": ((785, 127, 10), 128)}
ARITHMETICS = [
    *((a, "float32", t) for a in ("ffma", "tf32x2") for t in _FLOAT),
    *((a, "float32", t) for a in ("tf32", "bf16") for t in (_FLOAT[1], _FLOAT[-1])),
    *(("ffma", "float64", t) for t in _DOUBLE),
]

LOOKED_AT = [  # each tile and each arithmetic
    ("ffma", "float32", _FLOAT[0]),
    ("tf32x2", "float32", _FLOAT[1]),
    ("ffma", "float32", _FLOAT[2]),
    ("bf16", "float32", _FLOAT[-1]),
    ("ffma", "float64", _DOUBLE[1]),
]


def cases_of(arithmetic, precision, tile, every):
    """The cases of an arithmetic on a tile; bytes are data on one tile of each."""
    shapes = SHAPES | LARGE if every else SHAPES
    data = "bytes" if tile in (_FLOAT[2], _DOUBLE[1]) else "reals"
    output = {"output": "sigmoid", "cost": "squared_error"}
    return [
        Case(layers, m, arithmetic, tile, precision, data=data, **(output if layers[-1] == 1 else {}))
        for layers, m in shapes.values()
    ]


def run(case, device, planted=None):  # noqa: F811
    step = Step(case, device, planted).run()
    for model in range(case.models):
        step.check(model)
    return step


@pytest.mark.parametrize(("arithmetic", "precision", "tile"), ARITHMETICS, ids=str)
def test_arithmetic(device, arithmetic, precision, tile):  # noqa: F811
    if fake_cupy.Mode.check and (arithmetic, precision, tile) not in LOOKED_AT:
        pytest.skip("others are looked at access by access")
    for case in cases_of(arithmetic, precision, tile, every=not (fake_cupy.Mode.check or fake_cupy.Mode.seed)):
        run(case, device)


# ------------------------------------------------------------------------------- functions, costs, what a net may have

ODD = (11, 9, 13, 5)
SOFTSIGN = Activation.of(
    "softsign",
    lambda xp, Z: Z / (1 + abs(Z)),
    lambda xp, A: (1 - abs(A)) ** 2,
    derivative_from="A",
    cuda=("z / (1 + fabs(z))", "(1 - fabs(a)) * (1 - fabs(a))"),
)
SQUARE_PLUS = Activation.of(
    "square_plus",
    lambda xp, Z: (Z + xp.sqrt(Z * Z + 1)) / 2,
    lambda xp, Z: (1 + Z / xp.sqrt(Z * Z + 1)) / 2,
    cuda=("(z + sqrt(z * z + 1)) / 2", "(1 + z / sqrt(z * z + 1)) / 2"),
)
LOG_COSH = bp.Cost.of(
    "log_cosh",
    lambda xp, Y, T: xp.log(xp.cosh(Y - T)).sum(axis=1),
    lambda xp, Y, T: xp.tanh(Y - T),
    cuda=("log(cosh(y - t))", "tanh(y - t)"),
)
ROWS = {"targets": "rows", "output": "identity", "cost": "squared_error"}
EIGHT, TEN = tuple(range(5, 14)), tuple(range(5, 16))
OPTIONS = {  # of one text each, as far as may be
    "as it comes": Case(),
    "one sample": Case(m=1),
    "few samples a block": Case(few=True),
    "part of a batch": Case(m=9, batch=17),
    "odd widths": Case(ODD),
    "odd widths, bytes": Case(ODD, data="bytes"),
    "bytes": Case((48, 9, 12, 5), m=7, data="bytes"),
    "double": Case(precision="float64"),
    "odd widths, double": Case(ODD, precision="float64", data="bytes"),
    "no bias": Case(bias=False),
    "some biases": Case(bias=[False, True, False]),
    "one frozen layer": Case(frozen=1),
    "two frozen layers": Case(frozen=2),
    "no hidden layer": Case((12, 5)),
    "no hidden layer, bytes, no bias": Case((13, 5), data="bytes", bias=False),
    "one hidden layer": Case((12, 9, 5)),
    "64 outputs": Case((12, 9, 64), m=6),
    "65 outputs": Case((12, 9, 10, 65), m=6),
    "70 outputs": Case((12, 9, 70), m=6, weights="mean"),
    "1024 outputs": Case((5, 7, 1024), m=2),
    "1100 outputs": Case((5, 7, 1100), m=5),
    "70 outputs, not increasing": Case((12, 9, 70), output="gelu", cost="mae", targets="rows"),
    "rows": Case(targets="rows"),
    "rows whose largest counts": Case(targets="rows", task=1),
    "weights, mean": Case(weights="mean"),
    "weights, sum": Case(weights="sum"),
    "sum": Case(mean=False),
    "smoothed labels": Case(smoothing=0.2),
    "smoothed rows": Case(smoothing=0.2, targets="rows"),
    "smoothed ones": Case(output="sigmoid", targets="rows", task=2, smoothing=0.2),
    "ones": Case((12, 9, 2), m=40, output="sigmoid", targets="rows", task=2),
    "one output": Case((12, 9, 1), m=40, output="sigmoid", targets="rows", task=2),
    "70 ones": Case((12, 9, 70), output="sigmoid", targets="rows", task=2),
    "by output": Case(m=60, output="gelu", cost="mae"),
    "labels of 70": Case((12, 70, 70), output="sigmoid", cost="squared_error"),
    "dropout": Case(dropout=0.4),
    "dropout in odd widths": Case(ODD, dropout=0.4, hidden="gelu"),
    "dropout in one": Case(dropout=[0.0, 0.5]),
    "dropout in the other": Case(dropout=[0.5, 0.0], frozen=1),
    "eight layers": Case(EIGHT),
    "ten layers": Case(TEN),
    "ten layers, frozen": Case(TEN, frozen=5, bias=[True, False] * 5),
    "own activations": Case(hidden=[SOFTSIGN, SQUARE_PLUS], output=SOFTSIGN, cost=LOG_COSH),
    "own activations, the other way": Case(
        hidden=[SQUARE_PLUS, SOFTSIGN], output=SQUARE_PLUS, cost="mae", **{"targets": "rows"}
    ),
    "own cost": Case(output="softmax", cost=LOG_COSH),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(device, name):  # noqa: F811
    run(OPTIONS[name], device)


OF_ACTIVATIONS = [
    *(Case(ODD, hidden=f) for f in HIDDEN),
    *(Case(ODD, hidden=f, precision="float64") for f in ("gelu", "elu")),
]


def looked_at(case):
    """Whether a case of all activations, pairs or rules is looked at access by access: one of each kind is enough."""
    if case.rule is not None:
        return type(case.rule) in (SGD, Adam) and case.precision == "float32"
    if case.cost is not None:
        return (case.cost, case.output) in {("cross_entropy", "softmax"), ("norm", "softmax"), ("mae", "relu")}
    return case.hidden == "gelu"


@pytest.mark.parametrize("case", OF_ACTIVATIONS, ids=lambda case: f"{case.hidden} {case.precision}")
def test_activations(device, case):  # noqa: F811
    """In forward, delta and head."""
    if fake_cupy.Mode.check and not looked_at(case):
        pytest.skip("others are looked at access by access")
    run(case, device)


ALL = os.environ.get("BACKPROP_GPU_TEST_ALL_VARIANTS") == "1"
FEW_PAIRS = [  # each cost, each output
    pair
    for i, pair in enumerate(PAIRS)
    if pair[0].outputs is not None
    or i % 9 == 0
    or (pair[0].name, pair[1].name) in {("norm", "softmax"), ("mae", "relu")}
]
OF_PAIRS = [
    Case((12, 9, 5), m=11, output=g.name, cost=c.name, targets=targets)
    for c, g in (PAIRS if ALL else FEW_PAIRS)
    for targets in ("labels", "rows")
]


@pytest.mark.parametrize("case", OF_PAIRS, ids=lambda case: f"{case.cost} {case.output} {case.targets}")
def test_costs_and_outputs(device, case):  # noqa: F811
    if fake_cupy.Mode.check and not looked_at(case):
        pytest.skip("test_kernels.py has looked at the same functions access by access")
    run(case, device)


def test_blocks_that_go_round(device):  # noqa: F811
    """So few of them that each works on several samples, one after the other."""
    for case in (
        Case(m=23),
        Case(m=7, few=True),
        Case((12, 9, 70), m=23),
        Case((5, 7, 1100), m=5),
        Case(m=23, dropout=0.4),
    ):
        Step(case, device).run({"head": (2, 1, 1), "drop": (1, 1, 1)}).check()


def test_the_head_keeps_the_outputs_where_they_are_asked_for(device):  # noqa: F811
    case = Case(ODD, m=11, bias=[True, True, False])
    step = Step(case, device).run()
    head = step.operation("head")
    place = step.plan.workspace.places["Z", 3]
    names = [p.name for p in step.kernels[head].parameters]
    arguments = list(head.arguments)
    assert arguments[names.index("Z")] is None
    arguments[names.index("Z")] = place
    other = dataclasses.replace(head, arguments=tuple(arguments))
    step.kernels[other] = step.kernels[head]
    step.launch(other)
    wanted = step.wanted()[0]["Z", 3]
    work = step.get("work")[place.start :]
    compare("Z", work[: 11 * 8].reshape(11, 8)[:, :5], wanted, case.tolerance)
    assert np.isnan(work[: 11 * 8].reshape(11, 8)[:, 5:]).all()


def test_rows_that_no_wide_access_may_start_at(device):  # noqa: F811
    """Data and weights from a place of memory that is a multiple of nothing."""
    for case in (Case(), Case((48, 9, 12, 5), data="bytes")):
        step = Step(case, device)
        for name in ("data", "work"):
            if name == "work" and case.data == "bytes":
                continue
            moved = np.concatenate([step.host[name].reshape(-1)[:1], step.host[name].reshape(-1)])
            if name == "data":
                step.vectors[name] = device.asarray(moved)[1:]
        step.run().check()


# ---------------------------------------------------------------------------------------------------- the optimizers

OF_RULES = [
    *(Case(ODD, rule=rule) for rule in RULES),
    *(Case(rule=rule) for rule in RULES[:4]),
    Case(TEN, rule=RULES[3], frozen=4, bias=[True, False] * 5),
    Case(ODD, rule=RULES[3], precision="float64"),
    Case(ODD, rule=RULES[3], data="bytes", tile=_FLOAT[2], arithmetic="tf32x2"),
]


@pytest.mark.parametrize(
    "case", OF_RULES, ids=lambda case: f"{case.rule!r} {len(case.layers)} {case.precision} {case.data}"
)
def test_a_fused_rule_is_the_update_of_the_gradient(device, case):  # noqa: F811
    if fake_cupy.Mode.check and not looked_at(case):
        pytest.skip("others are looked at access by access")
    alone = run(dataclasses.replace(case, rule=None), device)
    fused = run(case, device)
    its = [
        alone.get("gradient"),
        fused.theta[0],
        *(fused.host[name][0] for name in fused.host if name.startswith("slot")),
    ]
    start, placed = fused.plan.start, fused.plan.slots
    inside = ~np.isnan(its[0])
    assert inside.any()
    assert not inside[:start].any()
    g, theta, *slots = (a[inside].astype(np.float64) for a in its)
    measured, diverged = fused.get("measured")[NUMBER], np.zeros(1, np.int64)
    numbered = [None] * 3
    for i, slot in zip([i for i in range(3) if placed[i]], slots, strict=True):
        numbered[i] = slot
    listed = [s for s in numbered if s is not None]
    row = numpy_ops.step_rows(case.rule, [case.rule.lr], T_OF_0 + NUMBER)[0]
    assert numpy_ops.update(case.rule, theta, g, listed, row, measured, diverged)
    tolerance = 1e-12 if case.precision == "float64" else 1e-5
    for name, wanted in zip(["theta", *(n for n in fused.host if n.startswith("slot"))], [theta, *listed], strict=True):
        now, before = fused.get(name), fused.host[name][0]
        np.testing.assert_allclose(now[inside], wanted, rtol=tolerance, atol=tolerance)
        same(now[~inside], before[~inside])
    assert np.isnan(fused.get("gradient")).all()


# ------------------------------------------------------------------------------------------------------ several models


OF_MODELS = {
    "labels": Case(ODD, m=11, models=3),
    "bytes, weights, a rule": Case((48, 9, 12, 5), 11, data="bytes", weights="mean", models=3, rule=RULES[3]),
    "no bias, frozen": Case(bias=[True, False, True], frozen=1, models=3, rule=RULES[0], targets="rows"),
    "wide, tensor cores": Case((12, 40, 70), 20, "tf32x2", _FLOAT[2], models=3, weights="sum"),
}


@pytest.mark.parametrize("name", OF_MODELS)
def test_several_models_in_one_launch(device, name):  # noqa: F811
    """Each is, bit for bit, what it is alone; and as far on as its own state says."""
    case = OF_MODELS[name]
    step = run(case, device)
    assert all(o.grid[2] == 3 for o in step.plan.operations)
    for model in range(3):
        alone = Step(dataclasses.replace(case, models=1), device)
        for vector in step.host:
            if step.host[vector].shape[:1] == (3,) and vector not in ("data", "targets", "weights", "layers"):
                alone.put(vector, step.host[vector][model])
        alone.run()
        for vector in ("work", "theta", "gradient", "measured", *(n for n in step.host if n.startswith("slot"))):
            assert step.get(vector, model).tobytes() == alone.get(vector).tobytes(), vector


def test_models_stand_where_their_own_states_say(device):  # noqa: F811
    case = Case(ODD, m=4, models=2)
    step = Step(case, device)
    state = step.host["state"].copy()
    state[1, plans.STEP] += 1  # its part of the order is as before, and another number is the step's
    state[1, plans.FIRST] -= case.m
    step.put("state", state)
    step.run().check(0)
    measured = step.get("measured", 1)
    assert np.isfinite(measured[NUMBER + 1]).all()
    assert np.isnan(np.delete(measured, NUMBER + 1, axis=0)).all()


# ----------------------------------------------------------------------------------------------------- unusual numbers


BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


def spoilt(device, kernel, bad, case=Case(ODD), at=-1):  # noqa: F811
    """A step after which `kernel` alone has run again, on an input that makes its last column bad."""
    step = Step(case, device).run()
    assert step.unusual == 0
    operation = step.operation(kernel)
    names = [p.name for p in step.kernels[operation].parameters]
    into = {"forward": "b", "delta": "above", "head": "b"}[kernel]
    place = operation.arguments[names.index(into)]
    vector, (name, start, size) = step.get(place.vector).copy(), place
    n, stride = (case.layers[3], step.plan.strides[3]) if kernel == "delta" else (size, size)
    last = start + (case.m - 1) * stride + n - 1 if kernel == "delta" else start + (size + at if at < 0 else at)
    vector[last] = bad
    step.put(name, vector)
    return step, operation


@pytest.mark.parametrize("kernel", ["forward", "delta", "head"])
@pytest.mark.parametrize("bad", [*BAD, "beyond"])
def test_unusual_numbers_are_told(device, kernel, bad):  # noqa: F811
    layers = (11, 9, 13, 7, 5)
    beyond = {"forward": 2e4, "delta": 1e12, "head": 2e30}[kernel]
    step, operation = spoilt(device, kernel, BAD.get(bad, beyond), Case(layers, hidden="relu"))
    step.launch(operation)
    assert step.unusual == T_OF_0 + NUMBER
    state = step.get("state").copy()
    state[plans.STEP] += 1
    state[plans.FIRST] -= np.uint64(step.case.m)
    step.put("state", state)
    step.launch(operation)
    assert step.unusual == T_OF_0 + NUMBER  # the first


def test_delta_of_the_head_beyond_its_bounds(device):  # noqa: F811
    """Delta[L] by the samples' weights, Delta[L-1] by W."""
    for name, factor in (("weights", 1e8), ("theta", 1e12)):
        step = Step(Case((11, 9, 5), weights="sum", **ROWS), device)
        head = step.operation("head")
        for operation in step.plan.operations[:2]:
            step.launch(operation)
        assert step.unusual == 0
        if name == "weights":
            work = step.get("work").copy()
            work[step.plan.workspace.places["w", 2].start + 3] = factor
            step.put("work", work)
        else:  # opposite rows of W: Z and Delta[L] stay small, Delta[L-1] does not
            theta = step.theta[0].copy()
            W = Views(theta, step.net.layers, step.net.biased).W[2]
            work = step.get("work").copy()
            at = step.plan.workspace.places["A", 1]
            A = work[at.start : at.start + 9 * 12].reshape(9, 12)
            W[:, 4], A[:, 4] = factor, 0
            step.put("theta", theta)
            step.put("work", work)
        step.launch(head)
        assert step.unusual == T_OF_0 + NUMBER, name


@pytest.mark.parametrize("sign", [1, -1])
def test_bounds_are_what_the_plan_says(device, sign):  # noqa: F811
    """A Z of the bound itself is usual, what is next to it is not."""
    for value, unusual in ((plans.ORDINARY, False), (np.nextafter(np.float32(plans.ORDINARY), np.float32(1e9)), True)):
        step = Step(Case(ODD, hidden="identity"), device)
        operation = step.operation("forward")
        theta = step.theta[0].copy()
        views = Views(theta, step.net.layers, step.net.biased)
        views.W[1][...], views.b[1][...] = 0, sign * value
        step.put("theta", theta)
        step.launch(operation)
        assert (step.unusual != 0) == unusual


def test_padding_is_not_looked_at(device):  # noqa: F811
    """What lies behind the last sample, and behind the end of a row, may be anything."""
    for case in (Case(ODD), Case(ODD, batch=20), Case(ODD, weights="mean", dropout=0.5)):
        assert Step(case, device).run().unusual == 0  # it is NaN there


@pytest.mark.parametrize("rule", [RULES[0], RULES[3]], ids=repr)
def test_after_an_unusual_number_no_parameter_changes(device, rule):  # noqa: F811
    for layers in (ODD, (12, 8, 4)):
        step = Step(Case(layers, rule=rule), device)
        state = step.host["state"][0].copy()
        state[plans.UNUSUAL] = 5
        step.put("state", state)
        step.run()
        for name in ("theta", *(n for n in step.host if n.startswith("slot"))):
            assert step.get(name).tobytes() == step.host[name][0].tobytes()
        assert step.unusual == 5
        assert np.isfinite(step.get("measured")[NUMBER]).all()


# ------------------------------------------------------------------------------------------------- copies in bf16


@pytest.mark.parametrize("layers", [(12, 9, 10, 5), (12, 9, 12, 5)], ids=repr)
@pytest.mark.parametrize("few", [False, True])
def test_the_head_leaves_delta_in_bf16(device, layers, few):  # noqa: F811
    usual = Step(Case(layers, few=few, dropout=0.3), device).run()
    step = Step(Case(layers, few=few, dropout=0.3), device)
    n, ld, m = layers[-2], 16, step.case.m
    place = step.plan.workspace.places["Delta", 2]
    rounded = device.asarray(np.full((m, ld), 0xABCD, np.uint16))
    for operation in step.plan.operations:
        if operation.kernel != "head":
            step.launch(operation)
            continue
        at = operation.arguments.index(place)
        listed = [step.found(a) for a in operation.arguments]
        assert listed[at + 1 : at + 3] == [None, 0]
        listed[at : at + 3] = None, rounded, ld
        device.ops.launch(step.kernels[operation], operation.grid, operation.block, *listed)
    wanted = np.full((m, ld), 0xABCD, np.uint16)
    stride = step.plan.strides[2]
    wanted[:, :n] = to_bf16(usual.get("work")[place.start : place.start + m * stride].reshape(m, stride)[:, :n])
    same(to_host(rounded), wanted)
    assert np.isnan(step.get("work")[place.start : place.start + m * stride]).all()


@pytest.mark.parametrize("target", ["real", "unsigned short"])
@pytest.mark.parametrize("source", ["unsigned char", "real"])
@pytest.mark.parametrize("n", [12, 20, 33])
@pytest.mark.parametrize("ordered", [False, True])
def test_step_gather(device, source, target, n, ordered):  # noqa: F811
    rng, m, batch, ld = np.random.default_rng(0), 5, 7, 40
    as_bytes, in_bf16 = source == "unsigned char", target != "real"
    data = rng.integers(0, 256, (30, n)).astype(np.uint8) if as_bytes else rng.normal(size=(30, n)).astype(np.float32)
    order = rng.permutation(30)
    state = np.array([2, 0, 1, 9], np.int64).view(np.uint64)  # so the rows of step 3 begin at 1 + 3 * 7
    kernel = device.ops.kernel_of("step_gather.cu", "step_gather", np.dtype(np.float32), SOURCE=source, TARGET=target)
    nothing = 0xABCD if in_bf16 else np.nan
    out = device.asarray(np.full((m, ld), nothing, np.uint16 if in_bf16 else np.float32))
    device.ops.launch(
        kernel, (1,), (256,), device.asarray(data), None if ordered else device.asarray(order), batch, out, ld,
        device.asarray(state), 1, m, n,
    )  # fmt: skip
    rows = data[22:27] if ordered else data[order[22:27]]
    wanted = to_host(out).copy()
    wanted[:, :n] = to_bf16(rows.astype(np.float32)) if in_bf16 else rows / np.float32(255) if as_bytes else rows
    wanted[:, n:] = nothing
    same(to_host(out), wanted)


# ------------------------------------------------------------------------------------------------- advance, the order


@pytest.mark.parametrize("models", [1, 3])
def test_advance(device, models):  # noqa: F811
    ops = device.ops
    state = np.arange(1, 4 * models + 1).astype(np.uint64).reshape(models, 4)
    its = device.asarray(state.reshape(-1))
    ops.launch(ops.kernel_of("advance.cu", "advance", np.dtype(np.float32)), (models,), (1,), its, 64, 3)
    state[:, plans.STEP] += np.uint64(64)
    state[:, plans.FIRST] -= np.uint64(3)  # below 0 it goes round
    same(to_host(its).reshape(models, 4), state)


def test_steps_after_each_other(device):  # noqa: F811
    """`ahead` of a recording, and the state that advance leaves, lead to the same samples and numbers."""
    case = Case(ODD, m=4, rule=RULES[3], dropout=0.3)
    results = []
    for state, move in (((NUMBER - AHEAD, 0, case.first - NUMBER * 4, T_OF_0), 0), ((0, 0, case.first - 8, T_OF_0), 2)):
        step = Step(case, device)
        step.put("state", np.array(state, np.int64).view(np.uint64))
        if move:  # two steps of batches with two samples fewer: the order is nearer
            ops = device.ops
            kernel = ops.kernel_of("advance.cu", "advance", np.dtype(np.float32))
            ops.launch(kernel, (1,), (1,), step.vectors["state"], move, 4)
        step.run()
        step.check(gradient=False)
        results.append([step.get(name).tobytes() for name in ("theta", "work", "measured")])
    assert results[0] == results[1]


@pytest.mark.parametrize("arithmetic", ["ffma", "tf32x2"])
def test_the_same_bits_in_any_order(arithmetic):
    case = Case((40, 37, 33, 10), 70, arithmetic, _FLOAT[2], rule=RULES[3], weights="mean", dropout=0.3)
    results = []
    for seed in (0, 0, 1, 2, 3):
        with fake_cupy.installed(seed=seed):
            step = Step(case, backends.choose("cupy")).run()
            results.append([step.get(name).tobytes() for name in ("theta", "work", "measured", "slot 0")])
    assert results[1:] == results[:1] * 4


# ------------------------------------------------------------------------------------------------------ shared memory

PANELS = [
    ("forward", "ALONG", "ALONG"), ("forward of bytes", "ALONG", "ALONG"), ("delta", "ALONG", "DOWN"),
    ("gradients", "DOWN", "DOWN"),
]  # fmt: skip


def test_shared_memory_is_what_the_panels_take():
    """Tile.shared of plan.py, for every tile, and a block has that much on every GPU from sm_70 on, or on sm_80."""
    for real, tiles, item in (("float", _FLOAT + _FLOAT_GRADIENTS, 4), ("double", _DOUBLE, 8)):
        wanted, lines = [], []
        for tile in tiles:
            for kernel, of_a, of_b in PANELS:
                T, source = str(tile), "unsigned char" if kernel == "forward of bytes" else "real"
                lines.append(
                    f"out[{len(wanted)}] = {tile.stages} * "
                    f"(Panel<{source}, {of_a}, {T}::ROWS, {T}::DEPTH, {T}::THREADS>::BYTES + "
                    f"Panel<real, {of_b}, {T}::COLUMNS, {T}::DEPTH, {T}::THREADS>::BYTES);"
                )
                joined = tile.deep * tile.rows * tile.columns * item if tile.deep > 1 else 0
                wanted.append((tile, kernel, joined))
        text = cuda_source.text("product.cuh", REAL=real, ARITHMETIC="ffma").replace("#pragma once\n", "")
        text += 'extern "C" __global__ void sizes(int* out) {\n' + "\n".join(lines) + "\n}\n"
        out = np.zeros(len(lines), np.int32)
        kernels_on_cpu.function(text, "sizes", False)((1,), (1,), [out])
        for (tile, kernel, joined), panels in zip(wanted, out, strict=True):
            mine = tile.shared("forward", item, 1) if kernel == "forward of bytes" else tile.shared(kernel, item)
            assert mine == max(panels, joined), (tile, kernel)
            assert mine <= 227 << 10, (tile, kernel)


# -------------------------------------------------------------------------------------------------------- planted bugs


class Planted(NamedTuple):
    """`line` of a file, which becomes `by` in one kernel, and a case that it shows in."""

    kernel: str
    file: str
    line: str
    by: str
    case: Case
    races: bool = False  # it is the check that tells, whatever the numbers are

    _read = staticmethod(cuda_source.read)

    def read(self, name):
        text = self._read(name)
        if name == self.file:
            assert self.line in text, f"{name} has no {self.line!r}"
            text = text.replace(self.line, self.by)
        return text


LONG = Case((200, 18, 5), 20, "tf32x2", Tile(32, 16, 16, 2, 1, 2, 3))  # of more steps over k than stages
LONG_BATCH = dataclasses.replace(LONG, layers=(11, 18, 5), m=180)
DEEP = dataclasses.replace(LONG, arithmetic="ffma")
LANDED = "__syncthreads();  // this stage has landed for all, and the one before is read"
WAIT = "copy_async_wait<STAGES - 2>();"
BUGS = {
    "swapped fragments, tf32": Planted(
        "forward",
        "product.cuh",
        "g + e % 2 * 8) * A::I + (k + t + e / 2 * 4)",
        "g + e / 2 * 8) * A::I + (k + t + e % 2 * 4)",
        LONG,
    ),
    "swapped fragments, bf16": Planted(
        "forward",
        "product.cuh",
        "g + e % 2 * 8) * A::I + (k + 2 * t + e / 2 * 8)",
        "g + e / 2 * 8) * A::I + (k + 2 * t + e % 2 * 8)",
        dataclasses.replace(LONG, arithmetic="bf16", tile=Tile(16, 16, 32, 1, 1, 2, 2)),
    ),
    "swapped fragments of b": Planted(
        "forward", "product.cuh", "(k + t + 4 * e) * B::K", "(k + t + 4 * (1 - e)) * B::K", LONG
    ),
    "no barrier behind the copies": Planted("forward", "product.cuh", LANDED, "", LONG, True),
    "no barrier behind the copies of gradients": Planted("gradients", "product.cuh", LANDED, "", LONG_BATCH, True),
    "no wait": Planted("forward", "product.cuh", WAIT, "", LONG, True),
    "too few stages waited for": Planted("forward", "product.cuh", WAIT, "copy_async_wait<STAGES - 1>();", LONG, True),
    "no barrier before the sums": Planted(
        "forward", "product.cuh", "__syncthreads();  // the last stage is read", "", LONG, True
    ),
    "no barrier behind the sums": Planted(
        "forward",
        "product.cuh",
        "        __syncthreads();\n    }\n#pragma unroll\n    for (int p = 0; p < PAIRS",
        "    }\n    for (int p = 0; p < PAIRS",
        DEEP,
        True,
    ),
    "a part of the sum over k left out": Planted(
        "forward", "product.cuh", "part < T::WARPS_DEEP", "part < T::WARPS_DEEP - 1", DEEP
    ),
    "no low part of a": Planted(
        "forward", "product.cuh", "if constexpr (twice && !A::exact)", "if constexpr (false)", LONG
    ),
    "no low part of b": Planted(
        "delta",
        "product.cuh",
        "if constexpr (twice && !B::exact)",
        "if constexpr (false)",
        dataclasses.replace(LONG, layers=(11, 9, 18, 5)),
    ),
    "a row from the order's next place": Planted(
        "forward", "product.cuh", "rows[first + r] :", "rows[first + r + 1] :", DEEP
    ),
    "a row of gradients from the order's next place": Planted(
        "gradients", "product.cuh", "rows[first + r] :", "rows[first + r + 1] :", DEEP
    ),
    "samples that there are not": Planted(
        "gradients", "product.cuh", "row + r < from.height ?", "true ?", dataclasses.replace(DEEP, batch=40)
    ),
    "one more column": Planted(
        "forward", "product.cuh", "? from.width - column - c :", "? from.width - column - c + 1 :", Case(ODD)
    ),
    "one more column, 16 bytes": Planted(
        "delta", "product.cuh", "? from.width - column - c :", "? from.width - column - c + 1 :", Case((9, 8, 7, 5))
    ),
    "no bias": Planted("forward", "forward.cu", " + of_b.v[e];", ";", DEEP),
    "no scale": Planted("forward", "forward.cu", "product.v[e] * scale", "product.v[e]", Case(data="bytes")),
    "W in another stride": Planted("forward", "forward.cu", "of_theta, n, k, k)", "of_theta, n, k, k - 1)", DEEP),
    "W in another stride, delta": Planted(
        "delta", "delta.cu", "of_theta, k, n, n)", "of_theta, k, n, n - 1)", Case(ODD)
    ),
    "no derivative": Planted("delta", "delta.cu", "= ACTIVATION::derivative(d.v[1])", "= 1", Case()),
    "no mask": Planted("delta", "delta.cu", "d.v[1] *= kept.v[1];", "", Case(dropout=0.5)),
    "db of another column": Planted(
        "gradients", "gradients.cu", "panel[k * LD + unit]", "panel[k * LD + (unit + 1) % TILE::ROWS]", DEEP
    ),
    "a part of db left out": Planted("gradients", "gradients.cu", "part < GROUPS", "part < GROUPS - 1", DEEP),
    "no barrier before the parts of db": Planted(
        "gradients", "gradients.cu", "__syncthreads();  // the product is read", "", DEEP, True
    ),
    "db twice": Planted("gradients", "gradients.cu", "column == 0 && at_b", "at_b", Case((40, 9, 5), rule=RULES[3])),
    "no bias in the head": Planted("head", "head.cu", "b ? b[k0 + k] : real(0)", "0", Case()),
    "no mask in the head": Planted("head", "head.cu", "if (mask) sum[r]", "if (false) sum[r]", Case(dropout=0.5)),
    "parts before they are read": Planted(
        "head", "head.cu", "__syncthreads();  // the last parts are read", "", Case((12, 9, 11, 30)), True
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_caught(name):
    bug = BUGS[name]
    with fake_cupy.installed(check=bug.races):
        device = backends.choose("cupy")
        with pytest.raises(kernels_on_cpu.KernelError if bug.races else (AssertionError, kernels_on_cpu.KernelError)):
            (shows_in_theta if bug.case.rule else run)(bug.case, device, bug)


def shows_in_theta(case, device, bug):  # noqa: F811
    right, wrong = run(case, device), run(case, device, bug)
    same(wrong.get("theta"), right.get("theta"))


def test_a_derivative_from_the_wrong_array_is_caught(monkeypatch):
    monkeypatch.setattr(plans.Plan, "_kept", lambda plan, l: plan._at("F", l))
    for layers in (ODD, (11, 9, 5)):
        with fake_cupy.installed(), pytest.raises(AssertionError, match=r"Delta\[\d\] is off"):
            run(Case(layers, hidden="gelu"), backends.choose("cupy"))


# --------------------------------------------------------------------------------------------------------- all of them


def test_every_kernel_of_a_step_was_run(request):
    if not all_ran(request, {name for name in globals() if name.startswith("test_")}):
        pytest.skip("only part of this file ran in this process")
    assert fake_cupy.Counts.kernels >= {"forward", "delta", "head", "gradients", "advance", "step_shares", "drop"}
