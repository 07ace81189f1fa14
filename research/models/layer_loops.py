"""How the layers of a stack are run: one after the other, or in a loop over stacked parameters.

A stack is handed one of these strategies. It gets the stream of the whole batch, so it may also cut
the batch into microbatches, as a pipeline does. The parameters on disk are the same for all of them
(`models.layer_stack`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.models.attention import Context
from research.models.cache import LayerCache
from research.models.config import LayerConfig
from research.models.reports import LayerReport

Stream = Float[Array, "B T D"]
# The stream, the layer's cache and its report.
LayerOutput = tuple[Stream, LayerCache | None, LayerReport]
# The same of several layers; reports are named as their parameters are.
LayersOutput = tuple[Stream, tuple[LayerCache, ...] | None, dict[str, LayerReport]]


@dataclasses.dataclass(frozen=True)
class Layers:
    """Layers that follow each other in a stack.

    Attributes:
      first: the index in the stack of the first of them.
      names: of the parameters of each layer, where each has its own.
      kinds: what each layer does.
      period: after how many layers the kinds repeat.
      blocks: the layers as functions, where each has parameters of its own.
      apply: a layer of a kind as a function of its parameters.
      params: of all layers, with a leading layer axis; None where each has its own.
      remat: what `jax.checkpoint` keeps of a layer; None keeps everything.
    """

    first: int
    names: tuple[str, ...]
    kinds: tuple[LayerConfig, ...]
    period: int
    blocks: Sequence[Callable[[Stream, LayerCache | None, Context], LayerOutput]]
    apply: Callable[[LayerConfig, Any, Stream, LayerCache | None, Context], LayerOutput]
    params: Any
    remat: Callable[..., bool] | None


@runtime_checkable
class LayerLoop(Protocol):
    """A way to run layers."""

    def run(
        self, layers: Layers, x: Stream, caches: tuple[LayerCache, ...] | None, context: Context
    ) -> LayersOutput:
        """Returns the stream behind the layers, their caches in the form given, and their reports.

        Args:
          layers: at least one.
          x: the stream before them.
          caches: one a layer, or a single one with a leading layer axis where parameters are
              stacked; None without.
          context: of the stack.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Unrolled:
    """Each layer is compiled by itself, from parameters of its own."""

    def run(
        self, layers: Layers, x: Stream, caches: tuple[LayerCache, ...] | None, context: Context
    ) -> LayersOutput:
        """Returns what `LayerLoop.run` says."""
        new_caches, reports = [], {}
        for i, (name, block) in enumerate(zip(layers.names, layers.blocks, strict=True)):
            cache = None if caches is None else caches[i]
            x, cache, reports[name] = block(x, cache, with_layer_key(context, layers.first + i))
            new_caches.append(cache)
        return x, None if caches is None else tuple(new_caches), reports


@dataclasses.dataclass(frozen=True)
class Scanned:
    """One loop whose body is a round of the pattern; parameters, caches and reports have a leading
    layer axis.

    Layers after the last whole round are unrolled; only then are their parameters cut out of the
    stack, which copies them.
    """

    def run(
        self, layers: Layers, x: Stream, caches: tuple[LayerCache, ...] | None, context: Context
    ) -> LayersOutput:
        """Returns what `LayerLoop.run` says."""
        stacked = (layers.params, None if caches is None else caches[0])
        count = len(layers.kinds)
        whole = count - count % layers.period

        x, beside = _run_rounds(
            layers, x, jax.tree.map(lambda leaf: leaf[:whole], stacked), context
        )
        parts = [beside]
        for index in range(whole, count):
            x, beside = _run_alone(layers, x, _take(stacked, index), context, index)
            parts.append(jax.tree.map(lambda leaf: leaf[None], beside))

        if len(parts) == 1:
            cache, report = parts[0]
        else:
            cache, report = jax.tree.map(lambda *each: jnp.concatenate(each), *parts)
        return x, None if caches is None else (cache,), {"layers": report}


def with_layer_key(context: Context, index: int | Int[Array, ""]) -> Context:
    """Returns the context with the layer's own dropout key."""
    return (
        context
        if context.key is None
        else dataclasses.replace(context, key=jax.random.fold_in(context.key, index))
    )


def _run_rounds(layers: Layers, x: Stream, stacked: Any, context: Context) -> tuple[Stream, Any]:
    """Scans over whole rounds of the pattern; returns the stream, and caches and reports by layer.

    Args:
      stacked: (parameters, caches), `[layers of whole rounds, ...]`.
    """
    period = layers.period

    def one_round(x: Stream, turn: tuple[Array, Any]) -> tuple[Stream, Any]:
        number, leaves = turn
        beside = []
        for i, kind in enumerate(layers.kinds[:period]):
            params, cache = _take(leaves, i)
            own = with_layer_key(context, layers.first + number * period + i)
            x, *more = layers.apply(kind, params, x, cache, own)
            beside.append(tuple(more))
        return x, jax.tree.map(lambda *each: jnp.stack(each), *beside)

    if layers.remat is not None:
        one_round = jax.checkpoint(one_round, policy=layers.remat, prevent_cse=False)
    # [rounds * period, ...] -> [rounds, period, ...], and back.
    rounds = len(jax.tree.leaves(stacked)[0]) // period
    turns = jax.tree.map(lambda leaf: leaf.reshape(rounds, period, *leaf.shape[1:]), stacked)
    x, beside = jax.lax.scan(one_round, x, (jnp.arange(rounds), turns))
    return x, jax.tree.map(lambda leaf: leaf.reshape(rounds * period, *leaf.shape[2:]), beside)


def _run_alone(
    layers: Layers, x: Stream, own: Any, context: Context, index: int
) -> tuple[Stream, Any]:
    """Runs one layer behind the loop; returns the stream, and its cache and report."""

    def layer(x: Stream, own: Any) -> LayerOutput:
        params, cache = own
        return layers.apply(
            layers.kinds[index], params, x, cache, with_layer_key(context, layers.first + index)
        )

    if layers.remat is not None:
        layer = jax.checkpoint(layer, policy=layers.remat)
    x, *more = layer(x, own)
    return x, tuple(more)


def _take(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)
