"""The gradient check: right formulas pass, wrong ones fail and are named, kinks and rounding are told from both."""

import json
import math
import sys

import fake_cupy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backprop_gpu as bp
from backprop_gpu import numpy_ops
from backprop_gpu.activations import HIDDEN, OUTPUT, Activation
from backprop_gpu.costs import COSTS, Cost
from backprop_gpu.gradient_checks import check_everything, gradient_check, legal_pairs, sample_problem
from backprop_gpu.regularization import Regularization

module = sys.modules[gradient_check.__module__]
DERIVED = [name for name, f in HIDDEN.items() if f.derivative is not None]


def network(layers, hidden="tanh", output="softmax", seed=0, precision="float64", backend="numpy", **settings):
    """A network with biases that are not 0."""
    net = bp.Network(layers, hidden, output, "glorot", precision=precision, seed=seed, backend=backend, **settings)
    rng = np.random.default_rng(seed)
    for b in net.b[1:]:
        if b is not None:
            b[...] = net.backend.asarray(rng.normal(0, 0.3, b.shape).astype(net.dtype))
    return net


def by_name(report):
    return {row.name: row for row in report.rows}


def failed(report):
    return {row.name for row in report.rows if row.status == "FAILED"}


# ------------------------------------------------------------------------------------------ right formulas pass


@st.composite
def problems(draw):
    (output, cost), hidden = draw(st.sampled_from(legal_pairs())), draw(st.sampled_from(list(HIDDEN)))
    depth, seed, m = draw(st.integers(0, 3)), draw(st.integers(0, 2**32)), draw(st.integers(1, 9))
    layers = draw(st.lists(st.integers(1, 6), min_size=depth + 2, max_size=depth + 2))
    dropout = draw(st.sampled_from([0.0, 0.3]))
    net = network(layers, hidden, output, seed, bias=draw(st.booleans()), dropout=dropout)
    X, T = sample_problem(net, m, seed, cost)
    settings = {
        "reduction": draw(st.sampled_from(["mean", "sum"])),
        "sample_weight": draw(st.sampled_from([None, np.random.default_rng(seed).uniform(0.1, 2, m)])),
        "l1": draw(st.sampled_from([0.0, 0.01])),
        "l2": draw(st.sampled_from([0.0, 0.1])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])) if COSTS[cost].from_Z else 0.0,
        "dropout": draw(st.sampled_from([None, (seed, 3)])),
    }
    return net, X * draw(st.sampled_from([0.1, 1, 10])), T, cost, settings


@settings(max_examples=60, derandomize=True)
@given(problems(), st.sampled_from([2000, 0]))
def test_correct_networks_pass(problem, every_parameter_up_to):
    net, X, T, cost, settings = problem
    report = gradient_check(net, X, T, cost, every_parameter_up_to=every_parameter_up_to, **settings)
    assert {row.status for row in report.rows} <= {"passed", "below noise"}, str(report)
    assert [row.error for row in report.rows if row.error > 1e-4 and row.status == "passed"] == []
    assert report.cost == pytest.approx(net.gradients(X, T, cost, **settings)["cost"], rel=1e-13)
    assert [row.name for row in report.rows] == [
        f"{kind}[{l}]" for l in range(1, net.L + 1) for kind in "Wb" if (net.W, net.b)[kind == "b"][l] is not None
    ]


def test_every_activation_passes_with_every_legal_pair():
    reports = check_everything(0)
    assert len({title for title, _ in reports}) == len(reports) == len(HIDDEN) * len(legal_pairs())
    for title, report in reports:
        assert report.passed, f"{title}\n{report}"
        assert {row.status for row in report.rows} == {"passed"}, f"{title}\n{report}"
        assert max(row.error for row in report.rows) <= 1e-7


def test_pairs_are_those_that_a_network_accepts():
    for output in OUTPUT:
        net = network([2, 2], output=output)
        for cost in COSTS:
            try:
                net.gradients(np.ones((1, 2)), [[0.0, 1.0]], cost)
                legal = True
            except bp.ConfigError:
                legal = False
            assert legal == ((output, cost) in legal_pairs())


def test_every_parameter_of_a_small_network_and_directions_of_a_large_one():
    net = network([4, 5, 3])
    X, T = sample_problem(net)
    assert [(r.checked, r.along) for r in gradient_check(net, X, T).rows] == [(n, "parameters") for n in (20, 5, 15, 3)]
    rows = gradient_check(net, X, T, every_parameter_up_to=42, directions=4).rows
    assert [(r.checked, r.along) for r in rows] == [(4, "directions")] * 3 + [(3, "parameters")]
    same, other = (gradient_check(net, X, T, every_parameter_up_to=0, seed=seed) for seed in (0, 1))
    assert same == gradient_check(net, X, T, every_parameter_up_to=0)
    assert same.rows[0].error != other.rows[0].error


