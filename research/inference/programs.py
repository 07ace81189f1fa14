"""The compiled steps of the engine.

A step takes rows, each one token of a sequence in a slot, and runs the model over them in tiles of
a fixed number of rows. Each row is a sequence of one new token: what it attends to, prompt or
answer, is in the pages. So whatever the rows of a step are, what is computed of one of them is the
same, operation by operation.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from research.inference.prefill import next_logits
from research.inference.sampling import SamplingConfig, SamplingParams, draw
from research.models.cache import Cache, LayerCache
from research.models.language_model import LanguageModelConfig
from research.models.paged_cache import PageTable


@flax.struct.dataclass
class Slots:
    """What the device keeps of the sequence in each slot.

    Attributes:
      newest: its newest token.
      keys: its random key.
      sampling: how its tokens are drawn.
      seen: which ids it has, prompt included.
    """

    newest: Int[Array, "slots"]
    keys: Key[Array, "slots"]
    sampling: SamplingParams
    seen: Bool[Array, "slots V"]


@flax.struct.dataclass
class StepRows:
    """The rows of a step.

    Attributes:
      slot: of each row's sequence; the number of slots where the row is padding.
      position: of its token.
      token: its id; -1 where it is the slot's newest.
      draws: whether the next token is drawn from it.
    """

    slot: Int[Array, "rows"]
    position: Int[Array, "rows"]
    token: Int[Array, "rows"]
    draws: Bool[Array, "rows"]


@flax.struct.dataclass
class Drawn:
    """What a step drew, by row; of rows that draw nothing any numbers.

    Attributes:
      token: the ids.
      logprob: the logarithm of each one's probability, by the model alone: a log-softmax over all
        V of its float32 logits, before penalties, temperature and truncation.
    """

    token: Int[Array, "rows"]
    logprob: Float[Array, "rows"]


@flax.struct.dataclass
class DeviceState:
    """What a step hands to the next one: the pages of all layers, and the slots."""

    layers: tuple[LayerCache, ...]
    slots: Slots


def empty_slots(count: int, vocab_size: int) -> Slots:
    """Returns slots without sequences."""
    sampling = SamplingParams.of([SamplingConfig()] * count)
    keys = jax.random.split(jax.random.key(0), count)
    seen = jnp.zeros((count, vocab_size), bool)
    return Slots(jnp.zeros(count, jnp.int32), keys, sampling, seen)


@functools.partial(jax.jit, donate_argnames=("state",))
def admit(
    state: DeviceState,
    slot: Int[Array, ""],
    key: Key[Array, "1"],
    sampling: SamplingParams,
    seen: Bool[Array, "V"],
) -> DeviceState:
    """Returns the state with another sequence in a slot.

    Args:
      state: before.
      slot: which.
      key: of the sequence.
      sampling: of the sequence, in arrays of one row.
      seen: which ids it has.
    """
    old = state.slots

    def put(rows: Array, row: Array) -> Array:
        return rows.at[slot].set(row[0])

    slots = old.replace(
        keys=put(old.keys, key),
        sampling=jax.tree.map(put, old.sampling, sampling),
        seen=old.seen.at[slot].set(seen),
    )
    return state.replace(slots=slots)


@functools.partial(
    jax.jit, static_argnames=("config", "tile", "num_ids"), donate_argnames=("state",)
)
def step(
    params: Any,
    state: DeviceState,
    table: PageTable,
    rows: StepRows,
    num_tiles: Int[Array, ""],
    *,
    config: LanguageModelConfig,
    tile: int,
    num_ids: int,
) -> tuple[DeviceState, Drawn]:
    """Writes the tokens of the rows, and returns what is drawn from each.

    Args:
      params: of the model.
      state: before.
      table: the pages of each slot.
      rows: of which a sequence's come in order; as many as tiles and more.
      num_tiles: how many tiles have rows that are no padding.
      config: the model.
      tile: rows of a tile.
      num_ids: only ids below it are drawn.
    """

    def run_tile(index: Array, carry: tuple[DeviceState, Drawn]) -> tuple[DeviceState, Drawn]:
        state, drawn = carry
        first = index * tile

        def take(leaf: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(leaf, first, tile)

        def put(all_rows: Array, of_tile: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(all_rows, of_tile, first, axis=0)

        state, new = _tile_step(params, state, table, jax.tree.map(take, rows), config, num_ids)
        return state, jax.tree.map(put, drawn, new)

    tokens = jnp.zeros_like(rows.token)
    drawn = Drawn(tokens, tokens.astype(jnp.float32))
    return jax.lax.fori_loop(0, num_tiles, run_tile, (state, drawn))


def _tile_step(
    params: Any,
    state: DeviceState,
    table: PageTable,
    rows: StepRows,
    config: LanguageModelConfig,
    num_ids: int,
) -> tuple[DeviceState, Drawn]:
    slots = state.slots
    newest = slots.newest.at[rows.slot].get(mode="clip")
    tokens = jnp.where(rows.token < 0, newest, rows.token)
    # Padding has no pages: it writes to page 0, which nobody reads.
    ids = table.ids.at[rows.slot].get(mode="fill", fill_value=0)
    cache = Cache(state.layers, page_table=PageTable(ids, table.num_pages, table.page_size))

    # [tile] -> [tile, T] with T = 1, whose only token has index 0.
    index = jnp.zeros_like(tokens)
    logits, cache = next_logits(
        config, params, tokens[:, None], rows.position[:, None], cache, index
    )

    def of_row(leaf: Array) -> Array:
        return leaf.at[rows.slot].get(mode="clip")

    sampling = jax.tree.map(of_row, slots.sampling)
    seen = of_row(slots.seen)[:, :num_ids]
    drawn = draw(logits[:, :num_ids], seen, of_row(slots.keys), rows.position + 1, sampling)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    logprob = jnp.take_along_axis(logprobs, drawn[:, None], axis=1)[:, 0]

    # Rows that draw nothing are put nowhere.
    count = slots.newest.shape[0]
    drawing = jnp.where(rows.draws, rows.slot, count)
    slots = slots.replace(
        newest=slots.newest.at[drawing].set(drawn, mode="drop"),
        seen=slots.seen.at[drawing, drawn].set(True, mode="drop"),
    )
    return DeviceState(cache.layers, slots), Drawn(drawn, logprob)
