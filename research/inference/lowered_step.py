"""A step of an engine for devices, lowered from shapes alone: no array is made, and none need be
there.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from research.inference.placement import windows_of
from research.inference.programs import empty_state, read
from research.inference.slots import StepRows, empty_slots
from research.kernels.decode_attention import PAGE_SIZE
from research.models.language_model import LanguageModelConfig
from research.models.paged_cache import PageTable
from research.parallel.mesh import on_mesh

# Ids that may be drawn: reading does not depend on them.
_NUM_IDS = 256


class LoweredStep(NamedTuple):
    """A step before it is compiled.

    Attributes:
      lowered: the program; its first argument are the parameters.
      pages: shapes and shardings of the arrays of pages.
    """

    lowered: jax.stages.Lowered
    pages: list[jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class StepSizes:
    """What a step is made for.

    Attributes:
      slots: of the engine.
      tokens: that the cache has room for.
      tile: rows of a tile.
      rows: of the step's arrays, whole tiles. How many tiles have rows is said when the program is
        run.
      page_size: tokens of a page.
      cache_dtype: as of `LanguageModel.empty_cache`.
    """

    slots: int
    tokens: int
    tile: int
    rows: int
    page_size: int = PAGE_SIZE
    cache_dtype: str | None = None


def lower_step(
    config: LanguageModelConfig,
    params: Any,
    mesh: Mesh | None,
    sizes: StepSizes,
    *,
    choose_layouts: bool = False,
) -> LoweredStep:
    """Lowers a step.

    Args:
      config: of the model.
      params: its parameters, or their shapes, shardings and formats.
      mesh: of devices that need not exist; None is that of the parameters.
      sizes: of the step.
      choose_layouts: leaves the order of the parameters' axes to the compiler, whose choice is in
        `input_formats` of what is compiled.
    """
    table = _table(config, sizes)
    others = (empty_slots(sizes.slots, _NUM_IDS, 0), table, _padding(sizes.rows), jnp.int32(1))
    other_leaves, other_tree = jax.tree.flatten(others)
    state_trees = []

    # As leaves, for `lower` makes trees of what is no array, which checked shapes refuse.
    def begin(params: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        state = empty_state.__wrapped__(
            params,
            None,
            table,
            config=config,
            rows=sizes.rows,
            drafter=None,
            cache_dtype=sizes.cache_dtype,
        )
        leaves, tree = jax.tree.flatten(state)
        state_trees.append(tree)
        return leaves, jax.tree.leaves([layer.tokens for layer in state.layers])

    def step(params: Any, leaves: list[jax.Array], others: list[jax.Array]) -> list[jax.Array]:
        state = state_trees[-1].unflatten(leaves)
        taken = (params, None, state, *other_tree.unflatten(others))
        new = read.__wrapped__(*taken, config=config, tile=sizes.tile, drafter=None)
        return jax.tree.leaves(new)

    with on_mesh(mesh):
        everywhere = _everywhere(params, mesh)
        # Of one device nothing says which, where nothing of the parameters is read.
        elsewhere = everywhere if mesh is None else None
        begun = jax.jit(begin, out_shardings=elsewhere).lower(params)
        shardings = begun.compile().output_shardings
        leaves, pages = jax.tree.map(_place, begun.out_info, shardings)
        placed = [_place(leaf, everywhere) for leaf in other_leaves]
        formats = None
        if choose_layouts:
            formats = jax.tree.map(lambda leaf: Format(Layout.AUTO, leaf.sharding), params)
            params = jax.tree.map(lambda leaf: _place(leaf, leaf.sharding), params)
        program = jax.jit(step, donate_argnums=1, in_shardings=(formats, None, None))
        return LoweredStep(program.lower(params, leaves, placed), pages)


def _table(config: LanguageModelConfig, sizes: StepSizes) -> PageTable:
    pages_per_row = -(-config.max_length // sizes.page_size)
    ids = jnp.asarray(np.zeros((sizes.slots, pages_per_row), np.int32))
    num_pages = 1 + sizes.tokens // sizes.page_size
    # Layers with a window have more pages than an engine gives them: a copy of them would be seen.
    kinds = len(windows_of(config, keeps_all=False))
    return PageTable.of_kinds([ids] * kinds, [num_pages] * kinds, sizes.page_size)


def _padding(rows: int) -> StepRows:
    arrays = {}
    for field in dataclasses.fields(StepRows):
        is_flag = field.name in ("draws", "wants")
        dtype = bool if is_flag else np.int32
        zeros = np.zeros(rows, dtype)
        arrays[field.name] = jnp.asarray(zeros)
    return StepRows(**arrays)


def _everywhere(params: Any, mesh: Mesh | None) -> Sharding:
    if mesh is None:
        return jax.tree.leaves(params)[0].sharding
    return NamedSharding(mesh, PartitionSpec())


def _place(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