def test_directions_are_unit_vectors_and_differ():
    theta = np.zeros((30, 40))
    tensors = [module._Lines(theta, 8, False, seed, stream, None) for seed, stream in ((0, 5), (1, 5), (0, 1 << 40))]
    U = np.array([lines[k][1] for lines in tensors for k in range(8)])
    np.testing.assert_allclose(np.abs(U @ U.T), np.eye(24), atol=0.2)
    np.testing.assert_allclose(np.diag(U @ U.T), 1, rtol=1e-13)


def test_a_large_network_passes_on_mnist(mnist):
    train, _ = mnist
    net = bp.Network([784, 100, 10], backend="numpy")
    report = gradient_check(net, train.images[:64], train.labels[:64])
    assert report, str(report)
    assert {(r.checked, r.along) for r in report.rows} == {(8, "directions")}
    assert max(r.error for r in report.rows) <= 1e-7


# --------------------------------------------------------------------------------------------- wrong ones fail


def broken(f, factor=1.001):
    """An activation whose derivative is too large."""

    def derivative(xp, K, D, s):
        f.derivative(xp, K, D, s)
        D *= factor

    return f._replace(derivative=derivative)


@pytest.mark.parametrize("every", [2000, 0])
@pytest.mark.parametrize("f", DERIVED)
def test_a_wrong_derivative_fails_its_layer_and_those_below(f, every):
    net = network([4, 4, 5, 4, 3], f, seed=1)
    X, T = sample_problem(net, 8)
    assert gradient_check(net, X, T, every_parameter_up_to=every)
    net.f[2] = broken(net.f[2])
    report = gradient_check(net, X, T, every_parameter_up_to=every)
    assert not report
    assert failed(report) == {"W[1]", "b[1]", "W[2]", "b[2]"}
    assert report.verdict.startswith("FAILED: error ")
    assert report.verdict.endswith(" in W[2], tolerance 1e-07; also b[2], W[1], b[1]")


def test_a_wrong_output_function_or_cost_fails_everywhere():
    net = network([3, 4, 2], output="sigmoid")
    X, T = sample_problem(net, 8, cost="squared_error")
    net.g = broken(net.g, 1 + 1e-6)
    report = gradient_check(net, X, T, "squared_error")
    assert failed(report) == {"W[1]", "b[1]", "W[2]", "b[2]"}
    assert max(r.error for r in report.rows) == pytest.approx(1e-6, rel=0.2)
    net = network([3, 4, 2], output="identity")
    for slip, right in ((0.0, True), (1e-5, False)):
        cost = Cost.of(
            "fourth", lambda xp, Y, T: ((Y - T) ** 4).sum(axis=1), lambda xp, Y, T, e=slip: (4 + e) * (Y - T) ** 3
        )
        assert gradient_check(net, X, T, cost).passed is right


def test_an_own_activation_is_checked():
    right = Activation.of("cubed", lambda xp, Z: Z**3, lambda xp, Z: 3 * Z**2)
    wrong = Activation.of("cubed", lambda xp, Z: Z**3, lambda xp, Z: 2 * Z**2)
    X, T = sample_problem(network([3, 4, 2]), 8)
    assert gradient_check(network([3, 4, 2], right), X, T)
    assert failed(gradient_check(network([3, 4, 2], wrong), X, T)) == {"W[1]", "b[1]"}


def _scaled_dW(ops):
    def weight_gradient(Delta, A_below, dW):
        ops["weight_gradient"](Delta, A_below, dW)
        dW *= 1 + 1e-6

    return {"weight_gradient": weight_gradient}, {"W[1]", "W[2]", "W[3]"}


def _one_entry_of_dW(ops):
    def weight_gradient(Delta, A_below, dW):
        ops["weight_gradient"](Delta, A_below, dW)
        if dW.shape == (4, 3):
            dW[2, 1] *= 1.01

    return {"weight_gradient": weight_gradient}, {"W[1]"}


def _sign_of_db(ops):
    def sum_columns(Delta, db):
        ops["_sum_columns"](Delta, db)
        if db is not None:
            db *= -1

    return {"_sum_columns": sum_columns}, {"b[1]", "b[2]", "b[3]"}


def _sign_of_Delta(ops):
    def hidden_delta(W, Delta, f, Z, A, mask, out, db):
        ops["hidden_delta"](W, Delta, f, Z, A, mask, out, db)
        out *= -1
        db *= -1

    return {"hidden_delta": hidden_delta}, {"W[2]", "b[2]"}  # the second sign makes the first good


def _no_derivative_in_Delta(ops):
    def hidden_delta(W, Delta, f, Z, A, mask, out, db):
        np.matmul(Delta, W, out=out)
        out.sum(axis=0, out=db)

    return {"hidden_delta": hidden_delta}, {"W[1]", "b[1]", "W[2]", "b[2]"}


