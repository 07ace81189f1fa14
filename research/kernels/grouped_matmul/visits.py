"""Which tile of rows meets which group: a tile is visited once for each group that has rows in
it.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from research.core.trees import node


@node(static=())
@dataclasses.dataclass(frozen=True)
class Visits:
    """Visits in the order of the rows, a fixed number; unused ones repeat the last tile, without
    rows.

    Attributes:
      group: of each visit; rows past the last group belong to the last one, and none of them count.
      tile: of rows, of each visit.
      start, stop: the rows of the group that count.
    """

    group: Int[Array, "visits"]
    tile: Int[Array, "visits"]
    start: Int[Array, "visits"]
    stop: Int[Array, "visits"]


def visits(group_sizes: Int[Array, "E"], rows: int, tile_rows: int, every_group: bool) -> Visits:
    """Returns the visits of all rows in tiles.

    Args:
      group_sizes: rows of each group.
      rows: of all groups, and past the last one.
      tile_rows: rows of a tile.
      every_group: True visits groups without rows too, and not the rows past the last group; False
          the reverse.
    """
    groups = group_sizes.shape[0]
    sizes = group_sizes.astype(jnp.int32)
    if not every_group:
        # Rows past the last group are one more group.
        past = rows - sizes.sum()
        sizes = jnp.append(sizes, past)

    # Sizes [3, 0, 6] -> starts [0, 3, 3], stops [3, 3, 9]
    stops = jnp.cumsum(sizes)
    starts = stops - sizes

    # In tiles of 4 rows -> first tiles [0, 0, 0], visits [1, 0, 3]
    tiles = -(-rows // tile_rows)
    first_tiles = starts // tile_rows
    first_tiles = jnp.minimum(first_tiles, tiles - 1)
    has_rows = sizes > 0
    last_tiles = (stops - 1) // tile_rows
    spanned = last_tiles - first_tiles + 1
    counts = jnp.where(has_rows, spanned, int(every_group))

    # Visits [1, 0, 3] -> visits 0, 1, 2, 3 are of groups [0, 2, 2, 2]
    ends = jnp.cumsum(counts)
    visit = jnp.arange(tiles + groups)
    group = jnp.searchsorted(ends, visit, side="right")
    last_group = sizes.shape[0] - 1
    group = jnp.minimum(group, last_group)
    group = group.astype(jnp.int32)

    # The tile of a visit: visit 2 is the second of group 2, whose first tile is 0 -> tile 1
    tile = first_tiles[group] + visit
    first_visits = ends - counts
    tile = tile - first_visits[group]

    # Tiles + groups is the most that there can be; unused visits repeat the last one's tile.
    number = ends[-1]
    is_used = visit < number
    last = jnp.maximum(number - 1, 0)
    tile = jnp.where(is_used, tile, tile[last])
    tile = tile.astype(jnp.int32)

    counted = is_used & (group < groups)
    start = jnp.where(counted, starts[group], 0)
    stop = jnp.where(counted, stops[group], 0)
    group = jnp.where(is_used, group, group[last])
    group = jnp.minimum(group, groups - 1)
    return Visits(group, tile, start, stop)
