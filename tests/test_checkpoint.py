"""Model files: what is saved comes back, and nothing else does."""

import copy
import hashlib
import json
import os
import stat

import numpy as np
import pytest
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

import backprop_gpu as bp
from backprop_gpu.backend import to_host


def trained(**settings):
    net = bp.Network([4, 5, 3], seed=3, **{"backend": "numpy", **settings})
    rng = np.random.default_rng(0)
    bp.train(net, rng.normal(size=(30, 4)), rng.integers(0, 3, 30), epochs=1)
    return net


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("output", ["softmax", "sigmoid", "identity", "tanh"])
def test_what_is_saved_comes_back(backend, tmp_path, precision, bias, output):
    net = trained(
        precision=precision, bias=bias, output=output, hidden="gelu", init="glorot_uniform", backend=backend.name
    )
    path = tmp_path / "model.safetensors"
    bp.save(net, path)
    back = bp.load(path, backend=backend.name)
    np.testing.assert_array_equal(to_host(back.theta), to_host(net.theta))
    for name in ("layers", "hidden", "output", "init", "bias", "precision", "seed", "cost", "task"):
        assert getattr(back, name) == getattr(net, name), name
    X = np.random.default_rng(1).normal(size=(7, 4))
    np.testing.assert_array_equal(back.predict(X), net.predict(X))
    assert back.task == "labels"


def test_any_safetensors_tool_reads_it(tmp_path):
    net = trained()
    bp.save(net, tmp_path / "m")
    tensors = load_tensors((tmp_path / "m").read_bytes())
    assert sorted(tensors) == ["layer.1.bias", "layer.1.weight", "layer.2.bias", "layer.2.weight"]
    np.testing.assert_array_equal(tensors["layer.1.weight"], net.W[1])


def test_train_saves(tmp_path):
    net = bp.Network([4, 3], backend="numpy")
    bp.train(net, np.eye(4), [0, 1, 2, 0], epochs=1, save=tmp_path / "m")
    np.testing.assert_array_equal(bp.load(tmp_path / "m", "numpy").theta, net.theta)


def test_symlinks_are_followed_and_the_mode_follows_the_umask(tmp_path):
    net = trained()
    (tmp_path / "real").mkdir()
    bp.save(bp.Network([1, 1], backend="numpy"), tmp_path / "real" / "m")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "m")
    old = os.umask(0o027)
    try:
        bp.save(net, tmp_path / "link")
    finally:
        os.umask(old)
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "real" / "m").stat().st_mode) == 0o640
    assert bp.load(tmp_path / "real" / "m", "numpy").layers == [4, 5, 3]
    assert sorted(p.name for p in (tmp_path / "real").iterdir()) == ["m"]


