"""The next item of an iterator is made while this one is used."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T]) -> Iterator[T]:
    """Yields `items`, each made in a thread while the one before it is used; at most two exist at a time."""
    items, end = iter(items), object()
    with ThreadPoolExecutor(1, "ahead") as pool:
        future = pool.submit(next, items, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, items, end)
            yield item
            del item  # or it would live on while the next one is waited for
