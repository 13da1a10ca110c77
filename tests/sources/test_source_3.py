"""Source 3: sigma in every layer, delta from layer L down to 1, and theta <- theta - eta grad C(theta).

In its letters: z^l = W^l a^{l-1} + b^l, a^l = sigma(z^l), and the target y_hat of the output y = f(x; theta). Where the
source slips: in its first relation the weights w_11^1, w_12^1, ... are those of layer l.
"""

import copy
import math

import notes
import numpy as np
import pytest
from formulas import DERIVATIVE, VALUE, jacobian, output
from hypothesis import given, settings
from hypothesis import strategies as st
from notes import close, close_lists, floats

import backprop_gpu as bp

sigmas = st.sampled_from(sorted(VALUE))  # sigma is any elementwise function


def forward_pass(W, b, sigma, x):
    L = len(W) - 1
    z, a = [None] * (L + 1), [x] + [None] * L
    for l in range(1, L + 1):
        z[l] = []
        for i in range(len(W[l])):
            z_i = b[l][i]
            for j in range(len(a[l - 1])):
                z_i += W[l][i][j] * a[l - 1][j]
            z[l].append(z_i)
        a[l] = [VALUE[sigma](z_i) for z_i in z[l]]
    return z, a


def norm(v):
    return math.sqrt(sum(v_i * v_i for v_i in v))


def grad_C(y, y_hat):
    """dC/dy_i of C = ||y_hat - y||; 0 where the norm has no derivative."""
    r = norm([y_hat[i] - y[i] for i in range(len(y))])
    return [(y[i] - y_hat[i]) / r if r else 0.0 for i in range(len(y))]


def backward_pass(W, sigma, z, grad_C_of_y):
    L = len(W) - 1
    delta = [None] * (L + 1)
    delta[L] = [DERIVATIVE[sigma](z[L][i]) * grad_C_of_y[i] for i in range(len(z[L]))]
    for l in range(L - 1, 0, -1):
        delta[l] = []
        for i in range(len(z[l])):
            s = 0.0
            for k in range(len(z[l + 1])):
                s += W[l + 1][k][i] * delta[l + 1][k]
            delta[l].append(DERIVATIVE[sigma](z[l][i]) * s)
    return delta


def gradient(delta, a, x):
    """dC/dw_ij^l = delta_i^l a_j^{l-1}, or delta_i^1 x_j in the first layer; dC/db_i^l = delta_i^l."""
    dW, db = [None], [None]
    for l in range(1, len(delta)):
        before = a[l - 1] if l > 1 else x
        dW.append([[delta[l][i] * before[j] for j in range(len(before))] for i in range(len(delta[l]))])
        db.append([delta[l][i] for i in range(len(delta[l]))])
    return dW, db


def gradient_of_all(W, b, sigma, X, Y_hat):
    """C(theta) = sum_k ||y_hat_k - f(x_k; theta)||, its gradient, a sum over the samples too, and each sample's work.

    Where the source slips: C is this sum, not a mean, and y_hat is the target, y the output.
    """
    L = len(W) - 1
    C, each = 0.0, []
    dW = [None] + [[[0.0] * len(W[l][0]) for _ in W[l]] for l in range(1, L + 1)]
    db = [None] + [[0.0] * len(W[l]) for l in range(1, L + 1)]
    for x, y_hat in zip(X, Y_hat, strict=True):
        z, a = forward_pass(W, b, sigma, x)
        delta = backward_pass(W, sigma, z, grad_C(a[L], y_hat))
        dW_k, db_k = gradient(delta, a, x)
        C += norm([y_hat[i] - a[L][i] for i in range(len(y_hat))])
        for l in range(1, L + 1):
            for i in range(len(W[l])):
                db[l][i] += db_k[l][i]
                for j in range(len(W[l][i])):
                    dW[l][i][j] += dW_k[l][i][j]
        each.append((z, a, delta))
    return C, dW, db, each


def problem(layers, seed, m, sigma):
    net, rng = notes.network(layers, seed, hidden=sigma, output=sigma)
    return net, rng.normal(size=(m, layers[0])), rng.normal(size=(m, layers[-1]))


@settings(max_examples=30)
@given(layers=notes.widths(), seed=notes.seeds, m=notes.sample_counts, sigma=sigmas)
def test_forward_and_backward_pass_and_the_gradient(layers, seed, m, sigma):
    net, X, Y_hat = problem(layers, seed, m, sigma)
    C, dW, db, each = gradient_of_all(floats(net.W), floats(net.b), sigma, X.tolist(), Y_hat.tolist())
    page = net.backward(X, Y_hat, "norm", reduction="sum")
    close(page["cost"], C, "C(theta)")
    for l in range(1, net.L + 1):
        close(page["Z"][l], [z[l] for z, _, _ in each], f"z^{l}")
        close(page["A"][l], [a[l] for _, a, _ in each], f"a^{l}")
        close(page["Delta"][l], [delta[l] for _, _, delta in each], f"delta^{l}")
    close_lists(page["W"], dW, "dC/dw")
    close_lists(page["b"], db, "dC/db")


