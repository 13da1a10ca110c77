"""A stand-in for CuPy without a GPU: NumPy behind an array type as opaque as CuPy's, and kernels that really run.

Device arrays refuse to mix with NumPy arrays or to turn into them by accident, as CuPy's do; every crossing of the bus,
every allocation and every launch is counted. `RawModule` and `RawKernel` compile the very text that they are given and
run it on the CPU (see cuda_on_cpu). What it proves is that the CuPy backend's own Python and its kernels are sound:
names, arguments, dtypes, grids, where each array lives. Where there is a GPU, the same tests run on it too.

Streams are queues. What has no reason to be done yet is done as late as CUDA may do it (Mode.late says which work), so
that a stream that waits for too little computes with wrong numbers. A capture records kernels and operations on arrays:
scalars as they are then, arrays by the place of their memory. Left out: concurrency within a graph (nodes run in the
order in which they were issued), pinned memory that is freed and used again, more than one device. Stricter than CUDA:
no copy between pageable memory and the device, and no compilation, while a stream captures.

Memory runs out as on a GPU. CUPY_GPU_MEMORY_LIMIT, read by `installed`, or set_limit(size=...) of the pool that
`cupy.get_default_memory_pool()` gives bounds that; `installed(memory=...)`, or Mode.memory, is the size of the whole
device. Past either, `cupy.cuda.memory.OutOfMemoryError` is raised, in CuPy's words. The pool counts what is allocated,
in units of 512 bytes, and, where there is a bound, keeps what is freed until free_all_blocks(), or until it would run
out without it.

A launch fails where `fail_launch(n, status)` says so: the n-th of a kernel or graph from then on. Where its status is
one of STICKY, CUDA is lost to the process: until the next `installed` every call after it fails alike and is counted in
Counts.after_loss. Each raises what CuPy raises there (CUDARuntimeError, CUDADriverError for kernels, CUBLASError for
products); asked whether it is done, a stream or an event says no; memory that the pool has kept is had without CUDA.
"""

import collections
import contextlib
import ctypes
import functools
import gc
import itertools
import math
import os
import sys
import threading
import types
import weakref
from typing import ClassVar

import kernels_on_cpu
import numpy as np

DEVICE_NAME = b"Fake GPU"
ALIGNED = 512  # bytes, of which every address of an allocation is a multiple, as of CuPy's pool
# CUDA's numbers of attributes: capability 8.0, processors, bytes of shared memory a block may have, clocks (kHz) of
# processors and memory, bits of its bus.
ATTRIBUTES = {75: 8, 76: 0, 16: 4, 97: 163 << 10, 13: 1_000_000, 36: 1_000_000, 37: 1024}


class Counts:
    """What happened since the process began."""

    to_device = 0
    to_host = 0
    allocations = 0
    launches = 0  # of kernels, one by one: neither captured nor from a graph
    kernels: ClassVar = set()  # the names of those run
    graph_launches = 0
    graph_nodes = 0  # of the graph captured last
    synchronisations = 0  # of the host with a stream, an event or the device
    after_loss = 0  # calls of CUDA that came after an error that is sticky


class Mode:
    """How kernels run: looked at access by access, in an order drawn from a seed (0: in order); what is late or fails.

    late: "copies" land, or "kernels" (all work but copies) run, when something that waits for them needs them; None:
    all work at once. fail_capture: "begin", "end", "instantiate" or "launch" fails. freed: a graph notices that memory
    which it uses was freed, instead of keeping it. memory: bytes of the device, None: as many as anybody wants.
    fail_launch: how many launches from now, and the status, of the one that fails. lost: the status of a sticky error.
    """

    check = False
    seed = 0
    late = "copies"
    fail_capture = None
    freed = True
    memory = None
    fail_launch = None
    lost = None


# ------------------------------------------------------------------------------------------ streams


