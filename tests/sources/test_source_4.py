"""Source 4: equations 1-4 and 6-34, index by index as printed.

In its letters and its counting: layers 1..L, the input is layer 1; m^l is the net input and z^l the net output of layer
l; w_ik^l goes from node i of layer l-1 to node k of layer l; N samples. Everything with indices is a dict on them.
The engine counts layers from 0 and holds W[l] in the shape of the source's item 4, (n_l, n_{l-1}), so w_ik^l is
W[l-1][k-1, i-1] there.
"""

import math

import notes
import numpy as np
from formulas import DERIVATIVE, VALUE
from hypothesis import given, settings
from hypothesis import strategies as st
from notes import close

import backprop_gpu as bp

sigmas = st.sampled_from(sorted(VALUE))  # sigma^l, a function a layer, "in most cases sigmoid"


class Notes:
    """The network of the problem description: n[l] for l = 1..L, sigma[l] for l = 2..L, w[l, i, k], maybe b[l, k]."""

    def __init__(self, net, sigma):
        self.L = L = net.L + 1
        self.n = n = {l: net.layers[l - 1] for l in range(1, L + 1)}
        self.sigma = {l: VALUE[sigma[l - 2]] for l in range(2, L + 1)}
        self.d_sigma = {l: DERIVATIVE[sigma[l - 2]] for l in range(2, L + 1)}
        self.w, self.b = {}, {}
        for l in range(2, L + 1):
            for k in range(1, n[l] + 1):
                self.b[l, k] = 0.0 if net.b[l - 1] is None else float(net.b[l - 1][k - 1])
                for i in range(1, n[l - 1] + 1):
                    self.w[l, i, k] = float(net.W[l - 1][k - 1, i - 1])

    def nodes(self, l):
        return range(1, self.n[l] + 1)

    def feedforward(self, x):
        """m^l, z^l of one sample; y_hat_k is z[L, k], eq. 1."""
        m, z = {}, {}
        for k in self.nodes(1):
            z[1, k] = x[k - 1]  # eq. 4
        for l in range(2, self.L + 1):
            for k in self.nodes(l):  # where the source slips: eq. 3 has k from 2
                m[l, k] = self.b[l, k]
                for i in self.nodes(l - 1):
                    m[l, k] += self.w[l, i, k] * z[l - 1, i]  # eq. 3
                z[l, k] = self.sigma[l](m[l, k])  # eq. 2
        return m, z

    def back(self, m, z, y):
        """delta^l of one sample: eqs. 18-20 in the output layer, eq. 26 in the hidden layers."""
        L, delta = self.L, {}
        r = math.sqrt(sum((z[L, j] - y[j - 1]) ** 2 for j in self.nodes(L)))
        for j in self.nodes(L):
            dQ_dz = (z[L, j] - y[j - 1]) / r if r else 0.0  # of ||y_hat - y||; 0 where it has no derivative
            delta[L, j] = dQ_dz * self.d_sigma[L](m[L, j])  # eqs. 7, 8, 20
        for l in range(L - 1, 1, -1):
            for j in self.nodes(l):
                # Eq. 23 makes sum_k dQ/dz_k dz_k/dm_k the deltas above; as printed, it lacks the prime of sigma.
                delta[l, j] = 0.0
                for k in self.nodes(l + 1):
                    delta[l, j] += delta[l + 1, k] * self.w[l + 1, j, k] * self.d_sigma[l](m[l, j])  # eqs. 24, 26
        return delta

    def dw(self, delta, z):
        """dQ/dw_ij^l = delta_j^l z_i^{l-1} of one sample: eqs. 6, 11, 12 in the output layer, 22, 25 in the hidden."""
        return {(l, i, j): delta[l, j] * z[l - 1, i] for l, i, j in self.w}

    def all_samples(self, X, Y):
        """Q = 1/N sum_i ||y_hat(i) - y(i)||, dQ/dw, dQ/db (eq. 33), and each sample's m, z, delta."""
        N, L = len(X), self.L
        Q, dw, db, each = 0.0, dict.fromkeys(self.w, 0.0), dict.fromkeys(self.b, 0.0), []
        for x, y in zip(X.tolist(), Y.tolist(), strict=True):
            m, z = self.feedforward(x)
            delta = self.back(m, z, y)
            Q += math.sqrt(sum((z[L, k] - y[k - 1]) ** 2 for k in self.nodes(L))) / N
            of_this = self.dw(delta, z)
            for at in dw:
                dw[at] += of_this[at] / N
            for at in db:
                db[at] += delta[at] / N
            each.append((m, z, delta))
        return Q, dw, db, each

    def update(self, dw, db, eta):
        for at in self.w:
            self.w[at] = self.w[at] - eta * dw[at]  # eq. 29
        for at in db:
            self.b[at] = self.b[at] - eta * db[at]  # eq. 34

    def vector(self, v, l):
        return [v[l, k] for k in self.nodes(l)]

    def matrix(self, w, l):
        """(n_l, n_{l-1}), as item 4 shapes W^l, of what has the indices l, i, k."""
        return [[w[l, i, k] for i in self.nodes(l - 1)] for k in self.nodes(l)]


