"""From the logits of a step to its tokens: rules, a draw and log-probabilities by row, and which
drafts were right.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from research.inference.id_masks import pack_bits
from research.inference.sampling import IdRules, apply_rules, choose, process
from research.inference.slots import Drawn, LogprobKind, Slots, StepRows, slice_rows


@flax.struct.dataclass
class Allowed:
    """Which ids may be drawn next in some slots.

    Attributes:
      slots: which; the number of slots for none.
      words: as of `IdRules.allowed`, after the newest token and after each draft.
    """

    slots: Int[Array, "slots"]
    words: UInt32[Array, "slots drafts words"]


def allow(rules: IdRules, allowed: Allowed) -> IdRules:
    """Returns the rules of all slots with what is allowed in some of them."""
    words = rules.allowed.at[allowed.slots].set(allowed.words, mode="drop")
    return rules.replace(allowed=words)


@functools.partial(jax.jit, static_argnames=("group", "num_top"), donate_argnames=("slots",))
def draw_step(
    slots: Slots,
    rows: StepRows,
    logits: Float[Array, "rows V"],
    order: Int[Array, "rows"],
    count: Int[Array, ""],
    allowed: Allowed,
    *,
    group: int,
    num_top: int,
) -> tuple[Slots, Drawn, Int[Array, "slots"]]:
    """Draws from the logits of a step.

    Args:
      slots: of the sequences.
      rows: of the step.
      logits: after each row's token, float32.
      order: the rows that need it first; then the number of rows.
      count: how many need it.
      allowed: which ids may be drawn, where that has changed.
      group: rows that are computed at a time. On CPU it is 1, so that sums over the vocabulary
        add up in one order in all.
      num_top: how many of the likeliest ids are returned.

    Returns:
      the slots with what was drawn after their newest tokens, what is drawn from each row, and how
      many drafts of each slot are what was drawn.
    """
    rules = allow(slots.rules, allowed)
    slots = slots.replace(rules=rules, drafts=_given_drafts(slots, rows))

    def draw_group(index: Array, drawn: Drawn) -> Drawn:
        chosen = slice_rows(order, index * group, group)
        of_group = jax.tree.map(lambda leaf: leaf.at[chosen].get(mode="clip"), rows)
        found = draw_rows(logits.at[chosen].get(mode="clip"), of_group, slots, num_top)

        def put(leaf: Array, part: Array) -> Array:
            return leaf.at[chosen].set(part, mode="drop")

        return jax.tree.map(put, drawn, found)

    nothing = empty_drawn(len(logits), num_top, slots.rules.allowed.shape[-1])
    num_groups = (count + group - 1) // group
    drawn = jax.lax.fori_loop(0, num_groups, draw_group, nothing)
    slots, accepted = accept(slots, rows, drawn.token)
    return slots, drawn, accepted


def _given_drafts(slots: Slots, rows: StepRows) -> Int[Array, "slots drafts"]:
    """Returns the drafts of the slots, those among them that the host has given with the rows."""
    count, _ = slots.drafts.shape
    is_given = (rows.draft > 0) & (rows.token >= 0)
    slot = jnp.where(is_given, rows.slot, count)
    # Draft 1 has index 0.
    return slots.drafts.at[slot, rows.draft - 1].set(rows.token, mode="drop")


def empty_drawn(rows: int, num_top: int, words: int) -> Drawn:
    """Returns zeros."""
    return Drawn(
        token=jnp.zeros(rows, jnp.int32),
        logprob=jnp.zeros(rows, jnp.float32),
        top=jnp.zeros((rows, num_top), jnp.int32),
        top_logprobs=jnp.zeros((rows, num_top), jnp.float32),
        kept=jnp.zeros((rows, words), jnp.uint32),
    )


def draw_rows(logits: Float[Array, "B V"], rows: StepRows, slots: Slots, num_top: int) -> Drawn:
    """Returns what is drawn from rows.

    Args:
      logits: after each row's token, float32.
      rows: of a step.
      slots: of the sequences.
      num_top: how many of the likeliest ids are returned.
    """
    # Padding takes the last slot's.
    own: Slots = jax.tree.map(lambda leaf: leaf.at[rows.slot].get(mode="clip"), slots)
    rules = _with_drafts(own, rows)
    num_ids = rules.bias.shape[1]
    next_position = rows.position + 1
    usable = logits[:, :num_ids]
    edited = jax.lax.cond(
        jnp.any(own.edits),
        lambda: apply_rules(usable, rules, next_position, own.sampling),
        lambda: usable,
    )
    processed = process(edited, own.sampling)
    keys = jax.random.wrap_key_data(own.keys)
    drawn = choose(processed, keys, next_position, own.sampling)

    token = jnp.where(rows.draws, drawn, rows.target)
    logprobs = _logprobs(logits, edited, processed, own.kind)
    logprob = jnp.take_along_axis(logprobs, token[:, None], axis=1, mode="clip")[:, 0]
    empty = empty_drawn(len(logits), num_top, rules.allowed.shape[-1])
    top, top_logprobs, kept = jax.lax.cond(
        jnp.any(rows.wants),
        lambda: (*_top(logprobs, num_top), pack_bits(processed > -jnp.inf)),
        lambda: (empty.top, empty.top_logprobs, empty.kept),
    )
    return Drawn(drawn, logprob, top, top_logprobs, kept)


def _logprobs(
    logits: Float[Array, "B V"],
    edited: Float[Array, "B ids"],
    processed: Float[Array, "B ids"],
    kind: Int[Array, "B"],
) -> Float[Array, "B V"]:
    """Returns the log-probabilities of each row's kind, of all ids of the model."""
    raw = jax.nn.log_softmax(logits, axis=-1)
    missing = logits.shape[1] - edited.shape[1]

    def others(_: None) -> Float[Array, "B V"]:
        padding = ((0, 0), (0, missing))
        # What is no number stays none.
        is_allowed = jnp.pad(edited != -jnp.inf, padding)
        allowed = jnp.where(is_allowed, raw, -jnp.inf)
        drawn_from = jax.nn.log_softmax(processed, axis=-1)
        drawn_from = jnp.pad(drawn_from, padding, constant_values=-jnp.inf)
        is_processed = (kind == LogprobKind.PROCESSED)[:, None]
        found = jnp.where(is_processed, drawn_from, allowed)
        return jnp.where((kind == LogprobKind.RAW)[:, None], raw, found)

    return jax.lax.cond(jnp.any(kind != LogprobKind.RAW), others, lambda _: raw, None)


