"""Training objectives: causal, prefix and masked language modeling, denoising, translation.

An objective makes a `data.batch.Batch` of the segments of documents. All make the required arrays
of a batch; the prefix objective adds `prefix`, and those of a model with an encoder the encoder's.
"""

import dataclasses
from typing import Any

from research.core.config import plain
from research.core.errors import UserError
from research.data import batch as batches
from research.data.objectives.base import Ids, Objective, Ranges, Segments
from research.data.objectives.config import (
    CAUSAL,
    ENCODED,
    UL2,
    InfillConfig,
    MaskedConfig,
    ObjectiveConfig,
    SpanConfig,
)
from research.data.objectives.denoising import Infill, Spans
from research.data.objectives.pairs import Translate
from research.data.objectives.single import Causal, Masked, Prefix, bytes_per_target, causal_batch
from research.data.tokenizers import Tokenizer

__all__ = [
    "CAUSAL",
    "UL2",
    "Ids",
    "InfillConfig",
    "MaskedConfig",
    "Objective",
    "ObjectiveConfig",
    "Ranges",
    "Segments",
    "SpanConfig",
    "batch_shapes",
    "build",
    "bytes_per_target",
    "causal_batch",
    "encoder_length",
    "identity",
    "special_ids",
]


def batch_shapes(
    config: ObjectiveConfig, batch_size: int, sequence_length: int
) -> dict[str, tuple[tuple[int, int], str]]:
    """Returns (shape, dtype) of every array of a batch that an objective makes."""
    names = batches.REQUIRED
    if config.kind == "prefix":
        names += ("prefix",)
    if config.kind in ENCODED:
        names += batches.ENCODER
    encoder_width = encoder_length(config, sequence_length)
    return batches.shapes(names, batch_size, sequence_length, encoder_width)


def encoder_length(config: ObjectiveConfig, sequence_length: int) -> int:
    """Returns M, the width of the encoder's rows; 0 without an encoder."""
    if config.kind not in ENCODED:
        return 0
    return sequence_length if config.encoder_length is None else config.encoder_length


def build(config: ObjectiveConfig, tokenizer: Tokenizer, sequence_length: int) -> Objective:
    """Returns the objective for rows of T tokens.

    Raises:
      UserError: the tokenizer lacks a special id that the objective needs, or a mode_id is outside
          its vocabulary.
    """
    # mode_id comes from the config, so it may be outside the tokenizer's vocabulary.
    vocab_size = tokenizer.vocab_size
    for denoiser in (config.span, *config.denoisers):
        mode_id = denoiser.mode_id
        if mode_id is not None and mode_id >= vocab_size:
            raise UserError(
                "data.objective",
                constraint=f": mode_id = {mode_id} must lie in the tokenizer's [0, {vocab_size}).",
            )
    ids = special_ids(config, tokenizer)
    widths = (sequence_length, encoder_length(config, sequence_length))
    match config.kind:
        case "causal":
            return Causal(ids, *widths)
        case "prefix":
            return Prefix(ids, *widths)
        case "masked":
            return Masked(config.masked, ids, sequence_length)
        case "span":
            return Spans((config.span,), ids, *widths)
        case "denoise":
            return Spans(config.denoisers, ids, *widths)
        case "infill":
            return Infill(config.infill, ids, *widths)
        case "translate":
            return Translate(ids, *widths)


def special_ids(config: ObjectiveConfig, tokenizer: Tokenizer) -> Ids:
    """Returns the tokenizer's ids that the objective inserts.

    Raises:
      UserError: it lacks one.
    """

    def needed(name: str) -> Any:
        # An id, or several.
        value = getattr(tokenizer, name)
        if value in (None, ()):
            raise UserError(
                "data.objective.kind",
                config.kind,
                f"needs a tokenizer with {name}; this one has none.",
            )
        return value

    pad = 0 if tokenizer.pad_id is None else tokenizer.pad_id
    ids = Ids(pad, tokenizer.vocab_size, tokenizer.document_start_id, tokenizer.eos_id)
    if config.kind in ("masked", "infill"):
        ids = dataclasses.replace(ids, mask=needed("mask_id"))
    if config.kind in ("span", "denoise"):
        ids = dataclasses.replace(ids, sentinels=tuple(needed("sentinel_ids")))
    if config.kind in ENCODED:
        needed("eos_id")
        ids = dataclasses.replace(ids, decoder_start=needed(f"{config.decoder_start}_id"))
    if config.kind == "infill" and config.infill.permute:
        # SentencePiece may put a space before the full stop, as a token of its own.
        ids = dataclasses.replace(ids, sentence_end=tokenizer.encode(".")[-1])
    return ids


def identity(config: ObjectiveConfig, objective: Objective) -> list[Any]:
    """Returns the JSON values of the objective that go into the data-order digest."""
    # The digest of causal rows has nothing of the objective, so that checkpoints from before there
    # were other objectives stay valid.
    if config.kind == "causal":
        return []
    return [plain(config), objective.ids.stored()]
