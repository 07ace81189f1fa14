"""The compiled steps of the engine.

A step takes rows, each one token of a sequence in a slot, and runs the model over them in tiles of
a fixed number of rows. Each row is a sequence of one new token: what it attends to, prompt or
answer, is in the pages. So whatever the rows of a step are, what is computed of one of them is the
same, operation by operation.

On a mesh all devices have pages of all sequences, each of its own heads. So each computes all rows
of a step, by its own heads, columns and experts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from research.inference.prefill import logits_of, prefill, read_tokens, real_positions
from research.inference.prompts import Prompts
from research.inference.slots import DeviceState, Slots, StepRows, put_rows, slice_rows
from research.inference.speculation.drafter import Drafter, Pages, Tokens
from research.models.cache import Cache, LayerCache
from research.models.language_model import LanguageModelConfig, language_model
from research.models.paged_cache import PageTable, stack_axes
from research.models.transformer import Output
from research.parallel.shard_map import whole_batch

Layers = tuple[LayerCache, ...]


@functools.partial(jax.jit, static_argnames=("config", "rows", "drafter", "cache_dtype"))
@whole_batch()
def empty_state(
    params: Any,
    draft_params: Any,
    table: PageTable,
    *,
    config: LanguageModelConfig,
    rows: int,
    drafter: Drafter | None,
    cache_dtype: str | None,
) -> DeviceState:
    """Returns pages of zeros.

    Args:
      params: of the model.
      draft_params: the drafter's own.
      table: one row for each slot, all without pages.
      config: the model.
      rows: of a step.
      drafter: who guesses on the device; None for nobody.
      cache_dtype: as of `LanguageModel.empty_cache`.
    """
    slots = table.ids.shape[0]
    length = config.max_length
    segments = None
    if config.structure == "encoder_decoder":
        segments = jnp.zeros((slots, length), jnp.int32)
    model = language_model(config)
    cache = model.empty_cache(
        params, slots, length, segments, page_table=table, cache_dtype=cache_dtype
    )
    logits = jnp.zeros((rows, config.vocab_size), jnp.float32)
    state = DeviceState(cache.layers, logits, segments)
    if drafter is None:
        return state
    hidden = jnp.zeros((rows, config.embed_dim), config.dtype)
    # What guesses may attend to more than the model: it keeps all tokens.
    draft_layers = drafter.empty_layers(draft_params, table.kinds[0])
    return state.replace(draft_layers=draft_layers, hidden=hidden)


@functools.partial(
    jax.jit, static_argnames=("config", "tile", "drafter"), donate_argnames=("state",)
)
@whole_batch()
def read(
    params: Any,
    draft_params: Any,
    state: DeviceState,
    slots: Slots,
    table: PageTable,
    rows: StepRows,
    num_tiles: Int[Array, ""],
    *,
    config: LanguageModelConfig,
    tile: int,
    drafter: Drafter | None,
) -> DeviceState:
    """Returns the state with the tokens of the rows in the pages, and the logits after each of them
    that needs them.

    Args:
      params: of the model.
      draft_params: the drafter's own.
      state: before.
      slots: of the sequences.
      table: the pages of each slot.
      rows: of which a sequence's come in order; as many as tiles and more.
      num_tiles: how many tiles have rows that are no padding.
      config: the model.
      tile: rows of a tile.
      drafter: who guesses on the device, whose pages get the tokens too; None for nobody.
    """

    def run_tile(index: Array, carry: DeviceState) -> DeviceState:
        first = index * tile
        of_tile = slice_rows(rows, first, tile)
        output, cache, tokens = _read_tile(params, carry, slots, table, of_tile, config)
        hidden = output.hidden[:, 0]
        logits = _needed_logits(params, hidden, of_tile, config)
        layers = _with_memory(output.cache.layers, carry.layers)
        after = carry.replace(layers=layers, logits=put_rows(carry.logits, logits, first))
        if drafter is None:
            return after

        limits = slots.limit.at[of_tile.slot].get(mode="clip")
        pages = Pages(layers, carry.draft_layers, cache.page_table)
        of_draft = Tokens(tokens, of_tile.position, limits, hidden)
        following = _following(slots, of_tile)
        own = drafter.fill(params, draft_params, pages, of_draft, following)
        return after.replace(draft_layers=own, hidden=put_rows(carry.hidden, hidden, first))

    return jax.lax.fori_loop(0, num_tiles, run_tile, state)


def _read_tile(
    params: Any,
    state: DeviceState,
    slots: Slots,
    table: PageTable,
    rows: StepRows,
    config: LanguageModelConfig,
) -> tuple[Output, Cache, Int[Array, "tile"]]:
    """Returns what the model makes of the tokens of a tile, the cache before, and the tokens."""
    # Given, the newest of a slot, or a draft: drafts [[7, 8]] of a slot whose newest is 6 are
    # [[6, 7, 8]], so that draft i has index i.
    known = jnp.concatenate([slots.newest[:, None], slots.drafts], axis=1)
    found = known.at[rows.slot, rows.draft].get(mode="clip")
    tokens = jnp.where(rows.token < 0, found, rows.token)
    # Padding has no pages: it writes to page 0, which nobody reads.
    cache = Cache(state.layers, page_table=table.of_rows(rows.slot))
    if state.memory_segments is not None:
        # What the encoder read for the sequence of each row.
        memory = slots.memory.at[rows.slot].get(mode="clip")
        taken = [each.replace(memory=each.memory.replace(rows=memory)) for each in state.layers]
        segments = state.memory_segments[memory]
        cache = cache.replace(layers=tuple(taken), memory_segments=segments)

    # [tile] -> [tile, T] with T = 1.
    inputs = {
        "tokens": tokens[:, None],
        "positions": rows.position[:, None],
        "lengths": slots.limit.at[rows.slot].get(mode="clip")[:, None],
        "adapters": slots.adapter.at[rows.slot].get(mode="clip")[:, None],
    }
    return read_tokens(config, params, inputs, cache), cache, tokens


def _needed_logits(
    params: Any, hidden: Float[Array, "tile D"], rows: StepRows, config: LanguageModelConfig
) -> Float[Array, "tile V"]:
    """Returns the logits after each row; zeros where no row of the tile needs them."""

    def project(hidden: Float[Array, "tile D"]) -> Float[Array, "tile V"]:
        return logits_of(config, params, hidden)

    def nothing(hidden: Float[Array, "tile D"]) -> Float[Array, "tile V"]:
        return jnp.zeros((hidden.shape[0], config.vocab_size), jnp.float32)

    is_needed = jnp.any(rows.draws | (rows.target >= 0))
    return jax.lax.cond(is_needed, project, nothing, hidden)


def _following(slots: Slots, rows: StepRows) -> Int[Array, "tile"]:
    """Returns the token after each row's, -1 where it is not known."""
    # After draft 1, drafts [[7, 8]] go on with index 1.
    draft = slots.drafts.at[rows.slot, rows.draft].get(mode="fill", fill_value=-1)
    return jnp.where(rows.following == -2, draft, rows.following)


