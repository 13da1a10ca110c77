"""How many threads NumPy's BLAS takes: by the shape of a product within a run, else as a user has set."""

import os
import threading
import time

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu import blas

SIZE = 10  # of a product that is not small here


class Fake:
    """A BLAS that remembers what it was told."""

    def __init__(self, now=4):
        self.now, self.told = now, []

    def get_num_threads(self):
        return self.now

    def set_num_threads(self, threads):
        self.now = threads
        self.told.append(threads)


@pytest.fixture
def fake():
    return Fake()


@pytest.fixture
def threads(fake, monkeypatch):
    """The threads of that BLAS, in the place of the real ones."""
    monkeypatch.setattr(os, "register_at_fork", lambda **kwargs: None)
    monkeypatch.setattr(blas, "routines", lambda: fake)
    made = blas._Threads()
    monkeypatch.setattr(blas, "threads", made)
    monkeypatch.setattr(blas, "SMALL", SIZE**3)
    return made


def product(m, k=SIZE, n=SIZE):
    """Of (m, k) and (k, n)."""
    a, b, out = np.ones((m, k)), np.ones((k, n)), np.empty((m, n))
    assert blas.matmul(a, b, out) is out
    np.testing.assert_array_equal(out, k)


def test_the_shape_of_a_product_says_how_many(threads, fake):
    with threads.kept():
        seen = [(product(m), fake.now)[1] for m in (SIZE, SIZE - 1, 1, SIZE + 1)]
        product(SIZE - 1, SIZE, SIZE + 2)  # all three sides count
        wide = fake.now
        blas.matmul(np.ones(SIZE**2), np.ones((SIZE**2, SIZE)), np.empty(SIZE))  # of a vector
        seen += [wide, fake.now]
    assert seen == [4, 1, 1, 4, 4, 4]
    assert fake.now == 4


def test_it_is_told_no_more_than_it_has_to_be(threads, fake):
    with threads.kept():
        for m in (1, 2, 3, SIZE, SIZE, 1):
            product(m)
    assert fake.told == [1, 4, 1, 4]


def test_outside_of_a_run_nothing_is_set(threads, fake):
    product(1)
    with threads.lent():
        product(1)
    product(SIZE)
    assert fake.told == []


def test_what_was_before_is_there_again(threads, fake):
    for now in (4, 3, 1):
        fake.now = now
        with threads.kept():
            product(1)
            assert fake.now == 1
            with threads.kept():
                product(SIZE)
                assert fake.now == now
                product(1)
            assert threads.all == now
        assert fake.now == now
        assert threads.all == 0


def test_after_exceptions_too(threads, fake):
    with pytest.raises(KeyError), threads.kept():  # noqa: PT012
        product(1)
        with threads.lent():
            raise KeyError
    assert fake.now == 4
    with pytest.raises(ValueError), threads.kept():  # noqa: PT012
        product(1)
        blas.matmul(np.ones((2, 3)), np.ones((4, 5)), np.empty((2, 5)))
    assert fake.now == 4
    assert not taken_by_another(threads.lock)


def test_a_run_may_want_fewer(threads, fake):
    with threads.kept(1):
        assert fake.now == 1
        product(SIZE)
        assert fake.now == 1
        with threads.lent():
            assert fake.now == 4
            with threads.kept(1):  # what a callback asks of the network
                assert fake.now == 1
            assert fake.now == 4
        assert fake.now == 1
    assert fake.now == 4
    with threads.kept(9):
        assert threads.all == 4


def test_lent(threads, fake):
    with threads.kept():
        product(1)
        with threads.lent():
            assert fake.now == 4
            with threads.kept():
                product(1)
            assert fake.now == 4
        product(1)
        assert fake.now == 1
    assert fake.now == 4


def test_what_is_changed_while_it_is_lent_stays(threads, fake):
    with threads.kept():
        product(1)
        with threads.lent():
            fake.now = 2
        product(SIZE)
    assert fake.now == 2
    with threads.kept():
        product(1)
        assert fake.now == 1
    assert fake.now == 2


def test_it_is_not_lent_while_another_run_is_at_work(threads, fake):
    at_work, over = threading.Event(), threading.Event()

    def run():
        with threads.kept(1):
            at_work.set()
            over.wait(20)

    other = threading.Thread(target=run)
    with threads.kept(1):
        other.start()
        assert at_work.wait(20)
        with threads.lent():
            assert fake.now == 1
            over.set()
            other.join()
            assert fake.now == 4  # now it is
        assert fake.now == 1
    assert fake.now == 4


