"""IDX and NumPy files: MNIST as it ships, and every way in which a file can lie."""

import gzip
import io
import os
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import backprop_gpu as bp
from backprop_gpu.datasets import MNIST, read_idx, read_npy

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array, code=8):
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
SOUND = idx(IMAGES)
PACKED = gzip.compress(SOUND)


def test_mnist(mnist):
    train, test = mnist
    assert train.images.shape == (60_000, 784)
    assert test.images.shape == (10_000, 784)
    assert train.images.dtype == train.labels.dtype == test.images.dtype == np.uint8
    assert np.bincount(train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert test.labels[:3].tolist() == [7, 2, 1]
    assert (MNIST / "NOTICE").is_file()


@pytest.mark.parametrize("odd", ["images", "labels"])
def test_mnist_is_known_by_its_digests(tmp_path, monkeypatch, odd):
    """Sound files of the right shape, but not MNIST: refused as "mnist", read as a directory."""
    for name in (p.name for p in MNIST.glob("*.gz")):
        (tmp_path / name).symlink_to(MNIST / name)
    name = f"t10k-{odd}-idx{3 if odd == 'images' else 1}-ubyte.gz"
    content = bytearray(gzip.decompress((MNIST / name).read_bytes()))
    content[-1] ^= 1
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(gzip.compress(content, 1))
    assert len(bp.datasets.load(tmp_path)[1].labels) == 10_000
    monkeypatch.setattr(bp.datasets, "MNIST", tmp_path)
    with pytest.raises(bp.DataError, match="is not the file it should be"):
        bp.datasets.load("mnist")


@pytest.mark.parametrize("content", [SOUND, PACKED], ids=["plain", "gzip"])
def test_a_sound_file(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    np.testing.assert_array_equal(read_idx(tmp_path / "x", 3), IMAGES)


BOMB = gzip.compress(idx(np.zeros((1, 1, 1), np.uint8))[:-1] + bytes(50_000_000))
HUGE = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**31, 2**31, 2**31)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty (0 bytes)"),
        (SOUND[:3], "is not an IDX file"),
        (SOUND[:9], "is truncated: its header ends after 9 of 16 bytes"),
        (SOUND[:-1], "is truncated: 23 of 24 bytes"),
        (SOUND + b"\0", "is longer than its header says"),
        (b"\1" + SOUND[1:], "is not an IDX file"),
        (b"<!DOCTYPE html><html>404</html>", "is not an IDX file"),
        (idx(IMAGES, code=13), "holds elements of type 0x0d"),
        (idx(np.zeros(5, np.uint8)), "has 1 dimensions (labels), not 3 (images)"),
        (idx(np.zeros((2, 0, 4), np.uint8)), "announces no data"),
        (HUGE, "more than the limit"),
        (bytes([0, 0, 8, 3]) + struct.pack(">3I", 1000, 100, 100), "cannot hold"),
        (gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", 1000, 1000, 100)), "cannot hold"),
        (PACKED[:-9], "is truncated: the gzip stream breaks off after"),
        (PACKED[:5], "is truncated: the gzip stream breaks off after 0"),
        (PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:], "is damaged"),
        (PACKED[:12] + b"\xff\xff\xff" + PACKED[15:], "is damaged"),
        (PACKED + b"junk", "goes on after the end of its gzip stream"),
        (PACKED + bytes(100), "goes on after the end of its gzip stream"),
        (PACKED + PACKED, "goes on after the end of its gzip stream"),
        (gzip.compress(SOUND + b"x"), "is longer than its header says"),
        (gzip.compress(SOUND[:-1]), "is truncated: 23 of 24 bytes"),
        (BOMB, "is longer than its header says"),
    ],
)
def test_files_that_lie(tmp_path, content, words):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(bp.DataError) as e:
        read_idx(path, 3)
    assert words in e.value.cause
    assert str(path) in e.value.cause
    assert len(str(e.value).splitlines()) == 2


def test_a_name_that_says_gzip_and_content_that_does_not(tmp_path):
    (tmp_path / "x.gz").write_bytes(SOUND)
    with pytest.raises(bp.DataError, match="is not a gzip file"):
        read_idx(tmp_path / "x.gz", 3)


