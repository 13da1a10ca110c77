"""Backpropagation held against differences of the cost: the proof that a gradient is one.

For a line phi(h) = C(theta + h u) through the parameters, along one of them or along a random unit direction u within
one tensor,

    n = (phi(eps) - phi(-eps)) / (2 eps)        g = u . dC/dtheta        error = ||n - g|| / max(||n||, ||g||)

with the norms taken over the lines of a tensor. Three things part n from g although the formulas are right, and each is
told from a wrong formula without looking at g:

Rounding. A cost is exact to about delta = 2^-53 |C|, n to delta / eps. delta is measured: it is how far the cost moves
when theta and every A on the way move by their last bits.

Kinks. Where ReLU, |y - t| or |w| has its corner within eps of theta, n mixes two slopes. Two numbers tell, with
D(h) = (phi(h) - phi(-h)) / (2h) and S(h) = (phi(h) - 2 phi(0) + phi(-h)) / h:

    d = D(h) - D(h/2)        t = S(h) - 2 S(h/2)

Where phi is smooth both vanish as h^2 or faster. A corner, with a jump J of the slope, at distance r h, r < 1/2, makes
|t| = |1 - 3r| J, which misses r = 1/3, and |d| = r J / 2, which misses r = 0; never both. Its error in n, which is
(1 - r) J / 2, is at most 2.5 times the larger of the two; that of a jump of the second derivative (ELU, Huber) is at
most 2 |d|. So a gap between n and g that d and t do not account for is the formula's.

Curvature. It makes 4/3 d, and smaller steps mend it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import inputs
from .activations import HIDDEN, OUTPUT, Activation
from .backend import is_cupy, to_host
from .batches import check_seed, generator
from .costs import COSTS, Cost, choose_cost
from .errors import ConfigError, DataError
from .network import Batch, Network, forward
from .regularization import Regularization
from .specs import number

EPS, TOLERANCE, DIRECTIONS, EVERY_PARAMETER_UP_TO = 1e-5, 1e-7, 8, 2000
SMALLER_STEPS = 2  # eps/10 and eps/100 are tried where there are kinks
SURE = 9.0  # a gap of less than so many times delta / h may be rounding
SEEN = 1e-3  # a gradient of which rounding may be a larger part than this counts as lost
OWN = {"float32": (2.0**-24, 1e-4), "float64": (2.0**-53, 1e-9)}  # by precision: unit roundoff, tolerance
STREAM = 1 << 63  # of the generator; below are the epochs of training

PASSED, BELOW_NOISE, INCONCLUSIVE = "passed", "below noise", "inconclusive"
FAILED, OWN_FAILED = "FAILED", "FAILED (own)"


@dataclass(frozen=True)
class Row:
    """What was found of one tensor.

    `name`: "W[1]"; `shape`; `checked`: how many lines were compared, each along one parameter, or along a random
    direction where `along` is "directions". `error`: ||n - g|| / max(||n||, ||g||) over them, infinite where something
    was not finite; `noise`: the part of it that rounding can make, None where the gradient is 0. `kinks`: how many more
    lines were left out, and the first of them. `own`: the error of the network's own gradient, in its own precision and
    on its own backend, and `own_noise` the part of it that rounding can make; None where that is float64 on NumPy.
    `status`: "passed", "below noise" (the gradient is lost in
    rounding: nothing was shown), "inconclusive" (kinks in more than half of it), "FAILED", or "FAILED (own)".
    """

    name: str
    shape: tuple[int, ...]
    checked: int
    along: str
    error: float
    noise: float | None
    kinks: int
    first_kink: str | None
    own: float | None
    own_noise: float | None
    status: str

    @property
    def layer(self) -> int:
        """The layer l of W[l] or b[l]."""
        return int(self.name[2:-1])


@dataclass(frozen=True)
class Report:
    """The outcome of `gradient_check`: `str` is a table and a verdict; it is true where the check was passed.

    `rows`: one a tensor. `cost`: C at theta, `cost_name` which it is. `where`: the network's own precision and backend
    where they were checked too, with `own_tolerance`, else None.
    """

    rows: tuple[Row, ...]
    cost: float
    cost_name: str
    layers: tuple[int, ...]
    samples: int
    eps: float
    tolerance: float
    where: str | None = None
    own_tolerance: float | None = None

    @property
    def passed(self) -> bool:
        """No tensor failed or was inconclusive, and at least one gradient stood out of the noise."""
        statuses = {row.status for row in self.rows}
        return PASSED in statuses and statuses <= {PASSED, BELOW_NOISE}

    def __bool__(self) -> bool:
        return self.passed

    @property
    def verdict(self) -> str:
        """The outcome in a line. Of several tensors that failed the topmost comes first: there is what to look at."""
        from_the_top = sorted(self.rows, key=lambda row: -row.layer)  # what is wrong in a layer spreads to those below
        failed = [row for row in from_the_top if row.status == FAILED]
        own = [row for row in from_the_top if row.status == OWN_FAILED]
        undecided = [row.name for row in self.rows if row.status == INCONCLUSIVE]
        compared = [row for row in self.rows if row.status == PASSED]
        if failed or own:
            first, *others = failed or own
            if failed:
                text = f"FAILED: error {_short(first.error)} in {first.name}, tolerance {self.tolerance:g}"
            else:
                text = (
                    f"FAILED: {self.where} is {_short(first.own)} away from float64 in {first.name}, "
                    f"tolerance {self.own_tolerance:g}"
                )
            return text + (f"; also {', '.join(row.name for row in others)}" if others else "")
        if undecided:
            return (
                f"inconclusive: kinks in more than half of {', '.join(undecided)}; "
                "check at other parameters, such as theta with a little noise added, or with other samples"
            )
        if not compared:
            return (
                "inconclusive: every gradient is below the noise of rounding; "
                "check at other parameters, or with a larger eps"
            )
        worst = max(compared, key=lambda row: row.error)
        text = f"passed: largest error {_short(worst.error)} ({worst.name}), tolerance {self.tolerance:g}"
        if worst.error > self.tolerance:
            text += f", of rounding {_short(worst.noise)}"
        if self.own_tolerance is not None:
            furthest = max(compared, key=lambda row: row.own or 0.0)
            text += f"; {self.where}: {_short(furthest.own)} ({furthest.name}), tolerance {self.own_tolerance:g}"
            if (furthest.own or 0.0) > self.own_tolerance:
                text += f", of rounding {_short(furthest.own_noise)}"
        if kinks := sum(row.kinks for row in self.rows):
            text += f"; {kinks} left out at kinks"
        if lost := [row.name for row in self.rows if row.status == BELOW_NOISE]:
            text += f"; below noise: {', '.join(lost)}"
        return text

    def __str__(self) -> str:
        head = ["tensor", "shape", "checked", "error", "noise", "kinks"]
        head += [] if self.where is None else [f"own ({self.where})"]
        table = [[*head, "status"]]
        for row in self.rows:
            cells = [row.name, " x ".join(map(str, row.shape)), f"{row.checked} {row.along}", _short(row.error)]
            cells += [_short(row.noise), f"{row.kinks}, first {row.first_kink}" if row.kinks else "-"]
            cells += [] if self.where is None else [_short(row.own)]
            table.append([*cells, row.status])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)).rstrip() for cells in table]
        title = (
            f"{'/'.join(map(str, self.layers))} network, {self.samples} sample{'s' * (self.samples > 1)}, "
            f"{self.cost_name} {self.cost:.6g}; central differences in float64, eps {self.eps:g}"
        )
        return "\n".join([title, *lines, self.verdict])

    def as_dict(self) -> dict[str, Any]:
        """The report as plain Python values, for JSON; None stands for what is not finite or was not looked at."""
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "cost": self.cost,
            "cost_name": self.cost_name,
            "layers": list(self.layers),
            "samples": self.samples,
            "eps": self.eps,
            "tolerance": self.tolerance,
            "own": self.where,
            "own_tolerance": self.own_tolerance,
            "tensors": [
                {
                    **vars(row),
                    "shape": list(row.shape),
                    "error": _finite(row.error),
                    "noise": _finite(row.noise),
                    "own": _finite(row.own),
                    "own_noise": _finite(row.own_noise),
                }
                for row in self.rows
            ],
        }


def gradient_check(
    net: Network,
    X: Any,
    T: Any,
    cost: Cost | str | None = None,
    *,
    eps: float = EPS,
    tolerance: float = TOLERANCE,
    directions: int = DIRECTIONS,
    every_parameter_up_to: int = EVERY_PARAMETER_UP_TO,
    seed: int = 0,
    **settings: Any,
) -> Report:
    """Hold the gradient of `net` on X (m, N_0) and T against central differences of the cost, tensor by tensor.

    A float64 copy on NumPy is what is checked, at the parameters of `net`, which is left alone. With up to
    `every_parameter_up_to` parameters each of them is moved by `eps`; in a larger network each tensor is moved along
    `directions` random unit directions, drawn from `seed`. A tensor passes with an error of at most `tolerance`, or of
    no more than what rounding can make. Where `net` is not float64 on NumPy, its own gradient is compared with the
    float64 one as well, by the tolerance of `OWN`. What each tensor may come to is said in `Row`.

    X, T, `cost` and `settings` (reduction, sample_weight, l1, l2, label_smoothing, dropout): see `Network.gradients`.
    Raises DataError and ConfigError as it does, ConfigError for numbers out of range, DataError where the cost is not
    finite.
    """
    eps = number("gradient_check", "eps", eps, low_open=True)
    tolerance = number("gradient_check", "tolerance", tolerance, low_open=True)
    directions = _count("directions", directions, 1)
    every = net.parameter_count <= _count("every_parameter_up_to", every_parameter_up_to, 0)
    seed = check_seed(seed)
    exact = net.to("numpy", precision="float64")
    chosen = choose_cost(cost, net.output)
    data = inputs.features(_on_host(X), exact.layers[0], exact.dtype)
    wanted = inputs.targets(_on_host(T), len(data), exact.layers[-1], chosen.name, exact.dtype)
    on_host = {key: _on_host(value) for key, value in settings.items()}

    def gradient_of(network: Network, targets: Any) -> dict[str, Any]:
        return network.gradients(data, targets, chosen, **on_host)

    def cost_of(network: Network) -> Callable[[], float]:
        alone = _cost_alone(network, data, wanted, chosen, **on_host)
        if abs(alone() - page["cost"]) <= 1e-9 * abs(page["cost"]):
            return alone
        return lambda: float(gradient_of(network, wanted)["cost"])  # it is this cost whose gradient is checked

    with np.errstate(all="ignore"):
        page = gradient_of(exact, wanted)
        if not math.isfinite(page["cost"]):
            raise DataError(
                f"the cost is {page['cost']:g} at these parameters", "scale X to about -1..1, or look at the parameters"
            )
        C = cost_of(exact)
        C_0 = C()
        outputs = float(np.abs(exact.forward(data)).max())
        coarse = _coarse(exact, 2.0**-53, seed)
        delta = _noise(coarse, cost_of(coarse), eps, C_0, min(1.0, outputs), seed)
        where = None if (exact.precision, exact.backend.name) == (net.precision, net.backend.name) else _where(net)
        own = {}
        if where is not None:
            own = _own_errors(net, net.gradients(X, T, cost, **settings), exact, page, gradient_of, wanted, chosen)
        rows = []
        for i, (name, theta, g) in enumerate(_tensors(exact, page)):
            one_by_one = every or theta.size <= directions
            lines = _Lines(theta, theta.size if one_by_one else directions, one_by_one, seed, STREAM + (i << 32), C)
            rows.append(_compare(name, lines, g, C_0, delta, eps, tolerance, own.get(name, (None, None, True))))
    return Report(
        tuple(rows), float(page["cost"]), chosen.name, tuple(net.layers), len(data), eps, tolerance,
        where, None if where is None else _own(net)[1],
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ differences


def _cost_alone(
    net: Network,
    data: np.ndarray,
    wanted: np.ndarray,
    cost: Cost,
    reduction: str = "mean",
    sample_weight: Any = None,
    l1: float = 0.0,
    l2: float = 0.0,
    label_smoothing: float = 0.0,
    dropout: tuple[int, int] | None = None,
) -> Callable[[], float]:
    """The function that computes the cost of `Network.gradients` at the parameters of the moment, without a gradient.

    In buffers made once; `net` is on NumPy, `data` and `wanted` as `inputs` left them.
    """
    ops, m = net.backend.ops, len(data)
    cost, penalties, is_weight = cost.smoothed(label_smoothing), Regularization(l1, l2), net.weight_mask()
    weights = inputs.sample_weights(sample_weight, m, net.dtype, reduction)
    w = np.ones(m) if weights is None else weights
    w = w / w.sum() if reduction == "mean" else w
    batch = Batch(net, m, gradient=False, draw=dropout)
    ops.gather(data, slice(0, m), batch.A[0])

    def C() -> float:
        forward(ops, net, batch)
        ops.output_delta(cost, net.g, batch.Z[-1], wanted, 1.0, batch.Delta[-1], batch.C)
        return float(batch.C @ w) + (penalties.penalty(np, net.theta, is_weight) if penalties else 0.0)

    return C


class _Lines:
    """The lines along which a tensor is looked at: one for each parameter, or `count` random unit directions."""

    def __init__(
        self, theta: np.ndarray, count: int, one_by_one: bool, seed: int, stream: int, C: Callable[[], float]
    ) -> None:
        self.shape = theta.shape
        self.theta = theta.reshape(-1)  # a view: tensors are contiguous
        self.count, self.one_by_one, self.seed, self.stream, self.C = count, one_by_one, seed, stream, C

    def __getitem__(self, k: int) -> tuple[np.ndarray, np.ndarray | float]:
        """The part of theta that line k moves, a view, and its direction u in it."""
        if self.one_by_one:
            return self.theta[k : k + 1], 1.0
        u = generator(self.seed, self.stream + k).standard_normal(self.theta.size)
        return self.theta, u / np.linalg.norm(u)

    def phi(self, k: int, *steps: float) -> list[float]:
        """phi(h) = C(theta + h u) on line k for each step h; theta is as before afterwards, bit for bit."""
        part, u = self[k]
        before = part.copy()
        costs = []
        for h in steps:
            part[...] = before + h * u
            costs.append(self.C())
        part[...] = before
        return costs

    def slopes(self, g: np.ndarray) -> np.ndarray:
        """g . u on each line."""
        g = g.reshape(-1)
        return g if self.one_by_one else np.array([g @ self[k][1] for k in range(self.count)])

    def name(self, k: int) -> str:
        """Line k in words, to follow the tensor's name."""
        if self.one_by_one:
            return f"[{', '.join(str(int(i)) for i in np.unravel_index(k, self.shape))}]"
        return f" direction {k}"


