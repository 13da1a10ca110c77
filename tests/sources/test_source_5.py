"""Source 5: forward propagation, the backpropagation algorithm and its mini-batch form, and the batch generator.

In its letters: layers counted by their adjustable parameters, 1..L; z[l], a[l]; f in the hidden layers and g in the
last one; delta[l] = dC/dz[l]; a batch has a sample in each column. Momentum and Adam are only named there.
"""

import math
import random

import notes
import numpy as np
import pytest
from formulas import DERIVATIVE, VALUE, softmax
from hypothesis import given, settings
from hypothesis import strategies as st
from notes import close, close_lists, floats

import backprop_gpu as bp

hidden_functions = st.sampled_from(["sigmoid", "tanh", "relu", "leaky_relu", "softplus", "swish"])

# The three networks of the notes, and the one that their pattern does not hold for: the engine's output and cost.
TASKS = {
    "linear regression": ("identity", "squared_error"),
    "logistic regression": ("sigmoid", "binary_cross_entropy"),
    "softmax regression": ("softmax", "cross_entropy"),
    "squared error with sigma": ("sigmoid", "squared_error"),
}
tasks = st.sampled_from(sorted(TASKS))


def g(task, z):
    if task == "softmax regression":
        return softmax(z)
    return [VALUE[TASKS[task][0]](v) for v in z]


def C(task, y, t):
    if task == "softmax regression":
        return -sum(t[k] * math.log(y[k]) for k in range(len(y)))
    if task == "logistic regression":
        return sum(-t[k] * math.log(y[k]) - (1 - t[k]) * math.log(1 - y[k]) for k in range(len(y)))
    return sum((y[k] - t[k]) ** 2 for k in range(len(y))) / 2


def dC_dz(task, y, t):
    """Of the last net values. The pattern y - t does not hold for squared error with sigma."""
    if task == "squared error with sigma":
        return [(y[k] - t[k]) * y[k] * (1 - y[k]) for k in range(len(y))]
    return [y[k] - t[k] for k in range(len(y))]


def forward_propagation(W, b, f, task, x):
    L = len(W) - 1
    z, a = [None] * (L + 1), [x] + [None] * L
    for l in range(1, L + 1):
        z[l] = [b[l][i] + sum(W[l][i][j] * a[l - 1][j] for j in range(len(a[l - 1]))) for i in range(len(W[l]))]
        a[l] = [VALUE[f](v) for v in z[l]] if l < L else g(task, z[l])
    return z, a


def back_propagation(W, f, z, a, dC_dzL):
    """The algorithm for one vector x = a[0]: delta, dC/dW, dC/db.

    Where the source slips: what its loop makes of W[l], delta[l] and z[l-1], and calls delta[l], is delta[l-1].
    """
    L = len(W) - 1
    delta, dC_dW, dC_db = ([None] * (L + 1) for _ in range(3))
    l = L
    delta[l] = dC_dzL
    while l >= 1:
        dC_db[l] = list(delta[l])
        dC_dW[l] = [[delta[l][i] * a[l - 1][j] for j in range(len(a[l - 1]))] for i in range(len(delta[l]))]
        if l > 1:
            d = [DERIVATIVE[f](z[l - 1][i]) for i in range(len(z[l - 1]))]
            delta[l - 1] = [d[i] * sum(W[l][k][i] * delta[l][k] for k in range(len(delta[l]))) for i in range(len(d))]
        l = l - 1
    return delta, dC_dW, dC_db


