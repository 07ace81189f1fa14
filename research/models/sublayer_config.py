"""Configs of the sublayers of a block, frozen and validated when they are made."""

import dataclasses
from typing import Any, Literal

from research.core.errors import UserError
from research.kernels.attention import KeyExchange

# JAX's limit on the length of an axis.
_LIMIT = 2**31


def at_least(config: Any, least: int, *names: str) -> None:
    """Raises UserError where one of these fields is below `least`, or no array has such a size."""
    for name in names:
        value = getattr(config, name)
        if value < least:
            raise UserError(name, value, f"must be at least {least}.")
        if value >= _LIMIT:
            raise UserError(name, value, f"must be below {_LIMIT:,}, an array's limit.")


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (MLA): queries, keys and values are projected from narrow latents
    (DeepSeek-V2, arXiv:2405.04434).

    A head then has `head_dim` columns without position and `rope_dim` rotary ones; all heads share
    one rotary key.

    Attributes:
      kv_dim: width of the latent of keys and values.
      q_dim: width of the queries' latent; None projects queries directly.
      rope_dim: rotary columns of a head, even.
      value_dim: width of a head's values.
      epsilon: of the norms of the latents; in the released code it is not that of other norms.
    """

    kv_dim: int
    q_dim: int | None
    rope_dim: int
    value_dim: int
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        at_least(self, 1, "kv_dim", "value_dim")
        if self.q_dim is not None:
            at_least(self, 1, "q_dim")
        at_least(self, 0, "epsilon")
        if self.rope_dim < 2 or self.rope_dim % 2:
            raise UserError("rope_dim", self.rope_dim, "must be even and at least 2.")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention.

    Attributes:
      num_heads: query heads N.
      num_kv_heads: key/value heads K: N is multi-head, 1 is multi-query, between them grouped-query
          attention.
      head_dim: head width H.
      qkv_bias: whether the query, key and value projections have a bias.
      out_bias: whether the output projection has one.
      scale: factor on the scores; None is 1 / √H. T5 has 1.
      softcap: bound of the scores, softcap · tanh(score / softcap), or None.
      sinks: whether each head has a learned logit that takes part in the softmax's denominator only
          (gpt-oss).
      qk_norm: RMS norm of queries and keys before RoPE: of each `head` (Qwen 3), of all heads as
        one vector (`all`, OLMo 2), or `none`.
      latent: multi-head latent attention, or None.
      implementation: which kernel computes it; `auto` picks by backend, but never `reference`,
        which holds all scores of a layer.
      exchange: how queries meet the keys of other devices, where `mesh.context` shards the tokens.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    qk_norm: Literal["none", "head", "all"] = "none"
    latent: LatentConfig | None = None
    implementation: Literal["auto", "reference", "cpu", "tpu", "gpu", "cudnn"] = "auto"
    exchange: KeyExchange = KeyExchange()

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads", "num_kv_heads", "head_dim")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                "num_kv_heads", self.num_kv_heads, f"does not divide num_heads = {self.num_heads}."
            )
        for name in ("scale", "softcap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(name, value, "must be above 0.")
        if self.latent is not None and self.num_kv_heads != self.num_heads:
            raise UserError(
                "num_kv_heads",
                self.num_kv_heads,
                f"must be num_heads = {self.num_heads} with `latent`.",
            )
        if self.latent is not None and (self.qkv_bias or self.sinks or self.qk_norm != "none"):
            raise UserError("latent", constraint="has neither qkv_bias, sinks nor qk_norm.")


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    """The feed-forward sublayer.

    Attributes:
      hidden_dim: width F.
      activation: `gelu` is exact, `gelu_tanh` its tanh approximation, `gelu_sigmoid` x ·
          sigmoid(1.702 x).
      gated: whether the activation of a second projection, the gate, is multiplied in (SwiGLU with
          `silu`, GeGLU with `gelu`).
      bias: whether its projections have biases.
      clamp: upper bound of the gate's input, and bound of the other projection on both sides
          (gpt-oss), or None.
      up_offset: added to the projection that the gate multiplies (gpt-oss has 1).
    """

    hidden_dim: int
    activation: Literal["gelu", "gelu_tanh", "gelu_sigmoid", "relu", "silu"] = "silu"
    gated: bool = True
    bias: bool = False
    clamp: float | None = None
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        at_least(self, 1, "hidden_dim")
        if self.clamp is not None and self.clamp <= 0:
            raise UserError("clamp", self.clamp, "must be above 0.")
        if not self.gated and (self.clamp is not None or self.up_offset):
            raise UserError("clamp", constraint="and up_offset need gated = True.")


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts instead of the feed-forward sublayer, whose `MlpConfig` describes each
    expert.

    Every token goes to `experts_per_token` experts, whatever their load, unless a capacity or a
    buffer bounds it: then some choices are dropped, and contribute nothing.

    Attributes:
      num_experts: E.
      experts_per_token: how many a token goes to.
      hidden_dim: width F of an expert.
      shared_dim: width of the expert that every token goes to; 0 is none.
      shared_gate: whether the shared expert's output is multiplied by a learned sigmoid (Qwen 2).
      score: of the router's logits: a `softmax` over the experts, or a `sigmoid` of each
          (DeepSeek-V3).
      renormalize: whether the weights of the chosen experts are divided by their sum.
      router_bias: whether the router's logits have a learned bias.
      selection_bias: whether a bias is added to the scores for the choice alone, not for the
        weights (DeepSeek-V3).
      bias_speed: how far that bias moves in a step of training: up where an expert has less than
        the mean load, down where it has more; 0 keeps it constant.
      num_groups: groups of experts, of which a token may use `groups_per_token`, those with the
          best two experts.
      groups_per_token: see `num_groups`.
      scale: factor on the weights of the chosen experts.
      balance_weight: of the loss that keeps the load even (Fedus et al. 2021, arXiv:2101.03961,
          equation 4).
      z_weight: of the router's z-loss (Zoph et al. 2022, arXiv:2202.08906, equation 5).
      capacity_factor: the most choices of a row that an expert takes, as a multiple of an even
          share, factor · T · experts_per_token / E (Lepikhin et al. 2020, arXiv:2006.16668, section
          2.2, with a row as a group); first choices come before second ones, and then earlier
          tokens. None drops nothing.
      buffer_factor: the most choices that a device takes from the others along the mesh axis
          `expert`, as a multiple of an even share; None reserves memory for all that may come, and
          drops nothing.
    """

    num_experts: int
    experts_per_token: int
    hidden_dim: int
    shared_dim: int = 0
    shared_gate: bool = False
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    router_bias: bool = False
    selection_bias: bool = False
    bias_speed: float = 0.0
    num_groups: int = 1
    groups_per_token: int = 1
    scale: float = 1.0
    balance_weight: float = 0.0
    z_weight: float = 0.0
    capacity_factor: float | None = None
    buffer_factor: float | None = None

    def __post_init__(self) -> None:
        at_least(
            self,
            1,
            "num_experts",
            "experts_per_token",
            "hidden_dim",
            "num_groups",
            "groups_per_token",
        )
        at_least(self, 0, "shared_dim", "balance_weight", "bias_speed", "z_weight")
        has_equal_groups = self.num_experts % self.num_groups == 0
        if not has_equal_groups or self.groups_per_token > self.num_groups:
            raise UserError(
                "num_groups",
                self.num_groups,
                f"must divide num_experts = {self.num_experts}, and be at least groups_per_token = "
                f"{self.groups_per_token}.",
            )

        # 8 experts in 4 groups, 2 groups per token: a token may choose among 4 experts.
        group_size = self.num_experts // self.num_groups
        num_allowed = group_size * self.groups_per_token
        if self.experts_per_token > num_allowed:
            raise UserError(
                "experts_per_token", self.experts_per_token, f"must be at most {num_allowed}."
            )
        if self.bias_speed and not self.selection_bias:
            raise UserError("bias_speed", self.bias_speed, "needs selection_bias = True.")
        if self.shared_gate and not self.shared_dim:
            raise UserError("shared_gate", constraint="needs shared_dim above 0.")
        for name in ("capacity_factor", "buffer_factor"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(name, value, "must be above 0, or None to drop nothing.")
        if self.num_groups > 1 and group_size < 2:
            raise UserError(
                "num_groups", self.num_groups, "leaves fewer than two experts per group."
            )
