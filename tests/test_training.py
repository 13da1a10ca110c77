"""The training loop: what an epoch is, history, validation, callbacks, divergence, interruption, repeatability."""

import copy
import os
import signal
import threading
import time

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu.backend import to_host
from backprop_gpu.batches import epoch_plan, steps_per_epoch
from backprop_gpu.executors import Eager, Problem
from backprop_gpu.inputs import Samples
from backprop_gpu.network import Batch
from backprop_gpu.regularization import Regularization
from backprop_gpu.schedules import Cosine

cosine = Cosine()


@pytest.fixture
def blobs(rng):
    """Three well separated classes in four dimensions."""
    T = rng.integers(0, 3, 101)
    X = rng.normal(size=(101, 4)) + 3 * np.eye(4)[T]
    return X, T


def shuffled(n, seed, epoch):
    return epoch_plan("shuffled", n, 1, seed, epoch)[0]


def by_hand(net, X, T, rule, epochs, batch_size, seed, schedule):
    """The same training, from public gradients and the rule on single arrays; also the mean cost of each epoch."""
    n, t, costs = len(X), 0, []
    theta = to_host(net.theta).copy()
    copy = bp.Network(net.layers, net.hidden, net.output, bias=net.bias, precision=net.precision, backend="numpy")
    slots = [np.zeros_like(theta) for _ in range(rule.slots)]
    steps = -(-n // batch_size)
    for epoch in range(1, epochs + 1):
        order, cost = shuffled(n, seed, epoch), 0.0
        for i in range(0, n, batch_size):
            rows = order[i : i + batch_size]
            copy.theta[...] = theta
            page = copy.gradients(X[rows], T[rows])
            cost += page["cost"] * len(rows)
            g = np.zeros_like(theta)
            copy.theta[...] = 0
            for l in range(1, copy.L + 1):
                for p, d in ((copy.W[l], page["W"][l]), (copy.b[l], page["b"][l])):
                    if p is not None:
                        p[...] = d
            g[...] = copy.theta
            c = rule.coefficients(rule.lr * schedule(t, epochs * steps), t + 1)
            rule.apply(np, theta, g, tuple(slots), c, (np.empty_like(theta), np.empty_like(theta)))
            t += 1
        costs.append(cost / n)
    return theta, costs


@pytest.mark.parametrize("batch_size", [1, 16, 100, 101])
@pytest.mark.parametrize("rule", [bp.SGD(0.1), bp.SGD(0.1, momentum=0.9), bp.Adam(0.01)], ids=repr)
def test_training_is_its_steps_one_after_the_other(backend, blobs, rule, batch_size):
    X, T = blobs
    net = bp.Network([4, 6, 3], hidden="tanh", precision="float64", backend=backend.name)
    wanted, costs = by_hand(net, X, T, rule, 2, batch_size, 5, cosine)
    history = bp.train(net, X, T, optimizer=rule, schedule="cosine", epochs=2, batch_size=batch_size, seed=5)
    np.testing.assert_allclose(to_host(net.theta), wanted, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(history.train_cost, costs, rtol=1e-11)
    assert history.steps == [steps_per_epoch(101, batch_size), 2 * steps_per_epoch(101, batch_size)]


def test_what_is_not_said_is_ten_epochs_of_adam(rng):
    X, T = rng.normal(size=(300, 4)), rng.integers(0, 3, 300)
    thetas = []
    for said in ({}, {"optimizer": bp.Adam(), "epochs": 10, "batch_size": 128, "seed": 0}):
        net = bp.Network([4, 3], seed=1)
        bp.train(net, X, T, **said)
        thetas.append(to_host(net.theta))
    np.testing.assert_array_equal(*thetas)


def test_every_epoch_visits_every_sample_once_in_a_fresh_order():
    orders = [shuffled(1000, 3, e) for e in (1, 2, 3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert (orders[0] != orders[1]).any()
    np.testing.assert_array_equal(orders[1], shuffled(1000, 3, 2))
    assert (orders[1] != shuffled(1000, 4, 2)).any()


def test_a_batch_larger_than_the_data_is_all_of_it_with_one_warning(blobs):
    X, T = blobs
    nets = [bp.Network([4, 6, 3], backend="numpy") for _ in range(2)]
    with pytest.warns(UserWarning, match="batch_size 500 is more than the 101 samples") as told:
        history = bp.train(nets[0], X, T, epochs=2, batch_size=500)
    assert len(told) == 1
    assert history.steps == [1, 2]
    bp.train(nets[1], X, T, epochs=2, batch_size=101)
    np.testing.assert_array_equal(nets[0].theta, nets[1].theta)


def test_history_counts_what_the_steps_saw(backend, blobs):
    X, T = blobs
    net = bp.Network([4, 6, 3], precision="float64", backend=backend.name)
    tiny = bp.SGD(1e-12)  # nothing moves: the running means are the means over the data
    with pytest.warns(UserWarning, match="no progress: the training cost was"):
        history = bp.train(net, X, T, optimizer=tiny, epochs=3, batch_size=32, validation=(X[:50], T[:50]))
    cost, accuracy = bp.evaluate(net, X, T)
    assert cost == pytest.approx(net.gradients(X, T)["cost"])
    assert accuracy == np.mean(net.predict(X) == T)
    np.testing.assert_allclose(history.train_cost, [cost] * 3, rtol=1e-9)
    assert history.train_accuracy == [accuracy] * 3
    np.testing.assert_allclose(history.validation_cost, [net.gradients(X[:50], T[:50])["cost"]] * 3, rtol=1e-9)
    assert history.validation_accuracy == [np.mean(net.predict(X[:50]) == T[:50])] * 3
    assert history.epoch == [1, 2, 3]
    assert history.steps == [4, 8, 12]
    assert history.lr == [1e-12] * 3
    assert len(history) == 3
    assert all(s > 0 for s in history.seconds)


def test_it_learns(backend, blobs):
    X, T = blobs
    net = bp.Network([4, 16, 3], backend=backend.name)
    history = bp.train(net, X, T, optimizer="adam", epochs=30, batch_size=16)
    assert history.train_accuracy[-1] > 0.95
    assert history.train_cost[-1] < 0.5 * history.train_cost[0]


def test_regression_has_no_accuracy(blobs):
    X, _ = blobs
    net = bp.Network([4, 8, 4], output="identity", backend="numpy")
    history = bp.train(net, X, X, epochs=2, validation=(X, X))
    assert history.train_accuracy == history.validation_accuracy == [None, None]
    assert bp.evaluate(net, X, X).accuracy is None
    sigmoid = bp.Network([4, 8, 1], output="sigmoid", backend="numpy")
    assert bp.evaluate(sigmoid, X, np.full(101, 0.3)).accuracy is None


def test_the_cost_that_trained_is_the_cost_that_counts(blobs, tmp_path):
    X, T = blobs
    net = bp.Network([4, 3], precision="float64", backend="numpy")
    bp.train(net, X, T, cost="squared_error", epochs=1, save=tmp_path / "m")
    assert net.cost == "squared_error"
    wanted = net.gradients(X, T, cost="squared_error")["cost"]
    for same in (net, bp.load(tmp_path / "m", "numpy")):
        assert bp.evaluate(same, X, T).cost == pytest.approx(wanted, rel=1e-12)
    assert bp.evaluate(net, X, T, cost="cross_entropy").cost == pytest.approx(net.gradients(X, T)["cost"], rel=1e-12)


def test_history_tells_the_last_lr_and_the_seconds_of_each_epoch(blobs):
    X, T = blobs
    start = time.perf_counter()
    history = bp.train(
        bp.Network([4, 3], backend="numpy"), X, T, optimizer=bp.SGD(0.5), schedule="cosine", epochs=3, batch_size=51
    )
    assert history.lr == [0.5 * cosine(step, 6) for step in (1, 3, 5)]
    assert 0 < sum(history.seconds) < time.perf_counter() - start


def test_memory_of_a_step_is_shared_where_it_can_be():
    """Where f' is taken from A, Z[l] is A[l]; only a function that needs Z keeps it."""
    for hidden, own in (("relu", False), ("elu", False), ("gelu", True), ("swish", True)):
        batch = Batch(bp.Network([4, 5, 6, 3], hidden=hidden, backend="numpy"), 8, gradient=True)
        for b in (batch, batch.first(3)):
            assert [b.Z[l] is not b.A[l] for l in (1, 2)] == [own, own]
        assert len(batch.A) == 3
        assert [D.shape for D in batch.Delta[1:]] == [(8, 5), (8, 6), (8, 3)]


def test_evaluate_over_several_chunks(backend, rng):
    X, T = rng.normal(size=(2500, 4)), rng.integers(0, 3, 2500)
    net = bp.Network([4, 3], precision="float64", backend=backend.name)
    cost, accuracy = bp.evaluate(net, X, T)
    assert cost == pytest.approx(net.gradients(X, T)["cost"], rel=1e-12)
    assert accuracy == np.mean(net.predict(X) == T)


@pytest.mark.parametrize("rule", ["sgd", "momentum", "nesterov", "adam", "adamw"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_one_seed_one_result_to_the_last_bit(backend, blobs, rule, precision):
    X, T = blobs
    thetas = []
    for _ in range(2):
        net = bp.Network([4, 33, 7, 3], hidden="gelu", precision=precision, seed=1, backend=backend.name)
        bp.train(net, X, T, optimizer=rule, epochs=3, batch_size=16, seed=2)
        thetas.append(to_host(net.theta).copy())
    np.testing.assert_array_equal(*thetas)
    bp.train(net, X, T, optimizer=rule, epochs=1, batch_size=16, seed=3)
    assert (to_host(net.theta) != thetas[0]).any()


def test_backends_agree_step_by_step(backend, blobs):
    """Ten steps of plain SGD: the whole trajectory; costs and gradients to float64's rounding."""
    X, T = blobs
    thetas = {"numpy": [], backend.name: []}
    for name, seen in thetas.items():
        net = bp.Network([4, 31, 17, 3], hidden="swish", precision="float64", backend=name)

        class Watch:
            def on_step(self, run, net=net, seen=seen):
                seen.append(to_host(net.theta).copy())

            def __call__(self, run):
                pass

        bp.train(net, X, T, optimizer=bp.SGD(0.1), epochs=1, batch_size=11, callbacks=[Watch()])
    assert len(thetas["numpy"]) == 10
    np.testing.assert_allclose(thetas[backend.name], thetas["numpy"], rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------- callbacks


def test_callbacks_see_the_run(blobs):
    X, T = blobs
    seen = []

    class Both:
        def on_step(self, run):
            seen.append((run.epoch, run.step))

        def __call__(self, run):
            seen.append((run.epoch, run.step, len(run.history), run.epochs, run.steps_per_epoch))
            run.net.predict(X)  # the network may be used between steps

    bp.train(bp.Network([4, 3], backend="numpy"), X, T, epochs=2, batch_size=51, callbacks=[Both()])
    assert seen == [(1, 1), (1, 2), (1, 2, 1, 2, 2), (2, 3), (2, 4), (2, 4, 2, 2, 2)]


def test_a_callback_can_stop_the_run(blobs):
    X, T = blobs

    def stop(run):
        run.stop = run.epoch == 3

    history = bp.train(bp.Network([4, 3], backend="numpy"), X, T, epochs=100, callbacks=[stop])
    assert history.epoch == [1, 2, 3]


def test_an_exception_in_a_callback_names_it_and_leaves_whole_steps(blobs):
    X, T = blobs
    net = bp.Network([4, 3], backend="numpy")

    class Fails:
        def on_step(self, run):
            if run.step == 2:
                self.theta = net.theta.copy()
                raise KeyError("oh")

        def __call__(self, run):
            pass

    fails = Fails()
    with pytest.raises(KeyError) as e:
        bp.train(net, X, T, batch_size=10, callbacks=[fails])
    assert "callback" in e.value.__notes__[0]
    assert "after step 2" in e.value.__notes__[0]
    np.testing.assert_array_equal(net.theta, fails.theta)


# --------------------------------------------------------------------------------------------- divergence


class Keep:
    """The parameters after each step."""

    def __init__(self, net):
        self.thetas = [to_host(net.theta).copy()]

    def on_step(self, run):
        self.thetas.append(to_host(run.net.theta).copy())

    def __call__(self, run):
        pass


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(
    "rule", [bp.SGD(1e3), bp.SGD(1e2, momentum=0.9), bp.SGD(1e3, momentum=0.9, nesterov=True)], ids=repr
)
def test_divergence_is_told_and_the_last_finite_parameters_kept(backend, blobs, rule, precision):
    X, _ = blobs
    net = bp.Network([4, 8, 8, 4], output="identity", precision=precision, backend=backend.name)
    keep = Keep(net)
    with pytest.raises(bp.DivergenceError) as e:
        bp.train(net, X, X, optimizer=rule, schedule="cosine", epochs=50, batch_size=20, callbacks=[keep])
    error = e.value
    assert error.step == error.epoch * 6 - 5 + (error.step - 1) % 6
    assert error.learning_rate == rule.lr * cosine(error.step - 1, 300)
    assert f"epoch {error.epoch}, step {error.step}, learning rate" in error.cause
    assert "lower the learning rate" in error.cure
    theta = to_host(net.theta)
    assert np.isfinite(theta).all()
    np.testing.assert_array_equal(theta, keep.thetas[error.step - 1])


@pytest.mark.parametrize(
    ("rule", "schedule"),
    [
        (bp.SGD(1e39), None),
        (bp.SGD(1e37, momentum=0.9), None),
        (bp.SGD(1e38, momentum=0.9, nesterov=True), None),
        (bp.Adam(1e39), None),
        (bp.Adam(1e38, amsgrad=True), None),
        (bp.AdamW(1e39), None),
        (bp.AdamW(weight_decay=1e42), None),
        (bp.SGD(0.1, weight_decay=1e39), None),
        (bp.SGD(0.1), lambda step, total: 1e39 if step == 3 else 1.0),
    ],
    ids=lambda value: "" if callable(value) else repr(value),
)
def test_a_step_that_would_leave_the_finite_numbers_is_not_taken(backend, blobs, rule, schedule):
    """The cost and the gradient are finite, theta after the step would not be: in float32, and nothing moves."""
    X, T = blobs
    net = bp.Network([4, 8, 3], backend=backend.name)
    keep = Keep(net)
    with pytest.raises(bp.DivergenceError) as e:
        bp.train(net, X, T, optimizer=rule, schedule=schedule, epochs=40, batch_size=20, callbacks=[keep])
    theta = to_host(net.theta)
    assert np.isfinite(theta).all()
    np.testing.assert_array_equal(theta, keep.thetas[e.value.step - 1])


def test_a_decay_that_grows_is_caught_where_no_cost_sees_it():
    """Weights behind an input that is always 0 have no part in the cost, but weight_decay doubles them every step."""
    X, T = np.zeros((8, 4)), np.zeros(8, int)
    net = bp.Network([4, 8, 3], backend="numpy")
    with pytest.raises(bp.DivergenceError):
        bp.train(net, X, T, optimizer=bp.AdamW(1.0, weight_decay=3.0), epochs=1000, batch_size=8)
    assert np.isfinite(net.theta).all()


def test_adam_that_walks_away_is_told_too(blobs):
    X, _ = blobs
    net = bp.Network([4, 8, 4], output="identity", backend="numpy")
    with pytest.raises(bp.DivergenceError):
        bp.train(net, X, X, optimizer=bp.Adam(1e18), epochs=50)
    assert np.isfinite(net.theta).all()


# ------------------------------------------------------------------------------------------- interruption


def _one_by_one(monkeypatch):
    """Steps call the operations of `numpy_ops` by their names, one after the other."""
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", "eager")


@pytest.mark.parametrize("when", ["gather", "affine_activate", "hidden_delta", "weight_gradient", "update"])
def test_ctrl_c_waits_for_the_whole_step(blobs, monkeypatch, when):
    """The signal arrives inside the third step, in the middle of an operation; the step is finished, no other begun."""
    from backprop_gpu import numpy_ops

    X, T = blobs
    _one_by_one(monkeypatch)
    plain, calls = getattr(numpy_ops, when), []
    net = bp.Network([4, 6, 6, 3], backend="numpy")
    keep = Keep(net)

    def and_interrupt(*args):
        if len(keep.thetas) == 3 and not calls:
            calls.append(1)
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args)

    monkeypatch.setattr(numpy_ops, when, and_interrupt)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        bp.train(net, X, T, batch_size=10, callbacks=[keep])
    assert len(keep.thetas) == 4
    np.testing.assert_array_equal(net.theta, keep.thetas[3])
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stopped_run_is_saved(blobs, tmp_path):
    X, T = blobs

    class Stop:
        def on_step(self, run):
            if run.step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    net = bp.Network([4, 3], backend="numpy")
    with pytest.raises(KeyboardInterrupt):
        bp.train(net, X, T, batch_size=10, callbacks=[Stop()], save=tmp_path / "m")
    np.testing.assert_array_equal(bp.load(tmp_path / "m", "numpy").theta, net.theta)


def test_ctrl_c_is_not_lost_when_a_callback_fails(blobs):
    X, T = blobs

    def fails(run):
        os.kill(os.getpid(), signal.SIGINT)
        raise KeyError("oh")

    with pytest.raises(KeyboardInterrupt) as e:
        bp.train(bp.Network([4, 3], backend="numpy"), X, T, epochs=1, callbacks=[fails])
    assert isinstance(e.value.__context__, KeyError)


def test_a_second_ctrl_c_does_not_wait(blobs, monkeypatch):
    from backprop_gpu import numpy_ops

    _one_by_one(monkeypatch)
    X, T = blobs
    ended = []

    def twice(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        ended.append(1)

    monkeypatch.setattr(numpy_ops, "weight_gradient", twice)
    with pytest.raises(KeyboardInterrupt):
        bp.train(bp.Network([4, 3], backend="numpy"), X, T)
    assert not ended


def test_one_network_is_not_trained_twice_at_once(blobs):
    X, T = blobs
    net = bp.Network([4, 3], backend="numpy")
    errors = []

    def again(run):
        for target in (net, copy.deepcopy(net)):
            try:
                bp.train(target, X, T, epochs=1)
            except bp.ConfigError as e:
                errors.append(e.cause)

    bp.train(net, X, T, epochs=2, callbacks=[again])
    assert errors == ["this network is being trained already"] * 2
    bp.train(net, X, T, epochs=1)


def test_copies_are_networks_of_their_own():
    net = bp.Network([4, 3], backend="numpy")
    for other in (copy.copy(net), copy.deepcopy(net)):
        np.testing.assert_array_equal(other.theta, net.theta)
        assert not np.shares_memory(other.theta, net.theta)
        assert np.shares_memory(other.W[1], other.theta)


def test_a_callback_with_on_step_alone(blobs):
    X, T = blobs

    class Steps:
        seen = 0

        def on_step(self, run):
            self.seen += 1

    steps = Steps()
    bp.train(bp.Network([4, 3], backend="numpy"), X, T, epochs=2, batch_size=101, callbacks=[steps])
    assert steps.seen == 2


def test_callbacks_keep_their_numpy_warnings(blobs):
    X, T = blobs
    with pytest.warns(RuntimeWarning, match="divide by zero"):
        bp.train(
            bp.Network([4, 3], backend="numpy"), X, T, epochs=1, callbacks=[lambda run: np.float64(1) / np.float64(0)]
        )


def test_numpy_numbers_as_hyper_parameters_change_no_bit(blobs):
    X, T = blobs
    thetas = []
    for lr, factor in ((0.1, 0.5), (np.float64(0.1), np.float64(0.5))):
        net = bp.Network([4, 3], backend="numpy")
        bp.train(net, X, T, optimizer=bp.SGD(lr, momentum=type(lr)(0.9)), schedule=lambda s, n, f=factor: f, epochs=2)
        thetas.append(net.theta)
    np.testing.assert_array_equal(*thetas)


def test_threads_train_their_own_networks(blobs):
    X, T = blobs
    alone = bp.Network([4, 33, 3], seed=1, backend="numpy")
    bp.train(alone, X, T, epochs=5, batch_size=9)
    nets = [bp.Network([4, 33, 3], seed=1, backend="numpy") for _ in range(4)]
    threads = [threading.Thread(target=bp.train, args=(n, X, T), kwargs={"epochs": 5, "batch_size": 9}) for n in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for net in nets:
        np.testing.assert_array_equal(net.theta, alone.theta)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"epochs": 0}, bp.ConfigError),
        ({"epochs": 1.5}, bp.ConfigError),
        ({"batch_size": 0}, bp.ConfigError),
        ({"seed": -1}, bp.ConfigError),
        ({"cost": "binary_cross_entropy"}, bp.ConfigError),
        ({"optimizer": "sdg"}, bp.ConfigError),
        ({"schedule": "cos"}, bp.ConfigError),
        ({"schedule": lambda step, total: float("nan")}, bp.ConfigError),
        ({"schedule": lambda step, total: -1}, bp.ConfigError),
        ({"schedule": lambda step, total: None}, bp.ConfigError),
        ({"schedule": lambda step: 1}, bp.ConfigError),
        ({"callbacks": None}, bp.ConfigError),
        ({"callbacks": [5]}, bp.ConfigError),
        ({"optimizer": bp.Adam(eps=1e-45)}, bp.ConfigError),
        ({"validation": 3}, bp.ConfigError),
        ({"batch_size": np.array([8, 9])}, bp.ConfigError),
        ({"schedule": lambda step, total: "abc"}, bp.ConfigError),
        ({"save": 3}, bp.CheckpointError),
        ({"validation": (np.ones((2, 5)), [0, 1])}, bp.DataError),
        ({"save": "no/such/directory/x.safetensors"}, bp.CheckpointError),
        ({"save": "/"}, bp.CheckpointError),
    ],
)
def test_nonsense_is_refused_before_anything_moves(blobs, settings, error):
    X, T = blobs
    net = bp.Network([4, 3], backend="numpy")
    before = net.theta.copy()
    with pytest.raises(error):
        bp.train(net, X, T, **settings)
    np.testing.assert_array_equal(net.theta, before)
    assert (net.cost, net.task) == ("cross_entropy", "labels")


def test_the_executor_measures_before_it_updates(blobs):
    X, T = blobs
    net = bp.Network([4, 3], precision="float64", backend="numpy")
    wanted = net.gradients(X[:7], T[:7])["cost"]
    from backprop_gpu.costs import COSTS

    samples = Samples(X, T, None, "labels")
    problem = Problem(net, COSTS["cross_entropy"], samples, "mean", Regularization(), frozen=0)
    executor = Eager(problem, bp.SGD(0.5), 7, seed=0, steps=1)
    measured = np.zeros(2)
    executor.begin(np.arange(7), [0, 7], [0.5], 1)
    executor.step(0, 0, 7, measured)
    assert measured[0] / 7 == pytest.approx(wanted, rel=1e-14)
    assert net.gradients(X[:7], T[:7])["cost"] < wanted
