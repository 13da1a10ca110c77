"""Examples: what the notes observe about backpropagation, each run, told and, where a picture helps, drawn.

    result = EXAMPLES["zero-init"].run(seed=0, backend="auto")
    print(EXAMPLES["zero-init"].text(result))

Every `run` is a function of its seed: the same numbers on the same machine and backend (the one measured ratio, of
product-order, aside). A result is plain: a dict of numbers, strings, lists and dicts of them, ready for JSON. Run on a
GPU, the networks live there; what is shown of them is taken to the host.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import datasets
from .activations import HIDDEN
from .backend import to_host
from .batches import generator
from .errors import ConfigError, DataError
from .network import Network
from .optimizers import SGD, Adam
from .training import Run, evaluate, train

Result = dict[str, Any]
Path = str | os.PathLike[str]

STREAM = 1 << 63  # random numbers of the examples: streams from here on, far from those of training


class Example(NamedTuple):
    """One example: `run(seed, backend)` makes the result, `text(result)` tells it, `plot(result, path)` draws it.

    `run` raises BackendError and ConfigError as `Network` does. `plot` is None where there is nothing to draw; it
    raises ConfigError without matplotlib or for a file type that matplotlib does not write, DataError where `path`
    cannot be written.
    """

    title: str
    run: Callable[..., Result]
    text: Callable[[Result], str]
    plot: Callable[[Result, Path], None] | None = None


# ------------------------------------------------------------------------------------------------- zero-init


def zero_init(
    seed: int = 0,
    backend: str = "auto",
    activations: Sequence[str] = ("relu", "tanh", "sigmoid", "softplus"),
    steps: int = 100,
) -> Result:
    """784-16-16-10 from W = 0, b = 0 on 256 MNIST images, full batches, SGD: what moves, and when (source 5).

    For each activation: `dW` and `db`, norms of the gradients at step 0; `first_step` at which a tensor is no longer 0,
    None for never; `units_differ`, the largest difference between units of one hidden layer after `steps`: between rows
    of W[l], elements of b[l], columns of W[l+1]; `cost` at the end. Beside them the cost from he's initial weights, and
    the entropy of the labels: the least cost that an output bias alone can reach.
    """
    rows = generator(seed, STREAM).permutation(60_000)[:256]
    X, T = (part[rows] for part in datasets.load("mnist")[0])
    share = np.bincount(T, minlength=10) / len(T)
    result: Result = {
        "steps": steps,
        "entropy": float(-(share[share > 0] * np.log(share[share > 0])).sum()),
        "cost_from_he": {},
        "rows": [],
    }
    for f in activations:
        for init in ("zeros", "he"):
            net = Network([784, 16, 16, 10], f, init=init, precision="float64", seed=seed, backend=backend)
            start = net.backward(X, T)
            watch = _FirstMove(net)
            train(net, X, T, None, SGD(0.1), epochs=steps, batch_size=len(X), callbacks=[watch], seed=seed)
            cost = evaluate(net, X, T).cost
            if init == "he":
                result["cost_from_he"][f] = cost
                continue
            units = [to_host(M) for l in range(1, net.L) for M in (net.W[l], net.b[l], net.W[l + 1].T)]  # a unit a row
            result["rows"].append(
                {
                    "activation": f,
                    "f(0)": float(start["A"][1][0, 0]),
                    "dW": [float(np.linalg.norm(g)) for g in start["W"][1:]],
                    "db": [float(np.linalg.norm(g)) for g in start["b"][1:]],
                    "first_step": watch.first,
                    "units_differ": float(max(np.ptp(M, axis=0).max() for M in units)),
                    "cost": cost,
                }
            )
    return result


class _FirstMove:
    """Notes, as a callback of full-batch training, after which step each tensor is no longer 0."""

    def __init__(self, net: Network) -> None:
        self.first: dict[str, int | None] = {f"{p}{l}": None for l in range(1, net.L + 1) for p in "Wb"}

    def __call__(self, run: Run) -> None:
        for name, step in self.first.items():
            if step is None and bool(getattr(run.net, name[0])[int(name[1:])].any()):
                self.first[name] = run.step


def zero_init_text(result: Result) -> str:
    """The report of `zero_init`."""
    rows = result["rows"]
    names = list(rows[0]["first_step"])
    return _report(
        "Zero initialisation (source 5, Back Propagation Observations)",
        'The source: "If W = 0, then delta = 0 and so all gradients (b, W) are 0". That is so behind the last layer: '
        "at step 0, dW[l] = db[l] = 0 for l < L. But db[L] is not 0, nor is dW[L] where f(0) is not:",
        _table(
            ["f", "f(0)", *(f"||d{name}||" for name in names)],
            [
                [r["activation"], f"{r['f(0)']:.3f}", *(_short(r[f"d{name[0]}"][int(name[1:]) - 1]) for name in names)]
                for r in rows
            ],
        ),
        f"{result['steps']} steps of gradient descent: the first that moves each tensor (- is never), the largest "
        "difference between units of one hidden layer after the last, the cost, and the cost from he's weights:",
        _table(
            ["f", *names, "units differ by", "cost", "from he"],
            [
                [
                    r["activation"],
                    *("-" if r["first_step"][name] is None else str(r["first_step"][name]) for name in names),
                    f"{r['units_differ']:.1e}",
                    f"{r['cost']:.3f}",
                    f"{result['cost_from_he'][r['activation']]:.3f}",
                ]
                for r in rows
            ],
        ),
        "With f(0) = 0 only the output bias ever learns: how frequent each class is, which takes the cost to "
        f"{result['entropy']:.3f}, the entropy of the labels, at best. Otherwise the layers come to life one after the "
        "other, the last one first, but the units of a hidden layer stay equal, up to rounding: together they can do "
        'what one could. "Should not initialize W to zero", then, though not because nothing moves.',
    )


# --------------------------------------------------------------------------------------- vanishing-gradients

_DERIVATIVE: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # f' from A
    "sigmoid": lambda A: A * (1 - A),
    "tanh": lambda A: 1 - A * A,
    "relu": lambda A: A > 0,
}


def vanishing_gradients(
    seed: int = 0, backend: str = "auto", hidden_layers: int = 8, samples: int = 1000, epochs: int = 10
) -> Result:
    """784-64x8-10 on MNIST images with sigmoid, tanh (glorot) and ReLU (he): ||dW[l]|| layer by layer (source 5).

    For each, at the initial theta: `gradient_norms` [||dC/dW[1]||, ..., ||dC/dW[L]||]; `factor` [||Delta[l]|| /
    ||Delta[l+1]|| for l = 1..L-1], what one step back multiplies Delta by, and `derivative`, the mean f'(Z[l]) in it;
    `first_to_last`, the norms' ratio. `training` holds the norms after each of `epochs` of gradient descent, `cost`
    the mean cost of each.
    """
    rows = generator(seed, STREAM).permutation(60_000)[:samples]
    X, T = (part[rows] for part in datasets.load("mnist")[0])
    layers = [784, *[64] * hidden_layers, 10]
    result: Result = {"layers": layers, "samples": samples, "epochs": epochs, "rows": []}
    for f, init in (("sigmoid", "glorot"), ("tanh", "glorot"), ("relu", "he")):
        net = Network(layers, f, init=init, seed=seed, backend=backend)
        page = net.backward(X, T)
        norms = [float(np.linalg.norm(g)) for g in page["W"][1:]]
        Delta = [float(np.linalg.norm(D)) for D in page["Delta"][1:]]
        history = train(net, X, T, None, SGD(0.1), epochs=epochs, batch_size=50, seed=seed, gradient_norms=True)
        result["rows"].append(
            {
                "activation": f,
                "init": init,
                "gradient_norms": norms,
                "first_to_last": norms[0] / norms[-1],
                "factor": [a / b for a, b in itertools.pairwise(Delta)],
                "derivative": [float(_DERIVATIVE[f](A).mean()) for A in page["A"][1:-1]],
                "training": history.gradient_norms,
                "cost": history.train_cost,
            }
        )
    return result


def vanishing_gradients_text(result: Result) -> str:
    """The report of `vanishing_gradients`."""
    rows, L = result["rows"], len(result["layers"]) - 1
    sigmoid = next(r for r in rows if r["activation"] == "sigmoid")
    return _report(
        "Vanishing gradients (source 5, Back Propagation Observations)",
        f"{L - 1} hidden layers of {result['layers'][1]} units, {result['samples']} MNIST images. At the initial "
        "theta, for each layer: ||dC/dW[l]||; what the step back to it multiplies Delta by, ||Delta[l]|| / "
        "||Delta[l+1]||; and the mean f'(Z[l]), which is part of that factor:",
        _table(
            ["layer", *(what for r in rows for what in (f"{r['activation']} ||dW||", "factor", "f'"))],
            [
                [
                    str(l),
                    *itertools.chain.from_iterable(
                        [
                            _short(r["gradient_norms"][l - 1]),
                            f"{r['factor'][l - 1]:.2f}" if l < L else "-",
                            f"{r['derivative'][l - 1]:.2f}" if l < L else "-",
                        ]
                        for r in rows
                    ),
                ]
                for l in range(1, L + 1)
            ],
        ),
        "||dC/dW[1]|| / ||dC/dW[L]|| before training and after each run of gradient descent, and the cost:",
        _table(
            ["f", "weights", "before", "after", "cost of epoch 1", f"of epoch {result['epochs']}"],
            [
                [
                    r["activation"],
                    r["init"],
                    _short(r["first_to_last"]),
                    _short(r["training"][-1][0] / r["training"][-1][-1]),
                    f"{r['cost'][0]:.3f}",
                    f"{r['cost'][-1]:.3f}",
                ]
                for r in rows
            ],
        ),
        "f' is a factor of Delta at every step back. The sigmoid's is 1/4 at the most, where z = 0, and its units "
        f"start near there (mean f' {np.mean(sigmoid['derivative']):.2f}): the gradient is lost layer by layer even "
        f"before any unit saturates, and training halts at a cost of ln 10 = {math.log(10):.3f}, which is guessing. "
        "ReLU's f' is 0 or 1, he's weights make up for the zeros, and the gradient of the first layer is of the size "
        "of the last one's. tanh has f' near 1 where z is near 0.",
    )


def vanishing_gradients_plot(result: Result, path: Path) -> None:
    """||dC/dW[l]|| by layer, before training and after its last epoch; and the cost by epoch."""

    def norms(ax: Any) -> None:
        for i, r in enumerate(result["rows"]):
            layers = range(1, len(r["gradient_norms"]) + 1)
            ax.semilogy(layers, r["gradient_norms"], f"C{i}o-", label=f"{r['activation']}, initial")
            ax.semilogy(layers, r["training"][-1], f"C{i}s:", label=f"{r['activation']}, trained")
        ax.set(xlabel="layer l", ylabel="||dC/dW[l]||", title="norm of the gradient")
        ax.legend()

    def costs(ax: Any) -> None:
        for i, r in enumerate(result["rows"]):
            ax.plot(range(1, len(r["cost"]) + 1), r["cost"], f"C{i}o-", label=r["activation"])
        ax.set(xlabel="epoch", ylabel="cost", title="training")
        ax.legend()

    _draw(path, norms, costs)


# ----------------------------------------------------------------------------------------------- overfitting


def lawrence_giles(seed: int, draw: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """20 points of Lawrence and Giles' curve: x = 0, 1, ..., 19 and y = sin(x/3) + uniform(-0.25, 0.25), (20,) float64.

    Source 5 does not give its generator ("data.lawrence.giles"): the noise is our own, a function of (seed, draw).
    """
    x = np.arange(20.0)
    return x, np.sin(x / 3) + generator(seed, STREAM + draw).uniform(-0.25, 0.25, len(x))


def overfitting(seed: int = 0, backend: str = "auto", epochs: int = 2000) -> Result:
    """Polynomials and MLPs through the same 20 noisy points (source 5, "polynomial interpolation fit").

    Polynomials of degree 5 and 15 in Legendre's orthogonal basis, by least squares; 1-20-1 and 1-20-20-1 tanh networks
    with identity output, squared error, full batches, Adam, x scaled to [-1, 1). For each fit: `parameters`,
    `residual`, RMS of fit - y at the points; `rms` and `max` of |fit - sin(x/3)| on a fine grid over [0, 19]; the
    `curve` there. `max_of_draws`: the same `max` of the polynomials of degree 15 for 100 draws of the noise, sorted.
    """
    x, y = lawrence_giles(seed)
    grid = np.linspace(x[0], x[-1], 381)
    truth = np.sin(grid / 3)

    def scaled(x: np.ndarray) -> np.ndarray:
        return (x / 10 - 1).reshape(-1, 1)

    result: Result = {"x": x.tolist(), "y": y.tolist(), "grid": grid.tolist(), "truth": truth.tolist(), "fits": []}

    def add(name: str, parameters: int, at_points: np.ndarray, at_grid: np.ndarray) -> None:
        error = at_grid - truth
        result["fits"].append(
            {
                "fit": name,
                "parameters": parameters,
                "residual": _rms(at_points - y),
                "rms": _rms(error),
                "max": float(np.abs(error).max()),
                "curve": at_grid.tolist(),
            }
        )

    for degree in (5, 15):
        polynomial = np.polynomial.Legendre.fit(x, y, degree)
        add(f"polynomial, degree {degree}", degree + 1, polynomial(x), polynomial(grid))
    for layers in ([1, 20, 1], [1, 20, 20, 1]):
        net = Network(layers, "tanh", "identity", "glorot", precision="float64", seed=seed, backend=backend)
        train(net, scaled(x), y, None, Adam(1e-2), "cosine", epochs, batch_size=len(x), seed=seed)
        name = f"MLP {'-'.join(map(str, layers))}"
        add(name, net.parameter_count, net.forward(scaled(x))[:, 0], net.forward(scaled(grid))[:, 0])
    fits = (np.polynomial.Legendre.fit(*lawrence_giles(seed, draw), 15) for draw in range(100))
    result["max_of_draws"] = sorted(float(np.abs(fit(grid) - truth).max()) for fit in fits)
    return result


def overfitting_text(result: Result) -> str:
    """The report of `overfitting`."""
    fits = {fit["fit"]: fit for fit in result["fits"]}
    draws = result["max_of_draws"]
    high, small, large = (fits[name] for name in ("polynomial, degree 15", "MLP 1-20-1", "MLP 1-20-20-1"))
    return _report(
        'Overfitting (source 5, "polynomial interpolation fit": the Lawrence-Giles data, our own draw)',
        "20 points y = sin(x/3) + uniform(-0.25, 0.25). Residual: RMS of fit - y at the points. Error: |fit - "
        "sin(x/3)| on a fine grid from the first point to the last:",
        _table(
            ["fit", "parameters", "residual", "RMS error", "largest error"],
            [
                [fit["fit"], str(fit["parameters"])] + [f"{fit[key]:.3f}" for key in ("residual", "rms", "max")]
                for fit in result["fits"]
            ],
        ),
        f"The polynomial of degree 15 is nearer to the points than the networks ({high['residual']:.3f} against "
        f"{small['residual']:.3f} and {large['residual']:.3f}) and further from the curve: its RMS error is "
        f"{high['rms'] / small['rms']:.1f} and {high['rms'] / large['rms']:.1f} times theirs, its largest "
        f"{high['max'] / small['max']:.1f} and {high['max'] / large['max']:.1f} times, for it swings between the "
        "points near the ends. The count of parameters does not tell: it has the fewest of the three. Nor is a "
        "polynomial wrong as such: degree 5 is near the curve. How far it swings is up to the noise: over 100 draws "
        f"its largest error is {draws[0]:.2f} to {draws[-1]:.2f}, with a median of {draws[len(draws) // 2]:.2f}.",
    )


def overfitting_plot(result: Result, path: Path) -> None:
    """The points, sin(x/3) and all the fits."""

    def curves(ax: Any) -> None:
        ax.plot(result["grid"], result["truth"], "k--", label="sin(x/3)")
        for fit in result["fits"]:
            ax.plot(result["grid"], fit["curve"], label=fit["fit"])
        ax.plot(result["x"], result["y"], "ko", label="data")
        ax.set(xlabel="x", ylabel="y", title="Lawrence-Giles data")
        ax.legend()

    _draw(path, curves)


# -------------------------------------------------------------------------------------------------- counting


def counting(
    seed: int = 0,
    backend: str = "auto",
    networks: Sequence[Sequence[int]] = ((784, 10), (784, 100, 10), (784, 512, 256, 10)),
) -> Result:
    """Layers and parameters as source 5 counts them ("Counting layers", "Biases, Weights").

    For each N_0/N_1/.../N_L: `layers`, L, and `hidden_layers`, L - 1; `N_w` = N_0 N_1 + N_1 N_2 + ... + N_(L-1) N_L,
    `N_b` = N_1 + ... + N_L and `total`, their sum; `parameter_count` as the network has it; its `summary`.
    """
    rows = []
    for N in networks:
        net = Network(N, seed=seed, backend=backend)
        N_w, N_b = sum(n * k for n, k in itertools.pairwise(N)), sum(N[1:])
        rows.append(
            {
                "widths": list(N),
                "layers": net.L,
                "hidden_layers": net.L - 1,
                "N_w": N_w,
                "N_b": N_b,
                "total": N_w + N_b,
                "parameter_count": net.parameter_count,
                "summary": net.summary(),
            }
        )
    return {"rows": rows}


def counting_text(result: Result) -> str:
    """The report of `counting`."""
    return _report(
        "Counting (source 5, Counting layers; Biases, Weights)",
        "A layer is a set of adjustable parameters, so the input is none: a perceptron has one layer, a network with "
        "one hidden layer has two. N_w = N_0 N_1 + ... + N_(L-1) N_L, N_b = N_1 + ... + N_L; the last column is what "
        "the network counts itself. The source's example is 784/100/10: 100 + 10 + 784 * 100 + 100 * 10 = 79,510.",
        _table(
            ["network", "layers", "hidden", "N_w", "N_b", "N_w + N_b", "parameter_count"],
            [
                ["/".join(map(str, r["widths"]))]
                + [f"{r[k]:,}" for k in ("layers", "hidden_layers", "N_w", "N_b", "total", "parameter_count")]
                for r in result["rows"]
            ],
        ),
        "And its summary:",
        *(r["summary"] for r in result["rows"] if r["widths"] == [784, 100, 10]),
    )


# ----------------------------------------------------------------------------------------------- three-index


def three_index(
    seed: int = 0, backend: str = "auto", layers: Sequence[int] = (784, 100, 10), samples: int = 4
) -> Result:
    """dz_i/dW_jk = delta_ij a_k, formed whole, and how it collapses into Delta A^T (source 5, "Backpropagation").

    For each layer: `shape` (N_l, N_l, N_(l-1)) and `elements` of the three-index array of one sample, its `nonzero`
    ones at the most, the `elements_of_dW`; `difference`, the largest between dW[l] of the engine and the product
    sum_i dC/dz_i dz_i/dW_jk averaged over the samples, as part of the largest element of dW[l]. In float64.
    """
    rng = generator(seed, STREAM)
    X, T = rng.standard_normal((samples, layers[0])), rng.integers(0, layers[-1], samples)
    net = Network(layers, "tanh", precision="float64", seed=seed, backend=backend)
    page = net.backward(X, T)
    rows = []
    for l in range(1, net.L + 1):
        n_out, n_in = net.layers[l], net.layers[l - 1]
        dW = np.zeros((n_out, n_in))
        dz_dW = np.zeros((n_out, n_out, n_in))
        each = np.arange(n_out)
        for delta, a in zip(page["Delta"][l], page["A"][l - 1], strict=True):
            dz_dW[each, each] = a  # dz_i/dW_jk = delta_ij a_k
            dW += np.tensordot(delta, dz_dW, 1) / samples  # sum_i dC/dz_i dz_i/dW_jk
        wanted = page["W"][l]
        rows.append(
            {
                "layer": l,
                "shape": [n_out, n_out, n_in],
                "elements": dz_dW.size,
                "nonzero": n_out * n_in,
                "elements_of_dW": int(wanted.size),
                "difference": float(np.abs(dW - wanted).max() / np.abs(wanted).max()),
            }
        )
    return {"layers": list(layers), "samples": samples, "rows": rows}


def three_index_text(result: Result) -> str:
    """The report of `three_index`."""
    largest = max(result["rows"], key=lambda r: r["elements"])
    n_out, _, n_in = largest["shape"]
    return _report(
        'The three-index derivative (source 5: "sparse and collapses when multiplied")',
        "z[l] is a vector, W[l] a matrix, so dz/dW has three indices: dz_i/dW_jk = delta_ij a_k. Formed whole for one "
        f"sample after the other (m = {result['samples']}) and multiplied by dC/dz, against the engine's dW[l] = Delta "
        "A^T / m:",
        _table(
            ["layer", "dz/dW", "elements", "not 0", "dW", "difference"],
            [
                [
                    str(r["layer"]),
                    " x ".join(map(str, r["shape"])),
                    *(f"{r[key]:,}" for key in ("elements", "nonzero", "elements_of_dW")),
                    f"{r['difference']:.1e}",
                ]
                for r in result["rows"]
            ],
        ),
        f"One element in {n_out} of the largest is not 0. As sum_i dC/dz_i delta_ij a_k = dC/dz_j a_k, the outer "
        f"product of a vector of {n_out} and one of {n_in} takes the place of {largest['elements']:,} elements.",
    )


# --------------------------------------------------------------------------------------------- product-order


def product_order(
    seed: int = 0, backend: str = "auto", widths: Sequence[int] = (100, 200, 500, 1000), repeats: int = 5
) -> Result:
    """(delta^T W) D against delta^T (W D), and against d ⊙ (W^T delta): the step back, three ways (source 5).

    Of an N-N-N network: delta = dC/dz[2] of one sample, W = W[2], D = diag(d), d = f'(z[1]). For each N and way:
    `multiplications`; `difference` from the engine's Delta[1], the largest, as part of its largest element; `seconds`,
    the least of `repeats` runs or more, measured and so never quite the same. The products are NumPy's, in float64, on
    the host, whatever the backend.
    """
    rng, rows = generator(seed, STREAM), []
    for N in widths:
        net = Network([N, N, N], "tanh", "identity", "glorot", precision="float64", seed=seed, backend=backend)
        page = net.backward(rng.standard_normal((1, N)), rng.standard_normal((1, N)))
        delta, W, d = page["Delta"][2][0], to_host(net.W[2]), 1 - page["A"][1][0] ** 2
        D, wanted = np.diag(d), page["Delta"][1][0]
        ways: dict[str, Callable[..., np.ndarray]] = {
            "vector first": lambda delta, W, d, D: (delta @ W) @ D,
            "matrices first": lambda delta, W, d, D: delta @ (W @ D),
            "Hadamard": lambda delta, W, d, D: d * (W.T @ delta),
        }
        difference, seconds = {}, {}
        for way, product in ways.items():
            times: list[float] = []
            while len(times) < repeats or sum(times) < 0.02:
                start = time.perf_counter()
                found = product(delta, W, d, D)
                times.append(time.perf_counter() - start)
            difference[way] = float(np.abs(found - wanted).max() / np.abs(wanted).max())
            seconds[way] = min(times)
        counts = multiplications(N, N)
        rows.append({"width": N, "multiplications": counts, "difference": difference, "seconds": seconds})
    return {"repeats": repeats, "rows": rows}


def multiplications(n_out: int, n_in: int) -> dict[str, int]:
    """Multiplications of each way to form delta^T W D: W is n_out x n_in, D a full n_in x n_in but for Hadamard."""
    return {
        "vector first": n_out * n_in + n_in * n_in,
        "matrices first": n_out * n_in * n_in + n_out * n_in,
        "Hadamard": n_out * n_in + n_in,
    }


def product_order_text(result: Result) -> str:
    """The report of `product_order`."""
    rows = result["rows"]
    return _report(
        'The order of products (source 5: "Performing vector-matrix product first is more efficient")',
        "The step back from delta through W and D = diag(f'(z)), all N wide: (delta^T W) D, vector first; delta^T (W "
        "D), matrices first; d ⊙ (W^T delta), Hadamard, as this package does it. Multiplications, and the ratio of the "
        "first two:",
        _table(
            ["N", "vector first", "matrices first", "Hadamard", "ratio"],
            [
                [
                    str(r["width"]),
                    *(f"{n:,}" for n in r["multiplications"].values()),
                    f"{_ratio(r, 'multiplications'):.0f}",
                ]
                for r in rows
            ],
        ),
        f"Microseconds on this machine, the least of {result['repeats']} runs or more:",
        _table(
            ["N", "vector first", "matrices first", "Hadamard", "ratio"],
            [
                [str(r["width"]), *(f"{1e6 * s:,.0f}" for s in r["seconds"].values()), f"{_ratio(r, 'seconds'):.0f}"]
                for r in rows
            ],
        ),
        "Counted, matrices first is N/2 times as much. Measured, the ratio grows with N too, but less: a product "
        "of matrices uses each number that it loads many times, a vector-matrix product uses it once. The results are "
        f"those of the engine, to {max(x for r in rows for x in r['difference'].values()):.1e} of the largest element.",
    )


def _ratio(row: dict[str, Any], key: str) -> float:
    return row[key]["matrices first"] / row[key]["vector first"]


def product_order_plot(result: Result, path: Path) -> None:
    """Multiplications and seconds by width, one line for each way."""

    def panel(key: str) -> Callable[[Any], None]:
        def draw(ax: Any) -> None:
            widths = [r["width"] for r in result["rows"]]
            for way in result["rows"][0][key]:
                ax.loglog(widths, [r[key][way] for r in result["rows"]], "o-", label=way)
            ax.set(xlabel="width N", title=key)
            ax.legend()

        return draw

    _draw(path, panel("multiplications"), panel("seconds"))


# ----------------------------------------------------------------------------------------------------- chain


def chain(seed: int = 0, backend: str = "auto", activations: Sequence[str] = tuple(HIDDEN)) -> Result:
    """z = f(f(f(w))) as a 1-1-1-1 network without biases: dz/dw from the engine (source 3, "Chain Rule").

    x = 1, W[1] = w, W[2] = W[3] = 1, every function f; the squared error with target z - 1 has derivative 1 by z, so
    dW[1] is dz/dw. For each f and for w = u and -u, u drawn from [0.3, 1.2): `z`; `factors` f'(f(f(w))), f'(f(w)),
    f'(w) from the formula of f', and their `product`; `dW1` of the engine; `difference_quotient`, the central one of
    z by w. In float64.
    """
    u, h, x = float(generator(seed, STREAM).uniform(0.3, 1.2)), 1e-5, np.ones((1, 1))
    rows = []
    for name in activations:
        net = Network([1, 1, 1, 1], name, name, bias=False, precision="float64", seed=seed, backend=backend)
        for W in net.W[1:]:
            W[...] = 1
        for w in (u, -u):
            net.W[1][...] = w
            page = net.backward(x, net.forward(x) - 1, "squared_error")
            factors = [_derivative(name, page["Z"][l], page["A"][l]) for l in (3, 2, 1)]
            z = []
            for beside in (w - h, w + h):
                net.W[1][...] = beside
                z.append(float(net.forward(x)[0, 0]))
            rows.append(
                {
                    "activation": name,
                    "w": w,
                    "z": float(page["A"][3][0, 0]),
                    "factors": factors,
                    "product": math.prod(factors),
                    "dW1": float(page["W"][1][0, 0]),
                    "difference_quotient": (z[1] - z[0]) / (2 * h),
                }
            )
    return {"rows": rows}


def _derivative(name: str, Z: np.ndarray, A: np.ndarray) -> float:
    """f'(z) of one unit, from the table of activations."""
    f, D = HIDDEN[name], np.ones_like(Z)
    if f.derivative is not None:
        f.derivative(np, Z if f.derivative_from == "Z" else A, D, (np.empty_like(Z), np.empty_like(Z)))
    return float(D[0, 0])


