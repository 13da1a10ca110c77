"""Data files that lie, break off or attack: what is refused, before memory or time has been spent on it."""

import gzip
import io
import os
import re
import struct
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

import backprop_gpu as bp
from backprop_gpu.datasets import MNIST_SHA256, NAMES, idx, npz, read_idx, read_npy, read_npz

MIB = 1 << 20


def idx_header(*shape):
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def npy_header(text, version=1):
    header = text.encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(header)) + header


def archive(content, method=zipfile.ZIP_DEFLATED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        file.writestr("x_train.npy", content)
    return out.getvalue()


def refused(read, path):
    """The cause of the refusal, and the bytes of memory that reading took at most."""
    tracemalloc.start()
    try:
        with pytest.raises(bp.DataError) as e:
            read(path)
        return e.value.cause, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def images(path, **limits):
    return read_idx(path, 3, **limits)


SOUND = idx_header(2, 3, 4) + bytes(range(24))
PACKED = gzip.compress(SOUND)


@pytest.mark.parametrize("missing", range(1, 9))
def test_a_gzip_stream_whose_checksum_is_cut_off_is_truncated_although_all_data_are_there(tmp_path, missing):
    (tmp_path / "x").write_bytes(PACKED[:-missing])
    cause, _ = refused(images, tmp_path / "x")
    assert f"{tmp_path / 'x'} is truncated: the gzip stream breaks off after 40 unpacked bytes" in cause


@pytest.mark.parametrize("at", range(-8, 0))
def test_every_byte_of_the_checksum_and_of_the_length_after_it_is_checked(tmp_path, at):
    damaged = bytearray(PACKED)
    damaged[at] ^= 1
    (tmp_path / "x").write_bytes(damaged)
    cause, _ = refused(images, tmp_path / "x")
    assert re.search(r"is damaged after \d+ unpacked bytes: .*incorrect (data|length) check", cause)


def test_a_web_page_under_the_name_of_a_packed_file_is_refused_by_that_name(tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"<!DOCTYPE html><html>404</html>")
    cause, _ = refused(images, tmp_path / "train-images-idx3-ubyte.gz")
    assert "train-images-idx3-ubyte.gz is not a gzip file although its name says so" in cause


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            idx_header(1 << 15, 1 << 7, 1 << 7),
            "536870912 bytes, dimensions (32768, 128, 128), which its 16 bytes cannot",
        ),
        (gzip.compress(idx_header(1 << 15, 1 << 7, 1 << 7)), "cannot hold"),
        (
            idx_header(1, 10, 10) + bytes(9),
            "announces 100 bytes, dimensions (1, 10, 10), which its 25 bytes cannot hold",
        ),
        (gzip.compress(idx_header(1, 200, 200)), "announces 40000 bytes"),
        (idx_header(2**32 - 1, 2**32 - 1, 2**32 - 1), "more than the limit of 1073741824"),
        (idx_header(1, 1, 2**30 + 1), "more than the limit of 1073741824"),
        (idx_header(2**31, 2, 2**32 - 1) + bytes(99), "more than the limit of"),
    ],
)
def test_no_memory_is_taken_on_the_word_of_an_idx_header(tmp_path, content, words):
    (tmp_path / "x").write_bytes(content)
    cause, peak = refused(images, tmp_path / "x")
    assert words in cause
    assert peak < 2 * MIB


