"""A stand-in for CuPy on machines without a GPU: NumPy behind an array type as opaque as CuPy's.

Device arrays refuse to mix with NumPy arrays or to turn into them by accident, as CuPy's do; every crossing of the bus
is counted. `RawKernel` compiles nothing: it knows the probe kernel alone. What it proves is that the CuPy backend's own
Python is sound: names, arguments, dtypes, where each array lives. Where there is a GPU, the same tests run on it too.
"""

import contextlib
import sys
import types

import numpy as np

DEVICE_NAME = b"Fake GPU"


class Crossings:
    to_device = 0
    to_host = 0


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
        return ndarray(np.asarray(x))
    return x


def _lift(f):
    def lifted(*args, **kwargs):
        out = kwargs.get("out")
        result = f(*map(_unwrap, args), **{k: _unwrap(v) for k, v in kwargs.items()})
        return out if out is not None else _wrap(result)

    return lifted


class ndarray:  # noqa: N801 - CuPy's name
    __slots__ = ("_a",)
    __hash__ = None
    __array_ufunc__ = None

    def __init__(self, a):
        self._a = a

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def get(self):
        Crossings.to_host += 1
        return self._a.copy()

    def __float__(self):
        Crossings.to_host += 1
        return float(self._a)

    def __int__(self):
        Crossings.to_host += 1
        return int(self._a)

    def __bool__(self):
        Crossings.to_host += 1
        return bool(self._a)

    def __len__(self):
        return len(self._a)

    def __getitem__(self, i):
        return ndarray(np.asarray(self._a[_unwrap(i)]))

    def __setitem__(self, i, v):
        self._a[_unwrap(i)] = _unwrap(v)

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


class RawKernel:
    def __init__(self, code, name):
        if f"void {name}(" not in code:
            raise RuntimeError(f"no kernel {name}")
        self.name = name

    def __call__(self, grid, block, args):
        if self.name != "probe":
            raise NotImplementedError("this stand-in runs the probe kernel alone")
        args[0]._a[0] = 7


def asarray(a, dtype=None):
    if isinstance(a, ndarray):
        return a if dtype is None or a.dtype == dtype else ndarray(a._a.astype(dtype))
    Crossings.to_device += 1
    return ndarray(np.array(a, dtype))


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
    cupy.asarray = asarray
    cupy.asnumpy = lambda a: a.get()
    cupy.cuda = types.SimpleNamespace(
        Device=lambda index=0: contextlib.nullcontext(),
        runtime=types.SimpleNamespace(
            getDeviceCount=lambda: 1,
            driverGetVersion=lambda: 13000,
            runtimeGetVersion=lambda: 13000,
            getDeviceProperties=lambda index: {"name": DEVICE_NAME},
        ),
    )
    return cupy


@contextlib.contextmanager
def installed(cupy=None):
    """`cupy` (None: the stand-in) as the machine's CuPy, and nothing remembered of another one."""
    from backprop_gpu import backend

    cupy = module() if cupy is None else cupy
    names = ("cupy", "backprop_gpu.cuda_ops")
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.modules["cupy"] = cupy
    backend._probe.cache_clear()
    backend._tell_once.cache_clear()
    try:
        yield cupy
    finally:
        for name, old in before.items():
            sys.modules.pop(name, None)
            if old is not None:
                sys.modules[name] = old
        backend._probe.cache_clear()
        backend._tell_once.cache_clear()
