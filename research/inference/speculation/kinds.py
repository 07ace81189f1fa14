"""The kinds of guesses by name."""

from typing import Any

from research.core.errors import UserError
from research.inference.serve_config import ServeConfig
from research.inference.speculation.draft_model import DraftModel
from research.inference.speculation.drafter import Drafter
from research.inference.speculation.first_layers import FirstLayers
from research.inference.speculation.mtp import MultiTokenPrediction
from research.models.config import ModelConfig
from research.models.language_model import LanguageModelConfig


def drafter_of(
    serve: ServeConfig,
    config: LanguageModelConfig,
    params: Any,
    draft: tuple[ModelConfig, Any] | None,
) -> Drafter | None:
    """Returns what guesses on the device; None where nothing does.

    Args:
      serve: says which kind.
      config: of the model that answers.
      params: its parameters.
      draft: config and parameters of a smaller model, or None.

    Raises:
      UserError: a kind that the model does not have.
    """
    kind = serve.speculate
    if kind in ("none", "lookup"):
        return None
    if config.structure != "decoder":
        rule = f"needs a decoder, not model.structure = {config.structure!r}; use 'lookup'."
        raise UserError("speculate", kind, rule)
    if kind == "mtp":
        if not config.head.mtp_depth:
            raise UserError("speculate", kind, "needs a model with head.mtp_depth above 0.")
        return MultiTokenPrediction(config)
    if kind == "first_layers":
        return _first_layers(serve, config, params)
    if draft is None:
        raise UserError("draft", constraint="is missing: speculate = 'draft' needs a model.")
    draft_config, _ = draft
    if draft_config.structure != "decoder":
        raise UserError("draft", constraint=": it must be a decoder.")
    if draft_config.vocab_size != config.vocab_size:
        raise UserError(
            "draft",
            constraint=f": its vocab_size = {draft_config.vocab_size} must be that of the model, "
            f"{config.vocab_size}: both have one tokenizer.",
        )
    if draft_config.max_length < config.max_length:
        raise UserError(
            "draft",
            constraint=f": its max_length = {draft_config.max_length} must be at least that of the "
            f"model, {config.max_length}.",
        )
    return DraftModel(draft_config)


def _first_layers(serve: ServeConfig, config: ModelConfig, params: Any) -> FirstLayers:
    count = serve.draft_layers
    if not 1 <= count < config.num_layers:
        rule = f"must lie in [1, {config.num_layers - 1}]: the model has {config.num_layers}."
        raise UserError("draft_layers", count, rule)
    if "layers" in params:
        raise UserError(
            "speculate",
            "first_layers",
            "needs layers that are not stacked: load the model with unroll = True.",
        )
    return FirstLayers(config, count)
