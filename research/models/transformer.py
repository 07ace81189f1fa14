"""The transformer: embedding, stacks of blocks, heads; decoder, encoder, prefix decoder or
encoder-decoder.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.data.batch import Batch, ModelInputs
from research.kernels.attention import AttentionMask
from research.kernels.weights import Weight, append_row, as_product, transpose
from research.models.block import Block
from research.models.cache import Cache
from research.models.config import LayerConfig, ModelConfig
from research.models.context import Context
from research.models.heads import MTPModule, Pooler, Transform, shift_left
from research.models.layer_loops import LayerLoop
from research.models.layers import Embedding, parameter
from research.models.reports import LayerReports, collect_reports, no_reports
from research.models.stack import Stack, layer_name
from research.parallel.parameter import Axes, Parameter, is_box
from research.parallel.rules import constrain


class Output(NamedTuple):
    """What a language model makes of tokens.

    Attributes:
      hidden: the last states, which `projection` reads.
      cache: with these tokens in it, where one was given.
      reports: what the layers tell beside: the loss of routers, an encoder's added to a decoder's,
          and experts' loads.
      mtp_hidden: the states that predict one token further each (multi-token prediction), where the
        model has such modules and was given targets.
      mtp_weight: of their mean loss in training.
    """

    hidden: Float[Array, "B T D"]
    cache: Any
    reports: LayerReports
    mtp_hidden: tuple[Float[Array, "B T D"], ...] = ()
    mtp_weight: float = 0.0


class LogitTerms(NamedTuple):
    """The logits before they are multiplied out: cap(hidden · kernel), with cap(z) = softcap ·
    tanh(z / softcap).

    Attributes:
      hidden: states, in the type of activations.
      kernel: the output projection.
      softcap: bound of the logits, or None.
    """

    hidden: Float[Array, "*batch width"]
    kernel: Weight
    softcap: float | None


class Transformer(nn.Module):
    """Maps tokens to hidden states, and hidden states to logits.

    The two are apart so that a loss can take the output projection in chunks, without `[B, T, V]`
    logits.

    Attributes:
      config: which variant it is.
      without_layers: builds no layers; `init_params` makes their parameters one by one.
      loop: how layers are run; None unrolls them, or scans them where their parameters are stacked.

    Source: Vaswani et al. 2017, arXiv:1706.03762; Radford et al. 2019 (GPT-2) for the pre-norm
        decoder.
    """

    config: ModelConfig
    without_layers: bool = False
    loop: LayerLoop | None = None

    def setup(self) -> None:
        c = self.config
        self.embed = Embedding(
            c.vocab_size, c.embed_dim, ("vocab", "embed"), c.init_stddev, c.param_dtype
        )
        self.decoder = Stack(c, without_layers=self.without_layers, loop=self.loop)
        # The decoder's parameters lie beside the embedding's and not in a group of their own:
        # `layers_0/…`.
        nn.share_scope(self, self.decoder)
        if c.structure == "encoder_decoder":
            self.encoder = Stack(c.encoder(), without_layers=self.without_layers, loop=self.loop)
        if c.head.transform:
            self.transform = Transform(c)
        if c.head.pooler:
            self.pooler = Pooler(c)
        # Called `future` on disk.
        self.future = [MTPModule(c) for _ in range(c.head.mtp_depth)]
        if not c.tied_embeddings:
            init = nn.initializers.normal(c.init_stddev)
            shape = (c.embed_dim, c.vocab_size)
            axes = Axes(("embed", "vocab"), "table")
            self.unembed = parameter(self, "unembed", init, shape, axes, c.param_dtype)
        if c.head.bias:
            zeros = nn.initializers.zeros
            axes = Axes(("vocab",), "bias")
            self.logit_bias = parameter(
                self, "logit_bias", zeros, (c.vocab_size,), axes, c.param_dtype
            )

    def __call__(
        self,
        inputs: ModelInputs | Batch,
        cache: Cache | None = None,
        *,
        embeddings: Float[Array, "B T D"] | None = None,
        deterministic: bool = True,
    ) -> Output:
        """Returns the hidden states that the output projection reads, and the cache with these
        tokens in it.

        Args:
          inputs: a batch, or what a model reads of one. With a cache, `positions` of a row must be
            consecutive, then padding, and the encoder's tokens are left out once the cache holds
            them. Multi-token prediction reads `targets`, where there are any: they are the tokens
            that follow.
          cache: keys and values of earlier tokens.
          embeddings: what stands in the place of the embedded `tokens`, which may then be left out.
          deterministic: False drops activations, with the random stream `dropout`.
        """
        key = None if deterministic or not self.config.dropout else self.make_rng("dropout")
        memory, beside = None, no_reports()
        if "encoder_tokens" in inputs:
            memory, beside = self.encode(inputs, key)
        positions = inputs["positions"]
        segments, encoder_segments, prefix, types = (
            _given(inputs, name) for name in ("segments", "encoder_segments", "prefix", "types")
        )
        x, cache, reports = self.decoder.run(
            self.embed(inputs["tokens"]) if embeddings is None else embeddings,
            sequence_mask(self.config, positions, segments, prefix, cached=cache is not None),
            positions,
            cache,
            types=types,
            memory=memory,
            memory_mask=memory_mask(
                positions, segments, encoder_segments if cache is None else cache.memory_segments
            ),
            key=key,
        )
        output = Output(x, cache, reports + beside)
        if not self.future or "targets" not in inputs:
            return output
        # Of depth k, from 1, the token k places further on is the target k - 1 places further on.
        following = [shift_left(inputs["targets"], k) for k in range(len(self.future))]
        states, more = self.mtp_hidden(
            x, following, positions, segments, deterministic=deterministic
        )
        weight = self.config.head.mtp_weight
        return output._replace(reports=output.reports + more, mtp_hidden=states, mtp_weight=weight)

    def encode(
        self, inputs: ModelInputs | Batch, key: jax.Array | None = None
    ) -> tuple[Float[Array, "B M D"], LayerReports]:
        """Returns what the encoder of an encoder-decoder makes of its tokens, and what its layers
        tell beside.

        Args:
          inputs: as of `__call__`; positions count from 0 where none are given.
          key: of dropout; None drops nothing.
        """
        tokens = inputs["encoder_tokens"]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if "encoder_positions" in inputs:
            positions = inputs["encoder_positions"]
        segments = _given(inputs, "encoder_segments")
        mask = AttentionMask(q_segments=segments, kv_segments=segments)
        key = (
            None if key is None else jax.random.fold_in(key, 2)
        )  # the decoder's keys are 0 and 1 of it
        options = {"types": None, "memory": None, "memory_mask": None, "key": key}
        x, _, reports = self.encoder.run(self.embed(tokens), mask, positions, None, **options)
        return x, reports.under("encoder")

    def pooled(
        self, hidden: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "B classes"] | None]:
        """Returns the state that stands for each row, from its first token, and the logits of its
        class, if any.
        """
        return self.pooler(hidden)

    def mtp_hidden(
        self,
        hidden: Float[Array, "B T D"],
        following: list[Int[Array, "B T"]],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None,
        *,
        deterministic: bool = True,
    ) -> tuple[tuple[Float[Array, "B T D"], ...], LayerReports]:
        """Returns the states that predict one token further each, and what their layers tell
        beside.

        Args:
          hidden: the last states, before the transform of a head.
          following: of each depth k, from 1, the tokens k places further on.
          positions, segments: of the tokens.
          deterministic: as of `__call__`.
        """
        mask = AttentionMask(causal=True, q_segments=segments, kv_segments=segments)
        context = self.decoder.context(positions, mask, None)
        key = None if deterministic or not self.config.dropout else self.make_rng("dropout")
        states, reports = [], {}
        for depth, (predict, tokens) in enumerate(zip(self.future, following, strict=True)):
            drop_key, own = (
                (None, None) if key is None else jax.random.split(jax.random.fold_in(key, depth))
            )
            embedded = self.decoder.drop_embedded(self.embed(tokens).astype(hidden.dtype), drop_key)
            hidden, report = predict(hidden, embedded, dataclasses.replace(context, key=own))
            states.append(hidden)
            reports[f"future_{depth}/block"] = report
        return tuple(states), collect_reports(reports)

    def projection(self, hidden: Float[Array, "*batch D"]) -> LogitTerms:
        """Returns the logits of states as a product that is not made yet.

        A bias of the logits is one more row of the matrix, for one more column of ones.
        """
        c = self.config
        if c.head.transform:
            hidden = self.transform(hidden)
        if c.head.scale != 1:
            hidden = hidden * c.head.scale
        kernel = transpose(self.embed.embedding) if c.tied_embeddings else self.unembed
        if c.head.bias:
            hidden = jnp.concatenate([hidden, jnp.ones_like(hidden[..., :1])], axis=-1)
            kernel = append_row(kernel, self.logit_bias)
        return LogitTerms(hidden, kernel, c.head.softcap)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns float32 logits."""
        return compute_logits(self.projection(hidden))


