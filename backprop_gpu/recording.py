"""What NumPy is told to do with some arrays, written down once, to be done again without Python in between.

The operations of `numpy_ops` are run once on `watched` arrays: each call of NumPy that reads or writes one of them is
made, and written on a `Tape`, with the arrays that it was made with. `Tape.replay` makes the calls again, on the same
memory. What a tape cannot hold raises UnrecordableError while it is recorded: a value that leaves the arrays for
Python, for it may be another one next time, and a result in an array that NumPy made, for the next call would make
another one.

A watched array is no array, but stands for one: NumPy's C code cannot look past it, and whatever asks it for more than
is written down here is refused. Arrays that are not watched are read again by each replay; what Python itself reads of
them it reads while recording, and then no more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from . import blas
from .activations import Array


class UnrecordableError(Exception):
    """An array was used in a way that cannot be repeated from memory alone."""


class Tape:
    """Calls of NumPy, to be made in the order in which they came."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], Any]] = []

    def watched(self, a: Array) -> Array:
        """The same memory, as something like an array whose uses are written on this tape."""
        return _Watched(a, self)

    def note(self, f: Callable[..., Any], arguments: Iterable[Any], more: dict[str, Any]) -> Any:
        """Make a call on the memory itself, and write it down."""
        call = functools.partial(f, *map(_plain, arguments), **{name: _plain(a) for name, a in more.items()})
        self.calls.append(call)
        return call()

    def replay(self) -> None:
        """Make all calls again."""
        for call in self.calls:
            call()


def _refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise UnrecordableError("a number leaves the arrays")


class _Watched(NDArrayOperatorsMixin):
    """Stands for an array. NumPy reads and writes it by its two protocols alone, and a tape notes what they do.

    Operators are ufuncs: `a += b` is np.add(a, b, out=a), and `a + b` makes an array of its own.
    """

    __slots__ = ("_memory", "_tape")

    def __init__(self, memory: Array, tape: Tape) -> None:
        self._memory, self._tape = memory, tape

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = (), **more: Any) -> Any:
        if len(out) != 1 or out[0] is None:
            raise UnrecordableError(f"{ufunc.__name__} makes an array of its own")
        f = blas.matmul if ufunc is np.matmul and not more else getattr(ufunc, method)
        _tape_of((*inputs, *out, *more.values())).note(f, inputs, {"out": out[0], **more})
        return out[0]

    def __array_function__(self, f: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if f not in _FUNCTIONS:
            raise UnrecordableError(f"{f.__name__} is not written down")
        method, at = _FUNCTIONS[f]
        out = args[0] if at == 0 else kwargs.get("out")
        if out is None:
            raise UnrecordableError(f"{f.__name__} makes an array of its own")
        call, rest = (f, args) if method is None else (getattr(_plain(args[0]), method), args[1:])
        _tape_of((*args, *kwargs.values())).note(call, rest, kwargs)
        return out

    # -------------------------------------------------------------- what does not change: where the memory lies

    @property
    def shape(self) -> tuple[int, ...]:
        return self._memory.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._memory.dtype

    @property
    def ndim(self) -> int:
        return self._memory.ndim

    @property
    def size(self) -> int:
        return self._memory.size

    def __len__(self) -> int:
        return len(self._memory)

    def __repr__(self) -> str:
        return f"<watched {self.dtype} {self.shape}>"

    @property
    def T(self) -> Array:
        return self._tape.watched(self._memory.T)

    def reshape(self, *shape: Any) -> Array:
        return self._part(self._memory.reshape(*shape))

    def __getitem__(self, key: Any) -> Any:
        if _is_watched(key):
            raise UnrecordableError("an index may be another one next time")
        return self._part(self._memory[key])

    def _part(self, part: Any) -> Array:
        if not (isinstance(part, np.ndarray) and np.may_share_memory(part, self._memory)):
            raise UnrecordableError("a part of an array is copied")
        return self._tape.watched(part)

    # ------------------------------------------------------------------------------ what does, besides ufuncs

    def __setitem__(self, key: Any, value: Any) -> None:
        np.copyto(self[key], value)

    def max(self, axis: Any = None, out: Any = None, **more: Any) -> Array:
        return np.maximum.reduce(self, axis=axis, out=out, **more)

    def sum(self, axis: Any = None, dtype: Any = None, out: Any = None, **more: Any) -> Array:
        return np.add.reduce(self, axis=axis, dtype=dtype, out=out, **more)

    # ------------------------------------------------------------------------------------------ all the rest

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols that Python and NumPy ask for before they go on to others
            raise AttributeError(name)
        raise UnrecordableError(f"{name} is not written down")

    __bool__ = __int__ = __float__ = __complex__ = __index__ = __iter__ = __contains__ = _refuse
    __array__ = __reduce_ex__ = _refuse


# Functions of NumPy that are no ufuncs: the method that does the same, and which argument is written (None: out=).
_FUNCTIONS: dict[Any, tuple[str | None, int | None]] = {
    np.copyto: (None, 0),
    np.put: ("put", 0),
    np.take: ("take", None),
    np.argmax: ("argmax", None),
}


def noted(f: Callable[..., Any], *arguments: Any) -> None:
    """f(*arguments), on the memory itself; written down where any of them is watched."""
    tape = next((a._tape for a in arguments if isinstance(a, _Watched)), None)
    if tape:
        tape.note(f, arguments, {})
    else:
        f(*arguments)


def _plain(a: Any) -> Any:
    return a._memory if isinstance(a, _Watched) else a


def _is_watched(key: Any) -> bool:
    return any(isinstance(part, _Watched) for part in (key if isinstance(key, tuple) else (key,)))


def _tape_of(arrays: Iterable[Any]) -> Tape:
    """That of any of these."""
    tape = next((a._tape for a in arrays if isinstance(a, _Watched)), None)
    assert tape is not None
    return tape
