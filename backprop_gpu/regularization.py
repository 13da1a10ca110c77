"""What is done to the flat gradient before the optimizer's rule sees it: penalties added, clipping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .activations import Array
from .specs import number


@dataclass(frozen=True)
class Regularization:
    """Penalties on the weights, and clipping of the gradient with them.

        C <- C + l1 sum |w| + l2/2 sum w^2           g <- g + l1 sign(w) + l2 w      over all weights w, no biases
        g <- g cut to -clip_value..clip_value        each element
        g <- g min(1, clip_norm / ||g||)             the whole gradient (Pascanu et al., 2013)

    in this order. sign(0) = 0. Clipping does not hide a gradient that is not finite, or whose squared norm is not: it
    leaves a NaN in it. For decay apart from the gradient see `optimizers.AdamW` and `optimizers.Lion`.

    Raises ConfigError for penalties that are not finite numbers from 0, and limits that are not above 0.
    """

    l1: float = 0.0
    l2: float = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None

    def __post_init__(self) -> None:
        for name in ("l1", "l2", "clip_norm", "clip_value"):
            given = getattr(self, name)
            if given is None and name.startswith("clip"):
                continue
            value = number("regularization", name, given, low_open=name.startswith("clip"))
            object.__setattr__(self, name, value)

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.l1 or self.l2 or self.clip_norm or self.clip_value)

    def penalty(self, xp: Any, theta: Array, is_weight: Array) -> float:
        """l1 sum |w| + l2/2 sum w^2; `is_weight`, like theta, is 1 at weights and 0 elsewhere."""
        total = 0.0
        if self.l1:
            total += self.l1 * float((xp.absolute(theta) * is_weight).sum(dtype=np.float64))
        if self.l2:
            total += self.l2 / 2 * float((theta * theta * is_weight).sum(dtype=np.float64))
        return total

    def apply(self, ops: Any, theta: Array, is_weight: Array, g: Array) -> None:
        """Add the penalties' derivative to the flat gradient g, then clip it, in place."""
        xp = ops.xp
        if self.l1 or self.l2:
            s, sign = ops.scratch("penalty 0", g.shape, g.dtype), ops.scratch("penalty 1", g.shape, g.dtype)
            xp.multiply(theta, self.l2, out=s)
            if self.l1:
                xp.sign(theta, out=sign)
                xp.multiply(sign, self.l1, out=sign)
                xp.add(s, sign, out=s)
            xp.multiply(s, is_weight, out=s)
            xp.add(g, s, out=g)
        if not (self.clip_value or self.clip_norm):
            return
        norm2 = xp.dot(g, g)
        if self.clip_value:
            xp.minimum(g, self.clip_value, out=g)
            xp.maximum(g, -self.clip_value, out=g)
        if self.clip_norm:
            length = xp.sqrt(xp.dot(g, g))
            xp.multiply(g, self.clip_norm / xp.maximum(length, self.clip_norm), out=g)
        g[:1] += norm2 - norm2  # 0, or NaN: what clipping would hide is for `update` to see
