"""Source 1, a lecture's appendix: steps 1 to 6, sample by sample, for ReLU layers under a linear output.

In its letters: r layers, a[0] = x, z[k] and a[k], delta[k] = dJ/dz[k].
"""

import notes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from notes import close, close_lists, floats

import backprop_gpu as bp


def steps_1_to_5(W, b, x, y):
    """z, a, delta and the gradients of one sample; index 0 is None but for a[0]."""
    r = len(W) - 1
    z, a, delta, dW, db = ([None] * (r + 1) for _ in range(5))
    a[0] = x  # step 1
    for k in range(1, r + 1):  # step 2
        z[k] = []
        for i in range(len(W[k])):
            z_i = b[k][i]
            for j in range(len(a[k - 1])):
                z_i += W[k][i][j] * a[k - 1][j]
            z[k].append(z_i)
        a[k] = [max(v, 0.0) for v in z[k]] if k < r else z[k]
    delta[r] = [z[r][i] - y[i] for i in range(len(y))]  # step 3
    for k in range(r - 1, 0, -1):  # step 4, which names the sequence only: the chain rule through z[k+1]
        delta[k] = []
        for j in range(len(z[k])):
            dJ_da = 0.0
            for i in range(len(z[k + 1])):
                dJ_da += W[k + 1][i][j] * delta[k + 1][i]
            delta[k].append(dJ_da if z[k][j] > 0 else 0.0)
    for k in range(r, 0, -1):  # step 5
        dW[k] = [[delta[k][i] * a[k - 1][j] for j in range(len(a[k - 1]))] for i in range(len(delta[k]))]
        db[k] = list(delta[k])
    return z, a, delta, dW, db


def J(z_r, y):
    """The cost whose derivative step 3 is."""
    return sum((z_r[i] - y[i]) ** 2 for i in range(len(y))) / 2


def step_6(W, b, dW, db, lr):
    for k in range(1, len(W)):
        for i in range(len(W[k])):
            for j in range(len(W[k][i])):
                W[k][i][j] -= lr * dW[k][i][j]
            b[k][i] -= lr * db[k][i]


def problem(layers, seed, m):
    net, rng = notes.network(layers, seed, hidden="relu", output="identity")
    return net, rng.normal(size=(m, layers[0])), rng.normal(size=(m, layers[-1]))


@settings(max_examples=30)
@given(layers=notes.widths(), seed=notes.seeds)
def test_one_sample_goes_through_steps_1_to_5(layers, seed):
    net, X, Y = problem(layers, seed, 1)
    z, a, delta, dW, db = steps_1_to_5(floats(net.W), floats(net.b), X[0].tolist(), Y[0].tolist())
    page = net.backward(X, Y, "squared_error")
    close(page["cost"], J(z[-1], Y[0]), "J")
    close_lists([None if Z is None else Z[0] for Z in page["Z"]], z, "z")
    close_lists([A[0] for A in page["A"]], a, "a")
    close_lists([None if D is None else D[0] for D in page["Delta"]], delta, "delta")
    close_lists(page["W"], dW, "dJ/dW")
    close_lists(page["b"], db, "dJ/db")


@settings(max_examples=25)
@given(n=st.tuples(*[st.integers(1, 5)] * 3), seed=notes.seeds)
def test_the_two_layer_network_goes_x_z_a_o_and_back_delta_2_delta_1(n, seed):
    net, X, Y = problem(list(n), seed, 1)
    (_, W1, W2), (_, b1, b2), x, y = net.W, net.b, X[0], Y[0]
    z = np.array([W1[i] @ x + b1[i] for i in range(n[1])])
    a = np.array([max(v, 0.0) for v in z])
    o = np.array([W2[i] @ a + b2[i] for i in range(n[2])])
    delta_2 = o - y
    delta_1 = np.array([W2[:, i] @ delta_2 * (z[i] > 0) for i in range(n[1])])
    page = net.backward(X, Y, "squared_error")
    close(page["A"][2][0], o, "o")
    close_lists(page["Delta"], [None, [delta_1], [delta_2]], "delta")
    close_lists(page["W"], [None, np.outer(delta_1, x), np.outer(delta_2, a)], "dJ/dW")
    close_lists(page["b"], [None, delta_1, delta_2], "dJ/db")


@settings(max_examples=25)
@given(layers=notes.widths(), seed=notes.seeds, m=notes.sample_counts)
def test_a_batch_has_each_samples_delta_and_the_mean_of_their_gradients(layers, seed, m):
    net, X, Y = problem(layers, seed, m)
    W, b = floats(net.W), floats(net.b)
    each = [steps_1_to_5(W, b, x, y) for x, y in zip(X.tolist(), Y.tolist(), strict=True)]
    page = net.backward(X, Y, "squared_error")
    close(page["cost"], sum(J(z[-1], y) for (z, *_), y in zip(each, Y.tolist(), strict=True)) / m, "J")
    for k in range(1, net.L + 1):
        close(page["Delta"][k], [delta[k] for _, _, delta, _, _ in each], f"delta[{k}]")
        close(page["W"][k], sum(np.array(dW[k]) for *_, dW, _ in each) / m, f"dJ/dW[{k}]")
        close(page["b"][k], sum(np.array(db[k]) for *_, db in each) / m, f"dJ/db[{k}]")


@pytest.mark.parametrize("batches", ["in_order", "shuffled"])
@settings(max_examples=15)
@given(layers=notes.widths(), seed=notes.seeds, m=notes.sample_counts, lr=notes.learning_rates)
def test_the_loop_over_samples_ends_at_the_same_theta(batches, layers, seed, m, lr):
    net, X, Y = problem(layers, seed, m)
    W, b = floats(net.W), floats(net.b)
    order = notes.batches_seen(m, 1, batches, seed, epochs=3)
    history = bp.train(net, X, Y, "squared_error", bp.SGD(lr), epochs=3, batch_size=1, seed=seed, batches=batches)
    assert history.steps == [m, 2 * m, 3 * m]
    for epoch in range(3):
        total = 0.0
        for (i,) in order[epoch]:
            x, y = X[i].tolist(), Y[i].tolist()
            z, _, _, dW, db = steps_1_to_5(W, b, x, y)
            total += J(z[-1], y)
            step_6(W, b, dW, db, lr)
        close(history.train_cost[epoch], total / m, f"mean J of epoch {epoch}")
    close_lists(net.W, W, "W")
    close_lists(net.b, b, "b")


def test_in_order_is_the_samples_one_after_the_other():
    assert notes.batches_seen(5, 1, "in_order", 0, epochs=2) == [[[0], [1], [2], [3], [4]]] * 2


def test_a_unit_at_zero_passes_nothing_back():
    net, X, Y = problem([2, 3, 2], 5, 1)
    X[...], net.b[1][...] = 0, 0  # z[1] = 0 exactly: ReLU'(0) = 0
    page = net.backward(X, Y, "squared_error")
    _, _, delta, dW, db = steps_1_to_5(floats(net.W), floats(net.b), X[0].tolist(), Y[0].tolist())
    assert page["Z"][1].tolist() == [[0, 0, 0]]
    assert page["Delta"][1].tolist() == [delta[1]] == [[0, 0, 0]]
    close_lists(page["W"], dW, "dJ/dW")
    close_lists(page["b"], db, "dJ/db")
