"""Steps whose wide products are cuBLASLt's in bf16, beside NumPy's with the same operands rounded."""

import contextlib
import itertools

import fake_cupy
import numpy as np
import pytest
from fake_cublaslt import from_bf16, to_bf16
from test_wide import ENDS, SETTINGS, M, N, executor, fake, graph, steps_of

import backprop_gpu as bp
from backprop_gpu import cublaslt, numpy_ops, plan
from backprop_gpu.backend import to_host
from backprop_gpu.cublaslt import Library
from backprop_gpu.executors import Eager, Graph
from backprop_gpu.network import Views

__all__ = ["fake"]  # a fixture
PLAIN = [{k: v for k, v in of.items() if k not in ("l1", "l2", "clip_norm", "clip_value")} for of in SETTINGS]
CASES = [of for of in PLAIN if of.get("frozen") != 2]
ODD = [
    {"layers": [21, 16, 12, 5], "hidden": "tanh"},
    {"layers": [23, 12, 20]},
    {"layers": [22, 20, 80], "bias": False},
    {"layers": [19, 13, 17, 5], "dropout": 0.4},
]


@pytest.fixture(autouse=True)
def in_bf16(monkeypatch):
    monkeypatch.setattr(plan, "arithmetic_of", lambda *of: "bf16")


def rounded(a):
    return from_bf16(to_bf16(np.asarray(a, np.float32))).astype(a.dtype)


def gradient_of(run):
    """dW and db of the first batch."""
    net, order = run.problem.net, np.random.default_rng(1).permutation(N)
    with net.backend.active():
        return Views(to_host(run._first_gradient(order, ENDS)).copy(), net.layers, net.biased)


def round_operands(monkeypatch, run):
    """NumPy's operations with what the kernels and the library round: all operands but the head's and bytes."""
    of_bytes = run.problem.samples.X.dtype == np.uint8
    last = run.problem.net.W[-1]
    head = last.shape[0] <= plan.NARROW and run.problem.net.L > 1
    own = {name: getattr(numpy_ops, name) for name in ("affine_activate", "affine", "hidden_delta", "weight_gradient")}

    def operand(A):
        return A if of_bytes and A.shape[1] == run.problem.net.layers[0] else rounded(A)

    def affine_activate(W, A_below, b, f, Z, A):
        own["affine_activate"](rounded(W), operand(A_below), b, f, Z, A)

    def affine(W, A_below, b, Z):
        own["affine"](*((W, A_below) if head else (rounded(W), operand(A_below))), b, Z)

    def hidden_delta(W, Delta, f, Z, A, mask, out, db=None):
        if not (head and W.shape == last.shape):
            W, Delta = rounded(W), rounded(Delta)
        own["hidden_delta"](W, Delta, f, Z, A, mask, out, db)

    def weight_gradient(Delta, A_below, dW):
        own["weight_gradient"](rounded(Delta), operand(A_below), dW)

    for name, operation in (
        ("affine_activate", affine_activate), ("affine", affine), ("hidden_delta", hidden_delta),
        ("weight_gradient", weight_gradient),
    ):  # fmt: skip
        monkeypatch.setattr(numpy_ops, name, operation)


def check_gradient(monkeypatch, **settings):
    """Of a step on the stand-ins: as NumPy's of rounded operands, and not that of others; the plan."""
    rule = bp.SGD(0.1)
    with graph(rule, precision="float32", **settings) as its:
        got, products = gradient_of(its), its.plan.products
    mine = executor(Eager, "numpy", rule, precision="float32", **settings)
    exact = gradient_of(mine)
    with monkeypatch.context() as patched:
        round_operands(patched, mine)
        wanted, Deltas = gradient_of(mine), mine.batch.Delta
    trained = range(1 + settings.get("frozen", 0), mine.problem.net.L + 1)
    for l in trained:
        tolerance = 1e-5 * abs(wanted.W[l]).max()
        np.testing.assert_allclose(got.W[l], wanted.W[l], rtol=0, atol=tolerance, err_msg=f"dW[{l}]")
        if got.b[l] is not None:
            if (dW := products.get(("weight_gradient", l))) and dW.vector:
                wanted.b[l][...] = rounded(Deltas[l]).sum(axis=0)
            tolerance = 1e-5 * abs(wanted.b[l]).max()
            np.testing.assert_allclose(got.b[l], wanted.b[l], rtol=0, atol=tolerance, err_msg=f"db[{l}]")
    assert any(abs(exact.W[l] - wanted.W[l]).max() > 1e-4 * abs(wanted.W[l]).max() for l in trained)
    return its.plan