class CUDARuntimeError(RuntimeError):
    """CuPy's, with its words."""

    __module__ = "cupy_backends.cuda.api.runtime"

    WORDS: ClassVar = {
        1: "cudaErrorInvalidValue: invalid argument",
        2: "cudaErrorMemoryAllocation: out of memory",
        214: "cudaErrorECCUncorrectable: uncorrectable ECC error encountered",
        401: "cudaErrorIllegalState: the operation cannot be performed in the present state",
        700: "cudaErrorIllegalAddress: an illegal memory access was encountered",
        701: "cudaErrorLaunchOutOfResources: too many resources requested for launch",
        702: "cudaErrorLaunchTimeout: the launch timed out and was terminated",
        710: "cudaErrorAssert: device-side assert triggered",
        716: "cudaErrorMisalignedAddress: misaligned address",
        719: "cudaErrorLaunchFailure: unspecified launch failure",
        801: "cudaErrorNotSupported: operation not supported",
        900: "cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing",
        901: "cudaErrorStreamCaptureInvalidated: operation failed due to a previous error during capture",
        902: "cudaErrorStreamCaptureMerge: operation would result in a merge of separate capture sequences",
        903: "cudaErrorStreamCaptureUnmatched: capture was not ended in the same stream as it began",
        904: "cudaErrorStreamCaptureUnjoined: capturing stream has unjoined work",
        905: "cudaErrorStreamCaptureIsolation: dependency created on uncaptured work in another stream",
        906: "cudaErrorStreamCaptureImplicit: operation would make the legacy stream depend on a capturing blocking "
        "stream",
        907: "cudaErrorCapturedEvent: operation not permitted on an event last recorded in a capturing stream",
    }

    def __init__(self, status):
        self.status = status
        super().__init__(self.WORDS[status])


class CUDADriverError(RuntimeError):
    """What CuPy raises where it calls the driver itself: to load a module, and to launch a kernel."""

    __module__ = "cupy_backends.cuda.api.driver"

    NAMES: ClassVar = {
        2: "OUT_OF_MEMORY",
        214: "ECC_UNCORRECTABLE",
        700: "ILLEGAL_ADDRESS",
        701: "LAUNCH_OUT_OF_RESOURCES",
        702: "LAUNCH_TIMEOUT",
        710: "ASSERT",
        716: "MISALIGNED_ADDRESS",
        719: "LAUNCH_FAILED",
    }

    def __init__(self, status):
        self.status = status
        super().__init__(f"CUDA_ERROR_{self.NAMES[status]}: {CUDARuntimeError.WORDS[status].partition(': ')[2]}")


class CUBLASError(RuntimeError):
    """What a product raises where its launch fails, whatever the status of that."""

    __module__ = "cupy_backends.cuda.libs.cublas"

    def __init__(self, status=13):
        self.status = status
        super().__init__("CUBLAS_STATUS_EXECUTION_FAILED")


STICKY = (214, 700, 702, 710, 716, 719)


def fail_launch(n=1, status=700):
    """Let the n-th launch from now on (1: the next) of a kernel or a graph fail, captured ones not counted.

    It is told where the work is done: at the launch, or, with Mode.late "kernels", when something waits for it.
    """
    assert status in CUDADriverError.NAMES
    Mode.fail_launch = n, status


def _counted_launch():
    """A launch is issued; the status with which it is to fail, None: it works."""
    if Mode.fail_launch is None:
        return None
    n, status = Mode.fail_launch
    Mode.fail_launch = (n - 1, status) if n > 1 else None
    return status if n == 1 else None


def _fail(status):
    if status in STICKY:
        Mode.lost = status
    raise CUDARuntimeError(status)


def _require_cuda(kind=CUDARuntimeError):
    """Raises that kind of error after a sticky one: CUDARuntimeError, CUDADriverError or CUBLASError."""
    if Mode.lost:
        Counts.after_loss += 1
        raise kind() if kind is CUBLASError else kind(Mode.lost)


_lock = threading.RLock()
_busy = set()  # lines with work left
_captures = set()  # those under way
_thread = threading.local()  # current: the stream; stack: those to come back to; allocator


class _Line:
    """The work of one stream, in order."""

    def __init__(self, blocking=True):
        self.blocking = blocking  # waits for the null stream, and it for this one
        self.queue, self.issued, self.finished = collections.deque(), 0, 0
        self.capture = None

    def submit(self, run, late="kernels"):
        """Do it, or leave it for later; what is called while the line captures is run only by the graph."""
        with _lock:
            self.look()
            if self.capture:
                self.capture.add(self, run)
                return
            self.follow()
            self.push(run)
            if late != Mode.late:
                self.drain()

    def push(self, run):
        self.queue.append(run)
        self.issued += 1
        _busy.add(self)

    def look(self):
        """Raises where CUDA does, before anything is issued."""
        _require_cuda()
        if self.capture and self.capture.invalid:
            raise CUDARuntimeError(901)
        if self is _null and (spoilt := [c for c in _captures if c.origin.blocking]):
            for capture in spoilt:
                capture.invalid = True
            raise CUDARuntimeError(906)

    def forbid(self, status=900):
        """Nothing that waits for the device or crosses the bus while the line captures: it ends the capture."""
        self.look()
        if self.capture:
            self.capture.invalid = True
            raise CUDARuntimeError(status)

    def follow(self):
        """The order between the null stream and those that are not non-blocking."""
        for other in list(_busy):
            if other is not self and other.blocking and self.blocking and _null in (self, other):
                self.push(functools.partial(other.drain, other.issued))

    def drain(self, until=None):
        with _lock:
            until = self.issued if until is None else until
            while self.finished < until:
                run = self.queue.popleft()
                self.finished += 1
                if not self.queue:
                    _busy.discard(self)
                run()

    def wait(self):
        """The host waits for all of it."""
        with _lock:
            Counts.synchronisations += 1
            self.forbid()
            self.follow()
            self.drain()

    def asked(self, ticket):
        """Whether the work up to that ticket is done; meanwhile time goes by, and a piece of it is done."""
        with _lock:
            if Mode.lost:
                Counts.after_loss += 1
                return False
            done = self.finished >= ticket
            if not done:
                self.drain(self.finished + 1)
            return done


