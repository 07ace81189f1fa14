"""The compiled program of guesses: a drafter's steps, with the noise that the model draws with."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from research.inference.drawing import draw_rows
from research.inference.slots import DeviceState, Slots, StepRows, slice_rows
from research.inference.speculation.drafter import Drafter, Pages, Tokens
from research.models.paged_cache import PageTable
from research.parallel.shard_map import whole_batch


@flax.struct.dataclass
class DraftRows:
    """Answers that get guesses.

    Attributes:
      slot: of each; the number of slots where the row is padding.
      position: of its newest token.
      hidden: the row of the newest step that the newest token was drawn from.
    """

    slot: Int[Array, "rows"]
    position: Int[Array, "rows"]
    hidden: Int[Array, "rows"]


@functools.partial(jax.jit, static_argnames=("drafter", "tile"), donate_argnames=("state", "slots"))
@whole_batch()
def propose(
    params: Any,
    draft_params: Any,
    state: DeviceState,
    slots: Slots,
    table: PageTable,
    rows: DraftRows,
    num_tiles: Int[Array, ""],
    *,
    drafter: Drafter,
    tile: int,
) -> tuple[DeviceState, Slots]:
    """Returns the state and the slots with as many guesses as there is room for.

    Args:
      params: of the model that answers.
      draft_params: the drafter's own.
      state: before.
      slots: of the sequences.
      table: the pages of each slot.
      rows: whose guesses.
      num_tiles: how many tiles have rows that are no padding.
      drafter: who guesses.
      tile: rows of a tile.
    """

    def run_tile(index: Array, carry: tuple[DeviceState, Slots]) -> tuple[DeviceState, Slots]:
        of_tile = slice_rows(rows, index * tile, tile)
        return _guess(params, draft_params, *carry, table, of_tile, drafter)

    return jax.lax.fori_loop(0, num_tiles, run_tile, (state, slots))


def _guess(
    params: Any,
    draft_params: Any,
    state: DeviceState,
    slots: Slots,
    table: PageTable,
    rows: DraftRows,
    drafter: Drafter,
) -> tuple[DeviceState, Slots]:
    assert state.hidden is not None
    pages = Pages(state.layers, state.draft_layers, table.of_rows(rows.slot))
    newest = slots.newest.at[rows.slot].get(mode="clip")
    limits = slots.limit.at[rows.slot].get(mode="clip")
    hidden = state.hidden.at[rows.hidden].get(mode="clip")
    no = jnp.zeros(rows.slot.shape, bool)

    def guess(index: Array, carry: tuple[Slots, Pages, Tokens]) -> tuple[Slots, Pages, Tokens]:
        slots, pages, tokens = carry
        logits, hidden, pages = drafter.step(params, draft_params, pages, tokens)
        draft = jnp.full_like(rows.slot, index)
        # As the row of the same token, when the model reads it.
        row = StepRows(rows.slot, tokens.positions, tokens.ids, draft, ~no, draft, draft, no)
        drawn = draw_rows(logits, row, slots, 1)
        guessed = drawn.token
        drafts = slots.drafts.at[rows.slot, index].set(guessed, mode="drop")
        tokens = Tokens(guessed, tokens.positions + 1, limits, hidden)
        return slots.replace(drafts=drafts), pages, tokens

    first = Tokens(newest, rows.position, limits, hidden)
    count = slots.drafts.shape[1]
    slots, pages, _ = jax.lax.fori_loop(0, count, guess, (slots, pages, first))
    return state.replace(layers=pages.target, draft_layers=pages.own), slots
