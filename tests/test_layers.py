"""Layers that differ: activation, width, bias, initialiser, dropout of each; none hidden; carried over; saved."""

import copy
import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import backprop_gpu as bp
from backprop_gpu.backend import to_host


def test_lists_and_layer_specs_say_the_same(backend):
    lists = bp.Network(
        [4, 6, 5, 3],
        hidden=["relu", "tanh"],
        init=["he", "glorot_uniform", "zeros"],
        bias=[True, False, True],
        dropout=[0.0, 0.4],
        output="sigmoid",
        backend=backend.name,
    )
    specs = bp.Network(
        [
            4,
            bp.Layer(6, "relu"),
            bp.Layer(5, "tanh", bias=False, init="glorot_uniform", dropout=0.4),
            bp.Layer(3, "sigmoid", init="zeros"),
        ],
        backend=backend.name,
    )
    for net in (lists, specs):
        assert net.hidden == ["relu", "tanh"]
        assert net.output == "sigmoid"
        assert net.init == ["he", "glorot_uniform", "zeros"]
        assert net.bias == [True, False, True]
        assert net.dropout == [0.0, 0.4]
        assert net.b[2] is None
        assert net.parameter_count == 24 + 6 + 30 + 15 + 3
        assert not to_host(net.W[3]).any()
        assert np.abs(to_host(net.W[2])).max() <= np.sqrt(6 / 11)
    np.testing.assert_array_equal(to_host(lists.theta), to_host(specs.theta))
    assert repr(lists) == repr(specs)
    assert "tanh, dropout 0.4" in lists.summary()
    assert "N_w + N_b = 69 weights + 9 biases = 78 parameters" in lists.summary()


def test_each_layer_has_its_own_function(backend, rng):
    net = bp.Network([3, 4, 5, 2], hidden=["relu", "sigmoid"], output="tanh", precision="float64", backend=backend.name)
    X, T = rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
    page = net.backward(X, T)
    np.testing.assert_array_equal(page["A"][1], np.maximum(page["Z"][1], 0))
    np.testing.assert_allclose(page["A"][2], 1 / (1 + np.exp(-page["Z"][2])), rtol=1e-13)
    np.testing.assert_allclose(page["A"][3], np.tanh(page["Z"][3]), rtol=1e-13)
    assert bp.gradient_check(net, X, T)


def test_a_seed_means_one_network_whatever_the_way_to_say_it():
    plain = bp.Network([4, 6, 3], seed=5, backend="numpy")
    for other in (
        bp.Network([4, bp.Layer(6), bp.Layer(3)], seed=5, backend="numpy"),
        bp.Network([4, 6, 3], ["relu"], init=("he", "he"), bias=[True, True], dropout=[0], seed=5, backend="numpy"),
    ):
        np.testing.assert_array_equal(plain.theta, other.theta)
        assert repr(plain) == repr(other)


@pytest.mark.parametrize(
    ("layers", "settings", "words"),
    [
        ([2, 3, 2], {"hidden": ["relu", "tanh"]}, "hidden has 2 entries for 1 layers"),
        ([2, 3, 2], {"bias": [True]}, "bias has 1 entries for 2 layers"),
        ([2, 3, 2], {"bias": "no"}, "bias is 'no'"),
        ([2, 3, 2], {"bias": [True, 2]}, "bias is 2"),
        ([2, 3, 2], {"bias": None}, "bias is None"),
        ([2, bp.Layer(3, ""), 2], {}, "unknown hidden activation ''"),
        ([2, 3, 2], {"hidden": ["rellu"]}, "unknown hidden activation 'rellu'"),
        ([2, 3, 2], {"hidden": ["softmax"]}, "no hidden activation"),
        ([2, 3, 2], {"init": ["he", "xavier"]}, "unknown initialiser 'xavier'"),
        ([2, 2], {"hidden": "rellu"}, "unknown hidden activation 'rellu'"),
        ([bp.Layer(2, "relu"), 2], {}, "the first layer is the input"),
        ([2, bp.Layer(0), 2], {}, "layers is [2, 0, 2]"),
        ([2, bp.Layer(3, "maxout"), 2], {}, "unknown hidden activation 'maxout'"),
        ([2, bp.Layer(3), bp.Layer(2, "reluu")], {}, "unknown output function 'reluu'"),
    ],
    ids=repr,
)
def test_layers_that_make_no_sense(layers, settings, words):
    with pytest.raises(bp.ConfigError) as caught:
        bp.Network(layers, backend="numpy", **settings)
    assert words in caught.value.cause


