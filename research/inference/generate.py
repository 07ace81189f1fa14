"""Prompts in, text out: one prefill, then one compiled decode step a token."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from research.core.errors import UserError
from research.core.progress import track
from research.data.tokenizers import StreamDecoder, Tokenizer
from research.inference.prompts import Prompts, encode, next_logits, read_prompts
from research.inference.sampling import SamplingConfig, draw
from research.models.cache import Cache
from research.models.config import ModelConfig


@flax.struct.dataclass
class DecodeState:
    """What one decode step hands to the next.

    Attributes:
      cache: keys and values so far.
      token: the newest token of each sequence, not in the cache yet.
      position: of that token.
      keys: the random key of each sequence.
      seen: which tokens stand in each sequence.
    """

    cache: Cache
    token: Int[Array, "B"]
    position: Int[Array, "B"]
    keys: Key[Array, "B"]
    seen: Bool[Array, "B V"]


@dataclasses.dataclass(frozen=True)
class Generated:
    """One continuation.

    Attributes:
      text: without prompt and stop string.
      tokens: the new ids, an end-of-text id included.
      finish: `stop` for an end-of-text id or a stop string, `length` for `max_tokens`.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str


@functools.partial(jax.jit, static_argnames=("config", "sampling", "slots", "num_ids"))
def prefill(
    params: Any,
    prompts: Prompts,
    keys: Key[Array, "B"],
    *,
    config: ModelConfig,
    sampling: SamplingConfig,
    slots: int,
    num_ids: int | None = None,
) -> DecodeState:
    """Reads the prompts and draws the first new token of each.

    Args:
      params: of the model.
      prompts: in rows.
      keys: one a sequence.
      config: the model.
      sampling: how tokens are drawn.
      slots: tokens that the cache can hold.
      num_ids: ids that may be drawn, where the tokenizer has fewer than the model; None is all.
    """
    logits, cache = read_prompts(params, prompts, config=config, slots=slots)
    batch, width = prompts.tokens.shape
    real = jnp.arange(width) < prompts.lengths[:, None]
    rows = jnp.arange(batch)[:, None]
    seen = jnp.zeros((batch, config.vocab_size), bool).at[rows, prompts.tokens].max(real)
    state = DecodeState(cache, prompts.tokens[:, 0], prompts.lengths - 1, keys, seen)
    return _advance(state, logits[:, :num_ids], cache, sampling)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "num_ids"), donate_argnames=("state",))
def decode_step(
    params: Any, state: DecodeState, *, config: ModelConfig, sampling: SamplingConfig, num_ids: int | None = None
) -> DecodeState:
    """Feeds the newest token of each sequence and draws the next one, below `num_ids`."""
    zero = jnp.zeros_like(state.position)
    logits, cache = next_logits(config, params, state.token[:, None], state.position[:, None], state.cache, zero)
    return _advance(state, logits[:, :num_ids], cache, sampling)


def _advance(state: DecodeState, logits: Float[Array, "B V"], cache: Cache, sampling: SamplingConfig) -> DecodeState:
    position = state.position + 1
    token = draw(logits, state.seen[:, : logits.shape[1]], state.keys, position, sampling)
    seen = state.seen.at[jnp.arange(token.shape[0]), token].set(True)
    return state.replace(cache=cache, token=token, position=position, seen=seen)


def generate(
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: SamplingConfig,
    seeds: Sequence[int] | None = None,
) -> list[Generated]:
    """Continues each prompt; a prompt's text depends on its own seed and not on the others in the batch.

    Args:
      config: the model.
      params: its parameters.
      tokenizer: the one it was trained with.
      prompts: any number, of any lengths.
      sampling: how tokens are drawn.
      seeds: one a prompt; None gives prompt i the seed `sampling.seed + i`.

    Raises:
      UserError: a prompt and its new tokens do not fit the model's positions, no prompts, or not as many seeds.
    """
    read, slots = encode(config, tokenizer, prompts, sampling.max_tokens)
    seeds = range(sampling.seed, sampling.seed + len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise UserError(f"seeds: {len(seeds)} of them for {len(prompts)} prompts; give one a prompt.")
    keys = jax.vmap(jax.random.key)(jnp.asarray(list(seeds), jnp.int32))
    # Stop strings and the seed are the host's business: they must not compile anything anew.
    drawn = dataclasses.replace(sampling, stop=(), seed=0, max_tokens=1)
    num_ids = min(tokenizer.vocab_size, config.vocab_size)
    state = prefill(params, read, keys, config=config, sampling=drawn, slots=slots, num_ids=num_ids)
    readers = [Reader(tokenizer, ids, sampling.stop) for ids in text_before(config, read)]
    for count in track(range(sampling.max_tokens), "sample", unit="tokens"):
        for reader, token in zip(readers, np.asarray(state.token).tolist(), strict=True):
            reader.take(token)
        if all(reader.finished for reader in readers) or count + 1 == sampling.max_tokens:
            break
        state = decode_step(params, state, config=config, sampling=drawn, num_ids=num_ids)
    return [reader.result() for reader in readers]


def text_before(config: ModelConfig, prompts: Prompts) -> list[list[int]]:
    """Returns the ids that stand before the new ones in each text; a decoder's start id is no text."""
    return [[] if config.structure == "encoder_decoder" else row for row in prompts.rows()]


class Reader:
    """Collects one sequence's tokens and text until an end-of-text id or a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]):
        self._eos_id, self._stop = tokenizer.eos_id, stop
        # The prompt goes first: some tokenizers write the first id of a text differently.
        self._stream = StreamDecoder(tokenizer)
        for token in prompt:
            self._stream.push(token)
        self._tokens: list[int] = []
        self._text = ""
        self.finished = False

    def take(self, token: int) -> None:
        """Adds a token, unless the text has ended."""
        if self.finished:
            return
        self._tokens.append(token)
        self._text += self._stream.push(token)
        self.finished = token == self._eos_id or self._cut()

    def _cut(self) -> bool:
        """Cuts the text at the first stop string; returns whether there is one."""
        ends = [self._text.index(stop) for stop in self._stop if stop in self._text]
        if ends:
            self._text = self._text[: min(ends)]
        return bool(ends)

    def result(self) -> Generated:
        """Returns what was collected."""
        if not self.finished or self._tokens[-1] == self._eos_id:
            self._text += self._stream.flush()
            self.finished = self._cut() or self.finished
        return Generated(self._text, tuple(self._tokens), "stop" if self.finished else "length")
