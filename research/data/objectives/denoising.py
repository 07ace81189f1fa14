"""Objectives of an encoder-decoder that mends a damaged text: span corruption, mixtures of it,
infilling.

How much of a segment is left out, and in how many spans, depends on its length alone. So the
planner knows the widths of a segment in both rows, and only where the spans lie is drawn, anew in
every epoch.
"""

import numpy as np
from jaxtyping import Int, Shaped, UInt

from research.data.batch import Batch
from research.data.chance import below, choose, ragged_arange, shuffled
from research.data.objectives.base import (
    Ids,
    Objective,
    Segments,
    encoder_decoder_batch,
    interleave,
)
from research.data.objectives.config import InfillConfig, SpanConfig

SEGMENTATION, GAPS, LENGTHS, SENTENCES = range(4)


def noise_tokens(
    lengths: Int[np.ndarray, "P"], density: Shaped[np.ndarray, "P"]
) -> Int[np.ndarray, "P"]:
    """Returns how many tokens are left out of each segment: density · n, rounded, but neither none
    nor all.

    A segment of one token loses it.
    """
    noise = np.rint(lengths * density).astype(np.int64)
    return np.clip(noise, 1, np.maximum(lengths - 1, 1))


def span_count(
    noise: Int[np.ndarray, "P"], mean_span: Shaped[np.ndarray, "P"], most: Int[np.ndarray, "P"]
) -> Int[np.ndarray, "P"]:
    """Returns in how many spans they lie: noise / mean, rounded, at least 1 and at most `most`."""
    return np.maximum(np.minimum(np.rint(noise / mean_span).astype(np.int64), most), 1)


def alternating(
    kept: Int[np.ndarray, "P"],
    noise: Int[np.ndarray, "P"],
    spans: Int[np.ndarray, "P"],
    draws: UInt[np.ndarray, "_"],
) -> Int[np.ndarray, "_ 2"]:
    """Draws the lengths of the kept and of the left-out runs, which alternate: kept first, a
    left-out one last.

    Both numbers are cut into as many parts as there are spans, none of them empty, each way as
    likely as the others.

    Args:
      kept, noise: tokens of each kind in each segment.
      spans: of each segment; at most its noise, and at most its kept tokens where there are any.
      draws: one for each token of the segments.
    """
    sizes = np.stack([noise, kept], axis=1).ravel()
    counts = np.minimum(np.repeat(spans, 2), sizes)
    last = np.cumsum(sizes)[sizes > 0] - 1
    # A cut after a token ends its part. The last one always does; the others are drawn.
    draws = draws.copy()
    draws[last] = np.iinfo(np.uint64).max
    cuts = choose(draws, sizes, np.maximum(counts - 1, 0))
    cuts[last] = True
    part = np.cumsum(cuts) - cuts - np.repeat(np.cumsum(counts) - counts, sizes)
    span = np.repeat(np.repeat(np.cumsum(spans) - spans, 2), sizes) + part
    is_noise = np.repeat(np.arange(len(sizes)) % 2 == 0, sizes)
    return np.bincount(2 * span + is_noise, minlength=2 * int(spans.sum())).reshape(-1, 2)


class Spans(Objective):
    """The encoder reads a text with a sentinel for each span that is left out; the decoder gives
    sentinels and spans.

        text     t₁ t₂ t₃ t₄ t₅ t₆        encoder  [mode] t₁ ⟨0⟩ t₄ t₅ ⟨1⟩ EOS      decoder  ⟨0⟩ t₂
        t₃ ⟨1⟩ t₆ EOS

    With several denoisers each segment has one, fixed when the rows are planned; its spans change
    with the epoch. There
    are never more spans than sentinels: the spans of very long segments are longer. A segment too
    short for two spans loses its end.

    Source: Raffel et al. 2020, arXiv:1910.10683, section 3.1.4; Tay et al. 2022, arXiv:2205.05131,
        section 3.1.2.
    """

    def __init__(
        self, denoisers: tuple[SpanConfig, ...], ids: Ids, sequence_length: int, encoder_length: int
    ):
        super().__init__(ids, sequence_length, encoder_length)
        self.variant_weights = tuple(denoiser.weight for denoiser in denoisers)
        self._density = np.array([denoiser.density for denoiser in denoisers])
        # A span of any length is one that never ends before the noise does.
        self._mean_span = np.array(
            [np.inf if d.mean_span is None else d.mean_span for d in denoisers]
        )
        self._mode = np.array([-1 if d.mode_id is None else d.mode_id for d in denoisers])

    def _counts(
        self, lengths: Int[np.ndarray, "P"], variants: Int[np.ndarray, "P"]
    ) -> tuple[np.ndarray, ...]:
        """Returns tokens kept, tokens left out, and spans of each segment."""
        noise = noise_tokens(lengths, self._density[variants])
        kept = lengths - noise
        most = np.minimum(np.minimum(noise, kept), len(self.ids.sentinels))
        return kept, noise, span_count(noise, self._mean_span[variants], most)

    def widths(
        self, lengths: Int[np.ndarray, "P"], variants: Int[np.ndarray, "P"]
    ) -> Int[np.ndarray, "2 P"]:
        kept, noise, spans = self._counts(lengths, variants)
        return np.stack([noise + spans + 1, kept + spans + 1 + (self._mode[variants] >= 0)])

    def batch(self, segments: Segments) -> Batch:
        ids = self.ids
        kept, noise, spans = self._counts(segments.lengths, segments.variants)
        mode = self._mode[segments.variants]
        text = segments.tokens[segments.token_indices()]
        runs = alternating(kept, noise, spans, segments.draws(SEGMENTATION))
        is_noise = np.repeat(np.tile([False, True], len(runs)), runs.ravel())
        sentinels = np.array(ids.sentinels)[ragged_arange(spans)]
        out_lengths, in_lengths = self.widths(segments.lengths, segments.variants)
        out_ends, in_ends = np.cumsum(out_lengths), np.cumsum(in_lengths)
        segment = np.repeat(np.arange(len(spans)), spans)
        # Before the k-th sentinel of all come as many sentinels, and the EOS (and mode) of the
        # segments before.
        k = np.arange(len(runs))
        in_sentinels = np.cumsum(runs[:, 0]) + k + segment + np.cumsum(mode >= 0)[segment]
        out_sentinels = np.cumsum(runs[:, 1]) - runs[:, 1] + k + segment
        marks = [(in_sentinels, sentinels), (in_ends - 1, ids.eos)]
        marks.append(((in_ends - in_lengths)[mode >= 0], mode[mode >= 0]))
        encoder = interleave(int(in_lengths.sum()), marks, text[~is_noise])
        targets = interleave(
            int(out_lengths.sum()),
            [(out_sentinels, sentinels), (out_ends - 1, ids.eos)],
            text[is_noise],
        )
        return encoder_decoder_batch(
            self, encoder, in_lengths, targets, out_lengths, segments.row_sizes
        )


