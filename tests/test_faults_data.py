"""What a hostile user may do: odd numbers, odd memory, several GPUs, several threads, and logits that overflow."""

import functools
import sys
import threading
import weakref

import fake_cupy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backprop_gpu as bp
from backprop_gpu import blas, inputs
from backprop_gpu.activations import OUTPUT
from backprop_gpu.backend import choose, is_cupy, to_host
from backprop_gpu.costs import COSTS
from backprop_gpu.optimizers import OPTIMIZERS, choose_optimizer

PAIRS = [(c.name, g) for c in COSTS.values() for g in OUTPUT if c.outputs is None or g in c.outputs]
X = np.random.default_rng(0).normal(size=(23, 4))
T = np.random.default_rng(1).integers(0, 3, 23)
WEIGHTS = np.random.default_rng(2).random(23) + 0.5

# Every way in for features, and for targets and weights.
WAYS = {
    "forward": lambda net, X, T, **w: net.forward(X),
    "predict": lambda net, X, T, **w: net.predict(X),
    "predict_proba": lambda net, X, T, **w: net.predict_proba(X),
    "gradients": lambda net, X, T, **w: net.gradients(X, T, **w),
    "backward": lambda net, X, T, **w: net.backward(X, T, **w),
    "evaluate": lambda net, X, T, **w: bp.evaluate(net, X, T, **w),
    "gradient_check": lambda net, X, T, **w: bp.gradient_check(net, X, T, **w),
    "train": lambda net, X, T, **w: bp.train(net, X, T, epochs=1, **w),
    "validation": lambda net, X, T, **w: bp.train(net, np.zeros((2, 4)), [0, 1], epochs=1, validation=(X, T)),
}
FOR_X, FOR_T, FOR_WEIGHTS = [*WAYS], [*WAYS][3:], [*WAYS][3:-1]


def refused(way, words, X=X, T=T, **settings):
    """That way in says so, in a line of cause and one of cure, before anything has moved."""
    net = bp.Network([4, 3], precision="float64", backend="numpy")
    before = net.theta.copy()
    with pytest.raises(bp.DataError) as e:
        WAYS[way](net, X, T, **settings)
    assert words in e.value.cause
    assert len(str(e.value).splitlines()) == 2
    np.testing.assert_array_equal(net.theta, before)


def changed(a, place, value):
    a = a.copy()
    a[place] = value
    return a


# ------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("way", FOR_X)
def test_every_way_in_refuses_features_that_are_not_finite(way):
    refused(way, "X holds nan at row 5, column 2", changed(X, (5, 2), np.nan))
    refused(way, "X holds inf at row 22, column 3", changed(X, (22, 3), np.inf))


@pytest.mark.parametrize("way", FOR_X)
def test_every_way_in_refuses_features_of_another_shape(way):
    refused(way, "X has 5 features, the network takes 4", np.zeros((23, 5)))
    refused(way, "X has 0 features, the network takes 4", X[:, :0])
    refused(way, "X has no samples", X[:0], T[:0])
    refused(way, "X has 1 dimension", X[0])


@pytest.mark.parametrize("way", FOR_T)
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (changed(T, 7, 3), "labels must be in 0..2, found 3 at row 7"),
        (changed(T, 7, -1), "labels must be in 0..2, found -1 at row 7"),
        (T + 0.5, "T has shape (23,) and dtype float64"),
        (T == 1, "T has shape (23,) and dtype bool"),
        (np.array(["a", "b", "c"])[T], "T has dtype <U1"),
        (np.array([b"a", b"b", b"c"])[T], "T has dtype |S1"),
        ([None] * 23, "T has dtype object"),
        (None, "T has dtype object"),
        (T[:22], "X has 23 samples, T has 22"),
        (T[:0], "X has 23 samples, T has 0"),
        (changed(np.eye(3)[T], (4, 1), np.nan), "T holds nan at row 4, column 1"),
    ],
    ids=str,
)
def test_every_way_in_refuses_bad_targets(way, bad, words):
    refused(way, words, T=bad)


