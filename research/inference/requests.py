"""Requests to a model: prompts in any of their forms, and how text is generated from them."""

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.core import config as configs
from research.core.errors import UserError
from research.data.tokenizers import Tokenizer
from research.inference.beam_config import BeamConfig
from research.inference.prompts import Prompt
from research.inference.sampling import SamplingConfig


def collect_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[str] | None,
    ids: Sequence[Any] | None,
    messages: Sequence[Any] | None,
    chat: Mapping[str, Any] | None,
) -> list[Prompt]:
    """Returns the prompts of a request: texts, or rows of ids.

    Args:
      tokenizer: of the model.
      prompts: texts.
      ids: rows of ids.
      messages: a conversation, or a list of conversations.
      chat: further arguments of `Tokenizer.encode_chat`.

    Raises:
      UserError: not exactly one of the three, something else than rows of ids, or a conversation
        that the model's chat template does not take.
    """
    if sum(given is not None for given in (prompts, ids, messages)) != 1:
        raise UserError("prompts, ids and messages: exactly one of them must be given.")
    if chat is not None and messages is None:
        raise UserError(
            "chat",
            constraint=": these are arguments of the chat template, which messages alone have.",
        )

    # Texts and ids need no tokenizer here.
    if prompts is not None:
        return list(prompts)
    if ids is not None:
        return [_id_row(row) for row in ids]

    # One conversation is a list of dicts; several are a list of such lists.
    holds_message = any(isinstance(message, Mapping) for message in messages)
    several = len(messages) > 0 and not holds_message
    conversations = messages if several else [messages]
    arguments = chat or {}
    return [tokenizer.encode_chat(conversation, **arguments) for conversation in conversations]


def _id_row(row: Any) -> list[int]:
    if isinstance(row, str) or not isinstance(row, Sequence | np.ndarray):
        raise UserError(
            "ids", constraint=f": {row!r} must be a row of ids: one prompt is [[1, 2, 3]]."
        )
    if len(row) == 0:
        raise UserError("ids", constraint=": a row of no ids cannot be continued.")
    for i in row:
        # NumPy's integers are whole numbers, too; a bool is an int to Python.
        if isinstance(i, bool) or not isinstance(i, numbers.Integral):
            raise UserError("ids", constraint=f": {i!r} must be a whole number.")
    return [int(i) for i in row]


def decoding_config(fields: Mapping[str, Any]) -> SamplingConfig | BeamConfig:
    """Returns how text is generated: by beam search where `num_beams` is given and not 1, else by
    sampling.

    Raises:
      UserError: a field that is not known, out of range, or of the other way.
    """
    num_beams = 1
    if "num_beams" in fields:
        num_beams = fields["num_beams"]
    if num_beams != 1:
        fault = f"draws, and num_beams = {num_beams} searches"
        _check_fields(fields, BeamConfig, SamplingConfig, fault)
        return configs.bind(BeamConfig, fields)

    # num_beams = 1 is sampling.
    fields = {name: value for name, value in fields.items() if name != "num_beams"}
    _check_fields(fields, SamplingConfig, BeamConfig, "needs num_beams above 1")
    return configs.bind(SamplingConfig, fields)


def _check_fields(fields: Mapping[str, Any], wanted: type, other: type, fault: str) -> None:
    """Raises UserError for a field that the `other` config alone has."""
    known = {field.name for field in dataclasses.fields(wanted)}
    for field in dataclasses.fields(other):
        name = field.name
        if name in fields and name not in known:
            raise UserError(name, fields[name], f"{fault}.")
