"""Objectives of an encoder-decoder that restores a damaged text: span corruption, mixtures of it,
infilling.

How many tokens of a segment are left out, and in how many spans, depends on its length and its
denoiser alone, so the planner knows the width of a segment on both sides of a row. Only the places
of the spans are drawn, anew in every epoch. Tokens that are left out are called noise, the others
kept.
"""

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt

from research.data.batch import Batch
from research.data.draws import below, choose, shuffled
from research.data.objectives.base import (
    Ids,
    Objective,
    Segments,
    encoder_decoder_batch,
    interleave,
)
from research.data.objectives.config import InfillConfig, SpanConfig
from research.data.ragged import (
    exclusive_cumsum_in_groups,
    group_indices,
    group_starts,
    ragged_arange,
    range_indices,
)

# Purpose ids: hash64 salts.
SEGMENTATION = 0
GAPS = 1
LENGTHS = 2
SENTENCES = 3


def noise_tokens(
    lengths: Int[np.ndarray, "segments"], density: Shaped[np.ndarray, "segments"]
) -> Int[np.ndarray, "segments"]:
    """Returns how many tokens are left out of each segment: density · n, rounded, at least
    one and not all.

    A segment of one token loses that token.
    """
    noise = np.rint(lengths * density)
    most = np.maximum(lengths - 1, 1)
    return np.clip(noise.astype(np.int64), 1, most)


def span_count(
    noise: Int[np.ndarray, "segments"],
    mean_span: Shaped[np.ndarray, "segments"],
    most: Int[np.ndarray, "segments"],
) -> Int[np.ndarray, "segments"]:
    """Returns the number of spans: noise / mean, rounded, at least 1 and at most `most`."""
    spans = np.rint(noise / mean_span)
    spans = np.minimum(spans.astype(np.int64), most)
    return np.maximum(spans, 1)


def random_runs(
    kept: Int[np.ndarray, "segments"],
    noise: Int[np.ndarray, "segments"],
    spans: Int[np.ndarray, "segments"],
    draws: UInt[np.ndarray, "_"],
) -> Int[np.ndarray, "spans 2"]:
    """Returns [kept, noise] tokens of each span: a run that is kept, then a run that is left out.

    As T5's `random_spans_noise_mask`: kept and noise are each cut into as many runs as there are
    spans, none of them empty, every way to cut as likely as every other.

    Args:
      kept, noise: tokens of each kind in each segment.
      spans: of each segment; at most its noise, and at most its kept tokens where there are any.
      draws: independent random numbers, as many as the segments have tokens.
    """
    # Two groups per segment, noise first. Draws are only independent random numbers: draw i does
    # not belong to token i of the text. Noise 2, kept 4, 2 spans -> sizes [2, 4], runs [2, 2]
    sizes = np.stack([noise, kept], axis=1)
    sizes = sizes.ravel()
    num_runs = np.repeat(spans, 2)
    num_runs = np.minimum(num_runs, sizes)

    # A cut after a token ends its run. The group's last token is always cut; other cuts are drawn.
    # -> is_cut [T, T, F, T, F, T]
    ends = np.cumsum(sizes)
    last = ends[sizes > 0] - 1
    draws = draws.copy()
    draws[last] = np.iinfo(np.uint64).max  # the largest draw: choose never takes it
    num_drawn = np.maximum(num_runs - 1, 0)
    is_cut = choose(draws, sizes, num_drawn)
    is_cut[last] = True

    # A token's run in its group is the number of cuts before it: [0, 1, 0, 0, 1, 1]
    run = exclusive_cumsum_in_groups(is_cut, sizes)

    # Run r of a group belongs to span r of its segment. Count the tokens of each span by kind:
    # -> [[kept 2, noise 1], [kept 2, noise 1]]
    first_span = np.repeat(group_starts(spans), 2)
    span = np.repeat(first_span, sizes) + run
    group_is_noise = np.arange(len(sizes)) % 2 == 0
    is_noise = np.repeat(group_is_noise, sizes)
    num_spans = int(spans.sum())
    counts = np.bincount(2 * span + is_noise, minlength=2 * num_spans)
    return counts.reshape(num_spans, 2)


