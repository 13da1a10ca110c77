"""Model files: one safetensors file with the parameters, its metadata with all that rebuilds the network.

Tensors `layer.1.weight` (N_1, N_0), `layer.1.bias` (N_1,), ... in the network's dtype, readable by any safetensors
tool; metadata `format`, `format_version`, `config` and `sha256` of each tensor (JSON). Files are written beside their
target and moved into place, so that a reader finds the old file or the new one, whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .activations import OUTPUT, Activation
from .backend import choose, to_host
from .costs import MAKERS, Cost, choose_cost
from .errors import CheckpointError, ConfigError, lookup
from .initializers import INITIALIZERS
from .network import Network, natural_task, precision_on

FORMAT, VERSION = "backprop_gpu", "2"
MAX_HEADER = 1 << 20
_SETTINGS = ("layers", "hidden", "output", "init", "bias", "precision", "seed", "dropout")
_ADDED_IN_2 = {"dropout": 0.0}
_METADATA = {"format", "format_version", "config", "sha256"}
_DTYPES = {"float32": "F32", "float64": "F64"}


def save_network(net: Network, path: str | os.PathLike[str]) -> None:
    """Write `net` to `path`, atomically: theta, settings, cost and task. Public as `bp.save`.

    A symbolic link is followed to its target. Refused are directories, devices, files that are no models of this
    library, and parameters that are not finite. Raises CheckpointError.
    """
    from safetensors.numpy import save

    target = check_target(path)
    tensors = {name: np.ascontiguousarray(to_host(p)) for name, p in _tensors(net).items()}
    for name, p in tensors.items():
        if not np.isfinite(p).all():
            raise CheckpointError(f"{path} is not written: {name} holds NaN or infinity", "train again, at a lower lr")
    config = {**{name: getattr(net, name) for name in _SETTINGS}, "cost": net.cost, "task": net.task}
    metadata = {
        "format": FORMAT,
        "format_version": VERSION,
        "config": json.dumps(config),
        "sha256": json.dumps({name: _sha256(p) for name, p in tensors.items()}),
    }
    write_atomically(target, _in_order(save(tensors, metadata)))


Own = Sequence[Activation | Cost]


def load_network(path: str | os.PathLike[str], backend: str = "auto", own: Own = ()) -> Network:
    """The network in a model file. Public as `bp.load`.

    `own`: the activations and costs of one's own that the network was built or trained with; the file has only their
    names.

    Raises CheckpointError for a file that is missing, damaged, no model of this library, or of a later format version;
    ConfigError and BackendError as `backend.choose`.
    """
    choose(backend)  # what is wrong with the backend is not the file's fault
    if not isinstance(own, (list, tuple)) or not all(type(f) in (Activation, Cost) for f in own):
        raise ConfigError(f"own is {own!r}", "give a list of activations and costs")
    if len({f.name for f in own}) != len(own):
        raise ConfigError("own has two functions of one name", "load with those the network was made with")
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before it is opened: opening a pipe would wait for ever
            raise _bad(path, "is not a regular file")
        with path.open("rb") as file:
            return _load(path, file, backend, own)
    except CheckpointError:
        raise
    except (OSError, ValueError) as e:  # ValueError: a null byte in the name
        reason, errno = getattr(e, "strerror", None) or e, getattr(e, "errno", None)
        raise CheckpointError(f"{path} cannot be read: {reason}", "check the path and its permissions", errno) from None


def _load(path: Path, file: BinaryIO, backend: str, own: Own) -> Network:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    size = os.fstat(file.fileno()).st_size
    head = _read_header(file, size)
    if head is None:
        raise _bad(path, "is not a safetensors file, or is truncated (and nothing else is read: no pickle, .pt, .h5)")
    try:
        header = json.loads(head[8:], object_pairs_hook=_no_duplicates)
        metadata = header.pop("__metadata__")
        if metadata["format"] != FORMAT:
            raise _bad(path, f"is a safetensors file, but of {metadata['format']!r}, not of {FORMAT}")
        if metadata["format_version"] not in ("1", VERSION):
            raise CheckpointError(
                f"{path} has format version {metadata['format_version']!r}, this library reads up to {VERSION!r}",
                "install a newer backprop_gpu",
            )
        config = json.loads(metadata["config"], object_pairs_hook=_no_duplicates)
        if metadata["format_version"] == "1":
            config = {**config, **_ADDED_IN_2}
        digests = json.loads(metadata["sha256"], object_pairs_hook=_no_duplicates)
        shapes = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        if set(config) != {*_SETTINGS, "cost", "task"} or set(metadata) != _METADATA or set(digests) != set(shapes):
            raise ValueError("it has more or fewer entries than it should")
        _refuse_lying_size(config["layers"], size)
        _refuse_unknown(path, config, own)
        net = _from_config(config, backend, own)
    except CheckpointError:
        raise
    except KeyError as e:
        raise _bad(path, f"is not a model of {FORMAT}: it has no {e.args[0]!r}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as e:  # ConfigError is a ValueError
        raise _bad(path, f"is not a model of {FORMAT}: {_first_line(e)}") from None
    tensors = _tensors(net)
    wanted = {name: (_DTYPES[net.dtype.name], p.shape) for name, p in tensors.items()}
    if shapes != wanted:
        odd = min(name for name, _ in shapes.items() ^ wanted.items())
        raise _bad(path, f"does not hold the tensors that its settings call for: see {odd!r}")
    try:
        values = load(head + file.read())
    except (SafetensorError, TypeError, ValueError) as e:
        raise _bad(path, f"is damaged: {_first_line(e)}") from None
    for name, p in tensors.items():
        if _sha256(values[name]) != digests[name]:
            raise _bad(path, f"is damaged: {name} is not what was saved")
        if not np.isfinite(values[name]).all():
            raise _bad(path, f"holds NaN or infinity in {name}")
        p[...] = net.backend.asarray(values[name])
    return net


def _read_header(file: BinaryIO, size: int) -> bytes | None:
    """The length and the header of a safetensors file, or None where it is none."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
        return None
    header = file.read(length)
    return start + header if len(header) == length and header[:1] == b"{" else None


