"""How the layers of a stack are run: unrolled one after the other, traced once for all of them, or
scanned over stacked parameters.

A stack is given one of these strategies. It gets the hidden states of the whole batch, so it may
also cut the batch into microbatches, as a pipeline does. The parameters on disk are the same for
all of them (`models.canonical_params`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.models.cache import LayerCache
from research.models.config import LayerConfig
from research.models.context import Context
from research.models.reports import LayerReport

Hidden = Float[Array, "B T D"]
# The hidden states, the layer's cache and its report.
LayerOutput = tuple[Hidden, LayerCache | None, LayerReport]
BlockFn = Callable[[Hidden, LayerCache | None, Context], LayerOutput]
# One per layer; where parameters are stacked, one per place of the pattern, with a leading axis of
# the layers there.
Caches = tuple[LayerCache, ...] | None
# What rounds of the pattern hand on.
Carry = tuple[Hidden, Caches]
# The same of several layers; reports are named as their parameters are.
LayersOutput = tuple[Hidden, Caches, dict[str, LayerReport]]


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers of a stack.

    Attributes:
      start_index: the index in the stack of the first of them.
      names: of the parameters of each layer, where each has its own.
      layer_configs: one per layer.
      period: after how many layers the configs repeat.
      blocks: the layers as functions, where each has parameters of its own.
      apply: a layer with this config as a function of its parameters.
      params: of all layers, with a leading layer axis; None where each has its own.
      own_params: of each layer, where each has its own.
      remat: the policy of `jax.checkpoint`; None: no checkpoint. `Scanned` applies it to one round
          of the pattern (`period` layers) at a time, and to each layer after the scan. `Unrolled`
          ignores it: its blocks are wrapped in `nn.remat` already.
      hidden_axes: the logical axes of the hidden states between layers.
    """

    start_index: int | Int[Array, ""]
    names: tuple[str, ...]
    layer_configs: tuple[LayerConfig, ...]
    period: int
    blocks: Sequence[BlockFn]
    apply: Callable[[LayerConfig, Any, Hidden, LayerCache | None, Context], LayerOutput]
    params: Any
    own_params: Sequence[Any]
    remat: Callable[..., bool] | None
    hidden_axes: tuple[str, str, str] = ("batch", "length", "embed")


@runtime_checkable
class LayerLoop(Protocol):
    """A way to run layers."""

    def run(self, group: LayerGroup, x: Hidden, caches: Caches, context: Context) -> LayersOutput:
        """Returns the hidden states after the layers, their caches in the form given, and their
        reports.

        Args:
          group: at least one layer.
          x: the hidden states before them.
          caches: of the layers; None without a cache.
          context: of the stack.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Unrolled:
    """A Python loop: every layer is traced into the program, with parameters of its own."""

    def run(self, group: LayerGroup, x: Hidden, caches: Caches, context: Context) -> LayersOutput:
        """Implements `LayerLoop.run`."""
        new_caches = []
        reports = {}
        for i, (name, block) in enumerate(zip(group.names, group.blocks, strict=True)):
            cache = None if caches is None else caches[i]
            layer_context = with_layer_key(context, group.start_index + i)
            x, new_cache, report = block(x, cache, layer_context)
            new_caches.append(new_cache)
            reports[name] = report

        if caches is None:
            return x, None, reports
        return x, tuple(new_caches), reports


@dataclasses.dataclass(frozen=True)
class TracedOnce:
    """Layers with parameters of their own as calls of one function: Python runs through a layer
    once for all layers that are alike. They compute what those of `Unrolled` do.

    Programs begin sooner: a step of an engine is one. The layers are no submodules here, so that
    nothing that looks into modules sees them. Stacked parameters are scanned.
    """

    def run(self, group: LayerGroup, x: Hidden, caches: Caches, context: Context) -> LayersOutput:
        """Implements `LayerLoop.run`."""
        if group.params is not None:
            return Scanned().run(group, x, caches, context)
        apply = jax.jit(group.apply, static_argnums=0)

        def bind(layer_config: LayerConfig, params: Any) -> BlockFn:
            return functools.partial(apply, layer_config, params)

        blocks = tuple(map(bind, group.layer_configs, group.own_params))
        return Unrolled().run(dataclasses.replace(group, blocks=blocks), x, caches, context)


@dataclasses.dataclass(frozen=True)
class Scanned:
    """`jax.lax.scan` over the rounds of the pattern: one round is compiled, whatever the depth.

    Parameters, caches and reports have a leading layer axis. The caches of all layers are carried
    from round to round, and each layer changes its own in place; scanned over, they would be
    copied. Each place of the pattern has a cache of its own, with the layers of all rounds: what
    layers keep may differ between places. Where the number of layers is no multiple of the
    pattern's length, the last layers are unrolled; only their parameters are sliced out of the
    stacked arrays, which copies them.
    """

    def run(self, group: LayerGroup, x: Hidden, caches: Caches, context: Context) -> LayersOutput:
        """Implements `LayerLoop.run`."""
        # 7 layers of a pattern of 3: layers 0 to 5 are scanned in two rounds, layer 6 is unrolled.
        num_layers = len(group.layer_configs)
        num_scanned = num_layers - num_layers % group.period
        scanned = jax.tree.map(lambda leaf: leaf[:num_scanned], group.params)
        x, caches, report = _scan_rounds(group, x, scanned, caches, context)

        reports = [report]
        for index in range(num_scanned, num_layers):
            params = _slice_layer(group.params, index)
            x, caches, report = _run_layer(group, x, params, caches, context, index)
            # A layer axis of length 1, to join the output of the scan.
            reports.append(jax.tree.map(lambda leaf: leaf[None], report))

        return x, caches, {"layers": _concatenate(reports)}


def with_layer_key(context: Context, index: int | Int[Array, ""]) -> Context:
    """Returns the context with the layer's own dropout key."""
    if context.key is None:
        return context
    return dataclasses.replace(context, key=jax.random.fold_in(context.key, index))