@st.composite
def problems(draw, bias, hidden_at_least=0):
    """(net, Notes, X, Y); samples are rows."""
    layers, seed = draw(notes.widths(hidden_at_least)), draw(notes.seeds)
    sigma = draw(st.lists(sigmas, min_size=len(layers) - 1, max_size=len(layers) - 1))
    net, rng = notes.network(layers, seed, bias=bias, hidden=sigma[:-1] or "sigmoid", output=sigma[-1])
    N = draw(notes.sample_counts)
    return net, Notes(net, sigma), rng.normal(size=(N, layers[0])), rng.normal(size=(N, layers[-1]))


def compare(problem, bias):
    net, page_4, X, Y = problem
    Q, dw, db, each = page_4.all_samples(X, Y)
    page = net.backward(X, Y, "norm", reduction="mean")
    close(page["cost"], Q, "Q")
    close(page["A"][0], [page_4.vector(z, 1) for _, z, _ in each], "z^1")
    for l in range(2, page_4.L + 1):
        close(page["Z"][l - 1], [page_4.vector(m, l) for m, _, _ in each], f"m^{l}")
        close(page["A"][l - 1], [page_4.vector(z, l) for _, z, _ in each], f"z^{l}")
        close(page["Delta"][l - 1], [page_4.vector(delta, l) for _, _, delta in each], f"delta^{l}")
        close(page["W"][l - 1], page_4.matrix(dw, l), f"dQ/dw^{l}")
        if bias:
            close(page["b"][l - 1], page_4.vector(db, l), f"Delta b^{l}")
    assert bias or page["b"] == [None] * page_4.L


@settings(max_examples=30)
@given(problem=problems(bias=False))
def test_equations_1_to_26_index_by_index(problem):
    compare(problem, bias=False)


@settings(max_examples=20)
@given(problem=problems(bias=True))
def test_equation_33_biases(problem):
    compare(problem, bias=True)


@settings(max_examples=25)
@given(problem=problems(bias=False, hidden_at_least=1))
def test_the_vector_forms_equations_13_to_21_and_27_to_32(problem):
    net, page_4, X, Y = problem
    L, N = page_4.L, len(X)
    W = [None, None, *(np.array(page_4.matrix(page_4.w, l)) for l in range(2, L + 1))]  # W[l] as in item 4
    page = net.backward(X, Y, "norm")
    m, z = [None, *page["Z"]], [None, *page["A"]]  # now counted from 1; sample s is row s
    d_sigma = {l: np.vectorize(page_4.d_sigma[l]) for l in range(2, L + 1)}
    dW = {l: np.zeros(W[l].shape) for l in range(2, L + 1)}
    for s in range(N):
        grad_Q = (z[L][s] - Y[s]) / np.linalg.norm(z[L][s] - Y[s])
        delta = {L: grad_Q * d_sigma[L](m[L][s])}  # eqs. 18, 32
        for l in range(L - 1, 1, -1):
            # Where the source slips: eqs. 27 and 31, as printed, lack the transpose of the W^{l+1} of its item 4.
            delta[l] = (W[l + 1].T @ delta[l + 1]) * d_sigma[l](m[l][s])
        for l in range(2, L + 1):
            close(page["Delta"][l - 1][s], delta[l], f"delta^{l}")
            # Where the source slips: eqs. 15, 17 and 21 have z delta^T, (n_{l-1}, n_l), the transpose of what eq. 29
            # takes off its item 4's W; eqs. 28 and 30 lack the transpose of z.
            of_this = np.outer(delta[l], z[l - 1][s])
            np.testing.assert_array_equal(of_this, np.outer(z[l - 1][s], delta[l]).T)  # eqs. 15-17
            # Eq. 13: delta ⊗ z, which has i running fastest; the list of eq. 14 has j running fastest, z ⊗ delta.
            np.testing.assert_array_equal(np.kron(delta[l], z[l - 1][s]), of_this.ravel())
            np.testing.assert_array_equal(np.kron(z[l - 1][s], delta[l]), of_this.T.ravel())
            dW[l] += of_this / N
    for l in range(2, L + 1):
        close(page["W"][l - 1], dW[l], f"Delta W^{l}")