@pytest.mark.parametrize("way", FOR_WEIGHTS)
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (changed(WEIGHTS, 3, -1), "sample_weight is negative or not finite at row 3"),
        (changed(WEIGHTS, 3, np.nan), "sample_weight is negative or not finite at row 3"),
        (changed(WEIGHTS, 3, np.inf), "sample_weight is negative or not finite at row 3"),
        (-WEIGHTS, "sample_weight is negative or not finite at row 0"),
        (np.zeros(23), "all of sample_weight is 0"),
        (WEIGHTS[:22], "sample_weight has shape (22,) for 23 samples"),
        (1.0, "sample_weight has shape () for 23 samples"),
        ("balanced", "sample_weight has dtype <U8"),
    ],
    ids=str,
)
def test_every_way_in_refuses_bad_weights(way, bad, words):
    refused(way, words, sample_weight=bad)


@pytest.mark.parametrize("row", [0, 1, 37, 40])
def test_a_bad_number_is_found_in_whichever_part_of_much_data_it_is(backend, row, monkeypatch):
    monkeypatch.setattr(inputs, "_CHUNK", 8)
    net = bp.Network([4, 3], backend=backend.name)
    for value, words in ((np.nan, "X holds nan at row"), (1e300, "X holds 1e+300 at row")):
        with pytest.raises(bp.DataError, match=rf"{words} {row}, column 1".replace("+", r"\+")):
            net.forward(backend.asarray(changed(np.ones((41, 4)), (row, 1), value)))


def test_targets_of_one_output_are_from_0_to_1_or_refused():
    net = bp.Network([4, 1], output="sigmoid", backend="numpy")
    for bad in (-1, 2, -0.001, 1.001):
        with pytest.raises(bp.DataError, match=r"T is outside 0\.\.1 at row 22"):
            bp.train(net, X, changed(np.zeros(23), 22, bad))


def test_a_batch_size_far_beyond_the_data_takes_no_memory(backend):
    with pytest.warns(UserWarning, match=f"batch_size {2**60} is more than the 23 samples") as told:
        history = bp.train(bp.Network([4, 3], backend=backend.name), X, T, epochs=2, batch_size=2**60)
    assert len(told) == 1
    assert (history.steps, history.samples) == ([1, 2], 46)


def test_one_sample_and_one_class_are_enough(backend):
    net = bp.Network([4, 5, 3], backend=backend.name)
    assert bp.train(net, X[:1], T[:1], epochs=2).train_accuracy[-1] in (0, 1)
    assert net.predict(X[:1]).shape == (1,)
    bp.train(net, X, np.full(23, 1), optimizer=bp.SGD(1.0), epochs=5)
    assert (net.predict(X) == 1).all()
    alone = bp.Network([4, 1], backend=backend.name)
    assert bp.train(alone, X, np.zeros(23, int), epochs=1).train_cost == [0]
    with pytest.raises(bp.DataError, match=r"labels must be in 0..0, found 1 at row 22"):
        bp.train(alone, X, changed(np.zeros(23, int), 22, 1))


# -------------------------------------------------------------------------------------------------------- memory


def trained(backend, X=X, T=T, weights=WEIGHTS, **settings):
    """The bits of theta after a short run."""
    net = bp.Network([4, 7, 3], precision="float64", seed=1, backend=backend.name)
    bp.train(net, X, T, epochs=2, batch_size=9, sample_weight=weights, **settings)
    return to_host(net.theta).tobytes()


@functools.cache
def usually(backend, rows=False, **settings):
    """The same of arrays as they usually are."""
    return trained(backend, T=np.eye(3)[T] if rows else T, **settings)


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def unaligned(a):
    return np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape)


LAYOUTS = {
    "Fortran": np.asfortranarray,
    "every second": lambda a: np.repeat(a, 2, axis=0)[::2],
    "backwards": lambda a: a[::-1].copy()[::-1],
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "read-only": read_only,
    "list": np.ndarray.tolist,
    "unaligned": unaligned,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [False, True], ids=["labels", "rows"])
def test_data_in_any_layout_gives_the_same_bits(rows, layout):
    usual = X, np.eye(3)[T] if rows else T, WEIGHTS
    laid_out = [LAYOUTS[layout](a) for a in usual]
    numpy = choose("numpy")
    assert trained(numpy, *laid_out) == usually(numpy, rows)
    for a, same in zip(laid_out, usual, strict=True):
        np.testing.assert_array_equal(a, same)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_read_lies_in_rows_and_is_copied_only_where_it_does_not(layout):
    laid_out = LAYOUTS[layout](X)
    read = inputs.features(laid_out, 4, X.dtype)
    assert read.flags.c_contiguous
    assert read.flags.aligned
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, X)
    assert np.shares_memory(read, laid_out) == (layout == "read-only")


