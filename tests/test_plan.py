"""The plan of a step: its operations, what they are given and where that lies, and launches that may start early."""

import ctypes
import dataclasses
import itertools
import math
import types

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu import cuda_source, driver, dropout
from backprop_gpu import plan as plans
from backprop_gpu import tiles as of_tiles
from backprop_gpu.costs import choose_cost
from backprop_gpu.plan import Place, Plan, Shape, arithmetic_of
from backprop_gpu.tiles import Device, Tile, Unplanned, choose_tile

H100 = Device("H100", 90, 132, 227 << 10, 3.35e12, 67e12)
SMALL = Device("Small", 80, 4, 163 << 10, 0, 0)
M = 128


def planned(layers, device=H100, m=M, precision="float32", rule="rule_adam", frozen=0, cost=None, seed=0, **more):
    shape = {name.name: more.pop(name.name) for name in dataclasses.fields(Shape) if name.name in more}
    net = bp.Network(layers, backend="numpy", precision=precision, **more)
    shape = Shape(**{"m": m, "batch": m, "n_data": 60000, "steps": 469, **shape})
    arithmetic = arithmetic_of(precision, device)
    slots = (True, True, False)
    return Plan(net, choose_cost(cost, net.output), shape, device, arithmetic, rule, slots, 8, frozen, seed)


def kernels(plan):
    return [o.kernel for o in plan.operations]


NETWORKS = [
    {"layers": [784, 100, 10]},
    {"layers": [784, 512, 512, 10]},
    {"layers": [784, 10]},
    {"layers": [20, 33, 100]},
    {"layers": [20, 33, 31, 17, 5], "hidden": ["gelu", "tanh", "swish"], "frozen": 1},
    {"layers": [20, 33, 31, 5], "dropout": 0.4, "weighted": True},
    {"layers": [20, 33, 31, 5], "weighted": True, "mean": False, "frozen": 2, "bias": False},
    {"layers": [20, 6, 1], "output": "sigmoid", "targets": "rows", "task": 2, "data": "reals", "greatest": 3.0},
    {"layers": [784, 256, 10], "rule": None, "m": 31, "batch": 128},
    {"layers": [7, 1, 1, 2], "precision": "float64", "models": 3},
    {"layers": [2048, 2048, 2048, 10], "m": 4096},
]
every_network = pytest.mark.parametrize("network", NETWORKS, ids=repr)


# ---- the operations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "wanted"),
    [
        ({"layers": [784, 100, 10]}, "forward head gradients"),
        ({"layers": [784, 512, 512, 10]}, "forward forward head delta gradients"),
        ({"layers": [784, 10]}, "forward head gradients"),
        ({"layers": [784, 100, 65]}, "forward forward head delta gradients"),
        ({"layers": [784, 100, 64]}, "forward head gradients"),
        ({"layers": [784, 100, 10], "weighted": True}, "step_shares forward head gradients"),
        ({"layers": [784, 100, 10], "dropout": 0.5}, "forward drop head gradients"),
        ({"layers": [9, 8, 7, 6, 5], "frozen": 1}, "forward forward forward head delta gradients"),
        ({"layers": [9, 8, 7, 6, 5], "frozen": 2}, "forward forward forward head gradients"),
        ({"layers": [9, 8, 7, 6, 5], "frozen": 3}, "forward forward forward head gradients"),
        ({"layers": [9, 8, 7, 6, 5], "rule": None}, "forward forward forward head delta delta gradients"),
    ],
    ids=repr,
)
def test_a_step_is_a_handful_of_kernels(network, wanted):
    assert kernels(planned(**network)) == wanted.split()


def test_the_head_makes_delta_below_only_where_something_below_is_trained():
    def below(plan):
        (head,) = (o for o in plan.operations if o.kernel == "head")
        return "Delta[3]" in head.equation, plan._head_below() is not None

    assert below(planned([9, 8, 7, 6, 5], frozen=2)) == (True, True)
    assert below(planned([9, 8, 7, 6, 5], frozen=3)) == (False, False)


