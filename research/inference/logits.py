"""Logits of whole sequences, for those who use a model from Python."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from research.core.errors import UserError
from research.models.config import ModelConfig
from research.models.language_model import language_model
from research.models.transformer import compute_logits


def model_inputs(
    config: ModelConfig,
    tokens: ArrayLike,
    segments: ArrayLike | None,
    encoder_tokens: ArrayLike | None,
    encoder_segments: ArrayLike | None,
    *,
    types: ArrayLike | None,
    prefix: ArrayLike | None,
) -> dict[str, Int[Array, "B _"]]:
    """Returns the checked inputs of a model for whole sequences.

    Raises:
      UserError: as of `token_inputs` and `per_token`, or an input that the model does not read, or
          that is missing.
    """
    # What the model reads, then its values.
    _check_given(config, types, prefix, encoder_tokens)
    inputs = token_inputs(config, "tokens", tokens, segments)
    if types is not None:
        num_types = config.embedding.num_types
        inputs["types"] = per_token("types", types, inputs["tokens"], num_types)
    if prefix is not None:
        inputs["prefix"] = per_token("prefix", prefix, inputs["tokens"], 2)
    if encoder_tokens is None:
        return inputs

    # An encoder-decoder: both sides have the same rows, and packed ones the same documents.
    encoder = token_inputs(config, "encoder_tokens", encoder_tokens, encoder_segments)
    encoder_rows = len(encoder["tokens"])
    rows = len(inputs["tokens"])
    if encoder_rows != rows:
        raise UserError(
            "encoder_tokens",
            constraint=f": {encoder_rows} rows must be {rows}, one per row of tokens.",
        )
    if segments is not None and encoder_segments is None:
        raise UserError(
            "encoder_segments",
            constraint="is missing: segments alone do not say which of its tokens each may attend "
            "to.",
        )
    return inputs | {f"encoder_{name}": array for name, array in encoder.items()}


def _check_given(
    config: ModelConfig,
    types: ArrayLike | None,
    prefix: ArrayLike | None,
    encoder_tokens: ArrayLike | None,
) -> None:
    """Raises UserError where an input is given that the model does not read, or one is missing."""
    structure = config.structure
    if prefix is not None and structure != "prefix":
        raise UserError("prefix", constraint=f"is given for model.structure = {structure!r}.")
    if types is not None and not config.embedding.num_types:
        raise UserError("types", constraint="are given for model.embedding.num_types = 0.")
    is_missing = encoder_tokens is None
    is_needed = structure == "encoder_decoder"
    if is_missing == is_needed:
        need = "is missing" if is_missing else "is given"
        raise UserError(f"encoder_tokens {need} for model.structure = {structure!r}.")


def token_inputs(
    config: ModelConfig, name: str, tokens: ArrayLike, segments: ArrayLike | None
) -> dict[str, Int[Array, "B T"]]:
    """Returns tokens and their positions, and segments where they are given.

    Args:
      config: of the model that is to read them.
      name: of the tokens, for messages.
      tokens: rows of ids.
      segments: of packed rows, 0 for padding; positions start anew in each. None: a row is one
          sequence.

    Raises:
      UserError: not rows of ids, an id out of range, rows longer than the model's positions, or
        segments that are not one per token.
    """
    ids = _whole_numbers(name, tokens)
    if ids.ndim != 2 or not ids.size:
        raise UserError(f"{name}: shape {ids.shape} must be [rows, ids]: one row is [[1, 2, 3]].")
    _check_range(name, ids, config.vocab_size)
    if ids.shape[1] > config.max_length:
        raise UserError(
            f"{name}: {ids.shape[1]} is longer than model.max_length = {config.max_length}."
        )

    rows = jnp.asarray(ids, jnp.int32)
    index = jnp.arange(rows.shape[1], dtype=jnp.int32)
    index = jnp.broadcast_to(index, rows.shape)
    if segments is None:
        return {"tokens": rows, "positions": index}

    # Segments [1, 1, 2, 2, 2] start at [0, 2]: positions [0, 1, 0, 1, 2].
    segments_name = name.replace("tokens", "segments")
    numbers = per_token(segments_name, segments, rows, 2**31)
    first_change = jnp.ones_like(numbers[:, :1])
    later_changes = jnp.diff(numbers, axis=1)
    changes = jnp.concatenate([first_change, later_changes], axis=1)
    is_start = changes != 0
    # is_start [1, 0, 1, 0, 0] -> starts [0, 0, 2, 0, 0] -> start of each token [0, 0, 2, 2, 2]
    starts = jnp.where(is_start, index, 0)
    start = jax.lax.cummax(starts, axis=1)
    positions = index - start
    return {"tokens": rows, "positions": positions, "segments": numbers}


def per_token(
    name: str, values: ArrayLike, tokens: Int[Array, "B T"], limit: int
) -> Int[Array, "B T"]:
    """Returns whole numbers, one for each token.

    Raises:
      UserError: they are not one per token, or out of [0, limit).
    """
    numbers = _whole_numbers(name, values)
    if numbers.shape != tokens.shape:
        raise UserError(
            f"{name}: shape {numbers.shape} must be {tokens.shape}, that of the tokens."
        )
    _check_range(name, numbers, limit)
    return jnp.asarray(numbers, jnp.int32)


def _whole_numbers(name: str, values: ArrayLike) -> Int[np.ndarray, "..."]:
    try:
        array = np.asarray(values)
    except ValueError as error:
        # NumPy makes no array of rows that differ in length.
        raise UserError(
            f"{name}: rows must be equally long; fill them up and give segments."
        ) from error
    if array.size and array.dtype.kind not in "iu":
        raise UserError(f"{name}: must be whole numbers, not {array.dtype.name}.")
    return array.astype(np.int64)


def _check_range(name: str, numbers: Int[np.ndarray, "B T"], limit: int) -> None:
    low = numbers.min()
    high = numbers.max()
    bad = low if low < 0 else high
    if not 0 <= bad < limit:
        raise UserError(f"{name}: id {bad} is out of range: it must lie in [0, {limit}).")


@functools.partial(jax.jit, static_argnums=0)
def logits(config: ModelConfig, params: Any, inputs: dict[str, Array]) -> Float[Array, "B T V"]:
    """Returns float32 logits.

    Args:
      config: the model.
      params: its parameters.
      inputs: from `model_inputs`.
    """
    model = language_model(config)
    hidden = model.hidden(params, inputs).hidden
    return compute_logits(model.projection(params, hidden))
