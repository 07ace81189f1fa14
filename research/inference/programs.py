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

from research.inference.prefill import next_logits, prefill, real_positions
from research.inference.prompts import Prompts
from research.inference.sampling import SamplingConfig, SamplingParams, draw
from research.models.cache import Cache, LayerCache
from research.models.config import ModelConfig
from research.models.language_model import LanguageModelConfig
from research.models.paged_cache import PageTable


@flax.struct.dataclass
class Slots:
    """What the device keeps of the sequence in each slot.

    Attributes:
      newest: its newest token.
      keys: its random key.
      limit: tokens that it may have, prompt included: the length that RoPE rules by length go by.
      sampling: how its tokens are drawn.
      seen: which ids it has, prompt included.
    """

    newest: Int[Array, "slots"]
    keys: Key[Array, "slots"]
    limit: Int[Array, "slots"]
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
    """What a step hands to the next one.

    Attributes:
      layers: the pages of all layers, and what an encoder read for each slot.
      slots: the sequences.
      memory_segments: 1 where an encoder's token of a slot is real; None without an encoder.
    """

    layers: tuple[LayerCache, ...]
    slots: Slots
    memory_segments: Int[Array, "slots M"] | None = None


def empty_slots(count: int, vocab_size: int) -> Slots:
    """Returns slots without sequences."""
    sampling = SamplingParams.of([SamplingConfig()] * count)
    keys = jax.random.split(jax.random.key(0), count)
    seen = jnp.zeros((count, vocab_size), bool)
    newest = jnp.zeros(count, jnp.int32)
    limit = jnp.ones(count, jnp.int32)
    return Slots(newest, keys, limit, sampling, seen)


@functools.partial(jax.jit, donate_argnames=("state",))
def admit(
    state: DeviceState,
    slot: Int[Array, ""],
    key: Key[Array, "1"],
    limit: Int[Array, "1"],
    sampling: SamplingParams,
    seen: Bool[Array, "V"],
) -> DeviceState:
    """Returns the state with another sequence in a slot.

    Args:
      state: before.
      slot: which.
      key, limit, sampling: of the sequence, in arrays of one row.
      seen: which ids it has.
    """
    old = state.slots

    def put(rows: Array, row: Array) -> Array:
        return rows.at[slot].set(row[0])

    slots = old.replace(
        keys=put(old.keys, key),
        limit=put(old.limit, limit),
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
    page_table = PageTable(ids, table.num_pages, table.page_size)

    def of_row(leaf: Array) -> Array:
        return leaf.at[rows.slot].get(mode="clip")

    cache = Cache(state.layers, page_table=page_table)
    if state.memory_segments is not None:
        # What the encoder read for the slot of each row.
        last = slots.newest.shape[0] - 1
        memory_slots = jnp.minimum(rows.slot, last)
        taken = [each.replace(memory=each.memory.take(memory_slots)) for each in state.layers]
        cache = Cache(tuple(taken), of_row(state.memory_segments), page_table)

    # [tile] -> [tile, T] with T = 1, whose only token has index 0.
    index = jnp.zeros_like(tokens)
    position = rows.position[:, None]
    lengths = of_row(slots.limit)[:, None]
    logits, cache = next_logits(
        config, params, tokens[:, None], position, cache, index, lengths=lengths
    )

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
    layers = _with_memory(cache.layers, state.layers)
    return state.replace(layers=layers, slots=slots), Drawn(drawn, logprob)


def _with_memory(
    layers: tuple[LayerCache, ...], others: tuple[LayerCache, ...]
) -> tuple[LayerCache, ...]:
    """Returns layers with the memory of others."""
    pairs = zip(layers, others, strict=True)
    return tuple(layer.replace(memory=other.memory) for layer, other in pairs)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def read_source(
    params: Any,
    state: DeviceState,
    slot: Int[Array, ""],
    tokens: Int[Array, "1 M"],
    length: Int[Array, "1"],
    *,
    config: ModelConfig,
) -> DeviceState:
    """Returns the state with what the encoder reads for the sequence in a slot.

    Args:
      params: of the model.
      state: before.
      slot: which.
      tokens: of the encoder, padded.
      length: how many are real.
      config: the model.
    """
    start = jnp.full((1, 1), config.decoder_start_id, jnp.int32)
    prompt = Prompts(start, jnp.ones(1, jnp.int32), tokens, length)
    # The decoder's first token is read too, in a cache that is not kept.
    _, cache = prefill(params, prompt, config=config, slots=1)

    def put(rows: Array, row: Array) -> Array:
        # [L, slots, M, K, H] where layers are stacked, and a row with the tokens that were read.
        axis = rows.ndim - 4
        missing = rows.shape[axis + 1] - row.shape[axis + 1]
        widths = [(0, 0)] * row.ndim
        widths[axis + 1] = (0, missing)
        return jax.lax.dynamic_update_slice_in_dim(rows, jnp.pad(row, widths), slot, axis)

    layers = []
    for old, new in zip(state.layers, cache.layers, strict=True):
        layers.append(old.replace(memory=jax.tree.map(put, old.memory, new.memory)))
    is_real = jnp.arange(state.memory_segments.shape[1]) < length[0]
    segments = state.memory_segments.at[slot].set(is_real.astype(jnp.int32))
    return state.replace(layers=tuple(layers), memory_segments=segments)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def read_prefix(
    params: Any,
    state: DeviceState,
    table: PageTable,
    tokens: Int[Array, "1 T"],
    length: Int[Array, "1"],
    *,
    config: ModelConfig,
) -> DeviceState:
    """Returns the state with a prompt in its pages, all of whose tokens attend to all of it.

    Args:
      params: of the model.
      state: before.
      table: the pages of the sequence, in one row.
      tokens: of the prompt, padded.
      length: how many are real.
      config: the model.
    """
    is_real, positions = real_positions(tokens, length)
    cache = Cache(state.layers, page_table=table)
    prefix = is_real.astype(jnp.int32)
    _, cache = next_logits(config, params, tokens, positions, cache, length - 1, prefix=prefix)
    return state.replace(layers=cache.layers)
