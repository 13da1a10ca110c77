"""The stand-in for CuPy: its streams, captures, graphs, allocations and copies are as treacherous as the real ones."""

import functools
import threading

import fake_cupy
import numpy as np
import pytest
from kernels_on_cpu import KernelError

CODE = """
extern "C" __global__ void add(float* x, float s, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] += s;
}
extern "C" __global__ void scale(float* x, const float* factor, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] *= factor[0];
}
"""
N = 5


@pytest.fixture
def cp():
    with fake_cupy.installed() as cupy:
        yield cupy


@pytest.fixture
def kernels(cp):
    """add(x, s) and scale(x, factor), in the current stream."""
    module = cp.RawModule(code=CODE, options=("--std=c++17",))

    def launcher(name, kind):
        function = module.get_function(name)
        return lambda x, a: function((1,), (32,), (x, kind(a), np.int32(x.size)))

    return launcher("add", np.float32), launcher("scale", lambda a: a)


def ones(cp, n=N):
    x = cp.asarray(np.ones(n, np.float32))
    cp.cuda.Stream.null.synchronize()
    return x


def captured(cp, work, **how):
    stream = cp.cuda.Stream(**{"non_blocking": True, **how})
    with stream:
        stream.begin_capture()
        assert stream.is_capturing()
        work()
        graph = stream.end_capture()
    assert not stream.is_capturing()
    return graph


# ------------------------------------------------------------------------------------------ streams


def test_the_current_stream_is_a_stack_and_one_for_each_thread(cp):
    current, null = cp.cuda.get_current_stream, cp.cuda.Stream.null
    assert current() is null
    a, b = cp.cuda.Stream(), cp.cuda.Stream(non_blocking=True)
    assert len({null.ptr, a.ptr, b.ptr}) == 3
    assert cp.cuda.Stream(null=True) == null != a
    with a:
        with b as entered:
            assert entered is current() is b
            seen = []
            thread = threading.Thread(target=lambda: seen.append(current()))
            thread.start()
            thread.join()
            assert seen == [null]
        assert current() is a
    assert current() is null
    assert a.use() is current() is a
    null.use()


def test_waits_are_counted(cp):
    def counted(f):
        before = fake_cupy.Counts.synchronisations
        f()
        return fake_cupy.Counts.synchronisations - before

    x = ones(cp)
    stream = cp.cuda.Stream()
    for wait in (
        stream.synchronize, stream.record().synchronize, cp.cuda.Device().synchronize, x.get, x[0].__float__,
        lambda: int(x[0]), lambda: bool(x[0]), x.tolist, x[0].item, lambda: cp.asnumpy(x),
    ):  # fmt: skip
        assert counted(wait) == 1
    for no_wait in (
        lambda: cp.add(x, x, out=x), lambda: x[0], lambda: x.reshape(-1, 1), lambda: cp.asarray(np.ones(3)), x.sum,
        lambda: stream.done, lambda: stream.record().done, lambda: x.get(blocking=False), lambda: x.fill(0),
    ):  # fmt: skip
        assert counted(no_wait) == 0


def test_an_upload_is_there_for_its_own_stream_and_for_those_that_wait(cp, kernels):
    add, _ = kernels
    host = np.ones(N, np.float32)
    x = cp.asarray(host)  # in the null stream
    with cp.cuda.Stream():  # which this one waits for
        assert x.get().tolist() == [1] * N
    x = cp.asarray(host)
    with cp.cuda.Stream(non_blocking=True):
        assert np.isnan(x.get()).all()
    add(x, 1)
    assert x.get().tolist() == [2] * N


def test_time_goes_by_for_who_asks(cp):
    stream = cp.cuda.Stream(non_blocking=True)
    x = ones(cp)
    x.set(np.zeros(N, np.float32), stream)
    event = stream.record()
    assert not event.done
    assert event.done
    assert stream.done
    assert x.get().tolist() == [0] * N


# ------------------------------------------------------------------------------------------ copies


def pinned(cp, values):
    a = np.frombuffer(cp.cuda.alloc_pinned_memory(values.nbytes), values.dtype, values.size).reshape(values.shape)
    a[...] = values
    return a


def by_set(x, host, stream):
    x.set(host, stream)


def by_pointer(x, host, stream):
    x.data.copy_from_host_async(host.ctypes.data, host.nbytes, stream)


