"""The step of an engine that reads tokens, compiled for a mesh of any devices."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.inference.placement import windows_of
from research.inference.programs import empty_state, read
from research.inference.slots import StepRows, empty_slots
from research.kernels.decode_attention import PAGE_SIZE
from research.models.config import ModelConfig
from research.models.paged_cache import PageTable
from research.scaling.collectives import Collective, collectives
from research.scaling.hlo import parse_module

MOVES = ("all-gather", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class CompiledRead:
    """A compiled step.

    Attributes:
      pages: shapes and shardings of the arrays of pages.
      text: of the program.
      exchanged: between devices.
      temporaries: bytes on each device beside arguments and results.
      num_layers: of the model.
    """

    pages: list[jax.ShapeDtypeStruct]
    text: str
    exchanged: list[Collective]
    temporaries: int
    num_layers: int

    @property
    def layer_bytes(self) -> float:
        """Bytes of a layer's pages on a device: of all as many."""
        total = sum(math.prod(on_device(leaf)) * leaf.dtype.itemsize for leaf in self.pages)
        return total / self.num_layers

    def moved(self) -> set[tuple[str, tuple[str, ...], int]]:
        """Kind, axes and elements of what goes to other devices without a sum."""
        return {
            (each.kind, each.axes, shape.size)
            for each in self.exchanged
            for shape in each.shapes
            if each.kind in MOVES
        }

    def summed(self) -> set[tuple[tuple[str, ...], int]]:
        """Axes and elements of what is added up over devices."""
        return {
            (each.axes, shape.size)
            for each in self.exchanged
            for shape in each.shapes
            if each.kind not in MOVES
        }

    def largest_array_of_pages(self) -> int:
        """Elements of the largest array of a device that has as many pages as there are, in one
        layer or in all of them.
        """
        counts = set()
        for leaf in self.pages:
            *stack, num_pages = leaf.shape[:-3]
            counts |= {num_pages, math.prod(stack) * num_pages}
        computations = parse_module(self.text).computations.values()
        instructions = [each for computation in computations for each in computation.instructions]
        shapes = [shape for each in instructions for shape in each.shapes]
        return max(shape.size for shape in shapes if counts & set(shape.dims))


def on_device(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The shape of a device's part."""
    return leaf.sharding.shard_shape(leaf.shape)


def compile_read(
    config: ModelConfig, params: Any, mesh: Mesh, *, slots: int, tokens: int, tile: int
) -> CompiledRead:
    """Compiles a step of one tile.

    Args:
      config, params: the model; of the parameters shapes and shardings are needed.
      mesh: of devices that need not exist.
      slots, tokens: as of `ServeConfig`.
      tile: rows.
    """
    rows = np.zeros(tile, np.int32)
    ids = jnp.asarray(np.zeros((slots, -(-config.max_length // PAGE_SIZE)), np.int32))
    kinds = len(windows_of(config, keeps_all=False))
    # Layers with a window have more pages than an engine gives them: a copy of them would be seen.
    table = PageTable.of_kinds([ids] * kinds, [1 + tokens // PAGE_SIZE] * kinds, PAGE_SIZE)
    names = [field.name for field in dataclasses.fields(StepRows)]
    kinds = {"draws": bool, "wants": bool}
    arrays = {name: jnp.asarray(rows.astype(kinds.get(name, np.int32))) for name in names}
    others = (empty_slots(slots, 256, 0), table, StepRows(**arrays), jnp.int32(1))
    other_leaves, other_tree = jax.tree.flatten(others)
    state_trees = []

    # As leaves, for `lower` makes trees of what is no array, which checked shapes refuse.
    def begin(params: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        state = empty_state.__wrapped__(
            params, None, table, config=config, rows=tile, drafter=None, cache_dtype=None
        )
        leaves, tree = jax.tree.flatten(state)
        state_trees.append(tree)
        return leaves, jax.tree.leaves([layer.tokens for layer in state.layers])

    def step(params: Any, leaves: list[jax.Array], others: list[jax.Array]) -> list[jax.Array]:
        state = state_trees[-1].unflatten(leaves)
        taken = (params, None, state, *other_tree.unflatten(others))
        return jax.tree.leaves(read.__wrapped__(*taken, config=config, tile=tile, drafter=None))

    def place(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    everywhere = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        begun = jax.jit(begin).lower(params)
        shardings = begun.compile().output_shardings
        leaves, pages = jax.tree.map(place, begun.out_info, shardings)
        placed = [place(leaf, everywhere) for leaf in other_leaves]
        lowered = jax.jit(step, donate_argnums=1).lower(params, leaves, placed)
        compiled = lowered.compile()
    text = compiled.as_text()
    return CompiledRead(
        pages,
        text,
        [each for each in collectives(text, mesh) if each.axes],
        compiled.memory_analysis().temp_size_in_bytes,
        config.num_layers,
    )
