"""Some consecutive layers of a stack, as the stages of a pipeline have them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from research.models.cache import LayerCache
from research.models.config import LayerConfig
from research.models.context import Context
from research.models.layer_loops import Hidden, LayerGroup, LayerOutput
from research.parallel.stages import LayerRange


def layers_in_places(group: LayerGroup, params: Any, own: LayerRange) -> LayerGroup:
    """Returns consecutive layers of a group, whose parameters are at hand.

    Args:
      group: all layers.
      params: of the places of these layers, with a leading axis. After the last layer there may be
        places without one: they are run, and nothing is kept of them.
      own: which layers they are; the first of them begins a round of the pattern.
    """
    any_leaf = jax.tree.leaves(params)[0]
    places = any_leaf.shape[0]
    # 3 places of a pattern of 2: its configs 0, 1 and 0
    configs = []
    for place in range(places):
        in_round = place % group.period
        configs.append(group.layer_configs[in_round])
    part = dataclasses.replace(
        group,
        start_index=group.start_index + own.first,
        names=("layers",) * places,
        layer_configs=tuple(configs),
        params=params,
    )
    if own.count is None:
        return part

    def apply(
        config: LayerConfig, params: Any, x: Hidden, cache: LayerCache | None, context: Context
    ) -> LayerOutput:
        params, is_layer = params
        y, cache, report = group.apply(config, params, x, cache, context)
        y = jnp.where(is_layer, y, x)
        no_report = jax.tree.map(jnp.zeros_like, report)
        report = jax.tree.map(functools.partial(jnp.where, is_layer), report, no_report)
        return y, cache, report

    is_layer = jnp.arange(places) < own.count
    return dataclasses.replace(part, apply=apply, params=(params, is_layer))