def test_training_from_a_file_that_is_mapped_leaves_it_alone(backend, tmp_path):
    for name, a in (("x", X), ("t", T), ("w", WEIGHTS)):
        np.save(tmp_path / f"{name}.npy", a)
    before = [(tmp_path / f"{name}.npy").read_bytes() for name in "xtw"]
    for mode in ("r", "r+") if backend.name == "numpy" else ("r",):
        mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode=mode) for name in "xtw"]
        assert trained(backend, *mapped) == usually(backend)
        del mapped
        assert [(tmp_path / f"{name}.npy").read_bytes() for name in "xtw"] == before


def test_columns_first_on_the_device_is_the_same(backend):
    columns = backend.asarray(np.ascontiguousarray(X.T)).T
    assert not columns.flags.c_contiguous
    assert inputs.features(columns, 4, X.dtype).flags.c_contiguous
    assert trained(backend, columns) == usually(backend)


class Overwrites:
    """A callback that writes over what was handed over."""

    def __init__(self, *arrays, by=77):
        self.arrays, self.by = arrays, by

    def on_step(self, run):
        for a in self.arrays:
            a[...] = self.by


def test_labels_and_weights_are_copied_at_the_door(backend):
    """Labels above all: out of range, unseen, they would be wrong addresses on a GPU."""
    labels, weights = T.astype(np.intp), WEIGHTS.copy()
    overwrites = Overwrites(labels, weights, by=10**6)
    for reduction in ("mean", "sum"):
        labels[:], weights[:] = T, WEIGHTS
        overwritten = trained(backend, X, labels, weights, callbacks=[overwrites], reduction=reduction)
        assert overwritten == usually(backend, reduction=reduction)
        assert (labels == 10**6).all()


def test_labels_that_change_while_they_are_looked_at_are_not_used(backend, monkeypatch):
    labels, wanted = T.astype(np.intp), usually(backend)

    def look_and_overwrite(value):
        if int(value) == 2:  # the largest: all of them have been seen
            labels[:] = 10**6
        return int(value)

    monkeypatch.setattr(inputs, "int", look_and_overwrite, raising=False)
    assert trained(backend, T=labels) == wanted
    assert (labels == 10**6).all()


@pytest.mark.parametrize("dtype", ["f8", "u1"])
def test_on_a_gpu_all_that_was_handed_over_is_copied(backend, dtype):
    if backend.name == "numpy":
        pytest.skip("NumPy data is used where it lies")
    features, rows = X.astype(dtype), np.eye(3)[T]
    wanted = trained(backend, features.copy(), rows.copy(), validation=(features.copy(), rows.copy()), patience=3)
    overwrites = Overwrites(features, rows)
    assert trained(backend, features, rows, callbacks=[overwrites], validation=(features, rows), patience=3) == wanted
    assert (features == 77).all()


@pytest.mark.parametrize("streamed", [False, True])
def test_features_that_become_nan_while_they_are_used_end_the_run(backend, streamed, monkeypatch):
    if streamed == (backend.name == "numpy"):
        pytest.skip("the data is on the device")
    monkeypatch.setenv("BACKPROP_GPU_DATA_LIMIT", "0")
    features, net = X.astype(np.float32), bp.Network([4, 3], backend=backend.name)
    with pytest.raises(bp.DivergenceError):
        bp.train(net, features, T, epochs=3, callbacks=[Overwrites(features, by=np.nan)])
    assert np.isfinite(to_host(net.theta)).all()


# ------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("there", "rows"), [("X", False), ("T", False), ("w", False), ("XT", False), ("T", True), ("Xw", True)]
)
def test_each_of_the_arrays_may_be_on_the_host_or_on_the_device(backend, there, rows):
    usual = X, np.eye(3)[T] if rows else T, WEIGHTS
    mixed = [backend.asarray(a) if name in there else a for name, a in zip("XTw", usual, strict=True)]
    assert trained(backend, *mixed) == usually(backend, rows)
    net = bp.Network([4, 3], backend="numpy")
    assert is_cupy(net.predict(mixed[0])) == is_cupy(mixed[0])
    assert bp.evaluate(net, *mixed[:2], sample_weight=mixed[2]) == bp.evaluate(net, *usual[:2], sample_weight=WEIGHTS)


