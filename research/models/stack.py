"""Layers on top of each other: what an encoder, a decoder and both of an encoder-decoder are made
of.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from research.kernels.attention import AttentionMask
from research.models.attention import Context
from research.models.block import Block
from research.models.cache import Cache, LayerCache
from research.models.config import LayerConfig, ModelConfig
from research.models.layer_loops import LayerLoop, Layers, Scanned, Unrolled
from research.models.layers import Embedding, Norm
from research.models.positions import distance_buckets, document_lengths, rounded_alibi, sinusoidal
from research.models.reports import LayerReport, LayerReports, collect_reports
from research.parallel.rules import constrain

_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def resolve_layer_loop(config: ModelConfig, platform: str) -> ModelConfig:
    """Returns the config with `layer_loop = "auto"` decided: XLA for CPU runs the body of a loop at
    about half speed.

    Args:
      config: the model.
      platform: `cpu`, `gpu` or `tpu`, which its programs are for.
    """
    if config.layer_loop != "auto":
        return config
    return dataclasses.replace(config, layer_loop="unroll" if platform == "cpu" else "scan")


def layer_name(config: ModelConfig, index: int) -> str:
    """Returns the name of an unrolled layer's parameters: `first_layers_i`, then `layers_i`, each
    from 0.
    """
    first = len(config.first_layers)
    return f"first_layers_{index}" if index < first else f"layers_{index - first}"


class Stack(nn.Module):
    """Embedded tokens in, hidden states out: positions, layers, the final norm.

    The first layers, which may be built otherwise, are always unrolled.

    Attributes:
      config: the model, or `ModelConfig.encoder()` of it.
      without_layers: builds no layers; `init_params` makes their parameters one by one.
      loop: how the layers of `pattern` are run; None unrolls them, or scans them where their
          parameters are stacked.
    """

    config: ModelConfig
    without_layers: bool = False
    loop: LayerLoop | None = None

    def setup(self) -> None:
        c = self.config
        if c.position.kind == "learned":
            rows = c.max_length + c.position.offset
            self.position_embed = Embedding(
                rows, c.embed_dim, ("positions", "embed"), c.init_stddev, c.param_dtype
            )
        if c.position.kind == "buckets":
            sizes = (c.position.num_buckets, c.attention.num_heads)
            self.position_bias = Embedding(
                *sizes, ("buckets", "heads"), c.init_stddev, c.param_dtype, "bias"
            )
        if c.embedding.num_types:
            sizes = (c.embedding.num_types, c.embed_dim)
            self.type_embed = Embedding(*sizes, ("types", "embed"), c.init_stddev, c.param_dtype)
        if c.embedding.norm:
            self.embed_norm = Norm(c.norm, param_dtype=c.param_dtype)
        self.embed_dropout = nn.Dropout(c.dropout)
        kinds, first = ((), 0) if self.without_layers else (c.layers(), len(c.first_layers))
        block: Any = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=_REMAT_POLICIES[c.remat])
        self.first_layers = [block(c, kind) for kind in kinds[:first]]
        stacked = self.has_variable("params", "layers")
        self.layers = [] if stacked else [block(c, kind) for kind in kinds[first:]]
        if c.norm.placement != "post":
            self.final_norm = Norm(c.norm, param_dtype=c.param_dtype)

    def run(
        self,
        x: Float[Array, "B T D"],
        mask: AttentionMask,
        positions: Int[Array, "B T"],
        cache: Cache | None,
        *,
        types: Int[Array, "B T"] | None,
        memory: Float[Array, "B M D"] | None,
        memory_mask: AttentionMask | None,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None, LayerReports]:
        """Returns the hidden states, the cache with these tokens in it, and what the layers tell
        beside them.
        """
        c = self.config
        x = self._add_positions(x, positions, types)
        drop_key = None if key is None else jax.random.fold_in(key, 0)
        x = self.drop_embedded(x.astype(c.dtype), drop_key)
        x = constrain(x, ("batch", "length", "embed"))
        context = dataclasses.replace(
            self.context(positions, mask, cache),
            memory=memory,
            memory_mask=memory_mask,
            key=None if key is None else jax.random.fold_in(key, 1),
        )
        x, cache, reports = self._run_layers(x, cache, context)
        x = self.final_norm(x) if c.norm.placement != "post" else x
        return x, cache, collect_reports(reports)

    def drop_embedded(
        self, x: Float[Array, "B T D"], key: Key[Array, ""] | None
    ) -> Float[Array, "B T D"]:
        """Drops entries of embeddings; without a key none."""
        return self.embed_dropout(x, deterministic=key is None, rng=key)

    def context(
        self, positions: Int[Array, "B T"], mask: AttentionMask, cache: Cache | None
    ) -> Context:
        """Returns what positions tell each layer, for `run` and for layers that come after it."""
        c = self.config
        scalings = [c.position_of(kind).scaling for kind in c.layers()]
        by_length = any(scaling is not None and scaling.by_length for scaling in scalings)
        context = Context(
            positions,
            mask,
            lengths=document_lengths(positions) if by_length else None,
            page_table=None if cache is None else cache.page_table,
        )
        return dataclasses.replace(context, bias=self._bias(context, cache))

    def _add_positions(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        types: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        c = self.config
        if c.scale_embeddings:
            x = x * math.sqrt(c.embed_dim)
        if c.position.kind == "learned":
            x = x + self.position_embed(positions + c.position.offset)
        elif c.position.kind == "sinusoidal":
            x = x + sinusoidal(positions, c.embed_dim, c.position.halves)
        if c.embedding.num_types:
            x = x + self.type_embed(jnp.zeros_like(positions) if types is None else types)
        return self.embed_norm(x) if c.embedding.norm else x

    def _bias(self, context: Context, cache: Cache | None) -> Float[Array, "#B N #T S"] | None:
        """Returns what is added to the scores of all layers, if anything: by distance (T5), or by
        key (Falcon-RW).
        """
        c, slots = self.config, None if cache is None else cache.slots
        query_positions, key_positions = _query_and_key_positions(context, slots)
        if c.position.kind == "alibi_bfloat16":
            keys = context.positions if slots is None else key_positions
            return rounded_alibi(keys, c.attention.num_heads, c.attention.head_dim)
        if c.position.kind != "buckets":
            return None
        # Raffel et al. 2020, arXiv:1910.10683, section 2.1: learned, and shared by all layers.
        distances = key_positions[:, None, :] - query_positions[:, :, None]
        buckets = distance_buckets(c.position, distances, bidirectional=not context.mask.causal)
        return jnp.moveaxis(self.position_bias(buckets), -1, 1)

    def _run_layers(
        self, x: Float[Array, "B T D"], cache: Cache | None, context: Context
    ) -> tuple[Float[Array, "B T D"], Cache | None, dict[str, LayerReport]]:
        """Returns the stream, the cache, and the reports of layers by the name of their
        parameters.
        """
        caches = None if cache is None else cache.layers
        new_caches: tuple[LayerCache, ...] = ()
        reports = {}
        for loop, layers in self._groups():
            count = 1 if layers.params is not None else len(layers.kinds)
            own = None if caches is None else caches[len(new_caches) : len(new_caches) + count]
            x, own, more = loop.run(layers, x, own, context)
            new_caches = new_caches if own is None else (*new_caches, *own)
            reports |= more
        return x, None if cache is None else cache.replace(layers=new_caches), reports

    def _groups(self) -> list[tuple[LayerLoop, Layers]]:
        """Returns the first layers and those of the pattern, each with the way to run them; without
        empty groups.
        """
        c = self.config
        kinds, first = c.layers(), len(c.first_layers)
        names = tuple(layer_name(c, index) for index in range(c.num_layers))
        remat = None if c.remat == "none" else _REMAT_POLICIES[c.remat]
        params = (
            self.get_variable("params", "layers") if self.has_variable("params", "layers") else None
        )

        def group(start: int, stop: int, blocks: Sequence[Block], params: Any) -> Layers:
            period = len(c.pattern)
            return Layers(
                start,
                names[start:stop],
                kinds[start:stop],
                period,
                blocks,
                self._apply,
                params,
                remat,
            )

        if self.without_layers:
            return []
        loop = self.loop
        if loop is None:
            loop = Unrolled() if params is None else Scanned()
        groups = [
            (Unrolled(), group(0, first, self.first_layers, None)),
            (loop, group(first, c.num_layers, self.layers, params)),
        ]
        return [(loop, layers) for loop, layers in groups if layers.kinds]

    def _apply(
        self,
        kind: LayerConfig,
        params: Any,
        x: Float[Array, "B T D"],
        cache: LayerCache | None,
        context: Context,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, LayerReport]:
        """Runs a layer of a kind on given parameters."""
        return Block(self.config, kind, parent=None).apply({"params": params}, x, cache, context)


def _query_and_key_positions(
    context: Context, slots: int | None
) -> tuple[Int[Array, "#B T"], Int[Array, "1 S"]]:
    """Returns where queries and keys stand, as far as distances go: in a row their indices, else
    their cache slots.
    """
    if slots is None:
        index = jnp.arange(context.positions.shape[1])[None]
        return index, index
    return context.positions, jnp.arange(slots)[None]
