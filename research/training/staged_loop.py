"""Runs the layers of a stack on the stages of a pipeline, microbatch by microbatch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from research.models.cache import LayerCache
from research.models.context import Context
from research.models.layer_loops import (
    Hidden,
    LayerGroup,
    LayersOutput,
    Scanned,
)
from research.models.layer_places import layers_in_places
from research.models.reports import LayerReport
from research.parallel.stage_loop import run_stages
from research.parallel.stages import LayerRange, StageSplit


@dataclasses.dataclass(frozen=True)
class StagedLoop:
    """A pipeline as a strategy for the layers of a stack; embeddings and heads are outside.

    Each microbatch has its own dropout, which is not the one that it has without stages.

    Attributes:
      devices: along `pipeline`.
      microbatches: that the batch is cut into.
    """

    devices: int
    microbatches: int

    def run(
        self, group: LayerGroup, x: Hidden, caches: tuple[LayerCache, ...] | None, context: Context
    ) -> LayersOutput:
        """Implements `LayerLoop.run`."""
        assert caches is None, "a pipeline keeps no keys and values"
        num_layers = len(group.layer_configs)
        split = StageSplit(num_layers, group.period, self.devices)
        rows = x.shape[0]

        def run_stage(
            layers: Any, own: LayerRange, x: Hidden, context: Context, index: Int[Array, ""]
        ) -> tuple[Hidden, LayerReport]:
            stage = layers_in_places(group, layers, own)
            own_context = self._context_of(context, rows, index)
            x, _, reports = Scanned().run(stage, x, None, own_context)
            return x, reports["layers"]

        # [B, T, D] -> [B / M, M, T, D] -> [M, B / M, T, D]: rows of a microbatch are those that
        # it has without stages.
        grouped = self._grouped(x)
        by_microbatch = jnp.swapaxes(grouped, 0, 1)
        y, report = run_stages(
            split, run_stage, group.params, by_microbatch, context, group.hidden_axes
        )
        y = jnp.swapaxes(y, 0, 1)
        y = y.reshape(x.shape)

        # Counts add up over microbatches; the router loss is a mean over each.
        mean_loss = report.router_loss / self.microbatches
        report = dataclasses.replace(report, router_loss=mean_loss)
        return y, None, {"layers": report}

    def _grouped(self, x: Shaped[Array, "B *rest"]) -> Shaped[Array, "BM M *rest"]:
        """Returns rows in groups of one for each microbatch."""
        return x.reshape(-1, self.microbatches, *x.shape[1:])

    def _context_of(self, context: Context, rows: int, index: Int[Array, ""]) -> Context:
        """Returns the context of a microbatch: its rows of every array that has all of them."""

        def of_microbatch(leaf: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
            if leaf.ndim == 0 or leaf.shape[0] != rows:
                return leaf
            grouped = self._grouped(leaf)
            return grouped[:, index]

        key = context.key
        context = dataclasses.replace(context, key=None)
        context = jax.tree.map(of_microbatch, context)
        if key is not None:
            key = jax.random.fold_in(key, index)
        return dataclasses.replace(context, key=key)
