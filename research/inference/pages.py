"""The pages of a paged cache: which are free, who has the others, and which are kept to be read
again. Plain Python: the arrays are elsewhere.
"""

import collections
import hashlib
from collections.abc import Mapping, Sequence

# It fills the entries of a table that a row does not need, and nobody gets it.
NO_PAGE = 0


class PagePool:
    """The pages of layers that keep the same tokens.

    A page is free, or is had by one or more requests, or is idle: nobody has it, but its digest
    says which tokens it holds, and it is kept until its room is needed. The one idle for the
    longest time goes first.

    Args:
      num_pages: of the pool; page 0, `NO_PAGE`, is one of them.
    """

    def __init__(self, num_pages: int):
        assert num_pages > 1, "page 0 is nobody's"
        self.num_pages = num_pages
        # The last one is taken first: pages 1, 2, … of a new pool.
        self._free = list(range(num_pages - 1, NO_PAGE, -1))
        self._owners = [0] * num_pages
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + len(self._idle)

    def take(self) -> int:
        """Returns a page that is the caller's alone; there must be one `available`."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._forget_page(page)
        self._owners[page] = 1
        return page

    def share(self, page: int) -> None:
        """Makes the caller one more owner of a page that is had by others, or idle."""
        assert page != NO_PAGE
        assert self._owners[page] or page in self._idle, f"page {page} is free"
        self._idle.pop(page, None)
        self._owners[page] += 1

    def release(self, page: int) -> None:
        """Ends the caller's part in a page. Without owners it is idle if its tokens are known, and
        else free.
        """
        assert self._owners[page] > 0, f"nobody has page {page}"
        self._owners[page] -= 1
        if self._owners[page]:
            return
        if page in self._digest_of:
            self._idle[page] = None
        else:
            self._free.append(page)

    def owners(self, page: int) -> int:
        """Returns how many have a page."""
        return self._owners[page]

    def name(self, page: int, digest: bytes) -> None:
        """Says which tokens a full page holds, so that `find` finds it. The first page of a digest
        keeps it.
        """
        assert self._owners[page] > 0, f"nobody has page {page}"
        if digest in self._page_of or page in self._digest_of:
            return
        self._page_of[digest] = page
        self._digest_of[page] = digest

    def find(self, digest: bytes) -> int | None:
        """Returns the page that holds these tokens, or None; `share` keeps it there."""
        return self._page_of.get(digest)

    def forget(self) -> None:
        """Ends the validity of all digests: new parameters give other keys."""
        for page in list(self._digest_of):
            self._forget_page(page)
        # Oldest first again: the youngest idle page is taken last.
        while self._idle:
            page, _ = self._idle.popitem()
            self._free.append(page)

    def _forget_page(self, page: int) -> None:
        digest = self._digest_of.pop(page)
        del self._page_of[digest]


def chain_start(fields: Mapping[str, bytes]) -> bytes:
    """Returns the digest that a chain of pages begins with.

    Args:
      fields: all that decides keys and values beside the tokens, by name: the model, the adapter,
        the type of the cache, rules of positions, what an encoder read, a salt.
    """
    digest = hashlib.sha256(b"tessera pages")
    for name in sorted(fields):
        # Each field is tagged, and its length is written before it: ("a", "bc") is not ("ab", "c").
        for part in (name.encode(), fields[name]):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.digest()


def chain(start: bytes, tokens: Sequence[int], page_size: int) -> list[bytes]:
    """Returns the digests of the full pages of a sequence: each is of its parent's and its own
    tokens.

    Args:
      start: from `chain_start`.
      tokens: of the sequence, from its first one on.
      page_size: tokens of a page.
    """
    digests = []
    parent = start
    # 7 tokens in pages of 3 -> pages of tokens 0 to 2 and 3 to 5
    for end in range(page_size, len(tokens) + 1, page_size):
        page = tokens[end - page_size : end]
        written = b"".join(int(token).to_bytes(4, "little") for token in page)
        parent = hashlib.sha256(b"page" + parent + written).digest()
        digests.append(parent)
    return digests