def _no_mean(ops):
    def output_delta(cost, g, Z, T, w, Delta, C, db=None):
        ops["output_delta"](cost, g, Z, T, 1.0, Delta, C, db)

    return {"output_delta": output_delta}, {"W[1]", "b[1]", "W[2]", "b[2]", "W[3]", "b[3]"}


@pytest.mark.parametrize(
    "slip", [_scaled_dW, _one_entry_of_dW, _sign_of_db, _sign_of_Delta, _no_derivative_in_Delta, _no_mean]
)
@pytest.mark.parametrize("every", [2000, 0])
def test_a_slip_on_the_page_is_found_where_it_is(monkeypatch, slip, every):
    net = network([3, 4, 5, 3], seed=2)
    X, T = sample_problem(net, 8)
    replaced, wrong = slip(dict(vars(numpy_ops)))
    for name, f in replaced.items():
        monkeypatch.setattr(numpy_ops, name, f)
    report = gradient_check(net, X, T, every_parameter_up_to=every)
    assert failed(report) == wrong
    assert not report


def test_wrong_penalties_and_masks_are_found(monkeypatch):
    net = network([3, 6, 2], seed=3, dropout=0.4)
    X, T = sample_problem(net, 8)
    kept = {"l1": 0.01, "l2": 0.1, "dropout": (1, 2)}
    assert gradient_check(net, X, T, **kept)
    with monkeypatch.context() as m:
        m.setattr(Regularization, "apply", lambda *args: None)
        assert failed(gradient_check(net, X, T, **kept)) == {"W[1]", "W[2]"}
    hidden_delta = numpy_ops.hidden_delta
    monkeypatch.setattr(
        numpy_ops,
        "hidden_delta",
        lambda W, Delta, f, Z, A, mask, out, db: hidden_delta(W, Delta, f, Z, A, None, out, db),
    )
    assert failed(gradient_check(net, X, T, **kept)) == {"W[1]", "b[1]"}


def test_a_wrong_row_of_a_large_network_is_found(monkeypatch, mnist):
    train, _ = mnist
    weight_gradient = numpy_ops.weight_gradient

    def slip(Delta, A_below, dW):
        weight_gradient(Delta, A_below, dW)
        if dW.shape == (100, 784):
            dW[7] *= 1.001

    monkeypatch.setattr(numpy_ops, "weight_gradient", slip)
    net = bp.Network([784, 100, 10], backend="numpy", precision="float64")
    report = gradient_check(net, train.images[:64], train.labels[:64])
    assert failed(report) == {"W[1]"}
    assert report.verdict.startswith("FAILED: error ")


def test_everything_finds_a_wrong_activation(monkeypatch):
    wrong = broken(HIDDEN["tanh"])
    monkeypatch.setitem(HIDDEN, "tanh", wrong)
    monkeypatch.setitem(OUTPUT, "tanh", wrong)
    monkeypatch.setattr(module, "HIDDEN", {"sigmoid": HIDDEN["sigmoid"], "tanh": wrong})
    reports = check_everything(1)
    assert len(reports) == 2 * len(legal_pairs())
    for title, report in reports:
        assert report.passed is (title.startswith("sigmoid") and ", tanh," not in title), title


def test_a_gradient_that_is_not_finite_fails():
    nan = HIDDEN["tanh"]._replace(derivative=lambda xp, K, D, s: D.fill(np.nan))
    net = network([3, 4, 2])
    X, T = sample_problem(net)
    net.f[1] = nan
    report = gradient_check(net, X, T)
    assert failed(report) == {"W[1]", "b[1]"}
    assert report.verdict == "FAILED: error not finite in W[1], tolerance 1e-07; also b[1]"
    json.dumps(report.as_dict(), allow_nan=False)


# ------------------------------------------------------------------------------------------------------- kinks


class Line:
    """A line phi through parameters that are not there."""

    def __init__(self, phi):
        self.evaluate = phi

    def phi(self, k, *steps):
        return [self.evaluate(h) for h in steps]


def look(phi, s, share=1e-9, delta=1e-16, eps=1e-5):
    """What the check makes of a slope s that was found off: the slope, its rounding error, and whether it is a kink."""
    return module._look_closer(Line(phi), 0, [phi(eps), phi(-eps)], s, share, phi(0.0), delta, eps)


def settled(found, s, share=1e-9):
    n, rounding, kink = found
    return kink or abs(n - s) <= max(share, rounding)


corners = st.builds(lambda sign, size: sign * 10.0**size, st.sampled_from([-1, 1]), st.floats(-6, 1))


