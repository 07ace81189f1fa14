"""Prompts in, text out: one prefill, then one compiled decode step a token."""

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
from research.data.tokenizers import StreamDecoder, Tokenizer
from research.inference.prompts import Prompt, Prompts, encode, next_logits, prefill, table_for
from research.inference.sampling import SamplingConfig, SamplingParams, draw
from research.models.cache import Cache
from research.models.language_model import LanguageModelConfig
from research.models.paged_cache import PageTable


@flax.struct.dataclass
class DecodeState:
    """What one decode step hands to the next.

    Attributes:
      cache: keys and values so far.
      token: the newest token of each sequence, not in the cache yet.
      position: of that token.
      keys: the random key of each sequence.
      sampling: how the tokens of each sequence are drawn.
      seen: which tokens stand in each sequence.
    """

    cache: Cache
    token: Int[Array, "B"]
    position: Int[Array, "B"]
    keys: Key[Array, "B"]
    sampling: SamplingParams
    seen: Bool[Array, "B V"]


@dataclasses.dataclass(frozen=True)
class Completion:
    """One continuation.

    Attributes:
      text: without prompt and stop string.
      tokens: the new ids, an end-of-text id included.
      finish: `stop` for an end-of-text id or a stop string, `length` for `max_tokens`.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str


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
    """Reads the prompts and draws the first new token of each.

    Args:
      params: of the model.
      prompts: in rows.
      keys: one a sequence.
      sampling: how the tokens of each sequence are drawn.
      config: the model.
      slots: tokens that the cache can hold.
      num_ids: ids that may be drawn, where the tokenizer has fewer than the model; None is all.
      page_table: makes it a paged cache.
    """
    logits, cache = prefill(params, prompts, config=config, slots=slots, page_table=page_table)
    # [B, T] ids -> [B, V]: which ids stand in each prompt, padding left out.
    batch, width = prompts.tokens.shape
    real = jnp.arange(width)[None, :] < prompts.lengths[:, None]
    rows = jnp.arange(batch)[:, None]
    seen = jnp.zeros((batch, config.vocab_size), bool).at[rows, prompts.tokens].max(real)
    state = DecodeState(cache, prompts.tokens[:, 0], prompts.lengths - 1, keys, sampling, seen)
    return _advance(state, logits[:, :num_ids], cache)


@functools.partial(jax.jit, static_argnames=("config", "num_ids"), donate_argnames=("state",))
def decode_step(
    params: Any, state: DecodeState, *, config: LanguageModelConfig, num_ids: int | None = None
) -> DecodeState:
    """Feeds the newest token of each sequence and draws the next one, below `num_ids`."""
    zero = jnp.zeros_like(state.position)
    logits, cache = next_logits(
        config, params, state.token[:, None], state.position[:, None], state.cache, zero
    )
    return _advance(state, logits[:, :num_ids], cache)


def _advance(state: DecodeState, logits: Float[Array, "B V"], cache: Cache) -> DecodeState:
    position = state.position + 1
    token = draw(logits, state.seen[:, : logits.shape[1]], state.keys, position, state.sampling)
    seen = state.seen.at[jnp.arange(token.shape[0]), token].set(True)
    return state.replace(cache=cache, token=token, position=position, seen=seen)


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
      prompts: any number, of any lengths; texts, or ids that are read as they stand.
      sampling: how tokens are drawn: for all prompts, or one a prompt. Other values compile nothing
          anew.
      seeds: one a prompt, in [0, 2⁶⁴); None takes the seed of each prompt's own `sampling`, and
        where that is one for all, `sampling.seed + i` for prompt i.
      cache: `dense` keeps a row of slots for each prompt, `paged` the pages that it needs, with the
          same result.

    Raises:
      UserError: a prompt and its new tokens do not fit the model's positions, no prompts, not as
        many seeds or settings as prompts, or a cache that the model has not.
    """
    settings = _by_prompt(sampling, len(prompts))
    new_tokens = [each.max_tokens for each in settings]
    prompt_rows, slots = encode(config, tokenizer, prompts, new_tokens)
    keys = keys_of(
        [each.seed for each in settings] if seeds is None else _checked(seeds, len(prompts))
    )
    num_ids = min(tokenizer.vocab_size, config.vocab_size)
    state = prefill_step(
        params,
        prompt_rows,
        keys,
        SamplingParams.of(settings),
        config=config,
        slots=slots,
        num_ids=num_ids,
        page_table=table_for(cache, prompt_rows, new_tokens, slots),
    )

    texts = [
        Detokenizer(tokenizer, ids, stop=each.stop, max_tokens=each.max_tokens)
        for ids, each in zip(prompt_ids(config, prompt_rows), settings, strict=True)
    ]
    for _ in track(range(max(new_tokens)), "sample", unit="tokens"):
        for text, token in zip(texts, np.asarray(state.token).tolist(), strict=True):
            text.push(token)
        if all(text.finished for text in texts):
            break
        state = decode_step(params, state, config=config, num_ids=num_ids)
    return [text.completion() for text in texts]


