"""One step of a beam search: mask what may not come next, extend the hypotheses, keep the best.

The search knows no model. It drives a `BeamModel`, which says what a step is and how rows of its
state are selected.

Dimensions without a letter: `beams` of a prompt, `rows` = B · beams of the model's state, `slots`
of a sequence (prompt included), `candidates` for the next beams, `ends` (end-of-text ids).
"""

import functools
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.parallel.rules import constrain


@runtime_checkable
class BeamModel(Protocol):
    """The model that is searched: hashable, and equal where its fields are, so that it compiles
    once for all searches.

    Its state is a tree of arrays that has read all tokens but the newest of each row.
    """

    def step(
        self, params: Any, state: Any, tokens: Int[Array, " rows"], positions: Int[Array, " rows"]
    ) -> tuple[Float[Array, "rows V"], Any]:
        """Reads one token per row, at its position in the sequence; returns the logits of the next
        one, and the state.
        """

    def take(self, state: Any, rows: Int[Array, " rows"]) -> Any:
        """Returns the state whose rows are those of `state` at `rows`, in this order."""

    def reorder(self, state: Any, rows: Int[Array, "B beams"]) -> Any:
        """As `take`, where each row is replaced by one of the same prompt."""


@flax.struct.dataclass
class BeamRules:
    """Settings that may change between searches without a new compilation.

    Attributes:
      forced: the id that each new token must be, -1 where it is free.
      unscored: which of the forced ids have log p = 0.
      end_ids: ids that end a text; -1 is none.
      max_tokens: new tokens at most.
      min_tokens: new tokens before an end of text, at least.
      length_penalty: exponent of the length.
      stop_when_full: whether the search of a prompt ends once all its beams are finished.
      min_scored_length: the length that a running hypothesis is scored with when it is compared to
          finished ones, where it is shorter than that.
    """

    forced: Int[Array, " slots"]
    unscored: Bool[Array, " slots"]
    end_ids: Int[Array, " ends"]
    max_tokens: Int[Array, ""]
    min_tokens: Int[Array, ""]
    length_penalty: Float[Array, ""]
    stop_when_full: Bool[Array, ""]
    min_scored_length: Int[Array, ""]


@flax.struct.dataclass
class BeamState:
    """What one step of the search hands to the next.

    Attributes:
      model: the state of the `BeamModel`, one row per hypothesis.
      num_new: new tokens of every running hypothesis.
      lengths: its tokens, the prompt's included.
      tokens: the running hypotheses, best first.
      scores: Σ log p of their new tokens; -∞ marks an empty beam.
      finished_tokens: the finished hypotheses, best first.
      finished_scores: Σ log p / num_new^length_penalty; -∞ marks an empty beam.
      finished_num_new: their new tokens.
      active: whether the search of a prompt goes on.
    """

    model: Any
    num_new: Int[Array, ""]
    lengths: Int[Array, "B"]
    tokens: Int[Array, "B beams slots"]
    scores: Float[Array, "B beams"]
    finished_tokens: Int[Array, "B beams slots"]
    finished_scores: Float[Array, "B beams"]
    finished_num_new: Int[Array, "B beams"]
    active: Bool[Array, "B"]


@functools.partial(
    jax.jit, static_argnames=("model", "no_repeat_ngram", "num_ids"), donate_argnames=("state",)
)
def beam_step(
    params: Any,
    state: BeamState,
    rules: BeamRules,
    *,
    model: BeamModel,
    no_repeat_ngram: int,
    num_ids: int,
) -> BeamState:
    """Feeds the newest token of each hypothesis and keeps the best continuations, made of ids below
    `num_ids`.
    """
    batch, beams, _ = state.tokens.shape

    # The newest token of each hypothesis and its position: [B, beams, slots] -> [rows].
    last = state.lengths - 1
    newest = jnp.broadcast_to(last[:, None], (batch, beams))
    tokens = jnp.take_along_axis(state.tokens, newest[..., None], axis=-1)
    tokens = tokens.reshape(-1)
    positions = newest.reshape(-1)
    logits, model_state = model.step(params, state.model, tokens, positions)

    # [rows, V] -> [B, beams, V]; the padding of the vocabulary is cut off.
    logits = logits.astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    log_p = log_p.reshape(batch, beams, -1)
    log_p = log_p[..., :num_ids]
    log_p = _constrain(state, log_p, rules, no_repeat_ngram)
    state, parents = advance(state, log_p, rules)

    # Parents [[1, 1], [0, 1]] of 2 prompts -> rows [1, 1, 2, 3] of the model's state.
    prompt = jnp.arange(batch)
    first_row = prompt[:, None] * beams
    rows = first_row + parents
    model_state = model.reorder(model_state, rows)
    return lay_out(state.replace(model=model_state))


