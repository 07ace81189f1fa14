"""Where a run goes on: its newest checkpoint, and the place in its data."""

import logging

import numpy as np
from jax.experimental import multihost_utils

from research.data.loader import Loader
from research.storage.paths import Path
from research.training import metrics
from research.training.checkpoints import Checkpoints
from research.training.state import TrainState

logger = logging.getLogger("tessera")


def restore(
    checkpoints: Checkpoints, abstract: TrainState, loader: Loader, workdir: Path
) -> tuple[TrainState | None, bool]:
    """Returns the newest good state, with the loader set to go on from it, and whether it must
    still be evaluated.

    The state is None where there is no checkpoint.
    """
    if checkpoints.latest is None:
        if any((workdir / name).exists() for name in ("config.json", metrics.FILE)):
            logger.warning("%s has no checkpoint: starts at step 0", workdir)
        return None, False
    step, state, extra = checkpoints.restore(abstract)
    loader.restore(extra["loader"])
    logger.info("goes on from step %d", step)
    evaluated = any(row["step"] == step for row in metrics.evaluations(workdir))
    # Process 0 writes the rows, so its word counts: all must evaluate, or none.
    evaluated = bool(multihost_utils.broadcast_one_to_all(np.bool_(evaluated)))
    return state, extra["evaluation_owed"] and not evaluated