def mini_batch(W, b, f, task, X, T):
    """The mini-batch form, X (n, m) and T (K, m): C, Z, A, dC/dZ (not averaged), dC/dW and dC/db (1/m once)."""
    L, m = len(W) - 1, X.shape[1]
    Z, A, dC_dZ, dC_dW, dC_db = ([None] * (L + 1) for _ in range(5))
    A[0] = X
    for l in range(1, L + 1):
        Z[l] = b[l].reshape(-1, 1) + W[l] @ A[l - 1]
        A[l] = np.vectorize(VALUE[f])(Z[l]) if l < L else np.array([g(task, z) for z in Z[l].T.tolist()]).T
    Y = A[L]
    cost = sum(C(task, Y[:, i].tolist(), T[:, i].tolist()) for i in range(m)) / m
    dC_dZ[L] = np.array([dC_dz(task, Y[:, i].tolist(), T[:, i].tolist()) for i in range(m)]).T
    for l in range(L, 1, -1):
        dC_dZ[l - 1] = np.vectorize(DERIVATIVE[f])(Z[l - 1]) * (W[l].T @ dC_dZ[l])
    for l in range(1, L + 1):
        dC_db[l] = 1 / m * dC_dZ[l] @ np.ones(m)
        dC_dW[l] = 1 / m * dC_dZ[l] @ A[l - 1].T
    return cost, Z, A, dC_dZ, dC_dW, dC_db


def problem(layers, seed, m, f, task):
    """(net, X, T), samples in rows; T are one-hot rows, rows of 0 and 1, or numbers."""
    output, _ = TASKS[task]
    net, rng = notes.network(layers, seed, hidden=f, output=output)
    X, K = rng.normal(size=(m, layers[0])), layers[-1]
    if task == "softmax regression":
        return net, X, np.eye(K)[rng.integers(0, K, m)]
    return net, X, rng.normal(size=(m, K)) if task == "linear regression" else rng.integers(0, 2, (m, K)) * 1.0


def columns(arrays):
    """The notes' batch arrays, a sample in each column, as the engine holds them: a sample in each row."""
    return [None if a is None else a.T for a in arrays]


PROBLEM = {"layers": notes.widths(), "seed": notes.seeds, "f": hidden_functions, "task": tasks}


@settings(max_examples=30)
@given(**PROBLEM)
def test_one_vector_forward_and_back(layers, seed, f, task):
    net, X, T = problem(layers, seed, 1, f, task)
    W, b, x, t = floats(net.W), floats(net.b), X[0].tolist(), T[0].tolist()
    z, a = forward_propagation(W, b, f, task, x)
    delta, dC_dW, dC_db = back_propagation(W, f, z, a, dC_dz(task, a[-1], t))
    page = net.backward(X, T, TASKS[task][1])
    close(page["cost"], C(task, a[-1], t), "C")
    close_lists(page["Z"], [None] + [[v] for v in z[1:]], "z")
    close_lists(page["A"], [[v] for v in a], "a")
    close_lists(page["Delta"], [None] + [[v] for v in delta[1:]], "delta")
    close_lists(page["W"], dC_dW, "dC/dW")
    close_lists(page["b"], dC_db, "dC/db")


@settings(max_examples=30)
@given(**PROBLEM, m=notes.sample_counts)
def test_a_mini_batch_forward_and_back(layers, seed, f, task, m):
    net, X, T = problem(layers, seed, m, f, task)
    cost, Z, A, dC_dZ, dC_dW, dC_db = mini_batch(net.W, net.b, f, task, X.T, T.T)
    page = net.backward(X, T, TASKS[task][1])
    close(page["cost"], cost, "C")
    close_lists(page["Z"], columns(Z), "Z")
    close_lists(page["A"], columns(A), "A")
    close_lists(page["Delta"], columns(dC_dZ), "dC/dZ")
    close_lists(page["W"], dC_dW, "dC/dW")
    close_lists(page["b"], dC_db, "dC/db")


@settings(max_examples=20)
@given(**PROBLEM, m=notes.sample_counts)
def test_a_batch_is_its_vectors_side_by_side_and_its_gradient_their_average(layers, seed, f, task, m):
    net, X, T = problem(layers, seed, m, f, task)
    W, b, L = floats(net.W), floats(net.b), net.L
    page = net.backward(X, T, TASKS[task][1])
    each = []
    for x, t in zip(X.tolist(), T.tolist(), strict=True):
        z, a = forward_propagation(W, b, f, task, x)
        each.append(back_propagation(W, f, z, a, dC_dz(task, a[L], t)))
    for l in range(1, L + 1):
        close(page["Delta"][l], [delta[l] for delta, _, _ in each], f"delta[{l}]")
        close(page["W"][l], sum(np.array(dC_dW[l]) for _, dC_dW, _ in each) / m, f"dC/dW[{l}]")
        close(page["b"][l], sum(np.array(dC_db[l]) for *_, dC_db in each) / m, f"dC/db[{l}]")