@every_network
def test_flop_are_those_of_the_products(network):
    """2 m n k for each: all layers forward, those above the first that is trained backward, those trained dW."""
    plan = planned(**network)
    n, m, frozen = plan.net.layers, plan.shape.m, plan.frozen
    size = [0] + [2.0 * m * n[l] * n[l - 1] for l in range(1, len(n))]
    assert plan.flop == sum(size) + sum(size[frozen + 2 :]) + sum(size[frozen + 1 :])
    of = {kernel: sum(o.flop for o in plan.operations if o.kernel == kernel) for kernel in kernels(plan)}
    assert of["gradients"] == sum(size[frozen + 1 :])
    assert all(o.bytes > 0 for o in plan.operations)
    assert plan.bytes == sum(o.bytes for o in plan.operations)


@every_network
def test_each_kernel_is_given_what_its_text_declares(network):
    """As many arguments, arrays where arrays are, of the vectors' own dtypes; and one number is that of the step."""
    plan = planned(**network)
    work, n = plan.workspace.size, plan.net.layers
    real, n_data = np.dtype(plan.net.dtype), plan.shape.n_data
    trained = plan.parameters - plan.start
    vectors = {
        "data": (np.uint8 if plan.shape.data == "bytes" else real, n_data * n[0]),
        "targets": (np.int64, n_data) if plan.shape.targets == "labels" else (real, n_data * n[-1]),
        "weights": (real, n_data), "theta": (real, plan.parameters), "trained": (real, trained),
        "gradient": (real, trained), "work": (real, work), "order": (np.int64, 2 * n_data),
        "state": (np.uint64, plans.STATE), "rows": (np.float64, 8 * (plan.shape.steps + 1)),
        "measured": (np.float64, 2 * (plan.shape.steps + 1)), "layers": (np.int64, plan.table.size),
        "slot 0": (real, trained), "slot 1": (real, trained),
    }  # fmt: skip
    for o in plan.operations:
        source = cuda_source.text(o.file, **{"REAL": plan.real, **dict(o.defines)})
        parameters = cuda_source.signatures(source)[o.kernel]
        assert len(parameters) == len(o.arguments), o.kernel
        assert o.arguments.count(plans.AHEAD) == 1
        for parameter, given in zip(parameters, o.arguments, strict=True):
            told = o.kernel, parameter.name
            if isinstance(given, Place):
                dtype, size = vectors[given.vector]
                assert parameter.is_array, told
                assert parameter.dtype == dtype, told
                assert 0 <= given.start < given.start + given.size <= size, told
            elif given is None:
                assert parameter.is_array, told
            elif given == plans.AHEAD:
                assert parameter.name == "ahead", told
            else:
                assert not parameter.is_array, told
                if parameter.dtype.kind != "f":
                    assert parameter.dtype.type(given) == given, told
        assert len(o.grid) == 3
        assert min(o.grid) >= 1
        assert math.prod(o.block) <= 1024


@every_network
def test_parts_of_the_workspace_do_not_meet_and_begin_on_lines(network):
    plan = planned(**network)
    places = sorted(plan.workspace.places.values(), key=lambda p: p.start)
    assert all(p.start * plan.item % 256 == 0 for p in places)
    for a, b in itertools.pairwise(places):
        assert a.start + a.size <= b.start
    assert places[-1].start + places[-1].size <= plan.workspace.size
    wanted = {("Z", plan.net.L), ("Delta", plan.net.L), ("C", plan.net.L)}
    assert wanted <= set(plan.workspace.places)
    for (name, l), place in plan.workspace.places.items():
        width = plan.strides[l] if name in ("A", "F", "Z", "mask", "Delta") else 1
        assert place.size == plan.shape.batch * width, (name, l)


@every_network
def test_what_a_kernel_is_given_of_the_workspace_begins_with_an_array(network):
    plan = planned(**network)
    starts = {p.start: p for p in plan.workspace.places.values()}
    for o in plan.operations:
        for given in o.arguments:
            if isinstance(given, Place) and given.vector == "work":
                assert given.start in starts
                whole = given.size == plan.workspace.size
                assert whole or given.size <= starts[given.start].size
    for row in plan.table:
        assert row[6] in starts
        assert row[8] == -1 or row[8] in starts


