"""`tessera train`: data, model, state, step, evaluation, run."""

import argparse
import contextlib
import functools
import logging
import signal
from typing import Any

import jax

from research.core.errors import Interrupted
from research.parallel.process_parts import process_rows
from research.recipes import workdir as workdirs
from research.recipes.agreement import join_processes
from research.recipes.budget_flags import add_budget_arguments, load_within_budget
from research.recipes.experiment import ExperimentConfig, add_config_argument
from research.recipes.inputs import make_loader, prepare_data
from research.recipes.resume import begin, is_done, log_done, restore, starting_params
from research.recipes.run_parts import (
    evaluation,
    first_batch_check,
    log_model,
    start_trackers,
    throughput,
)
from research.recipes.workdir_lock import lock
from research.storage.paths import Path, as_path
from research.training import loop
from research.training.checkpoints import Checkpoints
from research.training.clock import Clock
from research.training.language_model import language_model_program
from research.training.metrics import MetricsWriter
from research.training.plots import plot_loss
from research.training.program import Program
from research.training.state import TrainState
from research.training.step import shard_batch

logger = logging.getLogger("tessera")

EXAMPLES = """\
  tessera train --config=configs/pretrain/stdlib.py --workdir=runs/stdlib
  tessera train --config=configs/pretrain/stdlib.py --workdir=runs/short --config.train.steps=150
  tessera train --config=configs/pretrain/stdlib.py --workdir=runs/muon --config.optim.name=muon
  tessera train --config=configs/pretrain/stdlib.py --workdir=runs/ten --time-budget=600"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this verb."""
    add_config_argument(parser)
    parser.add_argument(
        "--workdir", required=True, help="folder of the run; a run that was stopped resumes there"
    )
    add_budget_arguments(parser)


def main(arguments: argparse.Namespace) -> None:
    """Runs the verb."""
    previous = signal.signal(signal.SIGTERM, _stop_outside_of_the_loop)
    try:
        workdir = as_path(arguments.workdir, "workdir")
        train(load_within_budget(arguments, workdir), workdir)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop_outside_of_the_loop(number: int, frame: Any) -> None:
    """Handles SIGTERM before and after the loop, which has its own handler: there is nothing to
    save.
    """
    raise Interrupted(
        "stopped by SIGTERM outside of the steps; the same command resumes from the last checkpoint"
    )


def train(config: ExperimentConfig, workdir: Path) -> TrainState:
    """Trains to the last step, resuming from the newest checkpoint, and returns the final state.

    Raises:
      UserError: a config that does not fit the data, the devices or the workdir.
      training.loop.Interrupted: a signal stopped it; its state is saved.
    """
    clock = Clock()
    with clock.measure("compile"):
        program = _program(config, workdir)
        workdirs.check(workdir, config)

    # Data: this process reads the part of each batch that its devices hold.
    with clock.measure("data"):
        prepared = prepare_data(config)
        part = process_rows(program.batch["tokens"].sharding, config.train.batch_size)
        loader = make_loader(config, prepared, part)
    log_model(program, config)

    # The newest checkpoint, where there is one.
    with clock.measure("checkpoint"):
        frozen_names = program.partition.frozen_names(program.saved.params)
        checkpoints = Checkpoints(workdir, config.checkpoint, frozen_names)
        saved, unfinished = restore(checkpoints, program.saved, loader, workdir)
    if is_done(saved, config) and not unfinished.evaluation:
        log_done(saved, config, workdir)
        checkpoints.close()
        return saved

    with contextlib.ExitStack() as stack:  # releases the lock last
        with clock.measure("checkpoint"):
            stack.enter_context(lock(workdir))
            stack.callback(checkpoints.close)
            stack.callback(loader.close)
            params = starting_params(program, saved, config, prepared.tokenizer)
        # Before anything is compiled: a missing key costs no time.
        trackers = stack.enter_context(start_trackers(config, workdir, prepared.tokenizer))

        with clock.measure("compile"):
            state, frozen = begin(program, saved, params, config)
            del saved, params  # its arrays are the state's now, or were copied into it
            step = program.compile_train_step()
            evaluate = evaluation(config, program, frozen, prepared, part)
            writer = stack.enter_context(MetricsWriter(workdir, int(state.step), trackers))
        run = loop.Run(
            step=step,
            frozen=frozen,
            stream=loader,
            shard_batch=functools.partial(shard_batch, like=program.batch),
            check=first_batch_check(config, program, frozen),
            evaluate=evaluate,
            saved=lambda state: program.merge(state, frozen),
            checkpoints=checkpoints,
            writer=writer,
            clock=clock,
            throughput=throughput(config, program.mesh),
        )
        state = loop.run_loop(state, run, config.train, unfinished)
    _report(clock, workdir)
    return run.saved(state)


def _program(config: ExperimentConfig, workdir: Path) -> Program:
    """Returns the programs of a run on the devices of all processes; nothing is compiled yet."""
    join_processes(config, workdir)
    return language_model_program(
        config.model, config.optim, config.train, config.mesh, objective=config.data.objective
    )


def _report(clock: Clock, workdir: Path) -> None:
    logger.info("time: %s", clock.report())
    if jax.process_index() == 0:
        plot_loss(workdir)