_null = _Line()


class _Capture:
    def __init__(self, origin):
        self.origin, self.nodes, self.invalid = origin, [], False
        self.lines = {origin: 0}  # and the nodes of each
        self.unjoined = set()

    def add(self, line, run):
        self.nodes.append(run)
        self.lines[line] += 1
        if line is not self.origin:
            self.unjoined.add(line)

    def join(self, line):
        line.capture = self
        self.lines[line] = 0
        self.unjoined.add(line)


class FreedMemoryError(AssertionError):
    """A graph used memory that nobody holds any more; on a GPU it belongs to somebody else by now."""


class _Place:
    """Where a captured array lies: its memory is read and written at each launch, and not kept."""

    def __init__(self, a):
        owner = a
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        self.owner = weakref.ref(owner) if Mode.freed else lambda: owner
        self.interface = a.__array_interface__

    def array(self):
        if (owner := self.owner()) is None:
            raise FreedMemoryError(f"a graph uses an array of {self.interface['shape']} whose memory has been freed")
        return np.asarray(types.SimpleNamespace(__array_interface__=self.interface, owner=owner))


def _placed(x):
    """Arguments as a capture keeps them."""
    if isinstance(x, ndarray):
        return _Place(x._a)
    if isinstance(x, (tuple, list)):
        return type(x)(map(_placed, x))
    return _unwrap(x)


def _found(x):
    """Those arguments at a launch."""
    if isinstance(x, (tuple, list)):
        return type(x)(map(_found, x))
    return x.array() if isinstance(x, _Place) else x


class Event:
    def __init__(self, block=False, disable_timing=False, interprocess=False):
        if interprocess and not disable_timing:
            raise ValueError("Timing must be disabled for interprocess events")
        _require_cuda()
        self.ptr = next(_handles)
        self._line, self._ticket, self._capture = None, 0, None

    def record(self, stream=None):
        line = (stream or get_current_stream())._line
        with _lock:
            line.look()
            self._line, self._capture = line, line.capture
            if line.capture:
                self._ticket = line.capture.lines[line]
            else:
                line.follow()
                self._ticket = line.issued

    @property
    def done(self):
        if self._line is None:
            return True
        return self._capture is None and self._line.asked(self._ticket)

    def synchronize(self):
        Counts.synchronisations += 1
        _require_cuda()
        if self._capture:
            self._capture.invalid = True
            raise CUDARuntimeError(907)
        if self._line:
            self._line.drain(self._ticket)


_handles = itertools.count(0x5000, 16)
_lines = weakref.WeakValueDictionary()  # by the handles of their streams


