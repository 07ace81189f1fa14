"""The tables say what sequences have, whatever of it was said before."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from research.inference.page_tables import PageTables
from research.inference.pages import NO_PAGE

# Each: a slot, whether another sequence takes it, pages that it gets, pages that pass its window.
CHANGES = st.lists(
    st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 4), st.integers(0, 3)), max_size=30
)


@settings(deadline=None, max_examples=100)
@given(CHANGES)
def test_tables_are_the_pages_of_the_sequences(changes):
    tables = PageTables(3, 40, (100, 50), 16)
    had = [([], []) for _ in range(3)]
    expected = np.zeros((2, 3, 40), np.int32)
    next_page = 1
    for slot, is_new, more, passed in changes:
        if is_new or len(had[slot][0]) + more > 40:
            had[slot] = ([], [])
        for pages in had[slot]:
            for _ in range(more):
                pages.append(next_page)
                next_page += 1
        windowed = had[slot][1]
        ended = windowed.count(NO_PAGE)
        for index in range(ended, min(ended + passed, len(windowed))):
            windowed[index] = NO_PAGE
        tables.write(slot, had[slot])
        for kind, pages in enumerate(had[slot]):
            expected[kind, slot] = NO_PAGE
            expected[kind, slot, : len(pages)] = pages
        np.testing.assert_array_equal(np.stack(tables.ids), expected)
