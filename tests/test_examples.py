"""The examples: what each says about backpropagation is so, in numbers; reports, plots, repeatability."""

import functools
import itertools
import json
import math
import subprocess
import sys

import formulas
import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu import examples
from backprop_gpu.activations import HIDDEN
from backprop_gpu.batches import generator
from backprop_gpu.examples import EXAMPLES

SMALL = {  # the same at less cost
    "zero-init": {"steps": 5, "activations": ("relu", "sigmoid")},
    "vanishing-gradients": {"hidden_layers": 4, "samples": 200, "epochs": 1},
    "overfitting": {"epochs": 20},
    "counting": {},
    "three-index": {"layers": (20, 7, 3)},
    "product-order": {"widths": (10, 30), "repeats": 1},
    "chain": {},
    "pretraining": {
        "unlabelled": 200,
        "labelled": 60,
        "draws": 2,
        "pretraining_epochs": 1,
        "epochs": 2,
        "tested": 300,
    },
}


def run(name, seed=0, backend="numpy"):
    return EXAMPLES[name].run(seed, backend, **SMALL[name])


@functools.cache
def once(name):
    """For those who only look at it."""
    return run(name)


def without_times(result):
    return json.loads(json.dumps(result, default=str), object_hook=lambda d: {k: d[k] for k in d if k != "seconds"})


@pytest.fixture(scope="module")
def zero():
    return examples.zero_init(0, "numpy", tuple(HIDDEN))


@pytest.fixture(scope="module")
def vanishing():
    result = examples.vanishing_gradients(0, "numpy")
    return {row["activation"]: row for row in result["rows"]}


@pytest.fixture(scope="module")
def pretrained():
    return examples.pretraining(0, "numpy", unlabelled=4000, draws=1, pretraining_epochs=8, tested=2000)


# --------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_seed_gives_the_same_plain_numbers_again_and_another_seed_others(name):
    first, second, other = once(name), run(name), run(name, seed=1)
    assert json.loads(json.dumps(first, allow_nan=False)) == first  # plain: no tuples, no arrays, nothing infinite
    assert without_times(first) == without_times(second)
    if name != "counting":
        assert without_times(first) != without_times(other)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_backend_changes_nothing_but_rounding(name, backend):
    """On MNIST with float32 and many steps rounding grows: there the shapes of the results are held."""

    def same(a, b):
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            for k in a.keys() - {"seconds", "summary", "difference", "difference_quotient", "units_differ"}:
                same(a[k], b[k])
        elif isinstance(a, list):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                same(x, y)
        elif isinstance(a, float):
            assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
        else:
            assert a == b

    tolerance = {"vanishing-gradients": 1e-2, "pretraining": 0.1}.get(name, 1e-6)
    same(once(name), run(name, backend=backend.name))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_report_names_its_source_and_fits_a_terminal(name):
    text = EXAMPLES[name].text(once(name))
    lines = text.splitlines()
    assert "source 3" in lines[0] or "source 5" in lines[0]
    assert len(lines) > 8
    assert max(map(len, lines)) <= 110
    assert not any(word in text for word in ("nan", "inf ", "HAVE CHANGED"))