class Stream:
    null = None

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        assert not ptds, "not in the stand-in"
        if not null:
            _require_cuda()
        self.ptr = 0 if null else next(_handles)
        self.device_id = -1 if null else 0
        self.is_non_blocking = bool(non_blocking and not null)
        self._line = _null if null else _Line(blocking=not non_blocking)
        _lines[self.ptr] = self._line

    def __eq__(self, other):
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self):
        return self.ptr

    def __repr__(self):
        return f"<Stream {self.ptr} (device {self.device_id})>"

    def __enter__(self):
        _stack().append(self)
        return self.use()

    def __exit__(self, *args):
        _stack().pop()
        _stack()[-1].use()

    def use(self):
        _thread.current = self
        return self

    @property
    def done(self):
        """As CuPy: an error is no exception but "not done", and ends a capture all the same."""
        if self._line.capture:
            self._line.capture.invalid = True
            return False
        self._line.follow()
        return self._line.asked(self._line.issued)

    def synchronize(self):
        self._line.wait()

    def record(self, event=None):
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event):
        line, theirs = self._line, event._capture
        with _lock:
            line.look()
            if event._line is None:
                return
            if theirs is None:
                line.forbid(905)
                line.push(functools.partial(event._line.drain, event._ticket))
            elif theirs not in _captures:
                raise CUDARuntimeError(907)
            elif line is _null:
                theirs.invalid = True
                raise CUDARuntimeError(906)
            elif line.capture is None:
                theirs.join(line)
            elif line.capture is not theirs:
                line.forbid(902)
            if theirs and line is not event._line and theirs.lines[event._line] == event._ticket:
                theirs.unjoined.discard(event._line)

    def begin_capture(self, mode=None):
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        with _lock:
            _require_cuda()
            if Mode.fail_capture == "begin":
                raise CUDARuntimeError(801)
            if mode not in (None, 0, 1, 2):
                raise CUDARuntimeError(1)
            if self._line.capture:
                raise CUDARuntimeError(401)
            self._line.capture = _Capture(self._line)
            _captures.add(self._line.capture)

    def end_capture(self):
        with _lock:
            capture = self._line.capture
            _require_cuda()
            if capture is None:
                raise CUDARuntimeError(401)
            if capture.origin is not self._line:
                capture.invalid = True
                raise CUDARuntimeError(903)
            for line in capture.lines:
                line.capture = None
            _captures.discard(capture)
            if capture.invalid or Mode.fail_capture == "end":
                raise CUDARuntimeError(901)
            if capture.unjoined:
                raise CUDARuntimeError(904)
            if Mode.fail_capture == "instantiate":
                raise CUDARuntimeError(2)
            return Graph._of(capture.nodes)

    def is_capturing(self):
        with _lock:
            if self._line.capture and self._line.capture.invalid:
                raise RuntimeError("the stream was capturing, but an error has invalidated the capture sequence")
            self._line.look()
            return self._line.capture is not None


Stream.null = Stream(null=True)


def issue(handle, run):
    """What a library other than CuPy does in the stream of that handle, for a stand-in of it: captured as well."""
    _lines[handle].submit(run)


def _stack():
    return _thread.__dict__.setdefault("stack", [Stream.null])


def get_current_stream(device_id=-1):
    return getattr(_thread, "current", Stream.null)


class Graph:
    def __init__(self, *args, **kwargs):
        raise NotImplementedError(
            "currently this class cannot be initiated by the user and must be created via stream capture"
        )

    @classmethod
    def _of(cls, nodes):
        graph = cls.__new__(cls)
        graph._nodes = nodes
        Counts.graph_nodes = len(nodes)
        return graph

    def launch(self, stream=None):
        if Mode.fail_capture == "launch":
            raise CUDARuntimeError(2)
        Counts.graph_launches += 1
        line = (stream or get_current_stream())._line
        failing = None if line.capture else _counted_launch()
        line.submit(functools.partial(_fail, failing) if failing else self._run)

    def upload(self, stream=None):
        (stream or get_current_stream())._line.forbid()

    def _run(self):
        for node in self._nodes:
            node()


class Device:
    """The only one, whatever its number."""

    def __init__(self, device=None):
        self.id = 0 if device is None else int(device)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        _require_cuda()

    def use(self):
        return self

    def synchronize(self):
        with _lock:
            Counts.synchronisations += 1
            _require_cuda()
            for capture in _captures:
                capture.invalid = True
            if _captures:
                raise CUDARuntimeError(900)
            while _busy:
                next(iter(_busy)).drain()


def _reset():
    """As if the process had just begun, for this thread."""
    with _lock:
        for line in [*_busy, _null, *(line for capture in _captures for line in capture.lines)]:
            line.queue.clear()
            line.finished, line.capture = line.issued, None
        _busy.clear()
        _captures.clear()
        _thread.__dict__.clear()
        Mode.late, Mode.fail_capture, Mode.freed = "copies", None, True
        Mode.memory = Mode.fail_launch = Mode.lost = None


# ------------------------------------------------------------------------------------------ memory


class OutOfMemoryError(MemoryError):
    """CuPy's, with its words."""

    __module__ = "cupy.cuda.memory"

    def __init__(self, size, total, limit=0):
        self._of = size, total, limit
        limited = f", limit set to: {limit:,} bytes" if limit else ""
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes{limited}).")

    def __reduce__(self):
        return type(self), self._of


