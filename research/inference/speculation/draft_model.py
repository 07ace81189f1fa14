"""Guesses by a smaller model of the same tokenizer.

Source: Leviathan et al. 2023, arXiv:2211.17192, and Chen et al. 2023, arXiv:2302.01318, whose
    guesses are kept by chance; here by the noise that both models draw with.
"""

import dataclasses
from typing import Any, ClassVar

from jaxtyping import Array, Float, Int

from research.inference.prefill import logits_of, read_tokens
from research.inference.speculation.drafter import Layers, Pages, Tokens
from research.models.cache import Cache
from research.models.config import ModelConfig
from research.models.language_model import language_model
from research.models.paged_cache import PageTable


@dataclasses.dataclass(frozen=True)
class DraftModel:
    """Another model.

    Attributes:
      config: of it.
    """

    config: ModelConfig
    has_layers: ClassVar[bool] = True

    def empty_layers(self, draft_params: Any, table: PageTable) -> Layers:
        """As of `Drafter`."""
        model = language_model(self.config)
        slots = table.ids.shape[0]
        return model.empty_cache(draft_params, slots, table.slots, page_table=table).layers

    def fill(
        self,
        params: Any,
        draft_params: Any,
        pages: Pages,
        tokens: Tokens,
        following: Int[Array, "B"],
    ) -> Layers:
        """As of `Drafter`."""
        return self._read(draft_params, pages, tokens).cache.layers

    def step(
        self, params: Any, draft_params: Any, pages: Pages, tokens: Tokens
    ) -> tuple[Float[Array, "B V"], Float[Array, "B D"], Pages]:
        """As of `Drafter`."""
        output = self._read(draft_params, pages, tokens)
        logits = logits_of(self.config, draft_params, output.hidden[:, 0])
        return logits, tokens.hidden, pages._replace(own=output.cache.layers)

    def _read(self, draft_params: Any, pages: Pages, tokens: Tokens) -> Any:
        inputs = {
            "tokens": tokens.ids[:, None],
            "positions": tokens.positions[:, None],
            "lengths": tokens.limits[:, None],
        }
        cache = Cache(pages.own, page_table=pages.table)
        return read_tokens(self.config, draft_params, inputs, cache)
