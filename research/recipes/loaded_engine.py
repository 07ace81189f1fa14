"""The engine of a loaded model."""

from typing import Any

from jax.sharding import Mesh

from research.data.tokenizers import Tokenizer
from research.inference.engine import Engine
from research.inference.serve_config import ServeConfig, bind_serve
from research.models.config import ModelConfig


class EngineMethods:
    """The method of `LoadedModel` that makes an engine."""

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    mesh: Mesh | None

    def engine(self, slots: int = 16, memory: float = 0.8, **fields: Any) -> Engine:
        """Returns an engine, whose programs are compiled now.

        Args:
          slots: sequences that run at a time, at most.
          memory: the share of what a device has beside the parameters that it may take; its cache
            has as many tokens as fit, and `tokens=` says it otherwise.
          fields: the others of `ServeConfig`.

        Raises:
          UserError: a field that is not known or out of range, a model that makes no text, or
            memory too small.
        """
        return self.engine_for(bind_serve({"slots": slots, "memory": memory, **fields}))

    def engine_for(self, serve: ServeConfig) -> Engine:
        """Returns an engine that runs as `serve` says.

        Raises:
          UserError: as of `engine`.
        """
        return Engine(self.config, self.params, self.tokenizer, serve, self.mesh)
