"""Steps written on a tape are those of the operations, to the last bit; what a tape cannot hold is refused."""

import copy
import dataclasses
import math
import os
import signal
import threading

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu import blas, costs, executors, numpy_ops, recording
from backprop_gpu.activations import HIDDEN, OUTPUT, Activation
from backprop_gpu.optimizers import SGD
from backprop_gpu.recording import Tape, UnrecordableError

M, K = 23, 3  # samples, outputs; batches of 5 leave a last one of 3


@pytest.fixture(autouse=True)
def _without_numba(monkeypatch):
    monkeypatch.setenv("BACKPROP_GPU_FAST", "0")


@pytest.fixture
def data(rng):
    """Bytes and labels, as in image files."""
    return rng.integers(0, 256, (M, 4), dtype=np.uint8), rng.integers(0, K, M)


def trained(monkeypatch, rung, net, X, T, **settings):
    """Theta and everything that a run tells but its time; a run that is "replay" has replayed."""
    settings = {"optimizer": SGD(0.1), "epochs": 2, "batch_size": 5, "seed": 3, **settings}
    replays, replay = [], Tape.replay
    with monkeypatch.context() as m:
        m.setenv("BACKPROP_GPU_EXECUTOR", rung)
        m.setattr(Tape, "replay", lambda tape: [replays.append(1), replay(tape)])
        history = dataclasses.asdict(bp.train(net, X, T, **settings))
    told = history["executor"].split(",")[0]
    assert rung == "auto" or (told, bool(replays)) == (rung, rung == "replay")
    return net.theta.copy(), {k: v for k, v in history.items() if k not in ("seconds", "executor")}, told


def same(monkeypatch, make, X, T, **settings):
    """The run is the same bit for bit with both executors, and not a run that does nothing."""
    before = make().theta.copy()
    plain, history, rung = trained(monkeypatch, "eager", make(), X, T, **settings)
    assert rung == "eager"
    theta, again, rung = trained(monkeypatch, "replay", make(), X, T, **settings)
    assert rung == "replay"
    assert np.isfinite(theta).all()
    assert (plain != before).any()
    assert theta.tobytes() == plain.tobytes()
    assert repr(again) == repr(history)  # NaN included


def network(layers=(4, 6, K), **settings):
    return bp.Network(list(layers), **{"seed": 1, "backend": "numpy", **settings})


def targets(cost, rng, rows):
    if not rows:
        return rng.integers(0, K, M)
    if cost == "cross_entropy":
        return rng.dirichlet(np.ones(K), M)
    return rng.integers(0, 2, (M, K)).astype(float) if cost == "binary_cross_entropy" else rng.normal(size=(M, K))


# -------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_each_activation(monkeypatch, data, hidden, precision):
    same(monkeypatch, lambda: network((4, 6, 5, K), hidden=hidden, precision=precision), *data)


PAIRS = [
    (output, cost)
    for cost in (*costs.COSTS, "huber:delta=0.3")
    for output in OUTPUT
    if costs.COSTS[cost.split(":")[0]].outputs is None or output in costs.COSTS[cost.split(":")[0]].outputs
]


@pytest.mark.parametrize("rows", [False, True], ids=["labels", "rows"])
@pytest.mark.parametrize(("output", "cost"), PAIRS)
def test_each_cost_with_each_output(monkeypatch, rng, output, cost, rows):
    X, T = rng.normal(size=(M, 4)), targets(cost, rng, rows)
    same(monkeypatch, lambda: network(output=output), X, T, cost=cost, optimizer=SGD(0.01), epochs=1)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(
    "rule",
    [
        SGD(0.1, weight_decay=0.01), SGD(0.1, momentum=0.9), SGD(0.1, momentum=0.9, weight_decay=0.01),
        SGD(0.1, momentum=0.9, nesterov=True), bp.Adam(0.01), bp.Adam(0.01, weight_decay=0.1), bp.Adam(amsgrad=True),
        bp.AdamW(0.01), bp.AdaGrad(0.01), bp.AdaGrad(0.01, lr_decay=0.1, weight_decay=0.1), bp.RMSProp(0.01),
        bp.RMSProp(0.01, weight_decay=0.1, momentum=0.5, centered=True), bp.AdaDelta(), bp.AdaDelta(weight_decay=0.1),
        bp.NAdam(), bp.NAdam(weight_decay=0.1), bp.Lion(), bp.Lion(weight_decay=0.1),
    ],
    ids=repr,
)  # fmt: skip
def test_each_rule(monkeypatch, data, rule, precision):
    same(monkeypatch, lambda: network(precision=precision), *data, optimizer=rule, schedule="cosine")


