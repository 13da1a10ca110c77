"""Networks: widths, storage, initialisation, forward and predictions, copies to other backends."""

import math

import formulas
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import backprop_gpu as bp
from backprop_gpu import network
from backprop_gpu.backend import is_cupy, to_host
from backprop_gpu.initializers import INITIALIZERS


def test_mnist_network_of_source_5_has_79510_parameters():
    net = bp.Network([784, 100, 10], backend="numpy")
    assert net.parameter_count == 79_510
    assert "78500" not in net.summary()
    assert "79400 weights + 110 biases = 79510 parameters" in net.summary()
    assert net.layers == [784, 100, 10]


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_theta_is_flat_in_order_at_64_byte_boundaries_with_zeros_between(precision):
    net = bp.Network([3, 5, 7, 2], precision=precision, backend="numpy")
    assert net.theta.ndim == 1
    at = [p.ctypes.data for l in (1, 2, 3) for p in (net.W[l], net.b[l])]
    assert at == sorted(at)
    assert at[0] == net.theta.ctypes.data
    assert all(a % 64 == 0 for a in at)
    for l in (1, 2, 3):
        assert net.W[l].shape == (net.layers[l], net.layers[l - 1])
        assert net.b[l].shape == (net.layers[l],)
        assert net.W[l].flags.c_contiguous
        assert np.shares_memory(net.W[l], net.theta)
        net.W[l][...] = net.b[l][...] = 1
    assert net.theta.sum() == net.parameter_count
    assert net.W[0] is None
    assert net.b[0] is None


def test_views_cannot_come_loose_from_theta():
    net = bp.Network([2, 3, 1], output="identity", backend="numpy")
    with pytest.raises(AttributeError):
        net.theta = np.zeros(3)
    with pytest.raises(TypeError):
        net.W[1] = np.zeros((3, 2))


def test_without_bias():
    net = bp.Network([784, 100, 10], bias=False, backend="numpy")
    assert net.parameter_count == 79_400
    assert net.b == (None, None, None)


@pytest.mark.parametrize(
    ("name", "spread"),
    [("he", 2 / 300), ("glorot", 2 / 500), ("lecun", 1 / 300)],
)
def test_initialisers_have_the_variance_they_promise(name, spread):
    for kind in ("", "_normal", "_uniform"):
        W = INITIALIZERS[name + kind](np.random.default_rng(0), (200, 300))
        assert abs(W.mean()) < 4 * math.sqrt(spread / W.size)
        assert W.var() == pytest.approx(spread, rel=0.03)
        largest = abs(W).max()
        if kind == "_uniform":
            assert 0.99 * math.sqrt(3 * spread) < largest <= math.sqrt(3 * spread)
        else:
            assert largest > math.sqrt(3 * spread)
    np.testing.assert_array_equal(
        *(INITIALIZERS[n](np.random.default_rng(1), (3, 4)) for n in (name, f"{name}_normal"))
    )


def test_initial_theta_depends_on_the_seed_alone(backend):
    a, b, c = (bp.Network([5, 4, 3], seed=s, backend=backend.name) for s in (7, 7, 8))
    np.testing.assert_array_equal(to_host(a.theta), to_host(b.theta))
    assert (to_host(a.theta) != to_host(c.theta)).any()
    np.testing.assert_array_equal(to_host(a.theta), bp.Network([5, 4, 3], seed=7, backend="numpy").theta)
    double = bp.Network([5, 4, 3], seed=7, precision="float64", backend="numpy")
    np.testing.assert_array_equal(double.W[1].astype(np.float32), to_host(a.W[1]))
    zeros = bp.Network([5, 4, 3], init="zeros", backend="numpy")
    assert not zeros.theta.any()


def literal_forward(net, X):
    rows = []
    for x in np.asarray(X, float):
        a = list(x)
        for l in range(1, net.L + 1):
            W, b = to_host(net.W[l]).astype(float), net.b[l]
            z = [math.fsum(w * v for w, v in zip(row, a, strict=True)) for row in W]
            z = z if b is None else [v + float(c) for v, c in zip(z, to_host(b), strict=True)]
            a = formulas.output(net.hidden if l < net.L else net.output, z)
        rows.append(a)
    return np.array(rows)