def test_copies_keep_every_layer(backend):
    net = bp.Network([3, bp.Layer(4, "tanh", dropout=0.1), bp.Layer(2, bias=False)], seed=3, backend=backend.name)
    for other in (copy.copy(net), copy.deepcopy(net), net.to("numpy")):

        def text(n):
            return repr(n).replace(repr(n.backend.name), "")

        assert text(other) == text(net)
        np.testing.assert_array_equal(to_host(other.theta), to_host(net.theta))
        other.theta[...] = 0
    assert to_host(net.theta).any()


def test_a_copy_in_another_precision_has_the_same_parameters(backend):
    net = bp.Network([3, 5, 2], "tanh", seed=3, backend=backend.name)
    double = net.to("numpy", precision="float64")
    assert double.precision == "float64"
    for l in (1, 2):
        np.testing.assert_array_equal(double.W[l], to_host(net.W[l]).astype(np.float64))
    np.testing.assert_array_equal(to_host(double.to(backend.name, precision="float32").theta), to_host(net.theta))


# ------------------------------------------------------------------------------------------ no hidden layer


def test_linear_regression_finds_what_the_normal_equations_give(backend, rng):
    X, T = rng.normal(size=(60, 3)), rng.normal(size=(60, 2))
    net = bp.Network([3, 2], output="identity", precision="float64", backend=backend.name)
    bp.train(net, X, T, optimizer=bp.SGD(0.4), epochs=300, batch_size="full")
    wanted = np.linalg.lstsq(np.hstack([X, np.ones((60, 1))]), T, rcond=None)[0]
    np.testing.assert_allclose(to_host(net.W[1]), wanted[:3].T, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(to_host(net.b[1]), wanted[3], rtol=1e-9, atol=1e-11)


def test_logistic_and_softmax_regression_of_two_classes_agree(rng):
    """softmax of (z1, z2) is the sigmoid of z2 - z1, so at the minimum both give the same probabilities."""
    X = rng.normal(size=(80, 2))
    T = (X[:, 0] + rng.normal(size=80) > 0).astype(int)
    logistic = bp.Network([2, 1], output="sigmoid", precision="float64", backend="numpy")
    softmax = bp.Network([2, 2], precision="float64", backend="numpy")
    for net in (logistic, softmax):
        bp.train(net, X, T, optimizer=bp.SGD(2.0), epochs=1500, batch_size="full")
    np.testing.assert_allclose(logistic.predict_proba(X)[:, 0], softmax.predict_proba(X)[:, 1], rtol=1e-9)
    np.testing.assert_array_equal(logistic.predict(X), softmax.predict(X))
    assert net.summary().startswith("2/2 network, 1 layer, float64")


# -------------------------------------------------------------------------------------------- carrying over


def test_first_layers_are_carried_over(backend):
    old = bp.Network([4, 6, 5, 4], ["relu", "tanh"], precision="float64", seed=1, backend="numpy")
    old.b[1][...] = 0.25
    new = bp.Network([4, 6, 5, 3], ["relu", "tanh"], seed=2, backend=backend.name)
    last = to_host(new.W[3]).copy()
    new.carry_over(old, 2)
    for l in (1, 2):
        np.testing.assert_array_equal(to_host(new.W[l]), old.W[l].astype(np.float32))
        np.testing.assert_array_equal(to_host(new.b[l]), old.b[l].astype(np.float32))
    np.testing.assert_array_equal(to_host(new.W[3]), last)


@pytest.mark.parametrize(
    ("other", "layers", "words"),
    [
        (bp.Network([4, 7, 3], backend="numpy"), 1, "layer 1 is 6 x 4 relu here and 7 x 4 relu there"),
        (bp.Network([4, 6, 3], "tanh", backend="numpy"), 1, "6 x 4 relu here and 6 x 4 tanh there"),
        (bp.Network([4, 6, 3], bias=False, backend="numpy"), 1, "relu without bias there"),
        (bp.Network([4, 6, 3], output="sigmoid", backend="numpy"), 2, "3 x 6 softmax here and 3 x 6 sigmoid there"),
        (bp.Network([4, 6, 3], backend="numpy"), 3, "layers to carry over: 3"),
        (bp.Network([4, 6, 3], backend="numpy"), 0, "layers to carry over: 0"),
    ],
)
def test_layers_that_do_not_fit_are_not_carried_over(other, layers, words):
    net = bp.Network([4, 6, 3], seed=1, backend="numpy")
    before = net.theta.copy()
    with pytest.raises(bp.ConfigError) as caught:
        net.carry_over(other, layers)
    assert words in caught.value.cause
    np.testing.assert_array_equal(net.theta, before)


@pytest.mark.parametrize(
    "rule", [bp.SGD(0.5, momentum=0.9, weight_decay=0.1), bp.AdamW(0.1), bp.Lion(0.01, weight_decay=1)]
)
def test_frozen_layers_keep_every_bit_and_the_others_learn_as_they_would(backend, rng, rule):
    X, T = rng.normal(size=(12, 3)), rng.integers(0, 2, 12)
    net = bp.Network([3, 4, 5, 2], "tanh", precision="float64", backend=backend.name)
    first, before = net.to("numpy"), net.to("numpy")
    bp.train(net, X, T, optimizer=rule, epochs=3, batch_size=5, frozen=2, l2=0.1, clip_norm=0.5, seed=4)
    for l in (1, 2):
        np.testing.assert_array_equal(to_host(net.W[l]), before.W[l])
        np.testing.assert_array_equal(to_host(net.b[l]), before.b[l])
    features = first.backward(X, T)["A"][
        2
    ]  # the same as to train the last layer alone, on what comes out of the others
    alone = bp.Network([5, 2], precision="float64", backend="numpy")
    alone.W[1][...], alone.b[1][...] = before.W[3], before.b[3]
    bp.train(alone, features, T, optimizer=rule, epochs=3, batch_size=5, l2=0.1, clip_norm=0.5, seed=4)
    np.testing.assert_allclose(to_host(net.W[3]), alone.W[1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(to_host(net.b[3]), alone.b[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", [2, -1, 1.5, "one"])
def test_not_every_layer_can_be_frozen(frozen):
    with pytest.raises(bp.ConfigError, match="frozen"):
        bp.train(bp.Network([2, 3, 2], backend="numpy"), np.zeros((3, 2)), [0, 1, 0], frozen=frozen)


@pytest.mark.parametrize(("other", "layers"), [(None, 1), ("net", 1), (bp.Network([2, 3, 2], backend="numpy"), "1")])
def test_what_cannot_be_carried_over_is_told(other, layers):
    with pytest.raises(bp.ConfigError):
        bp.Network([2, 3, 2], backend="numpy").carry_over(other, layers)


def test_parameters_too_large_for_another_precision_are_told(backend):
    net = bp.Network([2, 2], precision="float64", backend=backend.name)
    net.W[1][...] = 1e300
    with pytest.raises(bp.ConfigError, match="too large for float32"):
        net.to("numpy", precision="float32")
    single = bp.Network([2, 2], backend=backend.name)
    before = to_host(single.theta).copy()
    with pytest.raises(bp.ConfigError, match="too large for float32"):
        single.carry_over(net, 1)
    np.testing.assert_array_equal(to_host(single.theta), before)


# ---------------------------------------------------------------------------------------------------- saved


def test_a_model_file_holds_every_layer(backend, tmp_path):
    net = bp.Network(
        [3, bp.Layer(4, "tanh", dropout=0.1), bp.Layer(5, "gelu", bias=False, init="lecun"), 2], backend=backend.name
    )
    bp.train(net, np.ones((4, 3)), [0, 1, 0, 1], cost="huber:delta=0.5", epochs=1)
    bp.save(net, tmp_path / "m")
    back = bp.load(tmp_path / "m", backend=backend.name)
    assert repr(back) == repr(net)
    assert back.cost == net.cost == "huber:delta=0.5"
    np.testing.assert_array_equal(to_host(back.theta), to_host(net.theta))
    assert bp.evaluate(back, np.ones((4, 3)), [0, 1, 0, 1]) == bp.evaluate(net, np.ones((4, 3)), [0, 1, 0, 1])


def test_files_of_the_first_version_are_read(tmp_path):
    """They know of one setting for all layers, and of no dropout."""
    net = bp.Network([3, 4, 2], "tanh", backend="numpy")
    bp.save(net, tmp_path / "m")
    with safe_open(tmp_path / "m", "np") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"])
    del config["dropout"], metadata["sha256_of_metadata"]
    metadata.update(format_version="1", config=json.dumps(config))
    save_file(load_file(tmp_path / "m"), tmp_path / "old", metadata)
    assert repr(bp.load(tmp_path / "old", backend="numpy")) == repr(net)
    metadata["format_version"] = "2"
    save_file(load_file(tmp_path / "m"), tmp_path / "odd", metadata)
    with pytest.raises(bp.CheckpointError, match="more or fewer entries"):
        bp.load(tmp_path / "odd", backend="numpy")
