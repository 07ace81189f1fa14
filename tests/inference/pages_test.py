"""No page is lost, given twice or found under tokens that it does not hold."""

import collections

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from research.inference.pages import NO_PAGE, PagePool, chain, chain_start

PAGES = 9


class PoolMachine(RuleBasedStateMachine):
    """A pool beside a model of it: who has which page, and what was said of it."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(PAGES)
        self.had: collections.Counter[int] = collections.Counter()
        # Pages with known tokens, those idle longest first.
        self.named: dict[int, bytes] = {}
        self.idle: list[int] = []

    def draw_owned(self, data):
        return data.draw(st.sampled_from(sorted(page for page in self.had if self.had[page])))

    @precondition(lambda self: self.pool.available)
    @rule()
    def take(self):
        free = set(range(1, PAGES)) - {page for page in self.had if self.had[page]}
        unnamed = free - set(self.idle)
        page = self.pool.take()
        if unnamed:
            assert page in unnamed
        else:
            # The page that was idle for the longest time, whose tokens nobody finds any more.
            assert page == self.idle.pop(0)
            del self.named[page]
        self.had[page] = 1

    @precondition(lambda self: any(self.had.values()))
    @rule(data=st.data())
    def release(self, data):
        page = self.draw_owned(data)
        self.pool.release(page)
        self.had[page] -= 1
        if not self.had[page] and page in self.named:
            self.idle.append(page)

    @precondition(lambda self: any(self.had.values()))
    @rule(data=st.data(), digest=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def name(self, data, digest):
        page = self.draw_owned(data)
        self.pool.name(page, digest)
        if page not in self.named and digest not in self.named.values():
            self.named[page] = digest

    @rule(digest=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def find_and_share(self, digest):
        pages = [page for page, known in self.named.items() if known == digest]
        page = self.pool.find(digest)
        assert [page] == (pages or [None])
        if page is None:
            return
        self.pool.share(page)
        self.had[page] += 1
        if page in self.idle:
            self.idle.remove(page)

    @rule()
    def forget(self):
        self.pool.forget()
        self.named = {}
        self.idle = []

    @invariant()
    def no_page_is_lost(self):
        in_use = [page for page in self.had if self.had[page]]
        assert NO_PAGE not in in_use
        assert self.pool.available == PAGES - 1 - len(in_use)
        for page in range(1, PAGES):
            assert self.pool.owners(page) == self.had[page]


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=100, deadline=None)


def test_a_free_page_cannot_be_shared_or_released():
    pool = PagePool(3)
    with pytest.raises(AssertionError):
        pool.share(1)
    with pytest.raises(AssertionError):
        pool.release(1)


def test_a_digest_is_of_all_tokens_before_and_of_everything_that_decides_the_keys():
    start = chain_start({"parameters": b"p", "adapter": b""})
    assert len(chain(start, range(7), 3)) == 2
    assert chain(start, range(6), 3) == chain(start, range(7), 3)
    # Another first token changes the digest of every page.
    other = chain(start, [9, 1, 2, 3, 4, 5], 3)
    assert not set(other) & set(chain(start, range(6), 3))
    # The same bytes under other names, or cut elsewhere, are something else.
    starts = {
        chain_start(fields)
        for fields in (
            {"parameters": b"p", "adapter": b""},
            {"parameters": b"", "adapter": b"p"},
            {"parameters": b"p", "salt": b""},
            {"ab": b"c"},
            {"a": b"bc"},
        )
    }
    assert len(starts) == 5