def lay_out(state: BeamState) -> BeamState:
    """Returns the state with its arrays by prompt where the mesh in context has the prompts: a step
    takes it as the one before gives it. The model lays out its own state.
    """

    def by_prompt(leaf: Array) -> Array:
        # [B, beams] is ("batch", None); what all prompts share has no axes.
        names = ["batch", None, None]
        own = names[: leaf.ndim]
        return constrain(leaf, tuple(own))

    laid_out = jax.tree.map(by_prompt, state.replace(model=None))
    return laid_out.replace(model=state.model)


def _constrain(
    state: BeamState, log_p: Float[Array, "B beams V"], rules: BeamRules, no_repeat_ngram: int
) -> Float[Array, "B beams V"]:
    """Sets log p of what must not come next to -∞. A forced id comes even where another rule
    forbids it.
    """
    batch, beams, num_ids = log_p.shape
    if no_repeat_ngram:
        # [B, beams, slots] -> [rows, slots]; lengths [3, 5] of 2 beams -> [3, 3, 5, 5].
        sequences = state.tokens.reshape(batch * beams, -1)
        lengths = jnp.repeat(state.lengths, beams)
        banned = completes_ngram(sequences, lengths, no_repeat_ngram, num_ids)
        banned = banned.reshape(log_p.shape)
        log_p = jnp.where(banned, -jnp.inf, log_p)

    # Until `min_tokens` no text may end.
    ids = jnp.arange(num_ids)
    ids = ids[None, None, :]
    is_end = jnp.isin(ids, rules.end_ids)
    too_early = state.num_new < rules.min_tokens
    log_p = jnp.where(is_end & too_early, -jnp.inf, log_p)

    # A forced id that another rule forbids has log p = 0, as if it were unscored.
    forced = rules.forced[state.num_new]
    unscored = rules.unscored[state.num_new]
    unscored = unscored | jnp.isneginf(log_p)
    forced_log_p = jnp.where(unscored, 0.0, log_p)
    is_forced = ids == forced
    only_forced = jnp.where(is_forced, forced_log_p, -jnp.inf)

    is_free = forced < 0
    return jnp.where(is_free, log_p, only_forced)


def completes_ngram(
    tokens: Int[Array, "rows slots"], lengths: Int[Array, " rows"], size: int, num_ids: int
) -> Bool[Array, "rows V"]:
    """Returns which ids would complete an n-gram of `size` tokens that the sequence already has.

    With size = 3, [5, 6, 7, 5, 6] must not continue with 7.

    Args:
      tokens: sequences, each followed by anything.
      lengths: tokens of each, at least 1.
      size: n, at least 1.
      num_ids: V.
    """
    rows, slots = tokens.shape
    banned = jnp.zeros((rows, num_ids), bool)
    if size > slots:
        return banned

    # [rows, starts]: whether an n-gram of the sequence begins with its newest n - 1 tokens.
    # [5, 6, 7, 5, 6] has n-grams at 0, 1 and 2, of which 5 6 7 at 0 begins with 5 6.
    num_starts = slots - size + 1
    starts = jnp.arange(num_starts)
    ends = starts[None, :] + size
    matches = ends <= lengths[:, None]
    first_newest = lengths - size + 1
    for i in range(size - 1):
        newest = jnp.maximum(first_newest + i, 0)
        newest_token = jnp.take_along_axis(tokens, newest[:, None], axis=1)
        token = tokens[:, i : i + num_starts]
        matches &= token == newest_token

    # The last token of each n-gram that matches is banned: 7 of 5 6 7.
    last_tokens = tokens[:, size - 1 :]
    row = jnp.arange(rows)
    row = row[:, None]
    return banned.at[row, last_tokens].max(matches)


