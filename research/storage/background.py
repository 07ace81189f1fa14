"""Work in a thread beside the caller's: items made before they are needed, and calls made in the
background.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """Yields `items`, each made in a thread while the one before it is used; at most two exist at a
    time.
    """
    items, end = iter(items), object()
    with ThreadPoolExecutor(1, "prefetch") as pool:
        future = pool.submit(next, items, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, items, end)
            yield item
            del item  # or it would live on while the next one is waited for


class BackgroundWorker:
    """Makes calls in a thread, one at a time and in order; a caller that is faster waits for the
    call before.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "background")
        self._under_way: Future[Any] = Future()
        self._under_way.set_result(None)

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Starts a call when the one before has ended; raises what that one raised."""
        self.wait()
        self._under_way = self._pool.submit(function, *arguments)

    def wait(self) -> None:
        """Waits for the call under way; raises what it raises."""
        self._under_way.result()

    def close(self) -> None:
        """Waits for the call under way, whatever comes of it."""
        self._pool.shutdown()
