"""Pictures of attention masks: which keys each query attends to, in a packed row of two documents
and padding.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from research.core.errors import UserError
from research.inspection.description import mask_text
from research.inspection.parameter_summary import layers_name
from research.kernels.attention import AttentionMask
from research.models.config import ModelConfig
from research.models.masks import memory_mask, sequence_mask

# Sixteenths of a row for each of its two documents; the rest is padding. The encoder's row is split
# otherwise, so that the two sides of cross-attention can be told apart.
DOCUMENTS = (9, 5)
ENCODER_DOCUMENTS = (6, 8)
# A document's prefix is one part in this many.
PREFIX_SHARE = 3
# Tokens of a row: without windows, as a multiple of the widest window, and at least.
PLAIN_LENGTH = 32
WINDOWS = 4
SHORTEST = 16
# The most cells on each side of a picture.
MOST_CELLS = 64
# What a cell may be.
HIDDEN, PADDING, FIRST, SECOND, FIRST_AHEAD, SECOND_AHEAD = range(6)


class Row(NamedTuple):
    """A packed row: of each token its document (1, 2, or 0 for padding), its position in it, and
    whether it is in its prefix.
    """

    segments: Int[np.ndarray, "T"]
    positions: Int[np.ndarray, "T"]
    prefix: Int[np.ndarray, "T"]


@dataclasses.dataclass(frozen=True)
class LayerMask:
    """An attention mask and the layers that have it.

    Attributes:
      stack: `encoder`, `decoder` or `cross-attention` of an encoder-decoder; empty for a model of
        one stack.
      layers: numbers of the layers.
      window: of the mask, in tokens, or None.
      text: a description of the mask.
    """

    stack: str
    layers: tuple[int, ...]
    window: int | None
    text: str

    @property
    def title(self) -> str:
        """Which layers these are: `encoder, layers 0–11`."""
        name = layers_name(list(self.layers))
        return f"{self.stack}, {name}" if self.stack else name


@dataclasses.dataclass(frozen=True)
class MaskPicture:
    """A picture of one mask.

    Attributes:
      mask: which it is.
      visible: whether a query attends to a key.
      queries: the document of each query, 1 or 2, and 0 for padding.
      keys: the same of each key.
      step: tokens from one row or column to the next.
      marks_ahead: whether keys after their query, which only a prefix shows, look different.
    """

    mask: LayerMask
    visible: Bool[np.ndarray, "T S"]
    queries: Int[np.ndarray, "T"]
    keys: Int[np.ndarray, "S"]
    step: int
    marks_ahead: bool = False

    def cells(self) -> Int[np.ndarray, "T S"]:
        """Returns what is drawn in each cell."""
        queries = self.queries[:, None]
        query_index = np.arange(len(self.queries))[:, None]
        key_index = np.arange(len(self.keys))

        # [T, 1] -> [T, S]: the colour of a cell is that of its query's document.
        visible = np.where(queries == 1, FIRST, SECOND)
        if self.marks_ahead:
            ahead = np.where(queries == 1, FIRST_AHEAD, SECOND_AHEAD)
            visible = np.where(key_index > query_index, ahead, visible)

        is_padding = (queries == 0) | (self.keys == 0)
        masked = np.where(is_padding, PADDING, HIDDEN)
        return np.where(self.visible, visible, masked)


def row_length(config: ModelConfig, length: int | None) -> int:
    """Returns the tokens of the row that is drawn.

    Args:
      config: the model.
      length: as the user wants it; None is enough to show windows open and close.

    Raises:
      UserError: a length at which the documents are too short to show anything, or longer than the
        model's.
    """
    longest = max(SHORTEST, config.max_length * 16 // DOCUMENTS[0])
    if length is None:
        # Four times the widest window: the first document is longer than two windows.
        windows = [layer.window or 0 for layer in config.layers()]
        return min(longest, max(PLAIN_LENGTH, WINDOWS * max(windows)))
    if not SHORTEST <= length <= longest:
        raise UserError(
            "length",
            length,
            f"must lie in [{SHORTEST}, {longest}]: the longer of its two documents must fit "
            f"max_length = {config.max_length}.",
        )
    return length


def layer_masks(config: ModelConfig) -> list[LayerMask]:
    """Returns each attention mask of a model, with the layers that have it."""
    if config.structure != "encoder_decoder":
        return _self_attention_masks(config, "")

    cross_text = "attention to all tokens of the same document in the encoder"
    decoder_layers = tuple(range(config.num_layers))
    return [
        *_self_attention_masks(config.encoder(), "encoder"),
        *_self_attention_masks(config, "decoder"),
        LayerMask("cross-attention", decoder_layers, None, cross_text),
    ]


def _self_attention_masks(config: ModelConfig, stack: str) -> list[LayerMask]:
    layers_by_window: dict[int | None, list[int]] = {}
    for index, layer in enumerate(config.layers()):
        layers_by_window.setdefault(layer.window, []).append(index)
    return [
        LayerMask(stack, tuple(layers), window, mask_text(config, window))
        for window, layers in layers_by_window.items()
    ]


def mask_pictures(config: ModelConfig, length: int) -> list[MaskPicture]:
    """Returns one picture of each mask of a model.

    Args:
      config: the model.
      length: tokens of the row, at least `SHORTEST`. Of a long row only every step-th token is
        drawn; these have the mask that they have in the whole row.
    """
    step = math.ceil(length / MOST_CELLS)
    row = packed_row(length // step, DOCUMENTS)
    encoder_row = packed_row(length // step, ENCODER_DOCUMENTS)

    pictures = []
    for mask in layer_masks(config):
        if mask.stack == "cross-attention":
            pictures.append(_cross_attention_picture(mask, row, encoder_row, step))
        elif mask.stack == "encoder":
            pictures.append(_self_attention_picture(config.encoder(), mask, encoder_row, step))
        else:
            pictures.append(_self_attention_picture(config, mask, row, step))
    return pictures


def packed_row(tokens: int, sixteenths: tuple[int, int]) -> Row:
    """Returns a row of two documents, each with a prefix, and padding.

    Args:
      tokens: of the row.
      sixteenths: of the row that each document takes.
    """
    first, second = (tokens * part // 16 for part in sixteenths)
    padding = tokens - first - second
    # 32 tokens, (9, 5) sixteenths -> lengths [18, 10, 4]
    lengths = (first, second, padding)
    positions = [np.arange(length) for length in lengths]

    # A document of 9 tokens -> [1, 1, 1, 0, 0, 0, 0, 0, 0]
    prefix = []
    for index in positions:
        prefix_length = len(index) // PREFIX_SHARE
        prefix.append(index < prefix_length)
    return Row(
        segments=np.repeat([1, 2, 0], lengths),
        positions=np.concatenate(positions),
        prefix=np.concatenate(prefix).astype(np.int32),
    )


def _self_attention_picture(
    config: ModelConfig, mask: LayerMask, row: Row, step: int
) -> MaskPicture:
    segments, positions, prefix = (jnp.asarray(values)[None] for values in row)  # [1, T] each
    whole = sequence_mask(config, positions, segments, prefix, cached=False)

    window = None
    if mask.window is not None:
        # |i − j| · step < window just where |i − j| < ⌈window / step⌉.
        window = math.ceil(mask.window / step)
    windowed = dataclasses.replace(whole, window=window)
    return MaskPicture(
        mask,
        visible=_dense(windowed, len(row.segments)),
        queries=row.segments,
        keys=row.segments,
        step=step,
        marks_ahead=config.structure == "prefix",
    )


def _cross_attention_picture(mask: LayerMask, row: Row, encoder_row: Row, step: int) -> MaskPicture:
    segments = jnp.asarray(row.segments)[None]  # [1, T]
    encoder_segments = jnp.asarray(encoder_row.segments)[None]
    cross = memory_mask(segments, segments, encoder_segments)
    return MaskPicture(
        mask,
        visible=_dense(cross, len(row.segments)),
        queries=row.segments,
        keys=encoder_row.segments,
        step=step,
    )


def _dense(mask: AttentionMask, cells: int) -> Bool[np.ndarray, "T S"]:
    dense = mask.dense(cells, cells)
    # [B, N, T, S] -> [T, S]
    return np.asarray(dense[0, 0])
