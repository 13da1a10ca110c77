"""Source 2, the three-layer network: u_kj from hidden to output layer, w_ji from input to hidden layer, no biases.

Its closing question, how more hidden layers extend the algorithm, is answered here by its own section 3, once a layer.
"""

import notes
from formulas import DERIVATIVE, VALUE
from hypothesis import given, settings
from hypothesis import strategies as st
from notes import close, close_lists, floats

import backprop_gpu as bp

functions = st.sampled_from(sorted(VALUE))  # g_h and g_o are any


def three_layers(U, W, g_h, g_o, x, y):
    """L, net_j, h, net_k, o, delta_k, delta_j and the gradients of one sample, as sections 2 and 3 write them."""
    C, n_H, d = len(U), len(W), len(x)
    net_j = [sum(W[j][i] * x[i] for i in range(d)) for j in range(n_H)]
    h = [VALUE[g_h](net_j[j]) for j in range(n_H)]
    net_k = [sum(U[k][j] * h[j] for j in range(n_H)) for k in range(C)]
    o = [VALUE[g_o](net_k[k]) for k in range(C)]
    L = 0.5 * sum((y[k] - o[k]) ** 2 for k in range(C))
    delta_k = [(o[k] - y[k]) * DERIVATIVE[g_o](net_k[k]) for k in range(C)]
    # Where the source slips: delta_j of its section 4 lacks the factor g'_h that its section 3 has.
    delta_j = [sum(delta_k[k] * U[k][j] for k in range(C)) * DERIVATIVE[g_h](net_j[j]) for j in range(n_H)]
    dU = [[delta_k[k] * h[j] for j in range(n_H)] for k in range(C)]
    dW = [[delta_j[j] * x[i] for i in range(d)] for j in range(n_H)]
    return L, net_j, h, net_k, o, delta_k, delta_j, dU, dW


def more_layers(Ws, g, x, y):
    """The same with any number of hidden layers: Ws[1] is the notes' W, the last one their U, g[1], g[2], ... theirs g.

    What section 3 finds for the one hidden layer, delta_j = sum_k delta_k u_kj g'_h(net_j), holds for each hidden layer
    with k running over the layer above it, so the deltas are made from the top down.
    """
    top = len(Ws) - 1
    net, h, delta, dW = [None] * (top + 1), [x] + [None] * top, [None] * (top + 1), [None] * (top + 1)
    for l in range(1, top + 1):
        net[l] = [sum(Ws[l][j][i] * h[l - 1][i] for i in range(len(h[l - 1]))) for j in range(len(Ws[l]))]
        h[l] = [VALUE[g[l]](v) for v in net[l]]
    L = 0.5 * sum((y[k] - h[top][k]) ** 2 for k in range(len(y)))
    delta[top] = [(h[top][k] - y[k]) * DERIVATIVE[g[top]](net[top][k]) for k in range(len(y))]
    for l in range(top - 1, 0, -1):
        delta[l] = []
        for j in range(len(net[l])):
            fed_back = 0.0
            for k in range(len(delta[l + 1])):
                fed_back += delta[l + 1][k] * Ws[l + 1][k][j]
            delta[l].append(fed_back * DERIVATIVE[g[l]](net[l][j]))
    for l in range(1, top + 1):
        dW[l] = [[delta[l][j] * h[l - 1][i] for i in range(len(h[l - 1]))] for j in range(len(delta[l]))]
    return L, net, h, delta, dW


def problem(layers, seed, m, **functions):
    net, rng = notes.network(layers, seed, bias=False, **functions)
    return net, rng.normal(size=(m, layers[0])), rng.normal(size=(m, layers[-1]))