def _scan_rounds(
    group: LayerGroup, x: Hidden, params: Any, caches: Caches, context: Context
) -> tuple[Hidden, Caches, LayerReport]:
    """Scans over whole rounds of the pattern; returns the hidden states, the caches, and reports
    with a leading layer axis.

    Args:
      params: with a leading layer axis, a multiple of the pattern's length.
      caches: of all layers of the group.
    """
    period = group.period
    num_layers = len(jax.tree.leaves(params)[0])
    num_rounds = num_layers // period

    def run_round(carry: Carry, round_input: tuple[Array, Any]) -> tuple[Carry, LayerReport]:
        x, caches = carry
        round_index, round_params = round_input
        reports = []
        for i, layer_config in enumerate(group.layer_configs[:period]):
            params = _slice_layer(round_params, i)
            index = round_index * period + i
            layer_context = with_layer_key(context, group.start_index + index)
            own = None if caches is None else caches[i].layer(round_index)
            x, own, report = group.apply(layer_config, params, x, own, layer_context)
            caches = _put(caches, i, round_index, own)
            reports.append(report)

        # The scan's output of one round has a leading axis of `period` layers.
        return (x, caches), jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports)

    if group.remat is not None:
        # Inside a scan, common subexpressions are not merged anyway.
        run_round = jax.checkpoint(run_round, policy=group.remat, prevent_cse=False)

    # [num_layers, ...] -> [num_rounds, period, ...]: scan takes one round per step.
    def split_rounds(leaf: Array) -> Array:
        return leaf.reshape(num_rounds, period, *leaf.shape[1:])

    by_round = jax.tree.map(split_rounds, params)
    round_indices = jnp.arange(num_rounds)
    (x, caches), reports = jax.lax.scan(run_round, (x, caches), (round_indices, by_round))

    # [num_rounds, period, ...] -> [num_layers, ...]
    def join_rounds(leaf: Array) -> Array:
        return leaf.reshape(num_layers, *leaf.shape[2:])

    return x, caches, jax.tree.map(join_rounds, reports)


def _run_layer(
    group: LayerGroup,
    x: Hidden,
    params: Any,
    caches: Caches,
    context: Context,
    index: int,
) -> tuple[Hidden, Caches, LayerReport]:
    """Runs one layer after the scan; returns the hidden states, the caches of all layers and its
    report.

    Args:
      params: of the layer.
      caches: of all layers of the group.
      index: of the layer, in the group.
    """

    def run(x: Hidden, params: Any, cache: LayerCache | None) -> LayerOutput:
        layer_context = with_layer_key(context, group.start_index + index)
        return group.apply(group.layer_configs[index], params, x, cache, layer_context)

    if group.remat is not None:
        run = jax.checkpoint(run, policy=group.remat)
    # Layer 7 of a pattern of 3 is at place 1, the third one there.
    round_index, place = divmod(index, group.period)
    own = None if caches is None else caches[place].layer(round_index)
    x, own, report = run(x, params, own)
    return x, _put(caches, place, round_index, own), report


def _put(
    caches: Caches, place: int, round_index: int | Int[Array, ""], own: LayerCache | None
) -> Caches:
    """Returns the caches with that of one layer, at a place of the pattern, put into them."""
    if caches is None:
        return None
    return (*caches[:place], caches[place].put(round_index, own), *caches[place + 1 :])


def _slice_layer(stacked: Any, index: int) -> Any:
    """Returns the leaves of one layer: [layers, ...] -> [...]."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def _concatenate(parts: list[Any]) -> Any:
    """Returns trees joined along their leading layer axis: [6, ...], [1, ...] -> [7, ...]."""
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
