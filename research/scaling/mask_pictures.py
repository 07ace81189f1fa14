"""Attention masks as pictures: who sees whom in a packed row of two documents and padding."""

import dataclasses
import math
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from research.core.errors import UserError
from research.kernels.attention import AttentionMask
from research.models.config import ModelConfig
from research.models.transformer import memory_mask, sequence_mask
from research.scaling.anatomy import layers_name
from research.scaling.wording import sight

# Sixteenths of a row that its two documents take; the rest is padding. An encoder's row is filled otherwise, so that
# the two sides of cross-attention can be told apart.
DOCUMENTS, ENCODER_DOCUMENTS = (9, 5), (6, 8)
# A document's prefix is one part in this many.
PREFIX_SHARE = 3
# Rows without windows have this many tokens, others this many windows.
PLAIN_LENGTH, WINDOWS = 32, 3
SHORTEST, MOST_CELLS = 16, 64
PANELS_A_ROW = 3
# What a cell may be: its number in `MaskPicture.cells`, its colour, its name.
HIDDEN, PADDING, FIRST, SECOND, FIRST_PREFIX, SECOND_PREFIX = range(6)
_COLOURS = ("#eef0f2", "#c4c8cc", "#4477aa", "#ee7733", "#88bbdd", "#f7b98b")
_NAMES = (
    "hidden",
    "padding",
    "seen in document 1",
    "seen in document 2",
    "seen ahead, in the prefix",
    "seen ahead, in the prefix",
)


@dataclasses.dataclass(frozen=True)
class MaskPicture:
    """Who sees whom in the layers that have one mask.

    Attributes:
      layers: which layers they are.
      sight: what a token sees there, in words.
      visible: whether a query sees a key.
      queries: the document of each query, 1 or 2, and 0 for padding.
      keys: the same of each key.
      step: tokens from one row or column to the next.
      key_label: what the keys are.
    """

    layers: str
    sight: str
    visible: Bool[np.ndarray, "T S"]
    queries: Int[np.ndarray, "T"]
    keys: Int[np.ndarray, "S"]
    step: int
    key_label: str = "key position"

    def cells(self, ahead: bool = False) -> Int[np.ndarray, "T S"]:
        """Returns what is drawn in each cell.

        Args:
          ahead: whether keys after a query, which only a prefix shows it, are marked.
        """
        padding = (self.queries == 0)[:, None] | (self.keys == 0)[None]
        documents = np.broadcast_to(np.where(self.queries == 1, FIRST, SECOND)[:, None], self.visible.shape)
        if ahead:
            later = np.arange(len(self.keys))[None] > np.arange(len(self.queries))[:, None]
            documents = np.where(later, documents + FIRST_PREFIX - FIRST, documents)
        return np.where(self.visible, documents, np.where(padding, PADDING, HIDDEN))


