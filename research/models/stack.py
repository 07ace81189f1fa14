"""The stack: positions, layers and the final norm. A decoder is one, an encoder is one, and an
encoder-decoder has two.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from research.kernels.attention import AttentionMask
from research.models.block import Block
from research.models.cache import Cache, LayerCache
from research.models.config import LayerConfig, ModelConfig
from research.models.context import Context
from research.models.layer_loops import LayerGroup, LayerLoop, Scanned, Unrolled
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
    """Returns the config with `layer_loop = "auto"` decided: XLA for CPU runs a loop at about half
    the speed of unrolled layers.

    Args:
      config: the model.
      platform: `cpu`, `gpu` or `tpu`, which its programs are for.
    """
    if config.layer_loop != "auto":
        return config
    layer_loop = "unroll" if platform == "cpu" else "scan"
    return dataclasses.replace(config, layer_loop=layer_loop)


def layer_name(config: ModelConfig, index: int) -> str:
    """Returns the name of an unrolled layer's parameters: `first_layers_i`, then `layers_i`, each
    from 0.
    """
    num_first = len(config.first_layers)
    if index < num_first:
        return f"first_layers_{index}"
    return f"layers_{index - num_first}"


class Stack(nn.Module):
    """Embedded tokens in, hidden states out: positions, layers, the final norm.

    Layers are in two groups. `config.first_layers` may have other parameters than the rest and are
    always unrolled, from the parameters `first_layers_0`, `first_layers_1`, … The layers of
    `config.pattern` all have parameters of the same shapes. They are either unrolled, from
    `layers_0`, `layers_1`, …, or their parameters are stacked under `layers` with a leading layer
    axis: then `Scanned` runs them. Only unrolled layers are submodules. Stacked parameters are read
    as arrays, and a `Block` without a parent is applied to the slice of each layer, so that
    `jax.lax.scan` gets a pure function.

    Attributes:
      config: the model, or `ModelConfig.encoder()` of it.
      without_layers: builds no layers; `init_params` makes their parameters one by one.
      loop: how the layers of `pattern` are run; None scans stacked parameters and unrolls others.
    """

    config: ModelConfig
    without_layers: bool = False
    loop: LayerLoop | None = None

    def setup(self) -> None:
        c = self.config
        self._setup_embeddings()
        if c.norm.placement != "post":
            self.final_norm = Norm(c.norm, param_dtype=c.param_dtype)

        block: Any = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=_REMAT_POLICIES[c.remat])
        layer_configs = () if self.without_layers else c.layers()
        num_first = len(c.first_layers)
        self.first_layers = [block(c, layer_config) for layer_config in layer_configs[:num_first]]
        # With stacked parameters there is nothing to make submodules of.
        stacked = self.has_variable("params", "layers")
        unrolled = () if stacked else layer_configs[num_first:]
        self.layers = [block(c, layer_config) for layer_config in unrolled]

    def _setup_embeddings(self) -> None:
        """Makes the tables of positions and token types, and the norm and dropout of embeddings."""
        c = self.config
        options = {"stddev": c.init_stddev, "param_dtype": c.param_dtype}
        if c.position.kind == "learned":
            self.position_embed = Embedding(
                c.max_length + c.position.offset, c.embed_dim, ("positions", "embed"), **options
            )
        if c.position.kind == "buckets":
            self.position_bias = Embedding(
                c.position.num_buckets,
                c.attention.num_heads,
                ("buckets", "heads"),
                kind="bias",
                **options,
            )
        if c.embedding.num_types:
            self.type_embed = Embedding(
                c.embedding.num_types, c.embed_dim, ("types", "embed"), **options
            )
        if c.embedding.norm:
            self.embed_norm = Norm(c.norm, param_dtype=c.param_dtype)
        self.embed_dropout = nn.Dropout(c.dropout)

    def run(
        self,
        x: Float[Array, "B T D"],
        mask: AttentionMask,
        positions: Int[Array, "B T"],
        cache: Cache | None,
        *,
        lengths: Int[Array, "B T"] | None,
        types: Int[Array, "B T"] | None,
        memory: Float[Array, "B M D"] | None,
        memory_mask: AttentionMask | None,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None, LayerReports]:
        """Returns the hidden states, the cache with these tokens in it, and the layers' router loss
        and expert loads.
        """
        c = self.config
        embed_key = None if key is None else jax.random.fold_in(key, 0)
        layers_key = None if key is None else jax.random.fold_in(key, 1)

        x = self._add_positions(x, positions, types)
        x = self.embedding_dropout(x.astype(c.dtype), embed_key)
        x = constrain(x, c.hidden_axes)

        context = self.context(positions, mask, cache, lengths)
        context = dataclasses.replace(
            context, memory=memory, memory_mask=memory_mask, key=layers_key
        )
        x, cache, reports = self._run_layers(x, cache, context)
        if c.norm.placement != "post":
            x = self.final_norm(x)
        return x, cache, collect_reports(reports)

    def embedding_dropout(
        self, x: Float[Array, "B T D"], key: Key[Array, ""] | None
    ) -> Float[Array, "B T D"]:
        """Applies dropout to embeddings; without a key, returns x unchanged."""
        return self.embed_dropout(x, deterministic=key is None, rng=key)

    def context(
        self,
        positions: Int[Array, "B T"],
        mask: AttentionMask,
        cache: Cache | None,
        lengths: Int[Array, "B T"] | None,
    ) -> Context:
        """Returns the inputs that all layers share, for `run` and for multi-token prediction."""
        c = self.config
        scalings = [c.position_of(layer_config).scaling for layer_config in c.layers()]
        by_length = any(scaling is not None and scaling.by_length for scaling in scalings)
        if by_length and lengths is None:
            lengths = document_lengths(positions)
        page_table = None if cache is None else cache.page_table
        slots = None if cache is None else cache.slots

        context = Context(positions, mask, lengths=lengths, page_table=page_table, slots=slots)
        return dataclasses.replace(context, bias=self._score_bias(context))

    def _add_positions(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        types: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        """Returns the embeddings scaled, with those of positions and types added, normalized."""
        c = self.config
        if c.scale_embeddings:
            x = x * math.sqrt(c.embed_dim)
        if c.position.kind == "learned":
            x = x + self.position_embed(positions + c.position.offset)
        elif c.position.kind == "sinusoidal":
            x = x + sinusoidal(positions, c.embed_dim, c.position.halves)

        if c.embedding.num_types:
            if types is None:
                types = jnp.zeros_like(positions)
            x = x + self.type_embed(types)
        if c.embedding.norm:
            x = self.embed_norm(x)
        return x

    def _score_bias(self, context: Context) -> Float[Array, "#B N #T S"] | None:
        """Returns what is added to the scores of all layers, or None: a bias by distance (T5) or by
        key (Falcon-RW).
        """
        c = self.config
        slots = context.slots
        if c.position.kind == "alibi_bfloat16":
            keys = context.positions if slots is None else jnp.arange(slots)[None]
            return rounded_alibi(keys, c.attention.num_heads, c.attention.head_dim)
        if c.position.kind != "buckets":
            return None

        # Raffel et al. 2020, arXiv:1910.10683, section 2.1: learned, and shared by all layers.
        query_positions, key_positions = _query_and_key_positions(context)
        # [1, S], [B, T] -> [B, T, S], or [1, T, T] without a cache.
        distances = key_positions[:, None, :] - query_positions[:, :, None]
        buckets = distance_buckets(c.position, distances, bidirectional=not context.mask.causal)
        # [B, T, S, N] -> [B, N, T, S]
        return jnp.moveaxis(self.position_bias(buckets), -1, 1)

    def _run_layers(
        self, x: Float[Array, "B T D"], cache: Cache | None, context: Context
    ) -> tuple[Float[Array, "B T D"], Cache | None, dict[str, LayerReport]]:
        """Returns the hidden states, the cache, and the reports of layers by the name of their
        parameters.
        """
        new_caches: list[LayerCache] = []
        reports: dict[str, LayerReport] = {}
        for loop, group in self._layer_groups():
            group_caches = None
            if cache is not None:
                # Caches of this group: one per layer, or per place of the pattern.
                start = len(new_caches)
                count = len(group.layer_configs)
                if group.params is not None:
                    count = min(count, group.period)
                group_caches = cache.layers[start : start + count]

            x, group_caches, group_reports = loop.run(group, x, group_caches, context)
            if group_caches is not None:
                new_caches.extend(group_caches)
            reports |= group_reports

        if cache is not None:
            cache = cache.replace(layers=tuple(new_caches)).lay_out()
        return x, cache, reports

    def _layer_groups(self) -> list[tuple[LayerLoop, LayerGroup]]:
        """Returns the first layers and those of the pattern, each with the way to run them; without
        empty groups.
        """
        if self.without_layers:
            return []
        stacked_params = None
        if self.has_variable("params", "layers"):
            stacked_params = self.get_variable("params", "layers")
        loop = self.loop
        if loop is None:
            loop = Unrolled() if stacked_params is None else Scanned()

        # Of 6 layers, 2 of them first: layers 0 and 1, then layers 2 to 5.
        num_first = len(self.config.first_layers)
        first = self._layer_group(0, num_first, self.first_layers, None)
        rest = self._layer_group(num_first, self.config.num_layers, self.layers, stacked_params)
        groups = [(Unrolled(), first), (loop, rest)]
        return [(loop, group) for loop, group in groups if group.layer_configs]

    def _layer_group(
        self, start: int, stop: int, blocks: Sequence[Block], params: Any
    ) -> LayerGroup:
        """Returns the layers from index `start` to before `stop`.

        Args:
          start, stop: indices in the stack.
          blocks: the submodules, where each layer has parameters of its own.
          params: stacked parameters of these layers, or None.
        """
        c = self.config
        remat = None if c.remat == "none" else _REMAT_POLICIES[c.remat]
        names = tuple(layer_name(c, index) for index in range(start, stop))
        own_params = ()
        if params is None and not self.is_initializing():
            own_params = tuple(self.get_variable("params", name) for name in names)
        return LayerGroup(
            start_index=start,
            names=names,
            layer_configs=c.layers()[start:stop],
            period=len(c.pattern),
            blocks=blocks,
            apply=functools.partial(apply_block, c),
            params=params,
            own_params=own_params,
            remat=remat,
            hidden_axes=c.hidden_axes,
        )


def apply_block(
    config: ModelConfig,
    layer_config: LayerConfig,
    params: Any,
    x: Float[Array, "B T D"],
    cache: LayerCache | None,
    context: Context,
) -> tuple[Float[Array, "B T D"], LayerCache | None, LayerReport]:
    """Applies a layer to parameters sliced out of stacked ones, as a function of them."""
    block = Block(config, layer_config, parent=None)
    return block.apply({"params": params}, x, cache, context)


def _query_and_key_positions(
    context: Context,
) -> tuple[Int[Array, "#B T"], Int[Array, "1 S"]]:
    """Returns positions of queries and keys, as far as distances go: their indices in the row, or
    with a cache positions and slots.
    """
    if context.slots is None:
        index = jnp.arange(context.positions.shape[1])[None]
        return index, index
    return context.positions, jnp.arange(context.slots)[None]
