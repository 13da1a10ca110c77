"""Steps on NumPy that numba compiles as a whole: the operations of `fast_ops`, many steps a call of Python's."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import fast_kernels as kernels
from . import fast_ops as ops
from .costs import COSTS
from .executors import Problem, Replay
from .network import Views
from .numpy_ops import HUGE_STEP
from .optimizers import Optimizer
from .recording import UnrecordableError
from .streaming import greatest

MOST, WORK = 64, 10**9  # steps a call, and weights met by samples that are enough for one: Ctrl-C waits for them


class Compiled(Replay):
    """Steps of a softmax network on labels, with hidden functions that a loop makes, as one compiled function.

    A step whose numbers are out of the ordinary is left to `Replay`, which tells whether the run diverges. Raises
    UnrecordableError where a step is another one.
    """

    rung = "compiled"

    def __init__(self, problem: Problem, rule: Optimizer, batch_size: int, seed: int, steps: int) -> None:
        super().__init__(problem, rule, batch_size, seed, steps)
        net, samples = problem.net, problem.samples
        numbers = ops.numbers(rule)
        plain = (
            samples.weights is None and samples.T.ndim == 1 and not problem.regularization and problem.frozen == 0
            and problem.cost == COSTS["cross_entropy"] and all(net.biased) and samples.X.ndim == 2
            and samples.X.dtype in (np.uint8, net.dtype) and samples.X.flags.c_contiguous
            and all(f.name in kernels.VALUES for f in net.f[1:])
        )  # fmt: skip
        if not plain or numbers is None:
            raise UnrecordableError("the step has parts that are not compiled")
        self._made: dict[int, tuple[Any, ...]] = {}  # what the steps of so many samples work on
        self._vectors = ops.rule_vectors(rule, self.theta, self.slots)
        self._greatest = 1.0 if samples.X.dtype == np.uint8 else greatest(samples.X)

    def run(self, i: int, most: int) -> int:
        """As `Eager.run`, as many as MOST steps, and less where they are long."""
        m, count = self.ends[i + 1] - self.ends[i], 1
        most = min(most, MOST, max(1, WORK // (m * self.theta.size)))
        while count < most and self.ends[i + count + 1] - self.ends[i + count] == m:
            count += 1
        if self.diverged[0] == 0 and (done := self._steps(i, count, m)):
            return done
        return super().run(i, most)

    def _steps(self, i: int, count: int, m: int) -> int:
        """Steps i, i + 1, ... of m samples; how many, up to one that is out of the ordinary."""
        first, last = self.ends[i], self.ends[i + count]
        kind, fixed, given = self._vectors
        rows = [self.rows[i + k] for k in range(count)]
        lrs, coefficients = np.array([row.lr for row in rows]), [row.coefficients for row in rows]
        h = np.tile(fixed, (count, 1))
        with np.errstate(all="ignore"):  # a number too large for theta's dtype makes a step that is not ordinary
            h[:, 1 : 1 + len(coefficients[0])] = coefficients
        if m not in self._made:
            self._made[m] = self._arguments(m)
        return int(
            _steps(
                *self._made[m], self.order[first:last].reshape(count, m), self.theta, self.g,
                ops.empty(2, self.theta.dtype), ops.empty(1, self.theta.dtype), kind, *given, h, lrs,
                self.rule.weight_decay, self.measured[i : i + count],
            )
        )  # fmt: skip

    def _arguments(self, m: int) -> tuple[Any, ...]:
        problem = self.problem
        net, samples, batch = problem.net, problem.samples, self.batch.first(m)
        T = self._of_batch[0][:m]
        L, threads = net.L, ops.threads()
        widths = net.layers
        cuts = np.zeros((L + 1, 6), np.int64)
        for l in range(1, L + 1):
            cuts[l] = (
                *ops.affine_parts(m, widths[l], widths[l - 1]), *ops.gradient_parts(m, widths[l], widths[l - 1]),
                *ops.delta_parts(m, widths[l - 1], widths[l]),
            )  # fmt: skip
        passes = np.array([
            ops.parts(m * widths[0], ops.GATHERED), ops.parts(m * widths[L], ops.EXPONENTIALS),
            ops.parts(self.theta.size, ops.PASS),
        ])  # fmt: skip
        sums = tuple(np.empty((threads, n), net.dtype) for n in widths)
        places = np.array([(0, 0), *Views.places(widths, net.biased, net.dtype)[0]])
        part = 1 / m if problem.reduction == "mean" else 1.0
        hidden = np.array([0, *(kernels.VALUES[f.name] for f in net.f[1:]), 0])
        deltas = tuple(batch.Delta[1:])
        return (
            samples.X, 255.0 if samples.X.dtype == np.uint8 else 1.0, samples.T, T, part, hidden, net.W[1:], net.b[1:],
            tuple(batch.A), batch.Z[L], deltas, batch.C, self.gradient.W[1:], self.gradient.b[1:], sums,
            np.zeros((2, L + 1, threads, 1)), np.empty(threads), self._greatest, places, cuts, passes,
        )  # fmt: skip


@kernels.njit
def _steps(
    data: Any, scale: float, targets: Any, T: Any, part: float, hidden: Any, W: Any, b: Any, A: Any, Z: Any,
    Delta: Any, C: Any, dW: Any, db: Any, sums: Any, norms2: Any, squares: Any, greatest: float, places: Any,
    cuts: Any, passes: Any, order: Any, theta: Any, g: Any, matrix: Any, vector: Any, rule: int, s0: Any, s1: Any,
    s2: Any, h: Any, lrs: Any, decay: float, measured: Any,
) -> int:  # fmt: skip
    """Forward, backward and update for each row of `order`; how many, up to one out of the ordinary.

    Tuples W, b, Delta, dW, db begin with layer 1. `cuts`: for each layer the parts of W A, Delta A^T, W^T Delta;
    `places`: where W and b begin in theta. `matrix` and `vector` are empty, for what there is not. dW is used while it
    is in the cache, so what tells an ordinary step is not its norm, but what that can be at most, ||Delta|| ||A||.
    """
    L, of_A, of_Delta = len(W), norms2[0], norms2[1]
    for k in range(len(order)):
        rows = order[k]
        kernels.gather(passes[0], data, rows, scale, A[0])
        for i in range(T.size):
            T[i] = targets[rows[i]]
        of_A[0, 0, 0] = A[0].size * greatest * greatest
        for l in range(1, L):
            kernels.affine(cuts[l, 0], cuts[l, 1] > 0, W[l - 1], A[l - 1], b[l - 1], hidden[l], A[l], matrix, of_A[l])
        # Nobody asks for of_A[L]; with other kinds of arguments the kernel would be compiled once more.
        kernels.affine(cuts[L, 0], cuts[L, 1] > 0, W[L - 1], A[L - 1], b[L - 1], hidden[L], Z, matrix, of_A[L])
        kernels.cross_entropy(passes[1], Z, T, part, vector, Delta[L - 1], C, sums[L], db[L - 1])
        of_Delta[L, 0, 0] = 2 * part * part * T.size  # of a row of softmax(Z) - T: 2 at most
        for l in range(L, 1, -1):
            kernels.hidden_delta(
                cuts[l, 4], cuts[l, 5] > 0, W[l - 1], Delta[l - 1], A[l - 1], hidden[l - 1], matrix, Delta[l - 2],
                sums[l - 1], db[l - 2], of_Delta[l - 1],
            )  # fmt: skip
        kernels.count_labels(Z, T, C, vector, measured[k])
        norm2 = 0.0
        for l in range(1, L + 1):
            norm2 += of_Delta[l].sum() * (of_A[l - 1].sum() + T.size)  # of dW and db, at most
        reach = 1 + np.sqrt(norm2)
        if decay > 0:
            kernels.squares(passes[2], theta, squares)
            reach += decay * np.sqrt(squares[0])
        ordinary = np.isfinite(measured[k, 0]) and max(lrs[k], 1.0) * reach <= HUGE_STEP and lrs[k] * decay < 1
        if not ordinary:  # NaN is not, either
            return k
        for l in range(L, 0, -1):
            kernels.weight_gradient(cuts[l, 2], cuts[l, 3] > 0, Delta[l - 1], A[l - 1], dW[l - 1])
            of = slice(places[l, 0], places[l, 1] + db[l - 1].size)
            kernels.update(cuts[l, 2], rule, theta[of], g[of], s0[of], s1[of], s2[of], h[k])
    return len(order)
