"""`tessera train --time-budget`: the first of several configs whose steps end in time."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence

import psutil

from research.core.errors import UserError
from research.recipes import workdir as workdirs
from research.recipes.experiment import ExperimentConfig, load_experiment
from research.recipes.run_cost import Cost, estimate, measure
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
      UserError: the budget is too small for one step.
    """
    if not budget > 0:
        raise UserError("time_budget", budget, "must be above 0 seconds.")
    candidates = {spec: load_experiment(spec, overrides) for spec in specs}
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


def _chosen_before(
    candidates: Mapping[str, ExperimentConfig], workdir: Path
) -> ExperimentConfig | None:
    """Returns the config of the workdir's run if it was made from one of the candidates."""
    if not (workdir / "config.json").exists():
        return None
    kept = workdirs.read_config(workdir)
    for config in candidates.values():
        wanted = with_steps(config, kept["train"]["steps"])
        if workdirs.difference(kept, wanted) is None:
            return wanted
    return None


def with_steps(config: ExperimentConfig, steps: int) -> ExperimentConfig:
    """Returns the config of a run of so many steps; what it counts in steps shrinks likewise."""
    share = steps / config.train.steps

    def scaled(count: int) -> int:
        # 0 has a meaning of its own: no warm-up, or no evaluation but the last.
        return max(1, round(share * count)) if count else 0

    schedule = config.optim.schedule
    warmup_steps = min(scaled(schedule.warmup_steps), steps - 1)
    return dataclasses.replace(
        config,
        train=dataclasses.replace(
            config.train, steps=steps, eval_every=scaled(config.train.eval_every)
        ),
        optim=dataclasses.replace(
            config.optim,
            schedule=dataclasses.replace(
                schedule,
                warmup_steps=warmup_steps,
                decay_steps=min(scaled(schedule.decay_steps), steps - warmup_steps),
            ),
        ),
        checkpoint=dataclasses.replace(config.checkpoint, every=scaled(config.checkpoint.every)),
    )


def _affordable_steps(config: ExperimentConfig, cost: Cost, budget: float) -> int:
    """Returns the steps of a run that ends within the budget."""
    for steps in range(config.train.steps, 0, -1):
        if elapsed() + cost.seconds(with_steps(config, steps)) <= budget:
            return steps
    least = elapsed() + cost.seconds(with_steps(config, 1))
    raise UserError(
        "time_budget",
        f"{budget:g}",
        f"is too small for one step: what comes before it took {elapsed():.0f} s, and compiling, "
        f"a step and an evaluation take {least - elapsed():.0f} s. Give at least {least:.0f}.",
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
    logger.info("  %-*s  parameters  steps     s/step  seconds", width, "config")
    for spec, config in candidates.items():
        cost = costs.get(spec) or estimate(config, candidates[chosen_spec], costs[chosen_spec])
        if spec == chosen_spec:
            config = chosen
        logger.info(
            "  %-*s  %10s  %5d  %s%8.3f  %7.0f%s",
            width,
            spec,
            f"{cost.parameters:,}",
            config.train.steps,
            " " if cost.timed else "~",
            cost.step,
            cost.seconds(config),
            "  <- chosen" if spec == chosen_spec else "",
        )