@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if example.plot])
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plots_are_drawn_without_a_display_or_pyplot(name, kind, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'backprop-gpu[plot]'")
    monkeypatch.delenv("DISPLAY", raising=False)
    already = "matplotlib.pyplot" in sys.modules
    path = tmp_path / f"picture.{kind}"
    EXAMPLES[name].plot(once(name), path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n" if kind == "png" else b"<?xml")
    assert path.stat().st_size > 5000
    assert already or "matplotlib.pyplot" not in sys.modules


def test_a_plot_that_cannot_be_written_says_what_to_do(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'backprop-gpu[plot]'")
    result = once("product-order")
    with pytest.raises(bp.ConfigError, match=r"picture\.doc") as e:
        EXAMPLES["product-order"].plot(result, tmp_path / "picture.doc")
    assert ".png" in e.value.cure
    with pytest.raises(bp.DataError, match="cannot write"):
        EXAMPLES["product-order"].plot(result, tmp_path / "no such folder" / "picture.png")


def test_without_matplotlib_a_plot_names_the_cure(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(bp.ConfigError, match="matplotlib, which is not installed") as e:
        EXAMPLES["overfitting"].plot(once("overfitting"), tmp_path / "picture.png")
    assert e.value.cure == "pip install 'backprop-gpu[plot]'"
    assert not list(tmp_path.iterdir())


def test_the_module_loads_without_matplotlib():
    code = "import sys, backprop_gpu.examples; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --------------------------------------------------------------------------------------------------- zero-init


def test_from_zero_only_the_last_layer_has_a_gradient(zero):
    for row in zero["rows"]:
        assert row["dW"][:-1] == row["db"][:-1] == [0, 0], row
        assert row["db"][-1] > 0.01
        assert (row["dW"][-1] > 0.01) == (row["f(0)"] != 0)


def test_with_f0_zero_only_the_output_bias_ever_learns(zero):
    rows = [row for row in zero["rows"] if row["f(0)"] == 0]
    assert {row["activation"] for row in rows} == set(HIDDEN) - {"sigmoid", "softplus"}
    for row in rows:
        assert row["first_step"] == {"W1": None, "b1": None, "W2": None, "b2": None, "W3": None, "b3": 1}
        assert zero["entropy"] <= row["cost"] < zero["entropy"] + 0.01


def test_otherwise_the_layers_move_from_the_last_to_the_first_but_their_units_stay_alike(zero):
    rows = [row for row in zero["rows"] if row["f(0)"] != 0]
    assert [row["activation"] for row in rows] == ["sigmoid", "softplus"]
    for row in rows:
        assert row["first_step"] == {"W1": 3, "b1": 3, "W2": 2, "b2": 2, "W3": 1, "b3": 1}
        assert row["units_differ"] < 1e-12
        assert row["cost"] > zero["entropy"] - 0.01  # no better than knowing how frequent the classes are


def test_from_he_the_same_training_learns(zero):
    for f in ("relu", "tanh"):
        assert zero["cost_from_he"][f] < zero["entropy"] - 1


# ----------------------------------------------------------------------------------------- vanishing-gradients


def test_sigmoid_stacks_lose_their_gradient_layer_by_layer(vanishing):
    row = vanishing["sigmoid"]
    norms = row["gradient_norms"]
    assert norms[0] / norms[-1] == row["first_to_last"] < 1e-3
    assert all(a < b for a, b in itertools.pairwise(norms))
    assert max(row["derivative"]) <= 0.25
    assert max(row["factor"]) < 0.5


def test_relu_and_tanh_stacks_do_not(vanishing):
    for f in ("relu", "tanh"):
        row = vanishing[f]
        assert 0.1 < row["first_to_last"] < 10
        assert min(row["factor"]) > 0.5
        assert max(row["factor"]) < 2


def test_the_factor_of_a_step_back_has_the_derivative_in_it():
    """||Delta[l]|| = ||f'(Z[l]) ⊙ (W[l+1]^T Delta[l+1])||, and with sigmoid f' is 1/4 at most."""
    result = examples.vanishing_gradients(3, "numpy", hidden_layers=3, samples=50, epochs=1)
    rows = generator(3, examples.STREAM).permutation(60_000)[:50]
    X, T = (part[rows] for part in bp.datasets.load("mnist")[0])
    net = bp.Network(result["layers"], "sigmoid", init="glorot", seed=3)
    page = net.backward(X, T)
    for l in range(1, net.L):
        A, back = page["A"][l], page["Delta"][l + 1] @ net.W[l + 1]
        factor = np.linalg.norm(A * (1 - A) * back) / np.linalg.norm(page["Delta"][l + 1])
        assert result["rows"][0]["factor"][l - 1] == pytest.approx(factor, rel=1e-4)
        assert result["rows"][0]["derivative"][l - 1] == pytest.approx(np.mean(A * (1 - A)), rel=1e-4)


def test_training_halts_where_the_gradient_vanishes(vanishing):
    cost = vanishing["sigmoid"]["cost"]
    assert min(cost) > math.log(10) - 0.05  # guessing
    assert vanishing["sigmoid"]["training"][-1][0] < 1e-2 * vanishing["sigmoid"]["training"][-1][-1]
    for f in ("relu", "tanh"):
        assert vanishing[f]["cost"][-1] < 1.2
        assert vanishing[f]["training"][-1][0] > 0.1 * vanishing[f]["training"][-1][-1]
        assert len(vanishing[f]["training"]) == len(vanishing[f]["cost"]) == 10


# ------------------------------------------------------------------------------------------------- overfitting


def test_the_data_are_a_noisy_sine():
    x, y = examples.lawrence_giles(7)
    np.testing.assert_array_equal(x, range(20))
    noise = y - np.sin(x / 3)
    assert np.abs(noise).max() <= 0.25
    assert noise.std() > 0.08  # uniform: 0.144
    assert (y != examples.lawrence_giles(8)[1]).all()
    assert (y != examples.lawrence_giles(7, draw=1)[1]).all()


def test_the_polynomial_overfits_and_the_networks_do_not():
    """The ratios at seed 0 are 9.5 and 4.8 (RMS), 30 and 10 (largest)."""
    result = examples.overfitting(0, "numpy")
    low, high, *networks = result["fits"]
    assert [fit["parameters"] for fit in result["fits"]] == [6, 16, 61, 481]
    for fit in networks:
        assert high["residual"] < fit["residual"]  # nearer to the points
        assert high["rms"] > 3 * fit["rms"]  # and further from the curve
        assert high["max"] > 5 * fit["max"]
        assert fit["max"] < 0.4
    assert low["max"] < 0.4
    x, y, truth = (np.array(result[k]) for k in ("x", "y", "truth"))
    np.testing.assert_allclose(truth, np.sin(np.array(result["grid"]) / 3), rtol=1e-12)
    for fit in result["fits"]:  # the curve passes the points at the residual's distance, every 20th place of the grid
        curve = np.array(fit["curve"])
        assert np.sqrt(np.mean((curve[::20] - y) ** 2)) == pytest.approx(fit["residual"], rel=1e-9)
        assert np.abs(curve - truth).max() == pytest.approx(fit["max"], rel=1e-12)
    assert len(x) == 20


def test_most_draws_of_the_noise_make_the_polynomial_swing():
    draws = examples.overfitting(0, "numpy", epochs=1)["max_of_draws"]
    assert draws == sorted(draws)
    assert len(draws) == 100
    assert draws[50] > 1
    assert draws[10] > 0.4


# ---------------------------------------------------------------------------------------------------- counting


def test_parameters_are_counted_as_the_source_counts_them():
    rows = {tuple(row["widths"]): row for row in examples.counting(0, "numpy")["rows"]}
    example = rows[784, 100, 10]
    assert (example["N_w"], example["N_b"], example["total"]) == (79_400, 110, 79_510)
    assert (example["layers"], example["hidden_layers"]) == (2, 1)
    assert rows[784, 10]["layers"] == 1  # the perceptron
    for widths, row in rows.items():
        assert row["parameter_count"] == row["total"] == bp.Network(list(widths)).parameter_count
        assert f"N_w + N_b = {row['N_w']} weights + {row['N_b']} biases = {row['total']} parameters" in row["summary"]
        assert "/".join(map(str, widths)) in row["summary"]
    assert "79,510" in examples.counting_text(examples.counting(0, "numpy"))


# ------------------------------------------------------------------------------------------------- three-index


def test_the_three_index_array_collapses_into_the_engines_dw():
    result = examples.three_index(0, "numpy")
    first, last = result["rows"]
    assert (first["shape"], first["elements"], first["elements_of_dW"]) == ([100, 100, 784], 7_840_000, 78_400)
    assert (last["shape"], last["elements"], last["nonzero"]) == ([10, 10, 100], 10_000, 1000)
    assert first["difference"] < 1e-12
    assert last["difference"] < 1e-12


# ----------------------------------------------------------------------------------------------- product-order


def test_vector_first_takes_fewer_multiplications_by_half_the_width():
    for row in examples.product_order(0, "numpy", (100, 200), repeats=1)["rows"]:
        N, count = row["width"], row["multiplications"]
        assert count == {"vector first": 2 * N**2, "matrices first": N**3 + N**2, "Hadamard": N**2 + N}
        assert count["matrices first"] / count["vector first"] == (N + 1) / 2
    # of 3 x 4 W: delta^T W 12, times D 16; W D 48, delta^T times that 12; d ⊙ 4
    assert examples.multiplications(3, 4) == {"vector first": 28, "matrices first": 60, "Hadamard": 16}


def test_the_order_of_products_does_not_change_the_result():
    result = examples.product_order(0, "numpy", (50, 300), repeats=1)
    for row in result["rows"]:
        assert set(row["difference"]) == set(row["seconds"]) == {"vector first", "matrices first", "Hadamard"}
        assert max(row["difference"].values()) < 1e-12


# ------------------------------------------------------------------------------------------------------- chain


@pytest.mark.parametrize("name", HIDDEN)
def test_the_chain_rule_holds_in_the_engine(name):
    f, df = formulas.VALUE[name], formulas.DERIVATIVE[name]
    rows = examples.chain(0, "numpy", [name])["rows"]
    assert rows[0]["w"] == -rows[1]["w"] > 0
    for row in rows:
        w = row["w"]
        assert row["z"] == pytest.approx(f(f(f(w))), rel=1e-12, abs=1e-15)
        assert row["factors"] == pytest.approx([df(f(f(w))), df(f(w)), df(w)], rel=1e-12, abs=1e-15)
        assert row["dW1"] == pytest.approx(df(f(f(w))) * df(f(w)) * df(w), rel=1e-12, abs=1e-15)
        assert row["product"] == pytest.approx(row["dW1"], rel=1e-12, abs=1e-15)
        assert row["difference_quotient"] == pytest.approx(row["dW1"], rel=1e-7, abs=1e-9)


# ------------------------------------------------------------------------------------------------- pretraining


def test_an_autoencoder_learns_and_frozen_parameters_keep_their_bits(pretrained):
    assert [row["activation"] for row in pretrained["rows"]] == ["sigmoid", "relu"]
    for row in pretrained["rows"]:
        first, last = row["reconstruction"]
        assert last < first / 1.5
        assert row["parameters_kept"] is True


def test_frozen_features_of_the_autoencoder_beat_random_ones_and_tuning_beats_freezing(pretrained):
    for row in pretrained["rows"]:
        mean = {way: np.mean(accuracy) for way, accuracy in row["accuracy"].items()}
        assert all(len(accuracy) == 1 for accuracy in row["accuracy"].values())
        assert mean["frozen"] > mean["frozen random"] + 0.02
        assert mean["pretrained"] > mean["frozen"] + 0.02
        assert mean["scratch"] > 0.7
        assert abs(mean["pretrained"] - mean["scratch"]) < 0.05  # the start makes little difference


def test_a_layer_that_was_not_kept_is_told(monkeypatch):
    real = examples.train

    def thaws(net, *args, frozen=0, **settings):
        return real(net, *args, **settings)

    monkeypatch.setattr(examples, "train", thaws)
    result = run("pretraining")
    assert [row["parameters_kept"] for row in result["rows"]] == [False, False]
    assert "HAVE CHANGED" in examples.pretraining_text(result)
