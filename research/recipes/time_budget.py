"""`tessera train --time-budget`: the first of several configs whose steps end in time."""

import logging
import math
import time
from collections.abc import Mapping, Sequence

import psutil

from research.core.errors import UserError
from research.recipes import workdir as workdirs
from research.recipes.experiment import ExperimentConfig, load_experiment
from research.recipes.run_cost import Cost, estimate, measure, with_steps
from research.storage.paths import Path

logger = logging.getLogger("tessera")


def elapsed() -> float:
    """Returns the seconds since this process began."""
    return time.time() - psutil.Process().create_time()


def choose(
    specs: Sequence[str], overrides: Sequence[tuple[str, str]], budget: float, workdir: Path
) -> ExperimentConfig:
    """Returns the first config whose run ends within the budget; if none does, the last one with
    as many steps as do. A workdir that has a run keeps what was chosen for it.

    Args:
      specs: `FILE.py[:arg]`, the preferred one first.
      overrides: dotted names and values, of each of them.
      budget: seconds, counted from the start of this process.
      workdir: of the run.

    Raises:
      UserError: the budget is too small for one step, or the run has several processes.
    """
    if not budget > 0:
        raise UserError("time_budget", budget, "must be above 0 seconds.")
    preferred, *fallbacks = specs
    candidates = {preferred: load_experiment(preferred, overrides)}
    for spec in fallbacks:
        candidates[spec] = _load_fallback(spec, overrides)
    if any(config.distributed.initialize for config in candidates.values()):
        # Each process would time its own steps and choose alone.
        raise UserError("time_budget", constraint="is for one process, not for several.")
    chosen = _chosen_before(candidates, workdir)
    if chosen is not None:
        logger.info("time budget: %s keeps its %d steps", workdir, chosen.train.steps)
        return chosen

    costs: dict[str, Cost] = {}
    for spec, config in candidates.items():
        costs[spec] = measure(config)
        if elapsed() + costs[spec].seconds(config) <= budget:
            chosen = config
            break
    else:
        spec, config = list(candidates.items())[-1]
        chosen = with_steps(config, _affordable_steps(config, costs[spec], budget))
    _print_table(candidates, costs, spec, chosen, budget)
    return chosen


def _load_fallback(spec: str, overrides: Sequence[tuple[str, str]]) -> ExperimentConfig:
    """Returns the config of `--fallback`, which its errors name."""
    try:
        return load_experiment(spec, overrides)
    except UserError as error:
        if error.field != "config":
            raise
        raise UserError("fallback", error.value, error.constraint) from error


def _chosen_before(
    candidates: Mapping[str, ExperimentConfig], workdir: Path
) -> ExperimentConfig | None:
    """Returns the config of the workdir's run if it was made from one of the candidates."""
    if not (workdir / "config.json").exists():
        return None
    stored = workdirs.read_config(workdir)
    if "train" not in stored:  # a converted model
        return None
    steps = stored["train"]["steps"]
    for config in candidates.values():
        wanted = with_steps(config, steps)
        if workdirs.difference(workdir, wanted) is None:
            return wanted
    return None


def _affordable_steps(config: ExperimentConfig, cost: Cost, budget: float) -> int:
    """Returns the steps of a run that ends within the budget."""
    for steps in range(config.train.steps, 0, -1):
        if elapsed() + cost.seconds(with_steps(config, steps)) <= budget:
            return steps
    least = elapsed() + cost.seconds(with_steps(config, 1))
    raise UserError(
        "time_budget",
        budget,
        f"is too small for one step: what comes before it took {elapsed():.0f} s, and compiling, "
        f"a step and an evaluation take {least - elapsed():.0f} s. "
        f"Give at least {math.ceil(least)}.",
    )


def _print_table(
    candidates: Mapping[str, ExperimentConfig],
    costs: Mapping[str, Cost],
    chosen_spec: str,
    chosen: ExperimentConfig,
    budget: float,
) -> None:
    logger.info("time budget: %.0f s, of which %.0f s are spent", budget, elapsed())
    width = max(map(len, candidates))
    logger.info("  %-*s  parameters  steps    s/step  seconds", width, "config")
    for spec, config in candidates.items():
        is_chosen = spec == chosen_spec
        if is_chosen:
            config = chosen
        cost = costs.get(spec) or estimate(config, candidates[chosen_spec], costs[chosen_spec])
        columns = (
            f"{spec:{width}}",
            f"{cost.parameters:10,}",
            f"{config.train.steps:5}",
            f"{cost.step:8.3f}",
            f"{cost.seconds(config):7.0f}",
        )
        note = "" if cost.timed else "  estimated by FLOPs"
        mark = "  <- chosen" if is_chosen else note
        logger.info("  %s%s", "  ".join(columns), mark)
