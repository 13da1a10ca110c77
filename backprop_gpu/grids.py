"""How elementwise kernels are spread over a GPU: blocks of a walk over elements, strips and chunks of a sum of columns.

By the shape alone, so that the bits depend on nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

THREADS = 256  # a block
MOST_BLOCKS = 1024  # of kernels that walk on in strides of the grid; several for each multiprocessor
MOST_PARTS = 256  # of a sum over a flat vector
CHUNK = 256  # rows that a block sums before it pays to share them out
FILLED = 128  # blocks that keep a GPU busy
STRIP = 32, 16  # the block of sums.cuh


def blocks(elements: int, item: int, most: int | None = None) -> int:
    """Of a walk over so many elements of `item` bytes, 16 bytes a thread and step; MOST_BLOCKS at most, or `most`."""
    return max(1, min(-(-elements * item // (16 * THREADS)), MOST_BLOCKS if most is None else most))


def chunks(m: int, rows: int | None = None) -> tuple[int, int]:
    """In how many chunks m rows are summed, of about `rows` (None: CHUNK) each or more, and how many rows each has."""
    each = -(-m // min(-(-m // (rows or CHUNK)), MOST_PARTS))
    return -(-m // each), each


class Strips(NamedTuple):
    """How a matrix is cut for a sum down its columns: strips of columns, chunks of rows."""

    across: int
    chunks: int
    chunk_rows: int
    wide: bool  # 16 bytes a thread, not one number


def strips(m: int, n: int, item: int) -> Strips:
    """Of (m, n) of `item` bytes each; wide where there are blocks enough for a whole GPU then."""
    (down, chunk_rows), width = chunks(m), 16 // item
    wide = n % width == 0 and down * n >= FILLED * 32 * width
    return Strips(min(-(-n // (32 * width if wide else 32)), MOST_BLOCKS), down, chunk_rows, wide)
