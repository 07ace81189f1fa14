"""Attention masks as pictures: who sees whom in a packed row of two documents and padding."""

import dataclasses
import io
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from research.core.errors import UserError
from research.inspection.description import sight
from research.inspection.parameter_summary import layers_name
from research.kernels.attention import AttentionMask
from research.models.config import ModelConfig
from research.models.transformer import memory_mask, sequence_mask
from research.storage import files
from research.storage.paths import Path

# Sixteenths of a row that its two documents take; the rest is padding. An encoder's row is filled
# otherwise, so that the two sides of cross-attention can be told apart.
DOCUMENTS, ENCODER_DOCUMENTS = (9, 5), (6, 8)
# A document's prefix is one part in this many.
PREFIX_SHARE = 3
# Tokens of a row without windows; how many times the widest window others have; bounds of what is
# drawn.
PLAIN_LENGTH, WINDOWS, SHORTEST, MOST_CELLS = 32, 4, 16, 64
# What a cell may be.
HIDDEN, PADDING, FIRST, SECOND, FIRST_AHEAD, SECOND_AHEAD = range(6)
_LOOKS = {
    FIRST: ("#4477aa", "document 1"),
    FIRST_AHEAD: ("#99bbdd", "ahead, in its prefix"),
    SECOND: ("#dd7744", "document 2"),
    SECOND_AHEAD: ("#f2bb99", "ahead, in its prefix"),
    HIDDEN: ("#f0f1f3", "hidden"),
    PADDING: ("#c9cdd2", "padding"),
}
_PANELS_A_ROW = 3


