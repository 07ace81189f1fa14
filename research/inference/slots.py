"""What the device keeps of each running sequence, and what a step takes and returns."""

import enum
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from research.inference.sampling import IdRules
from research.inference.sampling_config import SamplingConfig, SamplingParams
from research.models.cache import LayerCache


class LogprobKind(enum.IntEnum):
    """Of which distribution log-probabilities are.

    Attributes:
      RAW: the model's: a log-softmax over all V of its float32 logits.
      PROCESSED: that which the token is drawn from, after penalties, temperature and truncation.
      ALLOWED: as RAW, and −∞ for ids that may not be drawn: what a search goes by.
    """

    RAW = 0
    PROCESSED = 1
    ALLOWED = 2


@flax.struct.dataclass
class Slots:
    """What the device keeps of the sequence in each slot.

    Attributes:
      newest: its newest token.
      drafts: guesses of the tokens after it, -1 for none.
      keys: its random key, as words.
      limit: tokens that it may have, prompt included: the length that RoPE rules by length go by.
      memory: the row of what an encoder read for it.
      adapter: which of the model's adapters reads it, from 1; 0 for none.
      sampling: how its tokens are drawn.
      edits: whether any of its rules changes a logit.
      rules: of each id; which are allowed is said of the newest token, then of each draft.
      kind: of its log-probabilities, a `LogprobKind`.
    """

    newest: Int[Array, "slots"]
    drafts: Int[Array, "slots drafts"]
    keys: UInt32[Array, "slots 2"]
    limit: Int[Array, "slots"]
    memory: Int[Array, "slots"]
    adapter: Int[Array, "slots"]
    sampling: SamplingParams
    edits: Bool[Array, "slots"]
    rules: IdRules
    kind: Int[Array, "slots"]


@flax.struct.dataclass
class StepRows:
    """The rows of a step.

    Attributes:
      slot: of each row's sequence; the number of slots where the row is padding.
      position: of its token.
      token: its id; -1 where only the device knows it: the slot's newest, or a draft of it.
      draft: which of the slot's drafts it is, from 1; 0 for none.
      draws: whether the next token is drawn from it.
      target: the token whose log-probability is wanted where nothing is drawn; -1 for none.
      following: the token after it; -1 where it is not known, -2 for the slot's next draft.
      wants: whether the likeliest ids, and those that truncation kept, are wanted.
    """

    slot: Int[Array, "rows"]
    position: Int[Array, "rows"]
    token: Int[Array, "rows"]
    draft: Int[Array, "rows"]
    draws: Bool[Array, "rows"]
    target: Int[Array, "rows"]
    following: Int[Array, "rows"]
    wants: Bool[Array, "rows"]


@flax.struct.dataclass
class Drawn:
    """What a step drew, by row; of rows that draw nothing any numbers.

    Attributes:
      token: the ids.
      logprob: of the drawn token, or of the row's target; NaN where a logit is.
      top: the likeliest ids, the likeliest first.
      top_logprobs: of these.
      kept: ids that could be drawn, a bit for each.
    """

    token: Int[Array, "rows"]
    logprob: Float[Array, "rows"]
    top: Int[Array, "rows top"]
    top_logprobs: Float[Array, "rows top"]
    kept: UInt32[Array, "rows words"]


@flax.struct.dataclass
class DeviceState:
    """What the model's programs hand to each other.

    Attributes:
      layers: the pages of all layers, and what an encoder read.
      logits: after the rows of the newest step, where they are needed.
      memory_segments: 1 where an encoder's token is real; None without an encoder.
      draft_layers: pages of what guesses.
      hidden: states after the rows of the newest step; None where nothing guesses by them.
    """

    layers: tuple[LayerCache, ...]
    logits: Float[Array, "rows V"]
    memory_segments: Int[Array, "slots M"] | None = None
    draft_layers: tuple[LayerCache, ...] = ()
    hidden: Float[Array, "rows D"] | None = None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def empty_slots(count: int, num_ids: int, drafts: int) -> Slots:
    """Returns slots without sequences.

    Args:
      count: of slots.
      num_ids: ids that may be drawn.
      drafts: that a sequence may have.
    """
    zeros = jnp.zeros(count, jnp.int32)
    rules = IdRules.none(count, num_ids)
    # [slots, words] -> [slots, 1 + drafts, words]
    allowed = jnp.repeat(rules.allowed[:, None], 1 + drafts, axis=1)
    return Slots(
        newest=zeros,
        drafts=jnp.full((count, drafts), -1, jnp.int32),
        keys=jnp.zeros((count, 2), jnp.uint32),
        limit=jnp.ones_like(zeros),
        memory=jnp.zeros_like(zeros),
        adapter=jnp.zeros_like(zeros),
        sampling=SamplingParams.of([SamplingConfig()] * count),
        edits=jnp.zeros(count, bool),
        rules=rules.replace(allowed=allowed),
        kind=jnp.zeros_like(zeros),
    )


@functools.partial(jax.jit, donate_argnames=("slots",))
def admit(slots: Slots, slot: Int[Array, ""], sequence: Slots) -> Slots:
    """Returns the slots with another sequence in one of them.

    Args:
      slots: before.
      slot: which.
      sequence: of one slot.
    """

    def put(rows: Array, row: Array) -> Array:
        return rows.at[slot].set(row[0])

    return jax.tree.map(put, slots, sequence)


def slice_rows(tree: Any, first: Int[Array, ""], count: int) -> Any:
    """Returns `count` rows of each array, from the first one given on."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count), tree)


def put_rows(tree: Any, rows: Any, first: Int[Array, ""]) -> Any:
    """Returns arrays with rows put into them, from the first one given on."""

    def put(leaf: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(leaf, part, first, axis=0)

    return jax.tree.map(put, tree, rows)
