"""Configs of position encodings: learned, sinusoidal, rotary (RoPE), ALiBi, relative."""

import dataclasses
from typing import Literal

from research.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
    """Rotary frequencies changed to reach contexts longer than the model was trained on.

    Attributes:
      kind: `linear` divides all frequencies by `factor` (Chen et al. 2023, arXiv:2306.15595);
        `dynamic` raises theta for documents longer than `original_length` (the NTK-aware rule, as
        arXiv:2309.00071, section 3.3 states it); `yarn` divides low frequencies only, with a ramp
        over the column pairs (the same paper, section 3.2); `llama3` has a ramp over the
        frequencies (the LLaMA 3.1 release); `longrope` has a divisor for each frequency (Ding et
        al. 2024, arXiv:2402.13753).
      factor: how many times longer the context becomes, at least 1; not read by `longrope`.
      original_length: context length, in tokens, that the model was trained on before RoPE
          scaling; not read by `linear`.
      low_frequency_factor: `llama3`: wavelengths above `original_length / low_frequency_factor` are
          multiplied by `factor`.
      high_frequency_factor: `llama3`: wavelengths below `original_length / high_frequency_factor`
          stay the same.
      beta_fast: `yarn`: frequencies with more rotations than this within `original_length` stay the
          same.
      beta_slow: `yarn`: frequencies with fewer rotations than this are divided by `factor`.
      truncate: `yarn`: whether the ends of the ramp are rounded to integer column pairs.
      amplitude: factor on both the rotated queries and the rotated keys (`attention_factor` of YaRN
          and LongRoPE).
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
        least_length = 0 if self.kind == "linear" else 1
        if self.original_length < least_length:
            raise UserError(
                "original_length",
                self.original_length,
                f"must be at least 1 for kind = {self.kind!r}.",
            )
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise UserError(
                "low_frequency_factor",
                self.low_frequency_factor,
                f"must be between 0 and high_frequency_factor = {self.high_frequency_factor}.",
            )
        if not 0 < self.beta_slow < self.beta_fast:
            raise UserError(
                "beta_slow", self.beta_slow, f"must be between 0 and beta_fast = {self.beta_fast}."
            )
        if self.amplitude <= 0:
            raise UserError("amplitude", self.amplitude, "must be above 0.")

        # LongRoPE needs both lists, of one length; other kinds neither.
        num_short = len(self.short_factors)
        num_long = len(self.long_factors)
        needs_factors = self.kind == "longrope"
        if num_short != num_long or (num_long > 0) != needs_factors:
            raise UserError(
                "short_factors",
                constraint=f"and long_factors hold {num_short} and {num_long} numbers; "
                "kind = 'longrope' needs one per pair of rotary columns in each, other kinds none.",
            )

    @property
    def by_length(self) -> bool:
        """Whether the frequencies in a document depend on its length."""
        return self.kind in ("dynamic", "longrope")


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """How the positions of tokens enter the model.

    Attributes:
      kind: `learned` and `sinusoidal` are added to the embeddings; `rotary` rotates queries and
        keys. The others add a bias to the scores: `alibi` by distance; `alibi_bfloat16` the same
        with slopes, positions and their products rounded to bfloat16 and divided by √H (Falcon-RW);
        `buckets` a learned number for each bucket of distances (T5); `relative` the product of the
        query with projected sinusoids of the distance (Transformer-XL). With `none` positions enter
        by the causal mask alone.
      theta: base of the rotary wavelengths.
      scaling: RoPE scaling, or None.
      rotary_dim: how many leading columns of a head are rotary, even; None is all of them.
      offset: rows of the learned table before that of position 0 (BART and RoBERTa have 2).
      halves: whether the sines of `sinusoidal` fill the first half of the columns and the cosines
        the second (Marian); else sines and cosines alternate, as in the paper.
      num_buckets: buckets of distances, a multiple of 4; half of them for each direction where
          attention is bidirectional.
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
            half = self.num_buckets // 2
            raise UserError(
                "max_distance", self.max_distance, f"must be above num_buckets / 2 = {half}."
            )
