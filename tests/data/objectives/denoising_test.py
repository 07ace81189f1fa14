"""Damaged texts and what mends them: each example is put together again, token by token."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.errors import UserError
from research.data.objectives import UL2, InfillConfig, SpanConfig
from tests.data.objectives.examples import (
    Segment,
    drawn,
    epoch,
    objective_of,
    packed,
    segments,
    text_of,
)
from tests.data.text import BOS, EOS, MASK, MODE, PAD, SENTENCE_END, SENTINELS, store

LENGTHS = st.lists(st.integers(0, 90), min_size=1, max_size=20).filter(any)
WIDTHS = st.tuples(st.integers(8, 40), st.integers(8, 40))


def mended(segment: Segment) -> list[int]:
    """The text, from both sides: at each sentinel of the encoder's, what follows it in the
    targets.
    """
    assert segment.encoder[-1] == segment.targets[-1] == EOS
    spans, text = {}, []
    for token in segment.targets[:-1]:
        if token in SENTINELS:
            spans[token] = last = []
        else:
            last.append(token)
    assert list(spans) == list(SENTINELS[: len(spans)])
    assert all(spans.values())
    for token in segment.encoder[:-1]:
        text += spans.pop(token) if token in SENTINELS else [token]
    assert not spans
    return text


def check_spans(segment: Segment, config: SpanConfig) -> list[int]:
    """Returns the segment's text; the encoder reads nothing that is predicted, and the
    counts are T5's.
    """
    assert segment.tokens == [PAD, *segment.targets[:-1]]
    assert set(segment.weights) == {1.0}
    encoder = segment.encoder
    if config.mode_id is not None:
        assert encoder[0] == config.mode_id
        segment = Segment(**{**vars(segment), "encoder": encoder[1:]})
    text = mended(segment)
    assert text == list(range(text[0], text[0] + len(text)))
    hidden = set(segment.targets) - set(SENTINELS) - {EOS}
    assert not hidden & set(segment.encoder)
    n = len(text)
    assert len(hidden) == min(max(round(n * config.density), 1), max(n - 1, 1))
    if n > 1:
        spans = 1 if config.mean_span is None else max(round(len(hidden) / config.mean_span), 1)
        assert sum(token in SENTINELS for token in segment.encoder) == min(
            spans, len(SENTINELS), n - len(hidden)
        )
        marks = [token in SENTINELS for token in segment.encoder[:-1]]
        assert not marks[0]
        assert marks[-1]
        assert not any(a and b for a, b in itertools.pairwise(marks))
    return text


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, widths=WIDTHS, seed=st.integers(0, 2**40), block=st.integers(1, 30))
def test_spans_and_the_rest_make_every_document_once(lengths, widths, seed, block):
    corpus = store(lengths)
    objective = objective_of("span", widths[0], encoder_length=widths[1])
    batch = epoch(packed(corpus, objective, seed, block))
    assert (batch["tokens"].shape[1], batch["encoder_tokens"].shape[1]) == widths
    seen = [token for segment in segments(batch) for token in check_spans(segment, SpanConfig())]
    assert sorted(seen) == text_of(corpus)


@pytest.mark.parametrize("damage", ["leak", "lost", "order"])
def test_a_leak_a_loss_or_a_wrong_order_is_noticed(damage):  # the control
    (segment,) = segments(epoch(packed(store([40]), objective_of("span", 64))))
    assert check_spans(segment, SpanConfig()) == list(range(1, 41))
    encoder = segment.encoder
    if damage == "leak":
        encoder[0] = segment.targets[1]
    elif damage == "lost":
        encoder.pop(1)
    else:
        encoder[0], encoder[1] = encoder[1], encoder[0]
    with pytest.raises(AssertionError):
        check_spans(segment, SpanConfig())


def test_lengths_are_those_that_t5_published():
    """512 tokens for the encoder come from 568 of text and give 114 to the decoder (T5's own input
    pipeline).
    """
    objective = objective_of("span", 512)
    assert objective.longest_segments().tolist() == [568]
    assert objective.widths(np.array([568]), np.array([0])).tolist() == [[114], [512]]


def test_every_segmentation_is_equally_likely():
    """8 tokens, 4 left out in 2 spans: 3 ways to cut the kept ones, times 3 to cut the others."""
    config = SpanConfig(density=0.5, mean_span=2.0)
    rows = packed(store([8]), objective_of("span", 16, span=config))
    found = collections.Counter(map(tuple, drawn(rows, 2700)["encoder_tokens"]))
    assert len(found) == 9
    assert max(abs(count - 300) for count in found.values()) < 4.5 * 267**0.5


def test_a_long_piece_has_no_more_spans_than_there_are_sentinels():
    config = SpanConfig(density=0.5, mean_span=1.0)
    (segment,) = segments(epoch(packed(store([400]), objective_of("span", 512, span=config))))
    assert len(check_spans(segment, config)) == 400
    assert sum(token in SENTINELS for token in segment.encoder) == len(SENTINELS)


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, widths=WIDTHS, seed=st.integers(0, 2**40))
def test_a_mixture_is_made_of_its_denoisers(lengths, widths, seed):
    """The mode token names the denoiser of a segment, so each can be checked by its own counts."""
    corpus = store(lengths)
    denoisers = tuple(
        SpanConfig(d.density, d.mean_span, d.weight, MODE + i) for i, d in enumerate(UL2)
    )
    objective = objective_of("denoise", widths[0], encoder_length=widths[1], denoisers=denoisers)
    seen = []
    for segment in segments(epoch(packed(corpus, objective, seed))):
        seen += check_spans(segment, denoisers[segment.encoder[0] - MODE])
    assert sorted(seen) == text_of(corpus)


def test_denoisers_have_their_shares_and_one_span_at_the_end_is_a_prefix():
    denoisers = (SpanConfig(0.25, None, 1.0, MODE), SpanConfig(0.5, 8.0, 3.0, MODE + 1))
    rows = packed(store([40] * 1000), objective_of("denoise", 64, denoisers=denoisers))
    found = list(segments(epoch(rows)))
    prefixes = [segment for segment in found if segment.encoder[0] == MODE]
    assert len(found) == 1000
    assert abs(len(prefixes) - 250) < 4 * (1000 * 0.25 * 0.75) ** 0.5
    for segment in prefixes:
        first = segment.encoder[1]
        assert segment.encoder == [MODE, *range(first, first + 30), SENTINELS[0], EOS]
        assert segment.targets == [SENTINELS[0], *range(first + 30, first + 40), EOS]


def test_segments_of_one_document_draw_a_denoiser_each():
    denoisers = (SpanConfig(mode_id=MODE), SpanConfig(mode_id=MODE + 1, weight=3.0))
    rows = packed(store([8000]), objective_of("denoise", 16, denoisers=denoisers))
    modes = [segment.encoder[0] for segment in segments(epoch(rows))]
    total = len(modes)
    assert total > 400
    assert abs(modes.count(MODE) - 0.25 * total) < 4 * (total * 0.25 * 0.75) ** 0.5

    # The plan of a stored position: other draws would give a resumed run other rows.
    variants = rows.plan.segments.width_args
    assert variants[:12].tolist() == [1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1]


def check_infilled(segment: Segment, config: InfillConfig, sentence_ends: set[int]) -> list[int]:
    """Returns the segment's text: the decoder gives it whole, and the encoder has whole sentences
    less what is hidden.
    """
    assert segment.tokens == [PAD, *segment.targets[:-1]]
    assert set(segment.weights) == {1.0}
    assert (
        (segment.encoder[0], segment.encoder[-1])
        == (segment.targets[0], segment.targets[-1])
        == (BOS, EOS)
    )
    text, damaged = segment.targets[1:-1], segment.encoder[1:-1]
    kept = [token for token in damaged if token != MASK]
    hidden = min(max(round(len(text) * config.density), 1), max(len(text) - 1, 1))
    assert len(kept) == len(set(kept)) == len(text) - hidden
    masks = damaged.count(MASK)
    assert masks == min(max(round(hidden / config.mean_span), 1), len(kept) + 1)
    assert not any(a == b == MASK for a, b in itertools.pairwise(damaged))
    sentences, sentence = {}, 0
    for token in text:
        sentences[token] = sentence
        sentence += token in sentence_ends
    runs = [sentences[token] for token in kept]
    runs = [s for i, s in enumerate(runs) if i == 0 or runs[i - 1] != s]
    assert len(runs) == len(set(runs))  # each sentence's tokens together …
    for s in runs:  # … and in their order
        indices = [text.index(token) for token in kept if sentences[token] == s]
        assert indices == sorted(indices)
    assert config.permute or runs == sorted(runs)
    return text


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, widths=WIDTHS, seed=st.integers(0, 2**40), permute=st.booleans())
def test_infilling_gives_every_document_once(lengths, widths, seed, permute):
    corpus = store(lengths)
    config = InfillConfig(permute=permute)
    objective = objective_of("infill", widths[0], encoder_length=widths[1], infill=config)
    batch = epoch(packed(corpus, objective, seed))
    seen = [
        token
        for segment in segments(batch)
        for token in check_infilled(segment, config, {SENTENCE_END})
    ]
    assert sorted(seen) == text_of(corpus)


def with_sentence_ends(lengths: list[int]):
    """The store of these lengths, every tenth token of which is replaced by a full stop."""
    corpus = store(lengths)
    corpus.tokens[10::10] = np.where(
        corpus.tokens[10::10] < BOS, SENTENCE_END, corpus.tokens[10::10]
    )
    return corpus


def test_sentences_are_shuffled_whole():
    corpus = with_sentence_ends([98])
    rows = packed(corpus, objective_of("infill", 128, infill=InfillConfig(density=0.01)))
    orders = set()
    for segment in segments(drawn(rows, 50)):
        assert segment.targets[1:-1] == corpus.tokens[1:-1].tolist()
        sentences, run = [], []
        for token in (t for t in segment.encoder[1:-1] if t != MASK):
            run.append(token)
            if token == SENTENCE_END:
                sentences.append(run)
                run = []
        # One token is hidden, which may be a full stop: two sentences then lie together.
        whole = [s for s in sentences if len(s) == 10 and s[:-1] == list(range(s[0], s[0] + 9))]
        assert len(whole) >= 6
        orders.add(tuple(s[0] for s in whole))
    assert len(orders) == 50


def test_unshuffled_sentences_stay_and_the_shuffled_do_not():  # the control
    for permute in (False, True):
        config = InfillConfig(density=0.01, permute=permute)
        (segment,) = segments(
            epoch(packed(with_sentence_ends([98]), objective_of("infill", 128, infill=config)))
        )
        kept = [token for token in segment.encoder[1:-1] if token not in (MASK, SENTENCE_END)]
        assert (kept == sorted(kept)) != permute


def test_spans_of_infilling_have_the_lengths_of_poisson_variables():
    """Given their sum, k tokens have the share binomial(k; 60, 1/20), nearly Poisson(k; 3); some
    spans are empty.
    """
    config = InfillConfig(permute=False)
    found = collections.Counter()
    rows = packed(store([200]), objective_of("infill", 202, infill=config))
    for segment in segments(drawn(rows, 200)):
        damaged = [0, *segment.encoder[1:-1], 201]
        for i, token in enumerate(damaged):
            if token == MASK:
                found[damaged[i + 1] - damaged[i - 1] - 1] += 1
    total = sum(found.values())
    assert total == 200 * 20
    share = [0.95**60, 60 * 0.05 * 0.95**59, 1770 * 0.05**2 * 0.95**58, 34220 * 0.05**3 * 0.95**57]
    for k, expected in enumerate(share):
        assert abs(found[k] / total - expected) < 4.5 * (expected / total) ** 0.5, k


@pytest.mark.parametrize(
    ("kind", "width"), [("span", 2), ("infill", 2), ("masked", 2), ("denoise", 2)]
)
def test_rows_too_short_for_a_token_are_refused(kind, width):
    with pytest.raises(UserError, match="sequence_length = 2 must be at least 3"):
        packed(store([5]), objective_of(kind, width))


def test_an_encoder_too_short_is_refused():
    with pytest.raises(UserError, match=r"at least 3, and encoder_length = 1 at least 2"):
        packed(store([5]), objective_of("span", 8, encoder_length=1))
