"""What the five modules beside this one share: random networks, and how the engine is held to the notes."""

import numpy as np
from hypothesis import strategies as st

import backprop_gpu as bp

RELATIVE = 1e-10  # of the largest entry of a tensor
ABSOLUTE = 1e-14  # everything here is of size 1 and made of some dozens of roundings, each of about 1e-16

seeds = st.integers(0, 2**32 - 1)
sample_counts = st.integers(1, 6)
learning_rates = st.floats(1e-3, 0.03)


def widths(hidden_at_least=0, hidden_at_most=4):
    """The widths N_0..N_L of a small network."""
    return st.lists(st.integers(1, 5), min_size=hidden_at_least + 2, max_size=hidden_at_most + 2)


def network(layers, seed, **settings):
    """A float64 network on NumPy whose weights and biases are all random, and a generator to go on with."""
    net = bp.Network(layers, precision="float64", backend="numpy", seed=seed, **settings)
    rng = np.random.default_rng(seed)
    for l in range(1, net.L + 1):
        net.W[l][...] = rng.normal(0, 1 / np.sqrt(layers[l - 1]), net.W[l].shape)
        if net.b[l] is not None:
            net.b[l][...] = rng.normal(0, 0.5, net.b[l].shape)
    return net, rng


def floats(arrays):
    """A list of arrays (None for what is not there) as Python's floats."""
    return [None if a is None else a.tolist() for a in arrays]


def close(engine, notes, what):
    """The engine's tensor (or number) is the notes' one, in shape and in value."""
    notes = np.array(notes, np.float64)
    assert np.shape(engine) == notes.shape, what
    error = np.abs(engine - notes).max()
    assert error <= RELATIVE * np.abs(notes).max() + ABSOLUTE, f"{what} is off by {error}"


def close_lists(engine, notes, what):
    """The same for lists with an entry a layer; None stays None."""
    assert len(engine) == len(notes), what
    for l, (e, n) in enumerate(zip(engine, notes, strict=True)):
        assert (e is None) == (n is None), f"{what}[{l}]"
        if n is not None:
            close(e, n, f"{what}[{l}]")


class Watcher:
    """A callback that tells which samples each step of `bp.train` has used, from the parameters alone.

    On X = I, T = 1 and a linear unit w that starts at 0, sample i moves w_i and nothing else, by lr (1 - w_i) / m.
    """

    LR = 1e-3

    def __init__(self, n):
        self.net = bp.Network([n, 1], output="identity", bias=False, precision="float64", backend="numpy")
        self.net.theta[...] = 0
        self.before = np.zeros(n)
        self.epochs = []  # of each epoch, the batches: sorted lists of sample numbers
        self._batches = []

    def on_step(self, run):
        moved = self.net.W[1][0] - self.before
        rows = np.flatnonzero(moved)
        np.testing.assert_allclose(moved[rows], self.LR * (1 - self.before[rows]) / len(rows), rtol=1e-9)
        self.before = self.net.W[1][0].copy()
        self._batches.append(rows.tolist())

    def __call__(self, run):
        self.epochs.append(self._batches)
        self._batches = []


def batches_seen(n, batch_size, batches, seed, epochs):
    """The batches that `bp.train` makes of n samples: a list an epoch, of sorted lists of sample numbers."""
    watcher = Watcher(n)
    bp.train(
        watcher.net,
        np.eye(n),
        np.ones((n, 1)),
        "squared_error",
        bp.SGD(Watcher.LR),
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        batches=batches,
        callbacks=[watcher],
    )
    return watcher.epochs
