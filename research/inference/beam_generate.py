"""Text from beam search: a batch of requests to an engine."""

from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from research.core.errors import UserError
from research.data.tokenizers import Tokenizer
from research.inference.answers import Beam
from research.inference.beam_config import BeamConfig
from research.inference.engine import Engine
from research.inference.generate import run_all, serve_config
from research.inference.prompts import Prompt, encode_ids
from research.inference.requests import Request
from research.models.config import ModelConfig


def beam_generate(
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    beams: BeamConfig,
    *,
    debug_nans: bool = False,
    mesh: Mesh | None = None,
) -> list[list[Beam]]:
    """Returns the best continuations of each prompt, best first; they do not depend on the other
    prompts.

    Args:
      config: the model.
      params: its parameters.
      tokenizer: the one it was trained with.
      prompts: texts, or ids that are used unchanged.
      beams: settings of the search.
      debug_nans: whether the first value that is no number is named, as of `ServeConfig`.
      mesh: that the parameters are sharded over; None is one device.

    Raises:
      UserError: no prompts, one that does not fit the model's positions, or settings that do not
        fit its ids.
    """
    rows = encode_ids(config, tokenizer, prompts)
    requests = [Request(tuple(ids), beams=beams) for ids in rows]
    serve = serve_config(config, requests, len(tokenizer.end_ids), debug_nans=debug_nans)
    answers = run_all(Engine(config, params, tokenizer, serve, mesh), requests, "beam search")
    found = []
    for index, answer in enumerate(answers):
        if answer.beams is None:
            raise UserError("prompts", constraint=f": number {index}: {answer.error}")
        found.append(answer.beams)
    return found
