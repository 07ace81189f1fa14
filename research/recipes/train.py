"""`tessera train`: data, model, state, step, evaluation, run."""

import argparse
import contextlib
import functools
import logging
import signal
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from research.core.errors import Interrupted
from research.core.random import key_for
from research.core.trees import count
from research.data.batch import Batch
from research.data.loader import Loader
from research.data.objectives import encoder_length
from research.models.flops import train_flops_per_token
from research.parallel import distributed
from research.parallel.rules import process_rows
from research.recipes import workdir as workdirs
from research.recipes.experiment import ExperimentConfig, add_config_argument, load_experiment
from research.recipes.inputs import heldout_rows, make_loader, prepare_data
from research.scaling.devices import peak_flops
from research.storage.paths import Path, as_path
from research.training import loop, metrics
from research.training.checkpoints import Checkpoints
from research.training.clock import Clock
from research.training.evaluation import evaluate
from research.training.plots import plot_loss
from research.training.program import build_program
from research.training.self_check import check_attention
from research.training.state import TrainState
from research.training.step import place_batch

logger = logging.getLogger("tessera")

EXAMPLES = """\
  tessera train --config=configs/pretrain/stdlib.py --workdir=runs/stdlib
  tessera train --config=configs/pretrain/stdlib.py --workdir=runs/short --config.train.steps=150
  tessera train --config=configs/pretrain/stdlib.py --workdir=runs/muon --config.optim.name=muon"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this verb."""
    add_config_argument(parser)
    parser.add_argument("--workdir", required=True, help="folder of the run; a run that was stopped goes on there")


def main(arguments: argparse.Namespace) -> None:
    """Runs the verb."""
    previous = signal.signal(signal.SIGTERM, _stop_outside_of_the_loop)
    try:
        workdir = as_path(arguments.workdir, "--workdir")
        train(load_experiment(arguments.config, arguments.overrides), workdir)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop_outside_of_the_loop(number: int, frame: Any) -> None:
    """The loop has a handler of its own; before and after it there is nothing that must be saved."""
    raise Interrupted("stopped by SIGTERM outside of the steps; the same command goes on from the last checkpoint")


def train(config: ExperimentConfig, workdir: Path) -> TrainState:
    """Trains to the last step, from the newest checkpoint where there is one, and returns the final state.

    Raises:
      UserError: a config that does not fit the data, the devices or the workdir.
      training.loop.Interrupted: a signal stopped it; its state is saved.
    """
    clock = Clock()
    with clock.measure("compile"):
        distributed.initialize(config.distributed)
        program = build_program(config.model, config.optim, config.train, config.mesh, objective=config.data.objective)
        part = process_rows(program.batch["tokens"].sharding, config.train.batch_size)
        workdirs.check(workdir, config)
    with clock.measure("data"):
        prepared = prepare_data(config)
        loader = make_loader(config, prepared, part)
    logger.info("model: %s parameters on %d device(s)", f"{count(program.state.params):,}", program.mesh.size)
    with clock.measure("checkpoint"):
        checkpoints = Checkpoints(workdir, config.checkpoint)
        state, owed = _restore(checkpoints, program.state, loader, workdir)
        if state is not None and int(state.step) >= config.train.steps and not owed:
            logger.info("step %d of %d: nothing is left to do", state.step, config.train.steps)
            for row in metrics.evaluations(workdir)[-1:]:
                logger.info("%s", metrics.format_evaluation(row))
            checkpoints.close()
            return state
    with contextlib.ExitStack() as held:  # the lock is let go of last
        with clock.measure("checkpoint"):
            held.enter_context(workdirs.claim(workdir, config, prepared.tokenizer))
            held.callback(checkpoints.close)
        with clock.measure("compile"):
            if state is None:
                state = program.create(key_for(config.train.seed, "init"))
            step, eval_step = program.compile_train_step(), program.compile_eval_step()
            writer = held.enter_context(metrics.MetricsWriter(workdir, int(state.step)))
        held.callback(loader.close)
        place = functools.partial(place_batch, like=program.batch)
        bytes_per_target = prepared.bytes_per_target if config.data.objective.predicts_all_text else None

        def held_out(state: TrainState) -> dict[str, float]:
            batches = map(place, heldout_rows(config, prepared, part))
            return evaluate(eval_step, state.eval_params(), batches, bytes_per_target)

        def check(state: TrainState, batch: Batch) -> None:
            if config.train.self_check:
                check_attention(config.model, state.params, batch, program.mesh)

        run = loop.Run(
            step, loader, place, check, held_out, checkpoints, writer, clock, _throughput(config, program.mesh)
        )
        state = loop.train(state, run, config.train, owed)
    logger.info("time: %s", clock.report())
    if jax.process_index() == 0:
        plot_loss(workdir)
    return state


def _restore(
    checkpoints: Checkpoints, abstract: TrainState, loader: Loader, workdir: Path
) -> tuple[TrainState | None, bool]:
    """Returns the newest good state, with the loader set to go on from it, and whether it must still be evaluated.

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


def _throughput(config: ExperimentConfig, mesh: jax.sharding.Mesh) -> loop.Throughput:
    length = config.train.sequence_length
    flops = train_flops_per_token(config.model, length, encoder_length(config.data.objective, length))
    peak = peak_flops(mesh.devices.flat[0].device_kind, config.model.dtype)
    return loop.Throughput(flops, None if peak is None else peak * mesh.size, mesh.size)