def _compare(
    name: str,
    lines: _Lines,
    g: np.ndarray,
    C_0: float,
    delta: float,
    eps: float,
    tolerance: float,
    own: tuple[float | None, float | None, bool],
) -> Row:
    """The row of one tensor, its gradient by the formulas being g; `own` as from `_own_errors`."""
    s = lines.slopes(g)
    ends = [lines.phi(k, eps, -eps) for k in range(lines.count)]
    n = np.array([(up - down) / (2 * eps) for up, down in ends])
    noise = np.full(lines.count, SURE * delta / eps)
    kink = np.zeros(lines.count, bool)
    beyond = np.zeros(lines.count, bool)
    if not _error(n, s) <= tolerance:
        share = tolerance * _scale(n, s) / math.sqrt(lines.count)  # if no line is off by more, the tensor is not
        for k in range(lines.count):
            n[k], noise[k], kink[k] = _look_closer(lines, k, ends[k], float(s[k]), share, C_0, delta, eps)
            beyond[k] = not abs(n[k] - s[k]) <= max(share, noise[k])
    kept = ~kink
    error, scale, floor = _error(n[kept], s[kept]), _scale(n[kept], s[kept]), float(np.linalg.norm(noise[kept]))
    if 2 * kink.sum() > lines.count:
        status = INCONCLUSIVE
    elif not error <= tolerance and bool((beyond & kept).any()):
        status = FAILED
    elif scale <= floor or (error > tolerance and floor > SEEN * scale):
        status = BELOW_NOISE
    else:
        status = PASSED
    own_error, own_noise, own_will_do = own
    if not own_will_do and status != FAILED:
        status = OWN_FAILED
    return Row(
        name=name,
        shape=lines.shape,
        checked=int(kept.sum()),
        along="parameters" if lines.one_by_one else "directions",
        error=error,
        noise=floor / scale if scale else None,
        kinks=int(kink.sum()),
        first_kink=name + lines.name(int(kink.argmax())) if kink.any() else None,
        own=own_error,
        own_noise=own_noise,
        status=status,
    )


