"""Files that are replaced whole or not at all: after a crash at any moment the old or the new one is there.

The new content goes into a temporary file in the same directory, which is flushed to the disk and moved over the
target; then the directory is flushed. A writer holds a lock on its temporary file; what one that was killed has left
behind is known by the lock that nobody holds, and swept away by the next writer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import CheckpointError

PREFIX, SUFFIX = ".backprop_gpu-", ".tmp"
MOST_AGE = 24 * 3600  # seconds after which a temporary file is stale where there are no locks to tell
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EISDIR)  # of directories, on some systems


def resolve(path: str | os.PathLike[str]) -> Path:
    """Where a file named `path` would really be written, links followed.

    Raises CheckpointError where it could not be: a directory that is missing or not writable, and where something else
    than a regular file has that name.
    """
    try:
        target = Path(os.path.realpath(path))
        if target.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link that leads to itself", "name another file")
        if not target.parent.is_dir():
            raise CheckpointError(f"{path}: there is no directory {target.parent}", "make the directory first")
        if not os.access(target.parent, os.W_OK):
            raise CheckpointError(f"{path}: {target.parent} is not writable", "save to another directory")
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(target.stat().st_mode):
                raise CheckpointError(f"{path} is not a regular file", "name a file to save to")
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError) as e:  # ValueError: a null byte in the name
        reason, number = getattr(e, "strerror", None) or e, getattr(e, "errno", None)
        raise CheckpointError(f"{path} cannot be written: {reason}", "name another file", number) from None
    return target


def replace(target: Path, pieces: Iterable[Any]) -> None:
    """Put a file of these bytes in the place of `target`, with the permissions of the umask.

    Raises CheckpointError, with the system's errno, where that fails; an older file is as it was then.
    """
    _sweep(target.parent)
    try:
        file, temporary = _locked(target.parent)
        try:
            with file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as e:
        raise CheckpointError(
            f"{target} cannot be written: {e.strerror or e}",
            "free some space or save elsewhere; an older file is untouched",
            e.errno,
        ) from None
    _flush(target)


def _locked(folder: Path) -> tuple[Any, Path]:
    """A temporary file there, open and locked."""
    while True:
        temporary = folder / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
        file = os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb")
        if _lock(file.fileno()) is not False and os.fstat(file.fileno()).st_nlink:
            return file, temporary
        file.close()  # a sweeper came between


def _lock(file: int) -> bool | None:
    """Whether the lock on it could be had; None where there are no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _sweep(folder: Path) -> None:
    """Remove the temporary files of writers that are no more."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.startswith(PREFIX) and entry.name.endswith(SUFFIX):
                with contextlib.suppress(OSError):
                    _remove_if_stale(entry.path)


def _remove_if_stale(path: str) -> None:
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        found = os.fstat(file)
        held = _lock(file)
        stale = found.st_mtime < time.time() - MOST_AGE if held is None else held
        if stat.S_ISREG(found.st_mode) and stale:
            os.unlink(path)
    finally:
        os.close(file)


def _flush(target: Path) -> None:
    """Let the directory's entry reach the disk, where directories can be flushed."""
    if os.name != "posix":
        return
    try:
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as e:
        if e.errno not in _NO_FLUSH:
            raise CheckpointError(
                f"{target} is written, but its directory cannot be flushed to the disk: {e.strerror or e}",
                "check the disk: after a power cut the older file may be back",
                e.errno,
            ) from None