@pytest.mark.parametrize("target", [".", "no/such/m", "pipe"])
def test_targets_refused(tmp_path, target):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(bp.CheckpointError):
        bp.save(trained(), tmp_path / target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipe"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call):
    net, path = trained(), tmp_path / "m"
    bp.save(net, path)
    before = path.read_bytes()
    net.theta[...] = 0

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(bp.CheckpointError, match="No space left") as e:
            bp.save(net, path)
    assert e.value.errno == 28
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


OF_METADATA = "sha256_of_metadata"


def forge(tmp_path, tensors=None, drop=(), config=None, extra=None, digests=True, **metadata):
    """A model file with parts of its metadata or tensors exchanged, and digests that fit, unless told otherwise."""
    bp.save(trained(), tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    length = int.from_bytes(content[:8], "little")
    meta = json.loads(content[8 : 8 + length])["__metadata__"]
    meta["config"] = json.dumps({**json.loads(meta["config"]), **(config or {})})
    kept = {k: v for k, v in {**load_tensors(content), **(tensors or {})}.items() if k not in drop}
    if digests:
        meta["sha256"] = json.dumps({k: hashlib.sha256(v.tobytes()).hexdigest() for k, v in kept.items()})
    meta.update(metadata)
    meta.update(extra or {})
    own = meta.pop(OF_METADATA)
    if digests:
        own = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    if OF_METADATA not in drop:
        meta[OF_METADATA] = own
    (tmp_path / "m").write_bytes(save_tensors(kept, meta))
    return tmp_path / "m"


NAN = np.full((5, 4), np.nan, np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "other"}, "but of 'other'"),
        ({"format_version": "4"}, "has format version '4'"),
        ({"config": {"layers": [4, 6, 3]}}, "does not hold the tensors"),
        ({"config": {"layers": [10**6, 10**6]}}, "do not fit into"),
        ({"config": {"layers": [1] * 9}}, "8 layers in 4 tensors"),
        ({"config": {"layers": "many"}}, "is not a model"),
        ({"config": {"layers": [4]}}, "is not a model"),
        ({"config": {"hidden": "evil"}}, "uses 'evil', an activation or a cost of somebody's own"),
        ({"config": {"precision": "float64"}}, "does not hold the tensors"),
        ({"config": {"bias": False}}, "does not hold the tensors"),
        ({"config": {"task": "world peace"}}, "task 'world peace'"),
        ({"config": {"task": "binary"}}, "task 'binary' with output 'softmax'"),
        ({"config": {"bias": "false"}}, "bias 'false'"),
        ({"config": {"init": {"a": 1}}}, "unknown initialiser"),
        ({"config": {"hidden": ["relu", "tanh"]}}, "hidden has 2 entries for 1 layers"),
        ({"config": {"hidden": [5]}}, "unknown hidden activation 5"),
        ({"config": {"hidden": {"a": 1}}}, "is not a model"),
        ({"config": {"output": ["softmax"]}}, "is not a model"),
        ({"config": {"bias": [True, "no"]}}, "bias [True, 'no']"),
        ({"config": {"bias": [True]}}, "bias has 1 entries for 2 layers"),
        ({"config": {"init": ["he", "evil"]}}, "unknown initialiser 'evil'"),
        ({"config": {"dropout": 2}}, "dropout is 2"),
        ({"config": {"dropout": "0.5"}}, "dropout is '0.5'"),
        ({"config": {"dropout": [[0.5]]}}, "dropout is [0.5]"),
        ({"config": {"cost": "huber:delta=-1"}}, "delta is -1.0"),
        ({"config": {"cost": ["huber"]}}, "is not a model"),
        ({"config": {"colour": "red"}}, "more or fewer entries"),
        ({"extra": {"colour": "red"}}, "more or fewer entries"),
        ({"config": {"seed": -1}}, "seed is -1"),
        (
            {"digests": False, "tensors": {"layer.1.bias": np.zeros(5, np.float32)}},
            "layer.1.bias is not what was saved",
        ),
        ({"config": {"cost": "hinge"}}, "uses 'hinge', an activation or a cost of somebody's own"),
        ({"config": {"output": "identity"}}, "is not a model"),  # does not go with the cost
        ({"drop": ["layer.2.bias"]}, "does not hold the tensors"),
        ({"drop": [OF_METADATA]}, f"it has no '{OF_METADATA}'"),
        ({"digests": False, "config": {"seed": 7}}, "is damaged: its metadata are not what was saved"),
        ({"tensors": {"layer.3.bias": np.zeros(3, np.float32)}}, "does not hold the tensors"),
        ({"tensors": {"layer.1.weight": np.zeros((4, 5), np.float32)}}, "does not hold the tensors"),
        ({"tensors": {"layer.1.weight": np.zeros((5, 4), np.int32)}}, "does not hold the tensors"),
        ({"tensors": {"layer.1.weight": NAN}}, "NaN or infinity in layer.1.weight"),
    ],
)
def test_forged_files_are_refused(tmp_path, changes, words):
    path = forge(tmp_path, **changes)
    with pytest.raises(bp.CheckpointError) as e:
        bp.load(path, "numpy")
    assert words in e.value.cause
    assert len(str(e.value).splitlines()) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04}.",
        b"PK\x03\x04" + bytes(100),
        (2**62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (6).to_bytes(8, "little") + b"\xff\xfe\xff\xfe\xff\xfe",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        save_tensors({"a": np.zeros(3)}),
        save_tensors({"a": np.zeros(3)}, {"format": "pt"}),
    ],
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(bp.CheckpointError):
        bp.load(tmp_path / "m", "numpy")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m", b"\x80\x04\x95" + bytes(99), "a pickle"), ("m.pt", b"PK\x03\x04" + bytes(99), "a zip archive"),
        ("m.h5", b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"), ("m.npy", b"\x93NUMPY" + b"x", "a NumPy array"),
        ("m.joblib", b"x" * 99, "a .joblib file by its name"), ("M.PTH", b"", "a .PTH file by its name"),
    ],
)  # fmt: skip
def test_pickles_and_their_like_are_refused_by_name(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(bp.CheckpointError) as e:
        bp.load(tmp_path / name, "numpy")
    assert f"is {words}" in e.value.cause
    assert "backprop_gpu never unpickles" in e.value.cause


def test_every_flipped_bit_is_found(tmp_path):
    bp.save(trained(), tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    first = 8 + int.from_bytes(content[:8], "little")
    assert len(content) - first == 4 * 43
    for at in range(len(content)):
        for bit in range(8) if at < 8 or at >= first else [at % 8]:
            damaged = bytearray(content)
            damaged[at] ^= 1 << bit
            (tmp_path / "x").write_bytes(damaged)
            with pytest.raises(bp.CheckpointError) as e:
                bp.load(tmp_path / "x", "numpy")
            assert at < first or "is not what was saved" in e.value.cause


def test_an_entry_that_stands_there_twice(tmp_path):
    bp.save(trained(), tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = b'{"layer.1.bias":{"dtype":"F32","shape":[5],"data_offsets":[0,20]},' + content[9 : 8 + length]
    (tmp_path / "m").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    with pytest.raises(bp.CheckpointError, match="stands there twice"):
        bp.load(tmp_path / "m", "numpy")


def test_what_is_no_model_is_not_written_over(tmp_path):
    for name, content in {"thesis.txt": b"all is well", "other": save_tensors({"a": np.zeros(1)})}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(bp.CheckpointError, match="exists and is no model"):
            bp.save(trained(), tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    (tmp_path / "empty").touch()
    for name in ("empty", "empty", "new"):
        bp.save(trained(), tmp_path / name)
        assert bp.load(tmp_path / name, "numpy").layers == [4, 5, 3]


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    net = trained()
    bp.save(net, tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    net.W[2][0, 0] = np.nan
    with pytest.raises(bp.CheckpointError, match=r"layer\.2\.weight holds NaN"):
        bp.save(net, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before


def test_names_that_lead_nowhere(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for name in ("loop", "x" * 300, "a\0b", "pipe"):
        with pytest.raises(bp.CheckpointError):
            bp.save(trained(), tmp_path / name)
        with pytest.raises(bp.CheckpointError):
            bp.load(tmp_path / name)
    assert (tmp_path / "loop").is_symlink()


def test_a_wrong_backend_is_not_the_files_fault(tmp_path, monkeypatch):
    bp.save(trained(), tmp_path / "m")
    with pytest.raises(bp.ConfigError, match="unknown backend 'torch'"):
        bp.load(tmp_path / "m", backend="torch")


def test_errors_travel(tmp_path):
    with pytest.raises(bp.CheckpointError) as e:
        bp.load(tmp_path / "nothing")
    again = copy.deepcopy(e.value)
    assert (again.cause, again.cure, again.errno) == (e.value.cause, e.value.cure, 2)
    diverged = copy.copy(bp.DivergenceError(1, 2, 0.5))
    assert (diverged.epoch, diverged.step, diverged.learning_rate) == (1, 2, 0.5)


def test_missing_files_and_directories(tmp_path):
    with pytest.raises(bp.CheckpointError, match="No such file") as e:
        bp.load(tmp_path / "m")
    assert isinstance(e.value, OSError)
    assert e.value.errno == 2
    with pytest.raises(bp.CheckpointError):
        bp.load(tmp_path)


def test_truncated_and_extended_files_are_refused(tmp_path):
    bp.save(trained(), tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    for damaged in (*(content[:n] for n in range(0, len(content), 13)), content + b"\0"):
        (tmp_path / "x").write_bytes(damaged)
        with pytest.raises(bp.CheckpointError):
            bp.load(tmp_path / "x", "numpy")
