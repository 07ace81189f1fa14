"""What a model learns from a document, as a config."""

import dataclasses
from typing import Literal

from research.core.errors import UserError

Kind = Literal["causal", "masked", "prefix", "span", "denoise", "infill", "translate"]
# Those whose model has an encoder.
ENCODED: tuple[Kind, ...] = ("span", "denoise", "infill", "translate")


def _check_density(density: float) -> None:
    if not 0 < density < 1:
        raise UserError("density", density, "must lie in (0, 1).")


def _check_mean_span(mean_span: float | None) -> None:
    if mean_span is not None and mean_span < 1:
        raise UserError("mean_span", mean_span, "must be at least 1.")


@dataclasses.dataclass(frozen=True)
class MaskedConfig:
    """Masked language modeling of an encoder.

    Attributes:
      density: share of a segment's tokens that are predicted, in (0, 1).
      mask: share of these that are shown as the mask token, in [0, 1].
      random: share of these that are shown as any token, in [0, 1]; the rest are shown as they are.

    Source: Devlin et al. 2019, arXiv:1810.04805, section 3.1.
    """

    density: float = 0.15
    mask: float = 0.8
    random: float = 0.1

    def __post_init__(self):
        _check_density(self.density)
        if min(self.mask, self.random) < 0 or self.mask + self.random > 1:
            raise UserError(
                "mask",
                self.mask,
                f"and random = {self.random} must not be negative, nor above 1 together.",
            )


@dataclasses.dataclass(frozen=True)
class SpanConfig:
    """Span corruption: some spans of the text are left out of the encoder's input, and the decoder
    predicts them.

    Attributes:
      density: share of a segment's tokens that is left out, in (0, 1).
      mean_span: mean tokens of a span, at least 1; None: a single span, at the end.
      weight: share of this denoiser in a mixture, relative to the others'; above 0.
      mode_id: a token that tells the encoder which denoiser it is; None: no token.

    Source: Raffel et al. 2020, arXiv:1910.10683, section 3.1.4.
    """

    density: float = 0.15
    mean_span: float | None = 3.0
    weight: float = 1.0
    mode_id: int | None = None

    def __post_init__(self):
        _check_density(self.density)
        _check_mean_span(self.mean_span)
        if self.weight <= 0:
            raise UserError("weight", self.weight, "must be above 0.")
        if self.mode_id is not None and self.mode_id < 0:
            raise UserError("mode_id", self.mode_id, "must not be negative.")


# Two R-denoisers, the S-denoiser (one span, the last quarter of the segment), four X-denoisers.
# Source: Tay et al. 2022, arXiv:2205.05131, table 1.
UL2 = (
    SpanConfig(density=0.15, mean_span=3.0),
    SpanConfig(density=0.15, mean_span=8.0),
    SpanConfig(density=0.25, mean_span=None),
    SpanConfig(density=0.5, mean_span=3.0),
    SpanConfig(density=0.5, mean_span=8.0),
    SpanConfig(density=0.15, mean_span=64.0),
    SpanConfig(density=0.5, mean_span=64.0),
)


@dataclasses.dataclass(frozen=True)
class InfillConfig:
    """Text infilling: one mask token replaces a span of any length, and the decoder predicts the
    whole text.

    Attributes:
      density: share of a segment's tokens that is left out, in (0, 1).
      mean_span: mean tokens of a span, at least 1; some spans are empty.
      permute: whether the encoder's sentences come in random order.

    Source: Lewis et al. 2019, arXiv:1910.13461, section 2.2.
    """

    density: float = 0.3
    mean_span: float = 3.0
    permute: bool = True

    def __post_init__(self):
        _check_density(self.density)
        _check_mean_span(self.mean_span)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What a model learns from a document.

    Attributes:
      kind: `causal` (each token from those before it), `masked` (hidden tokens from all others),
        `prefix` (the rest of a segment from its beginning, which has bidirectional attention), or,
        with an encoder: `span` (what is left out), `denoise` (a mixture of such), `infill` (the
        whole text from a damaged one), `translate` (the second text of a pair from the first).
      encoder_length: tokens of a row of the encoder, M; None: as many as the decoder's.
      decoder_start: the token that the decoder's input begins with: T5 takes PAD, BART EOS.
      masked: read by `masked`.
      span: read by `span`.
      denoisers: read by `denoise`; at least one.
      infill: read by `infill`.
    """

    kind: Kind = "causal"
    encoder_length: int | None = None
    decoder_start: Literal["pad", "bos", "eos"] = "pad"
    masked: MaskedConfig = MaskedConfig()
    span: SpanConfig = SpanConfig()
    denoisers: tuple[SpanConfig, ...] = UL2
    infill: InfillConfig = InfillConfig()

    def __post_init__(self):
        if self.encoder_length is not None:
            if self.encoder_length < 1:
                raise UserError("encoder_length", self.encoder_length, "must be at least 1.")
            if self.kind not in ENCODED:
                raise UserError(
                    "encoder_length",
                    self.encoder_length,
                    f"must be None for kind = {self.kind!r}: it has no encoder.",
                )
        if not self.denoisers:
            raise UserError("denoisers", (), "must name at least one.")

    @property
    def predicts_all_text(self) -> bool:
        """Whether every token of the text is predicted once, so that the loss is that of a known
        number of bytes.
        """
        return self.kind == "causal"


CAUSAL = ObjectiveConfig()
