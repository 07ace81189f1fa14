"""A prefix is as long as all kinds of layers have what comes after it attends to."""

from hypothesis import given
from hypothesis import strategies as st

from research.inference.page_kinds import PageKind, find_prefix, had, pages_at_once
from research.inference.pages import NO_PAGE, PagePool

PAGE = 4
DIGESTS = [bytes([index]) for index in range(12)]


def kind_with(indices: set[int], window: int) -> PageKind:
    """A kind of layers in which some pages of a sequence are known."""
    kind = PageKind(PagePool(40), PAGE, window)
    for index in sorted(indices):
        page = kind.pool.take()
        kind.pool.name(page, DIGESTS[index])
        kind.pool.release(page)
    return kind


def attended(window: int, position: int) -> set[int]:
    """The pages of the tokens before a position that it attends to."""
    first = max(position - window + 1, 0) if window else 0
    return {each // PAGE for each in range(first, position)}


@given(
    full=st.sets(st.integers(0, 11)),
    windowed=st.sets(st.integers(0, 11)),
    window=st.integers(1, 30),
    has_full=st.booleans(),
)
def test_a_prefix_is_the_longest_that_the_token_after_it_can_go_on_from(
    full: set[int], windowed: set[int], window: int, has_full: bool
):
    known = {window: windowed}
    if has_full:
        # The first pages of most sequences are there.
        known = {0: full | set(range(8)), window: windowed}
    kinds = [kind_with(known[each], each) for each in known]
    lengths = []
    for count in range(len(DIGESTS) + 1):
        needed = {each: attended(each, count * PAGE) for each in known}
        if all(needed[each] <= known[each] for each in known):
            lengths.append(count)

    found = find_prefix(kinds, DIGESTS)
    assert [len(pages) for pages in found] == [max(lengths)] * len(kinds)
    for kind, pages in zip(kinds, found, strict=True):
        for index, page in enumerate(pages):
            assert page == NO_PAGE or page == kind.pool.find(DIGESTS[index])
        has = {index for index, page in enumerate(pages) if page != NO_PAGE}
        assert has >= attended(kind.window, len(pages) * PAGE)


@given(written=st.integers(0, 60), window=st.integers(1, 30), rows=st.integers(1, 20))
def test_a_window_keeps_what_later_tokens_attend_to_and_little_more(
    written: int, window: int, rows: int
):
    kind = PageKind(PagePool(40), PAGE, window)
    pages = [kind.pool.take() for _ in range(-(-(written + rows) // PAGE))]
    kind.release_passed(pages, written)
    kind.release_passed(pages, written)
    kept = {index for index, page in enumerate(pages) if page != NO_PAGE}
    assert kept >= attended(window, written) | attended(rows, written + rows)
    assert len(kept) <= pages_at_once(window, rows, PAGE)
    assert kind.pool.available == 39 - len(kept)
    kind.release(pages)
    assert kind.pool.available == 39


def test_layers_that_attend_to_all_tokens_keep_all_pages():
    kind = PageKind(PagePool(40), PAGE)
    pages = [kind.pool.take() for _ in range(9)]
    kind.release_passed(pages, 36)
    assert len(had(pages)) == 9
    assert kind.at_once(36, 4) == 9
