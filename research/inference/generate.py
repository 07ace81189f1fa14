"""Prompts in, text out: one prefill, then one compiled decode step per token."""

import dataclasses
import functools
import numbers
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from research.core.errors import UserError
from research.core.progress import track
from research.core.random import SEEDS, keys_of
from research.data.tokenizers import Tokenizer
from research.inference.prefill import next_logits, prefill
from research.inference.prompts import Prompt, Prompts, encode, page_table_for, prompt_ids
from research.inference.sampling import SamplingConfig, SamplingParams, draw
from research.inference.text import Completion, Detokenizer
from research.models.cache import Cache
from research.models.language_model import LanguageModelConfig
from research.models.paged_cache import PageTable
from research.parallel.rules import constrain


@flax.struct.dataclass
class DecodeState:
    """What one decode step hands to the next.

    Attributes:
      cache: keys and values so far.
      token: the newest token of each sequence, not in the cache yet.
      position: of that token.
      keys: the random key of each sequence.
      sampling: how the tokens of each sequence are drawn.
      seen: which ids each sequence has, prompt included.
    """

    cache: Cache
    token: Int[Array, "B"]
    position: Int[Array, "B"]
    keys: Key[Array, "B"]
    sampling: SamplingParams
    seen: Bool[Array, "B V"]


@functools.partial(jax.jit, static_argnames=("config", "slots", "num_ids"))
def prefill_step(
    params: Any,
    prompts: Prompts,
    keys: Key[Array, "B"],
    sampling: SamplingParams,
    *,
    config: LanguageModelConfig,
    slots: int,
    num_ids: int | None = None,
    page_table: PageTable | None = None,
) -> DecodeState:
    """Runs the prefill and draws the first new token of each prompt.

    Args:
      params: of the model.
      prompts: in rows.
      keys: one per sequence.
      sampling: how the tokens of each sequence are drawn.
      config: the model.
      slots: tokens that the cache can hold.
      num_ids: ids that may be drawn, where the tokenizer has fewer than the model; None is all.
      page_table: makes it a paged cache.
    """
    logits, cache = prefill(params, prompts, config=config, slots=slots, page_table=page_table)

    # Ids [B, T] -> [B, V]: which ids each prompt has, padding left out.
    batch, width = prompts.tokens.shape
    index = jnp.arange(width)
    is_real = index[None, :] < prompts.lengths[:, None]
    row = jnp.arange(batch)
    row = row[:, None]
    none_seen = jnp.zeros((batch, config.vocab_size), bool)
    seen = none_seen.at[row, prompts.tokens].max(is_real)

    # The draw replaces the token and moves to the position behind the prompt.
    any_token = prompts.tokens[:, 0]
    last = prompts.lengths - 1
    state = DecodeState(cache, any_token, last, keys, sampling, seen)
    logits = logits[:, :num_ids]
    return _draw_next(state, logits, cache)


@functools.partial(jax.jit, static_argnames=("config", "num_ids"), donate_argnames=("state",))
def decode_step(
    params: Any, state: DecodeState, *, config: LanguageModelConfig, num_ids: int | None = None
) -> DecodeState:
    """Feeds the newest token of each sequence and draws the next one, below `num_ids`."""
    # [B] -> [B, T] with T = 1, whose only token has index 0.
    tokens = state.token[:, None]
    positions = state.position[:, None]
    index = jnp.zeros_like(state.position)
    logits, cache = next_logits(config, params, tokens, positions, state.cache, index)
    logits = logits[:, :num_ids]
    return _draw_next(state, logits, cache)


def _draw_next(state: DecodeState, logits: Float[Array, "B V"], cache: Cache) -> DecodeState:
    position = state.position + 1
    num_ids = logits.shape[1]
    seen_ids = state.seen[:, :num_ids]
    token = draw(logits, seen_ids, state.keys, position, state.sampling)

    # Row i has now seen token i. A scatter would make the devices of a mesh exchange indices.
    is_new = jax.nn.one_hot(token, state.seen.shape[1], dtype=bool)
    seen = state.seen | is_new
    state = state.replace(cache=cache, token=token, position=position, seen=seen)
    return _lay_out_rows(state)


