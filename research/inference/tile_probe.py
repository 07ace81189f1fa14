"""Which tiles of a step compute a row alike, bit for bit: they are run, and what they compute is
compared.

How a machine multiplies a tile depends on its rows. Where two ways differ, they differ in the last
bits of their sums. In float32 nearly every number shows that. Rounded to 16 bits one of 2¹⁶ does,
so that a small model needs more tokens.
"""

from collections.abc import Callable, Sequence

# What a tile computes of the tokens of a draw: the draw, rows of a tile, how many of them are
# padding at first -> log-probabilities, and arrays of pages.
Probe = Callable[[int, int, int], list[bytes]]

# Bytes of pages that are compared where activations have 16 bits: of some 2¹⁸ roundings before.
NARROW_BYTES = 2**17


def alike_tiles(tiles: Sequence[int], probe: Probe, *, is_narrow: bool) -> tuple[int, ...]:
    """Returns the tiles whose numbers are those of the largest one, which is the last; none where
    those of every tile depend on the row.

    Args:
      tiles: in rising order.
      probe: runs one.
      is_narrow: whether activations have 16 bits.
    """
    alike = list(tiles)
    draws = 0
    compared = 0
    while draws == 0 or (is_narrow and compared < NARROW_BYTES and len(alike) > 1):
        # Nor may it matter in which row of a tile a token is.
        found = {}
        for tile in alike:
            found[tile] = [probe(draws, tile, skipped) for skipped in (0, tile // 2)]
        expected, _ = found[alike[-1]]
        alike = [tile for tile in alike if found[tile] == [expected, expected]]
        _, *pages = expected
        compared += sum(map(len, pages))
        draws += 1
    return tuple(alike)
