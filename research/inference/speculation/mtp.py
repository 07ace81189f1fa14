"""Guesses by the model's own module of multi-token prediction, which is applied again for each
further token.

Source: DeepSeek-AI 2024 (DeepSeek-V3), arXiv:2412.19437, sections 2.2 and 5.4.3.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.inference.prefill import logits_of, read_following
from research.inference.speculation.drafter import Layers, Pages, Tokens
from research.models.cache import Cache, empty_cache
from research.models.config import ModelConfig
from research.models.paged_cache import PageTable


@dataclasses.dataclass(frozen=True)
class MultiTokenPrediction:
    """The first module of a model.

    Its token at position p is p's hidden state with the token after it, so a page of its layer ends
    with a token of the next page. Who shares a page gets that of its first owner: a guess may be
    worse for it, and no answer is another.

    Attributes:
      config: of the model.
    """

    config: ModelConfig
    has_layers: ClassVar[bool] = True

    def empty_layers(self, draft_params: Any, table: PageTable) -> Layers:
        """As of `Drafter`."""
        last = self.config.layers()[-1]
        one = dataclasses.replace(self.config, num_layers=1, first_layers=(), pattern=(last,))
        slots = table.ids.shape[0]
        return empty_cache(one, slots, table.slots, stacked=False, page_table=table).layers

    def fill(
        self,
        params: Any,
        draft_params: Any,
        pages: Pages,
        tokens: Tokens,
        following: Int[Array, "B"],
    ) -> Layers:
        """As of `Drafter`. What is written where the following token is not known is written again
        by `step`.
        """
        _, layers = self._read(params, pages, tokens, jnp.maximum(following, 0))
        return layers

    def step(
        self, params: Any, draft_params: Any, pages: Pages, tokens: Tokens
    ) -> tuple[Float[Array, "B V"], Float[Array, "B D"], Pages]:
        """As of `Drafter`: the states before the tokens are at the positions before theirs."""
        before = tokens._replace(positions=tokens.positions - 1)
        hidden, layers = self._read(params, pages, before, tokens.ids)
        return logits_of(self.config, params, hidden), hidden, pages._replace(own=layers)

    def _read(
        self, params: Any, pages: Pages, tokens: Tokens, following: Int[Array, "B"]
    ) -> tuple[Float[Array, "B D"], Layers]:
        cache = Cache(pages.own, page_table=pages.table)
        inputs = (tokens.hidden[:, None], following[:, None], tokens.positions[:, None])
        hidden, cache = read_following(self.config, params, *inputs, cache)
        return hidden[:, 0], cache.layers