def _by_prompt(
    sampling: SamplingConfig | Sequence[SamplingConfig], count: int
) -> list[SamplingConfig]:
    """Returns the settings of each prompt; one for all gives prompt i the seed `seed + i`."""
    if isinstance(sampling, SamplingConfig):
        return [
            dataclasses.replace(sampling, seed=(sampling.seed + i) % SEEDS) for i in range(count)
        ]
    if len(sampling) != count:
        raise UserError(
            "sampling",
            constraint=f": {len(sampling)} settings for {count} prompts; give one a prompt, or "
            "one for all.",
        )
    return list(sampling)


def _checked(seeds: Sequence[Any], count: int) -> list[int]:
    """Returns the seeds; raises UserError where they are not one a prompt, or no 64-bit numbers."""
    if len(seeds) != count:
        raise UserError(
            "seeds", constraint=f": {len(seeds)} of them for {count} prompts; give one a prompt."
        )
    for seed in seeds:
        # A bool is an int to Python.
        if (
            not isinstance(seed, numbers.Integral)
            or isinstance(seed, bool)
            or not 0 <= seed < SEEDS
        ):
            raise UserError(
                "seeds", constraint=f": {seed!r} must be a whole number in [0, {SEEDS})."
            )
    return [int(seed) for seed in seeds]


def prompt_ids(config: LanguageModelConfig, prompts: Prompts) -> list[list[int]]:
    """Returns the ids that stand before the new ones in each text; a decoder's start id is no
    text.
    """
    return [[] if config.structure == "encoder_decoder" else row for row in prompts.rows()]


class Detokenizer:
    """Turns one sequence's new tokens into text, until an end id, a stop string or the last token
    allowed.

    Args:
      tokenizer: of the model.
      prompt: ids before the new ones: some tokenizers write the first id of a text differently.
      stop: strings that end the text, which they are no part of.
      max_tokens: new tokens at most.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], *, stop: Sequence[str], max_tokens: int
    ):
        self._end_ids, self._stop, self._max_tokens = tokenizer.end_ids, stop, max_tokens
        self._stream = StreamDecoder(tokenizer)
        for token in prompt:
            self._stream.push(token)
        self._tokens: list[int] = []
        self._text = ""
        self._stopped = False

    @property
    def finished(self) -> bool:
        """Whether no more tokens are taken."""
        return self._stopped or len(self._tokens) == self._max_tokens

    def push(self, token: int) -> None:
        """Adds a token, unless the text has ended."""
        if self.finished:
            return
        self._tokens.append(token)
        if token in self._end_ids:  # however it is spelt, it is no part of the text
            self._stopped = True
            return
        self._text += self._stream.push(token)
        self._stopped = self._cut()

    def _cut(self) -> bool:
        """Cuts the text at the first stop string; returns whether there is one."""
        ends = [self._text.index(stop) for stop in self._stop if stop in self._text]
        if ends:
            self._text = self._text[: min(ends)]
        return bool(ends)

    def completion(self) -> Completion:
        """Returns what was collected."""
        if not self._stopped or self._tokens[-1] in self._end_ids:
            self._text += self._stream.flush()
            self._stopped = self._cut() or self._stopped
        return Completion(self._text, tuple(self._tokens), "stop" if self._stopped else "length")
