"""How a model knows where a token stands, as configuration."""

import dataclasses
from typing import Literal

from research.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
    """Rotary frequencies changed to reach contexts longer than the model was trained on.

    Attributes:
      kind: `linear` divides all frequencies by `factor` (Chen et al. 2023, arXiv:2306.15595);
        `dynamic` raises theta for documents longer than `original_length` (the NTK-aware rule, as
        arXiv:2309.00071, section 3.3 states it); `yarn` divides slow waves only, with a ramp
        between (the same paper, section 3.2); `llama3` ramps in frequency (the LLaMA 3.1 release);
        `longrope` has a divisor for each frequency (Ding et al. 2024, arXiv:2402.13753).
      factor: how many times longer the context becomes, at least 1; not read by `longrope`.
      original_length: tokens that the unstretched model was trained on; not read by `linear`.
      low_frequency_factor: `llama3`: waves longer than `original_length / low_frequency_factor` are
          stretched fully.
      high_frequency_factor: `llama3`: waves shorter than `original_length / high_frequency_factor`
          stay as they are.
      beta_fast: `yarn`: waves that turn more often than this within `original_length` stay as they
          are.
      beta_slow: `yarn`: waves that turn less often than this are stretched fully.
      truncate: `yarn`: whether the ends of the ramp are rounded to whole columns.
      amplitude: factor on the turned queries and keys each (`attention_factor` of YaRN and
          LongRoPE).
      short_factors: `longrope`: divisors of the frequencies in documents of up to `original_length`
          tokens.
      long_factors: `longrope`: the same in longer documents.
    """

    kind: Literal["linear", "dynamic", "yarn", "llama3", "longrope"] = "llama3"
    factor: float = 1.0
    original_length: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    amplitude: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise UserError("factor", self.factor, "must be at least 1.")
        if self.original_length < (0 if self.kind == "linear" else 1):
            raise UserError(
                "original_length",
                self.original_length,
                f"must be at least 1 for kind = {self.kind!r}.",
            )
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise UserError(
                "low_frequency_factor",
                self.low_frequency_factor,
                f"must lie between 0 and high_frequency_factor = {self.high_frequency_factor}.",
            )
        if not 0 < self.beta_slow < self.beta_fast:
            raise UserError(
                "beta_slow", self.beta_slow, f"must lie between 0 and beta_fast = {self.beta_fast}."
            )
        if self.amplitude <= 0:
            raise UserError("amplitude", self.amplitude, "must be above 0.")
        if len(self.short_factors) != len(self.long_factors) or bool(self.long_factors) != (
            self.kind == "longrope"
        ):
            raise UserError(
                "short_factors",
                constraint=f"and long_factors hold {len(self.short_factors)} and "
                f"{len(self.long_factors)} numbers; "
                "kind = 'longrope' needs one a pair of rotary columns in each, other kinds none.",
            )

    @property
    def by_length(self) -> bool:
        """Whether the frequencies in a document depend on its length."""
        return self.kind in ("dynamic", "longrope")


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """How the model knows where a token stands.

    Attributes:
      kind: `learned` and `sinusoidal` are added to the embeddings, `rotary` turns queries and keys,
        `alibi` biases the scores by distance, `alibi_bfloat16` by what that becomes where slopes,
        positions and their products are rounded to bfloat16 and divided by √H (Falcon-RW),
        `buckets` by a learned number a bucket of distances (T5), `relative` by a product of the
        query with projected waves of the distance (Transformer-XL); `none` leaves it to the causal
        mask.
      theta: base of the rotary wavelengths.
      scaling: changed rotary frequencies, or None.
      rotary_dim: leading columns of a head that are turned, even; None is all of them.
      offset: rows of the learned table before that of position 0 (BART and RoBERTa have 2).
      halves: whether the sines of `sinusoidal` fill the first half of the columns and the cosines
        the second (Marian); else each sine has its cosine beside it, as in the paper.
      num_buckets: buckets of distances, even; half of them for each direction where attention goes
          both ways.
      max_distance: from which on all distances share a bucket.
    """

    kind: Literal[
        "none", "learned", "sinusoidal", "rotary", "alibi", "alibi_bfloat16", "buckets", "relative"
    ] = "rotary"
    theta: float = 10_000.0
    scaling: RopeScalingConfig | None = None
    rotary_dim: int | None = None
    offset: int = 0
    halves: bool = False
    num_buckets: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise UserError("theta", self.theta, "must be above 1.")
        if self.scaling is not None and self.kind != "rotary":
            raise UserError("scaling", constraint=f"needs kind = 'rotary', not {self.kind!r}.")
        if self.rotary_dim is not None and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise UserError("rotary_dim", self.rotary_dim, "must be even and at least 2.")
        if self.offset < 0 or (self.offset and self.kind != "learned"):
            raise UserError("offset", self.offset, "must be 0, or above it for kind = 'learned'.")
        if self.halves and self.kind != "sinusoidal":
            raise UserError("halves", True, f"needs kind = 'sinusoidal', not {self.kind!r}.")
        if self.num_buckets < 4 or self.num_buckets % 4:
            raise UserError("num_buckets", self.num_buckets, "must be a multiple of 4, at least 4.")
        if self.max_distance <= self.num_buckets // 2:
            raise UserError(
                "max_distance",
                self.max_distance,
                f"must be above num_buckets / 2 = {self.num_buckets // 2}.",
            )