def compute_logits(terms: LogitTerms) -> Float[Array, "B T V"]:
    """Returns float32 logits."""
    hidden, kernel = as_product(terms.hidden, terms.kernel)
    z = jnp.einsum(
        "btd,dv->btv", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    if terms.softcap is not None:
        z = terms.softcap * jnp.tanh(z / terms.softcap)
    return constrain(z, ("batch", "length", "vocab"))


def _given(inputs: Mapping[str, Any], name: str) -> Any:
    """Returns an array that a batch may leave out, or None."""
    if name not in inputs:
        return None
    return inputs[name]


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
      positions, segments, prefix: as of `Batch`.
      cached: whether keys lie in a cache.
    """
    causal = config.structure != "encoder"
    mask = AttentionMask(causal=causal, q_segments=segments, kv_segments=segments)
    if prefix is None or config.structure != "prefix":
        return mask
    if cached:  # then a row is one sequence
        return dataclasses.replace(mask, prefix=prefix.sum(axis=1))
    # To the mask, all tokens of a prefix stand where their sequence begins: none of them comes
    # later than another.
    index = jnp.broadcast_to(jnp.arange(positions.shape[1], dtype=positions.dtype), positions.shape)
    places = jnp.where(prefix != 0, index - positions, index)
    return dataclasses.replace(mask, q_positions=places, kv_positions=places)


def memory_mask(
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None,
    encoder_segments: Int[Array, "B M"] | None,
) -> AttentionMask:
    """Returns which of the encoder's tokens each token sees: those of its segment, or the real
    ones.
    """
    if encoder_segments is None:
        return AttentionMask()
    if segments is None:
        real = (encoder_segments != 0).astype(positions.dtype)
        return AttentionMask(q_segments=jnp.ones_like(positions), kv_segments=real)
    return AttentionMask(q_segments=segments, kv_segments=encoder_segments)


def init_params(config: ModelConfig, key: jax.Array) -> Any:
    """Returns the initial parameters, each boxed with its logical axis names.

    They are a function of the key alone: those of a layer of its number besides, whether layers are
    scanned or not. Layers are stacked where `layer_loop` is `scan`; `auto` has to be resolved
    before (`stack.resolve_layer_loop`), and counts as `unroll`.
    """
    tokens = jnp.zeros((1, 1), jnp.int32)

    def touch(module: Transformer) -> None:
        encoder = {"encoder_tokens": tokens} if config.structure == "encoder_decoder" else {}
        hidden = module(
            {"tokens": tokens, "positions": tokens, "targets": tokens, **encoder}
        ).hidden
        if config.head.pooler:
            module.pooled(hidden)
        module.logits(hidden)

    params = dict(nn.init(touch, Transformer(config, without_layers=True))(key)["params"])
    params |= _init_layers(config, key)
    if config.structure == "encoder_decoder":
        encoder = _init_layers(config.encoder(), jax.random.fold_in(key, 2**31))
        params["encoder"] = {**params["encoder"], **encoder} if "encoder" in params else encoder
    return params


def _init_layers(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Returns the parameters of a stack's layers by name."""
    tokens, hidden = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, config.embed_dim), config.dtype)
    memory = (
        {"memory": hidden, "memory_mask": AttentionMask()}
        if config.structure == "encoder_decoder"
        else {}
    )
    context = Context(tokens, AttentionMask(causal=True), lengths=tokens, **memory)

    def init_layer(index: Int[Array, ""] | int, kind: LayerConfig) -> Any:
        return Block(config, kind).init(jax.random.fold_in(key, index), hidden, None, context)[
            "params"
        ]

    kinds, first = config.layers(), len(config.first_layers)
    alone = first if config.layer_loop == "scan" else config.num_layers
    params = {layer_name(config, i): init_layer(i, kinds[i]) for i in range(alone)}
    if alone < config.num_layers:
        stacked = jax.vmap(lambda index: init_layer(index, config.pattern[0]))(
            jnp.arange(alone, config.num_layers)
        )
        params["layers"] = jax.tree.map(_name_layers, stacked, is_leaf=is_box)
    return params


def _name_layers(box: Parameter) -> Parameter:
    return box.replace(names=("layers", *box.names))