def chain_text(result: Result) -> str:
    """The report of `chain`."""
    rows = result["rows"]
    apart = max(abs(r["product"] - r["dW1"]) for r in rows), max(abs(r["difference_quotient"] - r["dW1"]) for r in rows)
    return _report(
        "The chain rule (source 3, Chain Rule)",
        "x = f(w), y = f(x), z = f(y), so dz/dw = f'(f(f(w))) f'(f(w)) f'(w). As a 1-1-1-1 network without biases, "
        "with input 1, W[1] = w and the other weights 1, dz/dw is dW[1]:",
        _table(
            ["f", "w", "z", "f'(f(f(w)))", "f'(f(w))", "f'(w)", "product", "dW[1]"],
            [
                [r["activation"], f"{r['w']:.4f}", f"{r['z']:.6f}"]
                + [f"{factor:.6f}" for factor in r["factors"]]
                + [f"{r['product']:.8f}", f"{r['dW1']:.8f}"]
                for r in rows
            ],
        ),
        f"dW[1] differs from the product by {apart[0]:.1e} at the most, and from the central difference of z by w by "
        f"{apart[1]:.1e}. Forward propagation computes f(w) and f(f(w)) once; backpropagation multiplies the factors "
        "from the left, and each partial product is the Delta of a layer.",
    )


