"""`tessera train --time-budget`: the first of several configs whose steps end in time."""

import logging
import math
import time
from collections.abc import Mapping, Sequence

import psutil

from research.core.errors import UserError
from research.recipes import workdir as workdirs
from research.recipes.cost_table import print_costs
from research.recipes.experiment import ExperimentConfig, load_experiment
from research.recipes.run_cost import Cost, estimate, measure, with_steps
from research.storage.paths import Path

logger = logging.getLogger("tessera")

# A config is timed where its FLOPs say that it takes at most so many times what is left: larger
# models reach more FLOPs a second, so the estimate from a smaller one is too long.
ESTIMATE_ALLOWANCE = 1.5


def elapsed() -> float:
    """Returns the seconds since this process began."""
    return time.time() - psutil.Process().create_time()


def choose(
    specs: Sequence[str], overrides: Sequence[tuple[str, str]], budget: float, workdir: Path
) -> ExperimentConfig:
    """Returns the first config whose run ends within the budget; if none does, the last one with
    as many steps as do. A workdir that has a run keeps what was chosen for it.

    Args:
      specs: `FILE.py[:arg]`, the preferred one first and the cheapest one last.
      overrides: dotted names and values, of each of them.
      budget: seconds, counted from the start of this process.
      workdir: of the run.

    Raises:
      UserError: the budget is no finite number of seconds or too small for one step, or the run has
          several processes.
    """
    if not budget > 0:
        raise UserError("time_budget", budget, "must be above 0 seconds.")
    if math.isinf(budget):
        raise UserError("time_budget", budget, "must be finite.")
    preferred, *fallbacks = specs
    candidates = {preferred: load_experiment(preferred, overrides)}
    for spec in fallbacks:
        candidates[spec] = _load_fallback(spec, overrides)
    if any(config.distributed.initialize for config in candidates.values()):
        # Each process would time its own steps and choose alone.
        raise UserError("time_budget", constraint="is for one process, not for several.")
    chosen = _chosen_before(candidates, workdir)
    if chosen is not None:
        unit = "step" if chosen.train.steps == 1 else "steps"
        logger.info(
            "time budget: %s keeps its %d %s; to start anew, delete it, or give another --workdir",
            workdir,
            chosen.train.steps,
            unit,
        )
        return chosen

    costs = _time_candidates(candidates, budget)
    for spec, config in candidates.items():
        if spec in costs and elapsed() + costs[spec].seconds(config) <= budget:
            chosen = config
            break
    else:
        # The last one is always timed.
        chosen = with_steps(config, _affordable_steps(config, costs[spec], budget))
    logger.info("time budget: %.0f s, of which %.0f s are spent", budget, elapsed())
    print_costs(candidates, costs, spec, chosen)
    return chosen


def _time_candidates(candidates: Mapping[str, ExperimentConfig], budget: float) -> dict[str, Cost]:
    """Returns the costs of the last config, and of those before it that may end in time by their
    FLOPs.
    """
    *larger, cheapest = candidates
    costs = {cheapest: measure(candidates[cheapest])}

    # Upwards from the cheapest one: timing a config that is too large can take the whole budget.
    timed = cheapest
    for spec in reversed(larger):
        config = candidates[spec]
        estimated = estimate(config, candidates[timed], costs[timed])
        if estimated.seconds(config) <= ESTIMATE_ALLOWANCE * (budget - elapsed()):
            costs[spec] = measure(config)
            timed = spec
    return costs


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
