"""Prompts in, the likeliest continuations out: beam search over a decoder."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from research.core.errors import UserError
from research.data.tokenizers import Tokenizer
from research.inference.beams import BeamConfig, Hypothesis, beam_search
from research.inference.generate import Generated, Reader, bucket, check_room, encode_prompt, next_logits
from research.models.cache import Cache, empty_cache
from research.models.config import ModelConfig
from research.models.stack import scans_layers


@dataclasses.dataclass(frozen=True)
class Beam(Generated):
    """A continuation that was searched.

    Attributes:
      score: Σ log p of its tokens / number of tokens^length_penalty.
    """

    score: float


@dataclasses.dataclass(frozen=True)
class DecoderSteps:
    """A decoder-only transformer as a `BeamModel`; its state is the cache."""

    config: ModelConfig

    def step(
        self, params: Any, state: Cache, tokens: Int[Array, "R"], positions: Int[Array, "R"]
    ) -> tuple[Float[Array, "R V"], Cache]:
        """Returns the logits after one more token a row, and the cache with it."""
        zero = jnp.zeros_like(tokens)
        return next_logits(self.config, params, tokens[:, None], positions[:, None], state, zero)

    def take(self, state: Cache, rows: Int[Array, "R"]) -> Cache:
        """Returns the cache of `rows`, which are the fourth axis from the end, after scanned layers."""
        return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=leaf.ndim - 4, mode="clip"), state)


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def read_prompts(params: Any, tokens: Int[Array, "B T"], *, config: ModelConfig, slots: int) -> Cache:
    """Returns the cache of prompts that are padded on the right. What stands there for padding is never seen."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    cache = empty_cache(config, tokens.shape[0], slots, stacked=scans_layers(config))
    return next_logits(config, params, tokens, positions, cache, jnp.zeros_like(tokens[:, 0]))[1]


def beam_generate(
    config: ModelConfig, params: Any, tokenizer: Tokenizer, prompts: Sequence[str], beams: BeamConfig
) -> list[list[Beam]]:
    """Returns the best continuations of each prompt, best first; they do not depend on the other prompts.

    Args:
      config: the model.
      params: its parameters.
      tokenizer: the one it was trained with.
      prompts: any number, of any lengths.
      beams: how they are searched.

    Raises:
      UserError: no prompts, one that does not fit the model's positions, or settings that do not fit its ids.
    """
    if not prompts:
        raise UserError("--prompt: at least one prompt is needed.")
    num_ids = min(tokenizer.vocab_size, config.vocab_size)
    if beams.num_beams > num_ids:
        raise UserError(f"num_beams = {beams.num_beams} must be at most {num_ids}, the ids of the vocabulary.")
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    longest = check_room(encoded, beams.max_tokens, config)
    padded = np.zeros((len(encoded), min(bucket(longest), config.max_length)), np.int32)
    for row, ids in enumerate(encoded):
        padded[row, : len(ids)] = ids
    slots = min(bucket(longest + beams.max_tokens), config.max_length)
    found = beam_search(
        DecoderSteps(config),
        params,
        read_prompts(params, padded, config=config, slots=slots),
        encoded,
        beams,
        slots=slots,
        num_ids=num_ids,
        eos_id=tokenizer.eos_id,
    )
    return [[_read(tokenizer, ids, one) for one in best] for ids, best in zip(encoded, found, strict=True)]


def _read(tokenizer: Tokenizer, prompt: Sequence[int], found: Hypothesis) -> Beam:
    reader = Reader(tokenizer, prompt, stop=())
    for token in found.tokens:
        reader.take(token)
    text = reader.result()
    return Beam(text.text, text.tokens, text.finish, found.score)