class MemoryPool:
    """Counts the bytes of the arrays there are, and those it keeps for others; in one piece, as far as it goes."""

    def __init__(self):
        self._total, self._limit = 0, 0
        self._held = {}  # the memory of arrays, by what tells when it is freed: how much
        text = os.environ.get("CUPY_GPU_MEMORY_LIMIT")
        if text:
            self.set_limit(**({"fraction": float(text[:-1]) / 100} if text.endswith("%") else {"size": int(text)}))

    def set_limit(self, size=None, fraction=None):
        self._limit = int((fraction or 0) * _memory()[1]) if size is None else size

    def get_limit(self):
        return self._limit

    def total_bytes(self):
        return self._total

    def used_bytes(self):
        return sum(size for _, size in list(self._held.values()))

    def free_bytes(self):
        return self._total - self.used_bytes()

    def free_all_blocks(self, stream=None):
        with _lock:
            if self.free_bytes() and Mode.lost:
                Counts.after_loss += 1  # without a word
            self._total = self.used_bytes()

    def take(self, size):
        """Room for that many bytes: kept, or new."""
        with _lock:
            if size <= self.free_bytes():
                return
            _require_cuda()
            if not self._limit or size <= self._limit:
                for make_room in (lambda: None, self.free_all_blocks, gc.collect, self.free_all_blocks):
                    make_room()
                    whole = self._total + size
                    if whole <= (self._limit or whole) and whole <= (Mode.memory or whole):
                        self._total = whole
                        return
            raise OutOfMemoryError(size, self._total, self._limit)

    def hold(self, owner, size):
        """That is what the array `owner` takes, until it is gone."""
        told = weakref.ref(owner, self._freed)
        self._held[id(told)] = told, size

    def _freed(self, told):
        with _lock:
            if (held := self._held.pop(id(told), None)) and not (self._limit or Mode.memory):
                self._total -= held[1]


def _memory():
    """Free and all bytes of the device."""
    return (Mode.memory - _pool.total_bytes(), Mode.memory) if Mode.memory else (60 << 30, 80 << 30)


_pool = MemoryPool()


def _mem_get_info():
    _require_cuda()
    return _memory()