class Row(NamedTuple):
    """A packed row: of each token its document (1, 2, or 0 for padding), its place there, and
    whether in its prefix.
    """

    segments: Int[np.ndarray, "T"]
    positions: Int[np.ndarray, "T"]
    prefix: Int[np.ndarray, "T"]


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
      ahead: whether keys after a query, which a prefix alone shows it, look different.
    """

    layers: str
    sight: str
    visible: Bool[np.ndarray, "T S"]
    queries: Int[np.ndarray, "T"]
    keys: Int[np.ndarray, "S"]
    step: int
    key_label: str = "key position"
    ahead: bool = False

    def cells(self) -> Int[np.ndarray, "T S"]:
        """Returns what is drawn in each cell."""
        seen = np.where(self.queries == 1, FIRST, SECOND)[:, None]
        if self.ahead:
            later = np.arange(len(self.keys)) > np.arange(len(self.queries))[:, None]
            seen = np.where(later, seen + FIRST_AHEAD - FIRST, seen)
        padding = (self.queries == 0)[:, None] | (self.keys == 0)
        return np.where(self.visible, seen, np.where(padding, PADDING, HIDDEN))


def row_length(config: ModelConfig, length: int | None) -> int:
    """Returns the tokens of the row that is drawn.

    Args:
      config: the model.
      length: as the user wants it; None is enough to see windows open and close.

    Raises:
      UserError: a length at which the documents are too short to show anything, or longer than the
          model's.
    """
    longest = max(SHORTEST, config.max_length * 16 // DOCUMENTS[0])
    if length is None:
        widest = max(
            (layer.window for layer in config.layers() if layer.window is not None), default=0
        )
        return min(longest, max(PLAIN_LENGTH, WINDOWS * widest))
    if not SHORTEST <= length <= longest:
        raise UserError(
            "length",
            length,
            f"must lie in [{SHORTEST}, {longest}]: the longer of its two documents must fit "
            f"max_length = {config.max_length}.",
        )
    return length


def mask_pictures(config: ModelConfig, length: int) -> list[MaskPicture]:
    """Returns one picture for each mask that the layers of a model have.

    Args:
      config: the model.
      length: tokens of the row, at least `SHORTEST`. Of a long row every step-th token is drawn;
        they see each other as they do in the whole row.
    """
    step = math.ceil(length / MOST_CELLS)
    row = packed_row(length // step, DOCUMENTS)
    if config.structure != "encoder_decoder":
        return _self_attention(config, "", row, step)
    memory = packed_row(length // step, ENCODER_DOCUMENTS)
    segments = jnp.asarray(row.segments)[None]
    cross = MaskPicture(
        f"cross-attention, {layers_name(list(range(config.num_layers)))}",
        "sees its document in the encoder",
        _dense(
            memory_mask(segments, segments, jnp.asarray(memory.segments)[None]), len(row.segments)
        ),
        row.segments,
        memory.segments,
        step,
        "key position in the encoder",
    )
    encoder = _self_attention(config.encoder(), "encoder, ", memory, step)
    return [*encoder, *_self_attention(config, "decoder, ", row, step), cross]


def packed_row(tokens: int, sixteenths: tuple[int, int]) -> Row:
    """Returns a row of two documents, each with a prefix, and padding.

    Args:
      tokens: of the row.
      sixteenths: of the row that each document takes.
    """
    first, second = (tokens * part // 16 for part in sixteenths)
    lengths = (first, second, tokens - first - second)
    positions = [np.arange(length) for length in lengths]
    prefix = [place < len(place) // PREFIX_SHARE for place in positions]
    return Row(
        np.repeat([1, 2, 0], lengths),
        np.concatenate(positions),
        np.concatenate(prefix).astype(np.int32),
    )


def _self_attention(config: ModelConfig, stack: str, row: Row, step: int) -> list[MaskPicture]:
    segments, positions, prefix = (jnp.asarray(values)[None] for values in row)
    whole = sequence_mask(config, positions, segments, prefix, cached=False)
    by_window: dict[int | None, list[int]] = {}
    for number, layer in enumerate(config.layers()):
        by_window.setdefault(layer.window, []).append(number)
    pictures = []
    for window, numbers in by_window.items():
        # |i − j| · step < window just where |i − j| < ⌈window / step⌉.
        mask = dataclasses.replace(
            whole, window=None if window is None else math.ceil(window / step)
        )
        seen = _dense(mask, len(row.segments))
        name, ahead = f"{stack}{layers_name(numbers)}", config.structure == "prefix"
        pictures.append(
            MaskPicture(
                name, sight(config, window), seen, row.segments, row.segments, step, ahead=ahead
            )
        )
    return pictures


def _dense(mask: AttentionMask, cells: int) -> Bool[np.ndarray, "T S"]:
    return np.asarray(mask.dense(cells, cells)[0, 0])


def draw_masks(pictures: list[MaskPicture], title: str, path: Path) -> None:
    """Draws the pictures side by side to a PNG file.

    Args:
      pictures: of `mask_pictures`.
      title: of the figure.
      path: the file; its folder exists.
    """
    # Deferred: heavy. The figure is made without pyplot, so neither a display nor global state is
    # needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(len(pictures), _PANELS_A_ROW)
    rows = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(4.2 * columns + 0.6, 4.4 * rows + 0.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, picture in zip(panels, pictures, strict=False):
        _draw(axes, picture)
    for axes in panels[len(pictures) :]:
        axes.set_visible(False)
    length, step = len(pictures[0].queries) * pictures[0].step, pictures[0].step
    every = "" if step == 1 else f", one in {step} drawn"
    figure.suptitle(f"{title}\na row of {length:,} tokens{every}", fontsize=11)
    used = {int(cell) for picture in pictures for cell in np.unique(picture.cells())}
    handles = [
        Patch(color=colour, label=name) for cell, (colour, name) in _LOOKS.items() if cell in used
    ]
    places = {
        "loc": "outside lower center",
        "ncols": len(handles) if columns > 1 else math.ceil(len(handles) / 2),
    }
    figure.legend(handles=handles, frameon=False, fontsize=9, **places)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    files.write_bytes(path, image.getvalue())


def _draw(axes: Any, picture: MaskPicture) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.ticker import MaxNLocator

    cells, step = picture.cells(), picture.step
    colours = np.array([to_rgb(_LOOKS[cell][0]) for cell in sorted(_LOOKS)])
    height, width = cells.shape[0] * step, cells.shape[1] * step
    axes.imshow(colours[cells], extent=(0, width, height, 0), interpolation="none")
    for lines, segments, end in (
        (axes.hlines, picture.queries, width),
        (axes.vlines, picture.keys, height),
    ):
        lines(np.arange(1, len(segments)) * step, 0, end, color="white", linewidth=0.5)
        lines(
            (np.flatnonzero(np.diff(segments)) + 1) * step,
            0,
            end,
            color="#333333",
            linewidth=1,
            zorder=3,
        )
    axes.set_title(f"{picture.layers}\n{picture.sight}", fontsize=9.5)
    axes.set_xlabel(picture.key_label)
    axes.set_ylabel("query position")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.set_major_formatter("{x:,.0f}")
    axes.tick_params(length=2, labelsize=8)
    axes.spines[:].set_visible(False)