@pytest.mark.parametrize("copy", [by_set, by_pointer])
def test_a_pinned_copy_lands_late(cp, kernels, copy):
    add, _ = kernels
    compute, copying = cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(non_blocking=True)
    host = pinned(cp, np.full(N, 5, np.float32))

    x = ones(cp)
    copy(x, host, copying)
    with compute:  # which does not wait
        add(x, 1)
        assert x.get().tolist() == [2] * N
    copying.synchronize()
    assert x.get().tolist() == [5] * N

    copy(x, host, copying)
    host[...] = 7  # too early
    copying.synchronize()
    assert x.get().tolist() == [7] * N

    copy(x, host, copying)
    compute.wait_event(copying.record())
    host[...] = 8  # still too early: the host has not waited
    copy(x, host, copying)  # behind the event
    host[...] = 9
    with compute:
        add(x, 1)
        assert x.get().tolist() == [10] * N
    copying.synchronize()
    assert x.get().tolist() == [9] * N

    event = cp.cuda.Event(disable_timing=True)
    copy(x, host, copying)
    event.record(copying)
    event.synchronize()
    host[...] = 0  # early enough
    assert x.get().tolist() == [9] * N


def test_a_copy_from_memory_that_is_not_pinned_is_staged(cp):
    x, host, stream = ones(cp), np.full(N, 5, np.float32), cp.cuda.Stream(non_blocking=True)
    x.set(host, stream)
    host[...] = 7
    assert x.get().tolist() == [1] * N
    stream.synchronize()
    assert x.get().tolist() == [5] * N


def test_a_copy_home_that_nobody_waits_for_is_late(cp):
    x, stream = ones(cp), cp.cuda.Stream(non_blocking=True)
    out = pinned(cp, np.zeros(N, np.float32))
    with stream:
        assert x.get(out=out, blocking=False) is out
        assert out.tolist() == [0] * N
        stream.synchronize()
        assert out.tolist() == [1] * N
        assert np.isnan(x.get(blocking=False)).all()


def test_kernels_that_are_late_show_a_buffer_that_is_filled_too_early(kernels):
    add, _ = kernels
    with fake_cupy.installed(late="kernels") as cp:
        compute, copying = cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(non_blocking=True)
        host = pinned(cp, np.full(N, 5, np.float32))
        for waits, expected in ((False, 6), (True, 5)):
            x = ones(cp)
            with compute:
                add(x, 1)
            if waits:
                copying.wait_event(compute.record())
            x.set(host, copying)
            compute.synchronize()
            assert x.get().tolist() == [expected] * N


def test_set_asks_for_what_fits(cp):
    x = ones(cp)
    for error, host in ((TypeError, [1.0] * N), (TypeError, np.ones(N)), (ValueError, np.ones(N + 1, np.float32))):
        with pytest.raises(error):
            x.set(host)
    with pytest.raises(RuntimeError, match="non-contiguous"):
        x[::2].set(np.ones(3, np.float32))


def test_pinned_memory_is_larger_than_asked_for(cp):
    memory = cp.cuda.alloc_pinned_memory(12)
    assert memory.size() == 512
    assert np.frombuffer(memory, np.float32).size > 3
    assert np.frombuffer(memory, np.float32, 3).flags.writeable


# ------------------------------------------------------------------------------------------ graphs


def test_a_capture_runs_nothing_and_freezes_scalars(cp, kernels):
    add, _ = kernels
    x = ones(cp)
    s = np.full((), 2, np.float32)
    launches = fake_cupy.Counts.launches
    graph = captured(cp, lambda: add(x, s[()]))
    assert x.get().tolist() == [1] * N
    s[...] = 100
    before = fake_cupy.Counts.graph_launches
    graph.upload()
    graph.launch()
    graph.launch(cp.cuda.Stream())
    assert x.get().tolist() == [5] * N
    assert fake_cupy.Counts.launches == launches
    assert fake_cupy.Counts.graph_launches == before + 2
    assert fake_cupy.Counts.graph_nodes == 1


def test_arrays_are_read_when_the_graph_runs(cp, kernels):
    _, scale = kernels
    x, factor = ones(cp), ones(cp, 1)
    graph = captured(cp, lambda: scale(x[:2], factor))
    factor[...] = 3.0
    graph.launch()
    factor.fill(2)
    graph.launch()
    assert x.get().tolist() == [6, 6, 1, 1, 1]