@given(
    layers=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    hidden=st.sampled_from(sorted(formulas.VALUE)),
    output=st.sampled_from(["softmax", *sorted(formulas.VALUE)]),
    bias=st.booleans(),
    m=st.integers(1, 6),
    seed=st.integers(0, 2**64 - 1),
)
def test_forward_is_the_recursion_of_the_notes(layers, hidden, output, bias, m, seed):
    net = bp.Network(layers, hidden, output, bias=bias, seed=seed, precision="float64", backend="numpy")
    X = np.random.default_rng(seed).normal(size=(m, layers[0]))
    np.testing.assert_allclose(net.forward(X), literal_forward(net, X), rtol=1e-10, atol=1e-10)
    narrow = bp.Network(layers, hidden, output, bias=bias, seed=seed, backend="numpy")
    np.testing.assert_allclose(narrow.forward(X), literal_forward(net, X), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layers", [[1, 1], [1, 1, 1], [1, 1, 1, 1]])
def test_widths_of_one(backend, layers):
    net = bp.Network(layers, "tanh", "identity", precision="float64", backend=backend.name)
    X = np.linspace(-1, 1, 7)[:, None]
    np.testing.assert_allclose(net.forward(X), literal_forward(net, X), rtol=1e-12)
    g = net.gradients(X, np.zeros(7))
    assert g["W"][1].shape == (1, 1)


def test_chunks_do_not_show(backend, rng):
    """More samples than go through at a time, and not a multiple of it."""
    net = bp.Network([6, 5, 3], precision="float64", backend=backend.name)
    X = rng.normal(size=(2 * 1024 + 77, 6))
    whole = net.forward(X)
    np.testing.assert_allclose(whole[1020:1030], net.forward(X[1020:1030]), rtol=1e-13)
    np.testing.assert_array_equal(net.predict(X), whole.argmax(axis=1))


def test_uint8_is_read_as_x_over_255(backend, rng):
    images = rng.integers(0, 256, (9, 4, 3)).astype(np.uint8)
    net = bp.Network([12, 5, 3], backend=backend.name)
    flat = images.reshape(9, 12)
    np.testing.assert_array_equal(net.forward(images), net.forward(flat.astype(np.float32) / np.float32(255)))
    assert (net.forward(flat) != net.forward(flat.astype(np.int64))).any()


def test_results_follow_the_kind_of_the_input(backend, rng):
    net = bp.Network([4, 3, 2], backend=backend.name)
    X = rng.normal(size=(5, 4)).astype(np.float32)
    assert isinstance(net.forward(X), np.ndarray)
    assert isinstance(net.predict(X.tolist()), np.ndarray)
    page = net.backward(X, [0, 1, 0, 1, 0])
    assert all(isinstance(a, np.ndarray) for k in ("Z", "A", "Delta", "W", "b") for a in page[k] if a is not None)
    if backend.name == "cupy":
        on_device = backend.asarray(X)
        assert is_cupy(net.forward(on_device))
        assert is_cupy(net.gradients(on_device, backend.asarray(np.array([0, 1, 0, 1, 0])))["W"][1])
        host = net.to("numpy")
        assert is_cupy(host.forward(on_device))
        np.testing.assert_allclose(to_host(host.forward(on_device)), net.forward(X), rtol=1e-6)


def test_to_is_a_copy(backend):
    net = bp.Network([4, 3, 2], seed=3, backend="numpy")
    other = net.to(backend.name)
    assert other.backend.name == backend.name
    np.testing.assert_array_equal(to_host(other.theta), net.theta)
    other.theta[...] = 0
    assert net.theta.any()
    assert not to_host(other.W[1]).any()


def test_gradients_are_fresh_copies(rng):
    net = bp.Network([4, 3, 2], backend="numpy")
    X = rng.normal(size=(5, 4)).astype(np.float32)
    first = net.gradients(X, [0, 1, 0, 1, 0])
    kept = first["W"][1].copy()
    net.gradients(2 * X, [1, 1, 0, 1, 0])
    np.testing.assert_array_equal(first["W"][1], kept)
    page = net.backward(X, [0, 1, 0, 1, 0])
    page["A"][0][...] = 0
    assert X.any()


@pytest.mark.parametrize(
    ("output", "K", "T", "wanted"),
    [
        ("softmax", 3, None, "labels"),
        ("sigmoid", 1, None, "binary"),
        ("sigmoid", 3, None, "multilabel"),
        ("identity", 2, None, "regression"),
        ("identity", 2, [0, 1, 1, 0], "labels"),
        ("sigmoid", 3, [0, 2, 1, 0], "labels"),
        ("sigmoid", 1, [0, 1, 1, 0], "binary"),
        ("tanh", 1, [0.5, -0.5, 0, 1], "regression"),
    ],
)
def test_predict_by_task(backend, rng, output, K, T, wanted):
    net = bp.Network([3, 4, K], output=output, backend=backend.name)
    X = rng.normal(size=(4, 3))
    if T is not None:
        bp.train(net, X, T, epochs=1)
    assert net.task == wanted
    Y, P = net.forward(X), net.predict(X)
    if wanted == "labels":
        np.testing.assert_array_equal(P, Y.argmax(axis=1))
    elif wanted == "regression":
        np.testing.assert_array_equal(P, Y)
    else:
        np.testing.assert_array_equal(P, (Y > 0.5)[:, 0] if wanted == "binary" else Y > 0.5)
        assert P.dtype.kind == "i"
    if output in ("softmax", "sigmoid"):
        np.testing.assert_array_equal(net.predict_proba(X), Y)
    else:
        with pytest.raises(bp.ConfigError):
            net.predict_proba(X)


def test_labels_are_predicted_from_the_outputs_where_z_would_mislead(backend):
    """gelu falls below 0: of two negative Z, the smaller can have the larger output."""
    net = bp.Network([2, 2], output="gelu", backend=backend.name)
    X = np.array([[1.0, 0.0], [0.0, 1.0]])
    net.W[1][...] = backend.asarray(np.array([[-3.0, -0.7], [-0.7, -3.0]], np.float32))
    with pytest.warns(UserWarning, match="batch_size"):
        bp.train(net, X, [0, 1], optimizer=bp.SGD(1e-12), epochs=1, batch_size=10)
    assert net.predict(X).tolist() == [0, 1]
    assert bp.evaluate(net, X, [0, 1]).accuracy == 1


def test_outputs_that_are_not_finite_decide_nothing(backend):
    net = bp.Network([2, 3], backend=backend.name)
    net.theta[...] = 1e30
    with pytest.raises(bp.DataError, match="the outputs are not finite at row 1"):
        net.predict([[0.0, 0.0], [1e30, 1e30]])


GOLDEN_W = [
    [0.13006420335137792, -1.4486188611558253, 1.083092416117546],
    [0.9837225091462339, -0.031928047230561495, -0.42410408007077016],
]
GOLDEN_ORDER = [2, 0, 4, 1, 7, 5, 3, 6]


def test_what_a_seed_means_does_not_change():
    """Saved results and papers lean on it: the first draws of seed 0, for theta and for the order of an epoch."""
    from backprop_gpu.batches import epoch_plan

    net = bp.Network([3, 2], precision="float64", backend="numpy")
    np.testing.assert_allclose(net.W[1], GOLDEN_W, rtol=1e-15)
    assert epoch_plan("shuffled", 8, 3, 0, 1)[0].tolist() == GOLDEN_ORDER


@pytest.mark.parametrize(
    "make",
    [
        lambda: bp.Network([784]),
        lambda: bp.Network([]),
        lambda: bp.Network(784),
        lambda: bp.Network([3, 0, 2]),
        lambda: bp.Network([3, -1, 2]),
        lambda: bp.Network([3, 2.5]),
        lambda: bp.Network(["3", "2"]),
        lambda: bp.Network([10**12, 10**12]),
        lambda: bp.Network([3, 2], hidden="rleu"),
        lambda: bp.Network([3, 2], hidden="softmax"),
        lambda: bp.Network([3, 2], output="softmx"),
        lambda: bp.Network([3, 2], init="hee"),
        lambda: bp.Network([3, 2], precision="float16"),
        lambda: bp.Network([3, 2], seed=-1),
        lambda: bp.Network([3, 2], seed=2**64),
        lambda: bp.Network([3, 2], seed=0.5),
        lambda: bp.Network([3, 2], backend="torch"),
        lambda: bp.Network([3, 2]).gradients([[1, 2, 3]], [0], cost="hinge"),
        lambda: bp.Network([3, 2], output="identity").gradients([[1, 2, 3]], [0], cost="cross_entropy"),
        lambda: bp.Network([3, 2], output="tanh").gradients([[1, 2, 3]], [0], cost="binary_cross_entropy"),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(bp.ConfigError) as e:
        make()
    assert len(str(e.value).splitlines()) == 2


def test_illegal_pair_names_the_legal_ones():
    with pytest.raises(bp.ConfigError, match=r"use output 'softmax', or one of the costs squared_error"):
        bp.Network([3, 2], output="identity").gradients([[1, 2, 3]], [0], cost="cross_entropy")


def test_one_output_that_is_not_finite_is_enough(backend):
    net = bp.Network([2, 3], init="zeros", backend=backend.name)
    net.b[1][1:2] = -np.inf
    with pytest.raises(bp.DataError, match="the outputs are not finite at row 0"):
        net.predict([[0.0, 0.0]])


def test_an_output_of_one_half_is_class_0(backend):
    for K in (1, 2):
        net = bp.Network([2, K], output="sigmoid", init="zeros", backend=backend.name)
        assert not net.predict([[0.0, 0.0], [1.0, 1.0]]).any()


def test_outputs_take_no_more_memory_than_a_chunk(monkeypatch):
    made = []

    class Recorded(network.Batch):
        def __init__(self, net, m, **settings):
            made.append(m)
            super().__init__(net, m, **settings)

    monkeypatch.setattr(network, "CHUNK_ROWS", 7)
    monkeypatch.setattr(network, "Batch", Recorded)
    net = bp.Network([3, 2], backend="numpy")
    for samples in (3, 40):
        net.forward(np.ones((samples, 3)))
    assert made == [3, 7]
