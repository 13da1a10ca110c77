"""What users hand over: what is refused, in which words, and what is read alike."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import backprop_gpu as bp
from backprop_gpu.backend import to_host


@pytest.fixture
def net(backend):
    return bp.Network([4, 5, 3], precision="float64", backend=backend.name)


X = np.arange(24, dtype=float).reshape(6, 4) / 24
T = np.array([0, 1, 2, 2, 1, 0])


def broken(place, value):
    bad = X.copy()
    bad[place] = value
    return bad


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (broken((2, 3), np.nan), "X holds nan at row 2, column 3"),
        (broken((5, 0), -np.inf), "X holds -inf at row 5, column 0"),
        (X[:, :3], "X has 3 features, the network takes 4"),
        (X[:0], "X has no samples"),
        (np.empty((0, 0)), "X has no samples"),
        (np.empty((3, 0)), "X has 0 features"),
        (X[0], "X has 1 dimension, shape (4,)"),
        (3.0, "X has 0 dimensions"),
        (X.astype(object), "X has dtype object"),
        (X.astype(complex), "X has dtype complex128"),
        (X.astype(str), "X has dtype <U"),
        (np.zeros((6, 4), "M8[s]"), "X has dtype datetime64"),
        ([[1, 2, 3, 4], [1, 2]], "X is not an array"),
        (None, "X has dtype object"),
    ],
)
def test_features_refused(net, bad, words):
    for call in (net.forward, net.predict, lambda x: net.gradients(x, T), lambda x: bp.train(net, x, T, epochs=1)):
        before = to_host(net.theta).copy()
        with pytest.raises(bp.DataError) as e:
            call(bad)
        assert words in e.value.cause
        assert len(str(e.value).splitlines()) == 2
        np.testing.assert_array_equal(to_host(net.theta), before)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([0, 1, 2, 3, 1, 0], "labels must be in 0..2, found 3 at row 3"),
        ([0, -1, 2, 3, 1, 0], "labels must be in 0..2, found -1 at row 1"),
        (np.array([0, 1, 2, 2**63, 1, 0], np.uint64), "found 9223372036854775808 at row 3"),
        (T[:5], "X has 6 samples, T has 5"),
        (T.astype(float), "dtype float64, but the network has 3 outputs"),
        (T.astype(bool), "dtype bool"),
        (T.astype(str), "T has dtype <U"),
        (T.astype(object), "T has dtype object"),
        (T[:, None], "T has shape (6, 1), the network has 3 outputs"),
        (np.eye(4)[T], "T has shape (6, 4)"),
        (np.eye(3)[T][None], "X has 6 samples, T has 1"),
        (np.full((6, 3), np.nan), "T holds nan at row 0, column 0"),
        (np.full((6, 3), 0.5), "T is not a probability distribution at row 0"),
        (np.array([[2, -1, 0]] * 6), "T is not a probability distribution at row 0"),
        (3, "T has none"),
    ],
)
def test_targets_refused(net, bad, words):
    for call in (
        lambda t: net.gradients(X, t),
        lambda t: bp.train(net, X, t, epochs=1),
        lambda t: bp.evaluate(net, X, t),
    ):
        before = to_host(net.theta).copy()
        with pytest.raises(bp.DataError) as e:
            call(bad)
        assert words in e.value.cause
        np.testing.assert_array_equal(to_host(net.theta), before)


def test_how_far_from_1_probabilities_may_sum():
    net = bp.Network([4, 3], backend="numpy")
    near = np.full((6, 3), 1 / 3) * (1 + 0.9e-3)
    net.gradients(X, near)
    with pytest.raises(bp.DataError, match="not a probability distribution"):
        net.gradients(X, near * (1 + 0.3e-3))


def test_masked_values_are_refused():
    net = bp.Network([4, 3], backend="numpy")
    masked_X, masked_T = np.ma.masked_array(X), np.ma.masked_array(T)
    net.gradients(masked_X, masked_T)
    masked_T[2] = np.ma.masked
    with pytest.raises(bp.DataError, match="T has masked values"):
        net.gradients(X, masked_T)
    masked_X[1, 1] = np.ma.masked
    with pytest.raises(bp.DataError, match="X has masked values"):
        net.forward(masked_X)


def test_arrays_whose_conversion_fails():
    class Bad:
        def __array__(self, *args, **kwargs):
            raise KeyError("no")

    with pytest.raises(bp.DataError, match="X is not an array"):
        bp.Network([4, 3], backend="numpy").forward(Bad())


def test_labels_of_cupy_arrays_are_checked_too(backend):
    if backend.name == "numpy":
        pytest.skip("CuPy's indexing wraps, NumPy's does not")
    net = bp.Network([4, 5, 3], backend="cupy")
    with pytest.raises(bp.DataError, match="found 3 at row 1"):
        net.gradients(backend.asarray(X), backend.asarray(np.array([0, 3, 0, 0, 0, 0])))


def test_binary_targets_outside_0_to_1_are_refused():
    net = bp.Network([4, 2], output="sigmoid", backend="numpy")
    with pytest.raises(bp.DataError, match=r"T is outside 0..1 at row 4"):
        net.gradients(X, np.array([[0, 1]] * 4 + [[0, 2]] + [[0, 1]]))
    net.gradients(X, np.array([[0, 1]] * 4 + [[0, 2]] + [[0, 1]]), cost="squared_error")


def test_values_too_large_for_the_precision_are_refused():
    net = bp.Network([4, 3], backend="numpy")
    with pytest.raises(bp.DataError, match="too large for float32"):
        net.forward(broken((1, 2), 1e300))


def test_labels_mean_one_hot_whatever_the_cost(net):
    for output, cost in (
        ("softmax", None),
        ("sigmoid", None),
        ("identity", "squared_error"),
        ("softmax", "squared_error"),
    ):
        n = bp.Network([4, 5, 3], output=output, precision="float64", backend="numpy")
        a, b = n.gradients(X, T, cost), n.gradients(X, np.eye(3)[T], cost)
        np.testing.assert_allclose(a["cost"], b["cost"], rtol=1e-14)
        np.testing.assert_allclose(a["W"][1], b["W"][1], rtol=1e-13, atol=1e-17)


def test_one_output_takes_a_vector():
    net = bp.Network([4, 1], output="sigmoid", precision="float64", backend="numpy")
    t = np.array([0, 1, 1, 0, 1, 0])
    for same in (t[:, None], t.astype(bool), t.astype(float), t.tolist()):
        np.testing.assert_array_equal(net.gradients(X, t)["W"][1], net.gradients(X, same)["W"][1])


def strided():
    wide = np.zeros((12, 8))
    wide[::2, ::2] = X
    return wide[::2, ::2]


@pytest.mark.parametrize(
    "same",
    [
        np.asfortranarray(X),
        strided(),
        X[::-1][::-1],
        X[::-1].copy()[::-1],
        X.astype(">f8"),
        X.tolist(),
        X.reshape(6, 2, 2),
        np.ma.masked_array(X),
        np.lib.stride_tricks.as_strided(X, writeable=False),
        np.frombuffer(b"x" + X.tobytes(), np.uint8)[1:].view(float).reshape(6, 4),
    ],
    ids=[
        "fortran",
        "strided",
        "reversed view",
        "reversed copy",
        "big-endian",
        "list",
        "images",
        "masked",
        "read-only",
        "unaligned",
    ],
)
def test_the_same_numbers_give_the_same_result_and_are_not_touched(backend, same):
    kept = np.array(same)
    wanted = bp.Network([4, 5, 3], precision="float64", backend=backend.name)
    bp.train(wanted, X, T, epochs=2, batch_size=4)
    net = bp.Network([4, 5, 3], precision="float64", backend=backend.name)
    bp.train(net, same, T, epochs=2, batch_size=4)
    np.testing.assert_array_equal(to_host(net.theta), to_host(wanted.theta))
    np.testing.assert_array_equal(np.array(same), kept)


def test_memmap(tmp_path):
    np.save(tmp_path / "x.npy", X)
    net = bp.Network([4, 5, 3], precision="float64", backend="numpy")
    np.testing.assert_array_equal(net.forward(np.load(tmp_path / "x.npy", mmap_mode="r")), net.forward(X))


@pytest.mark.parametrize("dtype", ["?", "b", "h", "i", "q", "H", "I", "Q", "e", "f", "d", "g"])
def test_every_kind_of_number_keeps_its_value(dtype):
    net = bp.Network([4, 3], precision="float64", backend="numpy")
    numbers = np.array([[0, 1, 1, 0], [1, 0, 1, 1]], dtype)
    np.testing.assert_array_equal(net.forward(numbers), net.forward(numbers.astype(float)))


@pytest.mark.parametrize("dtype", ["b", "B", "h", "H", "i", "I", "q", "Q"])
def test_labels_of_every_integer_type(dtype):
    net = bp.Network([4, 3], backend="numpy")
    np.testing.assert_array_equal(net.gradients(X, T.astype(dtype))["W"][1], net.gradients(X, T)["W"][1])


def test_aliased_features_and_targets():
    net = bp.Network([4, 3, 4], output="identity", precision="float64", backend="numpy")
    both = X.copy()
    bp.train(net, both, both, epochs=2)
    np.testing.assert_array_equal(both, X)


@given(row=st.integers(0, 40), column=st.integers(0, 3), value=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_the_first_bad_number_is_found_wherever_it_is(row, column, value):
    big = np.ones((41, 4), np.float32)
    big[row, column] = value
    big[40, 3] = np.nan
    net = bp.Network([4, 3], backend="numpy")
    with pytest.raises(bp.DataError, match=f"at row {row}, column {column}"):
        net.forward(big)
