"""The host's tables of pages: which pages the sequence in each slot has."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from research.inference.pages import NO_PAGE
from research.models.paged_cache import PageTable

# Of each kind of layers.
Tables = Sequence[Int[np.ndarray, "slots pages"]]


class PageTables:
    """The pages of each slot, of each kind of layers.

    Args:
      slots: of the engine.
      pages: that a sequence may have.
      num_pages: of the pool of each kind.
      page_size: tokens of a page.

    Attributes:
      ids: of the pages, by kind.
    """

    def __init__(self, slots: int, pages: int, num_pages: Sequence[int], page_size: int):
        self.ids: Tables = tuple(np.zeros((slots, pages), np.int32) for _ in num_pages)
        self._num_pages = num_pages
        self._page_size = page_size
        # The pages that a slot's rows say, and of each kind how many were released and written.
        self._pages: list[Sequence[Sequence[int]]] = [()] * slots
        self._released = np.zeros((slots, len(num_pages)), int)
        self._written = np.zeros((slots, len(num_pages)), int)

    def write(self, slot: int, pages: Sequence[Sequence[int]]) -> None:
        """Says which pages the sequence in a slot has, of each kind.

        Args:
          slot: which.
          pages: of the sequence. Those said before may have grown at their ends, and have been
            released from their beginnings: what is in between is not looked at.
        """
        if self._pages[slot] is not pages:
            self._pages[slot] = pages
            self._released[slot] = 0
            self._written[slot] = 0
            for table in self.ids:
                table[slot] = NO_PAGE
        for kind, (table, own) in enumerate(zip(self.ids, pages, strict=True)):
            written = self._written[slot, kind]
            table[slot, written : len(own)] = own[written:]
            self._written[slot, kind] = len(own)
            # Pages [0, 0, 0, 7, 8], of which the first was released before: entries 1 and 2.
            released = self._released[slot, kind]
            while released < len(own) and own[released] == NO_PAGE:
                table[slot, released] = NO_PAGE
                released += 1
            self._released[slot, kind] = released

    def of_slot(self, slot: int) -> PageTable:
        """Returns the pages of one slot, on the device."""
        return self.on_device([table[slot : slot + 1] for table in self.ids])

    def on_device(self, ids: Tables) -> PageTable:
        """Returns tables of the same kinds on the device."""
        # The host changes its own while the device reads. JAX copies no NumPy array, not even with
        # `jnp.array`: it reads the memory when the program runs.
        copies = [jnp.asarray(np.array(table)) for table in ids]
        return PageTable.of_kinds(copies, self._num_pages, self._page_size)