def longest_row(config: ModelConfig) -> int:
    """Returns the tokens of the longest row that may be drawn: none of its documents is longer than the model's."""
    return max(SHORTEST, config.max_length * 16 // DOCUMENTS[0])


def row_length(config: ModelConfig, length: int | None) -> int:
    """Returns the tokens of the row that is drawn.

    Args:
      config: the model.
      length: as the user wants it; None is enough to see windows open and close.

    Raises:
      UserError: a length out of range.
    """
    longest = longest_row(config)
    if length is None:
        widest = max((layer.window for layer in config.layers() if layer.window is not None), default=0)
        return min(longest, max(PLAIN_LENGTH, WINDOWS * widest))
    if not SHORTEST <= length <= longest:
        raise UserError(
            f"--length = {length} must lie in [{SHORTEST}, {longest}]: a row holds two documents of up to "
            f"max_length = {config.max_length} tokens."
        )
    return length


def mask_pictures(config: ModelConfig, length: int) -> list[MaskPicture]:
    """Returns one picture for each mask that the layers of a model have.

    Args:
      config: the model.
      length: tokens of the row, at least `SHORTEST`. Of a long one every step-th token is drawn, and windows are as
        much narrower: those tokens see each other as they do in the whole row.
    """
    step = math.ceil(length / MOST_CELLS)
    cells = length // step
    if config.structure != "encoder_decoder":
        return _self_attention(config, "", _segments(cells, DOCUMENTS), step)
    queries, memory = _segments(cells, DOCUMENTS), _segments(cells, ENCODER_DOCUMENTS)
    seen = _dense(memory_mask(jnp.asarray(queries)[None], jnp.asarray(queries)[None], jnp.asarray(memory)[None]), cells)
    layers = layers_name(list(range(config.num_layers)))
    says = "sees its document's encoder tokens"
    cross = MaskPicture(f"cross-attention, {layers}", says, seen, queries, memory, step, "key position in the encoder")
    encoder = _self_attention(config.encoder(), "encoder, ", memory, step)
    return [*encoder, *_self_attention(config, "decoder, ", queries, step), cross]


def _segments(cells: int, sixteenths: tuple[int, int]) -> Int[np.ndarray, "T"]:
    first, second = (cells * part // 16 for part in sixteenths)
    return np.repeat([1, 2, 0], [first, second, cells - first - second])


def _self_attention(
    config: ModelConfig, stack: str, segments: Int[np.ndarray, "T"], step: int
) -> list[MaskPicture]:
    index = np.arange(len(segments))
    positions = index - np.searchsorted(np.where(segments == 0, 3, segments), np.where(segments == 0, 3, segments))
    lengths = np.array([np.sum(segments == segment) for segment in segments])
    prefix = jnp.asarray(positions < lengths // PREFIX_SHARE, jnp.int32)[None]
    given = jnp.asarray(segments)[None]
    whole = sequence_mask(config, jnp.asarray(positions)[None], given, prefix, cached=False)
    by_window: dict[int | None, list[int]] = {}
    for number, layer in enumerate(config.layers()):
        by_window.setdefault(layer.window, []).append(number)
    pictures = []
    for window, layers in by_window.items():
        # |i - j| · step < window exactly where |i - j| < ⌈window / step⌉.
        mask = dataclasses.replace(whole, window=None if window is None else math.ceil(window / step))
        seen = _dense(mask, len(segments))
        name = f"{stack}{layers_name(layers)}"
        pictures.append(MaskPicture(name, sight(config, window), seen, segments, segments, step))
    return pictures


def _dense(mask: AttentionMask, cells: int) -> Bool[np.ndarray, "T S"]:
    return np.asarray(mask.dense(cells, cells)[0, 0])


def draw_masks(pictures: list[MaskPicture], title: str, path: pathlib.Path) -> None:
    """Draws the pictures side by side to a PNG file.

    Args:
      pictures: of `mask_pictures`.
      title: of the figure.
      path: the file; its folder exists.
    """
    # Deferred: heavy. The figure is made without pyplot, so neither a display nor global state is needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(len(pictures), PANELS_A_ROW)
    rows = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(max(4.4 * columns, 5.5), 4.9 * rows + 0.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    used: set[int] = set()
    for axes, picture in zip(grid, pictures, strict=False):
        used |= _draw(axes, picture)
    for axes in grid[len(pictures) :]:
        axes.set_visible(False)
    step = pictures[0].step
    ordinal = "" if step == 1 else f"\none cell in {step} tokens each way"
    figure.suptitle(f"{title}{ordinal}", fontsize=11)
    names = {_NAMES[cell]: _COLOURS[cell] for cell in sorted(used, reverse=True)}
    handles = [Patch(facecolor=colour, label=name) for name, colour in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8.5)
    figure.savefig(path)


def _draw(axes: Any, picture: MaskPicture) -> set[int]:
    """Draws one picture and returns what its cells are."""
    return set()
