"""Beam search: the likeliest continuations instead of sampled ones, one compiled step per token."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from research.core.errors import UserError
from research.core.progress import track
from research.inference.beam_config import BeamConfig
from research.inference.beam_step import BeamModel, BeamRules, BeamState, beam_step, lay_out


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A finished continuation: its new ids, an end-of-text id included, and its score."""

    tokens: tuple[int, ...]
    score: float


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
      state: its state with one row per prompt, which has read all but the last token of each. It
        may have read the last one too where reading it again changes nothing.
      prompts: ids, at least one each; of an encoder-decoder those that the decoder begins with.
      beams: settings of the search.
      slots: of a sequence: at least the longest prompt and `max_tokens`.
      num_ids: only ids below it may be chosen.
      end_ids: those that end a text; the first of them is the forced one.

    Raises:
      UserError: a setting that does not fit the ids, or a prompt that no hypothesis follows.
    """
    _check_ids(beams, num_ids, end_ids)
    search = _initial_state(model, state, prompts, beams, slots)
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
        if not np.asarray(search.active).any():
            break

    prompt_lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    return _hypotheses(search, prompt_lengths, beams)


def _check_ids(beams: BeamConfig, num_ids: int, end_ids: Sequence[int]) -> None:
    """Raises UserError where the settings do not fit the ids."""
    bos = () if beams.forced_bos is None else (beams.forced_bos,)
    forced = {"forced_prefix": beams.forced_prefix, "forced_bos": bos}
    for name, ids in forced.items():
        for i in ids:
            if not 0 <= i < num_ids:
                raise UserError(f"{name}: id {i} is out of range: it must lie in [0, {num_ids}).")
            if i in end_ids:
                raise UserError(f"{name}: id {i} is the end of text, which nothing can follow.")
    if beams.forced_eos and not end_ids:
        raise UserError("forced_eos", True, "needs a tokenizer that has an end-of-text id.")


def _initial_state(
    model: BeamModel, state: Any, prompts: Sequence[Sequence[int]], beams: BeamConfig, slots: int
) -> BeamState:
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    assert lengths.min() >= 1
    assert lengths.max() + beams.max_tokens <= slots

    # Prompts [[5], [6, 7]] of 2 beams -> [[[5, 0, …], [5, 0, …]], [[6, 7, …], [6, 7, …]]].
    shape = (len(prompts), beams.num_beams)
    tokens = np.zeros((*shape, slots), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, :, : len(prompt)] = prompt

    # One row of the model's state per prompt -> one per beam: rows [0, 0, 1, 1].
    prompt_rows = jnp.arange(len(prompts))
    beam_rows = jnp.repeat(prompt_rows, beams.num_beams)

    # At first all beams of a prompt are the same, and only the first counts: [0, -∞].
    empty = jnp.full(shape, -jnp.inf, jnp.float32)
    scores = empty.at[:, 0].set(0.0)
    begun = BeamState(
        model=model.take(state, beam_rows),
        num_new=jnp.int32(0),
        lengths=jnp.asarray(lengths),
        tokens=jnp.asarray(tokens),
        scores=scores,
        finished_tokens=jnp.zeros(tokens.shape, jnp.int32),
        finished_scores=jnp.full(shape, -jnp.inf, jnp.float32),
        finished_num_new=jnp.zeros(shape, jnp.int32),
        active=jnp.ones(len(prompts), bool),
    )
    return lay_out(begun)


def _rules(beams: BeamConfig, slots: int, end_ids: Sequence[int]) -> BeamRules:
    bos = () if beams.forced_bos is None else (beams.forced_bos,)
    begin = (*bos, *beams.forced_prefix)

    # By new token: the id that it must be, -1 where it is free, and whether that id is unscored.
    # forced_bos 2, forced_prefix (7, 8), forced_eos -> [2, 7, 8, -1, …, -1, eos].
    forced = np.full(slots, -1, np.int32)
    forced[: len(begin)] = begin
    unscored = np.zeros(slots, bool)
    unscored[: len(bos)] = True
    if beams.forced_eos:
        forced[beams.max_tokens - 1] = end_ids[0]
        unscored[beams.max_tokens - 1] = True

    # With a penalty above 0, a running hypothesis scores best at the greatest length.
    longest_counts = beams.early_stopping == "never" and beams.length_penalty > 0
    min_scored_length = beams.max_tokens if longest_counts else 0
    return BeamRules(
        forced=jnp.asarray(forced),
        unscored=jnp.asarray(unscored),
        end_ids=jnp.asarray(end_ids or (-1,), jnp.int32),
        max_tokens=jnp.int32(beams.max_tokens),
        min_tokens=jnp.int32(beams.min_tokens),
        length_penalty=jnp.float32(beams.length_penalty),
        stop_when_full=jnp.asarray(beams.early_stopping is True),
        min_scored_length=jnp.int32(min_scored_length),
    )


def _hypotheses(
    search: BeamState, prompt_lengths: Int[np.ndarray, "B"], beams: BeamConfig
) -> list[list[Hypothesis]]:
    """Returns the finished hypotheses; fewer than `num_return` only where the rules leave no
    more.
    """
    tokens = np.asarray(search.finished_tokens)
    scores = np.asarray(search.finished_scores)
    num_new = np.asarray(search.finished_num_new)

    found = []
    for row, start in enumerate(prompt_lengths):
        best = []
        for i in range(beams.num_return):
            if scores[row, i] > -np.inf:
                end = start + num_new[row, i]
                ids = tuple(tokens[row, i, start:end].tolist())
                best.append(Hypothesis(ids, float(scores[row, i])))
        found.append(best)

    if not all(found):
        raise UserError(
            "no_repeat_ngram",
            beams.no_repeat_ngram,
            f"with min_tokens = {beams.min_tokens} leaves prompt {found.index([])} no "
            f"continuation of max_tokens = {beams.max_tokens}.",
        )
    return found