@pytest.mark.parametrize("settings", [*CASES, *ODD], ids=repr)
def test_the_gradient_is_that_of_rounded_operands(fake, monkeypatch, settings):
    products = check_gradient(monkeypatch, **settings).products
    assert {p.precision for p in products.values()} == {"bf16"}


@pytest.mark.parametrize(
    "settings", [{}, ODD[0], {"frozen": 1}, {"dropout": 0.4}, {"layers": [20, 16, 64, 32, 5]}], ids=repr
)
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_copies_of_weights_follow_the_updates(fake, settings, name):
    """Several steps a recording: the first rounds the weights, the others find what updates left."""
    rule = bp.optimizers.choose_optimizer(name)
    order, ends = np.random.default_rng(1).permutation(N), [0, M, 2 * M]
    with graph(rule, precision="float32", **settings) as its:
        net = its.problem.net
        with net.backend.active():
            for _ in range(2):
                its.begin(order, ends, [rule.lr] * 2, 1)
                its._graph(M, 2).launch()
                copies = to_host(its._vectors["rounded"])
                found = 0
                for l in range(1, net.L + 1):
                    if place := its.plan._operand("W", l):
                        (n, k), padded = net.W[l].shape, its.plan._row("W", l)[1]
                        copy = copies[place.start : place.start + n * padded].reshape(n, padded)[:, :k]
                        np.testing.assert_array_equal(copy, to_bf16(to_host(net.W[l])), err_msg=f"W[{l}]")
                        found += l > settings.get("frozen", 0)
                assert found == len(its.plan.copies) > 0
                net.W[2][...] = net.W[2] * 1.5  # a stranger's hand, between two launches
        assert its.failed is None


def test_recordings_of_one_and_of_several_steps_agree(fake, monkeypatch):
    rule, thetas = bp.Adam(1e-2), []
    for sizes in ((1,), (2, 1)):
        monkeypatch.setattr(Graph, "sizes", sizes)
        with graph(rule, precision="float32", hidden="gelu") as its:
            steps_of(its, rule)
            thetas.append(to_host(its.theta))
    assert thetas[0].tobytes() == thetas[1].tobytes()


@pytest.mark.parametrize("settings", [{}, {"hidden": "gelu", "dropout": 0.4}, {"uint8": False}, *ODD], ids=repr)
def test_a_run_comes_near_numpys(fake, settings):
    rule = bp.SGD(0.1)
    mine = executor(Eager, "numpy", rule, precision="float32", **settings)
    wanted = steps_of(mine, rule)
    with graph(rule, precision="float32", **settings) as its:
        np.testing.assert_allclose(steps_of(its, rule)[:, 0], wanted[:, 0], rtol=2e-2)
        np.testing.assert_allclose(to_host(its.theta), mine.theta, atol=2e-2)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, ["A[0] = the step's rows of the data in bf16", "A[1] rounded to bf16"]),
        ({"layers": [20, 16, 5]}, ["A[0] = the step's rows of the data in bf16", "Delta[1] rounded to bf16"]),
        ({"layers": [20, 16, 80]},
         ["A[0] = the step's rows of the data in bf16", "A[1] rounded to bf16", "Delta[2] rounded to bf16"]),
        ({"hidden": "identity"}, ["A[0] = the step's rows of the data in bf16", "A[1] rounded to bf16"]),
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_rounded_by_a_kernel_of_its_own(fake, settings, wanted):
    """The rest is left in bf16 by the kernels that make it."""
    with graph(bp.SGD(0.1), precision="float32", **settings) as its:
        assert [o.equation for o in its.plan.operations if "bf16" in o.equation] == wanted
        assert [o.equation for o in its.plan.prologue] == [
            f"W[{l}] rounded to bf16" for l in range(1, its.problem.net.L + 1) if its.plan._operand("W", l)
        ]
        assert "W[1] rounded to bf16" in its.plan.describe()


