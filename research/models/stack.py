"""Layers on top of each other: what an encoder, a decoder and both of an encoder-decoder are made of."""

import dataclasses
import math
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
from research.models.layers import Embedding, Norm
from research.models.positions import distance_buckets, document_lengths, rounded_alibi, sinusoidal
from research.models.reports import LayerReport, LayerReports, collect_reports
from research.parallel.rules import constrain
from research.parallel.target import platform

_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def scans_layers(config: ModelConfig) -> bool:
    """Whether the layers are one scanned block: XLA for CPU runs the body of a loop at about half speed."""
    if config.layer_loop == "auto":
        return platform() != "cpu"
    return config.layer_loop == "scan"


def layer_name(config: ModelConfig, index: int) -> str:
    """Returns the name of an unrolled layer's parameters: `first_layers_i`, then `layers_i`, each from 0."""
    first = len(config.first_layers)
    return f"first_layers_{index}" if index < first else f"layers_{index - first}"


class Stack(nn.Module):
    """Embedded tokens in, hidden states out: positions, layers, the final norm.

    The layers of `pattern` are one loop where layers are scanned; the first layers, which may be built otherwise, are
    always unrolled.

    Attributes:
      config: the model, or `ModelConfig.encoder()` of it.
      bare: whether to leave its layers out, whose parameters `init_params` makes one by one.
    """

    config: ModelConfig
    bare: bool = False

    def setup(self) -> None:
        self.setup_stack()

    def setup_stack(self) -> None:
        """Makes the submodules, for `setup` of this class and of those that are more than a stack."""
        c = self.config
        if c.position.kind == "learned":
            rows = c.max_length + c.position.offset
            self.position_embed = Embedding(rows, c.embed_dim, ("positions", "embed"), c.init_stddev)
        if c.position.kind == "buckets":
            names = ("buckets", "heads")
            self.position_bias = Embedding(c.position.num_buckets, c.attention.num_heads, names, c.init_stddev)
        if c.embedding.num_types:
            self.type_embed = Embedding(c.embedding.num_types, c.embed_dim, ("types", "embed"), c.init_stddev)
        if c.embedding.norm:
            self.embed_norm = Norm(c.norm)
        self.embed_dropout = nn.Dropout(c.dropout)
        kinds, first = ((), 0) if self.bare else (c.layers(), len(c.first_layers))
        block: Any = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=_REMAT_POLICIES[c.remat])
        self.first_layers = [block(c, kind) for kind in kinds[:first]]
        if not scans_layers(c):
            self.layers = [block(c, kind) for kind in kinds[first:]]
        if c.norm.placement != "post":
            self.final_norm = Norm(c.norm)

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
        """Returns the hidden states, the cache with these tokens in it, and what the layers tell beside them."""
        c = self.config
        x = self._place(x, positions, types)
        drop_key = None if key is None else jax.random.fold_in(key, 0)
        x = self.embed_dropout(x.astype(c.dtype), deterministic=key is None, rng=drop_key)
        x = constrain(x, ("batch", "length", "embed"))
        context = dataclasses.replace(
            self.context(positions, mask, cache),
            memory=memory,
            memory_mask=memory_mask,
            key=None if key is None else jax.random.fold_in(key, 1),
        )
        x, cache, reports = self._layers(x, cache, context)
        x = self.final_norm(x) if c.norm.placement != "post" else x
        return x, cache, collect_reports(reports)

    def context(self, positions: Int[Array, "B T"], mask: AttentionMask, cache: Cache | None) -> Context:
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

    def _place(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], types: Int[Array, "B T"] | None
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
        """Returns what is added to the scores of all layers, if anything: by distance (T5), or by key (Falcon-RW)."""
        c, slots = self.config, None if cache is None else cache.slots
        query_places, key_places = _places(context, slots)
        if c.position.kind == "alibi_bfloat16":
            keys = context.positions if slots is None else key_places
            return rounded_alibi(keys, c.attention.num_heads, c.attention.head_dim)
        if c.position.kind != "buckets":
            return None
        # Raffel et al. 2020, arXiv:1910.10683, section 2.1: learned, and shared by all layers.
        distances = key_places[:, None, :] - query_places[:, :, None]
        buckets = distance_buckets(c.position, distances, bidirectional=not context.mask.causal)
        return jnp.moveaxis(self.position_bias(buckets), -1, 1)

    def _layers(
        self, x: Float[Array, "B T D"], cache: Cache | None, context: Context
    ) -> tuple[Float[Array, "B T D"], Cache | None, dict[str, LayerReport]]:
        """Returns the stream, the cache, and the report of each layer by the name of its parameters."""
        blocks = [*self.first_layers, *(() if scans_layers(self.config) else self.layers)]
        caches, reports = [], {}
        for index, block in enumerate(blocks):
            layer_cache = None if cache is None else cache.layers[index]
            x, layer_cache, report = block(x, layer_cache, _at_layer(context, index))
            caches.append(layer_cache)
            reports[layer_name(self.config, index)] = report
        if scans_layers(self.config) and not self.bare and self.config.num_layers > len(blocks):
            stacked = None if cache is None else cache.layers[-1]
            x, stacked, reports["layers"] = self._scan(x, stacked, context)
            caches.append(stacked)
        return x, None if cache is None else cache.replace(layers=tuple(caches)), reports

    def _scan(
        self, x: Float[Array, "B T D"], cache: LayerCache | None, context: Context
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, LayerReport]:
        """Takes the stream through the layers of `pattern`.

        Their parameters, caches and reports have a leading layer axis.

        One turn of the loop is one round of the pattern. Layers after the last whole round are unrolled; only then are
        the others' parameters cut out of the stack, which copies them.
        """
        c, first = self.config, len(self.config.first_layers)
        count, period = c.num_layers - first, len(c.pattern)
        stacked = (self.get_variable("params", "layers"), cache)

        def layer(x: Any, leaves: Any, kind: LayerConfig, index: Any) -> tuple[Any, LayerCache | None, LayerReport]:
            params, layer_cache = leaves
            module = Block(c, kind, parent=None)
            return module.apply({"params": params}, x, layer_cache, _at_layer(context, first + index))

        def round_of(x: Any, leaves: Any) -> tuple[Any, tuple[LayerCache | None, LayerReport]]:
            (turn, leaves), beside = leaves, []
            for i, kind in enumerate(c.pattern):
                own = jax.tree.map(lambda leaf, i=i: leaf[i], leaves)
                x, *more = layer(x, own, kind, turn * period + i)
                beside.append(tuple(more))
            return x, jax.tree.map(lambda *each: jnp.stack(each), *beside)

        alone: Any = layer
        if c.remat != "none":
            policy = _REMAT_POLICIES[c.remat]
            round_of = jax.checkpoint(round_of, policy=policy, prevent_cse=False)
            alone = jax.checkpoint(layer, policy=policy, static_argnums=(2, 3))
        rounds = count // period
        whole = jax.tree.map(lambda leaf: leaf[: rounds * period].reshape(rounds, period, *leaf.shape[1:]), stacked)
        x, beside = jax.lax.scan(round_of, x, (jnp.arange(rounds), whole))
        parts = [jax.tree.map(lambda leaf: leaf.reshape(rounds * period, *leaf.shape[2:]), beside)]
        for index in range(rounds * period, count):
            own = jax.tree.map(lambda leaf, index=index: leaf[index], stacked)
            x, *more = alone(x, own, c.pattern[index - rounds * period], index)
            parts.append(jax.tree.map(lambda leaf: leaf[None], tuple(more)))
        cache, reports = jax.tree.map(lambda *each: jnp.concatenate(each), *parts) if len(parts) > 1 else parts[0]
        return x, cache, reports


def _at_layer(context: Context, index: Any) -> Context:
    """Returns the context with the layer's own key."""
    return context if context.key is None else dataclasses.replace(context, key=jax.random.fold_in(context.key, index))


def _places(context: Context, slots: int | None) -> tuple[Int[Array, "#B T"], Int[Array, "1 S"]]:
    """Returns where queries and keys stand, as far as distances go: in a row their indices, else their cache slots."""
    if slots is None:
        index = jnp.arange(context.positions.shape[1])[None]
        return index, index
    return context.positions, jnp.arange(slots)[None]
