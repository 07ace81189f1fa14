"""What a model is: frozen configs, validated where they are made. A family is a value of them,
never a branch.
"""

import dataclasses
from typing import Literal, get_args

from research.core.config import renamed
from research.core.errors import UserError
from research.models.position_config import PositionConfig, RopeScalingConfig
from research.models.sublayer_config import (
    AttentionConfig,
    ExpertsConfig,
    LatentConfig,
    MlpConfig,
    at_least,
)

__all__ = [
    "AttentionConfig",
    "EmbeddingConfig",
    "ExpertsConfig",
    "HeadConfig",
    "LatentConfig",
    "LayerConfig",
    "MlpConfig",
    "ModelConfig",
    "NormConfig",
    "PositionConfig",
    "RopeScalingConfig",
]

Dtype = Literal["float32", "bfloat16"]
DTYPES = get_args(Dtype)


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """Normalization of the residual stream.

    Attributes:
      kind: `layernorm` subtracts the mean, `rmsnorm` does not.
      placement: where a sublayer f is normalized: `pre` x + f(norm(x)); `post` norm(x + f(x));
        `sandwich` x + norm(f(norm(x))) (Gemma 2); `output` x + norm(f(x)) (OLMo 2); `parallel` adds
        both sublayers of one norm(x) at once (Falcon 7B), `parallel_pair` of a norm each (Falcon
        40B). All but `post` end with a norm.
      epsilon: added to the variance.
      bias: whether a learned offset follows the scale.
      unit_offset: whether the learned scale is counted from one, (1 + scale), as in Gemma.
    """

    kind: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    placement: Literal["pre", "post", "sandwich", "output", "parallel", "parallel_pair"] = "pre"
    epsilon: float = 1e-5
    bias: bool = False
    unit_offset: bool = False

    def __post_init__(self) -> None:
        if self.epsilon < 0:
            raise UserError("epsilon", self.epsilon, "must not be below 0.")

    @property
    def reads_normalized(self) -> bool:
        """Whether sublayers read a normalized stream."""
        return self.placement in ("pre", "sandwich", "parallel", "parallel_pair")

    @property
    def writes_normalized(self) -> bool:
        """Whether what a sublayer gives is normalized before it is added."""
        return self.placement in ("sandwich", "output")


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What one layer does otherwise than the model says.

    Attributes:
      window: tokens at this distance or further are hidden, or None.
      position: the layer's own positions, or None for the model's.
      experts: whether it has the experts, where the model has them.
      attention_norm: whether its attention reads a normalized stream, where the model's does.
    """

    window: int | None = None
    position: PositionConfig | None = None
    experts: bool = True
    attention_norm: bool = True

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise UserError("window", self.window, "must be at least 1.")
        if self.position is not None and self.position.kind not in ("none", "rotary"):
            raise UserError(
                "position.kind", self.position.kind, "of a layer must be 'none' or 'rotary'."
            )


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """What the embedding of a token consists of besides the table.

    Attributes:
      norm: whether they are normalized, positions and types included.
      num_types: token types with an embedding each (BERT's sentence A and B); 0 is none.
    """

    norm: bool = False
    num_types: int = 0

    def __post_init__(self) -> None:
        at_least(self, 0, "num_types")


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """From the last hidden states to logits.

    Attributes:
      transform: whether a projection, the MLP's activation and a norm come before the output
          projection (BERT).
      transform_bias: whether that projection has a bias.
      bias: whether the logits have one.
      scale: factor on the hidden states (T5's tied embeddings: 1 / √D).
      softcap: bound of the logits, softcap · tanh(logit / softcap), or None.
      pooler: whether there is a pooled state of the sequence: tanh of a projection of the first
          token's state (BERT).
      num_classes: of a classifier on the pooled state; 0 is none.
      mtp_depth: layers of multi-token prediction, each for one token further ahead (DeepSeek-V3,
        arXiv:2412.19437, section 2.2); training only.
      mtp_weight: of their mean loss.
    """

    transform: bool = False
    transform_bias: bool = True
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    pooler: bool = False
    num_classes: int = 0
    mtp_depth: int = renamed("num_future", default=0)
    mtp_weight: float = renamed("future_weight", default=0.3)

    def __post_init__(self) -> None:
        at_least(self, 0, "num_classes", "mtp_depth", "mtp_weight")
        if self.scale <= 0 or (self.softcap is not None and self.softcap <= 0):
            raise UserError("scale", self.scale, f"and softcap = {self.softcap} must be above 0.")
        if self.num_classes and not self.pooler:
            raise UserError("num_classes", constraint="needs pooler = True.")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A transformer.

    Attributes:
      vocab_size: rows V of the embedding.
      num_layers: blocks L; of the decoder, where there is an encoder too.
      embed_dim: model width D.
      max_length: the longest sequence in tokens; learned positions have this many rows.
      attention: the attention sublayer.
      mlp: the feed-forward sublayer.
      norm: the normalization.
      position: how positions enter.
      structure: `decoder` has causal attention, `encoder` bidirectional attention; `prefix` has
        bidirectional attention within a prefix and causal attention after it (Raffel et al. 2020,
        arXiv:1910.10683, section 3.2.1); `encoder_decoder` is a decoder with cross-attention to an
        encoder of `encoder_layers` layers.
      encoder_layers: blocks of the encoder; 0 unless `structure` is `encoder_decoder`.
      decoder_start_id: the first token of an encoder-decoder's decoder; other structures begin with
          their prompt.
      first_layers: configs of the leading layers; their parameters may have other shapes than those
          of the rest.
      pattern: configs of the layers after them, repeated; these all have parameters of the same
          shapes.
      experts: a mixture of experts instead of the feed-forward sublayer, or None.
      embedding: norm and token types of the embeddings.
      head: from hidden states to logits.
      tied_embeddings: whether the embedding is also the output projection.
      scale_embeddings: whether embeddings are multiplied by √D, as with sinusoidal positions
          (Vaswani et al. 2017).
      dropout: rate on embeddings and on what each sublayer adds.
      init_stddev: of all matrices; projections into the residual stream are divided by √(2L)
          (GPT-2).
      dtype: of activations and matrix products.
      param_dtype: of parameters; selection biases of experts are float32 all the same.
      layer_loop: `scan` compiles one block for all layers, `unroll` each one; `auto` unrolls on
        CPU, where loops are slow. The parameters on disk are the same.
      remat: what the backward pass recomputes: `none`, all of a block (`full`), or all but its
        matrix products (`dots`) or those without batch dimensions (`dots_no_batch`).
      sequence_parallel: whether `mesh.tensor` shards the tokens of the hidden states between
        sublayers, which a device has all of otherwise: norms, dropout and what the backward pass
        keeps are then shared by the devices, and as many bytes are exchanged. Source: Korthikanti
        et al. 2022, arXiv:2205.05198, section 4.2.2.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    max_length: int
    attention: AttentionConfig
    mlp: MlpConfig
    norm: NormConfig = NormConfig()
    position: PositionConfig = PositionConfig()
    structure: Literal["decoder", "encoder", "prefix", "encoder_decoder"] = "decoder"
    encoder_layers: int = 0
    decoder_start_id: int = renamed("start_id", default=0)
    first_layers: tuple[LayerConfig, ...] = ()
    pattern: tuple[LayerConfig, ...] = (LayerConfig(),)
    experts: ExpertsConfig | None = None
    embedding: EmbeddingConfig = EmbeddingConfig()
    head: HeadConfig = HeadConfig()
    tied_embeddings: bool = False
    scale_embeddings: bool = False
    dropout: float = 0.0
    init_stddev: float = 0.02
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    layer_loop: Literal["auto", "scan", "unroll"] = "auto"
    remat: Literal["none", "full", "dots", "dots_no_batch"] = "none"
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        at_least(self, 1, "vocab_size", "num_layers", "embed_dim", "max_length")
        if not 0 <= self.dropout < 1:
            raise UserError("dropout", self.dropout, "must lie in [0, 1).")
        if self.init_stddev < 0:
            raise UserError("init_stddev", self.init_stddev, "must not be below 0.")
        self._check_layers()
        self._check_positions()

    def _check_layers(self) -> None:
        if not 0 <= self.decoder_start_id < self.vocab_size:
            raise UserError(
                "decoder_start_id",
                self.decoder_start_id,
                f"must lie in [0, vocab_size = {self.vocab_size}).",
            )
        if (self.encoder_layers > 0) != (self.structure == "encoder_decoder"):
            raise UserError(
                "encoder_layers",
                self.encoder_layers,
                "must be above 0 for structure = 'encoder_decoder' and 0 else.",
            )
        if len(self.first_layers) > self.num_layers:
            raise UserError(
                "first_layers",
                constraint=f"are {len(self.first_layers)}, more than num_layers = "
                f"{self.num_layers}.",
            )
        if not self.pattern:
            raise UserError("pattern", constraint="must name at least one layer.")
        if len({(layer.experts, layer.attention_norm) for layer in self.pattern}) > 1:
            raise UserError(
                "pattern",
                constraint=": its layers must agree in experts and attention_norm; first_layers "
                "may differ.",
            )
        if self.structure == "encoder_decoder" and len(self.first_layers) > self.encoder_layers:
            raise UserError(
                "first_layers",
                constraint=f"are {len(self.first_layers)}, more than encoder_layers = "
                f"{self.encoder_layers}.",
            )
        if self.structure != "decoder" and self.head.mtp_depth:
            raise UserError(
                "head.mtp_depth",
                self.head.mtp_depth,
                f"needs structure = 'decoder', not {self.structure!r}.",
            )

    def _check_positions(self) -> None:
        latent = self.attention.latent
        rotated = self.attention.head_dim if latent is None else latent.rope_dim
        for position in (
            self.position,
            *(layer.position for layer in (*self.first_layers, *self.pattern)),
        ):
            if position is None or position.kind != "rotary":
                continue
            width = rotated if position.rotary_dim is None else position.rotary_dim
            if width % 2:
                raise UserError("attention.head_dim", rotated, "must be even for rotary positions.")
            if width > rotated:
                raise UserError(
                    "position.rotary_dim", width, f"is more than attention.head_dim = {rotated}."
                )
            if position.scaling is not None and position.scaling.kind == "dynamic" and width < 4:
                raise UserError(
                    "position.scaling.kind",
                    "dynamic",
                    f"needs at least 4 rotary columns of a head, not {width}.",
                )
            if position.scaling is not None and len(position.scaling.long_factors) not in (
                0,
                width // 2,
            ):
                raise UserError(
                    "position.scaling.long_factors",
                    constraint=f"are {len(position.scaling.long_factors)}, not {width // 2}.",
                )
        if latent is not None and self.position.kind not in ("rotary", "none"):
            raise UserError(
                "position.kind",
                self.position.kind,
                "must be 'rotary' or 'none' with attention.latent.",
            )
        windows = any(layer.window is not None for layer in (*self.first_layers, *self.pattern))
        if self.structure == "prefix" and (windows or self.position.kind.startswith("alibi")):
            raise UserError(
                "structure",
                "prefix",
                f"takes neither windows nor position.kind = {self.position.kind!r}.",
            )
        if self.structure != "decoder" and self.position.kind == "alibi_bfloat16":
            raise UserError(
                "position.kind",
                "alibi_bfloat16",
                f"needs structure = 'decoder', not {self.structure!r}.",
            )

    @property
    def hidden_axes(self) -> tuple[str, str, str]:
        """The logical axes of the hidden states between sublayers."""
        tokens = "residual" if self.sequence_parallel else "length"
        return ("batch", tokens, "embed")

    def layers(self) -> tuple[LayerConfig, ...]:
        """Returns what each layer of the decoder (or the only stack) does, L of them."""
        rest = self.num_layers - len(self.first_layers)
        return (*self.first_layers, *(self.pattern[i % len(self.pattern)] for i in range(rest)))

    def encoder(self) -> "ModelConfig":
        """Returns the encoder of an encoder-decoder as a model of its own."""
        return dataclasses.replace(
            self,
            structure="encoder",
            num_layers=self.encoder_layers,
            encoder_layers=0,
            head=HeadConfig(),
        )

    def position_of(self, layer: LayerConfig) -> PositionConfig:
        """Returns the positions of a layer."""
        return self.position if layer.position is None else layer.position
