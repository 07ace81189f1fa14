"""Packing: every target once, rows of whole segments, hardly any padding, and the same rows for the
same seed.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.errors import UserError
from research.data.objectives import CAUSAL, build, causal_batch
from research.data.packing import PADDING_ROW, PackedRows, best_fit, plan_rows
from tests.data.text import MarkedBytes, corpora

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=60)


def reference_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The tightest bin by looking at all of them; among equals, any is as good."""
    free, bins = [], []
    for n in lengths:
        fits = [i for i, room in enumerate(free) if room >= n]
        chosen = min(fits, key=lambda i: free[i]) if fits else len(free)
        if not fits:
            free.append(capacity)
        free[chosen] -= n
        bins.append(chosen)
    return sorted(free)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), max_size=40), capacity=st.integers(12, 30))
def test_best_fit_fills_the_bins_as_the_plain_search_does(lengths, capacity):
    bins = best_fit(lengths, capacity, [0] * len(lengths), 0)
    filled = np.bincount(bins, weights=lengths).astype(int) if lengths else np.array([], int)
    assert sorted(capacity - filled) == reference_best_fit(lengths, capacity)


SIZES = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9)), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(sizes=SIZES, capacity=st.integers(12, 30), other=st.integers(9, 20))
def test_best_fit_keeps_both_rooms(sizes, capacity, other):
    lengths, others = map(list, zip(*sizes, strict=True))
    bins = best_fit(lengths, capacity, others, other)
    assert np.bincount(bins, weights=lengths).max() <= capacity
    assert np.bincount(bins, weights=others).max() <= other
    assert set(bins) == set(range(bins.max() + 1))


def test_best_fit_by_one_room_overflows_the_other():  # the control
    assert best_fit([3, 3], 8, [0, 0], 5).tolist() == [0, 0]
    assert best_fit([3, 3], 8, [4, 4], 5).tolist() == [0, 1]


def test_best_fit_looks_on_where_the_tightest_bin_lacks_the_other_room():
    # The third fits beside the first by its length, and beside the second alone by its other one.
    assert best_fit([6, 5, 3], 10, [9, 5, 2], 9).tolist() == [0, 1, 1]
    assert best_fit([6, 4], 10, [7, 2], 9).tolist() == [0, 0]  # it fills both rooms


