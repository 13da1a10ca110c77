"""How a training step is run: here eagerly, one operation after the other."""

from __future__ import annotations

import numpy as np

from .activations import Array
from .costs import Cost
from .network import Batch, Network, Views, backward, forward
from .optimizers import Optimizer


class Eager:
    """Training steps on a network's backend, over buffers made once.

    `data` (n, N_0) and `wanted` (n,) or (n, K) lie on the device, as `inputs` left them; `batch_size` is the largest
    batch. `task` says what to count as right. `diverged[0]`, on the device, is the first step that left the finite
    numbers, 0 so far.
    """

    def __init__(
        self, net: Network, cost: Cost, task: str, rule: Optimizer, data: Array, wanted: Array, batch_size: int
    ) -> None:
        rule.check(net.dtype)
        be = net.backend
        self.net, self.cost, self.task, self.rule = net, cost, task, rule
        self.data, self.wanted = data, wanted
        self.batch = Batch(net, batch_size, gradient=True)
        self.T = be.xp.empty((batch_size, *wanted.shape[1:]), wanted.dtype)
        self.flat = be.zeros(net.theta.size, net.dtype)
        self.gradient = Views(self.flat, net.layers, net.bias)
        self.slots = tuple(be.zeros(net.theta.size, net.dtype) for _ in range(rule.slots))
        self.diverged = be.xp.zeros(1, be.xp.int64)

    def step(self, rows: Array, lr: float, t: int, measured: Array) -> bool:
        """Step t (from 1) on the samples `rows`: forward, cost and Delta[L], backward, update.

        Writes the sum of the costs and the number of samples predicted right into measured (2,). Returns False where it
        is known that the step was not applied, because the run has left the finite numbers.
        """
        net, ops = self.net, self.net.backend.ops
        batch, T = self.batch.first(len(rows)), self.T[: len(rows)]
        with np.errstate(all="ignore"):  # what is not finite is looked for, and told, by update
            ops.gather(self.data, rows, batch.A[0])
            ops.gather(self.wanted, rows, T)
            forward(ops, net, batch)
            backward(ops, net, batch, T, self.cost, self.gradient)
            ops.measure(self.task, net.g, batch.Z[-1], T, batch.C, measured)
            return bool(ops.update(self.rule, net.theta, self.flat, self.slots, lr, t, measured, self.diverged))
