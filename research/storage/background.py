"""Work in a background thread: items prefetched before they are needed, and calls made in order."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """Yields `items`, each made in a thread while the one before it is used.

    At most two exist at a time.
    """
    items = iter(items)
    end = object()
    with ThreadPoolExecutor(1, "prefetch") as pool:
        future = pool.submit(next, items, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, items, end)
            yield item
            # A reference here would keep the item alive while the next one is waited for.
            del item


class BackgroundWorker:
    """Makes calls in a thread, one at a time and in order; a new one waits for the one before."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "background")
        self._pending: Future[Any] = Future()
        self._pending.set_result(None)

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Starts a call when the one before has ended; raises what that one raised."""
        self.wait()
        self._pending = self._pool.submit(function, *arguments)

    def wait(self) -> None:
        """Waits for the pending call; raises what it raises."""
        self._pending.result()

    def close(self) -> None:
        """Waits for the pending call, and ignores what it raises."""
        self._pool.shutdown()