WEIGHTS = np.arange(M) % 4 / 2  # some are 0


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        ({}, {"sample_weight": WEIGHTS}),
        ({}, {"sample_weight": WEIGHTS, "reduction": "sum"}),
        ({}, {"class_weight": "balanced"}),
        ({}, {"sample_weight": WEIGHTS, "class_weight": {0: 2.0, 1: 0.5, 2: 1.0}}),
        ({}, {"reduction": "sum"}),
        ({}, {"label_smoothing": 0.1}),
        ({"output": "sigmoid"}, {"label_smoothing": 0.1}),
        ({}, {"l1": 0.01, "l2": 0.1}),
        ({}, {"clip_norm": 0.1}),
        ({}, {"clip_value": 0.01, "l2": 0.1}),
        ({"layers": (4, 6, 5, K)}, {"frozen": 1}),
        ({"layers": (4, 6, 5, K)}, {"frozen": 2, "optimizer": "adam"}),
        ({}, {"batches": "chunks", "epochs": 4}),
        ({}, {"batches": "in_order"}),
        ({}, {"batch_size": 1}),
        ({}, {"batch_size": "full"}),
        ({"bias": False}, {}),
        ({"layers": (4, 6, 5, K), "bias": [True, False, True]}, {}),
        ({"layers": (4, K)}, {}),
        ({"layers": (4, K), "bias": False, "output": "sigmoid"}, {}),
        ({"layers": (4, 6, 5, 7, K), "hidden": ["relu", "swish", "tanh"]}, {"optimizer": "adam"}),
        ({"layers": (4, 6, 1), "output": "sigmoid"}, {"labels": 2}),
        ({}, {"schedule": "one_cycle", "epochs": 3}),
        ({}, {"schedule": "plateau", "validation": 0.2, "epochs": 3}),
        ({}, {"gradient_norms": True, "gradient_error": True, "patience": 2, "validation": 0.2}),
    ],
    ids=repr,
)
def test_each_setting(monkeypatch, data, build, settings):
    X, T = data
    settings = dict(settings)
    T = T % settings.pop("labels", K)
    same(monkeypatch, lambda: network(**build), X, T, **settings)


def test_rules_on_more_than_one_block(monkeypatch, data):
    monkeypatch.setattr(numpy_ops, "BLOCK", 16)
    same(monkeypatch, lambda: network((4, 9, K), hidden="gelu"), *data, optimizer="adam")


# --------------------------------------------------------------------------------- what runs eagerly, and what not


own = Activation.of("soft", lambda xp, Z: Z / (1 + abs(Z)), lambda xp, Z: 1 / (1 + abs(Z)) ** 2)
squares = bp.Cost.of("squares", lambda xp, Y, T: ((Y - T) ** 2).sum(axis=1) / 2, lambda xp, Y, T: Y - T)


@dataclasses.dataclass(frozen=True)
class Rule(SGD):
    """One of somebody's own, which no tape could hold."""

    def apply(self, xp, theta, g, slots, c, s):
        theta -= c[0] * g if float(abs(g).max()) < 1e9 else 0


@pytest.mark.parametrize(
    ("build", "settings", "like"),
    [
        ({"dropout": 0.3}, {}, None),
        ({"hidden": own}, {}, None),
        ({"output": own}, {}, None),
        ({"hidden": HIDDEN["relu"]._replace(value=HIDDEN["tanh"].value)}, {}, None),
        ({"output": "identity"}, {"cost": squares}, {"cost": "squared_error"}),
        ({}, {"optimizer": Rule(0.1)}, {"optimizer": SGD(0.1)}),
    ],
    ids=["dropout", "hidden", "output", "a built-in name", "cost", "rule"],
)
def test_what_may_do_anything_runs_eagerly(monkeypatch, data, build, settings, like):
    net = network(precision="float64", **build)
    theta, history, rung = trained(monkeypatch, "auto", net, *data, **{"epochs": 12, **settings})
    assert rung == "eager"
    assert history["train_cost"][-1] < history["train_cost"][0]
    if like:
        wanted, _, rung = trained(
            monkeypatch, "eager", network(precision="float64", **build), *data, **{"epochs": 12, **like}
        )
        np.testing.assert_allclose(theta, wanted, rtol=1e-10, atol=1e-13)