def zeros(count, announced):
    """`count` zeros after an IDX header for so many, packed a thousandfold."""
    squeeze = zlib.compressobj(9, wbits=31)
    packed = [
        squeeze.compress(idx_header(1, 1, announced)),
        *(squeeze.compress(bytes(MIB)) for _ in range(count // MIB)),
    ]
    return b"".join([*packed, squeeze.flush()])


def test_what_deflate_squeezes_most_is_read(tmp_path):
    (tmp_path / "x").write_bytes(zeros(8 * MIB, 8 * MIB))
    assert (tmp_path / "x").stat().st_size < 8 * MIB / 1020
    assert not images(tmp_path / "x").any()
    (tmp_path / "y").write_bytes(archive(npy(np.zeros(MIB))))
    assert not read_npz(tmp_path / "y")["x_train"].any()


def test_what_unpacks_to_more_than_it_announces_is_not_unpacked_further(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(zeros(64 * MIB, 1))
    unpacked = []

    class Watched:
        def __init__(self, **settings):
            self.its = zlib_decompressobj(**settings)

        def decompress(self, *args):
            unpacked.append(len(piece := self.its.decompress(*args)))
            return piece

        def __getattr__(self, name):
            return getattr(self.its, name)

    zlib_decompressobj = zlib.decompressobj
    monkeypatch.setattr(zlib, "decompressobj", Watched)
    cause, peak = refused(images, tmp_path / "x")
    assert "is longer than its header says: more than 1 bytes of data" in cause
    assert sum(unpacked) <= MIB
    assert peak < 3 * MIB


def sparse(path, start, size):
    """A file of so many bytes, all but the first of which are holes that take no room."""
    path.write_bytes(start)
    os.truncate(path, size)
    return path


def test_the_limits_hold_for_files_that_are_as_large_as_they_say(tmp_path):
    start = idx_header(1, 1, idx.MAX_BYTES + 1)
    cause, peak = refused(images, sparse(tmp_path / "x", start, len(start) + idx.MAX_BYTES + 1))
    assert "announces 1073741825 bytes, more than the limit of 1073741824" in cause
    assert peak < 2 * MIB
    start = npy_header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({npz.MAX_BYTES + 1},)}}")
    cause, peak = refused(read_npy, sparse(tmp_path / "y", start, len(start) + npz.MAX_BYTES + 1))
    assert "announces 4294967297 bytes, more than the limit of 4294967296" in cause
    assert peak < 2 * MIB


def test_the_limits_are_those_that_are_given(tmp_path):
    (tmp_path / "a").write_bytes(npy(np.ones(3)))
    (tmp_path / "b").write_bytes(archive(npy(np.ones(3))))
    assert read_npy(tmp_path / "a", 24).tolist() == read_npz(tmp_path / "b", 24)["x_train"].tolist() == [1, 1, 1]
    for read, name in ((read_npy, "a"), (read_npz, "b")):
        with pytest.raises(bp.DataError, match="announces 24 bytes, more than the limit of 23"):
            read(tmp_path / name, 23)


def test_the_digests_are_those_of_all_four_files():
    assert set(MNIST_SHA256) == {name for pair in NAMES for name in pair}
    assert len({*MNIST_SHA256.values()}) == 4


class Trap:
    """What does something when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_pickle_is_ever_called(tmp_path):
    content = npy(np.array([Trap(tmp_path / "sprung")], object))
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(archive(content))
    for read, name in ((read_npy, "a"), (read_npz, "b")):
        assert "pickled objects are never read" in refused(read, tmp_path / name)[0]
    assert not (tmp_path / "sprung").exists()
    np.load(tmp_path / "a", allow_pickle=True)
    assert (tmp_path / "sprung").exists()


PLAIN = "{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy_header(PLAIN + " " * 9_900 + "\0"), "a header of 9957 bytes"),
        (npy_header(PLAIN[:-4] + "0x" + "f" * 9_000 + ",)}"), "a header of 9057 bytes"),
        (b"\x93NUMPY\2\0" + b"\xff" * 4 + PLAIN.encode(), "a header of 4294967295 bytes"),
        (npy_header(PLAIN[:-4] + "0x" + "f" * 900 + ",)}"), "announces"),
        (npy_header(PLAIN + " " * 200 + "\0"), "is not a sound .npy array"),
        (npy_header("{'descr': ('<f8',), 'fortran_order': False, 'shape': (1,)}"), "is not a sound .npy array"),
        (
            npy_header("{'descr': " + "[" * 200 + ", 'fortran_order': False, 'shape': (1,)}"),
            "is not a sound .npy array",
        ),
        (npy_header("-" * 900), "is not a sound .npy array"),
    ],
)
def test_a_header_that_would_take_memory_or_minutes_is_not_parsed(tmp_path, content, words):
    for read, whole in ((read_npy, content + bytes(8)), (read_npz, archive(content + bytes(8)))):
        (tmp_path / "x").write_bytes(whole)
        start = time.process_time()
        cause, peak = refused(read, tmp_path / "x")
        assert words in cause
        assert len(cause.splitlines()) == 1
        assert peak < 2 * MIB
        assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("shape", "count", "words"),
    [
        ("(-1, -3)", 3, "shape (-1, -3)"),
        ("(True, 2)", 2, "shape (True, 2)"),
        (str((1,) * 33), 1, f"shape {(1,) * 33}"),
        (str((1,) * 65), 1, f"shape {(1,) * 65}"),
    ],
)
def test_shapes_that_are_none_are_refused_although_the_data_fit(tmp_path, shape, count, words):
    (tmp_path / "x").write_bytes(npy_header(PLAIN.replace("(1,)", shape)) + bytes(8 * count))
    assert f"is not a sound .npy array: {words}" in refused(read_npy, tmp_path / "x")[0]


def test_a_version_of_the_format_that_plain_numbers_do_not_need_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(npy_header(PLAIN, 3) + bytes(8))
    assert "version (3, 0) of the format is for structured arrays only" in refused(read_npy, tmp_path / "x")[0]


def test_headers_that_python_2_wrote_are_read_without_a_word(tmp_path):
    (tmp_path / "x").write_bytes(npy_header(PLAIN.replace("(1,)", "(2L,)")) + np.ones(2).tobytes())
    assert read_npy(tmp_path / "x").tolist() == [1, 1]


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_what_numpy_writes_for_many_dimensions_is_read(tmp_path, version):
    array = np.arange(3.0).reshape((1,) * 31 + (3,))
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version, allow_pickle=False)
    (tmp_path / "x").write_bytes(out.getvalue())
    np.testing.assert_array_equal(read_npy(tmp_path / "x"), array)
    assert len(str((2**63 - 1,) * 32)) + 80 < npz.MAX_HEADER


def test_a_member_that_is_longer_than_its_array_is_not_unpacked(tmp_path):
    (tmp_path / "x").write_bytes(archive(npy(np.ones(3)) + bytes(64 * MIB)))
    cause, peak = refused(read_npz, tmp_path / "x")
    assert "x_train announces 24 bytes, shape (3,), but holds 67108888" in cause
    assert peak < 2 * MIB


def changed(content, signature, offset, new):
    """An archive with other bytes in the last of the records that begin so."""
    at = content.rindex(signature) + offset
    return content[:at] + new + content[at + len(new) :]


DIRECTORY, END = b"PK\1\2", b"PK\5\6"


def test_no_memory_is_taken_where_header_and_directory_tell_the_same_lie(tmp_path):
    header = npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000,)}")
    sizes = struct.pack("<2I", 10**9 + len(header), 10**9 + len(header))
    (tmp_path / "x").write_bytes(changed(archive(header + bytes(9)), DIRECTORY, 20, sizes))
    cause, peak = refused(read_npz, tmp_path / "x")
    assert "cannot hold" in cause
    assert peak < 2 * MIB


WHOLE = archive(npy(np.ones(3)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (changed(changed(WHOLE, DIRECTORY, 8, b"\0\x08"), DIRECTORY, 46, b"\xff"), "'utf-8' codec can't decode"),
        (changed(WHOLE, END, 16, struct.pack("<I", 9 + WHOLE.index(DIRECTORY))), "is not a sound .npz file"),
        (changed(WHOLE, DIRECTORY, 42, b"\xff\xff\xff\x7f"), "is not a sound .npz file"),
        (changed(WHOLE, DIRECTORY, 8, b"\1"), "is encrypted"),
        (changed(WHOLE, DIRECTORY, 6, b"\xff"), "zip file version"),
        (changed(WHOLE, DIRECTORY, 16, b"\0\0\0\0"), "Bad CRC-32"),
        (changed(WHOLE, END, 12, b"\xff\xff\xff\xff"), "is not a sound .npz file"),
    ],
)
def test_archives_with_a_broken_directory_are_refused(tmp_path, content, words):
    (tmp_path / "x").write_bytes(content)
    cause, peak = refused(read_npz, tmp_path / "x")
    assert words in cause
    assert str(tmp_path / "x") in cause
    assert peak < 2 * MIB


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="wants a file that cannot be read at its start")
@pytest.mark.parametrize("read", [images, read_npy, read_npz])
def test_a_disk_that_fails_while_a_file_is_read_is_told_as_such(read):
    with pytest.raises(bp.DataError, match="/proc/self/mem"):
        read(Path("/proc/self/mem"))


@pytest.mark.parametrize("read", [images, read_npy])
def test_a_read_that_fails_later_on_is_told_with_the_systems_words(tmp_path, monkeypatch, read):
    (tmp_path / "x").write_bytes(SOUND if read is images else npy(np.ones(3)))
    whole = Path.open

    class Failing(io.BufferedReader):
        def read(self, n=-1):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", lambda path, mode: Failing(whole(path, mode).detach()))
    with pytest.raises(bp.DataError, match="x cannot be read: Input/output error"):
        read(tmp_path / "x")