@settings(max_examples=300, derandomize=True)
@given(st.floats(-0.999, 0.999), corners, st.floats(-1, 1), st.floats(-100, 100), st.sampled_from([1, 2]))
@pytest.mark.parametrize("r", [None, 0, 1 / 4, 2 / 7, 1 / 3, 1 / 2, 0.05, 1 / 30, 1 / 300])
def test_a_corner_at_any_place_is_a_kink_or_stepped_over(r, anywhere, jump, slope, bend, order):
    """Wherever within eps the slope (or the second derivative) jumps, the right slope is not called wrong."""
    at = 1e-5 * (anywhere if r is None else r)

    def phi(x):
        return slope * x + bend * x * x / 2 + jump * (max(x - at, 0.0) ** order - max(-at, 0.0) ** order)

    right = slope + (jump * order * (-at) ** (order - 1) if at < 0 else 0.0)
    assert settled(look(phi, right), right)


@settings(max_examples=300, derandomize=True)
@given(st.floats(-1, 1), st.floats(-100, 100), st.floats(-1e4, 1e4), st.floats(1e-6, 1), st.sampled_from([-1, 1]))
def test_a_wrong_slope_of_a_smooth_cost_is_no_kink(slope, bend, twist, slip, sign):
    wrong = slope + sign * slip
    n, rounding, kink = look(lambda x: slope * x + bend * x**2 / 2 + twist * x**3 / 6, wrong)
    assert not kink
    assert abs(n - wrong) > max(1e-9, rounding)
    assert n == pytest.approx(slope, abs=1e-3 * slip + 1e-9)


@settings(max_examples=300, derandomize=True)
@given(st.floats(0.02, 1), st.floats(0, 0.02), st.sampled_from([-1, 1]), st.floats(0.01, 0.99))
def test_a_wrong_slope_is_not_excused_by_a_corner_nearby(jump, slip, sign, r):
    """The smaller steps leave a corner that is not at 0 itself behind."""
    slip += 1e-4
    n, rounding, kink = look(lambda x: jump * max(x - r * 1e-5, 0.0), sign * slip)
    assert not kink
    assert abs(n - sign * slip) > max(1e-9, rounding)


def test_a_wrong_slope_is_not_excused_by_a_corner_too_small_for_it():
    found = look(lambda x: 1e-4 * max(x, 0.0), 1e-1)
    assert not settled(found, 1e-1)
    assert look(lambda x: 1e-4 * max(x, 0.0), 0.0)[2]


def planted(f="relu", b=0.0):
    """A network whose unit 1 of layer 1 has z = b for sample 0, on whose side of 0 only its bias decides."""
    net = network([3, 4, 2], f, seed=5)
    X, T = sample_problem(net, 8, 5)
    X[0] = 0
    net.b[1][1] = b
    return net, X, T


@pytest.mark.parametrize("f", ["relu", "leaky_relu"])
def test_a_unit_at_its_corner_is_told(f):
    net, X, T = planted(f)
    report = gradient_check(net, X, T)
    assert report, str(report)
    row = by_name(report)["b[1]"]
    assert (row.kinks, row.first_kink, row.checked, row.status) == (1, "b[1][1]", 3, "passed")
    assert [r.kinks for r in report.rows] == [0, 1, 0, 0]
    assert "; 1 left out at kinks" in report.verdict
    assert "  1, first b[1][1]  passed" in str(report)


@pytest.mark.parametrize("r", [0.9, 2 / 3, 1 / 2, 1 / 3, 2 / 7, 1 / 4, 0.1, 0.03, -1 / 3, -0.5])
def test_a_unit_near_its_corner_is_stepped_over(r):
    net, X, T = planted(b=r * 1e-5)
    report = gradient_check(net, X, T)
    assert report, str(report)
    assert [r.kinks for r in report.rows] == [0, 0, 0, 0]


def test_a_unit_nearer_to_its_corner_than_any_step_is_told():
    net, X, T = planted(b=1e-9)
    report = gradient_check(net, X, T)
    assert report
    assert by_name(report)["b[1]"].first_kink == "b[1][1]"


def test_a_wrong_derivative_is_no_kink():
    net, X, T = planted()
    net.f[1] = broken(net.f[1])
    report = gradient_check(net, X, T)
    assert failed(report) == {"W[1]", "b[1]"}
    assert by_name(report)["b[1]"].kinks == 1


def test_kinks_in_more_than_half_of_a_tensor_are_inconclusive():
    net, X, T = planted()
    net.b[1][:3] = 0
    report = gradient_check(net, X, T)
    row = by_name(report)["b[1]"]
    assert (row.kinks, row.checked, row.status) == (3, 1, "inconclusive")
    assert not report
    assert report.verdict.startswith("inconclusive: kinks in more than half of b[1]; ")
    net.b[1][2] = 1
    assert gradient_check(net, X, T)
    report = gradient_check(net, X, T, every_parameter_up_to=0, directions=3)
    assert by_name(report)["b[1]"].first_kink == "b[1] direction 0"
    assert by_name(report)["b[1]"].status == "inconclusive"