class Spans(Objective):
    """Span corruption: the encoder reads a text with a sentinel for each span that is left out; the
    decoder predicts sentinels and spans.

        text     t₁ t₂ t₃ t₄ t₅ t₆
        encoder  [mode] t₁ t₂ ⟨0⟩ t₄ t₅ ⟨1⟩ EOS
        decoder  ⟨0⟩ t₃ ⟨1⟩ t₆ EOS

    With several denoisers each segment has one, its variant, which is fixed when the rows are
    planned; its spans change with the epoch. There are never more spans than sentinels: the spans
    of very long segments are longer. A segment too short for two spans has one, at its end.

    Source: Raffel et al. 2020, arXiv:1910.10683, section 3.1.4; Tay et al. 2022, arXiv:2205.05131,
        section 3.1.2.
    """

    def __init__(
        self, denoisers: tuple[SpanConfig, ...], ids: Ids, sequence_length: int, encoder_length: int
    ):
        super().__init__(ids, sequence_length, encoder_length)
        self.variant_weights = tuple(denoiser.weight for denoiser in denoisers)

        # Per variant. mean_span None -> inf: round(noise / inf) = 0, which span_count raises to one
        # span. mode_id None -> -1.
        densities = [d.density for d in denoisers]
        mean_spans = [np.inf if d.mean_span is None else d.mean_span for d in denoisers]
        modes = [-1 if d.mode_id is None else d.mode_id for d in denoisers]
        self._density = np.array(densities)
        self._mean_span = np.array(mean_spans)
        self._mode = np.array(modes)

    def _counts(
        self, lengths: Int[np.ndarray, "segments"], denoisers: Int[np.ndarray, "segments"]
    ) -> tuple[np.ndarray, ...]:
        """Returns tokens kept, tokens left out, and spans of each segment."""
        noise = noise_tokens(lengths, self._density[denoisers])
        kept = lengths - noise
        # No run is empty, so there are no more spans than tokens of either kind.
        most_spans = np.minimum(noise, kept)
        most_spans = np.minimum(most_spans, len(self.ids.sentinels))
        spans = span_count(noise, self._mean_span[denoisers], most_spans)
        return kept, noise, spans

    def widths(
        self, lengths: Int[np.ndarray, "segments"], width_args: Int[np.ndarray, "segments"]
    ) -> Int[np.ndarray, "2 segments"]:
        denoisers = width_args
        kept, noise, spans = self._counts(lengths, denoisers)
        has_mode = self._mode[denoisers] >= 0
        decoder = noise + spans + 1
        encoder = kept + spans + 1 + has_mode
        return np.stack([decoder, encoder])

    def batch(self, segments: Segments) -> Batch:
        denoisers = segments.width_args
        kept, noise, spans = self._counts(segments.lengths, denoisers)
        runs = random_runs(kept, noise, spans, segments.draws(SEGMENTATION))

        # runs [[2, 1], [2, 1]] -> is_noise [F, F, T, F, F, T]
        kinds = np.tile([False, True], len(runs))
        is_noise = np.repeat(kinds, runs.ravel())

        decoder_widths, encoder_widths = self.widths(segments.lengths, denoisers)
        modes = self._mode[denoisers]
        text = segments.tokens()
        encoder = self._encoder_tokens(text[~is_noise], runs[:, 0], spans, encoder_widths, modes)
        targets = self._targets(text[is_noise], runs[:, 1], spans, decoder_widths)
        return encoder_decoder_batch(
            self, encoder, encoder_widths, targets, decoder_widths, segments.row_sizes
        )

    def _encoder_tokens(
        self,
        kept_text: Shaped[np.ndarray, "_"],
        kept_runs: Int[np.ndarray, "spans"],
        spans: Int[np.ndarray, "segments"],
        widths: Int[np.ndarray, "segments"],
        modes: Int[np.ndarray, "segments"],
    ) -> Int[np.ndarray, "_"]:
        """Returns `[mode] kept ⟨0⟩ kept ⟨1⟩ … EOS` of every segment."""
        has_mode = modes >= 0

        # A sentinel ends each kept run: runs [2, 2] -> [2, 5]. Further to the right by the mode of
        # its segment, and by the mode and EOS of each segment before: with a mode -> [3, 6]
        segment = group_indices(spans)
        num_modes = np.cumsum(has_mode)
        sentinel_indices = np.cumsum(kept_runs + 1) - 1
        sentinel_indices += segment + num_modes[segment]

        starts = group_starts(widths)
        ends = np.cumsum(widths) - 1
        marks = [
            (sentinel_indices, self._sentinels(spans)),
            (ends, self.ids.eos),
            (starts[has_mode], modes[has_mode]),
        ]
        return interleave(int(widths.sum()), marks, kept_text)

    def _targets(
        self,
        noise_text: Shaped[np.ndarray, "_"],
        noise_runs: Int[np.ndarray, "spans"],
        spans: Int[np.ndarray, "segments"],
        widths: Int[np.ndarray, "segments"],
    ) -> Int[np.ndarray, "_"]:
        """Returns `⟨0⟩ noise ⟨1⟩ noise … EOS` of every segment."""
        # A sentinel begins each noise run: runs [1, 1] -> [0, 2]. Further to the right by the EOS
        # of each segment before.
        sentinel_indices = group_starts(noise_runs + 1) + group_indices(spans)

        ends = np.cumsum(widths) - 1
        marks = [(sentinel_indices, self._sentinels(spans)), (ends, self.ids.eos)]
        return interleave(int(widths.sum()), marks, noise_text)

    def _sentinels(self, spans: Int[np.ndarray, "segments"]) -> Int[np.ndarray, "spans"]:
        """Returns the sentinel of each span, counted from the first sentinel in every segment."""
        sentinels = np.array(self.ids.sentinels)
        return sentinels[ragged_arange(spans)]


