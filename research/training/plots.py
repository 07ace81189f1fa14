"""The curves of a run as pictures."""

import io
import math
from typing import Any

import numpy as np
from jaxtyping import Float

from research.core.errors import UserError
from research.storage import files
from research.storage.paths import Path, absolute
from research.training.metrics import FILE, curve, read_metrics

TRAIN = "train/loss"
STEP = "train/step_loss"
EVAL = "eval/loss"
BITS = "eval/bits_per_byte"
Curve = tuple[list[int], list[float]]  # steps and values
_SMOOTHED_FROM = 50  # values
_COLOURS = {TRAIN: "#4477aa", EVAL: "#cc3311"}


def plot_loss(workdir: Path) -> Path:
    """Draws training and evaluation loss over the steps to `plots/loss.png`, and returns its path.

    Raises:
      UserError: the workdir's metrics have no loss yet.
    """
    # Imported here because it is slow, and needed at the end of a run only. Without pyplot a figure
    # needs neither a display nor global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = read_metrics(workdir)
    train = curve(rows, TRAIN)
    evaluation = curve(rows, EVAL)
    _, bits = curve(rows, BITS)
    if not train[0] and not evaluation[0]:
        raise UserError(f"{workdir / FILE} has no {TRAIN} and no {EVAL} to plot.")
    # In rows of older versions `train/loss` is the loss of a single step.
    single_steps = curve(rows, STEP)
    if not single_steps[0]:
        single_steps = train

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw_train(axes, single_steps, train)
    _draw_eval(axes, evaluation, bits)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(absolute(workdir).name)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    low, high = _limits(single_steps[1], train[1], evaluation[1])
    axes.set_ylim(low, high)
    axes.legend(frameon=False)

    # Drawn in memory, and written atomically: a viewer never finds half a picture.
    path = workdir / "plots" / "loss.png"
    files.make_folder(path.parent)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    files.write_bytes(path, picture.getvalue())
    return path


def _draw_train(axes: Any, steps: Curve, means: Curve) -> None:
    """Draws the mean losses, smooth where there are many, over those of single steps, pale."""
    colour = _COLOURS[TRAIN]
    axes.plot(*steps, color=colour, linewidth=1, alpha=0.3)
    at, values = means
    if not at:
        return
    if len(at) > _SMOOTHED_FROM:
        values = _smooth(np.asarray(values))
    axes.plot(at, values, color=colour, linewidth=1.8, label="train")


def _smooth(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Returns the mean of the finite values in a window of a fiftieth of the curve."""
    # Sums from the start: values [3, 1, nan] -> sums [0, 3, 4, 4], counts [0, 1, 2, 2]
    finite = np.isfinite(values)
    known = np.where(finite, values, 0)
    sums = np.append(0, np.cumsum(known))
    counts = np.append(0, np.cumsum(finite))

    # Window of the value i: first[i] … last[i] - 1, cut at both ends of the curve.
    # 3 values, half 1 -> first [0, 0, 1], last [2, 3, 3]
    size = len(values)
    half = max(1, size // 100)
    index = np.arange(size)
    first = np.maximum(index - half, 0)
    last = np.minimum(index + half + 1, size)

    # The sum over a window is the difference of two sums from the start.
    window_sums = sums[last] - sums[first]
    window_counts = counts[last] - counts[first]
    means = window_sums / np.maximum(window_counts, 1)
    return np.where(window_counts > 0, means, np.nan)


def _draw_eval(axes: Any, losses: Curve, bits: list[float]) -> None:
    """Draws the held-out losses, with the last of them, and its bits per byte, in the legend."""
    steps, values = losses
    if not steps:
        return
    label = f"evaluation: last {values[-1]:.3f}"
    if bits:
        label += f", {bits[-1]:.3f} bits per byte"
    axes.plot(
        steps, values, color=_COLOURS[EVAL], marker="o", markersize=3.5, linewidth=1.5, label=label
    )


def _limits(*curves: list[float]) -> tuple[float, float]:
    """Returns the limits of the loss axis: from below the least loss to the loss near the start.

    A spike, above 99.5 % of the values, does not flatten the rest.
    """
    values: list[float] = []
    for losses in curves:
        values += filter(math.isfinite, losses)
    if not values:
        return 0.0, 1.0
    values.sort()

    # 1000 values -> the 996th; few values -> the last
    count = len(values)
    high_index = min(count - 1, int(0.995 * count))
    low = values[0]
    high = values[high_index]

    # A flat curve gets a margin too.
    margin = 0.05 * max(high - low, 1e-3)
    return low - margin, high + margin
