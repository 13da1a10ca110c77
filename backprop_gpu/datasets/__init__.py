"""Data to train on: MNIST, which comes with the package, a directory of IDX files, or an .npz file."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import DataError
from .idx import read_idx
from .npz import read_npy, read_npz

__all__ = ["Dataset", "load", "read_idx", "read_npy", "read_npz"]

MNIST = Path(__file__).resolve().parent / "mnist"
NAMES = (("train-images-idx3-ubyte", "train-labels-idx1-ubyte"), ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"))
MNIST_SHA256 = {  # of the unpacked files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class Dataset(NamedTuple):
    """Samples and what is to be learnt of them.

    `images` (n, features): uint8 from IDX files, any numbers from an .npz file. `labels` (n,): uint8 from IDX files;
    from an .npz file labels or targets as they are there.
    """

    images: np.ndarray
    labels: np.ndarray


def load(source: str | os.PathLike[str] = "mnist") -> tuple[Dataset, Dataset | None]:
    """(train, test): of "mnist", of a directory of IDX files under MNIST's four names (.gz or not), or of an .npz file.

    MNIST is 60 000 + 10 000 images, (n, 784). An .npz file holds x_train, y_train and, perhaps, x_test, y_test: without
    them test is None. Raises DataError for anything missing, damaged, or not matching.
    """
    if isinstance(source, str) and source == "mnist":
        return _directory(MNIST, MNIST_SHA256)
    path = Path(source)
    if os.path.isdir(path):
        return _directory(path, {})
    if path.suffix == ".npz" or os.path.isfile(path):
        return _npz(path)
    raise DataError(f"there is no dataset {str(source)!r}", "give mnist, a directory of IDX files, or an .npz file")


def _directory(folder: Path, sha256: dict[str, str]) -> tuple[Dataset, Dataset]:
    parts = []
    for images_name, labels_name in NAMES:
        images = read_idx(_find(folder, images_name), 3, sha256=sha256.get(images_name))
        labels = read_idx(_find(folder, labels_name), 1, sha256=sha256.get(labels_name))
        if len(images) != len(labels):
            raise DataError(
                f"{folder}: {images_name} holds {len(images)} images, {labels_name} {len(labels)} labels",
                "put files that belong together into the directory",
            )
        parts.append(Dataset(images.reshape(len(images), -1), labels))
    train, test = parts
    if train.images.shape[1] != test.images.shape[1]:
        raise DataError(
            f"{folder}: training images have {train.images.shape[1]} pixels, test images {test.images.shape[1]}",
            "put files that belong together into the directory",
        )
    return train, test


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise DataError(
        f"{folder} has no file {name} or {name}.gz", f"put MNIST's four names there: {', '.join(MNIST_SHA256)}"
    )


def _npz(path: Path) -> tuple[Dataset, Dataset | None]:
    arrays = read_npz(path)
    parts: dict[str, Dataset] = {}
    for part in ("train", "test"):
        x, y = arrays.get(f"x_{part}"), arrays.get(f"y_{part}")
        if x is None and y is None and part == "test":
            return parts["train"], None
        if x is None or y is None:
            raise DataError(
                f"{path} lacks {'x' if x is None else 'y'}_{part}", "save x_train, y_train, x_test, y_test in it"
            )
        if x.ndim < 2 or y.ndim < 1 or len(x) != len(y):
            raise DataError(
                f"{path}: x_{part} has shape {x.shape}, y_{part} {y.shape}",
                "save one row of x and one entry of y a sample",
            )
        parts[part] = Dataset(x.reshape(len(x), math.prod(x.shape[1:])), y)
    return parts["train"], parts["test"]
