"""Draws the pictures of attention masks side by side."""

import io
import math
from typing import Any

import numpy as np

from research.inspection.mask_pictures import (
    FIRST,
    FIRST_AHEAD,
    HIDDEN,
    PADDING,
    SECOND,
    SECOND_AHEAD,
    MaskPicture,
)
from research.storage import files
from research.storage.paths import Path

# The colour and the name of each kind of cell, in the order of the legend.
_LEGEND = {
    FIRST: ("#4477aa", "document 1"),
    FIRST_AHEAD: ("#99bbdd", "later token of its prefix"),
    SECOND: ("#dd7744", "document 2"),
    SECOND_AHEAD: ("#f2bb99", "later token of its prefix"),
    HIDDEN: ("#f0f1f3", "masked"),
    PADDING: ("#c9cdd2", "padding"),
}
_PANELS_A_ROW = 3


def draw_masks(pictures: list[MaskPicture], title: str, path: Path) -> None:
    """Draws the pictures side by side to a PNG file.

    Args:
      pictures: of `mask_pictures`.
      title: of the figure.
      path: the file; its folder exists.
    """
    # Imported here: matplotlib is slow to import. The figure is made without pyplot, so neither a
    # display nor global state is needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(pictures), _PANELS_A_ROW)
    rows = math.ceil(len(pictures) / columns)
    size = (4.2 * columns + 0.6, 4.4 * rows + 0.9)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)

    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, picture in zip(panels, pictures, strict=False):
        _draw_panel(axes, picture)
    for axes in panels[len(pictures) :]:
        axes.set_visible(False)

    figure.suptitle(f"{title}\n{_row_text(pictures[0])}", fontsize=11)
    _add_legend(figure, pictures, columns)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    files.write_bytes(path, image.getvalue())


def _row_text(picture: MaskPicture) -> str:
    text = f"a row of {len(picture.queries) * picture.step:,} tokens"
    if picture.step > 1:
        text += f", one in {picture.step} drawn"
    return text


def _add_legend(figure: Any, pictures: list[MaskPicture], columns: int) -> None:
    """Adds the names of the kinds of cells that are in any of the pictures."""
    from matplotlib.patches import Patch

    present = set()
    for picture in pictures:
        present |= set(np.unique(picture.cells()).tolist())
    handles = [
        Patch(color=colour, label=name)
        for cell, (colour, name) in _LEGEND.items()
        if cell in present
    ]
    # A single panel is too narrow for all names on one line.
    per_line = len(handles) if columns > 1 else math.ceil(len(handles) / 2)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=per_line, frameon=False, fontsize=9
    )


def _draw_panel(axes: Any, picture: MaskPicture) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.ticker import MaxNLocator

    colours = np.array([to_rgb(_LEGEND[cell][0]) for cell in sorted(_LEGEND)])
    cells = picture.cells()
    height = len(picture.queries) * picture.step
    width = len(picture.keys) * picture.step
    # Six colours of three numbers, picked by [T, S] -> [T, S, 3].
    axes.imshow(colours[cells], extent=(0, width, height, 0), interpolation="none")
    _draw_lines(axes.hlines, picture.queries, picture.step, width)
    _draw_lines(axes.vlines, picture.keys, picture.step, height)

    key_label = "key position"
    if picture.mask.stack == "cross-attention":
        key_label += " in the encoder"
    axes.set_title(f"{picture.mask.title}\n{picture.mask.text}", fontsize=9.5)
    axes.set_xlabel(key_label)
    axes.set_ylabel("query position")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.set_major_formatter("{x:,.0f}")
    axes.tick_params(length=2, labelsize=8)
    axes.spines[:].set_visible(False)


def _draw_lines(draw: Any, segments: np.ndarray, step: int, end: int) -> None:
    """Draws thin lines between tokens, and dark ones between documents."""
    token_ends = np.arange(1, len(segments)) * step
    draw(token_ends, 0, end, color="white", linewidth=0.5)

    # segments [1, 1, 2, 0] -> changes [0, 1, -1] -> documents end after 2 and 3 tokens
    changes = np.diff(segments)
    ends = np.flatnonzero(changes) + 1
    draw(ends * step, 0, end, color="#333333", linewidth=1, zorder=3)
