"""How many pages each kind of layers has in an engine, and the bytes that they take."""

import dataclasses
from collections.abc import Sequence

from research.inference import page_kinds
from research.inference.serve_config import ServeConfig

# Pages that leave an engine at a time, or come to it.
MOVED_PAGES = 16


@dataclasses.dataclass(frozen=True)
class EngineBytes:
    """What an engine takes on one device.

    Attributes:
      weights: of the model.
      page: of all layers, without those that have pages of their own.
      fixed: what stays there beside weights and pages: the logits of a step, what slots are told of
        each id, what an encoder read.
      temporaries: of a step, and of pages that are moved; estimated from above.
      windowed_page: of the layers with a window, where others attend to all tokens; else 0.
      most_windowed: how many pages these have, at most.
    """

    weights: int
    page: int
    fixed: int
    temporaries: int
    windowed_page: int = 0
    most_windowed: int = 0

    def of_pages(self, count: int) -> int:
        """Bytes of so many pages, of those of layers with a window, and of page 0 of each, which is
        nobody's.
        """
        pages = (1 + count) * self.page
        return pages + self.of_windowed(count)

    def of_windowed(self, count: int) -> int:
        """Bytes of the pages of layers with a window beside so many of the others."""
        return (1 + min(count, self.most_windowed)) * self.windowed_page

    def pages_in(self, room: int) -> int:
        """Returns how many pages fit in so many bytes."""
        # Recurrent models have states of slots and no pages.
        page = max(self.page, 1)
        both = page + self.windowed_page
        count = room // both - 1
        if self.windowed_page and count > self.most_windowed:
            # The windows have all that they may, and the others the rest.
            rest = room - self.of_windowed(count)
            count = rest // page - 1
        return max(count, 0)


def most_windowed(serve: ServeConfig, window: int, max_length: int) -> int:
    """Returns how many pages the layers with a window have, at most, where others attend to all
    tokens: what all slots need at a time, and as much again where prompts share pages, for those
    that have ended.

    Args:
      serve: how the engine runs.
      window: the largest.
      max_length: of the model.
    """
    at_once = page_kinds.pages_at_once(window, serve.rows, serve.page_size)
    at_once = min(at_once, serve.pages_of(max_length))
    count = serve.slots * at_once
    if serve.prefix_cache:
        count *= 2
    return count


def pool_pages(serve: ServeConfig, windows: Sequence[int], max_length: int) -> tuple[int, ...]:
    """Returns the pages of each kind of layers, page 0 included.

    Args:
      serve: how the engine runs, with the tokens that its cache holds.
      windows: of the kinds, as of `windows_of`.
      max_length: of the model.
    """
    pages = [serve.pages_of(serve.tokens)]
    for window in windows[1:]:
        most = most_windowed(serve, window, max_length)
        # A token that is in no page of the others is not read in these.
        pages.append(min(pages[0], most))
    return tuple(1 + count for count in pages)