def _lay_out_rows(state: DecodeState) -> DecodeState:
    """Returns the state with its arrays by row where the rows are: the next step takes it as this
    one gives it.
    """

    def by_row(leaf: Array) -> Array:
        names = ("batch", *[None] * (leaf.ndim - 1))
        return constrain(leaf, names)

    return state.replace(
        token=by_row(state.token),
        position=by_row(state.position),
        keys=by_row(state.keys),
        sampling=jax.tree.map(by_row, state.sampling),
        seen=by_row(state.seen),
    )


def generate(
    config: LanguageModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig | Sequence[SamplingConfig],
    seeds: Sequence[Any] | None = None,
    *,
    cache: str = "dense",
) -> list[Completion]:
    """Continues each prompt; a prompt's text depends on its own seed and settings, not on the
    others in the batch.

    Args:
      config: the model.
      params: its parameters.
      tokenizer: the one it was trained with.
      prompts: texts, or ids that are used unchanged.
      sampling: how tokens are drawn: for all prompts, or one per prompt. Other values need no new
          compilation.
      seeds: one per prompt, in [0, 2⁶⁴); None takes the seed of each prompt's own `sampling`, and
        where that is one for all, `sampling.seed + i` for prompt i.
      cache: `dense` keeps a row of slots for each prompt, `paged` the pages that it needs, with the
          same result.

    Raises:
      UserError: a prompt and its new tokens do not fit the model's positions, no prompts, another
        number of seeds or settings than of prompts, or a cache that the model does not have.
    """
    settings = _per_prompt(sampling, len(prompts))
    new_tokens = [each.max_tokens for each in settings]
    prompt_rows, slots = encode(config, tokenizer, prompts, new_tokens)
    seeds = _checked_seeds(seeds, settings)
    keys = keys_of(seeds)

    page_table = page_table_for(cache, prompt_rows, new_tokens, slots)
    num_ids = min(tokenizer.vocab_size, config.vocab_size)
    state = prefill_step(
        params,
        prompt_rows,
        keys,
        SamplingParams.of(settings),
        config=config,
        slots=slots,
        num_ids=num_ids,
        page_table=page_table,
    )

    ids = prompt_ids(config, prompt_rows)
    texts = _detokenizers(tokenizer, ids, settings)

    # All sequences decode until the last one has ended; the tokens after an end are not used.
    for _ in track(range(max(new_tokens)), "sample", unit="tokens"):
        tokens = np.asarray(state.token).tolist()
        for text, token in zip(texts, tokens, strict=True):
            text.push(token)
        if all(text.finished for text in texts):
            break
        state = decode_step(params, state, config=config, num_ids=num_ids)
    return [text.completion() for text in texts]


def _detokenizers(
    tokenizer: Tokenizer, prompts: Sequence[list[int]], settings: Sequence[SamplingConfig]
) -> list[Detokenizer]:
    """Returns a detokenizer for each prompt, which ends at that prompt's own stop strings."""
    texts = []
    for ids, each in zip(prompts, settings, strict=True):
        text = Detokenizer(tokenizer, ids, stop=each.stop, max_tokens=each.max_tokens)
        texts.append(text)
    return texts


def _per_prompt(
    sampling: SamplingConfig | Sequence[SamplingConfig], count: int
) -> list[SamplingConfig]:
    """Returns the settings of each prompt; one for all gives prompt i the seed `seed + i`."""
    if isinstance(sampling, SamplingConfig):
        seeds = [(sampling.seed + i) % SEEDS for i in range(count)]
        return [dataclasses.replace(sampling, seed=seed) for seed in seeds]
    if len(sampling) != count:
        raise UserError(
            "sampling",
            constraint=f": {len(sampling)} settings for {count} prompts; give one per prompt, or "
            "one for all.",
        )
    return list(sampling)


def _checked_seeds(seeds: Sequence[Any] | None, settings: Sequence[SamplingConfig]) -> list[int]:
    """Returns the seeds, where none are given those of the settings; raises UserError where they
    are not one per prompt, or no 64-bit numbers.
    """
    if seeds is None:
        seeds = [each.seed for each in settings]
    count = len(settings)
    if len(seeds) != count:
        raise UserError(
            "seeds", constraint=f": {len(seeds)} of them for {count} prompts; give one per prompt."
        )
    for seed in seeds:
        # A bool is an int to Python.
        is_whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
        if not is_whole or not 0 <= seed < SEEDS:
            raise UserError(
                "seeds", constraint=f": {seed!r} must be a whole number in [0, {SEEDS})."
            )
    return [int(seed) for seed in seeds]
