"""Beam search: the likeliest continuations instead of drawn ones, one compiled step a token.

The search knows no model. It drives a `BeamModel`: what a step is, and how rows of its state are
picked.

Further letters: `W` beams of a prompt, `R` = B · W rows of the model's state, `C` candidates for
the next beams; `S` are the places of a sequence, prompt included.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from research.core.errors import UserError
from research.core.progress import track


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """How the likeliest continuations are searched.

    A finished hypothesis of n new tokens, its end-of-text id included, scores Σ log p /
    n^length_penalty.

    Attributes:
      num_beams: hypotheses kept of each prompt, W.
      max_tokens: new tokens at most.
      min_tokens: new tokens before an end of text, at least.
      length_penalty: above 0 favours long texts, below 0 short ones.
      no_repeat_ngram: n-grams of this many tokens occur once at most, those of the prompt included;
          0 is no such rule.
      early_stopping: when the search ends, given W finished hypotheses: `True` at once; `False`
        when the best running one, scored as it stands, is no better than the worst finished;
        `"never"` when it could not become better.
      num_return: hypotheses returned of each prompt, best first.
      forced_prefix: ids that every continuation begins with; their log p counts.
      forced_bos: id that comes even before `forced_prefix`, with log p = 0, or None.
      forced_eos: whether what is `max_tokens` long ends with the end-of-text id, with log p = 0.

    Source: Wu et al. 2016, arXiv:1609.08144, equation 14, for the length penalty, which there is
    ((5 + n) / 6)^α beside a coverage penalty; n^α and the three stopping rules are those of
    transformers. No repeated n-grams: Paulus et al. 2018, arXiv:1705.04304, section 2.5.
    """

    num_beams: int = 4
    max_tokens: int = 128
    min_tokens: int = 0
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0
    early_stopping: Literal[False, True, "never"] = False
    num_return: int = 1
    forced_prefix: tuple[int, ...] = ()
    forced_bos: int | None = None
    forced_eos: bool = False

    def __post_init__(self) -> None:
        forced = len(self.forced_prefix) + (self.forced_bos is not None) + self.forced_eos
        for name, holds, constraint in (
            ("num_beams", self.num_beams >= 1, "be at least 1"),
            ("max_tokens", self.max_tokens >= 1, "be at least 1"),
            (
                "max_tokens",
                self.max_tokens >= forced,
                f"be at least {forced}, the number of forced ids",
            ),
            (
                "min_tokens",
                0 <= self.min_tokens <= self.max_tokens,
                f"lie in [0, max_tokens = {self.max_tokens}]",
            ),
            ("length_penalty", np.isfinite(self.length_penalty), "be finite"),
            ("no_repeat_ngram", self.no_repeat_ngram >= 0, "not be below 0"),
            (
                "num_return",
                1 <= self.num_return <= self.num_beams,
                f"lie in [1, num_beams = {self.num_beams}]",
            ),
        ):
            if not holds:
                raise UserError(name, getattr(self, name), f"must {constraint}.")


@runtime_checkable
class BeamModel(Protocol):
    """What is searched: a value, hashable and equal where its fields are, so that it compiles once
    for all searches.

    Its state is a tree of arrays that has read all tokens but the newest of each row.
    """

    def step(
        self, params: Any, state: Any, tokens: Int[Array, "R"], positions: Int[Array, "R"]
    ) -> tuple[Float[Array, "R V"], Any]:
        """Reads one token a row, at its position in the sequence; returns the logits of the next
        one, and the state.
        """

    def take(self, state: Any, rows: Int[Array, "R"]) -> Any:
        """Returns the state whose rows are those of `state` at `rows`, in this order."""

    def reorder(self, state: Any, rows: Int[Array, "R"]) -> Any:
        """As `take`, where each row is replaced by one of the same prompt."""


@flax.struct.dataclass
class BeamRules:
    """What may change between searches without compiling anything anew.

    Attributes:
      forced: the id that each new token must be, -1 where it is free.
      unscored: which of the forced ones have log p = 0.
      ends: ids that end a text, K of them; -1 is none.
      max_tokens: new tokens at most.
      min_tokens: before an end of text.
      length_penalty: exponent.
      ends_full: whether W finished hypotheses end the search.
      horizon: the length for which a running hypothesis is scored when its hopes are weighed, where
          it is shorter.
    """

    forced: Int[Array, "S"]
    unscored: Bool[Array, "S"]
    ends: Int[Array, "K"]
    max_tokens: Int[Array, ""]
    min_tokens: Int[Array, ""]
    length_penalty: Float[Array, ""]
    ends_full: Bool[Array, ""]
    horizon: Int[Array, ""]


@flax.struct.dataclass
class BeamState:
    """What one step of the search hands to the next.

    Attributes:
      model: the state of the `BeamModel`, a row for each of B · W hypotheses.
      made: new tokens of every running hypothesis.
      lengths: its tokens with the prompt's.
      tokens: the running hypotheses, best first.
      scores: Σ log p of their new tokens; -∞ marks one that is none.
      done_tokens: the finished hypotheses, best first.
      done_scores: Σ log p / n^length_penalty; -∞ marks one that is none.
      done_made: their new tokens, n.
      open: whether the search of a prompt goes on.
    """

    model: Any
    made: Int[Array, ""]
    lengths: Int[Array, "B"]
    tokens: Int[Array, "B W S"]
    scores: Float[Array, "B W"]
    done_tokens: Int[Array, "B W S"]
    done_scores: Float[Array, "B W"]
    done_made: Int[Array, "B W"]
    open: Bool[Array, "B"]


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A finished continuation: its new ids, an end-of-text id included, and its score."""

    tokens: tuple[int, ...]
    score: float


