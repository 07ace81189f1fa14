"""Prompts in, the likeliest continuations out: beam search over a decoder, with or without an
encoder.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.core.errors import UserError
from research.data.tokenizers import Tokenizer
from research.inference.beams import BeamConfig, Hypothesis, beam_search
from research.inference.generate import Completion, Detokenizer, prompt_ids
from research.inference.prompts import Prompt, encode, next_logits, prefill, table_for
from research.models.cache import Cache
from research.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Beam(Completion):
    """A continuation that was searched.

    Attributes:
      score: Σ log p of its tokens / number of tokens^length_penalty.
    """

    score: float


@dataclasses.dataclass(frozen=True)
class Steps:
    """A transformer as a `BeamModel`; its state is the cache."""

    config: ModelConfig

    def step(
        self, params: Any, state: Cache, tokens: Int[Array, "R"], positions: Int[Array, "R"]
    ) -> tuple[Float[Array, "R V"], Cache]:
        """Returns the logits after one more token a row, and the cache with it."""
        zero = jnp.zeros_like(tokens)
        return next_logits(self.config, params, tokens[:, None], positions[:, None], state, zero)

    def take(self, state: Cache, rows: Int[Array, "R"]) -> Cache:
        """Returns the cache of `rows`."""
        return state.take(rows)

    def reorder(self, state: Cache, rows: Int[Array, "R"]) -> Cache:
        """Returns the cache of `rows`; what their encoder has read stays where it is."""
        return state.reorder(rows)


def beam_generate(
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    beams: BeamConfig,
    *,
    cache: str = "dense",
) -> list[list[Beam]]:
    """Returns the best continuations of each prompt, best first; they do not depend on the other
    prompts.

    Args:
      config: the model.
      params: its parameters.
      tokenizer: the one it was trained with.
      prompts: any number, of any lengths; texts, or ids that are read as they stand.
      beams: how they are searched.
      cache: `dense` or `paged`, with the same result.

    Raises:
      UserError: no prompts, one that does not fit the model's positions, settings that do not fit
        its ids, or a cache that the model has not.
    """
    num_ids = min(tokenizer.vocab_size, config.vocab_size)
    if beams.num_beams > num_ids:
        raise UserError(
            "num_beams", beams.num_beams, f"must be at most {num_ids}, the ids of the vocabulary."
        )
    prompt_rows, slots = encode(config, tokenizer, prompts, [beams.max_tokens] * len(prompts))
    # Beams take pages of their own when the search begins: before, there is nothing but the
    # prompts.
    page_table = table_for(cache, prompt_rows, [0] * len(prompts), slots)
    found = beam_search(
        Steps(config),
        params,
        prefill(params, prompt_rows, config=config, slots=slots, page_table=page_table)[1],
        prompt_rows.rows(),
        beams,
        slots=slots,
        num_ids=num_ids,
        end_ids=[i for i in tokenizer.end_ids if i < num_ids],
    )
    before = prompt_ids(config, prompt_rows)
    return [
        [_beam(tokenizer, ids, one, beams.max_tokens) for one in best]
        for ids, best in zip(before, found, strict=True)
    ]


def _beam(tokenizer: Tokenizer, prompt: Sequence[int], found: Hypothesis, max_tokens: int) -> Beam:
    text = Detokenizer(tokenizer, prompt, stop=(), max_tokens=max_tokens)
    for token in found.tokens:
        text.push(token)
    completion = text.completion()
    return Beam(completion.text, completion.tokens, completion.finish, found.score)