def store(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Token k of document d is 100 d + k, so a token says where it comes from; ids start at
    1000.
    """
    tokens = np.concatenate([1000 + 100 * d + np.arange(n) for d, n in enumerate(lengths)])
    return tokens.astype(np.uint16), np.concatenate([[0], np.cumsum(lengths)])


@settings(max_examples=150, deadline=None)
@given(
    lengths=LENGTHS, width=st.integers(1, 24), block=st.integers(1, 70), seed=st.integers(0, 2**63)
)
def test_every_target_comes_exactly_once_and_rows_keep_the_contract(lengths, width, block, seed):
    tokens, offsets = store(lengths)
    num_targets = np.maximum(np.diff(offsets) - 1, 0)
    plan = plan_rows(offsets, build(CAUSAL, MarkedBytes(), width), seed=seed, block_documents=block)
    sizes = np.diff(plan.row_starts)
    batch = causal_batch(
        tokens, plan.segments.starts, plan.segments.lengths, sizes, width, pad_id=7
    )
    for name, values in batch.items():
        assert values.shape == (plan.num_rows, width)
        assert values.dtype == (np.float32 if name == "weights" else np.int32)
    real = batch["segments"] > 0
    wanted = sorted(
        (int(tokens[i]), int(tokens[i + 1]))
        for o, n in zip(offsets, num_targets, strict=False)
        for i in range(o, o + n)
    )
    assert (
        sorted(zip(batch["tokens"][real].tolist(), batch["targets"][real].tolist(), strict=True))
        == wanted
    )
    np.testing.assert_array_equal(batch["weights"], real.astype(np.float32))
    for name, fill in (("tokens", 7), ("targets", 7), ("positions", 0)):
        assert (batch[name][~real] == fill).all()
    assert plan.padding == pytest.approx(1 - real.mean() if real.size else 1.0)
    for row in range(plan.num_rows):
        check_row({name: values[row] for name, values in batch.items()})


def check_row(row: dict[str, np.ndarray]) -> None:
    """Segments count up from 1 without gaps, padding is at the end, and a segment is one run of one
    document.
    """
    segments = row["segments"][row["segments"] > 0]
    assert (row["segments"][: len(segments)] > 0).all()
    assert len(segments) > 0
    assert (np.diff(segments) >= 0).all()
    assert set(segments) == set(range(1, segments.max() + 1))
    for segment in range(1, segments.max() + 1):
        here = row["segments"] == segment
        np.testing.assert_array_equal(row["positions"][here], np.arange(here.sum()))
        np.testing.assert_array_equal(np.diff(row["tokens"][here]), 1)
        np.testing.assert_array_equal(row["targets"][here], row["tokens"][here] + 1)
        assert len(set(row["targets"][here] // 100)) == 1


def packed(corpus, seed: int, width: int, block: int = 64) -> PackedRows:
    return PackedRows(
        corpus, objective=build(CAUSAL, MarkedBytes(), width), seed=seed, block_documents=block
    )


def first(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first rows, in the first epoch."""
    return np.arange(count), np.zeros(count, int)


def test_a_row_depends_on_the_seed_and_not_on_what_else_is_asked(tmp_path):
    train = corpora(tmp_path, 80)["train"]
    rows, again, other = (packed(train, seed, 32, block=16) for seed in (3, 3, 4))
    whole = rows.batch(*first(len(rows)))
    for i in (0, 5, len(rows) - 1):
        for name, values in again.batch(np.array([i]), np.array([0])).items():
            np.testing.assert_array_equal(values[0], whole[name][i])
    assert (other.batch(*first(5))["tokens"] != whole["tokens"][:5]).any()


def test_a_padding_row_holds_nothing(tmp_path):
    rows = packed(corpora(tmp_path, 40)["train"], 0, 16)
    batch = rows.batch(np.array([0, PADDING_ROW, 1, PADDING_ROW]), np.zeros(4, int))
    for row in (1, 3):
        assert batch["weights"][row].sum() == batch["segments"][row].sum() == 0
        assert (batch["tokens"][row] == rows.corpus.pad_id).all()
    np.testing.assert_array_equal(batch["tokens"][2], rows.batch(*first(2))["tokens"][1])


# The planned rows of ten documents in blocks of six: (document, start in it, length) per segment.
# A checkpoint stores a position in such rows, and its digest has nothing of the plan: where
# these values change, stored positions break, for a resumed run would read other rows unnoticed.
TARGETS = [5, 3, 19, 5, 3, 0, 8, 5, 3, 2]
PLANNED_ROWS = [
    [(6, 0, 8)],
    [(0, 0, 5), (8, 0, 3)],
    [(7, 0, 5), (4, 0, 3)],
    [(9, 0, 2)],
    # The second block.
    [(2, 0, 8)],
    [(2, 8, 8)],
    [(3, 0, 5), (2, 16, 3)],
    [(1, 0, 3)],
]


def test_a_seed_plans_the_rows_that_stored_positions_mean():
    _, offsets = store([n + 1 for n in TARGETS])
    plan = plan_rows(offsets, build(CAUSAL, MarkedBytes(), 8), seed=5, block_documents=6)
    starts = plan.segments.starts
    documents = np.searchsorted(offsets, starts, side="right") - 1
    segments = np.stack([documents, starts - offsets[documents], plan.segments.lengths], axis=1)
    rows = np.split(segments, plan.row_starts[1:-1])
    assert [list(map(tuple, row.tolist())) for row in rows] == PLANNED_ROWS


def test_of_bins_with_equal_room_the_one_filled_last_is_taken():
    assert best_fit([5, 5, 3, 3], 8, [0] * 4, 0).tolist() == [0, 1, 1, 0]


def test_larger_blocks_leave_less_padding():
    num_targets = np.arange(4000) * 7919 % 300 + 1
    plans = [
        plan_rows(
            np.cumsum([0, *(num_targets + 1)]),
            build(CAUSAL, MarkedBytes(), 512),
            seed=0,
            block_documents=block,
        )
        for block in (4, 64, 4000)
    ]
    assert plans[0].padding > plans[1].padding > plans[2].padding
    assert plans[2].padding < 0.005


def test_a_corpus_without_text_is_refused(tmp_path):
    empty = corpora(tmp_path, 5, heldout_fraction=0.0)["heldout"]
    with pytest.raises(UserError, match="no text to learn from"):
        packed(empty, 0, 8)