@settings(max_examples=20)
@given(problem=problems(bias=False, hidden_at_least=1))
def test_equation_22_the_product_of_all_five_partial_derivatives(problem):
    """Of one sample; dQ/dz_k of a layer by the sum over the layer above it, down from the output, with no delta."""
    net, page_4, X, Y = problem
    page = net.backward(X[:1], Y[:1], "norm")
    L, nodes = page_4.L, page_4.nodes
    m, z = page_4.feedforward(X[0].tolist())
    r = math.sqrt(sum((z[L, k] - Y[0, k - 1]) ** 2 for k in nodes(L)))
    dQ_dz = {(L, k): (z[L, k] - Y[0, k - 1]) / r for k in nodes(L)}
    dz_dm = {(l, k): page_4.d_sigma[l](m[l, k]) for l in range(2, L + 1) for k in nodes(l)}  # eq. 7
    dQ_dw = {}
    for l in range(L - 1, 1, -1):
        for j in nodes(l):
            dm_dz = {k: page_4.w[l + 1, j, k] for k in nodes(l + 1)}  # eq. 24
            dQ_dz[l, j] = sum(dQ_dz[l + 1, k] * dz_dm[l + 1, k] * dm_dz[k] for k in nodes(l + 1))
            for i in nodes(l - 1):
                dm_dw = z[l - 1, i]  # eq. 11, in layer l
                dQ_dw[l, i, j] = sum(
                    dQ_dz[l + 1, k] * dz_dm[l + 1, k] * dm_dz[k] * dz_dm[l, j] * dm_dw for k in nodes(l + 1)
                )
    for l in range(2, L):
        close(page["W"][l - 1], page_4.matrix(dQ_dw, l), f"dQ/dw^{l}")


@settings(max_examples=25)
@given(bias=st.booleans(), eta=notes.learning_rates, data=st.data())
def test_w_and_b_after_some_rounds_of_steps_1_to_3(bias, eta, data):
    net, page_4, X, Y = data.draw(problems(bias))
    history = bp.train(net, X, Y, "norm", bp.SGD(eta), epochs=4, batch_size="full")
    for round_ in range(4):
        Q, dw, db, _ = page_4.all_samples(X, Y)
        close(history.train_cost[round_], Q, f"Q in round {round_}")
        page_4.update(dw, db if bias else {}, eta)
    for l in range(2, page_4.L + 1):
        close(net.W[l - 1], page_4.matrix(page_4.w, l), f"W^{l}")
        if bias:
            close(net.b[l - 1], page_4.vector(page_4.b, l), f"b^{l}")


@settings(max_examples=20)
@given(bias=st.booleans(), eta=notes.learning_rates, enough=st.integers(0, 5), data=st.data())
def test_step_4_repeat_until_the_gradient_is_at_most_epsilon(bias, eta, enough, data):
    net, page_4, X, Y = data.draw(problems(bias))
    _, dw, db, _ = page_4.all_samples(X, Y)
    norms = []
    for _ in range(6):
        page_4.update(dw, db if bias else {}, eta)
        _, dw, db, _ = page_4.all_samples(X, Y)
        # Where the source slips: "gradient <= epsilon" is said of the norm of the whole gradient.
        norms.append(math.sqrt(sum(v * v for v in (*dw.values(), *(db.values() if bias else ())))))
    epsilon = norms[enough] * (1 + 1e-9)
    rounds = 1 + min(i for i in range(6) if norms[i] <= epsilon)
    history = bp.train(net, X, Y, "norm", bp.SGD(eta), epochs=6, batch_size="full", gradient_tolerance=epsilon)
    assert (history.steps[-1], history.stopped) == (rounds, "gradient")


@settings(max_examples=20)
@given(layers=notes.widths(), seed=notes.seeds)
def test_equations_9_and_10_the_derivative_of_the_logistic_sigmoid_is_sigma_times_1_minus_sigma(layers, seed):
    net, rng = notes.network(layers, seed, hidden="sigmoid", output="sigmoid", bias=False)
    X, Y = rng.normal(size=(3, layers[0])), rng.normal(size=(3, layers[-1]))
    page = net.backward(X, Y, "norm")
    m, z = page["Z"], page["A"]
    below = (z[-1] - Y) / np.linalg.norm(z[-1] - Y, axis=1, keepdims=True)
    for l in range(net.L, 0, -1):
        close(z[l], 1 / (1 + np.exp(-m[l])), "sigma")
        close(page["Delta"][l], below * z[l] * (1 - z[l]), "delta")
        below = np.array(
            [
                [sum(d[k] * net.W[l][k, j] for k in range(len(d))) for j in range(layers[l - 1])]
                for d in page["Delta"][l]
            ]
        )