def test_runs_one_after_the_other_that_overlap(threads, fake):
    """Whoever leaves last puts it back, whoever that is."""
    first, second = threads.kept(), threads.kept()
    first.__enter__()
    second.__enter__()
    product(1)
    first.__exit__(None, None, None)
    product(1)
    assert fake.now == 1
    second.__exit__(None, None, None)
    assert fake.now == 4


def taken_by_another(lock):
    """Whether a thread other than this one would have to wait for it."""
    waits = []
    asks = threading.Thread(target=lambda: waits.append(not lock.acquire(blocking=False)) or waits[0] or lock.release())
    asks.start()
    asks.join()
    return waits[0]


def test_no_other_run_changes_it_during_a_product(threads, monkeypatch):
    seen, matmul = [], np.matmul
    monkeypatch.setattr(np, "matmul", lambda *args: [seen.append(taken_by_another(threads.lock)), matmul(*args)][1])
    a = np.ones((2, 2))
    blas.matmul(a, a, np.empty((2, 2)))
    with threads.kept(1):  # there is but one number
        blas.matmul(a, a, np.empty((2, 2)))
    with threads.kept():
        blas.matmul(a, a, np.empty((2, 2)))
    assert seen == [False, False, True]
    assert not taken_by_another(threads.lock)


def test_in_many_threads_at_once(threads, fake, monkeypatch):
    """Each product finds the number of its shape, and the last who leaves puts back what was before."""
    wrong, matmul = [], np.matmul

    def counted(a, b, out):
        if fake.now != (4 if out.size * a.shape[-1] >= SIZE**3 else 1):
            wrong.append(fake.now)
        return matmul(a, b, out)

    def work(m):
        for _ in range(30):
            with threads.kept():
                for _ in range(5):
                    product(m)

    monkeypatch.setattr(np, "matmul", counted)
    workers = [threading.Thread(target=work, args=(m,)) for m in (1, SIZE, 2, SIZE + 1)]
    with threads.kept():
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong
    assert fake.now == 4
    assert {1, 4} == set(fake.told)


def test_a_blas_that_does_not_tell(fake, threads, monkeypatch):
    monkeypatch.setattr(blas, "routines", lambda: None)
    none = blas._Threads()
    monkeypatch.setattr(blas, "threads", none)
    with none.kept(), none.lent(), none.kept(1):
        product(1)
        product(SIZE)
        none.set(2)
        assert none.now() is None
        assert none.all == 0
    assert fake.told == []


# ---------------------------------------------------------------------------------------------- NumPy's own BLAS


@pytest.fixture
def real():
    if blas.routines() is None:
        pytest.skip("NumPy does not come with OpenBLAS here")
    return blas.threads


def test_a_run_leaves_what_a_user_has_set(real, rng):
    X, T, found = rng.normal(size=(20, 4)), rng.integers(0, 3, 20), blas.routines()
    before, seen = real.now(), []
    try:
        for mine in (1, 2):
            found.set_num_threads(mine)
            net = bp.Network([4, 5, 3], backend="numpy")
            bp.train(net, X, T, epochs=1, callbacks=[lambda run: seen.append(real.now())])
            bp.evaluate(net, X, T)
            net.predict(X)
            seen.append(real.now())
    finally:
        found.set_num_threads(before)
    assert seen == [1, 1, 2, 2]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_of_vectors(real, rng, dtype):
    x, y = rng.normal(size=(2, 1001)).astype(dtype)
    wanted = dtype(0.5) * x + dtype(-2) * y
    with real.kept():
        blas.axpby(0.5, x, np.asarray(-2, dtype), y)
    np.testing.assert_allclose(y, wanted, rtol=1e-5 if dtype == np.float32 else 1e-13, atol=1e-6)
    wanted = y - dtype(0.25) * x
    blas.descend(y, np.asarray(0.25, dtype), x)
    np.testing.assert_allclose(y, wanted, rtol=1e-5 if dtype == np.float32 else 1e-13, atol=1e-6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_does_not_wait_for_a_thread_that_it_does_not_have(real):
    """It is forked while another thread is busy with products."""
    at_work = threading.Event()

    def work():
        with real.lock:
            at_work.set()
            time.sleep(0.2)

    other = threading.Thread(target=work)
    other.start()
    assert at_work.wait(20)
    child = os.fork()
    if child == 0:
        os._exit(1 if taken_by_another(real.lock) or not real.lock.acquire(blocking=False) else 0)
    other.join()
    assert os.waitpid(child, 0)[1] == 0
