"""Engines of a loaded model."""

from typing import Any

from jax.sharding import Mesh

from research.core.errors import UserError
from research.data.tokenizers import Tokenizer
from research.inference.engine import Engine
from research.inference.serve_config import ServeConfig, bind_serve
from research.models.config import ModelConfig


class EngineMethods:
    """The methods of `LoadedModel` that make engines."""

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    mesh: Mesh | None
    params_digest: bytes | None

    def engine(
        self,
        slots: int = 16,
        memory: float = 0.8,
        draft: "EngineMethods | None" = None,
        **fields: Any,
    ) -> Engine:
        """Returns an engine, whose programs are compiled now.

        Args:
          slots: sequences that run at a time, at most.
          memory: the share of what a device has beside the parameters that it may take; its cache
            has as many tokens as fit, and `tokens=` says it otherwise.
          draft: a smaller model with the same tokenizer that guesses with `speculate="draft"`.
          fields: the others of `ServeConfig`.

        Raises:
          UserError: a field that is not known or out of range, a model that makes no text, memory
            too small, or a draft model that does not fit.
        """
        serve = bind_serve({"slots": slots, "memory": memory, **fields})
        return self.engine_for(serve, draft)

    def engine_for(self, serve: ServeConfig, draft: "EngineMethods | None" = None) -> Engine:
        """Returns an engine that runs as `serve` says.

        Args, Raises: as of `engine`.
        """
        model = (self.config, self.params, self.tokenizer)
        smaller = self._smaller(draft, serve.speculate)
        return Engine(*model, serve, self.mesh, smaller, self.params_digest)

    def _smaller(
        self, draft: "EngineMethods | None", speculate: str
    ) -> tuple[ModelConfig, Any] | None:
        """Returns config and parameters of a draft model, which must have the same tokenizer."""
        if draft is None:
            return None
        if speculate != "draft":
            rule = f"guesses with speculate = 'draft' alone, not {speculate!r}."
            raise UserError("draft", constraint=rule)
        if _spelling(draft.tokenizer) != _spelling(self.tokenizer):
            raise UserError("draft", constraint=": its tokenizer must be that of the model.")
        return draft.config, draft.params


def _spelling(tokenizer: Tokenizer) -> tuple[Any, ...]:
    """Returns what decides which ids a text has."""
    return tokenizer.kind, tokenizer.vocab_size, tokenizer.files()