@pytest.mark.parametrize(
    "no", [(12, M, 16), (16, M, 12), (16, 12, M)], ids=["forward", "hidden_delta", "weight_gradient"]
)
def test_one_product_that_is_not_offered_leaves_the_layer_to_kernels(fake, monkeypatch, no):
    fake.unknown = lambda e, *mnk: mnk == no
    made = check_gradient(monkeypatch)
    assert {l + (name == "hidden_delta") for name, l in made.products} == {1}
    assert made.notes


@pytest.mark.parametrize("settings", [{}, ODD[0]], ids=repr)
def test_every_access_of_the_kernels_is_sound(fake, settings):
    fake_cupy.Mode.check, fake_cupy.Mode.seed = True, 5
    with graph(bp.SGD(0.1), precision="float32", **settings) as its:
        steps_of(its, its.rule, 3)


def test_alpha_is_the_255th_part_of_bytes_alone(fake):
    for uint8, wanted in ((True, {("forward", 1), ("weight_gradient", 1)}), (False, set())):
        with graph(bp.SGD(0.1), precision="float32", uint8=uint8) as its:
            assert ("hidden_delta", 1) in its.plan.products  # which reads no data
            assert {p.alpha for p in its.plan.products.values()} <= {1 / 255, 1.0}
            assert {key for key, p in its.plan.products.items() if p.alpha != 1} == wanted


@pytest.mark.parametrize("settings", [{}, *ODD, {"frozen": 1}, {"layers": [20, 12, 16, 13, 5]}], ids=repr)
def test_operands_lie_as_the_library_likes_them(fake, settings):
    """At places and in rows of a multiple of 16 bytes, which takes no more than that; results are float32."""
    with graph(bp.SGD(0.1), precision="float32", **settings) as its:
        work, rounded = its.plan.workspace, its.plan.rounded
        assert ("A", 0) not in work.places  # what is read is the copy
        for p in its.plan.products.values():
            for operand in p.arrays[:2]:
                assert operand.place.vector == "rounded"
                assert operand.place.start % 8 == operand.stride % 8 == 0
                assert operand.columns <= operand.stride < operand.columns + 8
                assert operand.place.start + operand.place.size <= rounded.size
            assert p.arrays[2].place.vector != "rounded"
        taken = sorted(rounded.places.values(), key=lambda place: place.start)
        assert all(a.start + a.size <= b.start for a, b in itertools.pairwise(taken))
        assert its._vectors["rounded"].data.ptr % 16 == 0
        assert its._vectors["rounded"].size >= rounded.size


@pytest.mark.parametrize("settings", [*CASES, *ODD, {"layers": [20, 16, 13, 6, 5]}], ids=repr)
def test_each_bias_gets_its_gradient_once(fake, settings):
    with graph(bp.SGD(0.1), precision="float32", **settings) as its:
        net, made = its.problem.net, []
        for o in its.plan.operations:
            if isinstance(o, plan.LibraryProduct):
                made += [o.layer] * (o.name == "weight_gradient" and o.vector is not None)
            elif o.kernel in ("hidden_delta", "column_sums") and ", of " not in o.equation:
                made += [l for l in range(1, net.L + 1) if f"db[{l}]" in o.equation]
        made += its.plan._own_gradients() if any(net.biased) else []
        assert sorted(made) == [l for l in range(1 + settings.get("frozen", 0), net.L + 1) if net.biased[l - 1]]


def test_forward_takes_a_factor(fake):
    rng = np.random.default_rng(0)
    W, A, b = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 16), (4, 16), (8,)))
    Z = np.zeros((4, 8), np.float32)
    with contextlib.closing(Library(fake, lambda a: (fake.own(a), a.ctypes.data)[1])) as library:
        cublaslt.forward(library, W, A, Z, b, alpha=0.25).run(0)
    np.testing.assert_allclose(Z, 0.25 * A @ W.T + b, rtol=1e-5)