@settings(max_examples=15)
@given(layers=notes.widths(), seed=notes.seeds, f=hidden_functions, m=notes.sample_counts)
def test_integer_labels_are_one_hot_columns(layers, seed, f, m):
    net, X, T = problem(layers, seed, m, f, "softmax regression")
    cost, _, _, dC_dZ, dC_dW, dC_db = mini_batch(net.W, net.b, f, "softmax regression", X.T, T.T)
    page = net.backward(X, T.argmax(axis=1), "cross_entropy")
    close(page["cost"], cost, "C")
    close_lists(page["Delta"], columns(dC_dZ), "dC/dZ")
    close_lists(page["W"], dC_dW, "dC/dW")
    close_lists(page["b"], dC_db, "dC/db")


@pytest.mark.parametrize("batches", ["in_order", "shuffled", "chunks"])
@settings(max_examples=20)
@given(**PROBLEM, n=st.integers(1, 8), data=st.data(), lr=notes.learning_rates)
def test_the_parameters_after_some_epochs_of_mini_batches(batches, layers, seed, f, task, n, data, lr):
    net, X, T = problem(layers, seed, n, f, task)
    batch_size = data.draw(st.integers(1, n))
    W, b = [None, *(w.copy() for w in net.W[1:])], [None, *(v.copy() for v in net.b[1:])]
    history = bp.train(
        net,
        X,
        T,
        TASKS[task][1],
        bp.SGD(lr),
        epochs=2,
        batch_size=batch_size,
        seed=seed,
        batches=batches,
    )
    for epoch, chunks in enumerate(notes.batches_seen(n, batch_size, batches, seed, epochs=2)):
        total = 0.0
        for rows in chunks:
            cost, _, _, _, dC_dW, dC_db = mini_batch(W, b, f, task, X[rows].T, T[rows].T)
            total += cost * len(rows)
            for l in range(1, net.L + 1):
                W[l] = W[l] - lr * dC_dW[l]
                b[l] = b[l] - lr * dC_db[l]
        close(history.train_cost[epoch], total / n, f"C in epoch {epoch}")
    close_lists(net.W, W, "W")
    close_lists(net.b, b, "b")


# ------------------------------------------------------------------------------------------ what the slides remark


@settings(max_examples=20)
@given(layers=notes.widths(), seed=notes.seeds, f=hidden_functions, m=notes.sample_counts)
def test_the_pattern_a_minus_t_does_not_hold_for_squared_error_with_sigma(layers, seed, f, m):
    net, X, T = problem(layers, seed, m, f, "squared error with sigma")
    Delta, A = (net.backward(X, T, "squared_error")[k][-1] for k in ("Delta", "A"))
    close(Delta, (A - T) * A * (1 - A), "dC/dZ[L]")
    assert (np.abs(Delta) <= np.abs(A - T) / 4 + 1e-15).all()  # sigma' is at most 1/4
    close(net.backward(X, T, "binary_cross_entropy")["Delta"][-1], A - T, "where it does hold")


@settings(max_examples=20)
@given(**PROBLEM)
def test_the_three_index_derivative_of_z_by_W_collapses(layers, seed, f, task):
    net, X, T = problem(layers, seed, 1, f, task)
    page = net.backward(X, T, TASKS[task][1])
    for l in range(1, net.L + 1):
        a, delta = page["A"][l - 1][0], page["Delta"][l][0]
        n_out, n_in = net.W[l].shape
        dz_dW = np.zeros((n_out, n_out, n_in))  # dz_i/dW_jk = delta_ij a_k
        for i in range(n_out):
            for j in range(n_out):
                for k in range(n_in):
                    dz_dW[i, j, k] = (1 if i == j else 0) * a[k]
        assert np.count_nonzero(dz_dW) <= n_out * n_in  # sparse
        dC_dW = np.zeros((n_out, n_in))
        for i in range(n_out):
            for j in range(n_in):
                dC_dW[i, j] = sum(delta[k] * dz_dW[k, i, j] for k in range(n_out))
        close(page["W"][l], dC_dW, f"dC/dW[{l}]")
        close(page["W"][l], np.outer(delta, a), f"dC/dz a^T of layer {l}")
        close(page["b"][l], np.eye(n_out) @ delta, f"dC/db[{l}]")  # dz/db = I


