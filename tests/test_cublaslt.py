"""The binding of cuBLASLt on a stand-in that reads its descriptors and multiplies with NumPy (see fake_cublaslt)."""

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import pickle
import re
import sys
import threading
import types
from pathlib import Path

import fake_cublaslt
import fake_cupy
import numpy as np
import pytest
from fake_cublaslt import from_bf16, tf32, to_bf16

from backprop_gpu import BackendError, cublaslt

WIDTHS = ((1, 1), (1, 785), (785, 1), (10, 100), (100, 10), (127, 127), (100, 785), (785, 127))
BATCHES = 1, 33, 128, 257
FORWARD = ("", "b", "relu", "relu b", "relu mask", "relu mask b")
HIDDEN = ("", "mask", "mask db")
GRADIENT = ("", "alpha", "db")
CASES = [
    *(("forward", extras) for extras in FORWARD),
    *(("hidden_delta", extras) for extras in HIDDEN),
    *(("weight_gradient", extras) for extras in GRADIENT),
]
ERROR = {"float32": 3e-7, "tf32": 2e-3, "bf16": 1e-2, "float64": 1e-15}  # relative to the largest sum of |products|


def host_address(a):
    return a.ctypes.data


@pytest.fixture
def fake():
    """The stand-in; nothing of it is left alive after the test, and nothing in it crashed."""
    fake = fake_cublaslt.Library()
    yield fake
    gc.collect()
    assert not fake.crashes
    assert not fake.live


@pytest.fixture
def library(fake):
    library = cublaslt.Library(fake, host_address)
    yield library
    library.close()