@settings(max_examples=25)
@given(layers=notes.widths(), seed=notes.seeds, m=notes.sample_counts, sigma=sigmas, eta=notes.learning_rates)
def test_theta_after_some_steps_of_the_algorithm(layers, seed, m, sigma, eta):
    net, X, Y_hat = problem(layers, seed, m, sigma)
    W, b = floats(net.W), floats(net.b)
    bp.train(net, X, Y_hat, "norm", bp.SGD(eta), epochs=4, batch_size="full", reduction="sum")
    for _ in range(4):
        descend(W, b, sigma, X, Y_hat, eta)
    close_lists(net.W, W, "W")
    close_lists(net.b, b, "b")


def descend(W, b, sigma, X, Y_hat, eta):
    """theta^{i+1} <- theta^i - eta grad C(theta^i), in place; was it a step (theta^{i+1} != theta^i)?"""
    _, dW, db, _ = gradient_of_all(W, b, sigma, X.tolist(), Y_hat.tolist())
    before = copy.deepcopy((W, b))
    for l in range(1, len(W)):
        for i in range(len(W[l])):
            b[l][i] -= eta * db[l][i]
            for j in range(len(W[l][i])):
                W[l][i][j] -= eta * dW[l][i][j]
    return (W, b) != before


@settings(max_examples=15)
@given(layers=notes.widths(), seed=notes.seeds, m=st.integers(1, 3), eta=st.floats(0.003, 0.3))
def test_the_loop_ends_where_theta_does_not_move_any_more(layers, seed, m, eta):
    net, X, _ = problem(layers, seed, m, "relu")
    Y_hat = np.full((m, layers[-1]), -1.0)  # which ReLU cannot reach: going down ends when its units are all off
    W, b = floats(net.W), floats(net.b)
    steps, moving = 0, True
    while moving and steps < 100:
        moving = descend(W, b, "relu", X, Y_hat, eta)
        steps += 1
    history = bp.train(
        net,
        X,
        Y_hat,
        "norm",
        bp.SGD(eta),
        epochs=100,
        batch_size="full",
        reduction="sum",
        parameter_tolerance=0,
    )
    assert (history.steps[-1], history.stopped) == (steps, "epochs" if moving else "still")
    close_lists(net.W, W, "W")
    close_lists(net.b, b, "b")


@settings(max_examples=20)
@given(layers=notes.widths(), seed=notes.seeds, m=notes.sample_counts)
def test_where_the_output_function_mixes_a_row_delta_L_takes_its_full_jacobian(layers, seed, m):
    # Where the source slips: delta^L = sigma'(z^L) ⊙ grad C is for elementwise outputs. With softmax the chain rule
    # before it, dC/dz_i = sum_j dC/dy_j dy_j/dz_i, keeps its sum.
    net, rng = notes.network(layers, seed, hidden="sigmoid", output="softmax")
    X, Y_hat = rng.normal(size=(m, layers[0])), rng.dirichlet(np.ones(layers[-1]), m)
    page = net.backward(X, Y_hat, "norm", reduction="sum")
    for s in range(m):
        z = page["Z"][-1][s].tolist()
        dC_dy, dy_dz = grad_C(output("softmax", z), Y_hat[s].tolist()), jacobian("softmax", z)
        delta = [sum(dC_dy[j] * dy_dz[j][i] for j in range(len(z))) for i in range(len(z))]
        close(page["Delta"][-1][s], delta, "delta^L")


@pytest.mark.parametrize("f", sorted(VALUE))
@settings(max_examples=10)
@given(w=st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3), cost=st.sampled_from(["norm", "squared_error"]))
def test_the_chain_f_f_f_w_is_a_1_1_1_1_network(f, w, cost):
    net = bp.Network([1, 1, 1, 1], hidden=f, output=f, bias=False, precision="float64", backend="numpy")
    net.W[1][...], net.W[2][...], net.W[3][...] = w, 1, 1  # x = f(w), y = f(x), z = f(y)
    value, d = VALUE[f], DERIVATIVE[f]
    x, y, z = value(w), value(value(w)), value(value(value(w)))
    page = net.backward([[1.0]], [[z - 1]], cost)  # dC/dz = 1 for both costs
    close(page["A"][3], [[z]], "z")
    close(page["W"][3], [[d(y) * y]], "dz/dW3, W3 = 1")
    close(page["W"][2], [[d(y) * d(x) * x]], "dz/dW2, W2 = 1")
    close(page["W"][1], [[d(value(value(w))) * d(value(w)) * d(w)]], "dz/dw")


def test_at_norm_zero_the_gradient_is_zero_and_theta_stays():
    net, X, _ = problem([3, 4, 2], 11, 4, "tanh")
    Y_hat = net.forward(X)
    page = net.backward(X, Y_hat, "norm", reduction="sum")
    assert page["cost"] == 0
    assert not any(g.any() for g in [*page["W"][1:], *page["b"][1:], *page["Delta"][1:]])
    before = net.theta.copy()
    bp.train(net, X, Y_hat, "norm", bp.SGD(0.1), epochs=2, batch_size=4, reduction="sum")
    np.testing.assert_array_equal(net.theta, before)