def test_another_file_than_its_digest_says(tmp_path):
    (tmp_path / "x").write_bytes(SOUND)
    with pytest.raises(bp.DataError, match="is not the file it should be"):
        read_idx(tmp_path / "x", 3, sha256="0" * 64)


def test_limits_and_missing_files(tmp_path):
    (tmp_path / "x").write_bytes(SOUND)
    with pytest.raises(bp.DataError, match="announces 24 bytes, more than the limit of 23"):
        read_idx(tmp_path / "x", 3, max_bytes=23)
    with pytest.raises(bp.DataError, match="No such file"):
        read_idx(tmp_path / "y", 3)
    with pytest.raises(bp.DataError, match="not a regular file"):
        read_idx(tmp_path, 3)


@given(data=st.data())
def test_no_damage_gets_through(data, tmp_path_factory):
    """Whatever happens to a file's bytes: the array, or a DataError."""
    content = bytearray(data.draw(st.sampled_from([SOUND, PACKED])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[at] = data.draw(st.integers(0, 255))
        else:
            content = content[: at + 1]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        assert read_idx(path, 3).dtype == np.uint8
    except bp.DataError:
        pass


def write_idx_directory(folder, compress=False, **replaced):
    parts = {
        TRAIN_IMAGES: np.arange(6 * 4, dtype=np.uint8).reshape(6, 2, 2),
        TRAIN_LABELS: np.array([0, 1, 2, 0, 1, 2], np.uint8),
        "t10k-images-idx3-ubyte": np.zeros((3, 2, 2), np.uint8),
        "t10k-labels-idx1-ubyte": np.array([0, 1, 2], np.uint8),
    }
    for name, array in parts.items():
        array = replaced.get(name[:11].replace("-", "_"), array)
        if array is not None:
            content = idx(array)
            path = folder / (name + ".gz" if compress else name)
            path.write_bytes(gzip.compress(content) if compress else content)
    return folder


@pytest.mark.parametrize("compress", [True, False])
def test_a_directory_under_mnists_names(tmp_path, compress):
    train, test = bp.datasets.load(write_idx_directory(tmp_path, compress))
    assert train.images.shape == (6, 4)
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert test.images.shape == (3, 4)


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"train_label": None}, f"has no file {TRAIN_LABELS} or {TRAIN_LABELS}.gz"),
        ({"train_label": np.zeros(5, np.uint8)}, f"{TRAIN_IMAGES} holds 6 images, {TRAIN_LABELS} 5 labels"),
        ({"train_label": np.zeros((6, 2, 2), np.uint8)}, "has 3 dimensions (images), not 1 (labels)"),
        ({"t10k_images": np.zeros((3, 2, 3), np.uint8)}, "training images have 4 pixels, test images 6"),
    ],
)
def test_directories_that_do_not_fit_together(tmp_path, replaced, words):
    with pytest.raises(bp.DataError) as e:
        bp.datasets.load(write_idx_directory(tmp_path, **replaced))
    assert words in e.value.cause


def test_unknown_sources():
    with pytest.raises(bp.DataError, match="there is no dataset 'mnits'"):
        bp.datasets.load("mnits")


# --------------------------------------------------------------------------------------------------- NumPy's files