def test_a_corner_of_an_own_activation_is_told():
    """f(z) = |z| with f'(0) = 1."""
    fold = Activation.of("fold", lambda xp, Z: abs(Z), lambda xp, Z: xp.where(Z < 0, -1.0, 1.0))
    net, X, T = planted(fold)
    report = gradient_check(net, X, T)
    assert report
    assert by_name(report)["b[1]"].first_kink == "b[1][1]"


@pytest.mark.parametrize(
    ("cost", "away"), [("mae", 3e-6), ("mae", 0.0), ("norm", 0.0), ("huber", 1.0), ("huber", 1 + 4e-6)]
)
def test_corners_of_the_costs_are_stepped_over(cost, away):
    """y = t, where the two sides of |y - t| have the mean slope 0 that is returned there; and |y - t| = delta."""
    net = network([3, 4, 2], output="identity", seed=6)
    X, T = sample_problem(net, 8, 6)
    T[0] = net.forward(X)[0] - away
    report = gradient_check(net, X, T, cost)
    assert report, str(report)
    assert sum(r.kinks for r in report.rows) == 0


def test_the_corner_of_mae_is_told_where_only_one_side_is_near():
    net = network([3, 2], output="identity", seed=6)
    X, T = sample_problem(net, 8, 6)
    T[0, 0] = net.forward(X)[0, 0] - 1e-9
    report = gradient_check(net, X, T, "mae", tolerance=1e-9)
    assert by_name(report)["b[1]"].first_kink == "b[1][0]"
    assert by_name(report)["W[1]"].first_kink == "W[1][0, 0]"


def test_weights_at_zero_pass_with_an_l1_penalty():
    net = network([3, 4, 2])
    X, T = sample_problem(net)
    net.W[1][::2] = 0
    assert gradient_check(net, X, T, l1=0.1)


# ---------------------------------------------------------------------------------------------------- rounding


def test_gradients_that_are_zero_are_below_noise():
    """At W = 0 with f(0) = 0 only the output bias moves (source 5, where the source slips: not nothing at all)."""
    net = bp.Network([3, 4, 2], "tanh", init="zeros", precision="float64", backend="numpy")
    X, T = sample_problem(net, 9)
    report = gradient_check(net, X, T)
    assert [r.status for r in report.rows] == ["below noise"] * 3 + ["passed"]
    assert [r.error for r in report.rows[:3]] == [0.0] * 3
    assert [r.noise for r in report.rows[:3]] == [None] * 3
    assert report
    assert report.verdict.endswith("; below noise: W[1], b[1], W[2]")


def test_a_gradient_where_none_should_be_fails(monkeypatch):
    net = bp.Network([3, 4, 2], "tanh", init="zeros", precision="float64", backend="numpy")
    X, T = sample_problem(net, 9)
    weight_gradient = numpy_ops.weight_gradient

    def slip(Delta, A_below, dW):
        weight_gradient(Delta, A_below, dW)
        dW += 1e-6

    monkeypatch.setattr(numpy_ops, "weight_gradient", slip)
    assert failed(gradient_check(net, X, T)) == {"W[1]", "W[2]"}


def test_a_missing_gradient_fails(monkeypatch):
    net = network([3, 4, 2])
    X, T = sample_problem(net, 9)
    monkeypatch.setattr(numpy_ops, "weight_gradient", lambda Delta, A_below, dW: None)
    monkeypatch.setattr(numpy_ops, "_sum_columns", lambda Delta, db: None)
    assert failed(gradient_check(net, X, T)) == {"W[1]", "b[1]", "W[2]", "b[2]"}


@pytest.mark.parametrize("cost", ["squared_error", "norm", "huber", "mae"])
def test_a_perfect_fit_proves_nothing(cost):
    net = network([3, 4, 2], output="identity")
    X, _ = sample_problem(net)
    report = gradient_check(net, X, net.forward(X), cost)
    assert {r.status for r in report.rows} == {"below noise"}
    assert not report
    assert report.verdict.startswith("inconclusive: every gradient is below the noise of rounding; ")


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("z", [5, 10, 15, 20, 30, 35, 40, 100, 1000])
@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
def test_saturated_outputs_do_not_fail(output, z, precision):
    """Where 1 - y is lost beside 1, in the cost, in the gradient, or in that of float32 alone."""
    net = network([2, 2], output=output, precision=precision)
    net.W[1][...] = [[z, 0], [0, 0]]
    net.b[1][...] = 0
    X = np.array([[1.0, 1.0], [1.0, -1.0], [1.0, 0.5]])
    report = gradient_check(net, X, np.zeros(3, int) if output == "softmax" else np.ones((3, 2)))
    assert not {"FAILED", "FAILED (own)", "inconclusive"} & {r.status for r in report.rows}, str(report)


