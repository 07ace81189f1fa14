"""Resuming a run: its newest checkpoint, and the position in its data."""

import dataclasses
import logging

import numpy as np
from jax.experimental import multihost_utils

from research.data.loader import Loader
from research.recipes.experiment import ExperimentConfig
from research.storage.paths import Path
from research.training import metrics
from research.training.checkpoints import Checkpoints
from research.training.loop import Unfinished
from research.training.state import TrainState

logger = logging.getLogger("tessera")


def restore(
    checkpoints: Checkpoints, abstract: TrainState, loader: Loader, workdir: Path
) -> tuple[TrainState | None, Unfinished]:
    """Returns the newest intact state and what was not finished at its step, and sets the loader
    to the batch after it.

    The state is None where there is no checkpoint.
    """
    if checkpoints.latest is None:
        # Traces of a run whose checkpoints are gone.
        traces = [workdir / name for name in ("config.json", metrics.FILE)]
        if any(path.exists() for path in traces):
            logger.warning("%s has no checkpoint: starts at step 0", workdir)
        return None, Unfinished()

    step, state, extra = checkpoints.restore(abstract)
    loader.restore(extra["loader"])
    logger.info("resuming from step %d", step)

    # Process 0 writes the rows of metrics, so it decides: all must evaluate, or none.
    evaluated = any(row["step"] == step for row in metrics.evaluations(workdir))
    evaluated = bool(multihost_utils.broadcast_one_to_all(np.bool_(evaluated)))
    unfinished = Unfinished.from_extra(extra)
    if evaluated:
        unfinished = dataclasses.replace(unfinished, evaluation=False)
    return state, unfinished


def is_done(saved: TrainState | None, config: ExperimentConfig) -> bool:
    """Returns whether a checkpoint is that of the last step."""
    return saved is not None and int(saved.step) >= config.train.steps


def log_done(saved: TrainState, config: ExperimentConfig, workdir: Path) -> None:
    """Logs that the run has ended, and its last evaluation."""
    logger.info("step %d of %d: nothing is left to do", saved.step, config.train.steps)
    for row in metrics.evaluations(workdir)[-1:]:
        logger.info("%s", metrics.format_evaluation(row))