@settings(max_examples=30)
@given(n=st.tuples(*[st.integers(1, 5)] * 3), seed=notes.seeds, g_h=functions, g_o=functions)
def test_three_layers_one_sample(n, seed, g_h, g_o):
    net, X, Y = problem(list(n), seed, 1, hidden=g_h, output=g_o)
    _, W, U = floats(net.W)
    L, net_j, h, net_k, o, delta_k, delta_j, dU, dW = three_layers(U, W, g_h, g_o, X[0].tolist(), Y[0].tolist())
    page = net.backward(X, Y, "squared_error")
    close(page["cost"], L, "L")
    close_lists(page["Z"], [None, [net_j], [net_k]], "net")
    close_lists(page["A"], [X, [h], [o]], "h")
    close_lists(page["Delta"], [None, [delta_j], [delta_k]], "delta")
    close_lists(page["W"], [None, dW, dU], "the gradient")
    assert page["b"] == [None, None, None]


@settings(max_examples=30)
@given(layers=notes.widths(), seed=notes.seeds, m=notes.sample_counts, data=st.data())
def test_more_hidden_layers_or_none(layers, seed, m, data):
    hidden = data.draw(st.lists(functions, min_size=len(layers) - 2, max_size=len(layers) - 2))
    g_o = data.draw(functions)
    net, X, Y = problem(layers, seed, m, hidden=hidden or "relu", output=g_o)
    g = [None, *hidden, g_o]
    each = [more_layers(floats(net.W), g, x, y) for x, y in zip(X.tolist(), Y.tolist(), strict=True)]
    page = net.backward(X, Y, "squared_error", reduction="sum")
    close(page["cost"], sum(L for L, *_ in each), "L")
    for l in range(1, net.L + 1):
        close(page["Z"][l], [net_l[l] for _, net_l, *_ in each], f"net of layer {l}")
        close(page["A"][l], [h[l] for _, _, h, *_ in each], f"h of layer {l}")
        close(page["Delta"][l], [delta[l] for *_, delta, _ in each], f"delta of layer {l}")
        dW = [[sum(s[-1][l][j][i] for s in each) for i in range(layers[l - 1])] for j in range(layers[l])]
        close(page["W"][l], dW, f"the gradient of layer {l}")


@settings(max_examples=20)
@given(
    layers=notes.widths(hidden_at_least=1),
    seed=notes.seeds,
    m=notes.sample_counts,
    g_h=functions,
    g_o=functions,
    lr=notes.learning_rates,
)
def test_theta_after_some_steps_down_the_gradient(layers, seed, m, g_h, g_o, lr):
    net, X, Y = problem(layers, seed, m, hidden=g_h, output=g_o)
    Ws, g = floats(net.W), [None] + [g_h] * (net.L - 1) + [g_o]
    bp.train(net, X, Y, "squared_error", bp.SGD(lr), epochs=4, batch_size="full", reduction="sum")
    for _ in range(4):  # BP gives the gradient; what is done with it is not the notes' subject
        each = [more_layers(Ws, g, x, y)[-1] for x, y in zip(X.tolist(), Y.tolist(), strict=True)]
        for l in range(1, len(Ws)):
            for j in range(layers[l]):
                for i in range(layers[l - 1]):
                    Ws[l][j][i] -= lr * sum(dW[l][j][i] for dW in each)
    close_lists(net.W, Ws, "W")


@settings(max_examples=20)
@given(layers=st.tuples(*[st.integers(1, 5)] * 3), seed=notes.seeds, g_h=functions, g_o=functions)
def test_the_answer_with_one_hidden_layer_is_the_three_layer_network(layers, seed, g_h, g_o):
    net, X, Y = problem(list(layers), seed, 1, hidden=g_h, output=g_o)
    (_, W, U), x, y = floats(net.W), X[0].tolist(), Y[0].tolist()
    L, *_, delta_k, delta_j, dU, dW = three_layers(U, W, g_h, g_o, x, y)
    assert more_layers([None, W, U], [None, g_h, g_o], x, y)[0] == L
    close_lists(more_layers([None, W, U], [None, g_h, g_o], x, y)[3], [None, delta_j, delta_k], "delta")
    close_lists(more_layers([None, W, U], [None, g_h, g_o], x, y)[4], [None, dW, dU], "the gradient")