@pytest.mark.parametrize("offset", [1e3, 1e5, 1e7])
def test_targets_far_from_zero_do_not_fail(rng, offset):
    """The rounding error of y - t is that of y, not of the cost."""
    net = network([4, 16, 1], output="identity")
    net.b[2][...] = offset
    X = rng.normal(size=(20, 4))
    report = gradient_check(net, X, offset + X[:, 0])
    assert not {"FAILED", "inconclusive"} & {r.status for r in report.rows}, str(report)
    assert sum(r.kinks for r in report.rows) == 0


@pytest.mark.parametrize("cost", ["squared_error", "huber"])
@pytest.mark.parametrize("seed", range(20))
def test_a_perfect_fit_far_from_zero_proves_nothing(cost, seed):
    """At theta the cost is exactly 0, without any rounding; beside it y - t is lost in the rounding of y."""
    net = bp.Network([3, 5, 2], "tanh", "identity", precision="float64", backend="numpy", seed=seed)
    net.b[2][...] = 1e7
    X = np.random.default_rng(seed).normal(size=(6, 3))
    report = gradient_check(net, X, net.forward(X), cost)
    assert {r.status for r in report.rows} == {"below noise"}, str(report)


@pytest.mark.parametrize("scale", [10, 100, 1000])
@pytest.mark.parametrize("f", ["tanh", "softplus", "swish"])
def test_curvature_of_data_that_is_not_scaled_does_not_fail(f, scale):
    net = network([3, 4, 2], f, seed=7)
    net.W[1][...] /= scale / 3
    X, T = sample_problem(net, 8, 7)
    report = gradient_check(net, scale * X, T)
    assert report, str(report)
    net.f[1] = broken(net.f[1])
    assert failed(gradient_check(net, scale * X, T)) == {"W[1]", "b[1]"}


@pytest.mark.parametrize("eps", [1e-7, 1e-6, 1e-4, 1e-3])
def test_other_steps_pass_and_fail_alike(eps):
    net = network([3, 4, 2], seed=8)
    X, T = sample_problem(net, 8)
    assert gradient_check(net, X, T, eps=eps)
    net.f[1] = broken(net.f[1])
    assert failed(gradient_check(net, X, T, eps=eps)) == {"W[1]", "b[1]"}


def test_a_step_that_vanishes_beside_theta_proves_nothing():
    net = network([3, 4, 2])
    X, T = sample_problem(net)
    report = gradient_check(net, X, T, eps=1e-30)
    assert not report
    assert report.verdict.startswith("inconclusive")


# ---------------------------------------------------------------------------------- the network's own gradient


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_own_gradient_is_held_against_float64(backend, precision):
    net = network([4, 6, 5, 3], "gelu", precision=precision, backend=backend.name, seed=9)
    X, T = sample_problem(net, 16, 9)
    report = gradient_check(net, X, T, sample_weight=np.linspace(0.5, 1, 16))
    assert report, str(report)
    if (precision, backend.name) == ("float64", "numpy"):
        assert report.where is None
        assert {r.own for r in report.rows} == {None}
        assert "own" not in str(report)
    else:
        assert report.where == f"{precision} on {backend.name}"
        largest = max(r.own for r in report.rows)
        assert (1e-9 < largest < 1e-5) if precision == "float32" else largest < 1e-13
        assert f"own ({precision} on {backend.name})" in str(report)
        assert f"; {precision} on {backend.name}: " in report.verdict


@pytest.mark.parametrize("f", ["sigmoid", "tanh", "softplus", "swish", "gelu", "elu"])
@pytest.mark.parametrize("z", [-12.0, -7.0, -5.0, 5.0, 7.0, 12.0])
def test_what_float32_loses_where_f_is_flat_is_no_failure(f, z):
    """1 - a^2 near a = 1, or z (1 + t) / 2 near t = -1, are small differences: their digits are lost in float32."""
    net = network([2, 3, 2], f, "identity", precision="float32", seed=4)
    X, T = sample_problem(net, 3, 4)
    net.b[1][...] = z
    report = gradient_check(net, X, T)
    assert not {"FAILED", "FAILED (own)", "inconclusive"} & {r.status for r in report.rows}, str(report)


def test_what_float32_loses_of_large_logits_is_no_failure():
    net = network([2, 3], precision="float32", seed=4)
    X, T = sample_problem(net, 3, 4)
    net.b[1][...] = [3e4, 3e4 + 0.3, 3e4 - 0.2]
    report = gradient_check(net, X, T)
    assert max(r.own for r in report.rows) > 1e-4
    assert not {"FAILED", "FAILED (own)", "inconclusive"} & {r.status for r in report.rows}, str(report)
    assert ", of rounding " in report.verdict


