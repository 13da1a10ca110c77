"""Dropout masks from Philox4x32-10, the same on both backends (Srivastava et al., 2014; Salmon et al., 2011).

Element e of a layer's mask, counted along the rows, is word e mod 4 of the block with counter (e div 4, layer, step)
under the key `seed`: a function of its place alone, so there is no state to carry along, and no order of drawing. An
element is kept where its word is rate 2^32 or more; what is kept is scaled by 1 / (1 - rate), so that nothing changes
in the mean and prediction needs no factor.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .activations import Array

_LOW = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


def threshold(rate: float) -> int:
    """The least word that keeps an element."""
    return min(round(rate * 2**32), _LOW)


def scale(rate: float) -> float:
    """What is kept is multiplied by."""
    return 1 / (1 - rate)


def philox(ops: Any, c: tuple[Array, Array, Array, Array], key: int) -> None:
    """Philox4x32-10 in place on four uint64 vectors that hold 32-bit words; key: 64 bits."""
    xp = ops.xp
    c0, c1, c2, c3 = c
    p0, p1 = (ops.scratch(f"philox product {i}", c0.shape, np.uint64) for i in (0, 1))
    k0, k1 = key & _LOW, key >> 32
    for _ in range(ROUNDS):
        xp.multiply(c0, np.uint64(_MULTIPLIERS[0]), out=p0)
        xp.multiply(c2, np.uint64(_MULTIPLIERS[1]), out=p1)
        xp.right_shift(p1, np.uint64(32), out=c0)
        xp.bitwise_xor(c0, c1, out=c0)
        xp.bitwise_xor(c0, np.uint64(k0), out=c0)
        xp.bitwise_and(p1, np.uint64(_LOW), out=c1)
        xp.right_shift(p0, np.uint64(32), out=c2)
        xp.bitwise_xor(c2, c3, out=c2)
        xp.bitwise_xor(c2, np.uint64(k1), out=c2)
        xp.bitwise_and(p0, np.uint64(_LOW), out=c3)
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW


def fill_mask(ops: Any, rate: float, draw: tuple[int, int], layer: int, mask: Array) -> None:
    """mask (m, N_l) = 1 / (1 - rate) where an element is kept, else 0; draw: seed and training step (from 1)."""
    xp = ops.xp
    seed, step = draw
    blocks = -(-mask.size // 4)
    c = tuple(ops.scratch(f"philox {i}", (blocks,), np.uint64) for i in range(4))
    c[0][...] = ops.counting(blocks)
    c[1][...] = layer
    c[2][...] = step & _LOW
    c[3][...] = step >> 32
    philox(ops, c, seed)
    kept = ops.scratch("philox kept", (blocks, 4), mask.dtype)
    least = np.uint64(threshold(rate))
    for j in range(4):
        xp.greater_equal(c[j], least, out=kept[:, j])
    xp.multiply(kept.reshape(-1)[: mask.size].reshape(mask.shape), scale(rate), out=mask)
