"""What a model is: frozen configs, validated where they are made."""

import dataclasses
from typing import Literal

from research.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
    """Stretched rotary frequencies, as LLaMA 3.1 uses them to reach longer contexts.

    Attributes:
      factor: how many times longer the slow waves become.
      low_frequency_factor: waves longer than `original_length / low_frequency_factor` are stretched fully.
      high_frequency_factor: waves shorter than `original_length / high_frequency_factor` stay as they are.
      original_length: tokens that the unstretched model was trained on.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise UserError(f"factor = {self.factor} must be at least 1.")
        if self.original_length < 1:
            raise UserError(f"original_length = {self.original_length} must be at least 1.")
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise UserError(
                f"low_frequency_factor = {self.low_frequency_factor} must lie between 0 and "
                f"high_frequency_factor = {self.high_frequency_factor}."
            )


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """How the model knows where a token stands.

    Attributes:
      kind: `learned` and `sinusoidal` are added to the embeddings, `rotary` turns queries and keys, `alibi` biases
        the scores, `none` leaves it to the causal mask.
      theta: base of the rotary wavelengths.
      scaling: stretched rotary frequencies, or None.
    """

    kind: Literal["none", "learned", "sinusoidal", "rotary", "alibi"] = "rotary"
    theta: float = 10_000.0
    scaling: RopeScalingConfig | None = None

    def __post_init__(self) -> None:
        if self.theta <= 0:
            raise UserError(f"theta = {self.theta} must be above 0.")
        if self.scaling is not None and self.kind != "rotary":
            raise UserError(f"scaling needs kind = 'rotary', not {self.kind!r}.")


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """Normalization of the residual stream.

    Attributes:
      kind: `layernorm` subtracts the mean, `rmsnorm` does not.
      placement: `pre` normalizes what a sublayer reads (and once at the end), `post` what the residual sum gives.
      epsilon: added to the variance.
      bias: whether a learned offset follows the scale.
    """

    kind: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    placement: Literal["pre", "post"] = "pre"
    epsilon: float = 1e-5
    bias: bool = False

    def __post_init__(self) -> None:
        if self.epsilon < 0:
            raise UserError(f"epsilon = {self.epsilon} must not be below 0.")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention.

    Attributes:
      num_heads: query heads N.
      num_kv_heads: key/value heads K: N is multi-head, 1 is multi-query, between them grouped-query attention.
      head_dim: head width H.
      qkv_bias: whether the query, key and value projections have a bias.
      out_bias: whether the output projection has one.
      implementation: which kernel computes it; `auto` picks by backend, and `reference`, which holds all scores of a
        layer, is taken by name only.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    implementation: Literal["auto", "reference", "cpu", "tpu", "gpu", "cudnn"] = "auto"

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}.")


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    """The feed-forward sublayer.

    Attributes:
      hidden_dim: width F.
      activation: `gelu` is exact, `gelu_tanh` its tanh approximation.
      gated: whether a second projection is activated and multiplied in (SwiGLU with `silu`, GeGLU with `gelu`).
      bias: whether its projections have biases.
    """

    hidden_dim: int
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "silu"
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        if self.hidden_dim < 1:
            raise UserError(f"hidden_dim = {self.hidden_dim} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
      vocab_size: rows V of the embedding.
      num_layers: blocks L.
      embed_dim: model width D.
      max_length: the longest sequence in tokens; learned positions have this many rows.
      attention: the attention sublayer.
      mlp: the feed-forward sublayer.
      norm: the normalization.
      position: where positions enter.
      tied_embeddings: whether the embedding is also the output projection.
      scale_embeddings: whether embeddings are multiplied by √D, as with sinusoidal positions (Vaswani et al. 2017).
      dropout: rate on embeddings and on what each sublayer adds.
      init_stddev: of all matrices; projections into the residual stream are divided by √(2L) (GPT-2).
      dtype: of activations and matrix products; parameters are always float32.
      layer_loop: `scan` compiles one block for all layers, `unroll` each one; `auto` unrolls on CPU, where loops are
        slow. The parameters on disk are the same.
      remat: what the backward pass recomputes: `none`, all of a block (`full`), or all but its matrix products (`dots`)
        or those without batch dimensions (`dots_no_batch`).
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    max_length: int
    attention: AttentionConfig
    mlp: MlpConfig
    norm: NormConfig = NormConfig()
    position: PositionConfig = PositionConfig()
    tied_embeddings: bool = False
    scale_embeddings: bool = False
    dropout: float = 0.0
    init_stddev: float = 0.02
    dtype: Literal["float32", "bfloat16"] = "float32"
    layer_loop: Literal["auto", "scan", "unroll"] = "auto"
    remat: Literal["none", "full", "dots", "dots_no_batch"] = "none"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "embed_dim", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout = {self.dropout} must lie in [0, 1).")
        if self.init_stddev < 0:
            raise UserError(f"init_stddev = {self.init_stddev} must not be below 0.")
        if self.position.kind == "rotary" and self.attention.head_dim % 2:
            raise UserError(f"attention.head_dim = {self.attention.head_dim} must be even for rotary positions.")