# ----------------------------------------------------------------------------------------------- pretraining


def pretraining(
    seed: int = 0,
    backend: str = "auto",
    unlabelled: int = 5000,
    labelled: int = 500,
    draws: int = 3,
    pretraining_epochs: int = 10,
    epochs: int = 40,
    tested: int = 10_000,
) -> Result:
    """A first layer from an autoencoder, carried over into a classifier that has few labels (source 5).

    With sigmoid (glorot) and ReLU (he) units: an autoencoder 784-100-784 (sigmoid output, squared error) learns to
    reproduce `unlabelled` MNIST images; 784-100-10 then trains on `labelled` ones, in four ways that share the initial
    W[2], b[2] and the batches: from "scratch"; "pretrained", W[1] and b[1] those of the autoencoder; "frozen", the same
    and kept so; "frozen random", W[1] and b[1] kept as drawn. `accuracy` of each way on `tested` test images, once for
    each of `draws` draws of labelled images; `reconstruction`, the autoencoder's cost in its first epoch and its last;
    `parameters_kept`: whether the frozen ones are bit by bit what they were.
    """
    (images, labels), test = datasets.load("mnist")
    assert test is not None
    X_test, T_test = test.images[:tested], test.labels[:tested]
    orders = [generator(seed, STREAM + i).permutation(len(images)) for i in range(draws + 1)]
    X = images[orders[0][:unlabelled]]
    T = X / np.float32(255)
    result: Result = {"unlabelled": unlabelled, "labelled": labelled, "draws": draws, "tested": len(X_test), "rows": []}
    for f, init, lr in (("sigmoid", "glorot", 1e-2), ("relu", "he", 2e-3)):
        autoencoder = Network([784, 100, 784], f, "sigmoid", init, seed=seed, backend=backend)
        history = train(autoencoder, X, T, "squared_error", Adam(lr / 2), "cosine", pretraining_epochs, seed=seed)
        accuracy: dict[str, list[float | None]] = {w: [] for w in ("scratch", "pretrained", "frozen", "frozen random")}
        kept = True
        for draw, order in enumerate(orders[1:]):
            few = images[order[:labelled]], labels[order[:labelled]]
            for way, found in accuracy.items():
                net = Network([784, 100, 10], f, init=init, seed=seed, backend=backend)
                if way in ("pretrained", "frozen"):
                    net.W[1][...], net.b[1][...] = autoencoder.W[1], autoencoder.b[1]
                before, frozen = _bits(net.W[1], net.b[1]), int(way.startswith("frozen"))
                train(net, *few, None, Adam(lr), "cosine", epochs, min(50, labelled), seed=draw, frozen=frozen)
                kept &= not frozen or _bits(net.W[1], net.b[1]) == before
                found.append(evaluate(net, X_test, T_test).accuracy)
        result["rows"].append(
            {
                "activation": f,
                "reconstruction": [history.train_cost[0], history.train_cost[-1]],
                "accuracy": accuracy,
                "parameters_kept": kept,
            }
        )
    return result


