"""How a run ends, what order it takes the samples in, and what it tells of its gradients."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import backprop_gpu as bp
from backprop_gpu.backend import to_host
from backprop_gpu.batches import epoch_plan, split_off
from backprop_gpu.network import Batch
from backprop_gpu.schedules import ReduceOnPlateau


@pytest.fixture
def line(rng):
    """Points near a plane, for linear regression: the cost has one minimum."""
    X = rng.normal(size=(50, 3))
    return X, X @ [[1.0], [2.0], [-1.0]] + 0.1 * rng.normal(size=(50, 1))


def linear(backend="numpy"):
    return bp.Network([3, 1], output="identity", precision="float64", backend=backend)


def norms(net, X, T, **settings):
    g = net.gradients(X, T, **settings)
    return [np.linalg.norm(dW) for dW in g["W"][1:]], np.sqrt(
        sum(np.sum(p**2) for p in (*g["W"][1:], *g["b"][1:]) if p is not None)
    )


def test_a_run_ends_after_its_epochs(line):
    history = bp.train(linear(), *line, epochs=3)
    assert history.stopped == "epochs"
    assert len(history) == 3
    assert history.samples == 150


@pytest.mark.parametrize("batch_size", ["full", 7])
def test_the_norm_of_the_whole_gradient_ends_it(backend, line, batch_size):
    """Source 4, step 4: repeat until ||grad Q|| <= epsilon; the gradient over all the data and all the parameters."""
    net = linear(backend.name)
    history = bp.train(
        net, *line, optimizer=bp.SGD(0.05), epochs=500, batch_size=batch_size, gradient_tolerance=0.02, l2=0.01
    )
    assert history.stopped == "gradient"
    assert set(history.gradient_norms) == {None}  # nobody has asked for them
    assert norms(net, *line, l2=0.01)[1] <= 0.02
    shorter = linear(backend.name)
    bp.train(shorter, *line, optimizer=bp.SGD(0.05), epochs=len(history) - 1, batch_size=batch_size, l2=0.01)
    assert norms(shorter, *line, l2=0.01)[1] > 0.02


def test_parameters_that_stand_still_end_it(backend, line):
    """Source 3: while (theta^(i+1) != theta^i)."""
    X, net = line[0], linear(backend.name)
    exact = X, X @ [[1.0], [2.0], [-1.0]] + 3  # at the minimum the gradient is rounding, far below a bit of theta
    history = bp.train(net, *exact, optimizer=bp.SGD(0.5), epochs=5000, batch_size="full", parameter_tolerance=0)
    assert history.stopped == "still"
    before = to_host(net.theta).copy()
    bp.train(net, *exact, optimizer=bp.SGD(0.5), epochs=1, batch_size="full")
    np.testing.assert_array_equal(to_host(net.theta), before)
    looser = linear(backend.name)
    early = bp.train(looser, *line, optimizer=bp.SGD(0.5), epochs=5000, batch_size="full", parameter_tolerance=1e-3)
    assert early.stopped == "still"
    assert len(early) < len(history)
    before = to_host(looser.theta).copy()
    bp.train(looser, *line, optimizer=bp.SGD(0.5), epochs=1, batch_size="full")
    assert 0 < np.abs(to_host(looser.theta) - before).max() <= 1e-3


@pytest.mark.parametrize("schedule", ["warmup:steps=3", "one_cycle:start=0"])
def test_an_epoch_without_a_learning_rate_does_not_stand_still(line, schedule):
    settings = {"optimizer": bp.SGD(0.1), "batch_size": "full", "epochs": 20, "schedule": schedule}
    assert bp.train(linear(), *line, parameter_tolerance=0, **settings).stopped == "epochs"


class Thetas:
    def __init__(self):
        self.seen = []

    def __call__(self, run):
        self.seen.append(to_host(run.net.theta).copy())


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_ends_it_and_the_best_parameters_are_restored(backend, rng, patience):
    X, T = rng.normal(size=(30, 3)), rng.integers(0, 2, 30)  # nothing to learn: validation soon grows worse
    Xv, Tv = rng.normal(size=(200, 3)), rng.integers(0, 2, 200)
    net = bp.Network([3, 30, 2], precision="float64", backend=backend.name)
    keep = Thetas()
    history = bp.train(
        net, X, T, optimizer=bp.Adam(0.02), epochs=200, validation=(Xv, Tv), patience=patience, callbacks=[keep]
    )
    assert history.stopped == "patience"
    best = int(np.argmin(history.validation_cost)) + 1
    assert history.best_epoch == best
    assert len(history) == best + patience
    np.testing.assert_array_equal(to_host(net.theta), keep.seen[best - 1])
    assert bp.evaluate(net, Xv, Tv).cost == pytest.approx(min(history.validation_cost), rel=1e-12)


def test_the_best_parameters_are_restored_at_the_last_epoch_too_and_saved(rng, tmp_path):
    X, T = rng.normal(size=(30, 3)), rng.integers(0, 2, 30)
    Xv, Tv = rng.normal(size=(200, 3)), rng.integers(0, 2, 200)
    net = bp.Network([3, 30, 2], backend="numpy")
    history = bp.train(
        net, X, T, optimizer=bp.Adam(0.02), epochs=12, validation=(Xv, Tv), patience=100, save=tmp_path / "m"
    )
    assert history.stopped == "epochs"
    assert history.best_epoch < 12
    assert bp.evaluate(net, Xv, Tv).cost == pytest.approx(min(history.validation_cost), rel=1e-6)
    np.testing.assert_array_equal(bp.load(tmp_path / "m", backend="numpy").theta, net.theta)


def test_the_epoch_that_something_else_ends_is_looked_at_too(rng):
    """Whatever ends the run, and whether its last epoch is the best or not, the best parameters are what is left."""
    X, T = rng.normal(size=(30, 3)), rng.integers(0, 2, 30)
    Xv, Tv = rng.normal(size=(200, 3)), rng.integers(0, 2, 200)

    def stop_after(epochs):
        def stop(run):
            run.stop = run.epoch == epochs

        return stop

    bests = []
    for epochs in range(1, 13):
        net = bp.Network([3, 30, 2], backend="numpy")
        history = bp.train(
            net,
            X,
            T,
            optimizer=bp.Adam(0.02),
            epochs=20,
            validation=(Xv, Tv),
            patience=50,
            callbacks=[stop_after(epochs)],
        )
        assert history.stopped == "callback"
        assert len(history) == epochs
        bests.append(history.best_epoch == epochs)
        assert history.best_epoch == int(np.argmin(history.validation_cost)) + 1
        assert bp.evaluate(net, Xv, Tv).cost == pytest.approx(min(history.validation_cost), rel=1e-6)
    assert set(bests) == {True, False}


def test_without_patience_the_last_parameters_stay(rng):
    X, T = rng.normal(size=(30, 3)), rng.integers(0, 2, 30)
    nets = [bp.Network([3, 30, 2], backend="numpy") for _ in range(2)]
    history = bp.train(nets[0], X, T, epochs=5, validation=(X[:9], T[:9]))
    bp.train(nets[1], X, T, epochs=5)
    np.testing.assert_array_equal(nets[0].theta, nets[1].theta)
    assert history.best_epoch is None


def test_a_time_limit_ends_it_after_a_step(line):
    class Slow:
        def on_step(self, run):
            if run.step == 12:
                time.sleep(0.3)

    net = linear()
    history = bp.train(net, *line, epochs=1000, batch_size=5, time_limit=0.25, callbacks=[Slow()])
    assert history.stopped == "time"
    assert history.steps[-1] <= 12
    assert history.samples == 5 * history.steps[-1]
    if history.steps == [10, 12]:  # the usual case: in the middle of the second epoch, whose means are of two batches
        rows = epoch_plan("shuffled", 50, 5, 0, 2)[0][:10]
        start = linear()
        bp.train(start, *line, epochs=1, batch_size=5)
        first = start.gradients(line[0][rows[:5]], line[1][rows[:5]])["cost"]
        assert history.train_cost[1] == pytest.approx(first, rel=0.9)


def test_a_callback_ends_it(line):
    def stop(run):
        run.stop = True

    assert bp.train(linear(), *line, epochs=9, callbacks=[stop]).stopped == "callback"


def test_gradient_norms_of_each_layer_are_told_on_request(backend, rng):
    X, T = rng.normal(size=(40, 3)), rng.integers(0, 2, 40)
    net = bp.Network([3, 4, 5, 2], "tanh", precision="float64", backend=backend.name)
    keep = Thetas()
    w = rng.random(40)
    history = bp.train(
        net, X, T, epochs=2, batch_size=8, gradient_norms=True, callbacks=[keep], l1=0.01, sample_weight=w
    )
    other = net.to("numpy")
    for epoch, theta in enumerate(keep.seen):
        other.theta[...] = theta
        np.testing.assert_allclose(
            history.gradient_norms[epoch], norms(other, X, T, l1=0.01, sample_weight=w)[0], rtol=1e-9
        )
    assert bp.train(net, X, T, epochs=1).gradient_norms == [None]


def test_the_whole_gradient_is_that_of_all_chunks(rng, monkeypatch):
    from backprop_gpu import loop

    monkeypatch.setattr(loop, "CHUNK_ROWS", 7)
    X, T = rng.normal(size=(40, 3)), rng.integers(0, 2, 40)
    net = bp.Network([3, 4, 2], "tanh", precision="float64", backend="numpy")
    for reduction in ("mean", "sum"):
        history = bp.train(net, X, T, epochs=1, gradient_norms=True, reduction=reduction)
        np.testing.assert_allclose(history.gradient_norms[0], norms(net, X, T, reduction=reduction)[0], rtol=1e-10)


def test_frozen_layers_do_not_count_in_the_whole_gradient(line, rng):
    X, T = line
    net = bp.Network([3, 2, 1], "tanh", "identity", precision="float64", backend="numpy")
    history = bp.train(
        net, X, T, optimizer=bp.SGD(0.5), epochs=4000, batch_size="full", frozen=1, gradient_tolerance=1e-5
    )
    assert history.stopped == "gradient"
    assert norms(net, X, T)[1] > 1e-3


@pytest.mark.parametrize("batches", ["shuffled", "chunks", "in_order"])
@given(n=st.integers(1, 60), batch_size=st.integers(1, 60), seed=st.integers(0, 2**64 - 1), epoch=st.integers(1, 9))
def test_every_plan_visits_every_sample_once(batches, n, batch_size, seed, epoch):
    batch_size = min(n, batch_size)
    order, ends = epoch_plan(batches, n, batch_size, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    sizes = np.diff(ends)
    assert ends[0] == 0
    assert ends[-1] == n
    assert len(sizes) == -(-n // batch_size)
    assert sorted(sizes, reverse=True)[:-1] == [batch_size] * (len(sizes) - 1)
    if batches != "chunks":
        assert (sizes[:-1] == batch_size).all()
    if batches == "in_order":
        np.testing.assert_array_equal(order, np.arange(n))
    again = epoch_plan(batches, n, batch_size, seed, epoch)
    np.testing.assert_array_equal(again[0], order)
    np.testing.assert_array_equal(again[1], ends)


def test_the_short_chunk_comes_at_every_place():
    """Source 5, "Batch generator": the chunks themselves are put in a random order each epoch."""
    places = [int(np.argmin(np.diff(epoch_plan("chunks", 32, 12, 0, epoch)[1]))) for epoch in range(1, 400)]
    counts = np.bincount(places, minlength=3)
    assert len(counts) == 3
    assert counts.min() > 100


@pytest.mark.parametrize("batches", ["chunks", "in_order"])
def test_training_follows_the_plan(backend, line, batches):
    X, T = line
    net, hand = linear(backend.name), linear()
    bp.train(net, X, T, optimizer=bp.SGD(0.1), epochs=3, batch_size=12, batches=batches, seed=8)
    for epoch in (1, 2, 3):
        order, ends = epoch_plan(batches, 50, 12, 8, epoch)
        for start, end in itertools.pairwise(ends):
            page = hand.gradients(X[order[start:end]], T[order[start:end]])
            hand.W[1][...] -= 0.1 * page["W"][1]
            hand.b[1][...] -= 0.1 * page["b"][1]
    np.testing.assert_allclose(to_host(net.theta), hand.theta, rtol=1e-10, atol=1e-13)


@given(n=st.integers(2, 200), share=st.floats(0.01, 0.99), seed=st.integers(0, 2**64 - 1))
def test_a_split_takes_its_share_and_nothing_twice(n, share, seed):
    if not 1 <= round(n * share) < n:
        with pytest.raises(bp.ConfigError):
            split_off(n, share, seed)
        return
    stay, held = split_off(n, share, seed)
    assert len(held) == round(n * share)
    np.testing.assert_array_equal(np.sort(np.concatenate([stay, held])), np.arange(n))
    assert (np.diff(held) > 0).all()
    assert (np.diff(stay) > 0).all()


def test_a_share_is_split_off_and_watched(backend, line):
    X, T = line
    stay, held = split_off(50, 0.2, 6)
    nets = [linear(backend.name) for _ in range(2)]
    split = bp.train(nets[0], X, T, epochs=3, validation=0.2, seed=6)
    given_set = bp.train(nets[1], X[stay], T[stay], epochs=3, validation=(X[held], T[held]), seed=6)
    np.testing.assert_array_equal(to_host(nets[0].theta), to_host(nets[1].theta))
    assert split.validation_cost == given_set.validation_cost
    on_device = linear(backend.name)
    bp.train(on_device, backend.xp.asarray(X), backend.xp.asarray(T), epochs=3, validation=0.2, seed=6)
    np.testing.assert_array_equal(to_host(on_device.theta), to_host(nets[0].theta))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"patience": 0, "validation": 0.2}, bp.ConfigError),
        ({"patience": 3}, bp.ConfigError),
        ({"gradient_tolerance": -1}, bp.ConfigError),
        ({"parameter_tolerance": float("nan")}, bp.ConfigError),
        ({"time_limit": 0}, bp.ConfigError),
        ({"validation": 0.0}, bp.ConfigError),
        ({"validation": 1.0}, bp.ConfigError),
        ({"validation": 0.001}, bp.ConfigError),
        ({"validation": True}, bp.DataError),
        ({"batches": "chunk"}, bp.ConfigError),
        ({"batch_size": "whole"}, bp.ConfigError),
        ({"batch_size": 0}, bp.ConfigError),
    ],
    ids=repr,
)
def test_nonsense_is_refused_before_anything_moves(line, settings, error):
    net = linear()
    before = net.theta.copy()
    with pytest.raises(error):
        bp.train(net, *line, **settings)
    np.testing.assert_array_equal(net.theta, before)


def test_limits_that_are_just_met(backend):
    """At a minimum, exactly: a norm of 0 is at most 0, and a cost that stays the same is not a lower one."""
    X, T = np.ones((4, 3)), np.zeros((4, 1))
    at_minimum = {"layers": [3, 1], "output": "identity", "init": "zeros", "backend": backend.name}
    history = bp.train(bp.Network(**at_minimum), X, T, epochs=9, gradient_tolerance=0)
    assert (history.stopped, len(history)) == ("gradient", 1)
    history = bp.train(bp.Network(**at_minimum), X, T, epochs=9, validation=(X, T), patience=2)
    assert (history.stopped, len(history), history.best_epoch) == ("patience", 3, 1)


def test_the_whole_gradient_takes_no_more_memory_than_a_chunk(line, monkeypatch):
    from backprop_gpu import loop

    made = []

    def recorded(net, m, **settings):
        made.append(m)
        return Batch(net, m, **settings)

    monkeypatch.setattr(loop, "CHUNK_ROWS", 7)
    monkeypatch.setattr(loop, "Batch", recorded)
    bp.train(linear(), *line, epochs=2, gradient_norms=True)
    assert made == [7, 7]


@pytest.mark.parametrize("validation", [None, 0.2])
def test_a_schedule_that_heeds_costs_sees_those_of_validation_where_there_are_some(line, validation):
    seen = []

    class Watching(ReduceOnPlateau):
        def during(self, costs):
            seen.append(list(costs))
            return super().during(costs)

    history = bp.train(linear(), *line, epochs=3, schedule=Watching(), validation=validation)
    costs = history.train_cost if validation is None else history.validation_cost
    assert seen == [costs[:0], costs[:1], costs[:2]]


@pytest.mark.parametrize("size", [0.0, 1.0, 1e-30, 1e12])
def test_norms_of_gradients_with_zeros_and_of_any_size(backend, line, size):
    X, T = line
    X = np.column_stack([X[:, :2], np.zeros(len(X))])
    net = linear(backend.name)
    history = bp.train(net, X, T * size, optimizer=bp.SGD(1e-3), epochs=1, gradient_norms=True)
    np.testing.assert_allclose(history.gradient_norms[0], norms(net, X, T * size)[0], rtol=1e-12)
