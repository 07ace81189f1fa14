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
    """Visits in the order of the rows; what is left of their fixed number repeats the last tile
    with no rows.

    Attributes:
      group: of each visit; rows past the last group belong to the last one, with an empty stretch.
      tile: of rows, of each visit.
      start, stop: the rows of the group, as far as they count.
    """

    group: Int[Array, "visits"]
    tile: Int[Array, "visits"]
    start: Int[Array, "visits"]
    stop: Int[Array, "visits"]


def visits(group_sizes: Int[Array, "E"], rows: int, tile: int, every_group: bool) -> Visits:
    """Returns the visits of `rows` rows in tiles.

    Args:
      group_sizes: rows of each group.
      rows: M.
      tile: rows of a tile.
      every_group: True visits groups without rows too, and not the rows past the last group; False
          the reverse.
    """
    groups, sizes = group_sizes.shape[0], group_sizes.astype(jnp.int32)
    if not every_group:
        sizes = jnp.append(sizes, rows - sizes.sum())
    stops = jnp.cumsum(sizes)
    starts = stops - sizes
    first = jnp.minimum(starts // tile, -(-rows // tile) - 1)
    counts = jnp.where(sizes > 0, (stops - 1) // tile - first + 1, int(every_group))
    ends = jnp.cumsum(counts)
    number = -(-rows // tile) + groups
    visit = jnp.arange(number)
    group = jnp.minimum(jnp.searchsorted(ends, visit, side="right"), sizes.shape[0] - 1).astype(
        jnp.int32
    )
    real = visit < ends[-1]
    last = jnp.maximum(ends[-1] - 1, 0)
    tiles = first[group] + visit - (ends - counts)[group]
    tiles = jnp.where(real, tiles, tiles[last]).astype(jnp.int32)
    counted = real & (group < groups)
    start, stop = jnp.where(counted, starts[group], 0), jnp.where(counted, stops[group], 0)
    group = jnp.where(real, group, group[last])
    return Visits(jnp.minimum(group, groups - 1), tiles, start, stop)