def _with_memory(layers: Layers, others: Layers) -> Layers:
    """Returns layers with the memory of others."""
    pairs = zip(layers, others, strict=True)
    return tuple(layer.replace(memory=other.memory) for layer, other in pairs)


@functools.partial(jax.jit, donate_argnames=("state",))
@whole_batch()
def copy_pages(
    state: DeviceState, sources: Int[Array, "kinds pages"], targets: Int[Array, "kinds pages"]
) -> DeviceState:
    """Returns the state with pages copied to others, in all layers: those of its kind in each."""
    layers = []
    for layer in state.layers:
        kind = layer.tokens.kind
        tokens = layer.tokens.copy(sources[kind], targets[kind])
        layers.append(layer.replace(tokens=tokens))
    return state.replace(layers=tuple(layers))


@jax.jit
@whole_batch()
def take_pages(
    state: DeviceState, ids: Int[Array, "kinds pages"]
) -> list[Shaped[Array, "pages *rest"]]:
    """Returns some pages of all layers, those of its kind of each, the pages first."""
    found = []
    for layer in (*state.layers, *state.draft_layers):
        axis = stack_axes(layer.tokens.pages)
        own = ids[layer.tokens.kind]
        for leaf in layer.tokens.pages.arrays():
            taken = jnp.take(leaf, own, axis=axis, mode="clip")
            found.append(jnp.moveaxis(taken, axis, 0))
    return found