@pytest.fixture
def gpus(monkeypatch):
    """Two of the stand-in's; an array is looked at from its own one alone, as where there is no peer access."""
    with fake_cupy.installed() as cp:
        current, homes = [0], {}

        def home(array):
            owner = array._a
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            if id(owner) not in homes:
                homes[id(owner)] = current[-1], weakref.ref(owner, lambda _, key=id(owner): homes.pop(key))
            return homes[id(owner)][0]

        def look_at(*found):
            for a in found:
                if isinstance(a, (tuple, list)):
                    look_at(*a)
                elif isinstance(a, fake_cupy.ndarray) and home(a) != current[-1]:
                    raise ValueError(f"the array resides on {home(a)}, the current device is {current[-1]}")

        class Device(fake_cupy.Device):
            def __init__(self, device=None):
                self.id = current[-1] if device is None else int(device)

            def __enter__(self):
                current.append(self.id)
                return self

            def __exit__(self, *args):
                current.pop()

        plain = fake_cupy.ndarray.__init__, fake_cupy._operate, fake_cupy._Function.__call__, cp.asarray

        def made(self, *args, **kwargs):
            plain[0](self, *args, **kwargs)
            home(self)

        def operate(f, name, *args, **kwargs):
            if name not in fake_cupy._VIEWS:
                look_at(*args, *kwargs.values())
            return plain[1](f, name, *args, **kwargs)

        def launch(self, grid, block, args, **kwargs):
            look_at(*args)
            return plain[2](self, grid, block, args, **kwargs)

        def asarray(a, dtype=None):
            elsewhere = isinstance(a, fake_cupy.ndarray) and home(a) != current[-1]
            return plain[3](a.get() if elsewhere else a, dtype)

        for owner, name, mine in (
            (fake_cupy.ndarray, "__init__", made), (fake_cupy, "_operate", operate),
            (fake_cupy._Function, "__call__", launch), (cp, "asarray", asarray), (cp.cuda, "Device", Device),
            (cp.cuda.runtime, "getDevice", lambda: current[-1]), (cp.cuda.runtime, "getDeviceCount", lambda: 2),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, mine)
        yield cp


def on(cp, gpu, a):
    if gpu is None:
        return a
    with cp.cuda.Device(gpu):
        return cp.asarray(a)


@pytest.mark.parametrize(
    ("net_on", "X_on", "T_on"), [(0, 1, 1), (0, None, 1), (0, 1, None), (1, 1, 1), (1, 0, 1), (1, None, 0)]
)
def test_arrays_on_another_gpu_than_the_network_are_brought_to_it(gpus, net_on, X_on, T_on, monkeypatch):
    monkeypatch.setenv("BACKPROP_GPU_DEVICE", str(net_on))
    net, wanted = (bp.Network([4, 7, 3], precision="float64", backend=name) for name in ("cupy", "numpy"))
    there = [on(gpus, *of) for of in ((X_on, X), (T_on, T), (T_on, WEIGHTS))]
    for n, (x, t, w) in ((net, there), (wanted, (X, T, WEIGHTS))):
        bp.train(n, x, t, epochs=1, batch_size=9, sample_weight=w, validation=0.3, gradient_norms=True)
    np.testing.assert_allclose(to_host(net.theta), wanted.theta, rtol=1e-10)
    assert bp.evaluate(net, *there[:2]).cost == pytest.approx(bp.evaluate(wanted, X, T).cost)
    np.testing.assert_allclose(to_host(net.gradients(*there[:2])["W"][1]), wanted.gradients(X, T)["W"][1], rtol=1e-9)
    np.testing.assert_array_equal(to_host(net.predict(there[0])), wanted.predict(X))


def test_the_two_gpus_refuse_each_others_arrays(gpus):
    a = on(gpus, 1, X)
    with pytest.raises(ValueError, match="resides on 1"):
        a + 1
    with pytest.raises(ValueError, match="resides on 1"):
        on(gpus, 0, X) + a[1:]
    with gpus.cuda.Device(1):
        a + 1


# -------------------------------------------------------------------------------------------------------- logits

EXTREMES = [1e4, -1e4, 1e3, -1e3, 709.8, -745.2, 88.8, -103.98, 1e-8, 0.0]


