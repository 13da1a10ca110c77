"""Model files: one safetensors file with the parameters, its metadata with all that rebuilds the network.

Tensors `layer.1.weight` (N_1, N_0), `layer.1.bias` (N_1,), ... in the network's dtype, readable by any safetensors
tool; metadata `format`, `format_version` and `config` (JSON). Files are written beside their target and moved into
place, so that a reader finds the old file or the new one, whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

import numpy as np

from .costs import choose_cost
from .errors import BackpropGPUError, CheckpointError
from .network import Network

FORMAT, VERSION = "backprop_gpu", "1"
MAX_HEADER = 1 << 20
_SETTINGS = ("layers", "hidden", "output", "init", "bias", "precision", "seed")
_TASKS = ("labels", "binary", "multilabel", "regression")
_DTYPES = {"float32": "F32", "float64": "F64"}


def save_network(net: Network, path: str | os.PathLike[str]) -> None:
    """Write `net` to `path`, atomically: theta, settings, cost and task. Public as `bp.save`.

    A symbolic link is followed to its target; a directory or a device is refused. Raises CheckpointError.
    """
    from safetensors.numpy import save

    from .backend import to_host

    tensors = {name: np.ascontiguousarray(to_host(p)) for name, p in _tensors(net).items()}
    config = {**{name: getattr(net, name) for name in _SETTINGS}, "cost": net.cost, "task": net.task}
    metadata = {"format": FORMAT, "format_version": VERSION, "config": json.dumps(config)}
    write_atomically(check_target(path), _in_order(save(tensors, metadata)))


def load_network(path: str | os.PathLike[str], backend: str = "auto") -> Network:
    """The network in a model file. Public as `bp.load`.

    Raises CheckpointError for a file that is missing, damaged, not a model of this library, or of a later format
    version.
    """
    path = Path(path)
    try:
        return _load(path, backend)
    except OSError as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} cannot be read: {e.strerror or e}", "check the path and its permissions", e.errno
        ) from None


def _load(path: Path, backend: str) -> Network:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    with path.open("rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _bad(path, "is not a regular file")
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(MAX_HEADER, size - 8):
            raise _bad(path, "is not a safetensors file, or is truncated")
        header_bytes = file.read(length)
        try:
            header = json.loads(header_bytes)
            metadata = header.pop("__metadata__")
            if metadata["format"] != FORMAT:
                raise _bad(path, f"is a safetensors file, but of {metadata['format']!r}, not of {FORMAT}")
            if metadata["format_version"] != VERSION:
                raise CheckpointError(
                    f"{path} has format version {metadata['format_version']}, this library reads {VERSION}",
                    "install a newer backprop_gpu",
                )
            config = json.loads(metadata["config"])
            settings = {name: config[name] for name in _SETTINGS}
            if config["task"] not in _TASKS:
                raise ValueError(f"task {config['task']!r}")
            cost = choose_cost(config["cost"], settings["output"]).name
            shapes = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise _bad(path, f"is not a model of {FORMAT}: {_first_line(e)}") from None
        try:
            _refuse_lying_size(settings["layers"], size)
            net = Network(**{**settings, "init": "zeros", "backend": backend})
        except (BackpropGPUError, TypeError, ValueError) as e:
            if getattr(e, "cure", None) and type(e).__name__ == "BackendError":
                raise
            raise _bad(path, f"holds impossible settings: {_first_line(e)}") from None
        tensors = _tensors(net)
        wanted = {name: (_DTYPES[net.precision], p.shape) for name, p in tensors.items()}
        if shapes != wanted:
            odd = next(iter(sorted(shapes.items() ^ wanted.items())))[0]
            raise _bad(path, f"does not hold the tensors that its settings call for: see {odd}")
        try:
            values = load(start + header_bytes + file.read())
        except (SafetensorError, TypeError, ValueError) as e:
            raise _bad(path, f"is damaged: {_first_line(e)}") from None
    for name, p in tensors.items():
        if not np.isfinite(values[name]).all():
            raise _bad(path, f"holds NaN or infinity in {name}")
        p[...] = net.backend.asarray(values[name])
    net.init, net.cost, net.task = settings["init"], cost, config["task"]
    return net


def _in_order(content: bytes) -> bytes:
    """The same file, its header sorted: the library's order is random, and equal networks shall give equal files."""
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _refuse_lying_size(layers: Any, size: int) -> None:
    """No file announces more parameters than it has bytes."""
    if sum(o * i for o, i in zip(layers[1:], layers, strict=False)) > size:
        raise ValueError(f"layers {layers} do not fit into {size} bytes")


def _tensors(net: Network) -> dict[str, Any]:
    named = {}
    for l in range(1, net.L + 1):
        named[f"layer.{l}.weight"] = net.W[l]
        if net.b[l] is not None:
            named[f"layer.{l}.bias"] = net.b[l]
    return named


def check_target(path: str | os.PathLike[str]) -> Path:
    """Where a file named `path` would really be written; CheckpointError where it could not be."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise CheckpointError(f"{path} is not a regular file", "name a file to save to")
    if not target.parent.is_dir():
        raise CheckpointError(f"{path}: there is no directory {target.parent}", "make the directory first")
    if not os.access(target.parent, os.W_OK):
        raise CheckpointError(f"{path}: {target.parent} is not writable", "save to another directory")
    return target


def write_atomically(target: Path, content: bytes) -> None:
    """Replace `target` by `content` so that after a crash at any moment the old or the new file is there, whole."""
    temporary = target.with_name(f".backprop_gpu-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        if os.name == "posix":
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as e:
        raise CheckpointError(
            f"{target} cannot be written: {e.strerror or e}",
            "free some space or save elsewhere; an older file is untouched",
            e.errno,
        ) from None


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {what}", "give a file that backprop_gpu saved")


def _first_line(e: Exception) -> str:
    if isinstance(e, KeyError):
        return f"it has no {e.args[0]!r}"
    return (str(e).splitlines() or [type(e).__name__])[0]
