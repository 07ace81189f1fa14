"""Guesses by the first layers of the model itself, with its last norm and output projection.

Source: Zhang et al. 2024, "Draft & Verify", arXiv:2309.08168; Elhoushi et al. 2024 (LayerSkip),
    arXiv:2404.16710.
"""

import dataclasses
from typing import Any, ClassVar

from jaxtyping import Array, Float, Int

from research.inference.prefill import logits_of, read_tokens
from research.inference.speculation.drafter import Layers, Pages, Tokens
from research.models.cache import Cache
from research.models.config import ModelConfig
from research.models.paged_cache import PageTable


@dataclasses.dataclass(frozen=True)
class FirstLayers:
    """The first layers of a model, which are not stacked.

    Attributes:
      config: of the model.
      num_layers: that guess.
    """

    config: ModelConfig
    num_layers: int
    has_layers: ClassVar[bool] = False

    def _shallow(self) -> ModelConfig:
        first = self.config.first_layers[: self.num_layers]
        return dataclasses.replace(self.config, num_layers=self.num_layers, first_layers=first)

    def empty_layers(self, draft_params: Any, table: PageTable) -> Layers:
        """As of `Drafter`: the model's own pages have what these layers keep."""
        return ()

    def fill(
        self,
        params: Any,
        draft_params: Any,
        pages: Pages,
        tokens: Tokens,
        following: Int[Array, "B"],
    ) -> Layers:
        """As of `Drafter`."""
        return ()

    def step(
        self, params: Any, draft_params: Any, pages: Pages, tokens: Tokens
    ) -> tuple[Float[Array, "B V"], Float[Array, "B D"], Pages]:
        """As of `Drafter`."""
        config = self._shallow()
        count = self.num_layers
        inputs = {
            "tokens": tokens.ids[:, None],
            "positions": tokens.positions[:, None],
            "lengths": tokens.limits[:, None],
        }
        cache = Cache(pages.target[:count], page_table=pages.table)
        output = read_tokens(config, params, inputs, cache)
        layers = (*output.cache.layers, *pages.target[count:])
        logits = logits_of(config, params, output.hidden[:, 0])
        return logits, tokens.hidden, pages._replace(target=layers)
