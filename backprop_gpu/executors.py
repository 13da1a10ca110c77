"""How a training step is run: here eagerly, one operation after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .activations import Array
from .costs import Cost
from .inputs import Samples
from .network import Batch, Network, Views, backward, forward
from .optimizers import Optimizer
from .regularization import Regularization


@dataclass(frozen=True)
class Problem:
    """What a run minimises: the cost of a network, with penalties, over data.

    `samples` lie on the network's device. The first `frozen` layers stay as they are.
    """

    net: Network
    cost: Cost
    samples: Samples
    reduction: str
    regularization: Regularization
    frozen: int


class Eager:
    """Training steps on a network's backend, over buffers made once.

    `batch_size` is the largest batch; `seed` is that of the dropout masks. `diverged[0]`, on the device, is the first
    step that left the finite numbers, 0 so far.
    """

    def __init__(self, problem: Problem, rule: Optimizer, batch_size: int, seed: int) -> None:
        net, be = problem.net, problem.net.backend
        rule.check(net.dtype)
        self.problem, self.rule, self.seed = problem, rule, seed
        self.batch = Batch(net, batch_size, gradient=True, draw=(seed, 0))
        T = problem.samples.T
        self.T = be.xp.empty((batch_size, *T.shape[1:]), T.dtype)
        self.w, self.part = (be.xp.empty(batch_size, net.dtype) for _ in range(2))
        flat = be.zeros(net.theta.size, net.dtype)
        self.gradient = Views(flat, net.layers, net.biased)
        # Frozen layers come first in theta: what is trained is the rest of it.
        start = Views.size(net.layers[: problem.frozen + 1], net.biased[: problem.frozen], net.dtype)
        self.theta, self.g = net.theta[start:], flat[start:]
        self.is_weight = net.weight_mask()[start:] if problem.regularization else None
        self.slots = tuple(be.zeros(self.theta.size, net.dtype) for _ in range(rule.slots))
        self.diverged = be.xp.zeros(1, be.xp.int64)

    def begin(self, order: np.ndarray, lrs: Sequence[float], t: int) -> None:
        """Before an epoch: its samples in order, the learning rate of each of its steps, t of the first (from 1).

        All that an epoch takes to the device.
        """
        be = self.problem.net.backend
        self.order, self.rows, self.t = be.asarray(order), be.ops.step_rows(self.rule, lrs, t), t

    def step(self, i: int, start: int, stop: int, measured: Array) -> bool:
        """Step i of the epoch (from 0), on the samples start .. stop - 1 of its order: forward, backward, update.

        Writes the sum of the weighted costs and the number of samples predicted right into measured (2,). Returns False
        where it is known that the step was not applied, because the run has left the finite numbers.
        """
        problem, samples = self.problem, self.problem.samples
        net, ops = problem.net, problem.net.backend.ops
        rows, m = self.order[start:stop], stop - start
        batch, T, mean = self.batch.first(m), self.T[:m], problem.reduction == "mean"
        batch.draw = self.seed, self.t + i
        with np.errstate(all="ignore"):  # what is not finite is looked for, and told, by update
            ops.gather(samples.X, rows, batch.A[0])
            ops.gather(samples.T, rows, T)
            w, part = None, 1 / m if mean else 1.0
            if samples.weights is not None:
                w = part = self.w[:m]
                ops.gather(samples.weights, rows, w)
                if mean:
                    part = self.part[:m]
                    ops.share(w, part)
            forward(ops, net, batch)
            backward(ops, net, batch, T, part, problem.cost, self.gradient, problem.frozen)
            ops.measure(samples.task, net.g, batch.Z[-1], T, batch.C, w, measured)
            if problem.regularization:
                ops.regularize(problem.regularization, self.theta, self.is_weight, self.g)
            return bool(ops.update(self.rule, self.theta, self.g, self.slots, self.rows[i], measured, self.diverged))
