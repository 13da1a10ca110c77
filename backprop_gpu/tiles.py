"""What a block of a product makes, and how large that is best: `kernels/product.cuh`, seen from the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Unplanned(Exception):  # noqa: N818 - an answer, not an error
    """Why there is no plan for what is asked."""


class Device(NamedTuple):
    """What the choice of kernels goes by. `arch` is 90 for compute capability 9.0."""

    name: str
    arch: int
    processors: int
    shared: int  # bytes of shared memory that a block may have
    bandwidth: float  # bytes a second, 0 where it is not known
    rate: float  # multiply-adds of float32 a second, twice; likewise


class Tile(NamedTuple):
    """What a block of `product.cuh` makes: rows, columns, k at a time; its warps down, across and along k.

    `stages`: parts of `depth` under way or in use.
    """

    rows: int
    columns: int
    depth: int
    down: int
    across: int
    deep: int
    stages: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.down * self.across * self.deep

    def blocks(self, m: int, n: int) -> tuple[int, int]:
        """How many across and down make m x n."""
        return -(-n // self.columns), -(-m // self.rows)

    def shared(self, kernel: str, item: int, source: int = 0) -> int:
        """Bytes of shared memory that `product.cuh` takes, for numbers of `item` bytes, the data's of `source`."""

        def panel(along: bool, side: int, size: int) -> int:
            height, width = (side, self.depth) if along else (self.depth, side)
            return size * height * (width + (16 if size == 1 else 4 if along else 8))

        a = panel(kernel != "gradients", self.rows, source or item if kernel == "forward" else item)
        b = panel(kernel == "forward", self.columns, item)
        joined = item * self.deep * self.rows * self.columns if self.deep > 1 else 0
        return max(self.stages * (a + b), joined)

    def __str__(self) -> str:
        return f"Tile<{', '.join(map(str, self))}>"


# By measurement on an H100: largest first, each with as many blocks as it takes to be the quickest.
_FLOAT = (
    Tile(128, 128, 16, 2, 4, 1, 4),
    Tile(64, 64, 32, 2, 2, 2, 4),
    Tile(32, 16, 64, 2, 1, 4, 4),
    Tile(16, 16, 128, 1, 1, 8, 4),
)
_FLOAT_GRADIENTS = (Tile(128, 128, 32, 2, 4, 1, 3), Tile(64, 32, 64, 2, 2, 2, 3), Tile(32, 16, 64, 2, 1, 4, 4))
_DOUBLE = (Tile(64, 64, 16, 2, 4, 1, 3), Tile(32, 32, 32, 2, 2, 2, 3), Tile(16, 16, 32, 1, 1, 4, 4))
_MODEST = {"float": Tile(16, 16, 64, 1, 1, 4, 3), "double": Tile(16, 16, 32, 1, 1, 4, 2)}  # where memory is scarce
_BESIDE = 2 << 10  # bytes of shared memory that kernels take beside the product's


def choose_tile(
    kernel: str, products: Sequence[tuple[int, int, int]], arithmetic: str, real: str, device: Device
) -> Tile:
    """The largest tile of which there are enough to fill the device; the smallest where none are. By shape alone."""
    tiles: tuple[Tile, ...] = _DOUBLE
    item, enough = 8, 0.75  # blocks a processor
    if real == "float":
        item, tiles = 4, _FLOAT
        if kernel == "gradients":
            tiles, enough = _FLOAT_GRADIENTS, 2.0
    fitting = [tile for tile in tiles if tile.shared(kernel, item) + _BESIDE <= device.shared] or [_MODEST[real]]
    if fitting[-1].shared(kernel, item) + _BESIDE > device.shared:
        raise Unplanned(f"{kernel} does not fit in {device.shared} bytes of shared memory")
    for tile in fitting:
        if sum(math.prod(tile.blocks(m, n)) for m, n, _ in products) >= enough * device.processors:
            return tile
    return fitting[-1]