def test_a_slip_in_float32_alone_fails_the_own_column(monkeypatch):
    weight_gradient = numpy_ops.weight_gradient

    def slip(Delta, A_below, dW):
        weight_gradient(Delta, A_below, dW)
        if dW.dtype == np.float32 and dW.shape == (3, 4):
            dW *= 1.0005

    monkeypatch.setattr(numpy_ops, "weight_gradient", slip)
    net = network([3, 4, 3], precision="float32")
    X, T = sample_problem(net)
    report = gradient_check(net, X, T)
    assert not report
    assert {r.name: r.status for r in report.rows if r.status != "passed"} == {"W[2]": "FAILED (own)"}
    assert by_name(report)["W[2]"].own == pytest.approx(5e-4, rel=0.01)
    assert report.verdict == "FAILED: float32 on numpy is 5.0e-04 away from float64 in W[2], tolerance 0.0001"


def test_a_slip_of_the_device_alone_fails_the_own_column(monkeypatch):
    with fake_cupy.installed():
        from backprop_gpu import cuda_ops

        net = network([3, 4, 2], backend="cupy")
        X, T = sample_problem(net)
        assert gradient_check(net, X, T)
        in_strips = cuda_ops._in_strips

        def slip(kernel, M, db, *before):
            in_strips(kernel, M, db, *before)
            db *= 2.0

        monkeypatch.setattr(sys.modules["backprop_gpu.cuda_ops"], "_in_strips", slip)
        report = gradient_check(net, X, T)
    assert {r.name: r.status for r in report.rows} == dict.fromkeys(["b[1]", "b[2]"], "FAILED (own)") | dict.fromkeys(
        ["W[1]", "W[2]"], "passed"
    )


def test_device_arrays_are_taken(backend):
    net = network([3, 4, 2], backend=backend.name)
    X, T = sample_problem(net, 5)
    asarray = backend.asarray
    on_device = gradient_check(net, asarray(X), asarray(T), sample_weight=asarray(np.arange(1.0, 6)))
    assert on_device
    assert on_device.rows == gradient_check(net, X, T, sample_weight=np.arange(1.0, 6)).rows


# -------------------------------------------------------------------------------------------- what it leaves be


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_network_is_left_alone_bit_for_bit(precision):
    net = network([3, 4, 2], "relu", precision=precision)
    X, T = sample_problem(net)
    net.task = "regression"
    before = net.theta.tobytes(), X.tobytes(), T.tobytes(), dict(vars(net)), list(net.f), net.W
    gradient_check(net, X, T, l1=0.1)
    gradient_check(net, X, T, every_parameter_up_to=0)
    after = net.theta.tobytes(), X.tobytes(), T.tobytes(), dict(vars(net)), list(net.f), net.W
    for old, new in zip(before[:3], after[:3], strict=True):
        assert old == new
    assert all(before[3][key] is after[3][key] for key in before[3])
    assert before[4] == after[4]
    assert all(old is new for old, new in zip(before[5], after[5], strict=True))


def test_the_same_call_gives_the_same_report():
    net = network([3, 4, 2], "relu", precision="float32")
    X, T = sample_problem(net)
    assert gradient_check(net, X, T) == gradient_check(net, X, T)


@pytest.mark.parametrize(
    "settings",
    [{}, {"reduction": "sum"}, {"sample_weight": np.arange(8.0)}, {"l1": 0.1, "l2": 0.2}, {"label_smoothing": 0.2},
     {"dropout": (3, 4)}, {"reduction": "sum", "sample_weight": np.arange(8.0), "l2": 0.3, "dropout": (1, 1)}],
)  # fmt: skip
def test_the_cost_alone_is_the_cost_of_the_gradients(settings):
    net = network([3, 40, 2], dropout=0.5)
    X, T = sample_problem(net)
    alone = module._cost_alone(net, X, T, COSTS["cross_entropy"], **settings)
    assert alone() == pytest.approx(net.gradients(X, T, **settings)["cost"], rel=1e-14)


def test_it_is_the_cost_of_the_gradients_that_is_checked(monkeypatch):
    net = network([3, 4, 2])
    X, T = sample_problem(net)
    monkeypatch.setattr(module, "_cost_alone", lambda *args, **settings: lambda: 7.0)
    assert gradient_check(net, X, T)


# ------------------------------------------------------------------------------------------------------ reports


def test_the_report_reads_well():
    net = network([3, 4, 2], "relu", precision="float32")
    X, T = sample_problem(net)
    report = gradient_check(net, X, T)
    title, head, *rows, verdict = str(report).splitlines()
    assert title == (
        f"3/4/2 network, 8 samples, cross_entropy {report.cost:.6g}; central differences in float64, eps 1e-05"
    )
    assert head.split() == "tensor shape checked error noise kinks own (float32 on numpy) status".split()
    assert [row.split()[0] for row in rows] == ["W[1]", "b[1]", "W[2]", "b[2]"]
    assert [row.split()[1:4] for row in rows[::2]] == [["4", "x", "3"], ["2", "x", "4"]]
    for column in ("checked", "error", "noise", "kinks", "own", "status"):
        at = head.index(column)
        assert {row[at - 2 : at] for row in rows} == {"  "}
        assert {row[at] == " " for row in rows} == {False}
    worst = max(report.rows, key=lambda row: row.error)
    assert verdict == report.verdict
    assert verdict.startswith(f"passed: largest error {worst.error:.1e} ({worst.name}), tolerance 1e-07; float32 on ")
    exact = gradient_check(net.to("numpy", precision="float64"), X[:1], T[:1])
    assert str(exact).startswith("3/4/2 network, 1 sample, ")
    assert exact.verdict.count(";") == 0


