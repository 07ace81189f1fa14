"""Pictures of a run: claims about `training.plots`."""

import math

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from research.core.errors import UserError
from research.training.metrics import MetricsWriter
from research.training.plots import _draw_train, _smooth, plot_loss


def write_run(workdir, steps, bits=True):
    writer = MetricsWriter(workdir)
    for step in range(1, steps + 1):
        loss = 1.5 + 4 * math.exp(-step / 80) + 0.2 * math.sin(step * 12.9898) ** 3
        writer.write(step, {"train/loss": loss if step != 90 else math.inf})
        if step % 50 == 0:
            held_out = 1.6 + 4 * math.exp(-step / 80)
            writer.write(
                step,
                {"eval/loss": held_out} | ({"eval/bits_per_byte": held_out / 2.5} if bits else {}),
            )
    writer.close()


def colours(path) -> dict[str, int]:
    """How many pixels are nearly of each curve's colour."""
    pixels = matplotlib.image.imread(path)[..., :3]
    wanted = {"train": (0x44, 0x77, 0xAA), "eval": (0xCC, 0x33, 0x11)}
    return {
        name: int((abs(pixels * 255 - colour).max(axis=-1) < 12).sum())
        for name, colour in wanted.items()
    }


def test_both_curves_are_drawn(tmp_path):
    write_run(tmp_path, 400)
    path = plot_loss(tmp_path)
    assert path == tmp_path / "plots" / "loss.png"
    found = colours(path)
    assert found["train"] > 500
    assert found["eval"] > 500


def test_without_evaluation_only_the_training_curve_is_drawn(tmp_path):
    write_run(tmp_path, 20)
    found = colours(plot_loss(tmp_path))
    assert found["train"] > 200
    assert found["eval"] == 0


def test_mean_losses_are_drawn_over_those_of_steps():
    axes = Figure().subplots()
    _draw_train(axes, ([3, 6], [4.0, 1.0]), ([3, 6], [5.0, 2.0]))
    behind, front = axes.lines
    assert (behind.get_ydata().tolist(), front.get_ydata().tolist()) == ([4.0, 1.0], [5.0, 2.0])
    assert behind.get_alpha() == 0.3
    assert front.get_alpha() is None
    assert front.get_zorder() >= behind.get_zorder()  # of the same order the later is in front


@pytest.mark.parametrize("older", [False, True])
def test_the_losses_of_steps_are_drawn_pale(tmp_path, older):
    """An older version's losses are those of steps; of more than 50 the mean around is drawn."""
    writer = MetricsWriter(tmp_path)
    for step in range(1, 101):
        single = 2.0 + (-1) ** step
        row = {"train/loss": single} if older else {"train/loss": 2.0, "train/step_loss": single}
        writer.write(step, row)
    writer.close()
    pixels = matplotlib.image.imread(plot_loss(tmp_path))[..., :3] * 255
    pale = 0.3 * np.array([0x44, 0x77, 0xAA]) + 0.7 * 255
    assert (abs(pixels - pale).max(axis=-1) < 3).sum() > 1000


def test_nothing_to_plot_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"metrics.jsonl has no train/loss and no eval/loss"):
        plot_loss(tmp_path)


def test_smoothing_is_the_mean_of_the_finite_values_around():
    values = np.arange(300.0)
    values[150] = np.inf
    found = _smooth(values)
    np.testing.assert_allclose(found[[0, 100, 299]], [1.5, 100, 297.5])
    np.testing.assert_allclose(found[150], 150)
    assert np.isfinite(found).all()
    assert np.isnan(_smooth(np.full(60, np.nan))).all()
