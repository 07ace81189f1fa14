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
from research.kernels.projection import multiply_table
from research.kernels.weights import Weight, append_row, as_product, is_weight, transpose
from research.models.cache import Cache
from research.models.config import ModelConfig
from research.models.heads import MTPModule, Pooler, Transform, shift_left
from research.models.layer_loops import LayerLoop
from research.models.layers import Embedding, parameter
from research.models.masks import memory_mask, sequence_mask
from research.models.reports import LayerReports, collect_reports, no_reports
from research.models.stack import Stack
from research.parallel.parameter import Axes
from research.parallel.rules import constrain


class Output(NamedTuple):
    """The output of a language model.

    Attributes:
      hidden: the last states, which `projection` reads.
      cache: with these tokens in it, where one was given.
      reports: router loss, an encoder's added to a decoder's, and expert loads.
      mtp_hidden: the states of each depth of multi-token prediction, where the model has such
        modules and was given targets.
      mtp_weight: of their mean loss in training.
    """

    hidden: Float[Array, "B T D"]
    cache: Any
    reports: LayerReports
    mtp_hidden: tuple[Float[Array, "B T D"], ...] = ()
    mtp_weight: float = 0.0


class LogitTerms(NamedTuple):
    """The factors of the logits: cap(hidden · kernel), with cap(z) = softcap · tanh(z / softcap).

    Attributes:
      hidden: states, in the type of activations.
      kernel: the output projection.
      softcap: bound of the logits, or None.
      is_table: whether the kernel is a table of embeddings, transposed and not copied.
    """

    hidden: Float[Array, "*batch width"]
    kernel: Weight
    softcap: float | None
    is_table: bool = False


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
        # The decoder's parameters are beside the embedding's and not in a group of their own:
        # `layers_0/…`.
        nn.share_scope(self, self.decoder)
        if c.structure == "encoder_decoder":
            self.encoder = Stack(c.encoder(), without_layers=self.without_layers, loop=self.loop)
        if c.head.transform:
            self.transform = Transform(c)
        if c.head.pooler:
            self.pooler = Pooler(c)
        # Multi-token prediction. The name is that of the parameters on disk, `future_0`, ….
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
            their keys and values. Multi-token prediction reads `targets`, where there are any: the
            tokens that follow.
          cache: keys and values of earlier tokens.
          embeddings: in the place of the embedded `tokens`, which may then be left out.
          deterministic: False applies dropout, with the random stream `dropout`.
        """
        key = self._dropout_key(deterministic)
        memory = None
        encoder_reports = no_reports()
        if "encoder_tokens" in inputs:
            memory, encoder_reports = self.encode(inputs, key)

        positions = inputs["positions"]
        segments = _optional(inputs, "segments")
        prefix = _optional(inputs, "prefix")
        encoder_segments = _optional(inputs, "encoder_segments")
        if cache is not None:
            encoder_segments = cache.memory_segments
        if embeddings is None:
            embeddings = self.embed(inputs["tokens"])
        hidden, cache_after, reports = self.decoder.run(
            embeddings,
            sequence_mask(self.config, positions, segments, prefix, cached=cache is not None),
            positions,
            cache,
            lengths=_optional(inputs, "lengths"),
            types=_optional(inputs, "types"),
            memory=memory,
            memory_mask=memory_mask(positions, segments, encoder_segments),
            key=key,
        )
        output = Output(hidden, cache_after, reports + encoder_reports)
        if not self.future or "targets" not in inputs:
            return output
        return self._with_mtp(output, inputs, segments, deterministic)

    def _dropout_key(self, deterministic: bool) -> jax.Array | None:
        if deterministic or not self.config.dropout:
            return None
        return self.make_rng("dropout")

    def _with_mtp(
        self,
        output: Output,
        inputs: ModelInputs | Batch,
        segments: Int[Array, "B T"] | None,
        deterministic: bool,
    ) -> Output:
        """Returns the output with the states of multi-token prediction."""
        # A target is the next token. Depth 1 embeds it (shift 0), depth 2 the one after it
        # (shift 1): targets [5, 6, 7] -> [5, 6, 7], [6, 7, 0].
        following = [shift_left(inputs["targets"], depth) for depth in range(len(self.future))]
        states, reports = self.mtp_hidden(
            output.hidden, following, inputs["positions"], segments, deterministic=deterministic
        )
        return output._replace(
            reports=output.reports + reports,
            mtp_hidden=states,
            mtp_weight=self.config.head.mtp_weight,
        )

    def encode(
        self, inputs: ModelInputs | Batch, key: jax.Array | None = None
    ) -> tuple[Float[Array, "B M D"], LayerReports]:
        """Returns the encoder's hidden states, and its layers' router loss and expert loads.

        Args:
          inputs: as of `__call__`; positions count from 0 where none are given.
          key: of dropout; None drops nothing.
        """
        tokens = inputs["encoder_tokens"]
        positions = _optional(inputs, "encoder_positions")
        if positions is None:
            index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
            positions = jnp.broadcast_to(index, tokens.shape)
        segments = _optional(inputs, "encoder_segments")
        mask = AttentionMask(q_segments=segments, kv_segments=segments)
        # The decoder's keys are 0 and 1 of it.
        encoder_key = None if key is None else jax.random.fold_in(key, 2)

        x, _, reports = self.encoder.run(
            self.embed(tokens),
            mask,
            positions,
            None,
            lengths=None,
            types=None,
            memory=None,
            memory_mask=None,
            key=encoder_key,
        )
        return x, reports.under("encoder")

    def pooled(
        self, hidden: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "B classes"] | None]:
        """Returns the pooled state of each row's first token, and the logits of its class, if
        any.
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
        """Returns the states of each depth of multi-token prediction, and their layers' router loss
        and expert loads.

        Args:
          hidden: the last hidden states, before the transform of a head.
          following: of each depth k, from 1, the tokens k positions later.
          positions, segments: of the tokens.
          deterministic: as of `__call__`.
        """
        mask = AttentionMask(causal=True, q_segments=segments, kv_segments=segments)
        context = self.decoder.context(positions, mask, None, None)
        key = self._dropout_key(deterministic)

        states = []
        reports = {}
        for depth, (mtp_module, tokens) in enumerate(zip(self.future, following, strict=True)):
            embed_key = None
            block_key = None
            if key is not None:
                depth_key = jax.random.fold_in(key, depth)
                embed_key, block_key = jax.random.split(depth_key)
            embedded = self.embed(tokens).astype(hidden.dtype)
            embedded = self.decoder.embedding_dropout(embedded, embed_key)
            block_context = dataclasses.replace(context, key=block_key)
            # Each depth continues from the states of the depth before.
            hidden, _, report = mtp_module(hidden, embedded, block_context)
            states.append(hidden)
            reports[f"future_{depth}/block"] = report
        return tuple(states), collect_reports(reports)

    def mtp_step(
        self,
        hidden: Float[Array, "B T D"],
        following: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Cache,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Returns the states of the first depth of multi-token prediction, and the cache with these
        tokens in it.

        Args:
          hidden: the last hidden states, or those of this depth: it may be applied again.
          following: the token after each.
          positions: of the tokens.
          cache: of its one layer.
        """
        mask = sequence_mask(self.config, positions, None, None, cached=True)
        context = self.decoder.context(positions, mask, cache, None)
        embedded = self.embed(following).astype(hidden.dtype)
        hidden, layer, _ = self.future[0](hidden, embedded, context, cache.layers[0])
        return hidden, cache.replace(layers=(layer,))

    def projection(self, hidden: Float[Array, "*batch D"]) -> LogitTerms:
        """Returns the two factors of the logits, for `compute_logits` or a loss that takes them in
        chunks.
        """
        c = self.config
        if c.head.transform:
            hidden = self.transform(hidden)
        if c.head.scale != 1:
            hidden = hidden * c.head.scale
        kernel = transpose(self.embed.embedding) if c.tied_embeddings else self.unembed
        is_table = c.tied_embeddings and not is_weight(kernel)

        if c.head.bias:
            is_table = False
            # x W + b = [x, 1] [W; b]: [.., D], [D, V] -> [.., D + 1], [D + 1, V]
            ones = jnp.ones_like(hidden[..., :1])
            hidden = jnp.concatenate([hidden, ones], axis=-1)
            kernel = append_row(kernel, self.logit_bias)
        return LogitTerms(hidden, kernel, c.head.softcap, is_table)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns float32 logits."""
        return compute_logits(self.projection(hidden))


def compute_logits(terms: LogitTerms) -> Float[Array, "B T V"]:
    """Returns float32 logits."""
    hidden, kernel = as_product(terms.hidden, terms.kernel)
    kernel = kernel.astype(hidden.dtype)
    if terms.is_table:
        logits = multiply_table(hidden, kernel.T)
    else:
        logits = jnp.einsum("btd,dv->btv", hidden, kernel, preferred_element_type=jnp.float32)
    if terms.softcap is not None:
        logits = terms.softcap * jnp.tanh(logits / terms.softcap)
    return constrain(logits, ("batch", "length", "vocab"))


def _optional(inputs: Mapping[str, Any], name: str) -> Any:
    """Returns an array that a batch may leave out, or None."""
    if name not in inputs:
        return None
    return inputs[name]
