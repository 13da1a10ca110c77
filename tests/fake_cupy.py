"""A stand-in for CuPy without a GPU: NumPy behind an array type as opaque as CuPy's, and kernels that really run.

Device arrays refuse to mix with NumPy arrays or to turn into them by accident, as CuPy's do; every crossing of the bus,
every allocation and every launch is counted. `RawModule` and `RawKernel` compile the very text that they are given and
run it on the CPU (see cuda_on_cpu). What it proves is that the CuPy backend's own Python and its kernels are sound:
names, arguments, dtypes, grids, where each array lives. Where there is a GPU, the same tests run on it too.
"""

import contextlib
import sys
import types
from typing import ClassVar

import kernels_on_cpu
import numpy as np

DEVICE_NAME = b"Fake GPU"


class Counts:
    """What happened since the process began."""

    to_device = 0
    to_host = 0
    allocations = 0
    launches = 0
    kernels: ClassVar = set()  # the names of those launched


class Mode:
    """How kernels run: looked at access by access, in an order drawn from a seed (0: in order)."""

    check = False
    seed = 0


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
        Counts.allocations += getattr(x, "base", None) is None
        return ndarray(np.asarray(x))
    return x


def _lift(f):
    def lifted(*args, **kwargs):
        out = kwargs.get("out")
        if out is not None:
            out.fresh = False
        result = f(*map(_unwrap, args), **{k: _unwrap(v) for k, v in kwargs.items()})
        return out if out is not None else _wrap(result)

    return lifted


class ndarray:  # noqa: N801 - CuPy's name
    __slots__ = ("_a", "fresh")
    __hash__ = None
    __array_ufunc__ = None

    def __init__(self, a, fresh=False):
        self._a = a
        self.fresh = fresh  # never written: the first kernel that gets it must not read it first

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def get(self):
        Counts.to_host += 1
        return self._a.copy()

    def __float__(self):
        Counts.to_host += 1
        return float(self._a)

    def __int__(self):
        Counts.to_host += 1
        return int(self._a)

    def __bool__(self):
        Counts.to_host += 1
        return bool(self._a)

    def __len__(self):
        return len(self._a)

    def __getitem__(self, i):
        return ndarray(np.asarray(self._a[_unwrap(i)]))

    def __setitem__(self, i, v):
        self._a[_unwrap(i)] = _unwrap(v)
        self.fresh = False

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self._a, name)
        return _lift(value) if callable(value) else _wrap(value)

    def __repr__(self):
        return f"fake {self._a!r}"


ndarray.__module__ = "cupy"

_OPERATORS = "add sub mul truediv pow matmul neg abs lt le gt ge eq ne and or xor invert radd rsub rmul rtruediv"
for _name in _OPERATORS.split():
    setattr(ndarray, f"__{_name}__", _lift(getattr(np.ndarray, f"__{_name}__")))


def _in_place(name):
    f = getattr(np.ndarray, f"__{name}__")

    def method(self, other):
        f(self._a, _unwrap(other))
        return self

    return method


for _name in "iadd isub imul itruediv".split():
    setattr(ndarray, f"__{_name}__", _in_place(_name))


class _Function:
    """A kernel of a module. CuPy looks at no type; what runs it on the CPU does."""

    def __init__(self, code, name):
        self.code, self.name = code, name

    def __call__(self, grid, block, args, *, shared_mem=0):
        Counts.launches += 1
        Counts.kernels.add(self.name)
        plain = [a if isinstance(a, np.generic) else _unwrap(a) for a in args]
        plain = [a if isinstance(a, (np.generic, np.ndarray)) else np.asarray(a)[()] for a in plain]
        if Mode.check:
            fresh = [isinstance(a, ndarray) and a.fresh for a in args]
            plain = [kernels_on_cpu.unwritten(a) if f else a for a, f in zip(plain, fresh, strict=True)]
        for a in args:
            if isinstance(a, ndarray):
                a.fresh = False
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
        try:
            kernels_on_cpu.function(self.code, name, Mode.check)
        except kernels_on_cpu.KernelError as e:
            raise CompileException(str(e)) from None
        return _Function(self.code, name)


RawKernel = _Function


def asarray(a, dtype=None):
    if isinstance(a, ndarray):
        return a if dtype is None or a.dtype == dtype else ndarray(a._a.astype(dtype))
    Counts.to_device += 1
    Counts.allocations += 1
    return ndarray(np.array(a, dtype))


def empty(shape, dtype=float):
    """Memory full of NaNs, or -1, so that what nobody wrote is seen."""
    Counts.allocations += 1
    a = np.empty(shape, dtype)
    a.reshape(-1).view(np.uint8).fill(0xFF)
    return ndarray(a, fresh=True)


def empty_like(a):
    return empty(a.shape, a.dtype)


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(np, name)
        return _lift(value) if callable(value) and not isinstance(value, type) else value


def module():
    """A fresh `cupy` module."""
    cupy = _Module("cupy")
    cupy.__version__ = "14.0.0"
    cupy.ndarray = ndarray
    cupy.RawKernel = RawKernel
    cupy.RawModule = RawModule
    cupy.asarray, cupy.empty, cupy.empty_like = asarray, empty, empty_like
    cupy.asnumpy = lambda a: a.get()
    cupy.cuda = types.SimpleNamespace(
        Device=lambda index=0: contextlib.nullcontext(),
        compiler=types.SimpleNamespace(CompileException=CompileException),
        runtime=types.SimpleNamespace(
            getDeviceCount=lambda: 1,
            getDevice=lambda: 0,
            driverGetVersion=lambda: 13000,
            runtimeGetVersion=lambda: 13000,
            getDeviceProperties=lambda index: {"name": DEVICE_NAME},
        ),
    )
    return cupy


_usual = {}  # the stand-in and the operations that were imported with it, for all tests that want no other


@contextlib.contextmanager
def installed(cupy=None, check=False, seed=0):
    """`cupy` (None: the stand-in) as the machine's CuPy, and nothing remembered of another one."""
    from backprop_gpu import backend

    kernels_on_cpu.require()
    Mode.check, Mode.seed = check, seed
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
        for name, old in before.items():
            now = sys.modules.pop(name, None)
            if cupy is None and getattr(now, "cp", None) is _usual["cupy"]:
                _usual[name] = now
            if old is not None:
                sys.modules[name] = old
        backend._probe.cache_clear()
        backend._tell_once.cache_clear()
