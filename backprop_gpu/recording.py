"""What NumPy is told to do with some arrays, written down once, to be done again without Python in between.

The operations of `numpy_ops` are run once on `watched` arrays: each call of NumPy that reads or writes one of them is
made, and written on a `Tape`, with the arrays that it was made with. `Tape.replay` makes the calls again, on the same
memory. What a tape cannot hold raises Unrecordable while it is recorded: a value that leaves the arrays for Python, for
it may be another one next time, and a result in an array that NumPy made, for the next call would make another one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from . import blas
from .activations import Array


class Unrecordable(Exception):
    """An array was used in a way that cannot be repeated from memory alone."""


class Tape:
    """Calls of NumPy, to be made in the order in which they came."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], Any]] = []

    def watched(self, a: Array) -> Array:
        """The same memory, as an array whose uses are written on this tape."""
        seen = np.asarray(a).view(_Watched)
        seen.tape = self
        return seen

    def note(self, f: Callable[..., Any], arguments: Iterable[Any], more: dict[str, Any]) -> Any:
        """Make a call on the memory itself, and write it down."""
        call = functools.partial(f, *map(_plain, arguments), **{name: _plain(a) for name, a in more.items()})
        self.calls.append(call)
        return call()

    def replay(self) -> None:
        """Make all calls again."""
        for call in self.calls:
            call()


class _Watched(np.ndarray):
    """A view of memory, whose uses by NumPy are written on its tape."""

    tape: Tape | None = None

    def __array_finalize__(self, of: Any) -> None:
        self.tape = getattr(of, "tape", None)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = (), **more: Any) -> Any:
        if len(out) != 1 or out[0] is None:
            raise Unrecordable(f"{ufunc.__name__} makes an array of its own")
        f = blas.matmul if ufunc is np.matmul else getattr(ufunc, method)
        _tape_of((*inputs, *out)).note(f, inputs, {"out": out[0], **more})
        return out[0]

    def __array_function__(self, f: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if f not in _FUNCTIONS:
            raise Unrecordable(f"{f.__name__} is not written down")
        method, at = _FUNCTIONS[f]
        out = args[0] if at == 0 else kwargs.get("out")
        if out is None:
            raise Unrecordable(f"{f.__name__} makes an array of its own")
        call, rest = (f, args) if method is None else (getattr(_plain(args[0]), method), args[1:])
        _tape_of((*args, *kwargs.values())).note(call, rest, kwargs)
        return out

    def __setitem__(self, key: Any, value: Any) -> None:
        np.copyto(self[key], value)

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        if not (isinstance(part, np.ndarray) and np.may_share_memory(_plain(part), _plain(self))):
            raise Unrecordable("a part of an array is copied")
        return part

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise Unrecordable("a number leaves the arrays")

    __bool__ = __int__ = __float__ = __index__ = __iter__ = __contains__ = _refuse  # type: ignore[assignment]
    item = tolist = tobytes = copy = astype = flatten = _refuse


# Functions of NumPy that are no ufuncs: the method that does the same, and which argument is written (None: out=).
_FUNCTIONS: dict[Any, tuple[str | None, int | None]] = {
    np.copyto: (None, 0),
    np.put: ("put", 0),
    np.take: ("take", None),
    np.argmax: ("argmax", None),
}


def noted(f: Callable[..., Any], *arguments: Any) -> None:
    """f(*arguments), on the memory itself; written down where any of them is watched."""
    tape = next((a.tape for a in arguments if isinstance(a, _Watched)), None)
    if tape:
        tape.note(f, arguments, {})
    else:
        f(*arguments)


def _plain(a: Any) -> Any:
    return a.view(np.ndarray) if isinstance(a, _Watched) else a


def _tape_of(arrays: Iterable[Any]) -> Tape:
    """That of any of these."""
    tape = next((a.tape for a in arrays if isinstance(a, _Watched)), None)
    assert tape is not None
    return tape