def finite_at(backend, cost, g, dtype, Z, T, **settings):
    """The page at these logits: a network of one layer, whose weights they are."""
    m, K = Z.shape
    net = bp.Network([m, K], output=g, bias=False, precision=dtype, backend=backend)
    net.W[1][...] = net.backend.asarray(np.ascontiguousarray(Z.T, net.dtype))
    page = net.gradients(np.eye(m), T, cost, reduction="sum", **settings)
    assert np.isfinite(page["cost"])
    assert np.isfinite(page["W"][1]).all()
    if cost in ("cross_entropy", "binary_cross_entropy"):  # y - t
        assert page["cost"] >= 0
        assert abs(page["W"][1]).max() <= 1 + 1e-6
    assert np.isfinite(net.forward(np.eye(m))).all()


@pytest.mark.parametrize(("cost", "g"), PAIRS)
def test_cost_and_gradient_are_finite_at_extreme_logits(backend, cost, g):
    Z = np.stack(np.meshgrid(EXTREMES, EXTREMES, 0.0), axis=-1).reshape(-1, 3)
    wanted = np.arange(len(Z)) % 3
    for dtype in ("float32", "float64") if backend.name == "numpy" else ("float32",):
        finite_at(backend.name, cost, g, dtype, Z, wanted)
        if cost in ("cross_entropy", "binary_cross_entropy"):
            finite_at(backend.name, cost, g, dtype, Z, np.eye(3)[wanted], label_smoothing=0.1)


@given(data=st.data())
@settings(max_examples=60)
def test_cost_and_gradient_are_finite_at_any_logits(data):
    cost, g = data.draw(st.sampled_from(PAIRS))
    m, K = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    number = st.one_of(st.sampled_from(EXTREMES), st.floats(-1e4, 1e4))
    Z = np.array(data.draw(st.lists(number, min_size=m * K, max_size=m * K))).reshape(m, K)
    labels = np.array(data.draw(st.lists(st.integers(0, K - 1), min_size=m, max_size=m)))
    wanted = data.draw(st.sampled_from([labels, np.eye(K)[labels]]))
    finite_at("numpy", cost, g, data.draw(st.sampled_from(["float32", "float64"])), Z, wanted)


# ------------------------------------------------------------------------------------------------- learning rates


@pytest.mark.parametrize("lr", [0, 0.0, -0.0, -1, np.inf, -np.inf, np.nan, "0.1", 1j, [0.1]], ids=repr)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_takes_a_learning_rate_that_makes_no_sense(name, lr):
    with pytest.raises(bp.ConfigError, match="lr is ") as e:
        choose_optimizer(name, lr)
    assert len(str(e.value).splitlines()) == 2


@pytest.mark.parametrize("factor", [np.inf, -np.inf, np.nan, -1, 1e308, None, 1j], ids=repr)
@pytest.mark.parametrize("at", [0, 4])
def test_no_step_is_taken_at_a_factor_that_makes_no_sense(factor, at):
    net = bp.Network([4, 3], backend="numpy")
    before = net.theta.copy()
    with pytest.raises(bp.ConfigError, match="the schedule") as e:
        bp.train(
            net, X, T, optimizer=bp.SGD(1e9), schedule=lambda s, n: factor if s == at else 1.0, epochs=1, batch_size=5
        )
    assert len(str(e.value).splitlines()) == 2
    np.testing.assert_array_equal(net.theta, before)


def test_features_that_never_change_and_units_that_never_fire_do_no_harm(backend):
    net = bp.Network([4, 5, 3], backend=backend.name)
    assert np.isfinite(bp.train(net, np.zeros((23, 4)), T, epochs=3).train_cost).all()
    dead = bp.Network([4, 5, 3], output="sigmoid", bias=False, backend=backend.name)
    dead.W[1][...] = -1.0
    before = to_host(dead.theta).tobytes()
    history = bp.train(dead, abs(X), T, optimizer="sgd", epochs=9, parameter_tolerance=0)
    assert (history.stopped, len(history)) == ("still", 1)
    assert to_host(dead.theta).tobytes() == before


@pytest.mark.parametrize("fault", ["dead", "tiny"])
def test_a_run_that_gets_nowhere_is_told_once(backend, fault):
    net = bp.Network([4, 5, 3], output="sigmoid", bias=False, backend=backend.name)
    if fault == "dead":
        net.W[1][...] = -1.0
    with pytest.warns(UserWarning, match="no progress") as told:
        bp.train(net, abs(X), T, optimizer=bp.SGD(0.1 if fault == "dead" else 1e-30), epochs=6)
    assert len(told) == 1