@settings(max_examples=20)
@given(layers=notes.widths(hidden_at_least=1), seed=notes.seeds, f=hidden_functions, task=tasks)
def test_the_matrix_f_prime_is_diagonal_and_acts_as_the_vector_d(layers, seed, f, task):
    """dC/dz[l-1] = ((dC/dz[l])^T dz[l]/da[l-1]) da[l-1]/dz[l-1], with both matrices written out."""
    net, X, T = problem(layers, seed, 1, f, task)
    page = net.backward(X, T, TASKS[task][1])
    for l in range(2, net.L + 1):
        n = layers[l - 1]
        da_dz = np.zeros((n, n))
        for i in range(n):
            da_dz[i, i] = DERIVATIVE[f](page["Z"][l - 1][0, i])
        close(page["Delta"][l - 1], (page["Delta"][l] @ net.W[l]) @ da_dz, f"dC/dz[{l - 1}]")


@settings(max_examples=20)
@given(layers=notes.widths(), bias=st.booleans())
def test_N_w_and_N_b(layers, bias):
    N_b = sum(layers[l] for l in range(1, len(layers)))
    N_w = sum(layers[l - 1] * layers[l] for l in range(1, len(layers)))
    net, _ = notes.network(layers, 0, bias=bias)
    assert net.parameter_count == N_w + (N_b if bias else 0)


def test_mnist_with_100_hidden_nodes_has_79_510_parameters():
    net = bp.Network([784, 100, 10], backend="numpy")
    assert net.parameter_count == 100 + 10 + 784 * 100 + 100 * 10 == 79_510


def test_layers_are_counted_by_their_adjustable_parameters():
    perceptron = bp.Network([4, 1], output="sigmoid", backend="numpy")
    one_hidden = bp.Network([4, 3, 1], output="sigmoid", backend="numpy")
    for net, L in ((perceptron, 1), (one_hidden, 2)):
        assert net.L == L
        assert len(net.W) - 1 == len(net.b) - 1 == L  # the sets of adjustable parameters
        assert f"{L} layer" in net.summary()
    assert "4/3/1" in one_hidden.summary()  # N_0/N_1/.../N_L


@settings(max_examples=20)
@given(**PROBLEM)
def test_W_l_maps_vectors_of_length_N_l_minus_1_to_length_N_l(layers, seed, f, task):
    net, X, T = problem(layers, seed, 3, f, task)
    page = net.backward(X, T, TASKS[task][1])
    for l in range(1, net.L + 1):
        assert net.W[l].shape == page["W"][l].shape == (layers[l], layers[l - 1])
        assert net.b[l].shape == page["b"][l].shape == (layers[l],)
        assert page["Z"][l].T.shape == page["A"][l].T.shape == page["Delta"][l].T.shape == (layers[l], 3)


@pytest.mark.parametrize("f", ["tanh", "relu", "leaky_relu", "swish", "sigmoid", "softplus"])
def test_from_W_0_nothing_behind_the_last_layer_has_a_gradient(f):
    # Where the source slips: not all gradients are 0. db[L] is not, nor dW[L] where f(0) is not.
    net, X, T = problem([3, 4, 4, 2], 7, 6, f, "linear regression")
    net.theta[...] = 0
    page = net.backward(X, T, "squared_error")
    for l in (1, 2):
        assert not page["Delta"][l].any()
        assert not page["W"][l].any()
        assert not page["b"][l].any()
    assert page["b"][3].all()
    assert page["W"][3].any() == (VALUE[f](0.0) != 0)
    bp.train(net, X, T, "squared_error", bp.SGD(0.1), epochs=20, batch_size="full")
    if VALUE[f](0.0) == 0:  # then the output's bias is all that ever learns
        assert not any(p.any() for p in (*net.W[1:], *net.b[1:3]))
        assert net.b[3].all()
    else:  # else the units of a layer stay identical to each other
        assert net.W[1].any()
        for W in (net.W[1], net.W[2], net.W[3].T):
            assert np.ptp(W, axis=0).max() <= 1e-15


