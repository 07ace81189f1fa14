"""Flags of `tessera train` for a run that must end in time."""

import argparse

from research.core.errors import UserError
from research.recipes.experiment import ExperimentConfig, load_experiment
from research.recipes.time_budget import choose
from research.storage.paths import Path


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a time budget."""
    parser.add_argument(
        "--time-budget",
        type=float,
        metavar="SECONDS",
        help="times a few steps, and takes as many as end in this time from the start",
    )
    parser.add_argument(
        "--fallback",
        action="append",
        default=[],
        metavar="FILE.py:ARG",
        help="config to take where --config does not end in time; may be repeated, cheapest last",
    )


def load_within_budget(arguments: argparse.Namespace, workdir: Path) -> ExperimentConfig:
    """Returns the config that was asked for, or the one that fits the time budget."""
    if arguments.time_budget is None and arguments.fallback:
        raise UserError("fallback", constraint="needs --time-budget.")
    if arguments.time_budget is None:
        return load_experiment(arguments.config, arguments.overrides)
    specs = [arguments.config, *arguments.fallback]
    return choose(specs, arguments.overrides, arguments.time_budget, workdir)