def advance(
    state: BeamState, log_p: Float[Array, "B beams V"], rules: BeamRules
) -> tuple[BeamState, Int[Array, "B beams"]]:
    """Extends the hypotheses by one token; of equal ones that of the better beam, then that of the
    lower id, is first.

    With `ends` end-of-text ids, (ends + 1) · beams candidates leave enough that run on even where
    every beam ends in all ways. Of those that end only the best `beams` count.

    Returns:
      the state, but for the model's, and the beam that each running hypothesis continues.
    """
    batch, beams, num_ids = log_p.shape

    # [B, beams, V] -> [B, beams · V]; the flat index is parent · V + id.
    total = state.scores[..., None] + log_p
    total = total.reshape(batch, -1)
    num_ends = rules.end_ids.shape[0]
    num_candidates = min((num_ends + 1) * beams, beams * num_ids)
    scores, flat = jax.lax.top_k(total, num_candidates)
    parents = flat // num_ids
    ids = flat % num_ids

    # Each candidate has the tokens of its parent, and its own id behind them.
    tokens = _take_beams(state.tokens, parents)
    prompt = jnp.arange(batch)
    tokens = tokens.at[prompt, :, state.lengths].set(ids)
    num_new = state.num_new + 1
    lengths = state.lengths + 1
    state = state.replace(num_new=num_new, lengths=lengths)

    # With 2 beams, the third candidate [B, 2] does not finish even where it ends.
    is_end = jnp.isin(ids, rules.end_ids)
    ended = is_end | (num_new >= rules.max_tokens)
    rank = jnp.arange(num_candidates)
    among_best = rank < beams
    finishes = ended & among_best[None, :]
    finishes = finishes & state.active[:, None]
    finished_scores = jnp.where(finishes, scores, -jnp.inf)
    state = _add_finished(state, tokens, finished_scores, rules)

    # The best candidates that run on: [B, candidates] -> [B, beams].
    running_scores = jnp.where(ended, -jnp.inf, scores)
    scores, running = jax.lax.top_k(running_scores, beams)
    tokens = _take_beams(tokens, running)
    state = state.replace(tokens=tokens, scores=scores)
    active = state.active & _may_improve(state, rules)
    state = state.replace(active=active)
    parents = jnp.take_along_axis(parents, running, axis=1)
    return state, parents


def _take_beams(
    tokens: Int[Array, "B beams slots"], index: Int[Array, "B candidates"]
) -> Int[Array, "B candidates slots"]:
    """Returns the sequences at `index` of each prompt."""
    return jnp.take_along_axis(tokens, index[..., None], axis=1)


def _add_finished(
    state: BeamState,
    tokens: Int[Array, "B candidates slots"],
    scores: Float[Array, "B candidates"],
    rules: BeamRules,
) -> BeamState:
    """Adds candidates to the finished hypotheses, those of score -∞ excepted, and keeps the
    best.
    """
    beams = state.finished_scores.shape[1]
    length = state.num_new.astype(jnp.float32)
    scores = scores / length**rules.length_penalty
    num_new = jnp.full(tokens.shape[:2], state.num_new)

    # [B, beams + candidates] -> [B, beams]
    scores = jnp.concatenate([state.finished_scores, scores], axis=1)
    num_new = jnp.concatenate([state.finished_num_new, num_new], axis=1)
    tokens = jnp.concatenate([state.finished_tokens, tokens], axis=1)
    scores, best = jax.lax.top_k(scores, beams)
    tokens = _take_beams(tokens, best)
    num_new = jnp.take_along_axis(num_new, best, axis=1)
    return state.replace(finished_tokens=tokens, finished_scores=scores, finished_num_new=num_new)


def _may_improve(state: BeamState, rules: BeamRules) -> Bool[Array, "B"]:
    """Returns whether the best running hypothesis may yet displace a finished one; False where none
    is running.
    """
    length = jnp.maximum(state.num_new, rules.min_scored_length)
    length = length.astype(jnp.float32)
    penalty = length**rules.length_penalty
    best_running = state.scores[:, 0] / penalty
    worst_finished = state.finished_scores[:, -1]

    improves = best_running > worst_finished
    is_full = worst_finished > -jnp.inf
    stops = is_full & rules.stop_when_full
    return improves & ~stops