@every_network
def test_the_table_of_gradients_counts_tiles_without_a_gap(network):
    plan = planned(**network)
    n, tile, first = plan.net.layers, plan._tile, 0
    assert len(plan.table) == plan.net.L - plan.frozen
    for l, row in enumerate(plan.table, plan.frozen + 1):
        at_W, at_b = plan.places[l - 1]
        assert row[0] == first
        assert list(row[2:4]) == [n[l], n[l - 1]]
        assert row[4] == at_W - plan.start
        assert row[5] == (-1 if at_b is None else at_b - plan.start)
        first += -(-n[l] // tile.rows) * -(-n[l - 1] // tile.columns)
        assert row[1] == -(-n[l - 1] // tile.columns)
    (gradients,) = (o for o in plan.operations if o.kernel == "gradients")
    assert gradients.grid == (first + 1, 1, plan.shape.models)
    assert (plan.table[0][8] == -1) == (plan.frozen == 0)


def test_the_workspace_of_a_smaller_batch_is_that_of_a_full_one():
    full, tail = planned([784, 100, 10]), planned([784, 100, 10], m=96, batch=M)
    assert full.workspace.places == tail.workspace.places
    np.testing.assert_array_equal(full.table[:, 6:], tail.table[:, 6:])
    assert tail.flop == full.flop * 96 / M


def test_dropout_is_drawn_by_seed_and_layer():
    plan = planned([20, 33, 31, 5], dropout=0.4, seed=2**64 - 1)
    drops = [o for o in plan.operations if o.kernel == "drop"]
    assert [o.arguments[6] for o in drops] == [1, 2]
    assert all(o.arguments[4:6] == (dropout.threshold(0.4), dropout.scale(0.4)) for o in drops)
    assert all(o.arguments[8] == 2**64 - 1 for o in drops)
    assert {"F", "mask"} <= {name for name, l in plan.workspace.places if l == 1}


def test_the_bounds_keep_a_gradient_finite():
    """A product of m samples with the greatest |A| there may be, times the greatest learning rate, is below HUGE."""
    for greatest in (1.0, 3.0, 1e30):
        plan = planned([20, 30, 5], data="reals", greatest=greatest)
        (head,) = (o for o in plan.operations if o.kernel == "head")
        bounds = dict(zip(("bound", "bound_below"), head.arguments[-10:-8], strict=True))
        assert bounds["bound"] == plan._bound_Delta(2)
        assert bounds["bound_below"] == plan._bound_Delta(1)
        for l, below in ((1, greatest), (2, plans.ORDINARY)):
            assert M * plan._bound_Delta(l) * max(below, 1.0) * plans.MOST_LR <= plans.HUGE * (1 + 1e-12)
    assert np.finfo(np.float32).max > plans.HUGE**2


# ---- what it tells ----------------------------------------------------------------------------------------------


def test_describe_says_a_line_an_operation():
    plan = planned([784, 512, 512, 10])
    lines = plan.describe().splitlines()
    assert len(lines) == 6
    for line, o in zip(lines, plan.operations, strict=False):
        assert line.startswith(o.equation)
        assert f" {o.kernel}" in line
        assert f"{o.flop / 1e6:.1f} MFLOP" in line
        assert " x ".join(map(str, o.grid)) in line
        assert (str(o.tile) in line) is (o.tile is not None)
    assert lines[0].startswith("Z[1] = W[1] A[0] + b[1], A[1] = relu(Z[1]) ")
    assert lines[2].startswith("Z[3] = W[3] A[2] + b[3], C, Delta[3] = dC/dZ[3], Delta[2] = f' ⊙ (W[3]^T Delta[3]) ")
    assert lines[3].startswith("Delta[1] = relu'(Z[1]) ⊙ (W[2]^T Delta[2]) ")
    assert lines[4].startswith("dW[l], db[l] of l = 1..3, rule_adam of theta ")
    flop = 2 * M * (3 * (784 * 512 + 512 * 512 + 512 * 10) - 784 * 512)
    assert lines[-1].startswith(f"5 nodes a step, {flop / 1e6:.1f} MFLOP, ")
    assert lines[-1].endswith("on H100")
    assert f"at least {plan.floor() * 1e6:.2f} us" in lines[-1]


def test_without_a_bias_no_bias_is_told_of():
    assert "b[1]" not in planned([9, 8, 7], bias=False).describe().splitlines()[0]


def test_the_floor_is_a_sum_of_the_greater_of_rate_and_bandwidth():
    plan = planned([784, 100, 10])
    rate = H100.rate * plans.SPEED["tf32x2"]
    assert plan.floor() == pytest.approx(sum(max(o.flop / rate, o.bytes / H100.bandwidth) for o in plan.operations))
    assert planned([784, 100, 10], SMALL).floor() is None
    assert "at least" not in planned([784, 100, 10], SMALL).describe()


# ---- tiles and arithmetic -----------------------------------------------------------------------------------------


def test_what_a_tile_takes():
    tile = Tile(32, 16, 64, 2, 1, 4, 3)
    assert str(tile) == "Tile<32, 16, 64, 2, 1, 4, 3>"
    assert tile.threads == 32 * 2 * 1 * 4
    assert tile.blocks(33, 16) == (1, 2)
    assert tile.blocks(32, 17) == (2, 1)
    assert tile.blocks(1, 1) == (1, 1)
    # A panel along k has rows of 64 + 4 numbers, one down the columns 64 rows of its side + 8.
    assert tile.shared("forward", 4) == 4 * 3 * (32 * 68 + 16 * 68)
    assert tile.shared("delta", 4) == 4 * 3 * (32 * 68 + 64 * 24)
    assert tile.shared("gradients", 4) == 4 * 3 * (64 * 40 + 64 * 24)
    assert tile.shared("gradients", 8) == 2 * tile.shared("gradients", 4)
    one = Tile(128, 128, 16, 2, 4, 2, 1)  # what is joined at the end is more than the panels
    assert one.shared("forward", 4) >= 4 * 2 * 128 * 128


LISTS = {
    ("forward", "float"): of_tiles._FLOAT,
    ("delta", "float"): of_tiles._FLOAT,
    ("gradients", "float"): of_tiles._FLOAT_GRADIENTS,
    ("forward", "double"): of_tiles._DOUBLE,
    ("delta", "double"): of_tiles._DOUBLE,
    ("gradients", "double"): of_tiles._DOUBLE,
}
ITEM = {"float": 4, "double": 8}


@pytest.mark.parametrize(("kernel", "real"), LISTS)
def test_the_tiles_that_there_are(kernel, real):
    """Largest first, made of whole fragments; the smallest fits a block of every device of capability 8 or more."""
    tiles = LISTS[kernel, real]
    sizes = [tile.rows * tile.columns for tile in tiles]
    assert sizes == sorted(sizes, reverse=True)
    for tile in tiles:
        assert tile.threads <= 1024
        assert tile.rows % (16 * tile.down) == tile.columns % (8 * tile.across) == tile.depth % (8 * tile.deep) == 0
        assert tile.depth // tile.deep % 16 == 0 or real == "double"  # for bf16
        assert tile.shared(kernel, ITEM[real]) <= 163 << 10
    assert min(tile.shared(kernel, ITEM[real]) for tile in tiles) + of_tiles._BESIDE <= 99 << 10


@pytest.mark.parametrize("shared", [99, 163, 227])
@pytest.mark.parametrize("processors", [1, 4, 132, 10**6])
@pytest.mark.parametrize(("kernel", "real"), LISTS)
def test_the_largest_tile_that_fits_and_fills_the_device(kernel, real, processors, shared):
    device = SMALL._replace(processors=processors, shared=shared << 10)
    fitting = [t for t in LISTS[kernel, real] if t.shared(kernel, ITEM[real]) + of_tiles._BESIDE <= shared << 10]
    last, chosen = fitting[-1], set()
    for products in ([(1, 1, 1)], [(128, 512, 784)], [(128, 512, 784), (4096, 4096, 1)], [(10, 2048, 128)]):
        tile = choose_tile(kernel, products, "ffma", real, device)
        assert tile in fitting
        chosen.add(tile)

        def blocks(t, products=products):
            return sum(-(-m // t.rows) * -(-n // t.columns) for m, n, _ in products)

        enough = 2.0 if (kernel, real) == ("gradients", "float") else 0.75
        assert all(blocks(t) < enough * processors for t in fitting[: fitting.index(tile)])
        assert blocks(tile) >= enough * processors or tile == last
    assert chosen == {last} or processors < 10**6


@pytest.mark.parametrize(("arch", "shared"), [(61, 48), (75, 64), (61, 16)])
def test_with_little_shared_memory_tiles_fit_or_there_is_no_plan(arch, shared):
    """And so steps are eager."""
    try:
        plan = planned([784, 100, 10], SMALL._replace(arch=arch, shared=shared << 10))
    except Unplanned:
        return
    assert max(o.shared for o in plan.operations) <= shared << 10


def test_the_tile_goes_by_shape_and_device_alone():
    """So the order of every sum does, and so the bits."""

    def tiles(device=H100, **more):
        return [o.tile for o in planned([784, 300, 100, 10], device, **more).operations]

    assert tiles() == tiles(seed=5) == tiles(n_data=500, steps=3) == tiles(hidden="tanh") == tiles(greatest=9.0)
    assert tiles() == tiles(H100._replace(name="another", bandwidth=1.0, rate=1.0))
    assert tiles() != tiles(SMALL)
    assert tiles() != tiles(m=4096)


def test_arithmetic():
    old = SMALL._replace(arch=75)
    of = {(p, d.arch): arithmetic_of(p, d) for p in ("float32", "float64", "tf32", "bf16") for d in (H100, old)}
    assert of == {
        ("float32", 90): "tf32x2", ("float32", 75): "ffma", ("float64", 90): "ffma", ("float64", 75): "ffma",
        ("tf32", 90): "tf32", ("tf32", 75): "ffma", ("bf16", 90): "bf16", ("bf16", 75): "ffma",
    }  # fmt: skip
    for arithmetic in of.values():
        assert arithmetic in plans.SPEED


# ---- what is not planned ------------------------------------------------------------------------------------------

plain = bp.Activation.of("plain", lambda xp, Z: Z / (1 + abs(Z)), lambda xp, Z: 1 / (1 + abs(Z)) ** 2)
plain_cost = bp.Cost.of("plain", lambda xp, Y, T: ((Y - T) ** 2).sum(axis=1) / 2, lambda xp, Y, T: Y - T)


@pytest.mark.parametrize(
    ("network", "what"),
    [
        ({"hidden": plain}, "activation"),
        ({"output": plain, "cost": "squared_error"}, "activation"),
        ({"cost": plain_cost}, "cost"),
    ],
    ids=["hidden", "output", "cost"],
)
def test_functions_without_cuda_expressions_are_not_planned(network, what):
    with pytest.raises(Unplanned, match=f"^the {what} plain has no CUDA expressions$"):
        planned([9, 8, 7], **network)


def test_a_wide_output_function_that_does_not_increase_is_not_planned():
    odd = bp.Activation.of("odd", lambda xp, Z: Z * Z, lambda xp, Z: 2 * Z, cuda=("z * z", "2 * z"))
    settings = {"output": odd, "cost": "squared_error", "targets": "rows"}
    with pytest.raises(Unplanned, match="odd is not increasing, and there are many outputs"):
        planned([9, 8, 65], task=1, **settings)
    assert planned([9, 8, 65], task=0, **settings)
    assert planned([9, 8, 64], task=1, **settings)


def test_an_arithmetic_that_kernels_do_not_have():
    net = bp.Network([9, 8, 7], precision="float64", backend="numpy")
    with pytest.raises(Unplanned, match="there is no arithmetic tf32 in float64"):
        Plan(net, choose_cost(None, "softmax"), Shape(9, 9, 9, 1), SMALL, "tf32", None)


# ---- launches that may start early ----------------------------------------------------------------------------------


class Library:
    """A driver that reads back what it is given, as C would: the configuration, and each argument's bytes."""

    def __init__(self, sizes, code=0):
        self.sizes, self.code, self.launches = sizes, code, []

    def cuLaunchKernelEx(self, config, function, arguments, extra):
        raw = bytes(ctypes.string_at(ctypes.addressof(config._obj), 56))
        unsigned = np.frombuffer(raw[:28], np.uint32)
        stream, attributes = np.frombuffer(raw[32:48], np.uint64)
        attribute = ctypes.string_at(int(attributes), 72)
        self.launches.append(
            {
                "grid": tuple(unsigned[:3]), "block": tuple(unsigned[3:6]), "shared": unsigned[6], "stream": stream,
                "attributes": np.frombuffer(raw[48:52], np.uint32)[0], "function": function, "extra": extra,
                "id": np.frombuffer(attribute[:4], np.uint32)[0], "value": np.frombuffer(attribute[8:12], np.int32)[0],
                "arguments": [ctypes.string_at(arguments[i], size) for i, size in enumerate(self.sizes)],
            }
        )  # fmt: skip
        return self.code


def early(monkeypatch, library, arguments, grid=(7, 8, 3), block=(256, 1), shared=70000, stream=0x5010):
    monkeypatch.setattr(driver, "library", lambda: library)
    function = types.SimpleNamespace(kernel=types.SimpleNamespace(ptr=0xABC))
    driver.launch_early(function, grid, block, arguments, shared, stream)


def test_a_launch_that_may_start_early(monkeypatch):
    array = types.SimpleNamespace(data=types.SimpleNamespace(ptr=0x7F0012345600))
    given = [array, np.int32(-5), np.float32(0.25), np.float64(1e30), np.uintp(0), np.uint64(2**64 - 1), np.int64(-9)]
    library = Library([8, 4, 4, 8, 8, 8, 8])
    early(monkeypatch, library, given)
    (seen,) = library.launches
    assert seen["grid"] == (7, 8, 3)
    assert seen["block"] == (256, 1, 1)
    assert seen["shared"] == 70000
    assert seen["stream"] == 0x5010
    assert seen["function"] == 0xABC
    assert seen["extra"] is None
    assert (seen["attributes"], seen["id"], seen["value"]) == (1, 6, 1)  # programmatic stream serialization, allowed
    assert seen["arguments"] == [np.uint64(0x7F0012345600).tobytes(), *(a.tobytes() for a in given[1:])]


def test_grid_and_block_are_filled_up(monkeypatch):
    library = Library([4])
    early(monkeypatch, library, [np.int32(1)], grid=(5,), block=(32, 4, 2), shared=0, stream=0)
    (seen,) = library.launches
    assert seen["grid"] == (5, 1, 1)
    assert seen["block"] == (32, 4, 2)
    assert seen["shared"] == seen["stream"] == 0


def test_a_launch_that_the_driver_refuses(monkeypatch):
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx: CUDA error 801"):
        early(monkeypatch, Library([4], code=801), [np.int32(1)])


def test_only_kernels_that_wait_by_themselves_may_start_early():
    """Each of these has pdl_wait in its text, and no other has."""
    for o in planned([20, 33, 31, 5], dropout=0.4, weighted=True).operations:
        body = cuda_source.text(o.file).partition(f" {o.kernel}(")[2]
        assert ("pdl_wait" in body or "product<" in body) is (o.kernel in plans.WAITING), o.kernel


def test_kernels_start_early_on_newer_devices_where_that_takes_no_room():
    assert planned([784, 100, 10]).early
    assert not planned([784, 100, 10], H100._replace(arch=89)).early
    assert not planned([2048, 2048, 2048, 10], m=4096).early
    for width in range(100, 2000, 100):
        plan = planned([width, width, 10])
        assert plan.early is (max(math.prod(o.grid) for o in plan.operations) <= 2 * H100.processors)
