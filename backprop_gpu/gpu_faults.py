"""What can go wrong on a GPU in the middle of things: memory that is not there, and a context that is lost.

After some errors (an access to an address that is none, uncorrectable memory) every call of CUDA fails until the
process ends. From then on none is made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from .errors import BackendError

OUT_OF_MEMORY = {"CUDARuntimeError": 2, "CUDADriverError": 2, "CUBLASError": 3}  # each has numbers of its own
# Of the first two, those after which CUDA is lost: of hardware, and those of which CUDA 13.0's driver_types.h says that
# "the process must be terminated and relaunched".
STICKY = {214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911}
_RESTART = "start the process again, and resume from the last checkpoint; if it happens again, look with nvidia-smi -q"
_DOCTOR = "look with backprop-gpu doctor, and nvidia-smi, whether the GPU is in order"
_lost = ""  # the error that lost it


def lost() -> bool:
    """Whether CUDA is lost to this process."""
    return bool(_lost)


def refuse_if_lost() -> None:
    """BackendError where CUDA is lost to this process."""
    if _lost:
        raise _of_lost_context()


def loses(e: BaseException, xp: Any) -> bool:
    """Whether that error of CuPy's has lost CUDA to this process; it is known to be lost from then on."""
    global _lost
    if not _lost and _is_cupys(e) and not _of_memory(e):
        if getattr(e, "status", None) not in STICKY:
            try:  # cuBLAS does not say why it fails
                xp.cuda.Device().synchronize()
            except Exception as later:
                e = later
        if getattr(e, "status", None) in STICKY:
            _lost = _first_line(e)
    return bool(_lost)


@contextlib.contextmanager
def told(xp: Any, batch_size: int | None = None) -> Iterator[None]:
    """Turns errors of CUDA into BackendErrors. `batch_size`: of a training."""
    try:
        yield
    except Exception as e:
        if xp is np or not _is_cupys(e):
            raise
        if _of_memory(e):
            raise _with_notes(_out_of_memory(e, xp, batch_size), e) from None
        if loses(e, xp):
            raise _with_notes(_of_lost_context(), e) from None
        raise _with_notes(BackendError(f"the GPU fails: {type(e).__name__}: {_first_line(e)}", _DOCTOR), e) from e


def _with_notes(told: BackendError, e: BaseException) -> BackendError:
    """With what is noted on e: in which callback it came up, say."""
    for note in getattr(e, "__notes__", ()):
        told.add_note(note)
    return told


def _of_lost_context() -> BackendError:
    return BackendError(f"the context of the GPU is lost: {_lost}", _RESTART)


def _is_cupys(e: BaseException) -> bool:
    return type(e).__module__.partition(".")[0] in ("cupy", "cupy_backends")


def _of_memory(e: BaseException) -> bool:
    status = getattr(e, "status", None)
    return isinstance(e, MemoryError) or (status is not None and status == OUT_OF_MEMORY.get(type(e).__name__))


def _out_of_memory(e: BaseException, xp: Any, batch_size: int | None) -> BackendError:
    free = ""
    with contextlib.suppress(Exception):
        free = "; {:,} of {:,} bytes of the GPU are free".format(*xp.cuda.runtime.memGetInfo())
    what = f" with batches of {batch_size} samples" if batch_size else ""
    smaller = f"a smaller batch_size, {batch_size // 2} say" if batch_size and batch_size > 1 else "smaller batches"
    return BackendError(
        f"out of GPU memory{what}: {_first_line(e).rstrip('.')}{free}",
        f"take {smaller}, or a smaller network, or end what else uses the GPU; parameters are those of the last step",
    )


def _first_line(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]