def _look_closer(
    lines: _Lines, k: int, ends: Sequence[float], s: float, share: float, C_0: float, delta: float, eps: float
) -> tuple[float, float, bool]:
    """The slope n of line k, its rounding error, and whether a kink makes it unknown.

    `C_0`: phi(0); `ends`: phi(eps) and phi(-eps); `s`: what the formulas say; `share`: how far n may be from it. The
    steps eps, eps/10, eps/100 are taken until n is within its share, or within rounding, or phi is smooth.
    """
    h, (up, down), steps = eps, ends, SMALLER_STEPS
    while True:
        n, rounding = (up - down) / (2 * h), SURE * delta / h
        gap = abs(n - s)
        if gap <= max(share, rounding):
            return n, rounding, False
        inner_up, inner_down = lines.phi(k, h / 2, -h / 2)
        d = abs(n - (inner_up - inner_down) / h)
        t = abs((up - 2 * C_0 + down) - 4 * (inner_up - 2 * C_0 + inner_down)) / h
        d_rounding, t_rounding = 3.2 * delta / h, 17 * delta / h  # twice what that of the costs in them adds up to
        if d <= d_rounding and t <= t_rounding:
            return n, rounding, False  # smooth: the gap is the formula's
        if steps == 0:
            # Corners of several samples at one place can hide in t behind each other, in part.
            return n, rounding, gap <= 4 * d or (t > t_rounding and gap <= 32 * t)
        h, steps = h / 10, steps - 1
        up, down = lines.phi(k, h, -h)