class Memory:
    """Makes arrays whose memory the stand-in knows."""

    def __init__(self, fake, rng, precision="float32", pad=0, offset=0):
        self.fake, self.rng, self.precision, self.pad, self.offset = fake, rng, precision, pad, offset
        self.result = np.dtype(np.float64 if precision == "float64" else np.float32)
        self.whole = []  # (memory, what was handed out)

    def array(self, *shape, dtype=None):
        """NaNs, in rows `pad` longer than the last of the shape, `offset` elements from a 256-byte boundary."""
        dtype = np.dtype(dtype or self.result)
        *_, width = shape
        ld = width + (self.pad if len(shape) == 2 and dtype != np.uint8 else 0)
        size = (shape[0] - 1) * ld + width if len(shape) == 2 else width
        raw = np.full((size + self.offset) * dtype.itemsize + 256, 0xFF, np.uint8)
        start = -raw.ctypes.data % 256 + self.offset * dtype.itemsize
        if dtype == np.uint8:
            start = -raw.ctypes.data % 256
        flat = raw[start : start + size * dtype.itemsize].view(dtype)
        self.fake.own(flat)
        strides = (ld * dtype.itemsize, dtype.itemsize)[-len(shape) :]
        a = np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=True)
        self.whole.append((flat, a))
        return a

    def operand(self, *shape):
        """(what is handed over, what it stands for in float64, rounded as the precision rounds)."""
        values = self.rng.standard_normal(shape).astype(self.result)
        stored = to_bf16(values) if self.precision == "bf16" else values
        a = self.array(*shape, dtype=stored.dtype)
        a[...] = stored
        rounded = (
            from_bf16(stored) if self.precision == "bf16" else tf32(values) if self.precision == "tf32" else values
        )
        return a, rounded.astype(np.float64), values.astype(np.float64)

    def vector(self, n):
        v = self.array(n)
        v[...] = self.rng.standard_normal(n)
        return v

    def check_gaps(self):
        """What lies between rows is as it was."""
        for flat, a in self.whole:
            if a.ndim == 2 and a.strides[0] != a.shape[1] * a.itemsize:
                untouched = np.ones(flat.size, bool)
                np.lib.stride_tricks.as_strided(untouched, a.shape, [s // a.itemsize for s in a.strides])[...] = False
                assert (flat.view(np.uint8).reshape(flat.size, -1)[untouched] == 0xFF).all()


def bits(mask, N):
    return np.unpackbits(mask, axis=1, bitorder="little")[:, :N].astype(bool)


def packed(memory, m, N, on):
    mask = memory.array(*cublaslt.mask_shape(m, N), dtype=np.uint8)
    mask[...] = 0xFF
    mask[:, : -(-N // 8)] = np.packbits(np.pad(on, ((0, 0), (0, -N % 8)), constant_values=True), 1, bitorder="little")
    return mask


class Case:
    """A product, what it shall give, and how far from that it may be."""

    def __init__(self, library, memory, name, extras, N, K, m, workspace=None):
        self.memory, extras = memory, extras.split()
        self.expected = []  # (array, exact, sum of magnitudes)
        self.mask = None
        how = {"precision": memory.precision, "workspace": workspace}
        if name == "forward":
            (W, w, w0), (A, a, a0) = memory.operand(N, K), memory.operand(m, K)
            Z, b = memory.array(m, N), memory.vector(N) if "b" in extras else None
            mask = memory.array(*cublaslt.mask_shape(m, N), dtype=np.uint8) if "mask" in extras else None
            z, z0 = a @ w.T, a0 @ w0.T
            size = np.abs(a) @ np.abs(w).T
            if b is not None:
                z, z0, size = z + b, z0 + b, size + np.abs(b)
            if mask is not None:
                self.mask = mask, z, size
            if "relu" in extras:
                z, z0 = np.maximum(z, 0), np.maximum(z0, 0)
            self.expected = [(Z, z, z0, size)]
            self.make = lambda: cublaslt.forward(library, W, A, Z, b, "relu" in extras, mask, **how)
        elif name == "hidden_delta":
            (W, w, w0), (Delta, delta, delta0) = memory.operand(N, K), memory.operand(m, N)
            out, on = memory.array(m, K), memory.rng.random((m, K)) < 0.6
            mask = packed(memory, m, K, on) if "mask" in extras else None
            db = memory.array(K) if "db" in extras else None
            on = on if mask is not None else 1
            d, d0, size = on * (delta @ w), on * (delta0 @ w0), np.abs(delta) @ np.abs(w)
            self.expected = [(out, d, d0, size)]
            if db is not None:
                self.expected.append((db, d.sum(0), d0.sum(0), size.sum(0)))
            self.make = lambda: cublaslt.hidden_delta(library, W, Delta, out, mask, db, **how)
        else:
            (Delta, delta, delta0), (A, a, a0) = memory.operand(m, N), memory.operand(m, K)
            dW, db = memory.array(N, K), memory.array(N) if "db" in extras else None
            alpha = 0.25 if "alpha" in extras else 1.0
            self.expected = [(dW, alpha * delta.T @ a, alpha * delta0.T @ a0, np.abs(delta).T @ np.abs(a))]
            if db is not None:
                self.expected.append((db, delta.sum(0), delta0.sum(0), np.abs(delta).sum(0)))
            self.make = lambda: cublaslt.weight_gradient(library, Delta, A, dW, db, alpha, **how)

    def wrong(self):
        """What the numbers say against the result; nothing if it is right."""
        eps = 8 * np.finfo(self.memory.result).eps
        for array, rounded, exact, size in self.expected:
            scale = np.max(size) + 1e-30
            if not np.abs(array - rounded).max() <= eps * scale:  # a NaN is wrong too
                return f"{np.abs(array - rounded).max() / scale} from what the precision gives"
            if not np.abs(array - exact).max() <= (ERROR[self.memory.precision] + eps) * scale:
                return f"{np.abs(array - exact).max() / scale} from float64"
        if self.mask is not None:
            mask, z, size = self.mask
            clear = np.abs(z) > eps * size
            if (bits(mask, z.shape[1]) != (z > 0))[clear].any():
                return "the mask"
        return None


# ------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("precision", cublaslt.PRECISIONS)
@pytest.mark.parametrize(("name", "extras"), CASES)
@pytest.mark.parametrize("pad", [0, 3])
def test_products(fake, library, rng, name, extras, precision, pad):
    for N, K in WIDTHS:
        for m in BATCHES:
            if N * K > 10_000 and m > 33 and pad:  # the same again, at length
                continue
            memory = Memory(fake, rng, precision, pad)
            case = Case(library, memory, name, extras, N, K, m)
            product = case.make()
            if N == 1 and (extras.startswith("mask") or (name, extras) == ("weight_gradient", "db")):
                assert "NOT_SUPPORTED" in product.reason  # as the library itself
                continue
            assert product.reason is None
            product.run(0x5EED)
            assert case.wrong() is None, (N, K, m)
            assert fake.ran[-1] == (0, 0x5EED)
            memory.check_gaps()
            fake.memory.clear()


def test_a_row_and_a_column(fake, library, rng):
    """Of one row or one column the strides say nothing."""
    W, A, Z = fake.own(rng.random((1, 5), np.float32)), rng.random((7, 5), np.float32), np.empty((7, 3), np.float32)
    fake.own(A, Z)
    cublaslt.forward(library, W, A, Z[:, :1]).run(0)
    np.testing.assert_allclose(Z[:, :1], A @ W.T, rtol=1e-6)
    one = np.lib.stride_tricks.as_strided(W, (1, 5), (4, 4))
    assert cublaslt.forward(library, one, A, Z[:, :1]).plan.A.ld == 5


def test_what_the_stand_in_rounds():
    x = np.array([1, 1 + 2**-11, 1 + 2**-11 + 2**-20, -1 - 2**-11, 1 + 2**-10, 3.0e38], np.float32)
    np.testing.assert_array_equal(tf32(x)[:5], np.array([1, 1 + 2**-10, 1 + 2**-10, -1 - 2**-10, 1 + 2**-10]))
    x = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -2.5], np.float32)
    np.testing.assert_array_equal(from_bf16(to_bf16(x)), np.array([1, 1, 1 + 2**-6, 1 + 2**-7, -2.5]))


def test_the_mask_goes_from_forward_to_hidden_delta(fake, library, rng):
    """As in training: Delta[l] = f'(Z[l]) ⊙ (Delta[l+1] W[l+1])."""
    m, below, here, above = 33, 20, 130, 7
    memory = Memory(fake, rng)
    (W1, w1, _), (A, a, _) = memory.operand(here, below), memory.operand(m, below)
    (W2, w2, _), (Delta2, delta2, _) = memory.operand(above, here), memory.operand(m, above)
    b = memory.vector(here)
    Z, Delta, db = memory.array(m, here), memory.array(m, here), memory.array(here)
    mask = memory.array(*cublaslt.mask_shape(m, here), dtype=np.uint8)
    assert mask.shape == (33, 32)
    cublaslt.forward(library, W1, A, Z, b, True, mask).run(0)
    cublaslt.hidden_delta(library, W2, Delta2, Delta, mask, db).run(0)
    expected = (a @ w1.T + b > 0) * (delta2 @ w2)
    np.testing.assert_allclose(Delta, expected, atol=1e-5)
    np.testing.assert_allclose(db, expected.sum(0), atol=1e-4)


def test_mask_shape():
    assert [cublaslt.mask_shape(3, N) for N in (1, 128, 129, 785)] == [(3, 16), (3, 16), (3, 32), (3, 112)]


def test_relu_hides_a_nan(fake, library, rng):
    memory = Memory(fake, rng)
    (W, *_), (A, *_), Z = memory.operand(2, 3), memory.operand(4, 3), memory.array(4, 2)
    A[1] = np.nan
    cublaslt.forward(library, W, A, Z, relu=True).run(0)
    assert (Z[1] == 0).all()


def test_arrays_of_the_stand_in_for_cupy(fake, rng):
    library = cublaslt.Library(fake, lambda a: a._a.ctypes.data)
    W, A, Z = (fake.own(rng.random(shape)) for shape in ((5, 4), (6, 4), (6, 5)))
    b, mask = fake.own(rng.random(5)), fake.own(np.zeros(cublaslt.mask_shape(6, 5), np.uint8))
    product = cublaslt.forward(library, *map(fake_cupy.ndarray, (W, A, Z, b)), True, fake_cupy.ndarray(mask))
    product.run(0)
    np.testing.assert_allclose(Z, A @ W.T + b)
    assert bits(mask, 5).all()
    library.close()


def test_a_numpy_array_has_no_device_address(fake, rng):
    library = cublaslt.Library(fake)
    a = fake.own(rng.random((3, 3)))
    with pytest.raises(AttributeError):
        cublaslt.forward(library, a, a, a.copy())
    library.close()
    assert cublaslt._device_address(types.SimpleNamespace(data=types.SimpleNamespace(ptr=77))) == 77


# ------------------------------------------------------------------------------------------------- what is on offer


def simple(fake, library, rng, name="forward", extras="relu mask b", **how):
    return Case(library, Memory(fake, rng, **how), name, extras, 20, 12, 9)


def test_candidates(fake, library, rng):
    space = fake.own(Memory(fake, rng).array(2 << 20, dtype=np.uint8))
    case = Case(library, Memory(fake, rng), "forward", "b", 20, 12, 9, space)
    product = case.make()
    assert product.candidates == ((0, 0.5), (1 << 20, 1.5), (0, 2.5))  # the fourth needs more space
    assert fake.asked[-1] == (256, 256, 256, 256, 2 << 20)
    for index in (1, 2, 0, -1):
        product.choose(index)
        product.run(0)
        assert case.wrong() is None
        assert fake.ran[-1][0] == product.chosen == index % 3
    with pytest.raises(IndexError):
        product.choose(3)
    assert product.config(1) == {"id": 1, "tile": 11, "split_k": 21, "reduction": 31, "stages": 61, "cluster": 81}


def test_without_a_workspace(fake, library, rng):
    product = simple(fake, library, rng).make()
    assert [c.workspace for c in product.candidates] == [0, 0]
    assert product.plan.workspace == 0


def test_alignments_are_those_of_the_arrays(fake, library, rng):
    case = simple(fake, library, rng, offset=1)
    product = case.make()
    assert fake.asked[-1][:4] == (4, 4, 4, 4)
    assert len(product.candidates) == 1  # the other one needs 16 bytes
    product.run(0)
    assert case.wrong() is None
    W, A, Z = (memory.array(n, 4) for memory, n in ((Memory(fake, rng, offset=o), 4) for o in (1, 2, 4)))
    cublaslt.forward(library, W, A, Z)
    assert fake.asked[-1][:4] == (4, 8, 16, 16)
    assert [cublaslt._alignment(a) for a in (1 << 20, 256, 128, 48, 6, 3)] == [256, 256, 128, 16, 2, 1]


def test_nothing_on_offer(fake, library, rng):
    fake.algorithms = ()
    product = simple(fake, library, rng).make()
    assert product.reason.startswith("cuBLASLt 120903 offers no algorithm for forward RELU_AUX_BIAS float32 m=20 n=9")
    assert product.candidates == ()
    assert len(fake.live) == 1  # the handle: the descriptors are given back at once
    with pytest.raises(BackendError, match="offers no algorithm"):
        product.run(0)
    with pytest.raises(BackendError, match="offers no algorithm"):
        product.time(lambda run: 1.0)


@pytest.mark.parametrize(("status", "name"), [(15, "NOT_SUPPORTED"), (8, "ARCH_MISMATCH")])
def test_the_heuristic_says_no(fake, library, rng, status, name):
    fake.fail = {"cublasLtMatmulAlgoGetHeuristic": (0, status)}
    assert simple(fake, library, rng).make().reason.endswith(name)


def test_results_that_are_no_offer(fake, library, rng, monkeypatch):
    """Each result has a status of its own, and may ask for more workspace than there is."""
    ask = fake.cublasLtMatmulAlgoGetHeuristic

    def spoilt(*arguments):
        status = ask(*arguments)
        results = arguments[8]
        results[0].state, results[1].workspace = 15, 1
        return status

    monkeypatch.setattr(fake, "cublasLtMatmulAlgoGetHeuristic", spoilt)
    product = simple(fake, library, rng).make()
    assert product.candidates == ()
    assert product.reason


def test_timing_chooses_the_fastest(fake, library, rng):
    product = simple(fake, library, rng).make()

    def measure(run, taken=iter([3.0, 2.0])):
        run(5)
        return next(taken)

    assert product.time(measure) == [3.0, 2.0]
    assert product.chosen == 1
    assert fake.ran[-2:] == [(0, 5), (2, 5)]
    assert product.time(lambda run: 1.0) == [1.0, 1.0]
    assert product.chosen == 0  # of equals the one that cuBLASLt thinks the fastest
    assert product.time(lambda run: 1.0, first=1) == [1.0]


def test_timing_with_algorithms_that_fail(fake, library, rng):
    product = simple(fake, library, rng).make()

    def measure(run):
        run(0)
        return 1.0

    fake.fail = {"cublasLtMatmul": (0, 13)}
    assert product.time(measure) == [np.inf, 1.0]
    assert product.chosen == 1
    fake.fail = {"cublasLtMatmul": (2, 13)}
    with pytest.raises(cublaslt.CublasLtError, match="EXECUTION_FAILED"):
        product.time(measure, first=1)


def test_by_events(fake, library, rng, monkeypatch):
    class Event:
        now = 0

        def record(self, stream):
            Event.now += 1
            self.at = (Event.now, len(fake.ran))

        def synchronize(self):
            pass

    def elapsed(start, stop):
        assert stop.at[1] - start.at[1] == 10
        return float(stop.at[0])  # ms

    cuda = types.SimpleNamespace(Event=Event, get_elapsed_time=elapsed)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    product = simple(fake, library, rng).make()
    measure = cublaslt.by_events(types.SimpleNamespace(ptr=3), runs=10, best_of=4)
    assert measure(product.run) == pytest.approx(2 / 1000 / 10)
    assert len(fake.ran) == 41
    assert fake.ran[0] == (0, 3)


# ------------------------------------------------------------------------------------------ runs, captures, owners


def test_a_run_is_one_call_with_the_same_arguments(fake, library, rng):
    product = simple(fake, library, rng).make()
    before, arguments = len(fake.calls), product._arguments
    fake.capturing = True
    product.run(1)
    product.run(2)
    assert fake.calls[before:] == ["cublasLtMatmul"] * 2
    assert product._arguments is arguments
    fake.capturing = False


def test_a_capture_needs_an_algorithm(fake, library, rng):
    product = simple(fake, library, rng).make()
    product._arguments = tuple(None if i == 12 else a for i, a in enumerate(product._arguments))
    product.run(0)
    assert fake.ran == [(None, 0)]
    fake.capturing = True
    with pytest.raises(cublaslt.CublasLtError, match="NOT_SUPPORTED"):
        product.run(0)
    fake.capturing = False


def test_arrays_live_as_long_as_the_product(fake, library, rng):
    product = simple(fake, library, rng).make()
    assert [a is not None for a in product.arrays] == [True] * 5 + [False]


def test_descriptors_are_given_back(fake, library, rng):
    product = simple(fake, library, rng).make()
    kinds = {k: fake.count(k) for k in fake_cublaslt.KINDS}
    assert kinds == {
        "cublasLt": 1, "cublasLtMatmulDesc": 1, "cublasLtMatrixLayout": 3, "cublasLtMatmulPreference": 0
    }  # fmt: skip
    del product
    gc.collect()
    assert len(fake.live) == 1
    assert not fake.refusals


def test_closing_twice(fake, library, rng):
    product = simple(fake, library, rng).make()
    arguments = product._arguments
    product.close()
    product.close()
    assert not fake.refusals
    with pytest.raises(BackendError, match="is closed"):
        product.run(0)
    product._arguments = arguments  # had it gone on
    with pytest.raises(cublaslt.CublasLtError, match="INVALID_VALUE"):
        product.run(0)
    assert "destroyed" in fake.refusals[-1]
    other = simple(fake, library, rng).make()
    library.close()
    library.close()
    assert not fake.live
    assert len(fake.refusals) == 1
    with pytest.raises(BackendError, match="is closed"):
        other.run(0)


def test_the_stand_in_sees_a_second_destruction(fake, library):
    made = cublaslt.Owned(fake, "cublasLtMatmulPreference")
    assert not made.close.atexit  # at the end of the process CUDA may be gone
    assert fake.cublasLtMatmulPreferenceDestroy(made.pointer) == 0
    made.close()
    assert "destroyed" in fake.refusals[-1]


def test_the_handle_outlives_the_products(fake, rng):
    library = cublaslt.Library(fake, host_address)
    product = simple(fake, library, rng).make()
    del library
    gc.collect()
    product.run(0)
    assert fake.count("cublasLt") == 1
    del product
    gc.collect()
    assert not fake.live


MAKERS = [name for name in cublaslt.SIGNATURES if name.endswith(("Create", "SetAttribute"))]


@pytest.mark.parametrize("function", MAKERS)
def test_nothing_is_left_after_an_error(fake, rng, function):
    """Whichever call fails, the first of its kind or a later one."""
    failures = []
    for nth in range(8):
        fake.fail, fake._counts = {function: (nth, 3)}, {}
        try:
            library = cublaslt.Library(fake, host_address)
            simple(fake, library, rng).make()
        except cublaslt.CublasLtError as e:
            failures.append((e.function, e.name))
        library = None
        gc.collect()
        assert not fake.live
    assert set(failures) == {(function, "CUBLAS_STATUS_ALLOC_FAILED")}
    assert len(failures) == {
        "cublasLtMatrixLayoutCreate": 3,
        "cublasLtMatmulDescSetAttribute": 6,
        "cublasLtMatmulPreferenceSetAttribute": 5,
    }.get(function, 1)


def test_descriptors_are_given_back_while_an_error_is_held(fake, library, rng):
    """A traceback keeps frames alive: the descriptors do not wait for them."""
    fake.fail = {"cublasLtMatmulAlgoGetHeuristic": (0, 7)}
    with pytest.raises(cublaslt.CublasLtError) as told:
        simple(fake, library, rng).make()
    assert len(fake.live) == 1
    assert told.value.status == 7


def test_what_an_error_says(fake, library, rng):
    product = simple(fake, library, rng).make()
    fake.fail = {"cublasLtMatmul": (0, 13)}
    with pytest.raises(cublaslt.CublasLtError) as told:
        product.run(0)
    assert told.value.cause == (
        "cublasLtMatmul failed for forward RELU_AUX_BIAS float32 m=20 n=9 k=12 ld=12, 12, 20: "
        "CUBLAS_STATUS_EXECUTION_FAILED"
    )
    again = pickle.loads(pickle.dumps(told.value))
    assert (str(again), again.status) == (str(told.value), 13)
    assert cublaslt.CublasLtError("f", 99, "").name == "status 99"


# ---------------------------------------------------------------------------------------------- what is not accepted


def arrays(fake, dtype=np.float32):
    return [fake.own(np.zeros(s, dtype)) for s in ((5, 4), (6, 4), (6, 5))]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_shapes_strides_and_dtypes(fake, library, which):
    for spoil in (
        lambda M: M[:, :-1],
        lambda M: M[:-1, :],
        lambda M: np.asfortranarray(M),
        lambda M: M[::-1],
        lambda M: M.astype(np.float64),
        lambda M: M.astype(np.uint8),
        lambda M: M.view(np.int32),  # as long as what is wanted
        lambda M: np.lib.stride_tricks.as_strided(M, M.shape, (6, 4)),
        lambda M: np.lib.stride_tricks.as_strided(M, M.shape, (22, 4)),  # rows of five and a half
        lambda M: np.lib.stride_tricks.as_strided(M, M.shape, (0, 4)),
        lambda M: np.repeat(M, 2, axis=1)[:, ::2],
    ):
        given = arrays(fake)
        given[which] = spoil(given[which])
        with pytest.raises((ValueError, TypeError)):
            cublaslt.forward(library, *given)
    assert len(fake.live) == 1


def test_other_arguments(fake, library):
    W, A, Z = arrays(fake)
    mask = np.zeros(cublaslt.mask_shape(6, 5), np.uint8)
    for call in (
        lambda: cublaslt.forward(library, W, A, Z, mask=mask),
        lambda: cublaslt.forward(library, W, A, Z, relu=True, mask=mask[:, :8]),
        lambda: cublaslt.forward(library, W, A, Z, relu=True, mask=mask.view(np.int8)),
        lambda: cublaslt.forward(library, W, A, Z, relu=True, mask=np.asfortranarray(mask)),
        lambda: cublaslt.forward(library, W, A, Z, np.zeros(6, np.float32)),
        lambda: cublaslt.forward(library, W, A, Z, np.zeros(10, np.float32)[::2]),
        lambda: cublaslt.forward(library, W, A, Z, np.zeros(5, np.float64)),
        lambda: cublaslt.forward(library, W, A, Z, precision="float16"),
        lambda: cublaslt.forward(library, W, A, Z, precision="float64"),
        lambda: cublaslt.forward(library, W.astype(np.int32), A, Z),
        lambda: cublaslt.forward(library, W[:0], A, Z[:, :0]),
        lambda: cublaslt.forward(library, W, A, Z, workspace=np.zeros(4096, np.uint8)[1:]),
        lambda: cublaslt.forward(library, W, A, Z, workspace=np.zeros(64, np.float32)),
        lambda: cublaslt.hidden_delta(library, W, Z, A, db=np.zeros(4, np.float32)),
        lambda: cublaslt.weight_gradient(library, Z, A, W, np.zeros(5, np.float32), 0.5),
    ):
        with pytest.raises((ValueError, TypeError)):
            call()
    assert len(fake.live) == 1


# ------------------------------------------------------------------------------------------------- planted mistakes

LIES = {
    "A transposed": lambda p: p._replace(transA=1 - p.transA),
    "B transposed": lambda p: p._replace(transB=1 - p.transB),
    "A and B swapped": lambda p: p._replace(A=p.B, B=p.A),
    "m and n swapped": lambda p: p._replace(D=p.D._replace(rows=p.D.columns, columns=p.D.rows)),
    "A turned": lambda p: p._replace(A=p.A._replace(rows=p.A.columns, columns=p.A.rows)),
    "ld of A too long": lambda p: p._replace(A=p.A._replace(ld=p.A.ld + 1)),
    "ld of B too short": lambda p: p._replace(B=p.B._replace(ld=p.B.ld - 1)),
    "ld of D too short": lambda p: p._replace(D=p.D._replace(ld=p.D.ld - 1)),
    "ld of D too long": lambda p: p._replace(D=p.D._replace(ld=p.D.ld + 1)),
    "D in A": lambda p: p._replace(D=p.D._replace(address=p.A.address)),
    "operands in float64": lambda p: p._replace(A=p.A._replace(type=1)),
    "operands in bf16": lambda p: p._replace(A=p.A._replace(type=14), B=p.B._replace(type=14)),
    "TF32": lambda p: p._replace(precision=cublaslt.PRECISIONS["tf32"]),
    "alpha": lambda p: p._replace(alpha=p.alpha * 1.01),
    "no epilogue": lambda p: p._replace(epilogue="DEFAULT"),
    "no bias": lambda p: p._replace(bias=0),
    "mask's ld": lambda p: p._replace(mask_ld=p.mask_ld // 2),
    "no mask": lambda p: p._replace(mask=0),
    "another epilogue": lambda p: p._replace(
        epilogue={"RELU_AUX_BIAS": "RELU_BIAS", "DRELU_BGRAD": "RELU_AUX_BIAS", "BGRADB": "BIAS"}[p.epilogue]
    ),
}


def caught(case):
    """Whether the stand-in refuses the product or its numbers are wrong."""
    try:
        product = case.make()
        if product.reason:
            return True
        product.run(0)
    except cublaslt.CublasLtError:
        return True
    return case.wrong() is not None


PLANTED = [
    (name, extras, lie, square)
    for name, extras in (("forward", "relu mask b"), ("hidden_delta", "mask db"), ("weight_gradient", "db"))
    for lie in LIES
    for square in (False, True)
    if not ("mask" in lie and "mask" not in extras)
    and not (square and lie in ("m and n swapped", "A turned"))  # the same thing then
]


@pytest.mark.parametrize(("name", "extras", "lie", "square"), PLANTED)
def test_planted_mistakes_are_caught(fake, library, rng, monkeypatch, name, extras, lie, square):
    m, N, K = (48, 48, 48) if square else (33, 48, 24)
    assert not caught(Case(library, Memory(fake, rng, pad=2), name, extras, N, K, m))
    real = cublaslt.Product
    monkeypatch.setattr(cublaslt, "Product", lambda library, plan, arrays: real(library, LIES[lie](plan), arrays))
    assert caught(Case(library, Memory(fake, rng, pad=2), name, extras, N, K, m))


@pytest.mark.parametrize(
    ("constant", "wrong"),
    [
        ("DESC_TRANSA", cublaslt.Attribute(5, ctypes.c_int)),
        ("DESC_TRANSB", cublaslt.Attribute(3, ctypes.c_int)),
        ("DESC_EPILOGUE", cublaslt.Attribute(6, ctypes.c_uint32)),
        ("DESC_BIAS_POINTER", cublaslt.Attribute(8, ctypes.c_uint32)),
        ("DESC_AUX_POINTER", cublaslt.Attribute(10, ctypes.c_void_p)),
        ("DESC_AUX_LD", cublaslt.Attribute(12, ctypes.c_int)),
        ("PREF_WORKSPACE", cublaslt.Attribute(1, ctypes.c_uint32)),
        ("PREF_ALIGNMENTS", tuple(cublaslt.Attribute(n, ctypes.c_uint32) for n in (4, 5, 6, 7))),
        ("COMPUTE_32F", None),
    ],
)
def test_a_wrong_number_is_caught(fake, library, rng, monkeypatch, constant, wrong):
    case = simple(fake, library, rng)
    if constant == "COMPUTE_32F":
        table = cublaslt.PRECISIONS | {"float32": cublaslt.PRECISIONS["float32"]._replace(compute=70)}
        monkeypatch.setattr(cublaslt, "PRECISIONS", table)
    else:
        monkeypatch.setattr(cublaslt, constant, wrong)
    assert caught(case)


def test_a_lie_about_alignment_is_caught(fake, library, rng, monkeypatch):
    monkeypatch.setattr(cublaslt, "_alignment", lambda address: 256)
    fake.algorithms = ((0, 16),)
    assert caught(simple(fake, library, rng, offset=1))
    assert "not aligned" in fake.refusals[-1]


# ------------------------------------------------------------------------------------------------------ the library


def no_pathfinder(name):
    raise ModuleNotFoundError(f"No module named {name!r}")


def test_no_library(monkeypatch):
    monkeypatch.setattr(cublaslt.importlib, "import_module", no_pathfinder)
    monkeypatch.setattr(cublaslt, "_names", lambda: ("libno-such-thing.so.1",))
    reason = cublaslt.absent()
    assert "No module named 'cuda.pathfinder'" in reason
    assert "libno-such-thing.so.1" in reason
    with pytest.raises(BackendError, match="no cuBLASLt library") as told:
        cublaslt.Library()
    assert "pip install" in told.value.cure
    assert "\n" not in told.value.cause


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names a library of Linux")
def test_a_library_without_the_functions(monkeypatch):
    """An old or another library of that name is a reason, not a crash."""
    found = types.SimpleNamespace(
        load_nvidia_dynamic_lib=lambda name: types.SimpleNamespace(abs_path="libc.so.6", name=name)
    )
    monkeypatch.setattr(cublaslt.importlib, "import_module", lambda name: found)
    monkeypatch.setattr(cublaslt, "_names", lambda: ("libc.so.6",))
    assert "undefined symbol: cublasLt" in cublaslt.absent()


def test_the_system_is_asked_after_pathfinder(fake, monkeypatch):
    asked = []

    def cdll(name):
        asked.append(name)
        if name == "second":
            return fake
        raise OSError(f"no {name}")

    monkeypatch.setattr(cublaslt.importlib, "import_module", no_pathfinder)
    monkeypatch.setattr(cublaslt.ctypes, "CDLL", cdll)
    monkeypatch.setattr(cublaslt, "_names", lambda: ("first", "second"))
    library = cublaslt.Library()
    assert asked == ["first", "second"]
    assert library.version == 120903
    assert cublaslt.absent() is None
    library.close()


def test_one_library_a_thread_and_device(fake, monkeypatch):
    device = 0
    runtime = types.SimpleNamespace(getDevice=lambda: device)
    cuda = types.SimpleNamespace(runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(cublaslt, "load", lambda: fake)
    monkeypatch.setattr(cublaslt, "_thread", threading.local())
    first = cublaslt.opened()
    assert cublaslt.opened() is first
    device = 1
    second = cublaslt.opened()
    found = []
    thread = threading.Thread(target=lambda: found.append(cublaslt.opened()))
    thread.start()
    thread.join()
    assert len({id(x) for x in (first, second, *found)}) == 3
    assert fake.count("cublasLt") == 3
    for x in (first, second, *found):
        x.close()


# ------------------------------------------------------------------------------------------------------ the probe


@pytest.fixture(scope="module")
def gpu_cublaslt():
    before = sys.path[:]
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    try:
        import benchmarks.gpu_cublaslt as module
    finally:
        sys.path[:] = before
    return module


class Host:
    """Stands in for the probe's Card: NumPy's arrays, and clocks that say a microsecond."""

    xp, stream = np, types.SimpleNamespace(ptr=9)

    def __init__(self, fake, probe):
        self.fake, self.probe, self.lib = fake, probe, cublaslt.Library(fake, host_address)
        self.workspace = self.at_boundary((8 << 20,), np.dtype(np.uint8), 256)

    def to_device(self, a):
        return a

    def at_boundary(self, shape, dtype, boundary):
        size = int(np.prod(shape)) * dtype.itemsize
        raw = np.full(size + 512, 0xFF, np.uint8)
        start = -raw.ctypes.data % 256 + boundary % 256
        return self.fake.own(raw[start : start + size].view(dtype).reshape(shape))

    def synchronize(self):
        pass

    def nodes(self, run):
        return self.probe.Nodes(1, ["gemm"], {})

    def seconds(self, run):
        run(self.stream.ptr)
        return 1e-6

    def eager_seconds(self, call):
        call()
        return 1e-6


def probed(probe, fake, shapes, precisions=tuple(cublaslt.PRECISIONS)):
    host, results = Host(fake, probe), []
    fine = probe.probe(results.append, host, shapes, precisions)
    host.lib.close()
    json.dumps(results)
    return fine, results


def test_probe(fake, gpu_cublaslt, monkeypatch):
    monkeypatch.setattr(gpu_cublaslt, "OFF_BOUNDARY", ((33, 20, 40), (64, 4)))
    fine, results = probed(gpu_cublaslt, fake, ((33, 20, 40), (16, 130, 7)))
    assert fine, [r for r in results if not r.get("right", True) or "error" in r]
    ours = [r for r in results if r["what"] == "cublaslt"]
    forms = sum(map(len, gpu_cublaslt.EPILOGUES.values()))
    # float64 is not at boundaries of 4, where two of four algorithms cannot work
    assert len(ours) == forms * (4 * (4 * 2 + 4) + 2 * 3)
    assert all(r["right"] and r["same_bits"] and r["kernels"] == 1 and r["us"] == 1 for r in ours)
    assert {r["boundary"] for r in ours if r["of"] == 2} == {4}
    assert sum(r["what"] == "cupy.matmul" for r in results) == 2 * 2 * 3
    assert max(r["error_Z"] for r in ours if r["precision"] == "tf32" and "error_Z" in r) > 1e-5


def test_probe_tells_what_is_not_on_offer(fake, gpu_cublaslt):
    fine, results = probed(gpu_cublaslt, fake, ((16, 20, 1),), ("float32",))
    assert fine
    assert [r["with"] for r in results if "reason" in r] == ["mask", "mask db", "db"]


@pytest.mark.parametrize("lie", ["A transposed", "TF32", "no epilogue", "alpha", "mask's ld"])
def test_probe_tells_what_is_wrong(fake, gpu_cublaslt, monkeypatch, lie):
    real = cublaslt.Product
    monkeypatch.setattr(cublaslt, "Product", lambda library, plan, arrays: real(library, LIES[lie](plan), arrays))
    fine, results = probed(gpu_cublaslt, fake, ((128, 128, 128),), ("float32",))
    assert not fine
    assert any("error" in r or r.get("right") is False for r in results)


def test_nodes_of_a_graph(gpu_cublaslt):
    """What the driver is asked, with a driver that knows a graph of two kernels and a memset."""
    kinds, names = {11: 0, 12: 2, 13: 0}, {501: b"gemm", 502: b"reduce"}

    def nodes(graph, out, count):
        assert graph.value == 77
        if out is not None:
            out[:] = list(kinds)
        count._obj.value = len(kinds)
        return 0

    def kind(node, out):
        out._obj.value = kinds[node.value]
        return 0

    def parameters(node, out):
        told = out._obj
        told.func, told.kernel = (501, None) if node.value == 11 else (None, 502)
        return 0

    def name(out, function):
        out._obj.value = names[function.value]
        return 0

    card = object.__new__(gpu_cublaslt.Card)
    card.driver = types.SimpleNamespace(
        cuGraphGetNodes=nodes, cuGraphNodeGetType=kind, cuGraphKernelNodeGetParams_v2=parameters,
        cuFuncGetName=name, cuKernelGetName=name,
    )  # fmt: skip
    assert card._nodes(77) == (2, ["gemm", "reduce"], {"2": 1})
    card.driver.cuFuncGetName = lambda *a: 500
    assert card._nodes(77).names == ["unknown: cuFuncGetName: 500", "reduce"]
    card.driver.cuGraphNodeGetType = lambda *a: 1
    with pytest.raises(RuntimeError, match="cuGraphNodeGetType: 1"):
        card._nodes(77)
    assert ctypes.sizeof(gpu_cublaslt._KernelNodeParams) == 72


# ------------------------------------------------------------------------------------------- beside the real library


@pytest.fixture(scope="module")
def wheel():
    """The folder of the wheel nvidia-cublas-cu12; its library works without a GPU as far as descriptors go."""
    spec = importlib.util.find_spec("nvidia.cublas") if importlib.util.find_spec("nvidia") else None
    places = [Path(p) for p in spec.submodule_search_locations or ()] if spec else []
    found = [p for p in places if (p / "include" / "cublasLt.h").exists()]
    if not found:
        pytest.skip("the wheel nvidia-cublas-cu12 is not installed")
    return found[0]


@pytest.fixture(scope="module")
def real(wheel):
    paths = sorted((wheel / "lib").glob("libcublasLt.so.*"))
    if not paths:
        pytest.skip("the wheel nvidia-cublas-cu12 holds no Linux library")
    return cublaslt._declared(ctypes.CDLL(str(paths[0])))


def enumerators(wheel):
    """Name -> number of what the headers enumerate."""
    found = {}
    for file in ("cublas_api.h", "cublasLt.h"):
        text = re.sub(r"/\*.*?\*/", "", (wheel / "include" / file).read_text(encoding="utf-8"), flags=re.DOTALL)
        for name, value in re.findall(r"^\s*(CUBLAS\w+)\s*=\s*([^,\n]+?),?\s*$", text, re.MULTILINE):
            with contextlib.suppress(NameError, SyntaxError):  # code that only looks like it
                found[name] = int(eval(value, {}, dict(found)))
    return found


def test_the_numbers_of_the_headers(wheel):
    known = enumerators(wheel)
    desc, pref, config = "CUBLASLT_MATMUL_DESC_", "CUBLASLT_MATMUL_PREF_", "CUBLASLT_ALGO_CONFIG_"
    ours = {
        "CUBLAS_COMPUTE_32F": cublaslt.COMPUTE_32F, "CUBLAS_COMPUTE_64F": cublaslt.COMPUTE_64F,
        "CUBLAS_COMPUTE_32F_FAST_TF32": cublaslt.COMPUTE_32F_FAST_TF32,
        "CUBLAS_OP_N": cublaslt.OP_N, "CUBLAS_OP_T": cublaslt.OP_T,
        desc + "TRANSA": cublaslt.DESC_TRANSA.number, desc + "TRANSB": cublaslt.DESC_TRANSB.number,
        desc + "EPILOGUE": cublaslt.DESC_EPILOGUE.number, desc + "BIAS_POINTER": cublaslt.DESC_BIAS_POINTER.number,
        desc + "EPILOGUE_AUX_POINTER": cublaslt.DESC_AUX_POINTER.number,
        desc + "EPILOGUE_AUX_LD": cublaslt.DESC_AUX_LD.number,
        pref + "MAX_WORKSPACE_BYTES": cublaslt.PREF_WORKSPACE.number,
        config + "ID": cublaslt.CONFIG["id"].number, config + "TILE_ID": cublaslt.CONFIG["tile"].number,
        config + "SPLITK_NUM": cublaslt.CONFIG["split_k"].number,
        config + "REDUCTION_SCHEME": cublaslt.CONFIG["reduction"].number,
        config + "STAGES_ID": cublaslt.CONFIG["stages"].number,
        config + "CLUSTER_SHAPE_ID": cublaslt.CONFIG["cluster"].number,
    }  # fmt: skip
    ours |= {f"CUBLASLT_EPILOGUE_{name}": value for name, value in cublaslt.EPILOGUE.items()}
    ours |= {f"CUBLAS_STATUS_{name}": value for value, name in cublaslt.STATUS.items()}
    for which, attribute in zip("ABCD", cublaslt.PREF_ALIGNMENTS, strict=True):
        ours[f"{pref}MIN_ALIGNMENT_{which}_BYTES"] = attribute.number
    assert ours == {name: known[name] for name in ours}
    assert {v for n, v in known.items() if n.startswith("CUBLAS_STATUS_")} == {0, *cublaslt.STATUS}


def test_the_structures():
    assert ctypes.sizeof(cublaslt.Algo) == 64
    assert ctypes.sizeof(cublaslt.HeuristicResult) == ctypes.sizeof(fake_cublaslt.Result) == 96
    assert cublaslt.HeuristicResult.waves.offset == 76


def test_the_real_library_without_a_gpu(real):
    """Versions, and that each attribute is as long as it is taken to be here and by the stand-in."""
    assert real.cublasLtGetVersion() >= 120000
    made = {
        "cublasLtMatmulDesc": cublaslt.Owned(real, "cublasLtMatmulDesc", cublaslt.COMPUTE_32F, cublaslt.R_32F),
        "cublasLtMatrixLayout": cublaslt.Owned(real, "cublasLtMatrixLayout", cublaslt.R_16BF, 785, 33, 800),
        "cublasLtMatmulPreference": cublaslt.Owned(real, "cublasLtMatmulPreference"),
    }
    attributes = {a.number: a for name, a in vars(cublaslt).items() if name.startswith("DESC_")}
    for kind, descriptor in made.items():
        get = getattr(real, f"{kind}GetAttribute")
        get.argtypes = (*cublaslt._SET, ctypes.POINTER(ctypes.c_size_t))

        def read(number, get=get, descriptor=descriptor):
            size, value = ctypes.c_size_t(), ctypes.create_string_buffer(16)
            assert get(descriptor.pointer, number, None, 0, ctypes.byref(size)) == 0
            assert get(descriptor.pointer, number, value, size.value, ctypes.byref(size)) == 0
            return size.value, int.from_bytes(value.raw[: size.value], "little")

        assert {n: read(n)[0] for n in fake_cublaslt.KINDS[kind]} == fake_cublaslt.KINDS[kind]
        if kind == "cublasLtMatrixLayout":
            assert [read(n)[1] for n in (0, 1, 2, 3, 4)] == [14, 0, 785, 33, 800]
        elif kind == "cublasLtMatmulDesc":
            assert [read(n)[1] for n in (0, 1, 3, 7)] == [68, 0, 0, 1]
            for n, v in ((3, 1), (4, 1), (7, 166), (8, 4096), (11, 8192), (12, 896)):
                descriptor.set(attributes[n], v)
                assert read(n)[1] == v
        else:
            for attribute in (cublaslt.PREF_WORKSPACE, *cublaslt.PREF_ALIGNMENTS):
                descriptor.set(attribute, 64)
                assert read(attribute.number)[1] == 64
    for descriptor in made.values():
        descriptor.close()
        descriptor.close()


def test_the_real_library_without_a_device(real):
    """A handle needs a device: either it can be made, or the error says which call failed."""
    told = []
    try:
        cublaslt.Library(real).close()
    except cublaslt.CublasLtError as e:
        told.append(e.function)
    assert told in ([], ["cublasLtCreate"])