def test_a_report_is_true_where_it_passed():
    net = network([3, 4, 2])
    X, T = sample_problem(net)
    assert bool(gradient_check(net, X, T)) is gradient_check(net, X, T).passed is True
    net.f[1] = broken(net.f[1])
    assert bool(gradient_check(net, X, T)) is gradient_check(net, X, T).passed is False


def test_reports_are_json():
    net = network([3, 4, 2])
    X, T = sample_problem(net)
    report = gradient_check(net, X, T, "squared_error")
    found = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert found == report.as_dict()
    assert (found["passed"], found["cost_name"], found["samples"], found["own"]) == (True, "squared_error", 8, None)
    assert found["verdict"] == report.verdict
    assert [t["name"] for t in found["tensors"]] == ["W[1]", "b[1]", "W[2]", "b[2]"]
    assert found["tensors"][0]["shape"] == [4, 3]
    assert found["tensors"][0]["error"] == report.rows[0].error
    assert set(found["tensors"][0]) == set(vars(report.rows[0]))


def test_rounding_beyond_the_tolerance_is_said():
    net = network([3, 4, 2], seed=8)
    X, T = sample_problem(net, 8)
    report = gradient_check(net, X, T, tolerance=1e-15)
    assert report
    worst = max(report.rows, key=lambda row: row.error)
    assert report.verdict == (
        f"passed: largest error {worst.error:.1e} ({worst.name}), tolerance 1e-15, of rounding {worst.noise:.1e}"
    )


# ------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    "settings",
    [{"eps": 0}, {"eps": -1e-5}, {"eps": math.nan}, {"eps": "small"}, {"tolerance": 0}, {"tolerance": math.inf},
     {"directions": 0}, {"directions": 1.5}, {"every_parameter_up_to": -1}, {"every_parameter_up_to": None},
     {"seed": -1}, {"seed": "a"}, {"cost": "binary_cross_entropy"}, {"cost": "x"}, {"reduction": "max"}],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused(settings):
    net = network([3, 4, 2])
    X, T = sample_problem(net)
    with pytest.raises(bp.ConfigError) as e:
        gradient_check(net, X, T, **settings)
    assert e.value.cause
    assert e.value.cure


def test_bad_data_are_refused():
    net = network([3, 4, 2])
    X, T = sample_problem(net)
    with pytest.raises(bp.DataError, match="X has no samples"):
        gradient_check(net, X[:0], T[:0])
    with pytest.raises(bp.DataError, match="X has 8 samples, T has 7"):
        gradient_check(net, X, T[:7])
    with pytest.raises(bp.DataError, match="nan"):
        gradient_check(net, X * np.nan, T)
    with pytest.raises(bp.DataError, match="sample_weight"):
        gradient_check(net, X, T, sample_weight=np.ones(3))
    with pytest.raises(TypeError):
        gradient_check(net, X, T, momentum=0.9)
    net.W[2][0, 0] = np.nan
    with pytest.raises(bp.DataError, match="the cost is nan at these parameters\nscale X"):
        gradient_check(net, X, T)


# ---------------------------------------------------------------------------------------------- problems drawn


@pytest.mark.parametrize(("output", "cost"), legal_pairs())
def test_problems_suit_the_cost(output, cost):
    net = network([5, 3], output=output)
    X, T = sample_problem(net, 40, 3, cost)
    assert X.shape == (40, 5)
    assert X.dtype == np.float64
    if cost == "cross_entropy":
        assert T.shape == (40,)
        assert set(T) == {0, 1, 2}
    elif cost == "binary_cross_entropy":
        assert T.shape == (40, 3)
        assert set(T.ravel()) == {0.0, 1.0}
    else:
        assert T.shape == (40, 3)
        assert len(set(T.ravel())) == 120
    np.testing.assert_array_equal(X, sample_problem(net, 40, 3, cost)[0])
    assert not np.array_equal(X, sample_problem(net, 40, 4, cost)[0])


def test_problems_that_cannot_be_drawn_are_refused():
    net = network([5, 3])
    for wrong in ({"m": 0}, {"seed": -1}, {"cost": "binary_cross_entropy"}):
        with pytest.raises(bp.ConfigError):
            sample_problem(net, **wrong)