def _from_config(config: dict[str, Any], backend: str, own: Own) -> Network:
    """The network that a file's settings describe, theta still zero; ConfigError, TypeError, ValueError where none."""
    settings = {name: config[name] for name in _SETTINGS}
    if not all(type(bias) is bool for bias in _listed(settings["bias"])):
        raise ValueError(f"bias {settings['bias']!r}")
    for name in _listed(settings["init"]):
        lookup("initialiser", name, INITIALIZERS)
    activations = {f.name: f for f in own if isinstance(f, Activation)}
    settings["hidden"] = [activations.get(name, name) for name in _listed(settings["hidden"])]
    if len(settings["hidden"]) == 1:
        settings["hidden"] = settings["hidden"][0]
    settings["output"] = activations.get(settings["output"], settings["output"])
    where = choose(backend).name
    settings["precision"] = precision_on(where, settings["precision"])
    net = Network(**{**settings, "init": "zeros", "backend": where})
    net.init = settings["init"]
    costs = {c.name: c for c in own if isinstance(c, Cost)}
    net.criterion = choose_cost(costs.get(config["cost"], config["cost"]), net.output)
    if config["task"] not in {natural_task(net.g, net.layers[-1]), "labels"}:
        raise ValueError(f"task {config['task']!r} with output {net.output!r}")
    net.task = config["task"]
    return net


def _refuse_unknown(path: Path, config: dict[str, Any], own: Own) -> None:
    """Tell functions of one's own that are wanted, and not here, from a file that is none of ours."""
    known = {*OUTPUT, *MAKERS, *(f.name for f in own)}
    for name in (*_listed(config["hidden"]), config["output"], str(config["cost"]).partition(":")[0]):
        if isinstance(name, str) and name.isidentifier() and name not in known:
            raise CheckpointError(
                f"{path} uses {name!r}, an activation or a cost of somebody's own",
                "load it in Python: bp.load(path, own=[...]), with that function in the list",
            )


def _listed(setting: Any) -> list[Any]:
    return setting if isinstance(setting, list) else [setting]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("an entry stands there twice")
    return dict(pairs)


def _sha256(p: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(p).data).hexdigest()


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
    """Where a file named `path` would really be written; CheckpointError where it could or should not be."""
    try:
        target = Path(os.path.realpath(path))
        if target.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link that leads to itself", "name another file")
        if not target.parent.is_dir():
            raise CheckpointError(f"{path}: there is no directory {target.parent}", "make the directory first")
        if not os.access(target.parent, os.W_OK):
            raise CheckpointError(f"{path}: {target.parent} is not writable", "save to another directory")
        if target.exists():
            _refuse_foreign(path, target)
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError) as e:
        reason, errno = getattr(e, "strerror", None) or e, getattr(e, "errno", None)
        raise CheckpointError(f"{path} cannot be written: {reason}", "name another file", errno) from None
    return target


def _refuse_foreign(path: str | os.PathLike[str], target: Path) -> None:
    """Only a model of this library, or an empty file, is written over."""
    if not target.is_file():
        raise CheckpointError(f"{path} is not a regular file", "name a file to save to")
    size = target.stat().st_size
    with target.open("rb") as file:
        head = _read_header(file, size)
    if size and (head is None or f'"format":"{FORMAT}"'.encode() not in head.replace(b" ", b"")):
        raise CheckpointError(
            f"{path} exists and is no model of {FORMAT}", "name another file, or remove that one first"
        )


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
    return (str(e).splitlines() or [type(e).__name__])[0]
