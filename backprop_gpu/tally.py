"""What a network makes of whole data: the sum of the costs and how many samples are predicted right, chunk by chunk."""

from __future__ import annotations

import math
import warnings

import numpy as np

from . import gpu_faults
from . import plan as plans
from .activations import Array
from .backend import is_cupy, to_host
from .costs import Cost
from .executors import Eager, Graph, Problem
from .inputs import Samples
from .network import CHUNK_ROWS, Network, forward_chunks
from .optimizers import SGD
from .regularization import Regularization


class Tally:
    """One operation after the other, on the network's backend. Data may lie on the host."""

    def __init__(self, net: Network, cost: Cost, samples: Samples) -> None:
        self.net, self.cost, self.samples = net, cost, samples

    def totals(self) -> tuple[float, float]:
        """At the theta of now: sum of w_i C_i over the samples, and how many are predicted right. Waits for them."""
        net, samples, be = self.net, self.samples, self.net.backend
        sums = be.zeros(2 * math.ceil(len(samples) / CHUNK_ROWS), np.dtype(np.float64)).reshape(-1, 2)
        with np.errstate(all="ignore"):
            for i, (rows, batch) in enumerate(forward_chunks(net, samples.X)):
                Z, T = batch.Z[-1], be.asarray(samples.T[rows])
                w = None if samples.weights is None else be.asarray(samples.weights[rows])
                be.ops.output_delta(self.cost, net.g, Z, T, 1.0, batch.Delta[-1], batch.C)
                be.ops.measure(samples.task, net.g, Z, T, batch.C, w, sums[i])
        return _added(sums)

    def close(self) -> None:
        """Let go of the device."""


class GraphTally(Tally):
    """As CUDA graphs of the forward half of a plan, in float32 or float64, never in less.

    Where recording fails it goes on eagerly, with a warning. Raises plan.Unplanned.
    """

    def __init__(self, net: Network, cost: Cost, samples: Samples) -> None:
        super().__init__(net, cost, samples)
        self._recorded: _Forward | None = _Forward(net, cost, samples)

    def totals(self) -> tuple[float, float]:
        """As `Tally.totals`."""
        if self._recorded:
            try:
                return _added(self._recorded.sums())
            except Exception as e:
                if gpu_faults.loses(e, self.net.backend.xp):
                    raise
                _warn(f"{type(e).__name__}: {e}")
                self.close()
        return super().totals()

    def close(self) -> None:
        """Wait for the device, and let go of it."""
        if self._recorded:
            self._recorded.close()
        self._recorded = None


class _Forward(Graph):
    """Steps that train nothing, of a chunk each, in the order of the data."""

    trains = False

    def __init__(self, net: Network, cost: Cost, samples: Samples) -> None:
        n, chunk = len(samples), min(len(samples), CHUNK_ROWS)
        self.ends = [*range(0, n, chunk), n]
        self.sizes = (*dict.fromkeys((min(n // chunk, Graph.sizes[0]), 1)),)
        room = None if is_cupy(samples.X) else 0
        problem = Problem(net, cost, samples, "sum", Regularization(), net.L, room)
        super().__init__(problem, SGD(1.0), chunk, 0, len(self.ends) - 1)
        self.t = 1

    def sums(self) -> Array:
        """For each chunk the sum of the weighted costs, and how many samples are predicted right."""
        i, n = 0, len(self.ends) - 1
        if self.feed:
            self.feed.begin(np.arange(self.ends[-1]), self.ends)
        self._go_on_from(0)
        while i < n:
            i += self._launch(i, n - i)
        return self.measured[:n]


def tally_for(executor: Eager, samples: Samples, cost: Cost) -> Tally:
    """The quickest Tally of a network that the executor trains; where there is no memory for it, say, another."""
    net, failed = executor.problem.net, None
    if isinstance(executor, Graph) and executor.failed is None:
        try:
            return GraphTally(net, cost, samples)
        except plans.Unplanned:
            pass
        except Exception as e:  # whose frames hold on to memory until it is left
            if gpu_faults.loses(e, net.backend.xp):
                raise
            failed = f"{type(e).__name__}: {e}"
    if failed:
        _warn(failed)
    return Tally(net, cost, samples)


def _warn(why: str) -> None:
    warnings.warn(f"no CUDA graph of an evaluation: {why}", stacklevel=3)


def _added(sums: Array) -> tuple[float, float]:
    cost, right = to_host(sums).sum(axis=0)
    return float(cost), float(right)