def test_what_is_recorded_by_itself_is_all_the_rest(monkeypatch, data):
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", "auto")
    assert bp.train(network(), *data, epochs=1).executor == "replay"


def test_a_step_that_a_tape_cannot_hold_is_taken_all_the_same(monkeypatch, data):
    """A number that leaves the arrays in the middle of a step: no half a step stays, and the run is eager."""
    plain = numpy_ops.hidden_delta

    def looks(W, Delta, *rest):
        assert math.isfinite(float(Delta[:1, :1].reshape(()))) or True
        plain(W, Delta, *rest)

    wanted, history, _ = trained(monkeypatch, "eager", network(), *data)
    monkeypatch.setattr(numpy_ops, "hidden_delta", looks)
    theta, again, rung = trained(monkeypatch, "auto", network(), *data)
    assert rung == "eager"
    np.testing.assert_array_equal(theta, wanted)
    assert repr(again) == repr(history)


# ------------------------------------------------------------------------------------------------ in the middle


def outcome(monkeypatch, rung, net, X, T, **settings):
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", rung)
    with pytest.raises(bp.DivergenceError) as e:
        bp.train(net, X, T, batch_size=5, **settings)
    return str(e.value), net.theta.tobytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": SGD(300.0), "epochs": 50},
        {"optimizer": SGD(0.1), "schedule": lambda step, total: 1e39 if step == 7 else 1.0},
        {"optimizer": bp.Adam(1e39)},
        {"optimizer": bp.AdamW(weight_decay=1e42)},
    ],
    ids=["diverges", "a risky step late", "a risky first step", "decay"],
)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_divergence(monkeypatch, rng, settings):
    X = 3 * rng.normal(size=(M, 4))
    seen = [outcome(monkeypatch, rung, network((4, 8, 4), output="identity"), X, X, **settings)
            for rung in ("eager", "replay")]  # fmt: skip
    assert seen[0] == seen[1]
    assert np.isfinite(np.frombuffer(seen[1][1], np.float32)).all()


def test_a_risky_step_that_goes_well(monkeypatch, data):
    """Huge steps, from which theta and slots are kept to be put back: nothing is, here."""
    rule = SGD(1e13, momentum=0.5)
    same(monkeypatch, network, *data, optimizer=rule, schedule=lambda step, total: 1e-3 if step % 3 else 1e-1, epochs=1)


def test_ctrl_c_waits_for_the_whole_step(monkeypatch, data):
    """It comes inside the third step, between two calls of a tape: that step is finished, no other begun."""
    thetas, calls, plain = [], [], blas.matmul

    class Keep:
        def on_step(self, run):
            thetas.append(run.net.theta.copy())

    def product(a, b, out):
        if len(thetas) == 2 and not calls:
            calls.append(1)
            os.kill(os.getpid(), signal.SIGINT)
        return plain(a, b, out)

    wanted = []
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", "eager")
    bp.train(network(), *data, batch_size=5, epochs=1, callbacks=[lambda run: None, type(
        "Eager", (), {"on_step": lambda self, run: wanted.append(run.net.theta.copy())})()])  # fmt: skip
    monkeypatch.setenv("BACKPROP_GPU_EXECUTOR", "replay")
    monkeypatch.setattr(blas, "matmul", product)
    net = network()
    with pytest.raises(KeyboardInterrupt):
        bp.train(net, *data, batch_size=5, callbacks=[Keep()])
    assert len(thetas) == 3
    np.testing.assert_array_equal(net.theta, wanted[2])