def pretraining_text(result: Result) -> str:
    """The report of `pretraining`."""
    rows = result["rows"]
    kept = "are bit by bit what they were" if all(r["parameters_kept"] for r in rows) else "HAVE CHANGED"
    told = []
    for r in rows:
        mean = {way: 100 * float(np.mean(accuracy)) for way, accuracy in r["accuracy"].items()}
        told.append(
            f"With {r['activation']} units the pre-trained layer, trained on, gives "
            f"{mean['pretrained'] - mean['scratch']:+.1f} points against starting from scratch; frozen, "
            f"{mean['frozen'] - mean['scratch']:+.1f}, but "
            f"{mean['frozen'] - mean['frozen random']:+.1f} against a frozen layer of random weights."
        )
    return _report(
        'Pre-training (source 5: "Preprocessing using unsupervised training is very effective")',
        f"An autoencoder 784-100-784 learns to reproduce {result['unlabelled']} images, without labels; its first "
        f"layer goes into a classifier 784-100-10 that has {result['labelled']} labels. Accuracy in % on "
        f"{result['tested']} test images, mean of {result['draws']} draws of the labelled images (lowest to highest):",
        _table(
            ["first layer", *(r["activation"] for r in rows)],
            [
                [
                    way,
                    *(
                        f"{100 * np.mean(a):.1f} ({100 * min(a):.1f} to {100 * max(a):.1f})"
                        for a in (r["accuracy"][way] for r in rows)
                    ),
                ]
                for way in rows[0]["accuracy"]
            ]
            + [["autoencoder's cost", *(f"{a:.1f} to {b:.1f}" for a, b in (r["reconstruction"] for r in rows))]],
        ),
        *told,
        "What the autoencoder has learnt helps the output layer, which is the source's point, where nothing else "
        "trains the first layer. Where the labels train it too, the start makes little difference at this size, for "
        f"better or worse. The frozen W[1] and b[1] {kept}.",
    )