def test_nodes_run_in_order(cp, kernels):
    add, scale = kernels
    x, factor = ones(cp), ones(cp, 1) + 1.0

    def work():
        add(x, 1)
        scale(x, factor)
        cp.subtract(x, 1, out=x)
        cp.multiply(x, x, x)
        add(x, 1)

    graph = captured(cp, work)
    graph.launch()
    assert x.get().tolist() == [10] * N
    assert fake_cupy.Counts.graph_nodes == 5


def test_operations_on_arrays_are_captured_each_in_its_way(cp):
    x, i = ones(cp), cp.asarray(np.array([4, 0]))
    kept = []

    def work():
        x[1:3] = 5.0
        x[3:].fill(7)
        x[0] += 1
        y = x * 2
        z = y.reshape(-1, 1).sum()
        kept.extend([y, z, x[i], x[0], cp.zeros(2, dtype=cp.float32)])

    graph = captured(cp, work)
    assert x.get().tolist() == [1] * N
    assert np.isnan(kept[0].get()).all()  # nothing is there yet
    graph.launch()
    y, z, chosen, first, zeros = (a.get().tolist() for a in kept)
    assert x.get().tolist() == [2, 5, 5, 7, 7]
    assert y == [4, 10, 10, 14, 14]
    assert (z, chosen, first, zeros) == (52, [7, 2], 2, [0, 0])
    x.fill(0)
    graph.launch()
    assert kept[0].get().tolist() == [2, 10, 10, 14, 14]


def test_work_of_another_library_is_captured_by_the_handle_of_its_stream(cp):
    done = []
    with cp.cuda.Stream() as stream:
        stream.begin_capture()
        fake_cupy.issue(stream.ptr, lambda: done.append(1))
        graph = stream.end_capture()
    assert done == []
    graph.launch()
    fake_cupy.issue(0, lambda: done.append(3))
    assert done == [1, 3]


@pytest.mark.parametrize("view", [False, True])
def test_freed_memory_is_told(cp, kernels, view):
    add, _ = kernels
    x = ones(cp)
    part = x[1:]
    graph = captured(cp, functools.partial(add, x, 1))
    graph.launch()
    del x
    if view:  # which holds the memory
        graph.launch()
        assert part.get().tolist() == [3] * (N - 1)
        return
    del part
    with pytest.raises(fake_cupy.FreedMemoryError, match=r"\(5,\)"):
        graph.launch()


def test_a_captured_temporary_must_be_held(cp):
    x, y = ones(cp), ones(cp)
    graph = captured(cp, lambda: cp.add(x, x * 2, out=y))
    with pytest.raises(fake_cupy.FreedMemoryError):
        graph.launch()
    fake_cupy.Mode.freed = False
    captured(cp, lambda: cp.add(x, x * 2, out=y)).launch()
    assert y.get().tolist() == [3] * N


def test_a_pinned_copy_is_a_node(cp):
    x, host = ones(cp), pinned(cp, np.full(N, 5, np.float32))
    graph = captured(cp, functools.partial(x.set, host))
    graph.launch()
    assert x.get().tolist() == [5] * N
    host[...] = 6
    graph.launch()
    assert x.get().tolist() == [6] * N
    del host
    with pytest.raises(fake_cupy.FreedMemoryError, match="pinned"):
        graph.launch()


def test_a_graph_is_launched_in_the_order_of_its_stream(cp, kernels):
    add, _ = kernels
    x = ones(cp)
    graph = captured(cp, lambda: add(x, 1))
    copying, compute = cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(non_blocking=True)
    x.set(np.full(N, 5, np.float32), copying)
    compute.wait_event(copying.record())
    graph.launch(compute)
    assert x.get().tolist() == [6] * N


def test_a_graph_in_a_graph(cp, kernels):
    add, _ = kernels
    x = ones(cp)
    one = captured(cp, lambda: add(x, 1))
    two = captured(cp, lambda: [one.launch(), one.launch()])
    assert x.get().tolist() == [1] * N
    two.launch()
    assert x.get().tolist() == [3] * N


