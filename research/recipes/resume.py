"""The beginning of a run: its newest checkpoint and the position in its data, the parameters of
another run, or random ones.
"""

import contextlib
import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from research.core.errors import UserError
from research.core.random import key_for
from research.data import tokenizers
from research.data.loader import Loader
from research.data.tokenizers import Tokenizer
from research.recipes.experiment import ExperimentConfig
from research.storage.paths import Path, as_path
from research.training import metrics
from research.training.checkpoints import CheckpointConfig, Checkpoints
from research.training.loop import Unfinished
from research.training.program import Program
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


def starting_params(
    program: Program, saved: TrainState | None, config: ExperimentConfig, tokenizer: Tokenizer
) -> Any:
    """Returns the parameters of `start_from` where a run begins with them, else None.

    Raises:
      UserError: its workdir has no whole checkpoint, or another architecture or tokenizer.
    """
    if saved is not None or not config.start_from:
        return None
    source = as_path(config.start_from, "start_from")
    try:
        _check_tokenizer(source, tokenizer)
        with contextlib.closing(Checkpoints(source, CheckpointConfig())) as checkpoints:
            # The first of the two fields that the checkpoint has.
            step, params = checkpoints.restore_params(
                program.saved.params, fields=("ema", "params")
            )
    except UserError as error:
        raise error.about("start_from", config.start_from) from error
    logger.info("starting from the parameters of %s at step %d", source, step)
    return params


def begin(
    program: Program, saved: TrainState | None, params: Any, config: ExperimentConfig
) -> tuple[TrainState, Any]:
    """Returns the state and the frozen parameters: of the checkpoint where there is one, else of
    step 0.

    Args:
      program: of the run.
      saved: the state of the checkpoint, or None.
      params: of `starting_params`.
      config: of the run.
    """
    key = key_for(config.train.seed, "init")
    if params is None:
        return program.resume_or_create(saved, key)

    # What an optimizer starts with depends on the shapes of parameters alone.
    state = program.create(key)
    ema = None
    if state.ema is not None:
        ema = jax.tree.map(_copied_to, params, program.saved.ema)
    return program.split(state.replace(params=params, ema=ema))


def _copied_to(array: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns a copy in a sharding: a step takes the buffers of what it is given."""
    return jnp.copy(jax.device_put(array, like.sharding))


def _check_tokenizer(source: Path, tokenizer: Tokenizer) -> None:
    """Raises UserError where a workdir's ids mean other text."""
    theirs = tokenizers.load(source / "tokenizer")
    if theirs.digest() != tokenizer.digest():
        raise UserError("it has another tokenizer than data.tokenizer.")


def is_done(saved: TrainState | None, config: ExperimentConfig) -> bool:
    """Returns whether a checkpoint is that of the last step."""
    return saved is not None and int(saved.step) >= config.train.steps


def log_done(saved: TrainState, config: ExperimentConfig, workdir: Path) -> None:
    """Logs that the run has ended, and its last evaluation."""
    logger.info("step %d of %d: nothing is left to do", saved.step, config.train.steps)
    for row in metrics.evaluations(workdir)[-1:]:
        logger.info("%s", metrics.format_evaluation(row))
