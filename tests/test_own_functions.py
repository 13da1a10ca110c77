"""Activations and costs of one's own: as good as the built-in ones, held to the same check, kept by name in files."""

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu.backend import to_host

softsign = bp.Activation.of("softsign", lambda xp, Z: Z / (1 + abs(Z)), lambda xp, Z: 1 / (1 + abs(Z)) ** 2)
own_tanh = bp.Activation.of(
    "own_tanh", lambda xp, Z: xp.tanh(Z), lambda xp, A: 1 - A * A, derivative_from="A", increasing=True
)
log_cosh = bp.Cost.of(
    "log_cosh",
    lambda xp, Y, T: xp.log(xp.cosh(Y - T)).sum(axis=1),
    lambda xp, Y, T: xp.tanh(Y - T),
)
own_squares = bp.Cost.of(
    "own_squares", lambda xp, Y, T: ((Y - T) ** 2).sum(axis=1) / 2, lambda xp, Y, T: Y - T
)  # fmt: skip


def test_they_pass_the_gradient_check(rng):
    X = rng.normal(size=(6, 3))
    for output in ("softmax", "identity", softsign):
        net = bp.Network([3, 4, 5, 2], [softsign, own_tanh], output, precision="float64", backend="numpy")
        for T in (rng.integers(0, 2, 6), rng.normal(size=(6, 2))):
            assert bp.gradient_check(net, X, T, log_cosh)


def test_a_wrong_derivative_is_found(rng):
    X, T = rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
    wrong = bp.Activation.of("wrong", lambda xp, Z: Z / (1 + abs(Z)), lambda xp, Z: 1 / (1 + abs(Z)))
    net = bp.Network([3, 4, 2], wrong, "identity", precision="float64", backend="numpy")
    assert not bp.gradient_check(net, X, T)
    wrong_cost = bp.Cost.of("wrong", lambda xp, Y, T: ((Y - T) ** 2).sum(axis=1), lambda xp, Y, T: Y - T)
    net = bp.Network([3, 4, 2], "tanh", "identity", precision="float64", backend="numpy")
    assert not bp.gradient_check(net, X, T, wrong_cost)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_ones_own_version_of_a_built_in_function_trains_like_it(backend, rng, dropout):
    X, T = rng.normal(size=(20, 3)), rng.integers(0, 2, 20)
    build = {"precision": "float64", "seed": 1, "backend": backend.name, "dropout": dropout}
    nets = [bp.Network([3, 4, 2], f, f, **build) for f in ("tanh", own_tanh)]
    histories = [
        bp.train(net, X, T, cost=cost, optimizer=bp.SGD(0.1), epochs=3, batch_size=6, validation=(X, T))
        for net, cost in zip(nets, ("squared_error", own_squares), strict=True)
    ]
    np.testing.assert_allclose(to_host(nets[1].theta), to_host(nets[0].theta), rtol=1e-12)
    np.testing.assert_allclose(histories[1].train_cost, histories[0].train_cost, rtol=1e-12)
    np.testing.assert_allclose(histories[1].validation_cost, histories[0].validation_cost, rtol=1e-12)
    assert nets[1].hidden == nets[1].output == "own_tanh"
    assert nets[1].cost == "own_squares"
    np.testing.assert_array_equal(nets[1].predict(X), nets[0].predict(X))


def test_a_file_keeps_their_names_and_wants_them_back(tmp_path, rng):
    X, T = rng.normal(size=(6, 3)), rng.integers(0, 2, 6)
    net = bp.Network([3, 4, 5, 2], [softsign, "relu"], own_tanh, backend="numpy")
    bp.train(net, X, T, cost=log_cosh, epochs=1)
    bp.save(net, tmp_path / "m")
    back = bp.load(tmp_path / "m", backend="numpy", own=[softsign, own_tanh, log_cosh])
    np.testing.assert_array_equal(back.forward(X), net.forward(X))
    assert bp.evaluate(back, X, T) == bp.evaluate(net, X, T)
    with pytest.raises(bp.CheckpointError, match="uses 'softsign', an activation or a cost of somebody's own"):
        bp.load(tmp_path / "m", backend="numpy", own=[own_tanh, log_cosh])
    with pytest.raises(bp.CheckpointError, match="uses 'log_cosh', an activation or a cost of somebody's own"):
        bp.load(tmp_path / "m", backend="numpy", own=[softsign, own_tanh])


