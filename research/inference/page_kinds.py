"""Kinds of layers by the tokens that they keep: those that attend to all tokens, and those with a
window. Each kind has pages of its own. Plain Python, as the pools are.
"""

import dataclasses
from collections.abc import Sequence

from research.inference.pages import NO_PAGE, PagePool


def pages_of(tokens: int, page_size: int) -> int:
    """Returns how many pages so many tokens take."""
    return -(-tokens // page_size)


def pages_at_once(window: int, rows: int, page_size: int) -> int:
    """Returns how many pages of a window a sequence has at a time, at most: those of the window and
    of a step's tokens, and the page that they begin in.

    Args:
      window: tokens that each token attends to.
      rows: tokens of a step.
      page_size: tokens of a page.
    """
    return pages_of(window + rows, page_size) + 1


@dataclasses.dataclass(frozen=True)
class PageKind:
    """Layers that keep the same tokens.

    A sequence has a list of its pages in them, page i for its tokens from i · page_size on;
    `NO_PAGE` where no token to come attends to these.

    Attributes:
      pool: of their pages.
      page_size: tokens of a page.
      window: tokens that each token attends to in these layers, at most; 0 for all.
    """

    pool: PagePool
    page_size: int
    window: int = 0

    def first_at(self, position: int) -> int:
        """Returns the first page that the token at a position attends to: it and later ones need no
        page before.
        """
        if not self.window:
            return 0
        # Window 6 in pages of 4: position 12 attends to positions 7 to 12, from page 1 on.
        return max(position - self.window + 1, 0) // self.page_size

    def at_once(self, tokens: int, rows: int) -> int:
        """Returns how many pages a sequence takes at a time, at most.

        Args:
          tokens: of the sequence.
          rows: tokens of a step.
        """
        pages = pages_of(tokens, self.page_size)
        if self.window:
            pages = min(pages, pages_at_once(self.window, rows, self.page_size))
        return pages

    def reach(self, digests: Sequence[bytes]) -> int:
        """Returns how many of the first pages of a sequence need not be written: those of them that
        the token after them attends to are there.
        """
        count = len(digests)
        index = count - 1
        # Window 6 in pages of 4, of which page 3 is missing: 5 pages need 3 and 4, and 4 pages need
        # 2 and 3; 3 pages need 1 and 2, which are there.
        while index >= self.first_at(count * self.page_size):
            if self.pool.find(digests[index]) is None:
                count = index
            index -= 1
        return count

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """Returns those pages of a sequence; there are as many as `reach` says, or more."""
        first = self.first_at(len(digests) * self.page_size)
        pages = [NO_PAGE] * first
        for digest in digests[first:]:
            page = self.pool.find(digest)
            assert page is not None
            pages.append(page)
        return pages

    def release_passed(self, pages: list[int], position: int) -> None:
        """Releases the pages of a sequence that no token from a position on attends to."""
        index = self.first_at(position) - 1
        # Those before were released earlier.
        while index >= 0 and pages[index] != NO_PAGE:
            self.pool.release(pages[index])
            pages[index] = NO_PAGE
            index -= 1

    def take(self, count: int) -> list[int]:
        """Returns pages that are the caller's alone; as many must be available."""
        return [self.pool.take() for _ in range(count)]

    def share(self, pages: Sequence[int]) -> None:
        """Makes a sequence one more owner of pages."""
        for page in had(pages):
            self.pool.share(page)

    def release(self, pages: Sequence[int]) -> None:
        """Ends a sequence's part in its pages."""
        # The last page first: of idle pages, those that fewer sequences begin with go first.
        for page in reversed(had(pages)):
            self.pool.release(page)

    def name(self, pages: Sequence[int], digests: Sequence[bytes]) -> None:
        """Says which tokens the first pages of a sequence hold."""
        for page, digest in zip(pages, digests, strict=False):
            if page != NO_PAGE:
                self.pool.name(page, digest)


def had(pages: Sequence[int]) -> list[int]:
    """Returns the pages of a list that a sequence has."""
    return [page for page in pages if page != NO_PAGE]


def find_prefix(kinds: Sequence[PageKind], digests: Sequence[bytes]) -> list[list[int]]:
    """Returns the pages of a sequence's first tokens, by kind: of as many as need not be written in
    any kind.

    Args:
      kinds: of layers; one that attends to all tokens comes first.
      digests: of the sequence's pages.
    """
    count = len(digests)
    for kind in kinds:
        # What reaches further in a kind that attends to all, reaches as far too.
        count = kind.reach(digests[:count])
    return [kind.find(digests[:count]) for kind in kinds]