ARRAYS = {
    "x_train": np.arange(24, dtype=np.float32).reshape(6, 2, 2),
    "y_train": np.array([0, 1, 2, 0, 1, 2]),
    "x_test": np.ones((2, 4)),
    "y_test": np.array([1, 0]),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    save(tmp_path / "d.npz", **ARRAYS)
    train, test = bp.datasets.load(tmp_path / "d.npz")
    np.testing.assert_array_equal(train.images, ARRAYS["x_train"].reshape(6, 4))
    np.testing.assert_array_equal(test.labels, ARRAYS["y_test"])
    save(tmp_path / "t.npz", x_train=np.asfortranarray(np.ones((3, 4)).cumsum(0)), y_train=np.arange(3) / 2)
    train, test = bp.datasets.load(str(tmp_path / "t.npz"))
    assert test is None
    assert train.images[:, 0].tolist() == [1, 2, 3]
    assert train.labels.tolist() == [0, 0.5, 1]


def test_npz_that_does_not_do(tmp_path):
    path = tmp_path / "d.npz"
    for arrays, words in [
        ({k: v for k, v in ARRAYS.items() if k != "y_train"}, "lacks y_train"),
        ({k: v for k, v in ARRAYS.items() if k != "x_test"}, "lacks x_test"),
        ({"a": np.ones(3)}, "lacks x_train"),
        ({**ARRAYS, "y_train": np.zeros(5)}, "x_train has shape (6, 2, 2), y_train (5,)"),
        ({**ARRAYS, "x_train": np.array(["a"])}, "not plain numbers"),
        ({**ARRAYS, "x_train": np.array([{}], object)}, "pickled objects are never read"),
    ]:
        np.savez(path, **arrays)
        with pytest.raises(bp.DataError) as e:
            bp.datasets.load(path)
        assert words in e.value.cause
    path.write_bytes(b"PK\3\4 not really")
    with pytest.raises(bp.DataError, match=r"not a sound \.npz file"):
        bp.datasets.load(path)


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def with_header(text):
    header = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a sound .npy array"),
        (b"garbage", "is not a sound .npy array"),
        (npy(np.ones(3))[:-1], "announces 24 bytes, shape (3,), but holds 23"),
        (npy(np.ones(3)) + b"x", "announces 24 bytes, shape (3,), but holds 25"),
        (npy(np.array([None])), "pickled objects are never read"),
        (with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (10**9,)}"), "is not a sound"),
        (with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}"), "announces 8000000000000"),
        (with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}"), "shape (-1,)"),
        (with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (True,)}"), "shape (True,)"),
        (with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (2**62,)}"), "is not a sound"),
        (with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (4611686018427387904, 4, 0)}"), "is empty"),
        (with_header("{'descr': '<f8', 'fortran_order': False, 'shape': " + str((1,) * 33) + "}"), "shape (1, 1"),
        (with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (3"), "is not a sound"),
        (with_header("__import__('os')"), "is not a sound"),
    ],
)
def test_npy_that_lies(tmp_path, content, words):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(bp.DataError) as e:
        read_npy(tmp_path / "a.npy")
    assert words in e.value.cause


def test_npy(tmp_path):
    for a in (np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(3, dtype=">i4")):
        np.save(tmp_path / "a.npy", a)
        np.testing.assert_array_equal(read_npy(tmp_path / "a.npy"), a)


def lying_zip(name, claimed, method=zipfile.ZIP_DEFLATED):
    """An archive whose only member announces `claimed` bytes in the directory of the archive."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr(name, npy(np.zeros(3)))
    content = bytearray(out.getvalue())
    at = content.rindex(b"PK\1\2") + 24
    content[at : at + 4] = struct.pack("<I", claimed)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lying_zip("x_train.npy", 4_000_000_000), "cannot hold"),
        (lying_zip("x_train.npy", 153, zipfile.ZIP_STORED), "cannot hold"),
        (lying_zip("x_train.npy", 152, zipfile.ZIP_LZMA), "packed in a way that numpy does not write"),
    ],
)
def test_archives_that_lie(tmp_path, content, words):
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(bp.DataError) as e:
        bp.datasets.load(tmp_path / "d.npz")
    assert words in e.value.cause


@pytest.mark.parametrize("read", [read_npy, bp.datasets.load, lambda p: read_idx(p, 3)], ids=["npy", "npz", "idx"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(bp.DataError, match="is not a regular file"):
        read(tmp_path / "pipe.npz")


@pytest.mark.parametrize("name", ["a\0b.npz", "x" * 300 + ".npz", "y/" * 3000 + "z.npz"])
def test_impossible_names(name):
    with pytest.raises(bp.DataError):
        bp.datasets.load(name)


def test_damaged_zip_members(tmp_path):
    np.savez_compressed(tmp_path / "d.npz", **ARRAYS)
    content = bytearray((tmp_path / "d.npz").read_bytes())
    caught = 0
    for at in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[at] ^= 0x55
        (tmp_path / "x.npz").write_bytes(damaged)
        try:
            bp.datasets.load(tmp_path / "x.npz")
        except bp.DataError:
            caught += 1
    assert caught > 30