# ------------------------------------------------------------------------------------------------------- threads


def in_threads(*work):
    """Run each in a thread of its own, all from the same moment, changing turns as often as Python can."""
    interval, ready, failures = sys.getswitchinterval(), threading.Barrier(len(work)), []

    def run(f):
        try:
            ready.wait(20)
            f()
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=run, args=(f,)) for f in work]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)


def test_no_other_thread_trains_a_network_that_is_being_trained(backend):
    net = bp.Network([4, 7, 3], precision="float64", seed=1, backend=backend.name)
    under_way, go_on = threading.Event(), threading.Event()

    def first():
        def wait(run):
            under_way.set()
            assert go_on.wait(20)

        bp.train(net, X, T, epochs=2, batch_size=9, sample_weight=WEIGHTS, callbacks=[wait])

    def second():
        assert under_way.wait(20)
        try:
            with pytest.raises(bp.ConfigError, match="being trained already") as e:
                bp.train(net, X, T)
            assert "copy" in e.value.cure
        finally:
            go_on.set()

    in_threads(first, second)
    assert to_host(net.theta).tobytes() == usually(backend)


def test_a_network_whose_training_failed_may_be_trained_again(backend):
    net = bp.Network([4, 7, 3], precision="float64", seed=1, backend=backend.name)

    def fails(run):
        raise KeyError("oh")

    with pytest.raises(KeyError):
        bp.train(net, X, T, callbacks=[fails])
    bp.train(net, X, T, epochs=1)


def test_scratch_memory_is_each_threads_own(backend):
    def take(value):
        with backend.active():
            mine = backend.ops.scratch("mine", (3,), np.float64)
            mine[...] = value
            taken.append((mine, value))

    taken = []
    in_threads(lambda: take(1), lambda: take(2))
    take(3)
    take(3)
    assert [to_host(a).tolist() for a, _ in taken] == [[value] * 3 for _, value in taken]


def test_two_networks_in_two_threads_do_not_see_each_other(backend):
    """Of other widths and data, so that memory that they shared would show."""
    widths, epochs = [[4, 7, 3], [4, 31, 9, 3]], 10 if backend.name == "numpy" else 2

    def result(layers, found):
        net = bp.Network(layers, "gelu", precision="float64", seed=1, backend=backend.name)
        data = X * len(layers), T
        bp.train(net, *data, epochs=epochs, batch_size=5, sample_weight=WEIGHTS, clip_norm=0.5)
        found.append((to_host(net.theta).tobytes(), to_host(net.predict(X)).tobytes()))

    alone, together = ([[], []] for _ in range(2))
    for layers, found in zip(widths, alone, strict=True):
        result(layers, found)
    in_threads(*(lambda of=of: result(*of) for of in zip(widths, together, strict=True)))
    assert together == alone


@pytest.mark.parametrize(("precision", "rtol"), [("float32", 1e-5), ("float64", 1e-12)])
def test_threads_of_the_blas_change_no_more_than_the_rounding(precision, rtol, monkeypatch):
    """The products of the first layer are large enough for several; as many threads again are the same bits again."""
    if (openblas := blas.routines()) is None:
        pytest.skip("NumPy does not come with OpenBLAS here")
    m, widths, before = 256, [256, 160, 10], openblas.get_num_threads()
    assert m * widths[0] * widths[1] > blas.SMALL
    rng = np.random.default_rng(0)
    X, T, thetas, told = rng.normal(size=(2 * m, widths[0])), rng.integers(0, 10, 2 * m), [], []
    call = blas.threads.call

    def count(many, f, *arguments):
        return call(many, lambda *given: told[-1].add((many, blas.threads.now())) or f(*given), *arguments)

    monkeypatch.setattr(blas.threads, "call", count)
    try:
        for threads in (1, 2, 2):
            openblas.set_num_threads(threads)
            told.append(set())
            net = bp.Network(widths, "tanh", precision=precision, backend="numpy")
            bp.train(net, X, T, optimizer=bp.SGD(0.1), epochs=3, batch_size=m)
            thetas.append(net.theta)
    finally:
        openblas.set_num_threads(before)
    assert told == [{(False, 1), (True, n)} for n in (1, 2, 2)]
    one, two, again = thetas
    np.testing.assert_array_equal(two, again)
    assert np.linalg.norm(two - one) <= rtol * np.linalg.norm(one)
