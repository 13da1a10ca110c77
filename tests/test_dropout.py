"""Dropout: Philox4x32-10 by its published answers, masks that are one everywhere, and what they do to the page."""

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu import dropout, numpy_ops
from backprop_gpu.backend import to_host
from backprop_gpu.network import Batch


def philox_by_hand(counter, key):
    """Philox4x32-10 as its paper has it, on Python's integers (Salmon et al., 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


KNOWN = [  # the known answers of the authors' Random123 distribution
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_its_known_answers(backend, counter, key, answer):
    assert " ".join(f"{word:08x}" for word in philox_by_hand(counter, key)) == answer
    words = tuple(backend.xp.asarray(np.array([w], np.uint64)) for w in counter)
    dropout.philox(backend.ops, words, key[0] | key[1] << 32)
    assert " ".join(f"{int(w[0]):08x}" for w in words) == answer


def mask_by_hand(rate, seed, step, layer, m, n):
    mask = np.empty(m * n)
    for e in range(m * n):
        word = philox_by_hand((e // 4, layer, step % 2**32, step >> 32), (seed % 2**32, seed >> 32))[e % 4]
        mask[e] = 1 / (1 - rate) if word >= round(rate * 2**32) else 0
    return mask.reshape(m, n)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("rate", "seed", "step", "layer", "m", "n"),
    [(0.5, 0, 1, 1, 5, 7), (0.2, 2**64 - 1, 2**33 + 5, 3, 1, 1), (0.9, 17, 4000, 2, 33, 31), (1e-9, 3, 1, 1, 4, 4)],
)
def test_a_mask_is_what_its_definition_says(backend, dtype, rate, seed, step, layer, m, n):
    F = np.random.default_rng(0).normal(size=(m, n)).astype(dtype)
    mask, A = backend.xp.empty((m, n), dtype), backend.xp.empty((m, n), dtype)
    backend.ops.drop(backend.xp.asarray(F), rate, (seed, step), layer, mask, A)
    wanted = mask_by_hand(rate, seed, step, layer, m, n).astype(dtype)
    np.testing.assert_array_equal(to_host(mask), wanted)
    np.testing.assert_array_equal(to_host(A), F * wanted)


def test_masks_keep_their_share_and_differ_by_seed_step_and_layer():
    masks = {}
    for draw, layer in (((0, 1), 1), ((1, 1), 1), ((0, 2), 1), ((0, 1), 2)):
        masks[draw, layer] = np.empty((500, 400))
        dropout.fill_mask(numpy_ops, 0.3, draw, layer, masks[draw, layer])
    for mask in masks.values():
        assert np.mean(mask == 0) == pytest.approx(0.3, abs=0.005)
        assert mask.mean() == pytest.approx(1, abs=0.01)
        assert np.abs(np.mean(mask == 0, axis=0) - 0.3).max() < 0.12  # no column is favoured
    first, *others = masks.values()
    for other in others:
        assert np.mean((first == 0) & (other == 0)) == pytest.approx(0.09, abs=0.005)  # independent


def net_with_dropout(backend, **settings):
    return bp.Network(
        [4, bp.Layer(6, "tanh", dropout=0.5), bp.Layer(5, "gelu", dropout=0.25), 3],
        precision="float64",
        seed=2,
        backend=backend.name,
        **settings,
    )


def test_the_page_with_dropout(backend, rng):
    """A[l] = mask f(Z[l]) and Delta[l] = mask f'(Z[l]) (W^T Delta[l+1]), the mask that of its training step."""
    net, X, T = net_with_dropout(backend), rng.normal(size=(7, 4)), rng.integers(0, 3, 7)
    net.b[2][...] = 0.1  # so that no Z[2] is 0
    net.b[2][...] = 0.1  # so that no Z[2] is 0
    page = net.backward(X, T, dropout=(9, 4))
    same = bp.Network([4, 6], "tanh", "tanh", precision="float64", backend="numpy")
    m1, m2 = mask_by_hand(0.5, 9, 4, 1, 7, 6), mask_by_hand(0.25, 9, 4, 2, 7, 5)
    same.W[1][...], same.b[1][...] = to_host(net.W[1]), to_host(net.b[1])
    np.testing.assert_allclose(page["A"][1], m1 * same.forward(X), rtol=1e-13)
    assert ((page["A"][2] == 0) == (m2 == 0)).all()
    np.testing.assert_allclose(page["A"][1] @ to_host(net.W[2]).T + to_host(net.b[2]), page["Z"][2], rtol=1e-13)
    G = page["Delta"][2] @ to_host(net.W[2])
    np.testing.assert_allclose(page["Delta"][1], m1 * (1 - np.tanh(page["Z"][1]) ** 2) * G, rtol=1e-12)
    np.testing.assert_allclose(page["W"][2], page["Delta"][2].T @ page["A"][1] / 7, rtol=1e-12)
    assert bp.gradient_check(net, X, T, dropout=(9, 4))