def test_runs_in_two_threads(monkeypatch, data):
    wanted = trained(monkeypatch, "eager", network(), *data, epochs=10)[0]
    nets = [network() for _ in range(3)]
    threads = [
        threading.Thread(target=bp.train, args=(net, *data), kwargs={"optimizer": SGD(0.1), "epochs": 10,
                         "batch_size": 5, "seed": 3}) for net in nets
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for net in nets:
        np.testing.assert_array_equal(net.theta, wanted)


def test_a_second_run_starts_afresh(monkeypatch, data):
    nets = {rung: network() for rung in ("eager", "replay")}
    for settings in ({"optimizer": "adam"}, {"optimizer": "adam"}, {"batch_size": 7, "cost": "norm"}):
        thetas = [trained(monkeypatch, rung, net, *data, **settings)[0] for rung, net in nets.items()]
        np.testing.assert_array_equal(*thetas)


class Busy:
    """Uses the same scratch memory after each step, larger than it was for the steps; and trains another network."""

    def __init__(self, rng):
        self.X, self.T = rng.normal(size=(1500, 4)), rng.integers(0, K, 1500)

    def on_step(self, run):
        if run.step % 3 == 2:
            bp.evaluate(run.net, self.X, self.T, cost="norm")
            run.net.gradients(self.X, self.T)
            run.net.predict(self.X)
            other = copy.deepcopy(run.net)
            bp.train(other, self.X, self.T, cost="huber", optimizer="rmsprop", epochs=1, batch_size=400)


@pytest.mark.parametrize("cost", ["cross_entropy", "norm", "huber"])
def test_other_work_between_steps_changes_nothing(monkeypatch, data, rng, cost):
    settings = {"cost": cost, "optimizer": "adam", "epochs": 2}
    alone = trained(monkeypatch, "eager", network(hidden="gelu"), *data, **settings)
    busy = trained(monkeypatch, "replay", network(hidden="gelu"), *data, callbacks=[Busy(rng)], **settings)
    np.testing.assert_array_equal(busy[0], alone[0])
    assert repr(busy[1]) == repr(alone[1])


def test_a_larger_batch_after_a_smaller_one(monkeypatch, data):
    """A chunk of 3 first, then chunks of 5, for which scratch memory is made anew."""
    X, T = data
    for seed in range(4):
        numpy_ops._thread.__dict__.clear()
        same(monkeypatch, network, X, T, batches="chunks", seed=seed, cost="norm")


# ---------------------------------------------------------------------------------------------------- the tape


@pytest.fixture
def tape():
    return Tape()


def test_a_replay_makes_the_calls_again(tape):
    a, b, out = np.array([[1.0, 2.0]]), np.array([[3.0], [4.0]]), np.empty((1, 1))
    best, picked = np.empty(1, np.intp), np.empty(1)
    A, B, O = map(tape.watched, (a, b, out))
    A *= 2
    A[:, :1] = 5
    np.add(A, 1, out=A, where=np.array([[False, True]]))
    np.matmul(A, B, out=O)
    np.argmax(A, axis=1, out=tape.watched(best))
    np.take(A.reshape(-1), tape.watched(best), out=tape.watched(picked), mode="clip")
    A.max(axis=1, keepdims=True, out=O[:, :1])
    np.put(B.T.reshape(-1), np.array([1]), 7.0, mode="clip")
    recording.noted(lambda x: np.negative(x, out=x), B)
    assert (out, a.tolist(), b.tolist()) == (5, [[5, 5]], [[-3], [-7]])
    a[...], b[...] = [[0.0, 4.0]], [[1.0], [1.0]]
    tape.replay()
    assert (out, a.tolist(), b.tolist(), best, picked) == (9, [[5, 9]], [[-1], [-7]], 1, 9)


def test_reading_what_is_not_watched_is_written_down_too(tape):
    plain, seen = np.ones(3), np.zeros(3)
    np.copyto(tape.watched(seen), plain)
    np.copyto(plain, tape.watched(seen))
    plain += tape.watched(seen)
    plain[...] = 4
    tape.replay()
    assert seen.tolist() == [4, 4, 4]
    assert plain.tolist() == [8, 8, 8]


def test_nothing_else_changes_for_who_does_not_watch(tape):
    x = np.ones(2)
    recording.noted(lambda a: np.negative(a, out=a), x)
    assert x.tolist() == [-1, -1]
    assert not tape.calls
    with numpy_ops.recording(tape):
        assert not isinstance(numpy_ops.scratch("x", (3,), np.float32), np.ndarray)
    assert isinstance(numpy_ops.scratch("x", (3,), np.float32), np.ndarray)


plain = np.arange(12.0).reshape(3, 4)
REFUSED = {
    "float": lambda a: float(a[:1, 0].reshape(())),
    "int": lambda a: int(a[:1, 0].reshape(())),
    "complex": lambda a: complex(a[:1, 0].reshape(())),
    "index": lambda a: range(5)[a[:1, 0].reshape(())],
    "bool": bool,
    "if": lambda a: 1 if a > 0 else 2,
    "math": lambda a: math.sqrt(a[:1, 0].reshape(())),
    "in": lambda a: 3 in a,
    "list": list,
    "for": lambda a: [row for row in a],  # noqa: C416
    "an element": lambda a: a[0, 0],
    "write an element": lambda a: a.__setitem__((0, 0), 1),
    "an index array": lambda a: a[[0, 1]],
    "write an index array": lambda a: a.__setitem__(np.array([0, 1]), 1),
    "a mask": lambda a: a[plain > 3],
    "write a mask": lambda a: a.__setitem__(plain > 3, 1),
    "as an index": lambda a: plain[a],
    "in an index": lambda a: a[a],
    "one of several in an index": lambda a: a[a, 0],
    "a copy by reshape": lambda a: a.T.reshape(-1),
    "a + b": lambda a: a + 1,
    "b + a": lambda a: plain + a,
    "a @ b": lambda a: a @ plain.T,
    "-a": lambda a: -a,
    "a == b": lambda a: a == plain,
    "exp": np.exp,
    "out None": lambda a: np.exp(a, out=None),
    "two outs": lambda a: np.modf(a, out=(plain.copy(), plain.copy())),
    "add.at": lambda a: np.add.at(a, [0], 1),
    "reduce": np.add.reduce,
    "isfinite": lambda a: np.isfinite(a).all(),
    "assigned to an array": lambda a: plain.copy().__setitem__(..., a),
    "take by it": lambda a: np.take(plain, a, out=plain.copy()),
    "array.take by it": lambda a: plain.take(a),
    "array.dot": lambda a: plain.T.dot(a),
    "array out of a method": lambda a: np.arange(4.0).put([0], a),
    "np.array": np.array,
    "np.asarray": np.asarray,
    "np.ascontiguousarray": np.ascontiguousarray,
    "np.frombuffer": np.frombuffer,
    "np.fromiter": lambda a: np.fromiter(a, float),
    "np.nditer": lambda a: np.nditer([a]),
    "memoryview": memoryview,
    "bytes": bytes,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "np.float64": np.float64,
    **{
        f"np.{f.__name__}": f
        for f in (
            np.sum,
            np.max,
            np.mean,
            np.var,
            np.count_nonzero,
            np.where,
            np.nonzero,
            np.any,
            np.all,
            np.sort,
            np.linalg.norm,
            np.copy,
            np.ravel,
            np.zeros_like,
            np.transpose,
            np.fft.fft,
        )
    },
    "np.array_equal": lambda a: np.array_equal(a, plain),
    "np.dot": lambda a: np.dot(a, plain.T),
    "np.dot with out": lambda a: np.dot(a, plain.T, out=np.empty((3, 3))),
    "np.einsum": lambda a: np.einsum("ij->i", a),
    "np.clip": lambda a: np.clip(a, 0, 1, out=a),
    "np.take without out": lambda a: np.take(a, [0]),
    "np.argmax without out": np.argmax,
    "np.vstack": lambda a: np.vstack([a, plain]),
    "max": lambda a: a.max(),
    "sum": lambda a: a.sum(),
    **{
        f".{name}": lambda a, name=name: getattr(a, name)()
        for name in "min mean var std prod all any dot fill put take sort argsort partition clip cumsum copy astype "
        "item tolist tobytes tofile dump flatten ravel nonzero argmax argmin trace diagonal repeat choose compress "
        "searchsorted round byteswap resize setflags view swapaxes transpose squeeze".split()
    },
    **{
        f".{name}": lambda a, name=name: getattr(a, name)
        for name in "flat data ctypes base real imag flags strides nbytes".split()
    },
}


@pytest.mark.parametrize("use", REFUSED)
def test_refused(tape, use):
    a = plain.copy()
    with pytest.raises((UnrecordableError, TypeError)) as e:
        REFUSED[use](tape.watched(a))
    if e.type is TypeError:  # Python's and NumPy's own word for what is no array
        assert use in ("memoryview", "np.frombuffer")
    assert not tape.calls
    np.testing.assert_array_equal(a, plain)


def test_its_outside_is_that_of_the_array(tape):
    a = tape.watched(np.zeros((3, 4), np.float32))
    assert (a.shape, a.ndim, a.size, a.dtype, len(a)) == ((3, 4), 2, 12, np.float32, 3)
    assert (a.T.shape, a[1:, 0].shape, a.reshape(-1, 1).shape, a.reshape((2, 6)).shape) == (
        (4, 3),
        (2,),
        (12, 1),
        (2, 6),
    )
    assert repr(a) == "<watched float32 (3, 4)>"
    with pytest.raises(AttributeError):
        a.shape = (4, 3)


def test_the_executor_records_once_a_size(monkeypatch, data):
    sizes, plain = [], executors.Replay._recorded
    monkeypatch.setattr(executors.Replay, "_recorded", lambda self, m: [sizes.append(m), plain(self, m)][1])
    bp.train(network(), *data, batch_size=5, epochs=3)
    assert sizes == [5, 3]