def test_unwritten_memory_is_only_that_of_the_first_launch(kernels):
    with fake_cupy.installed(check=True) as cp:
        module = cp.RawModule(code=CODE, options=("--std=c++17",))
        add = module.get_function("add")
        x = cp.empty(N, np.float32)
        graph = captured(cp, lambda: add((1,), (32,), (x, np.float32(1), np.int32(N))))
        with pytest.raises(KernelError, match="read of memory never written"):
            graph.launch()
        x.fill(0)
        graph.launch()
        assert x.get().tolist() == [1] * N


# ------------------------------------------------------------------------------------------ what is forbidden


FORBIDDEN = {
    "get": lambda cp, x: x.get(),
    "float": lambda cp, x: float(x[0]),
    "int": lambda cp, x: int(x[0]),
    "bool": lambda cp, x: bool(x[0]),
    "item": lambda cp, x: x[0].item(),
    "asarray": lambda cp, x: cp.asarray([1.0]),
    "array": lambda cp, x: cp.array([1.0]),
    "set": lambda cp, x: x.set(np.ones(N, np.float32)),
    "a mask": lambda cp, x: x[x > 0],
    "synchronize": lambda cp, x: cp.cuda.get_current_stream().synchronize(),
    "the device's synchronize": lambda cp, x: cp.cuda.Device(0).synchronize(),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_a_capture_forbids_ends_it(cp, kernels, what):
    add, _ = kernels
    x = ones(cp)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        add(x, 1)
        with pytest.raises(cp.cuda.runtime.CUDARuntimeError, match="StreamCaptureUnsupported") as e:
            FORBIDDEN[what](cp, x)
        assert e.value.status == 900
        with pytest.raises(RuntimeError, match="invalidated the capture sequence"):
            stream.is_capturing()
        with pytest.raises(cp.cuda.runtime.CUDARuntimeError, match="StreamCaptureInvalidated"):
            add(x, 1)
        with pytest.raises(cp.cuda.runtime.CUDARuntimeError, match="StreamCaptureInvalidated"):
            stream.end_capture()
        assert not stream.is_capturing()
        add(x, 1)
        assert x.get().tolist() == [2] * N


def test_asking_whether_a_capturing_stream_is_done_ends_the_capture_without_a_word(cp):
    stream = cp.cuda.Stream(non_blocking=True)
    stream.begin_capture()
    assert not stream.done
    with pytest.raises(RuntimeError, match="StreamCaptureInvalidated"):
        stream.end_capture()


def test_cublas_is_refused_and_the_capture_goes_on(cp, kernels):
    add, _ = kernels
    x = ones(cp)
    M = x.reshape(1, -1)

    def work():
        add(x, 1)
        for product in (lambda: cp.matmul(M, M.T), lambda: M @ M.T, lambda: cp.dot(x, x), lambda: x.dot(x)):
            with pytest.raises(NotImplementedError, match="calling cuBLAS API during stream capture is currently"):
                product()

    captured(cp, work).launch()
    assert x.get().tolist() == [2] * N


def test_captures_begin_and_end_once_and_not_on_the_null_stream(cp):
    for null in (cp.cuda.Stream.null, cp.cuda.Stream(null=True)):
        with pytest.raises(RuntimeError, match=r"cannot capture on the default \(legacy\) stream"):
            null.begin_capture()
    stream = cp.cuda.Stream()
    with pytest.raises(RuntimeError, match="IllegalState"):
        stream.end_capture()
    with pytest.raises(RuntimeError, match="InvalidValue"):
        stream.begin_capture(3)
    stream.begin_capture(mode=cp.cuda.runtime.streamCaptureModeRelaxed)
    with pytest.raises(RuntimeError, match="IllegalState"):
        stream.begin_capture()
    stream.end_capture().launch()
    with pytest.raises(NotImplementedError, match="must be created via stream capture"):
        cp.cuda.Graph()


def test_the_null_stream_beside_a_capture(cp, kernels):
    """It may work beside a non-blocking stream that captures; on any other the capture ends."""
    add, _ = kernels
    x = ones(cp)
    stream = cp.cuda.Stream(non_blocking=True)
    stream.begin_capture()
    add(x, 1)
    assert x.get().tolist() == [2] * N
    stream.end_capture()
    stream = cp.cuda.Stream()
    stream.begin_capture()
    with pytest.raises(RuntimeError, match="StreamCaptureImplicit"):
        add(x, 1)
    with pytest.raises(RuntimeError, match="StreamCaptureInvalidated"):
        stream.end_capture()


def test_events_carry_a_capture_to_other_streams_and_back(cp, kernels):
    add, _ = kernels
    x = ones(cp)
    main, side = cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(non_blocking=True)

    def capture(join, late=False):
        with main:
            main.begin_capture()
            add(x, 1)
            side.wait_event(main.record())
            with side:
                assert side.is_capturing()
                add(x, 2)
            event = side.record()
            if late:
                with side:
                    add(x, 4)
            if join:
                main.wait_event(event)
            return main.end_capture(), event

    graph, event = capture(join=True)
    assert not side.is_capturing()
    graph.launch()
    assert x.get().tolist() == [4] * N
    assert not event.done
    with pytest.raises(RuntimeError, match="CapturedEvent"):
        event.synchronize()
    for more in ({"join": False}, {"join": True, "late": True}):
        with pytest.raises(RuntimeError, match="StreamCaptureUnjoined"):
            capture(**more)


def test_a_capture_waits_for_nothing_outside(cp):
    main, side = cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(non_blocking=True)
    main.begin_capture()
    main.wait_event(cp.cuda.Event())  # never recorded
    with pytest.raises(RuntimeError, match="StreamCaptureIsolation"):
        main.wait_event(side.record())
    with pytest.raises(RuntimeError, match="StreamCaptureInvalidated"):
        main.end_capture()
    main.begin_capture()
    side.wait_event(main.record())
    with pytest.raises(RuntimeError, match="StreamCaptureUnmatched"):
        side.end_capture()
    with pytest.raises(RuntimeError, match="StreamCaptureInvalidated"):
        main.end_capture()


def test_kernels_are_compiled_before(cp):
    module = cp.RawModule(code=CODE, options=("--std=c++17",))
    with pytest.raises(AssertionError, match="compiled before"):
        captured(cp, lambda: module.get_function("add"))


def capture_and_launch(cp, stream):
    stream.begin_capture()
    stream.end_capture().launch()


@pytest.mark.parametrize("where", ["begin", "end", "instantiate", "launch"])
def test_captures_that_fail_on_request(where):
    with fake_cupy.installed(fail_capture=where) as cp:
        stream = cp.cuda.Stream(non_blocking=True)
        with pytest.raises(cp.cuda.runtime.CUDARuntimeError):
            capture_and_launch(cp, stream)
        assert not stream.is_capturing()
    assert fake_cupy.Mode.fail_capture is None


def test_nothing_is_left_for_the_next_installation():
    with fake_cupy.installed() as cp:
        stream = cp.cuda.Stream().use()
        stream.begin_capture()
    with fake_cupy.installed() as cp:
        assert cp.cuda.get_current_stream() is cp.cuda.Stream.null
        assert not stream.is_capturing()
        assert cp.asarray(np.ones(1)).get() == 1


# ------------------------------------------------------------------------------------------ allocations


def test_allocations_are_counted_and_can_be_forbidden(cp):
    x = ones(cp)
    sizes = []
    before = fake_cupy.Counts.allocations
    with cp.cuda.using_allocator(sizes.append):
        cp.empty((2, 3), np.float32), cp.asarray(np.ones(2)), x + 1, cp.zeros(3), x.sum(), cp.empty_like(x)
        cp.array([1, 2]), x.astype(np.float64), x.copy(), x[cp.asarray(np.array([0, 1]))]
        assert sizes == [24, 16, 20, 24, 4, 20, 16, 40, 20, 16, 8]
        assert fake_cupy.Counts.allocations == before + len(sizes)
        del sizes[:]
        cp.add(x, x, out=x), x[0], x[1:], x.T, x.reshape(-1, 1), x[:0], x.fill(1), x.view(np.int32)
        x += 1
        x[1:] = 0
        assert sizes == []

    def forbidden(size):
        raise MemoryError(size)

    with cp.cuda.using_allocator(forbidden):
        with pytest.raises(MemoryError, match="20"):
            captured(cp, lambda: x + 1)
        seen = []
        thread = threading.Thread(target=lambda: seen.append(cp.empty(3).shape))
        thread.start()
        thread.join()
        assert seen == [(3,)]
    cp.empty(3)