@pytest.mark.parametrize("late", ["copies", "kernels"])
@pytest.mark.parametrize(
    "shapes", [[(13, 21), (9, 57), (5, 8)], [(64, 32), (12, 16)], [(7, 33)], [(16, 20), (3, 5)]], ids=repr
)
def test_an_update_rounds_the_weights_of_its_table_and_nothing_else(fake, late, shapes):
    """Each row with its own padding, ties to even; the copies are left alone by a step that is not taken."""
    fake_cupy.Mode.late = late
    rng, be = np.random.default_rng(0), bp.backend.choose("cupy")
    table, at, to = [], 3 * 16, 64
    for n, k in shapes:
        padded = -(-k // 8) * 8
        table.append((at, n * k, k, to, padded))
        at, to = at + -(-n * k // 16) * 16 + 16, to + n * padded  # a bias between, and no room between the copies
    rule = bp.SGD(0.5)
    with be.active():
        halfway = (rng.normal(size=at).astype(np.float32).view(np.uint32) & 0xFFFF0000 | 0x8000).view(np.float32)
        g = rng.normal(size=at).astype(np.float32) * (rng.random(at) < 0.5)  # 0: the number stays where it is
        theta, g = be.asarray(halfway), be.asarray(g.astype(np.float32))
        rounded_ = be.asarray(np.full(to + 64, 0xABCD, np.uint16))
        rows, diverged = be.ops.step_rows(rule, [0.5], 1), be.asarray(np.zeros(1, np.int64))
        for cost, taken in ((np.inf, False), (1.0, True)):
            wanted = to_host(rounded_).copy()
            be.ops.update_step(
                rule, theta, g, (), rows[0], be.asarray(np.array([cost, 0.0])), diverged,
                copies=(be.asarray(np.array(table, np.int64)), rounded_),
            )  # fmt: skip
            diverged[...] = 0
            for (n, k), (start, size, _, there, padded) in zip(shapes, table, strict=True):
                of = wanted[there : there + n * padded].reshape(n, padded)
                if taken:
                    of[:, :k] = to_bf16(to_host(theta)[start : start + size].reshape(n, k))
            np.testing.assert_array_equal(to_host(rounded_), wanted)


def test_a_delta_in_bf16_leaves_the_product_alone(fake):
    """Delta[1] goes to its copy and nowhere else: it lies there once, not twice."""
    with graph(bp.SGD(0.1), precision="float32", hidden="tanh") as its:
        order = np.random.default_rng(1).permutation(N)
        with its.problem.net.backend.active():
            its.begin(order, ENDS, [0.1] * 3, 1)
            its._enqueue(M, 0)
        work, copies = (to_host(its._vectors[name]) for name in ("work", "rounded"))

        def array(vector, places, name, stride):
            at = places[name, 1].start
            return vector[at : at + M * stride].reshape(M, stride)

        product, A = (array(work, its.plan.workspace.places, name, 16) for name in ("Delta", "A"))
        copy = array(copies, its.plan.rounded.places, "Delta", 16)
        assert abs(from_bf16(copy)).max() > 0
        np.testing.assert_allclose(from_bf16(copy), product * (1 - A**2), rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("n", [12, 5])
def test_rounding_what_is_not_ordinary(fake, n):
    """Of a NaN, whatever its bits (a GPU's are all ones), no infinity and no zero; large numbers become infinite."""
    bits = [0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x3F808000, 0x3F818000,
            1, 0x80000000, 0x3F808001]  # fmt: skip
    wanted = [0x7FFF] * 4 + [0x7F80, 0xFF80, 0x7F80, 0x3F80, 0x3F82, 0, 0x8000, 0x3F81]
    be, ld = bp.backend.choose("cupy"), -(-n // 8) * 8
    with be.active():
        numbers = be.asarray(np.resize(np.array(bits, np.uint32), (12, n)).view(np.float32))
        copy = be.asarray(np.full((12, ld), 0xABCD, np.uint16))
        be.ops.launch(be.ops.kernel_of("round.cu", "round_rows", numbers.dtype), (2,), (32,), numbers, copy, 12, n, ld)
        np.testing.assert_array_equal(to_host(copy)[:, :n], np.resize(np.array(wanted, np.uint16), (12, n)))
        assert (to_host(copy)[:, n:] == 0xABCD).all()


def test_weights_are_rounded_once_a_recording(fake):
    """By the prologue of the first step; from then on by the updates."""
    nodes = []
    with graph(bp.SGD(0.1), precision="float32") as its, its.problem.net.backend.active():
        its.begin(np.arange(N), [0, M, 2 * M], [0.1] * 2, 1)
        for steps in (1, 2):
            its._graph(M, steps)
            nodes.append(fake_cupy.Counts.graph_nodes)
        a_step = len(its.plan.operations) + 2  # survey and update
        assert nodes == [len(its.plan.prologue) + steps * a_step + 1 for steps in (1, 2)]