def test_prediction_and_evaluation_drop_nothing(backend, rng):
    net, X, T = net_with_dropout(backend), rng.normal(size=(7, 4)), rng.integers(0, 3, 7)
    plain = bp.Network([4, 6, 5, 3], ["tanh", "gelu"], precision="float64", seed=2, backend=backend.name)
    np.testing.assert_array_equal(net.forward(X), plain.forward(X))
    assert bp.evaluate(net, X, T) == bp.evaluate(plain, X, T)
    np.testing.assert_array_equal(net.gradients(X, T)["W"][1], plain.gradients(X, T)["W"][1])


def test_training_drops_by_its_seed_and_step(backend, rng):
    net, X, T = net_with_dropout(backend), rng.normal(size=(9, 4)), rng.integers(0, 3, 9)
    hand = bp.Network([4, 6, 5, 3], ["tanh", "gelu"], precision="float64", seed=2, backend="numpy", dropout=[0.5, 0.25])
    bp.train(net, X, T, optimizer=bp.SGD(0.3), epochs=2, batch_size=4, batches="in_order", seed=11)
    step = 0
    for _ in range(2):
        for rows in (slice(0, 4), slice(4, 8), slice(8, 9)):
            step += 1
            page = hand.gradients(X[rows], T[rows], dropout=(11, step))
            for l in range(1, 4):
                hand.W[l][...] -= 0.3 * page["W"][l]
                hand.b[l][...] -= 0.3 * page["b"][l]
    np.testing.assert_allclose(to_host(net.theta), hand.theta, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("draw", [0.5, 3, (-1, 1), (0, -1), (0, "a"), (0, 1, 2), (2**64, 1)], ids=repr)
def test_what_is_no_seed_and_step_is_refused(draw):
    for rate in (0.0, 0.5):
        with pytest.raises(bp.ConfigError):
            bp.Network([2, 3, 2], dropout=rate, backend="numpy").gradients(np.zeros((2, 2)), [0, 1], dropout=draw)


def test_rates_out_of_range_are_refused():
    for rate in (1, -0.1, float("nan"), "half", None):
        with pytest.raises(bp.ConfigError, match="dropout"):
            bp.Network([2, 3, 2], dropout=rate, backend="numpy")
    with pytest.raises(bp.ConfigError, match="last layer"):
        bp.Network([2, bp.Layer(2, dropout=0.5)], backend="numpy")
    with pytest.raises(bp.ConfigError, match="2 entries for 1 layers"):
        bp.Network([2, 3, 2], dropout=[0.1, 0.2], backend="numpy")


def test_layers_that_drop_nothing_take_no_memory_for_masks():
    batch = Batch(bp.Network([3, 4, 5, 2], dropout=[0.5, 0.0], backend="numpy"), 6, gradient=True, draw=(0, 1))
    assert [mask is None for mask in batch.mask] == [True, False, True]
    assert [F is A for F, A in zip(batch.F, batch.A, strict=True)] == [True, False, True]