@functools.partial(
    jax.jit,
    static_argnames=("model", "no_repeat_ngram", "num_ids"),
    donate_argnames=("state",),
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
    newest = jnp.broadcast_to((state.lengths - 1)[:, None], (batch, beams))
    tokens = jnp.take_along_axis(state.tokens, newest[..., None], axis=-1)
    logits, carried = model.step(params, state.model, tokens.reshape(-1), newest.reshape(-1))
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(batch, beams, -1)[..., :num_ids]
    log_p = _constrain(state, log_p, rules, no_repeat_ngram)
    state, parents = advance(state, log_p, rules)
    rows = jnp.arange(batch)[:, None] * beams + parents
    return state.replace(model=model.reorder(carried, rows.reshape(-1)))


def _constrain(
    state: BeamState, log_p: Float[Array, "B W V"], rules: BeamRules, no_repeat_ngram: int
) -> Float[Array, "B W V"]:
    """Sets log p of what must not come next to -∞. What is forced comes even where another rule
    forbids it.
    """
    batch, beams, num_ids = log_p.shape
    if no_repeat_ngram:
        rows = state.tokens.reshape(batch * beams, -1)
        banned = repeats(rows, jnp.repeat(state.lengths, beams), no_repeat_ngram, num_ids)
        log_p = jnp.where(banned.reshape(log_p.shape), -jnp.inf, log_p)
    ids = jnp.arange(num_ids)[None, None, :]
    log_p = jnp.where(jnp.isin(ids, rules.ends) & (state.made < rules.min_tokens), -jnp.inf, log_p)
    forced = rules.forced[state.made]
    unscored = rules.unscored[state.made] | jnp.isneginf(log_p)
    return jnp.where(
        forced < 0, log_p, jnp.where(ids == forced, jnp.where(unscored, 0.0, log_p), -jnp.inf)
    )


def repeats(
    tokens: Int[Array, "R S"], lengths: Int[Array, "R"], size: int, num_ids: int
) -> Bool[Array, "R V"]:
    """Returns which ids would complete an n-gram of `size` tokens that stands in the sequence
    already.

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
    starts = jnp.arange(slots - size + 1)[None, :]
    match = starts + size <= lengths[:, None]
    for i in range(size - 1):
        newest = jnp.maximum(lengths - size + 1 + i, 0)[:, None]
        match &= tokens[:, i : i + starts.size] == jnp.take_along_axis(tokens, newest, axis=1)
    return banned.at[jnp.arange(rows)[:, None], tokens[:, size - 1 :]].max(match)


def advance(
    state: BeamState, log_p: Float[Array, "B W V"], rules: BeamRules
) -> tuple[BeamState, Int[Array, "B W"]]:
    """Extends the hypotheses by one token; of equal ones that of the better beam, then that of the
    lower id, is first.

    Of the best (K + 1) · W continuations W run on even where each beam ends in all K ways. Of those
    that end only the best W count.

    Returns:
      the state, but for the model's, and the beam that each running hypothesis continues.
    """
    batch, beams, num_ids = log_p.shape
    total = (state.scores[..., None] + log_p).reshape(batch, -1)
    candidates = (rules.ends.shape[0] + 1) * beams
    scores, flat = jax.lax.top_k(total, min(candidates, total.shape[1]))
    parents, ids = flat // num_ids, flat % num_ids
    tokens = jnp.take_along_axis(state.tokens, parents[..., None], axis=1)
    tokens = tokens.at[jnp.arange(batch), :, state.lengths].set(ids)
    state = state.replace(made=state.made + 1, lengths=state.lengths + 1)
    ended = jnp.isin(ids, rules.ends) | (state.made >= rules.max_tokens)
    counts = ended & (jnp.arange(ended.shape[1]) < beams)[None, :] & state.open[:, None]
    state = _finish(state, tokens, jnp.where(counts, scores, -jnp.inf), rules)
    scores, running = jax.lax.top_k(jnp.where(ended, -jnp.inf, scores), beams)
    state = state.replace(
        tokens=jnp.take_along_axis(tokens, running[..., None], axis=1), scores=scores
    )
    state = state.replace(open=state.open & _hopeful(state, rules))
    return state, jnp.take_along_axis(parents, running, axis=1)


def _finish(
    state: BeamState, tokens: Int[Array, "B C S"], scores: Float[Array, "B C"], rules: BeamRules
) -> BeamState:
    """Puts continuations among the finished ones, those of score -∞ excepted, and keeps the
    best.
    """
    scores = scores / state.made.astype(jnp.float32) ** rules.length_penalty
    scores, best = jax.lax.top_k(
        jnp.concatenate([state.done_scores, scores], axis=1), state.done_scores.shape[1]
    )
    made = jnp.concatenate([state.done_made, jnp.full(tokens.shape[:2], state.made)], axis=1)
    tokens = jnp.concatenate([state.done_tokens, tokens], axis=1)
    return state.replace(
        done_tokens=jnp.take_along_axis(tokens, best[..., None], axis=1),
        done_scores=scores,
        done_made=jnp.take_along_axis(made, best, axis=1),
    )


def _hopeful(state: BeamState, rules: BeamRules) -> Bool[Array, "B"]:
    """Returns whether the best running hypothesis may yet displace a finished one; False where none
    is running.
    """
    length = jnp.maximum(state.made, rules.horizon).astype(jnp.float32)
    worst = state.done_scores[:, -1]
    full = worst > -jnp.inf
    return (state.scores[:, 0] / length**rules.length_penalty > worst) & ~(full & rules.ends_full)


def beam_search(
    model: BeamModel,
    params: Any,
    state: Any,
    prompts: Sequence[Sequence[int]],
    beams: BeamConfig,
    *,
    slots: int,
    num_ids: int,
    end_ids: Sequence[int],
) -> list[list[Hypothesis]]:
    """Returns the best continuations of each prompt, best first; they do not depend on the other
    prompts.

    Args:
      model: what is searched.
      params: its parameters.
      state: its state with one row a prompt, which has read all but the last token of each. It may
        have read the last one too where reading it again changes nothing.
      prompts: ids, at least one each; of an encoder-decoder those that the decoder begins with.
      beams: how.
      slots: places of a sequence: at least the longest prompt and `max_tokens`.
      num_ids: ids that may be chosen: those below it.
      end_ids: those that end a text; what is forced to end takes the first of them.

    Raises:
      UserError: a setting that does not fit the ids, or a prompt that no hypothesis follows.
    """
    _check_ids(beams, num_ids, end_ids)
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    assert lengths.min() >= 1
    assert lengths.max() + beams.max_tokens <= slots
    shape = (len(prompts), beams.num_beams)
    tokens = np.zeros((*shape, slots), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, :, : len(prompt)] = prompt
    search = BeamState(
        model=model.take(state, jnp.repeat(jnp.arange(len(prompts)), beams.num_beams)),
        made=jnp.int32(0),
        lengths=jnp.asarray(lengths),
        tokens=jnp.asarray(tokens),
        # At first all beams of a prompt are the same one: only the first counts.
        scores=jnp.full(shape, -jnp.inf, jnp.float32).at[:, 0].set(0.0),
        done_tokens=jnp.zeros(tokens.shape, jnp.int32),
        done_scores=jnp.full(shape, -jnp.inf, jnp.float32),
        done_made=jnp.zeros(shape, jnp.int32),
        open=jnp.ones(len(prompts), bool),
    )
    rules = _rules(beams, slots, end_ids)
    for _ in track(range(beams.max_tokens), "beam search", unit="tokens"):
        search = beam_step(
            params,
            search,
            rules,
            model=model,
            no_repeat_ngram=beams.no_repeat_ngram,
            num_ids=num_ids,
        )
        if not np.asarray(search.open).any():
            break
    return _collect(search, lengths, beams)


def _check_ids(beams: BeamConfig, num_ids: int, end_ids: Sequence[int]) -> None:
    """Raises UserError where the settings do not fit the ids."""
    bos = () if beams.forced_bos is None else (beams.forced_bos,)
    for name, ids in (("forced_prefix", beams.forced_prefix), ("forced_bos", bos)):
        for i in ids:
            if not 0 <= i < num_ids:
                raise UserError(f"{name}: id {i} is out of range: it must lie in [0, {num_ids}).")
            if i in end_ids:
                raise UserError(f"{name}: id {i} is the end of text, which nothing can follow.")
    if beams.forced_eos and not end_ids:
        raise UserError("forced_eos", True, "needs a tokenizer that has an end-of-text id.")


def _rules(beams: BeamConfig, slots: int, end_ids: Sequence[int]) -> BeamRules:
    forced, unscored = np.full(slots, -1, np.int32), np.zeros(slots, bool)
    begin = () if beams.forced_bos is None else (beams.forced_bos,)
    unscored[: len(begin)] = True
    begin = (*begin, *beams.forced_prefix)
    forced[: len(begin)] = begin
    if beams.forced_eos:
        forced[beams.max_tokens - 1] = end_ids[0]
        unscored[beams.max_tokens - 1] = True
    return BeamRules(
        forced=jnp.asarray(forced),
        unscored=jnp.asarray(unscored),
        ends=jnp.asarray(end_ids or (-1,), jnp.int32),
        max_tokens=jnp.int32(beams.max_tokens),
        min_tokens=jnp.int32(beams.min_tokens),
        length_penalty=jnp.float32(beams.length_penalty),
        ends_full=jnp.asarray(beams.early_stopping is True),
        horizon=jnp.int32(
            beams.max_tokens if beams.early_stopping == "never" and beams.length_penalty > 0 else 0
        ),
    )


def _collect(
    search: BeamState, lengths: Int[np.ndarray, "B"], beams: BeamConfig
) -> list[list[Hypothesis]]:
    """Returns the finished hypotheses; fewer than `num_return` only where the rules leave no
    more.
    """
    tokens, scores, made = (
        np.asarray(x) for x in (search.done_tokens, search.done_scores, search.done_made)
    )
    found = [
        [
            Hypothesis(
                tuple(tokens[row, i, length : length + made[row, i]].tolist()),
                float(scores[row, i]),
            )
            for i in range(beams.num_return)
            if scores[row, i] > -np.inf
        ]
        for row, length in enumerate(lengths)
    ]
    if not all(found):
        raise UserError(
            "no_repeat_ngram",
            beams.no_repeat_ngram,
            f"with min_tokens = {beams.min_tokens} leaves prompt {found.index([])} no "
            "continuation of max_tokens "
            f"= {beams.max_tokens}.",
        )
    return found