def _take(n_bytes):
    """Ask for memory; how much of the pool's it is."""
    Counts.allocations += 1
    if (allocator := getattr(_thread, "allocator", None)) is not None:
        allocator(n_bytes)
        return 0
    size = -(-n_bytes // ALIGNED) * ALIGNED
    _pool.take(size)
    return size


def _held(a, size):
    """The array, in so much of the pool's memory."""
    owner = a
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    if size:
        _pool.hold(owner, size)
    return a


def _allocated(shape, dtype, order="C"):
    shape = shape if isinstance(shape, tuple) else (int(shape),)
    size = _take(math.prod(shape) * np.dtype(dtype).itemsize)
    return _held(_filled(shape, dtype, order), size)


@contextlib.contextmanager
def using_allocator(allocator=None):
    """`allocator` is called with each number of bytes, and may raise; what it gives is left unused."""
    before = getattr(_thread, "allocator", None)
    _thread.allocator = allocator
    try:
        yield
    finally:
        _thread.allocator = before


def _filled(shape, dtype, order="C"):
    """Memory full of NaNs, or -1, so that what nobody wrote is seen."""
    dtype, shape = np.dtype(dtype), shape if isinstance(shape, tuple) else (int(shape),)
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = np.full(n_bytes + ALIGNED, 0xFF, np.uint8)
    start = -memory.ctypes.data % ALIGNED
    return memory[start : start + n_bytes].view(dtype).reshape(shape, order=order)


_pinned = weakref.WeakValueDictionary()  # by their addresses


class PinnedMemoryPointer(bytearray):
    """More than was asked for, as from CuPy's pool: say how many elements of it are meant."""

    __hash__ = None

    def __init__(self, n_bytes):
        super().__init__(b"\xff" * max(512, -(-n_bytes // 512) * 512))
        self.ptr = np.frombuffer(self, np.uint8).ctypes.data
        _pinned[self.ptr] = self

    def size(self):
        return len(self)


def alloc_pinned_memory(size):
    _require_cuda()
    return PinnedMemoryPointer(size)


class _HostPlace:
    """A place in host memory: pinned, which is read or written when the copy happens, or else a snapshot."""

    def __init__(self, mem, size):
        self.ptr = mem if isinstance(mem, int) else mem.value
        self.pinned = next((p for at, p in list(_pinned.items()) if at <= self.ptr < at + len(p)), None)
        assert self.pinned is None or self.ptr + size <= self.pinned.ptr + len(self.pinned), "past the pinned memory"
        self.owner = self.pinned
        if self.pinned is None:
            self.owner = ctypes.create_string_buffer(ctypes.string_at(self.ptr, size), size)
            self.ptr = ctypes.addressof(self.owner)


class MemoryPointer:
    """Where an array's memory begins."""

    def __init__(self, array):
        self._array = array
        self.ptr = array._a.ctypes.data

    def _copy(self, size, stream, host, home):
        assert self._array._a.flags.c_contiguous or self._array._a.flags.f_contiguous
        assert size <= self._array._a.nbytes, "past the array"
        line = (stream or get_current_stream())._line
        if home:
            Counts.to_host += 1
        else:
            Counts.to_device += 1
            self._array.fresh = False
        if host.pinned is None:
            line.forbid()
        if line.capture:
            place, mem, ptr = _Place(self._array._a), weakref.ref(host.pinned), host.ptr

            def run():
                if mem() is None:
                    raise FreedMemoryError("a graph copies from or to pinned memory that has been freed")
                _move(place.array(), ptr, size, home)

        else:
            a = self._array._a

            def run():
                _move(a, host.ptr, size, home)  # which keeps both

        line.submit(run, "copies")

    def copy_from_host_async(self, mem, size, stream=None):
        self._copy(size, stream, _HostPlace(mem, size), home=False)

    def copy_to_host_async(self, mem, size, stream=None):
        host = _HostPlace(mem, size)
        assert host.pinned is not None, "CuPy asks for pinned memory here"
        self._copy(size, stream, host, home=True)


def _move(a, ptr, size, home):
    ctypes.memmove(*((ptr, a.ctypes.data) if home else (a.ctypes.data, ptr)), size)


# ------------------------------------------------------------------------------------------ arrays


def _unwrap(x):
    if isinstance(x, ndarray):
        return x._a
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}")  # CuPy's words
    if isinstance(x, (tuple, list)):
        return type(x)(_unwrap(i) for i in x)
    return x


def _wrap(x):
    if isinstance(x, (np.ndarray, np.generic)):  # reductions give 0-d device arrays
        new, x = getattr(x, "base", None) is None, np.asarray(x)
        return ndarray(_held(x, _take(x.nbytes)) if new else x)
    return x


_VIEWS = {"__getitem__", "reshape", "view", "ravel", "transpose", "swapaxes", "squeeze", "expand_dims", "broadcast_to"}
_WRITERS = {"__setitem__", "fill", "sort", "put", "partition", "copyto", "place", "putmask", "fill_diagonal"}
_WRITERS |= {f"__{name}__" for name in "iadd isub imul itruediv".split()}
_CUBLAS = {"matmul", "__matmul__", "dot", "vdot", "inner", "tensordot", "einsum"}
_TO_HOST = {"item", "tolist", "tobytes"}


def _lift(f, name):
    return functools.partial(_operate, f, name)


def _operate(f, name, *args, **kwargs):
    """A function of NumPy, on device arrays, in the current stream: done in its order, or captured."""
    stream = get_current_stream()
    line = stream._line
    out = args[f.nin] if isinstance(f, np.ufunc) and len(args) > f.nin else kwargs.get("out")
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, ndarray)]
    if name in _CUBLAS:
        _require_cuda(CUBLASError)
    if line.capture and name in _CUBLAS and any(x._a.dtype.kind in "fc" for x in given) and stream.is_capturing():
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
    if given and name in _TO_HOST:
        _bring_home()
    if name == "array" and not given:
        line.forbid()
    now = functools.partial(f, *map(_unwrap, args), **{k: _unwrap(v) for k, v in kwargs.items()})
    placed = (_placed(args), [*kwargs], _placed([*kwargs.values()])) if line.capture else None

    def later():
        return f(*_found(placed[0]), **dict(zip(placed[1], _found(placed[2]), strict=True)))

    if out is not None or name in _WRITERS:
        (args[0] if out is None else out).fresh = False
        line.submit(later if placed else now)
        return out
    if name in _VIEWS:
        result = now()
        if _is_view(result, given):
            return _wrap(result)
    if not placed:
        with _lock:
            line.look()
            line.follow()
            line.drain()
        return _wrap(now())
    line.look()
    with np.errstate(all="ignore"):
        result = now()  # for its shape: what it holds is not there before the graph is launched
    if not isinstance(result, (np.ndarray, np.generic)):
        assert isinstance(result, (int, np.dtype)), f"{name} is not captured"
        return result
    if name == "__getitem__" and any(_is_mask(i) for i in (args[1] if isinstance(args[1], tuple) else args[1:])):
        line.forbid()  # CuPy counts what is chosen
    if _is_view(result, given):
        return _wrap(result)
    result = _allocated(result.shape, result.dtype)
    place = _Place(result)
    line.submit(lambda: np.copyto(place.array(), later()))
    return ndarray(result)


def _is_view(result, arrays):
    if not isinstance(result, np.ndarray) or result.base is None:
        return False
    return result.size == 0 or any(np.may_share_memory(result, x._a) for x in arrays)


def _is_mask(i):
    return isinstance(i, ndarray) and i._a.dtype == bool


def _bring_home():
    """A copy to the host, for which it waits."""
    Counts.to_host += 1
    get_current_stream().synchronize()


class ndarray:  # noqa: N801 - CuPy's name
    __slots__ = ("_a", "fresh")
    __hash__ = None
    __array_ufunc__ = None

    def __init__(self, a, fresh=False):
        self._a = a
        self.fresh = fresh  # never written: the first kernel that gets it must not read it first

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def get(self, stream=None, order="C", out=None, blocking=True):
        """Without `blocking` the values are there after the stream has been waited for, and not before."""
        stream = get_current_stream() if stream is None else stream
        Counts.to_host += 1
        stream._line.forbid()
        result = _filled(self._a.shape, self._a.dtype, "C" if order == "A" else order) if out is None else out
        stream._line.submit(functools.partial(np.copyto, result, self._a), "copies")
        if blocking:
            stream.synchronize()
        return result

    def set(self, arr, stream=None):
        """From pinned memory as it is when the copy happens, from other memory as it is now."""
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if self._a.dtype != arr.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self._a.dtype} array")
        if self._a.shape != arr.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self._a.shape}, new shape: {arr.shape}")
        if not self._a.flags.c_contiguous:
            raise RuntimeError("Cannot set to non-contiguous array")
        arr = np.ascontiguousarray(arr)
        self.data.copy_from_host_async(arr.ctypes.data, arr.nbytes, stream)

    @property
    def data(self):
        return MemoryPointer(self)

    def __float__(self):
        _bring_home()
        return float(self._a)

    def __int__(self):
        _bring_home()
        return int(self._a)

    def __bool__(self):
        _bring_home()
        return bool(self._a)

    def __len__(self):
        return len(self._a)

    def __getitem__(self, i):
        return _operate(_item, "__getitem__", self, i)

    def __setitem__(self, i, v):
        _operate(np.ndarray.__setitem__, "__setitem__", self, i, v)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self._a, name)
        if not callable(value):
            return _wrap(value)
        return functools.partial(_operate, getattr(np.ndarray, name), name, self)

    def __repr__(self):
        return f"fake {self._a!r}"


