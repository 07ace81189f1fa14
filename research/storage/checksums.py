"""Checksums of a large file by blocks: a block is verified when it is first read.

A checksum is the CRC-32 of `BLOCK_BYTES` bytes (the last block has what is left), which misses a
change of a block with probability 2⁻³².
"""

import math
import pathlib
import zlib

import numpy as np
from jaxtyping import Int, Shaped, UInt32

# Small enough that a short read does not have to read much more.
BLOCK_BYTES = 2**16


def file_checksum(path: pathlib.Path) -> int:
    """Returns the CRC-32 of a whole file."""
    checksum = 0
    with path.open("rb") as file:
        while data := file.read(2**20):
            checksum = zlib.crc32(data, checksum)
    return checksum


class BlockChecksums:
    """The checksums of a file that is being written."""

    def __init__(self) -> None:
        self._finished: list[int] = []
        # Of the block that is being filled: its checksum so far, and its bytes.
        self._checksum = 0
        self._filled = 0

    def add(self, data: bytes) -> None:
        """Adds the bytes that are written next."""
        left = memoryview(data)
        while left:
            # As much as the block that is being filled still needs.
            part = left[: BLOCK_BYTES - self._filled]
            self._checksum = zlib.crc32(part, self._checksum)
            self._filled += len(part)
            if self._filled == BLOCK_BYTES:
                self._finish_block()
            left = left[len(part) :]

    def finish(self) -> UInt32[np.ndarray, "blocks"]:
        """Returns a checksum for each block; nothing can be added afterwards."""
        if self._filled:
            self._finish_block()
        return np.array(self._finished, np.uint32)

    def _finish_block(self) -> None:
        self._finished.append(self._checksum)
        self._checksum = 0
        self._filled = 0


class BlockVerifier:
    """Compares the blocks of an array with their checksums, each block once.

    Threads may share it: at worst two of them verify the same block.

    Args:
      data: one-dimensional, of 1, 2 or 4 bytes per element; usually a memory-mapped file.
      checksums: of `BlockChecksums`.
    """

    def __init__(self, data: Shaped[np.ndarray, "n"], checksums: UInt32[np.ndarray, "blocks"]):
        self._data = data
        self._checksums = checksums
        self._elements_per_block = BLOCK_BYTES // data.itemsize
        self._good = np.zeros(len(checksums), bool)
        blocks = math.ceil(len(data) / self._elements_per_block)
        assert len(checksums) == blocks, "there is a checksum for each block"

    def first_damaged(
        self, starts: Int[np.ndarray, "ranges"], lengths: Int[np.ndarray, "ranges"]
    ) -> tuple[int, int] | None:
        """Returns the bounds of the first damaged block that these ranges touch, or None.

        Args:
          starts: where each range begins, in elements of the array.
          lengths: how many elements each has; a range of none touches nothing.
        """
        # Blocks of 10: starts [8, 20], lengths [5, 0] -> first block [0], last block [1]
        touched = lengths > 0
        starts = starts[touched]
        lengths = lengths[touched]
        first = starts // self._elements_per_block
        last = (starts + lengths - 1) // self._elements_per_block

        # Nearly always each range is in one block or two that were verified before.
        ends_good = self._good[first].all() and self._good[last].all()
        any_longer = (last - first > 1).any()
        if ends_good and not any_longer:
            return None

        for low, high in zip(first.tolist(), last.tolist(), strict=True):
            for block in range(low, high + 1):
                if not self._good[block] and not self._verify(block):
                    return self._bounds(block)
        return None

    def _bounds(self, block: int) -> tuple[int, int]:
        """Returns where a block starts and stops, in elements of the array."""
        start = block * self._elements_per_block
        # The last block may be shorter.
        stop = min(start + self._elements_per_block, len(self._data))
        return start, stop

    def _verify(self, block: int) -> bool:
        start, stop = self._bounds(block)
        elements = np.ascontiguousarray(self._data[start:stop])
        checksum = zlib.crc32(elements.view(np.uint8))
        good = checksum == self._checksums[block]
        self._good[block] = good
        return bool(good)