class Infill(Objective):
    """The encoder reads a text, sentences shuffled, a mask for each span that is left out; the
    decoder gives it whole.

    Spans have Poisson lengths, zero included, under the condition that they add up to the tokens
    left out: given its sum, a vector of equal Poisson variables is multinomial, so each token left
    out picks its span. No two masks meet. A sentence ends with a full stop.

    Source: Lewis et al. 2019, arXiv:1910.13461, section 2.2. There the number of spans is drawn,
        too.
    """

    def __init__(self, config: InfillConfig, ids: Ids, sequence_length: int, encoder_length: int):
        super().__init__(ids, sequence_length, encoder_length)
        self._config = config
        self._frame = 1 + (ids.bos is not None)

    def _counts(self, lengths: Int[np.ndarray, "P"]) -> tuple[np.ndarray, ...]:
        """Returns tokens kept, tokens left out, and spans of each segment."""
        noise = noise_tokens(lengths, np.full(len(lengths), self._config.density))
        kept = lengths - noise
        return (
            kept,
            noise,
            span_count(noise, np.full(len(lengths), self._config.mean_span), kept + 1),
        )

    def widths(
        self, lengths: Int[np.ndarray, "P"], variants: Int[np.ndarray, "P"]
    ) -> Int[np.ndarray, "2 P"]:
        kept, _, spans = self._counts(lengths)
        return np.stack([lengths, kept + spans]) + self._frame

    def batch(self, segments: Segments) -> Batch:
        kept, noise, spans = self._counts(segments.lengths)
        text = segments.tokens[segments.token_indices()]
        out_lengths, in_lengths = self.widths(segments.lengths, segments.variants)
        # A mask lies before the g-th kept token of its segment, or at the end.
        gaps = np.flatnonzero(choose(segments.draws(GAPS, kept + 1), kept + 1, spans))
        segment = np.repeat(np.arange(len(spans)), spans)
        first = np.cumsum(spans) - spans
        gap = gaps - (np.cumsum(kept + 1) - (kept + 1))[segment]
        pick = np.repeat(first, noise) + below(
            segments.draws(LENGTHS, noise), np.repeat(spans, noise)
        )
        left_out = np.bincount(pick, minlength=len(gaps))
        # Each span is left out after the kept tokens, and the spans, before its gap.
        before = np.cumsum(left_out) - left_out
        begin = (
            gap
            + before
            - before[first][segment]
            + (np.cumsum(segments.lengths) - segments.lengths)[segment]
        )
        is_noise = np.zeros(len(text), bool)
        is_noise[np.repeat(begin, left_out) + ragged_arange(left_out)] = True
        damaged = (
            text[self._sentence_order(segments, text)][~is_noise]
            if self._config.permute
            else text[~is_noise]
        )
        masks = (
            (np.cumsum(in_lengths) - in_lengths)[segment]
            + (self._frame - 1)
            + gap
            + ragged_arange(spans)
        )
        encoder = self._framed([(masks, self.ids.mask)], damaged, in_lengths)
        targets = self._framed([], text, out_lengths)
        return encoder_decoder_batch(
            self, encoder, in_lengths, targets, out_lengths, segments.row_sizes
        )

    def _sentence_order(
        self, segments: Segments, text: Shaped[np.ndarray, "_"]
    ) -> Int[np.ndarray, "_"]:
        begins = ragged_arange(segments.lengths) == 0
        begins[1:] |= text[:-1] == self.ids.sentence_end
        sentence = np.cumsum(begins) - 1
        draws = segments.draws(SENTENCES)[begins][sentence]
        return shuffled(draws, np.repeat(np.arange(len(segments.lengths)), segments.lengths))

    def _framed(
        self, marks: list, text: Shaped[np.ndarray, "_"], lengths: Int[np.ndarray, "P"]
    ) -> Int[np.ndarray, "_"]:
        ends = np.cumsum(lengths)
        frame = [(ends - lengths, self.ids.bos)] if self.ids.bos is not None else []
        return interleave(int(lengths.sum()), [*marks, *frame, (ends - 1, self.ids.eos)], text)
