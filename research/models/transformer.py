"""The transformer: embedding, stacks of blocks, heads; decoder, encoder, prefix decoder or encoder-decoder."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.kernels.attention import AttentionMask
from research.models.attention import Context
from research.models.block import Block
from research.models.cache import Cache
from research.models.config import LayerConfig, ModelConfig
from research.models.heads import FuturePredictor, Pooler, Transform
from research.models.layers import Embedding
from research.models.reports import LayerReports, collect_reports, no_reports
from research.models.stack import Stack, layer_name, scans_layers
from research.parallel.rules import constrain, is_box


class Output(NamedTuple):
    """What a transformer makes of tokens.

    Attributes:
      hidden: the last states, which `projection` and `logits` read.
      cache: with these tokens in it, where one was given.
      reports: what the layers tell beside: the loss of routers, an encoder's added to a decoder's, and experts' loads.
    """

    hidden: Float[Array, "B T D"]
    cache: Cache | None
    reports: LayerReports


class Transformer(Stack):
    """Maps tokens to hidden states, and hidden states to logits.

    The two are apart so that a loss can take the output projection in chunks, without `[B, T, V]` logits.

    Source: Vaswani et al. 2017, arXiv:1706.03762; Radford et al. 2019 (GPT-2) for the pre-norm decoder; the config says
    which variant it is.
    """

    def setup(self) -> None:
        c = self.config
        self.embed = Embedding(c.vocab_size, c.embed_dim, ("vocab", "embed"), c.init_stddev)
        self.setup_stack()
        if c.structure == "encoder_decoder":
            self.encoder = Stack(c.encoder(), bare=self.bare)
        if c.head.transform:
            self.transform = Transform(c)
        if c.head.pooler:
            self.pooler = Pooler(c)
        if c.head.num_future:
            self.future = [FuturePredictor(c) for _ in range(c.head.num_future)]
        if not c.tied_embeddings:
            init = nn.with_logical_partitioning(nn.initializers.normal(c.init_stddev), ("embed", "vocab"))
            self.unembed = self.param("unembed", init, (c.embed_dim, c.vocab_size), jnp.float32)
        if c.head.bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
            self.logit_bias = self.param("logit_bias", init, (c.vocab_size,), jnp.float32)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        *,
        types: Int[Array, "B T"] | None = None,
        prefix: Int[Array, "B T"] | None = None,
        encoder_tokens: Int[Array, "B M"] | None = None,
        encoder_positions: Int[Array, "B M"] | None = None,
        encoder_segments: Int[Array, "B M"] | None = None,
        deterministic: bool = True,
    ) -> Output:
        """Returns the hidden states that the output projection reads, and the cache with these tokens in it.

        Args:
          tokens: ids below `vocab_size`.
          positions: of each token in its own sequence, below `max_length`.
          segments: which sequence of a packed row a token belongs to, 0 for padding; None where a row is one sequence.
          cache: keys and values of earlier tokens; then `positions` of a row must be consecutive, then padding.
          types: kind of segment of each token, where the model has such embeddings; None is 0.
          prefix: 1 where a token belongs to its sequence's prefix, of the structure `prefix`; None has no prefix.
          encoder_tokens: what the encoder reads, of the structure `encoder_decoder`; None where the cache holds it.
          encoder_positions: None counts from 0.
          encoder_segments: as `segments`; a token sees the encoder's tokens of its own segment.
          deterministic: False drops activations, with the random stream `dropout`.
        """
        key = None if deterministic or not self.config.dropout else self.make_rng("dropout")
        memory, of_encoder = None, no_reports()
        if encoder_tokens is not None:
            memory, of_encoder = self.encode(encoder_tokens, encoder_positions, encoder_segments, key)
        x, cache, reports = self.run(
            self.embed(tokens),
            sequence_mask(self.config, positions, segments, prefix, cached=cache is not None),
            positions,
            cache,
            types=types,
            memory=memory,
            memory_mask=memory_mask(tokens, segments, encoder_segments if cache is None else cache.memory_segments),
            key=key,
        )
        return Output(x, cache, reports + of_encoder)

    def encode(
        self,
        tokens: Int[Array, "B M"],
        positions: Int[Array, "B M"] | None = None,
        segments: Int[Array, "B M"] | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B M D"], LayerReports]:
        """Returns what the encoder of an encoder-decoder makes of its tokens, and what its layers tell beside.

        Arguments are those of `__call__`.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        mask = AttentionMask(q_segments=segments, kv_segments=segments)
        key = None if key is None else jax.random.fold_in(key, 2)  # the decoder's keys are 0 and 1 of it
        options = {"types": None, "memory": None, "memory_mask": None, "key": key}
        x, _, reports = self.encoder.run(self.embed(tokens), mask, positions, None, **options)
        return x, reports.under("encoder")

    def pooled(self, hidden: Float[Array, "B T D"]) -> tuple[Float[Array, "B D"], Float[Array, "B C"] | None]:
        """Returns the state that stands for each row, from its first token, and the logits of its class, if any."""
        return self.pooler(hidden)

    def predict_future(
        self,
        hidden: Float[Array, "B T D"],
        following: list[Int[Array, "B T"]],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None,
        *,
        deterministic: bool = True,
    ) -> tuple[list[Float[Array, "B T D"]], LayerReports]:
        """Returns the states that predict one token further each, and what their layers tell beside.

        Args:
          hidden: the last states, before the transform of a head.
          following: of each depth k, from 1, the tokens k places further on.
          positions, segments, deterministic: as of `__call__`.
        """
        mask = AttentionMask(causal=True, q_segments=segments, kv_segments=segments)
        context, states, reports = self.context(positions, mask, None), [], {}
        key = None if deterministic or not self.config.dropout else self.make_rng("dropout")
        for depth, (predictor, tokens) in enumerate(zip(self.future, following, strict=True)):
            drop_key, own = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, depth))
            embedded = self.embed(tokens).astype(hidden.dtype)
            embedded = self.embed_dropout(embedded, deterministic=key is None, rng=drop_key)
            hidden, report = predictor(hidden, embedded, dataclasses.replace(context, key=own))
            states.append(hidden)
            reports[f"future_{depth}/block"] = report
        return states, collect_reports(reports)

    def projection(self, hidden: Float[Array, "*batch D"]) -> tuple[Float[Array, "*batch E"], Float[Array, "E V"]]:
        """Returns the states and the matrix whose product is the logits, but for their soft cap.

        A bias of the logits is one more row of the matrix, for one more column of ones.
        """
        c = self.config
        if c.head.transform:
            hidden = self.transform(hidden)
        if c.head.scale != 1:
            hidden = hidden * c.head.scale
        kernel = self.embed.embedding.T if c.tied_embeddings else self.unembed
        if c.head.bias:
            hidden = jnp.concatenate([hidden, jnp.ones_like(hidden[..., :1])], axis=-1)
            kernel = jnp.concatenate([kernel, self.logit_bias[None]], axis=0)
        return hidden, kernel

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns float32 logits."""
        hidden, kernel = self.projection(hidden)
        z = jnp.einsum("btd,dv->btv", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        if self.config.head.softcap is not None:
            z = self.config.head.softcap * jnp.tanh(z / self.config.head.softcap)
        return constrain(z, ("batch", "length", "vocab"))


def sequence_mask(
    config: ModelConfig,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None,
    prefix: Int[Array, "B T"] | None,
    cached: bool,
) -> AttentionMask:
    """Returns which tokens of its sequence each token sees, but for a layer's window.

    Args:
      config: the model, whose structure decides.
      positions, segments, prefix: as of `Transformer`.
      cached: whether keys lie in a cache.
    """
    causal = config.structure != "encoder"
    mask = AttentionMask(causal=causal, q_segments=segments, kv_segments=segments)
    if prefix is None or config.structure != "prefix":
        return mask
    if cached:  # then a row is one sequence
        return dataclasses.replace(mask, prefix=prefix.sum(axis=1))
    # To the mask, all tokens of a prefix stand where their sequence begins: none of them comes later than another.
    index = jnp.broadcast_to(jnp.arange(positions.shape[1], dtype=positions.dtype), positions.shape)
    places = jnp.where(prefix != 0, index - positions, index)
    return dataclasses.replace(mask, q_positions=places, kv_positions=places)


def memory_mask(
    tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None, encoder_segments: Int[Array, "B M"] | None
) -> AttentionMask:
    """Returns which of the encoder's tokens each token sees: those of its segment, or the real ones."""
    if encoder_segments is None:
        return AttentionMask()
    if segments is None:
        real = (encoder_segments != 0).astype(tokens.dtype)
        return AttentionMask(q_segments=jnp.ones_like(tokens), kv_segments=real)
    return AttentionMask(q_segments=segments, kv_segments=encoder_segments)