ndarray.__module__ = "cupy"


def _item(a, i):
    """A view wherever CuPy gives one, also of a single element."""
    x = a[i]
    return a[(*i, ...) if isinstance(i, tuple) else (i, ...)] if isinstance(x, np.generic) else x


def _operator(self, name, *others):
    return _operate(getattr(np.ndarray, name), name, self, *others)


_OPERATORS = "add sub mul truediv pow matmul neg abs lt le gt ge eq ne and or xor invert radd rsub rmul rtruediv"
for _name in _OPERATORS.split():
    setattr(ndarray, f"__{_name}__", functools.partialmethod(_operator, f"__{_name}__"))


def _in_place(self, name, other):
    _operate(getattr(np.ndarray, name), name, self, other)
    return self


for _name in "iadd isub imul itruediv".split():
    setattr(ndarray, f"__{_name}__", functools.partialmethod(_in_place, f"__{_name}__"))


# ------------------------------------------------------------------------------------------ kernels


class _Function:
    """A kernel of a module. CuPy looks at no type; what runs it on the CPU does."""

    def __init__(self, code, name):
        self.code, self.name = code, name

    def __call__(self, grid, block, args, *, shared_mem=0):
        """Scalars are taken as they are now, arrays as they are when the kernel runs."""
        line = get_current_stream()._line
        _require_cuda(CUDADriverError)
        line.look()
        Counts.launches += line.capture is None
        failing = None if line.capture else _counted_launch()
        plain = [a if isinstance(a, np.generic) else _unwrap(a) for a in args]
        plain = [a if isinstance(a, (np.generic, np.ndarray)) else np.asarray(a)[()] for a in plain]
        fresh = [isinstance(a, ndarray) and a.fresh for a in args]
        for a in args:
            if isinstance(a, ndarray):
                a.fresh = False
        if line.capture:
            plain = [_Place(a) if isinstance(a, np.ndarray) else a for a in plain]
        if failing is None:
            line.submit(functools.partial(self._run, grid, block, plain, fresh, shared_mem))
            return
        try:
            line.submit(functools.partial(_fail, failing))
        except CUDARuntimeError as e:
            raise CUDADriverError(e.status) from None

    def _run(self, grid, block, arguments, fresh, shared_mem):
        Counts.kernels.add(self.name)
        plain = _found(arguments)
        if Mode.check:
            plain = [kernels_on_cpu.unwritten(a) if f else a for a, f in zip(plain, fresh, strict=True)]
        fresh[:] = [False] * len(fresh)  # from the second launch of a graph on
        function = kernels_on_cpu.function(self.code, self.name, Mode.check)
        function(grid, block, plain, shared_mem=shared_mem, seed=Mode.seed)


