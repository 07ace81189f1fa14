"""The table of what several configs cost."""

import logging
from collections.abc import Mapping

from research.recipes.experiment import ExperimentConfig
from research.recipes.run_cost import Cost, estimate

logger = logging.getLogger("tessera")


def print_costs(
    candidates: Mapping[str, ExperimentConfig],
    costs: Mapping[str, Cost],
    chosen_spec: str,
    chosen: ExperimentConfig,
) -> None:
    """Logs a line for each config.

    Args:
      candidates: the configs by `FILE.py[:arg]`.
      costs: of those that were timed, among them the chosen one.
      chosen_spec: the key of the chosen one.
      chosen: that config, which may have fewer steps than the candidate.
    """
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
