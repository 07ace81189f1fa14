"""The curves of a run as pictures."""

import io
from typing import Any

import numpy as np
from jaxtyping import Float

from research.core.errors import UserError
from research.storage import files
from research.storage.paths import Path, absolute
from research.training.metrics import FILE, curve, read_metrics

TRAIN, EVAL, BITS = "train/loss", "eval/loss", "eval/bits_per_byte"
_COLOURS = {TRAIN: "#4477aa", EVAL: "#cc3311"}


def plot_loss(workdir: Path) -> Path:
    """Draws training and evaluation loss over the steps to `plots/loss.png`, and returns its path.

    Raises:
      UserError: the workdir's metrics have no loss yet.
    """
    # Deferred: heavy, and wanted at the end of a run only. The figure is made without pyplot, so
    # neither a display nor global state is needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = read_metrics(workdir)
    curves = {name: curve(rows, name) for name in (TRAIN, EVAL, BITS)}
    if not curves[TRAIN][0] and not curves[EVAL][0]:
        raise UserError(f"{workdir / FILE} has no {TRAIN} and no {EVAL} to plot.")
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw_train(axes, *curves[TRAIN])
    _draw_eval(axes, *curves[EVAL], curves[BITS][1])
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(absolute(workdir).name)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(*_limits(curves[TRAIN][1], curves[EVAL][1]))
    axes.legend(frameon=False)
    path = workdir / "plots" / "loss.png"
    files.make_folder(path.parent)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    files.write_bytes(path, picture.getvalue())
    return path


def _draw_train(axes: Any, steps: list[int], values: list[float]) -> None:
    """Every value, pale, under the mean of the values around it."""
    if not steps:
        return
    many = len(steps) > 50
    pale = {"alpha": 0.3} if many else {"label": "train"}
    axes.plot(steps, values, color=_COLOURS[TRAIN], linewidth=1, **pale)
    if many:
        axes.plot(
            steps, _smooth(np.asarray(values)), color=_COLOURS[TRAIN], linewidth=1.8, label="train"
        )


def _smooth(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """The mean of the finite values in a window of a fiftieth of the curve."""
    finite = np.isfinite(values)
    sums, counts = (np.append(0, np.cumsum(x)) for x in (np.where(finite, values, 0), finite))
    half = max(1, len(values) // 100)
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    window = counts[last] - counts[first]
    return np.where(window > 0, (sums[last] - sums[first]) / np.maximum(window, 1), np.nan)


def _draw_eval(axes: Any, steps: list[int], values: list[float], bits: list[float]) -> None:
    if not steps:
        return
    label = f"evaluation: last {values[-1]:.3f}" + (
        f", {bits[-1]:.3f} bits per byte" if bits else ""
    )
    axes.plot(
        steps, values, color=_COLOURS[EVAL], marker="o", markersize=3.5, linewidth=1.5, label=label
    )


def _limits(*curves: list[float]) -> tuple[float, float]:
    """From just below the least loss to the loss near the start, so that a spike does not flatten
    the rest.
    """
    finite = sorted(value for values in curves for value in values if abs(value) < float("inf"))
    if not finite:
        return 0.0, 1.0
    low, high = finite[0], finite[min(len(finite) - 1, int(0.995 * len(finite)))]
    margin = 0.05 * max(high - low, 1e-3)
    return low - margin, high + margin