class Infill(Objective):
    """Text infilling: the encoder reads a text, sentences shuffled, with a mask for each span that
    is left out; the decoder predicts the whole text.

        text     t₁ t₂ t₃ t₄ t₅ t₆
        encoder  BOS t₁ MASK t₄ t₅ MASK t₆ EOS      (the second span is empty)
        decoder  BOS t₁ t₂ t₃ t₄ t₅ t₆ EOS

    Spans have Poisson lengths, zero included, under the condition that they add up to the tokens
    left out: given its sum, a vector of equal Poisson variables is multinomial, so each token left
    out draws its span. No two masks are adjacent. A sentence ends with a full stop.

    Source: Lewis et al. 2019, arXiv:1910.13461, section 2.2. There the number of spans is drawn,
        too.
    """

    def __init__(self, config: InfillConfig, ids: Ids, sequence_length: int, encoder_length: int):
        super().__init__(ids, sequence_length, encoder_length)
        self._config = config
        self._bos_length = int(ids.bos is not None)

    def _counts(self, lengths: Int[np.ndarray, "segments"]) -> tuple[np.ndarray, ...]:
        """Returns tokens kept, tokens left out, and spans of each segment."""
        density = np.full(len(lengths), self._config.density)
        mean_span = np.full(len(lengths), self._config.mean_span)
        noise = noise_tokens(lengths, density)
        kept = lengths - noise
        # One span at most in each gap: before, between and after the kept tokens.
        spans = span_count(noise, mean_span, kept + 1)
        return kept, noise, spans

    def widths(
        self, lengths: Int[np.ndarray, "segments"], width_args: Int[np.ndarray, "segments"]
    ) -> Int[np.ndarray, "2 segments"]:
        kept, _, spans = self._counts(lengths)
        frame_length = self._bos_length + 1
        return np.stack([lengths, kept + spans]) + frame_length

    def batch(self, segments: Segments) -> Batch:
        kept, noise, spans = self._counts(segments.lengths)
        gaps = self._draw_gaps(segments, kept, spans)
        span_lengths = self._draw_span_lengths(segments, noise, spans)
        is_noise = _noise_mask(segments.lengths, spans, gaps, span_lengths)

        text = segments.tokens()
        damaged = text
        if self._config.permute:
            order = self._sentence_order(segments, text)
            damaged = text[order]

        # A mask comes after BOS, the kept tokens before its gap and the masks before it:
        # gaps [1, 3] -> [1 + 1 + 0, 1 + 3 + 1] = [2, 5] after the segment's start
        decoder_widths, encoder_widths = self.widths(segments.lengths, segments.width_args)
        segment = group_indices(spans)
        masks = group_starts(encoder_widths)[segment]
        masks += self._bos_length
        masks += gaps + ragged_arange(spans)

        encoder = self._framed([(masks, self.ids.mask)], damaged[~is_noise], encoder_widths)
        targets = self._framed([], text, decoder_widths)
        return encoder_decoder_batch(
            self, encoder, encoder_widths, targets, decoder_widths, segments.row_sizes
        )

    def _draw_gaps(
        self,
        segments: Segments,
        kept: Int[np.ndarray, "segments"],
        spans: Int[np.ndarray, "segments"],
    ) -> Int[np.ndarray, "spans"]:
        """Draws the gap of each span: before kept token 0, 1, … of its segment, or after the
        last.
        """
        # kept [3, 1] -> 4 and 2 gaps, is chosen [F, T, F, T, T, F] -> gaps [1, 3, 4] of all
        num_gaps = kept + 1
        draws = segments.draws(GAPS, num_gaps)
        is_chosen = choose(draws, num_gaps, spans)
        gaps = np.flatnonzero(is_chosen)

        # Of its own segment: spans [2, 1] -> first gaps [0, 0, 4] -> gaps [1, 3, 0]
        first_gaps = np.repeat(group_starts(num_gaps), spans)
        return gaps - first_gaps

    def _draw_span_lengths(
        self,
        segments: Segments,
        noise: Int[np.ndarray, "segments"],
        spans: Int[np.ndarray, "segments"],
    ) -> Int[np.ndarray, "spans"]:
        """Draws the length of each span: every token left out draws one of its segment's spans."""
        # noise [3], spans [2]: tokens draw spans [1, 0, 1] -> lengths [1, 2]
        draws = segments.draws(LENGTHS, noise)
        first_span = np.repeat(group_starts(spans), noise)
        num_spans = np.repeat(spans, noise)
        span = first_span + below(draws, num_spans)
        return np.bincount(span, minlength=int(spans.sum()))

    def _sentence_order(
        self, segments: Segments, text: Shaped[np.ndarray, "_"]
    ) -> Int[np.ndarray, "_"]:
        """Draws an order of the tokens that shuffles the sentences of each segment."""
        # A sentence begins with its segment or after the end of another:
        # text [a, ., b, ., c] -> begins [T, F, T, F, T] -> sentence [0, 0, 1, 1, 2]
        begins = ragged_arange(segments.lengths) == 0
        begins[1:] |= text[:-1] == self.ids.sentence_end
        sentence = np.cumsum(begins) - 1

        # All tokens of a sentence have the draw of its first one, so they stay together.
        sentence_draws = segments.draws(SENTENCES)[begins]
        draws = sentence_draws[sentence]
        return shuffled(draws, group_indices(segments.lengths))

    def _framed(
        self,
        marks: list[tuple[Int[np.ndarray, "_"], int | None]],
        text: Shaped[np.ndarray, "_"],
        widths: Int[np.ndarray, "segments"],
    ) -> Int[np.ndarray, "_"]:
        """Returns text and marks of every segment between BOS, where there is one, and EOS."""
        ends = np.cumsum(widths) - 1
        marks = [*marks, (ends, self.ids.eos)]
        if self.ids.bos is not None:
            marks.append((group_starts(widths), self.ids.bos))
        return interleave(int(widths.sum()), marks, text)


def _noise_mask(
    lengths: Int[np.ndarray, "segments"],
    spans: Int[np.ndarray, "segments"],
    gaps: Int[np.ndarray, "spans"],
    span_lengths: Int[np.ndarray, "spans"],
) -> Bool[np.ndarray, "_"]:
    """Marks the tokens of all segments that are left out.

    Args:
      lengths: tokens of each segment.
      spans: of each segment.
      gaps: kept tokens of its segment before each span.
      span_lengths: tokens left out by each span.
    """
    # A span begins after the kept tokens and the spans before it:
    # gaps [1, 3], span lengths [2, 0] -> starts [1 + 0, 3 + 2] -> mask [F, T, T, F, F, F]
    segment = group_indices(spans)
    segment_starts = group_starts(lengths)
    starts = segment_starts[segment] + gaps
    starts += exclusive_cumsum_in_groups(span_lengths, spans)

    is_noise = np.zeros(int(lengths.sum()), bool)
    is_noise[range_indices(starts, span_lengths)] = True
    return is_noise