def _top(logprobs: Float[Array, "B V"], count: int) -> tuple[Array, Array]:
    """Returns the likeliest ids and their log-probabilities; of equal ones the lower id comes
    first.
    """
    values, ids = jax.lax.top_k(logprobs, count)
    return ids.astype(jnp.int32), values


def _with_drafts(own: Slots, rows: StepRows) -> IdRules:
    """Returns the rules after each row's token, which count the drafts up to it as if the answer
    had them.

    Args:
      own: the slot of each row.
      rows: which drafts they are.
    """
    row = jnp.arange(len(rows.slot))
    # What a grammar allows is known when the last token of the prompt is read, and says nothing of
    # those before it.
    every_id = jnp.uint32(2**32 - 1)
    allowed = jnp.where(rows.draws[:, None], own.rules.allowed[row, rows.draft], every_id)
    rules = own.rules.replace(allowed=allowed)
    count = own.drafts.shape[1]
    if not count:
        return rules
    # Row of draft 2 of drafts [7, 8, 9] -> 7 and 8 are counted; V drops the others.
    index = jnp.arange(1, count + 1)
    is_counted = (index[None, :] <= rows.draft[:, None]) & (own.drafts >= 0)
    counted = jnp.where(is_counted, own.drafts, rules.counts.shape[1])
    return rules.replace(counts=rules.counts.at[row[:, None], counted].add(1, mode="drop"))


def accept(
    slots: Slots, rows: StepRows, token: Int[Array, "rows"]
) -> tuple[Slots, Int[Array, "slots"]]:
    """Returns the slots with what was drawn after their newest tokens and after drafts that are
    right, and how many of them are.

    A draft is right where the token drawn from the row before it is the same: so what is drawn with
    drafts is what is drawn without them.

    Args:
      slots: before.
      rows: of the step.
      token: what was drawn from each.
    """
    drafts = slots.drafts
    count, num_drafts = drafts.shape
    # What was drawn from the newest token, then from each draft: -1 where nothing was.
    drawing = jnp.where(rows.draws, rows.slot, count)
    drawn = jnp.full((count, num_drafts + 1), -1, jnp.int32)
    drawn = drawn.at[drawing, rows.draft].set(token, mode="drop")

    # Drafts [7, 8, 9], drawn [7, 8, 5, 6] -> right [1, 1, 0], of which the first two count.
    is_right = (drawn[:, :-1] == drafts) & (drawn[:, 1:] >= 0)
    accepted = jnp.sum(jnp.cumprod(is_right.astype(jnp.int32), axis=1), axis=1)
    last = jnp.take_along_axis(drawn, accepted[:, None], axis=1)[:, 0]
    newest = jnp.where(last >= 0, last, slots.newest)

    # The tokens after the last one that counts are no part of the answer.
    is_new = jnp.arange(num_drafts + 1)[None, :] <= accepted[:, None]
    num_ids = slots.rules.counts.shape[1]
    new = jnp.where(is_new & (drawn >= 0), drawn, num_ids)
    slot = jnp.arange(count)[:, None]
    counts = slots.rules.counts.at[slot, new].add(1, mode="drop")
    rules = slots.rules.replace(counts=counts)
    return slots.replace(newest=newest, rules=rules), accepted