def pretraining_plot(result: Result, path: Path) -> None:
    """Accuracy of each way and draw."""

    def panel(row: dict[str, Any]) -> Callable[[Any], None]:
        def draw(ax: Any) -> None:
            for i, (way, accuracy) in enumerate(row["accuracy"].items()):
                ax.plot([way] * len(accuracy), accuracy, f"C{i}o")
            ax.set(ylabel="test accuracy", title=f"{row['activation']}, {result['labelled']} labels")

        return draw

    _draw(path, *(panel(row) for row in result["rows"]))


# --------------------------------------------------------------------------------------------------- helpers


def _rms(v: np.ndarray) -> float:
    return float(np.sqrt(np.mean(v * v)))


def _bits(*arrays: Any) -> bytes:
    return b"".join(to_host(a).tobytes() for a in arrays)


def _short(x: float) -> str:
    return "0" if x == 0 else f"{x:.3f}" if 1e-3 <= abs(x) < 1e3 else f"{x:.1e}"


def _report(*parts: str) -> str:
    """Paragraphs, wrapped, and tables, which are more than one line already, with an empty line between."""
    return "\n\n".join(p if "\n" in p else textwrap.fill(p, 100, break_on_hyphens=False) for p in parts)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest entry: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (header, *rows)
    )


def _draw(path: Path, *panels: Callable[[Any], None]) -> None:
    """Panels side by side into a file; pyplot, and with it any display, is left alone."""
    try:
        figure = importlib.import_module("matplotlib.figure")
    except ImportError as e:
        raise ConfigError("drawing needs matplotlib, which is not installed", "pip install 'backprop-gpu[plot]'") from e
    if not os.path.splitext(os.fspath(path))[1]:
        raise ConfigError(f"{os.fspath(path)} does not say what kind of file", "end its name in .png, .svg or .pdf")
    sheet = figure.Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    for panel, ax in zip(panels, sheet.subplots(1, len(panels), squeeze=False)[0], strict=True):
        panel(ax)
    try:
        sheet.savefig(path)
    except OSError as e:
        raise DataError(f"cannot write {os.fspath(path)}: {e.strerror or e}", "name a file that can be written") from e
    except ValueError as e:
        raise ConfigError(f"cannot draw to {os.fspath(path)}: {e}", "end the file's name in .png, .svg or .pdf") from e


EXAMPLES: dict[str, Example] = {
    "zero-init": Example("what learns from W = 0, and what does not", zero_init, zero_init_text),
    "vanishing-gradients": Example(
        "deep sigmoid nets lose their gradient, ReLU nets do not",
        vanishing_gradients,
        vanishing_gradients_text,
        vanishing_gradients_plot,
    ),
    "overfitting": Example(
        "a polynomial and an MLP through 20 noisy points", overfitting, overfitting_text, overfitting_plot
    ),
    "counting": Example("layers, weights and biases, counted", counting, counting_text),
    "three-index": Example("dz/dW with its three indices, and how it collapses", three_index, three_index_text),
    "product-order": Example(
        "why the vector-matrix product goes first", product_order, product_order_text, product_order_plot
    ),
    "chain": Example("dz/dw of f(f(f(w))), by the engine", chain, chain_text),
    "pretraining": Example(
        "a first layer from an autoencoder, kept or tuned", pretraining, pretraining_text, pretraining_plot
    ),
}