@functools.partial(jax.jit, donate_argnames=("state",))
@whole_batch()
def put_pages(
    state: DeviceState, ids: Int[Array, "kinds pages"], arrays: list[Shaped[Array, "pages *rest"]]
) -> DeviceState:
    """Returns the state with pages from `take_pages`; those whose ids there are not are dropped."""
    new = iter(arrays)

    def put(layer: LayerCache) -> LayerCache:
        axis = stack_axes(layer.tokens.pages)
        stack = (slice(None),) * axis
        own = ids[layer.tokens.kind]

        def put_leaf(leaf: Array) -> Array:
            put_pages = jnp.moveaxis(next(new), 0, axis)
            return leaf.at[(*stack, own)].set(put_pages, mode="drop")

        pages = jax.tree.map(put_leaf, layer.tokens.pages)
        return layer.replace(tokens=layer.tokens.replace(pages=pages).lay_out())

    layers = tuple(put(layer) for layer in state.layers)
    return state.replace(layers=layers, draft_layers=tuple(map(put, state.draft_layers)))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
@whole_batch()
def read_source(
    params: Any,
    state: DeviceState,
    row: Int[Array, ""],
    tokens: Int[Array, "1 M"],
    length: Int[Array, "1"],
    *,
    config: LanguageModelConfig,
) -> DeviceState:
    """Returns the state with what the encoder reads in a row of the memory.

    Args:
      params: of the model.
      state: before.
      row: which.
      tokens: of the encoder, padded.
      length: how many are real.
      config: the model.
    """
    start = jnp.full((1, 1), config.decoder_start_id, jnp.int32)
    prompt = Prompts(start, jnp.ones(1, jnp.int32), tokens, length)
    # The decoder's first token is read too, in a cache that is not kept.
    _, cache = prefill(params, prompt, config=config, slots=1)

    def put(rows: Array, read: Array) -> Array:
        # [L, slots, M, K, H] where layers are stacked, and a row with the tokens that were read.
        axis = rows.ndim - 4
        missing = rows.shape[axis + 1] - read.shape[axis + 1]
        widths = [(0, 0)] * read.ndim
        widths[axis + 1] = (0, missing)
        return jax.lax.dynamic_update_slice_in_dim(rows, jnp.pad(read, widths), row, axis)

    layers = []
    for old, new in zip(state.layers, cache.layers, strict=True):
        layers.append(old.replace(memory=jax.tree.map(put, old.memory, new.memory)))
    is_real = jnp.arange(state.memory_segments.shape[1]) < length[0]
    segments = state.memory_segments.at[row].set(is_real.astype(jnp.int32))
    return state.replace(layers=tuple(layers), memory_segments=segments)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
@whole_batch()
def read_prefix(
    params: Any,
    state: DeviceState,
    table: PageTable,
    tokens: Int[Array, "1 T"],
    length: Int[Array, "1"],
    *,
    config: LanguageModelConfig,
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
    prefix = is_real.astype(jnp.int32)
    inputs = {"tokens": tokens, "positions": positions, "prefix": prefix}
    output = read_tokens(config, params, inputs, Cache(state.layers, page_table=table))
    return state.replace(layers=output.cache.layers)