def _noise(coarse: Network, C: Callable[[], float], eps: float, C_0: float, outputs: float, seed: int) -> float:
    """The rounding error delta of a cost near theta: its standard deviation when all moves by its last bits.

    At least 2^-53 (|C| + outputs): softmax and sigmoid lose what is that small beside 1, however small C is.
    """
    rng = generator(seed, STREAM - 1)
    near = coarse.theta + eps * rng.choice((-1.0, 1.0), coarse.theta.size)  # a cost of 0 is exact, those beside it not
    costs = []
    for _ in range(8):
        coarse.theta[...] = near * (1 + 2.0**-52 * rng.choice((-1.0, 1.0), near.size))
        costs.append(C())
    spread = float(np.std(costs, ddof=1))
    floor = 2.0**-53 * (abs(C_0) + outputs)
    return max(spread, floor) if math.isfinite(spread) else floor


def _coarse(net: Network, unit: float, seed: int) -> Network:
    """A copy of `net` in whose passes all A and f' move by their last bits in a precision of roundoff `unit`."""
    coarse, rng = net.to("numpy"), generator(seed, STREAM - 2)
    coarse.f[1:], coarse.g = [_rounded(f, unit, rng) for f in coarse.f[1:]], _rounded(coarse.g, unit, rng)
    return coarse