class CompileException(Exception):  # noqa: N818 - CuPy's name
    pass


class RawModule:
    def __init__(self, *, code, options=()):
        assert options == ("--std=c++17",), options  # the runner compiles as these say
        self.code = code

    def get_function(self, name):
        """Compiles, as CuPy does when the first function is asked for."""
        assert not _captures, "a kernel is compiled before a capture begins, not in it"
        _require_cuda(CUDADriverError)
        try:
            kernels_on_cpu.function(self.code, name, Mode.check)
        except kernels_on_cpu.KernelError as e:
            raise CompileException(str(e)) from None
        return _Function(self.code, name)


RawKernel = _Function


def asarray(a, dtype=None):
    """What comes from the host lands in the order of the current stream."""
    if isinstance(a, ndarray):
        return a if dtype is None or a.dtype == dtype else a.astype(dtype)
    line = get_current_stream()._line
    line.forbid()
    Counts.to_device += 1
    staged = np.array(a, dtype)
    order = "F" if staged.flags.f_contiguous and not staged.flags.c_contiguous else "C"
    result = _allocated(staged.shape, staged.dtype, order)
    line.submit(functools.partial(np.copyto, result, staged), "copies")
    return ndarray(result)


def empty(shape, dtype=float):
    return ndarray(_allocated(shape, dtype), fresh=True)


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    return a.get(stream, order, out, blocking)


def empty_like(a):
    return empty(a.shape, a.dtype)


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(np, name)
        return _lift(value, name) if callable(value) and not isinstance(value, type) else value


def is_fake(xp):
    """Whether an array module is the stand-in."""
    return isinstance(xp, _Module)


def module():
    """A fresh `cupy` module."""
    cupy = _Module("cupy")
    cupy.__version__ = "14.0.0"
    cupy.ndarray = ndarray
    cupy.RawKernel = RawKernel
    cupy.RawModule = RawModule
    cupy.asarray, cupy.empty, cupy.empty_like = asarray, empty, empty_like
    cupy.asnumpy = asnumpy
    cupy.get_default_memory_pool = lambda: _pool
    cupy.cuda = types.SimpleNamespace(
        Device=Device,
        Event=Event,
        Graph=Graph,
        MemoryPointer=MemoryPointer,
        PinnedMemoryPointer=PinnedMemoryPointer,
        Stream=Stream,
        alloc_pinned_memory=alloc_pinned_memory,
        get_current_stream=get_current_stream,
        using_allocator=using_allocator,
        compiler=types.SimpleNamespace(CompileException=CompileException),
        driver=types.SimpleNamespace(CUDADriverError=CUDADriverError),
        memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
        runtime=types.SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            streamCaptureModeGlobal=0,
            streamCaptureModeThreadLocal=1,
            streamCaptureModeRelaxed=2,
            getDeviceCount=lambda: 1,
            getDevice=lambda: 0,
            driverGetVersion=lambda: 13000,
            runtimeGetVersion=lambda: 13000,
            memGetInfo=_mem_get_info,
            deviceSynchronize=lambda: Device().synchronize(),
            getDeviceProperties=lambda index: {"name": DEVICE_NAME},
            deviceGetAttribute=lambda attribute, index: ATTRIBUTES[attribute],
        ),
    )
    return cupy


_usual = {}  # the stand-in and the operations that were imported with it, for all tests that want no other


@contextlib.contextmanager
def installed(cupy=None, check=False, seed=0, late="copies", fail_capture=None, memory=None):
    """`cupy` (None: the stand-in) as the machine's CuPy, and nothing remembered of another one."""
    from backprop_gpu import backend

    kernels_on_cpu.require()
    _reset()
    Mode.check, Mode.seed, Mode.late, Mode.fail_capture, Mode.memory = check, seed, late, fail_capture, memory
    _pool.__init__()
    if cupy is None and not _usual:
        _usual["cupy"] = module()
    mine = _usual if cupy is None else {"cupy": cupy}
    names = ("cupy", "backprop_gpu.cuda_ops")
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.modules.update(mine)
    if ops := mine.get("backprop_gpu.cuda_ops"):
        ops._thread.__dict__.clear()  # scratch memory
    backend._probe.cache_clear()
    backend._tell_once.cache_clear()
    try:
        yield mine["cupy"]
    finally:
        Mode.check, Mode.seed = False, 0
        _reset()
        for name, old in before.items():
            now = sys.modules.pop(name, None)
            if cupy is None and getattr(now, "cp", None) is _usual["cupy"]:
                _usual[name] = now
            if old is not None:
                sys.modules[name] = old
        backend._probe.cache_clear()
        backend._tell_once.cache_clear()