def test_results_of_another_shape_are_told():
    X, T = np.zeros((4, 3)), np.zeros((4, 2))
    rowwise = bp.Activation.of("rowwise", lambda xp, Z: Z.sum(axis=1), lambda xp, Z: Z)
    with pytest.raises(bp.ConfigError, match="the value of rowwise has shape"):
        bp.Network([3, 5, 2], rowwise, "identity", backend="numpy").forward(X)
    averaged = bp.Cost.of("averaged", lambda xp, Y, T: (Y - T) ** 2, lambda xp, Y, T: Y - T)
    with pytest.raises(bp.ConfigError, match="the value of averaged has shape"):
        bp.Network([3, 2], output="identity", backend="numpy").gradients(X, T, averaged)
    constant = bp.Activation.of("constant", lambda xp, Z: 1.0, lambda xp, Z: 0.0)  # one number will do
    assert bp.Network([3, 5, 2], constant, "identity", bias=False, backend="numpy").forward(X).shape == (4, 2)


@pytest.mark.parametrize(
    "own",
    [None, softsign, [softsign, "log_cosh"], [softsign, bp.Activation.of("softsign", abs, abs)]],
    ids=["none", "no list", "a name", "one name twice"],
)
def test_own_functions_are_a_list_each_of_its_own_name(own, tmp_path):
    bp.save(bp.Network([3, 4, 2], softsign, backend="numpy"), tmp_path / "m")
    with pytest.raises(bp.ConfigError, match="own"):
        bp.load(tmp_path / "m", backend="numpy", own=own)


def test_two_functions_of_one_name_are_not_mixed_up():
    other = bp.Activation.of("softsign", lambda xp, Z: Z * Z, lambda xp, Z: 2 * Z)
    with pytest.raises(bp.ConfigError, match="two activations are called 'softsign'"):
        bp.Network([3, bp.Layer(4, softsign), bp.Layer(4, other), 2], backend="numpy")
    nets = [bp.Network([3, 4, 2], f, backend="numpy") for f in (softsign, other)]
    with pytest.raises(bp.ConfigError, match="layer 1"):
        nets[0].carry_over(nets[1], 1)


@pytest.mark.parametrize("result", [lambda Z: "abc", lambda Z: None, lambda Z: Z.tolist(), lambda Z: Z * 1j])
def test_results_that_are_no_real_numbers_are_told(result):
    f = bp.Activation.of("f", lambda xp, Z: result(Z), lambda xp, Z: Z)
    with pytest.raises(bp.ConfigError, match="the value of f"):
        bp.Network([3, 4, 2], f, backend="numpy").forward(np.ones((2, 3)))


def test_a_cost_is_one_number_a_sample():
    mean = bp.Cost.of("whole", lambda xp, Y, T: ((Y - T) ** 2).mean(), lambda xp, Y, T: 2 * (Y - T))
    with pytest.raises(bp.ConfigError, match="the value of whole has shape"):
        bp.Network([3, 2], output="identity", backend="numpy").gradients(np.ones((4, 3)), np.ones((4, 2)), mean)


@pytest.mark.parametrize("make", [bp.Activation.of, bp.Cost.of])
def test_parts_that_are_no_functions(make):
    with pytest.raises(bp.ConfigError, match="is no function"):
        make("f", 3, lambda xp, *a: a[0])


@pytest.mark.parametrize("make", [bp.Activation.of, bp.Cost.of])
@pytest.mark.parametrize("name", ["relu", "squared_error", "two words", "", None, "a:b"])
def test_names_that_cannot_be_theirs(make, name):
    if name == ("squared_error" if make == bp.Activation.of else "relu"):
        pytest.skip("taken only among the others")
    with pytest.raises(bp.ConfigError, match="cannot name"):
        make(name, None, None)


def test_softmax_as_an_object_is_no_hidden_activation():
    from backprop_gpu.activations import SOFTMAX

    with pytest.raises(bp.ConfigError, match="no hidden activation"):
        bp.Network([2, 3, 2], SOFTMAX, backend="numpy")