def _rounded(f: Activation, unit: float, rng: np.random.Generator) -> Activation:
    """f with values and derivatives moved by as much as rounding in a precision may do.

    Where f' is taken from A, A has few roundings behind it, relative to itself. Elsewhere they may be relative to Z,
    and in f' to Z^2, as in GELU with z (1 + tanh(...)) / 2.
    """

    def move(a: np.ndarray, size: np.ndarray) -> None:
        a += 2 * unit * rng.choice((-1.0, 1.0), a.shape) * size

    def value(xp: Any, Z: np.ndarray, A: np.ndarray, s: Any) -> None:
        Z_size = np.abs(Z)  # A may be Z
        f.value(xp, Z, A, s)
        move(A, np.maximum(Z_size, np.abs(A)) if f.derivative_from == "Z" else np.abs(A))

    def derivative(xp: Any, K: np.ndarray, D: np.ndarray, s: Any) -> None:
        assert f.derivative is not None
        f.derivative(xp, K, D, s)
        if f.derivative_from == "Z":
            move(D, 1 + K * K)

    return f._replace(value=value, derivative=None if f.derivative is None else derivative)


# ------------------------------------------------------------------------------- the network's own gradient


def _own_errors(
    net: Network,
    own: dict[str, Any],
    exact: Network,
    page: dict[str, Any],
    gradient_of: Callable[[Network, Any], dict[str, Any]],
    wanted: np.ndarray,
    cost: Cost,
) -> dict[str, tuple[float, float | None, bool]]:
    """By tensor: the error of the gradient `own` against float64's `page`, its rounding, and whether it will do.

    It may be as large as what rounding to the network's precision can make, whatever the tolerance: a gradient that is
    a small difference of large numbers has few digits in float32. How large that is tells the float64 gradient when
    theta, T, every A and every f'(Z) move by their last bits in that precision.
    """
    unit, tolerance = _own(net)
    K, rng = exact.layers[-1], generator(0, STREAM - 1)
    rows = np.eye(K)[wanted] if wanted.ndim == 1 else wanted
    if K > 1:
        other = np.roll(rows, 1, axis=1)  # a mixture with it is a legal target again
    else:
        other = {"cross_entropy": rows, "binary_cross_entropy": 1 - rows}.get(cost.name, 2 * rows)
    coarse = _coarse(exact, unit, 0)
    floors = dict.fromkeys((name for name, _, _ in _tensors(exact, page)), 0.0)
    for _ in range(4):
        coarse.theta[...] = exact.theta * (1 + 2 * unit * rng.choice((-1.0, 1.0), exact.theta.size))
        moved = gradient_of(coarse, rows + 2 * unit * (other - rows))
        for (name, _, g), (_, _, g_moved) in zip(_tensors(exact, page), _tensors(exact, moved), strict=True):
            floors[name] = max(floors[name], float(np.linalg.norm(g_moved - g)))
    found = {}
    for (name, _, g), (_, _, mine) in zip(_tensors(exact, page), _tensors(exact, own), strict=True):
        mine = to_host(mine).astype(np.float64)
        scale, gap = _scale(mine, g), float(np.linalg.norm(mine - g))
        floor = 4 * floors[name] + float(np.finfo(net.dtype).tiny) / unit
        found[name] = _error(mine, g), floor / scale if scale else None, gap <= max(tolerance * scale, floor)
    return found


