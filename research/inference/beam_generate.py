"""Text from beam search over a decoder, with or without an encoder."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.core.errors import UserError
from research.data.tokenizers import Tokenizer
from research.inference.beam_config import BeamConfig
from research.inference.beam_search import Hypothesis, beam_search
from research.inference.prefill import next_logits, prefill
from research.inference.prompts import Prompt, encode, page_table_for, prompt_ids
from research.inference.text import Completion, Detokenizer
from research.models.cache import Cache
from research.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Beam(Completion):
    """A completion found by beam search.

    Attributes:
      score: Σ log p of its tokens / number of tokens^length_penalty.
    """

    score: float


@dataclasses.dataclass(frozen=True)
class CachedBeamModel:
    """A transformer as a `BeamModel`; its state is the cache."""

    config: ModelConfig

    def step(
        self, params: Any, state: Cache, tokens: Int[Array, " rows"], positions: Int[Array, " rows"]
    ) -> tuple[Float[Array, "rows V"], Cache]:
        """Returns the logits after one more token per row, and the cache with it."""
        # [rows] -> [rows, T] with T = 1, whose only token has index 0.
        index = jnp.zeros_like(tokens)
        tokens = tokens[:, None]
        positions = positions[:, None]
        return next_logits(self.config, params, tokens, positions, state, index)

    def take(self, state: Cache, rows: Int[Array, " rows"]) -> Cache:
        """Returns the cache of `rows`."""
        return state.take(rows)

    def reorder(self, state: Cache, rows: Int[Array, "B beams"]) -> Cache:
        """Returns the cache of `rows`; the keys and values of their encoder are not copied."""
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
      prompts: texts, or ids that are used unchanged.
      beams: settings of the search.
      cache: `dense` or `paged`, with the same result.

    Raises:
      UserError: no prompts, one that does not fit the model's positions, settings that do not fit
        its ids, or a cache that the model does not have.
    """
    num_ids = min(tokenizer.vocab_size, config.vocab_size)
    if beams.num_beams > num_ids:
        raise UserError(
            "num_beams", beams.num_beams, f"must be at most {num_ids}, the ids of the vocabulary."
        )
    prompt_rows, slots = encode(config, tokenizer, prompts, [beams.max_tokens] * len(prompts))

    # Until the search begins there are only the prompts: it gives each beam pages for new tokens.
    page_table = page_table_for(cache, prompt_rows, [0] * len(prompts), slots)
    _, filled = prefill(params, prompt_rows, config=config, slots=slots, page_table=page_table)
    found = beam_search(
        CachedBeamModel(config),
        params,
        filled,
        prompt_rows.rows(),
        beams,
        slots=slots,
        num_ids=num_ids,
        end_ids=[i for i in tokenizer.end_ids if i < num_ids],
    )

    # Ids to text, as of a sampled completion.
    results = []
    for ids, hypotheses in zip(prompt_ids(config, prompt_rows), found, strict=True):
        results.append([_beam(tokenizer, ids, best, beams.max_tokens) for best in hypotheses])
    return results


def _beam(tokenizer: Tokenizer, prompt: Sequence[int], found: Hypothesis, max_tokens: int) -> Beam:
    text = Detokenizer(tokenizer, prompt, stop=(), max_tokens=max_tokens)
    for token in found.tokens:
        text.push(token)
    completion = text.completion()
    return Beam(
        completion.text,
        completion.tokens,
        completion.finish,
        found.score,
        stop_match=completion.stop_match,
    )