# --------------------------------------------------------------------------------------------- the batch generator


def chunker_cl(M, chunk_size, rng):
    """The R function `chunker.cl`, line by line: call what it returns until it returns None; and again, and again."""
    chunk = 0
    num_chunks = (M + chunk_size - 1) // chunk_size
    chunks = [chunk_size] * num_chunks
    if sum(chunks) > M:
        chunks[-1] = M - sum(chunks[:-1])
    sum_chunks, sequence = [], []

    def chunker():
        nonlocal chunk, chunks, sum_chunks, sequence
        if chunk == 0:
            chunks = rng.sample(chunks, num_chunks)
            sum_chunks = [sum(chunks[: i + 1]) for i in range(num_chunks)]
            sequence = rng.sample(range(1, M + 1), M)
        chunk = chunk + 1
        if chunk > num_chunks:
            chunk = 0
            return None
        start = 1 if chunk == 1 else sum_chunks[chunk - 2] + 1
        return sequence[start - 1 : sum_chunks[chunk - 1]]

    return chunker


def chunkers_epochs(M, chunk_size, epochs, seed):
    """What the notes' chunker deals out, with samples counted from 0 and sorted within a batch."""
    chunker = chunker_cl(M, chunk_size, random.Random(seed))
    return [[sorted(i - 1 for i in rows) for rows in iter(chunker, None)] for _ in range(epochs)]


def check_an_epoch(batches, M, chunk_size):
    assert sorted(i for rows in batches for i in rows) == list(range(M))  # all(sort(test.chunker) == (1:m))
    sizes = sorted(len(rows) for rows in batches)
    assert sizes == sorted([chunk_size] * (M // chunk_size) + ([M % chunk_size] if M % chunk_size else []))


@settings(max_examples=30)
@given(M=st.integers(1, 12), seed=notes.seeds, data=st.data())
def test_the_chunks_of_an_epoch_are_those_of_the_notes_in_some_order(M, seed, data):
    chunk_size = data.draw(st.integers(1, M))
    engine = notes.batches_seen(M, chunk_size, "chunks", seed, epochs=3)
    assert len(engine) == 3
    for batches in engine + chunkers_epochs(M, chunk_size, 3, seed):
        check_an_epoch(batches, M, chunk_size)


def short_places(epochs):
    return [min(range(len(batches)), key=lambda i: len(batches[i])) for batches in epochs]


def test_the_short_chunk_is_at_a_random_place_in_each_epoch():
    M, chunk_size, epochs = 17, 5, 200  # sizes 5, 5, 5 and 2
    for dealt in (notes.batches_seen(M, chunk_size, "chunks", 1, epochs), chunkers_epochs(M, chunk_size, epochs, 1)):
        places = short_places(dealt)
        counts = [places.count(i) for i in range(4)]
        assert min(counts) > 25, counts  # 50 each is expected, with a deviation of 6
        assert len({tuple(map(tuple, batches)) for batches in dealt}) == epochs  # and no epoch deals as another did


def test_the_notes_example_of_32_samples_in_chunks_of_12():
    for batches in notes.batches_seen(32, 12, "chunks", 0, epochs=5):
        check_an_epoch(batches, 32, 12)
        assert sorted(map(len, batches)) == [8, 12, 12]


def test_other_batches_keep_the_short_one_last():
    for batches in ("in_order", "shuffled"):
        assert set(short_places(notes.batches_seen(11, 3, batches, 1, epochs=8))) == {3}