def _own(net: Network) -> tuple[float, float]:
    return OWN.get(net.precision, OWN["float32"])


def _where(net: Network) -> str:
    return f"{net.precision} on {net.backend.name}"


# ------------------------------------------------------------------------------------- networks to check


def legal_pairs() -> list[tuple[str, str]]:
    """Every (output function, cost) that go together, by name."""
    return [(g, name) for g in OUTPUT for name, cost in COSTS.items() if cost.outputs is None or g in cost.outputs]


def sample_problem(
    net: Network, m: int = 8, seed: int = 0, cost: Cost | str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """X (m, N_0), standard normal, and targets that suit the network's cost, for m samples drawn from `seed`.

    T: labels (m,) for cross_entropy, 0 and 1 (m, K) for binary_cross_entropy, standard normal (m, K) for other costs.
    ConfigError for less than one sample, a seed that is none, and a cost that does not go with the output.
    """
    m, K = _count("m", m, 1), net.layers[-1]
    name = choose_cost(cost, net.output).name
    rng = generator(check_seed(seed), STREAM - 3)
    X = rng.standard_normal((m, net.layers[0]))
    if name == "cross_entropy":
        return X, rng.integers(0, K, m)
    if name == "binary_cross_entropy":
        return X, rng.integers(0, 2, (m, K)).astype(np.float64)
    return X, rng.standard_normal((m, K))


def check_everything(seed: int = 0, *, precision: str = "float64", backend: str = "numpy") -> list[tuple[str, Report]]:
    """A report on every hidden activation with every legal pair of output function and cost, and its title.

    Each on a 2/3/3/2 network and 5 samples, drawn from `seed` anew until no gradient is lost in rounding.
    """
    reports = []
    for f in HIDDEN:
        for g, cost in legal_pairs():
            for attempt in range(50):
                drawn = (check_seed(seed) + attempt) % 2**64
                net = Network([2, 3, 3, 2], f, g, "glorot", precision=precision, seed=drawn, backend=backend)
                rng = generator(drawn, STREAM - 4)
                for b in net.b[1:]:
                    b[...] = net.backend.asarray(rng.normal(0, 0.3, b.shape).astype(net.dtype))
                X, T = sample_problem(net, 5, drawn, cost)
                page = net.gradients(X, T, cost)
                smallest = min(np.abs(gradient).max() for _, _, gradient in _tensors(net, page))
                if smallest > 1e-3 * abs(page["cost"]):
                    break
            reports.append((f"{f}, {g}, {cost}", gradient_check(net, X, T, cost, seed=seed)))
    return reports


# ------------------------------------------------------------------------------------------------- small parts


def _tensors(net: Network, page: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, parameters and gradient of every tensor, W[1], b[1], W[2], ..."""
    for l in range(1, net.L + 1):
        for kind, parameters in (("W", net.W), ("b", net.b)):
            if parameters[l] is not None:
                yield f"{kind}[{l}]", parameters[l], page[kind][l]


def _scale(n: np.ndarray, g: np.ndarray) -> float:
    return max(float(np.linalg.norm(n)), float(np.linalg.norm(g)))


def _error(n: np.ndarray, g: np.ndarray) -> float:
    """||n - g|| / max(||n||, ||g||), 0 where both are 0, infinite where something is not finite."""
    scale = _scale(n, g)
    if not math.isfinite(scale):
        return math.inf
    return float(np.linalg.norm(n - g)) / scale if scale else 0.0


def _short(x: float | None) -> str:
    if x is None:
        return "-"
    return f"{x:.1e}" if math.isfinite(x) else "not finite"


def _finite(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None


def _on_host(a: Any) -> Any:
    return to_host(a) if is_cupy(a) else a


def _count(name: str, value: Any, low: int) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = low - 1
    if count < low:
        raise ConfigError(f"gradient_check: {name} is {value!r}", f"give an integer, {low} or more")
    return count