def init_params(config: ModelConfig, key: jax.Array) -> Any:
    """Returns the initial parameters, each boxed with its logical axis names.

    They are a function of the key alone: those of a layer of its number besides, whether layers are scanned or not.
    """
    tokens = jnp.zeros((1, 1), jnp.int32)

    def touch(module: Transformer) -> None:
        encoder = {"encoder_tokens": tokens} if config.structure == "encoder_decoder" else {}
        hidden = module(tokens, tokens, **encoder).hidden
        if config.head.num_future:
            module.predict_future(hidden, [tokens] * config.head.num_future, tokens, None)
        if config.head.pooler:
            module.pooled(hidden)
        module.logits(hidden)

    params = dict(nn.init(touch, Transformer(config, bare=True))(key)["params"])
    params |= _init_layers(config, key)
    if config.structure == "encoder_decoder":
        encoder = _init_layers(config.encoder(), jax.random.fold_in(key, 2**31))
        params["encoder"] = {**params["encoder"], **encoder} if "encoder" in params else encoder
    return params


def _init_layers(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Returns the parameters of a stack's layers by name."""
    tokens, hidden = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, config.embed_dim), config.dtype)
    memory = {"memory": hidden, "memory_mask": AttentionMask()} if config.structure == "encoder_decoder" else {}
    context = Context(tokens, AttentionMask(causal=True), lengths=tokens, **memory)

    def init_layer(index: Int[Array, ""] | int, kind: LayerConfig) -> Any:
        return Block(config, kind).init(jax.random.fold_in(key, index), hidden, None, context)["params"]

    kinds, first = config.layers(), len(config.first_layers)
    alone = first if scans_layers(config) else config.num_layers
    params = {layer_name(config, i): init_layer(i, kinds[i]) for i in range(alone)}
    if alone < config.num_layers:
        stacked = jax.vmap(lambda index: init_layer(index, config.pattern[0]))(jnp.arange(alone, config.num_layers))
        params["layers"] = jax.tree.map(_name_layers, stacked, is_leaf=is_box)
    return params


def _name_layers(box: nn.LogicallyPartitioned) -> nn.LogicallyPartitioned:
    return box.replace(names=("layers", *box.names))
