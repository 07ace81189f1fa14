"""Pages that leave an engine as bytes, for another one with the same parameters: so the one that
reads prompts and the one that answers may be on different machines.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped

from research.core.errors import UserError
from research.inference.page_kinds import PageKind, find_prefix, had
from research.inference.page_names import PageNames
from research.inference.pool_sizes import MOVED_PAGES
from research.inference.programs import put_pages, take_pages
from research.inference.requests import Request
from research.inference.runner import Runner
from research.inference.slots import DeviceState
from research.parallel.mesh import on_mesh

# Type and shape of an array.
ArrayType = tuple[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class ExportedPages:
    """The full pages of a prompt's first tokens.

    Attributes:
      digest: of the last page: of all tokens up to its end, and of all else that decides their
        keys.
      count: of the pages.
      page_size: tokens of a page.
      arrays: types and shapes, of which the pages are the first axis; layers with a window have
        the last ones alone, which the token after them attends to.
      data: the bytes of the arrays, one after the other.
      sha256: of `data`.
    """

    digest: bytes
    count: int
    page_size: int
    arrays: tuple[ArrayType, ...]
    data: bytes
    sha256: bytes


class PageTransfer:
    """Takes pages out of a replica and puts them into it, `MOVED_PAGES` at a time.

    Its programs are compiled when it is made. What is handed to them is made by NumPy: JAX would
    compile for it.

    Args:
      runner: that has the pages.
      kinds: which know what they are.
      names: of pages.
      begin_again: has what the runner had written anew, where pages were being put into it.
    """

    def __init__(
        self,
        runner: Runner,
        kinds: Sequence[PageKind],
        names: PageNames,
        begin_again: Callable[[], None],
    ):
        self._begin_again = begin_again
        self._runner = runner
        self._kinds = kinds
        self._names = names
        # Page 0 of each kind is nobody's.
        first = [[0] for _ in kinds]
        found = self._take(first)
        self._page_types = _types(found)
        self._put(first, self._page_types, _bytes(found))

    def count(self, request: Request) -> int:
        """Returns how many full pages of a prompt are here."""
        digests = self._names.of_prompt(request)
        return len(find_prefix(self._kinds, digests)[0])

    def export_pages(self, request: Request) -> ExportedPages:
        """Returns those pages of a prompt that are here, from the first on; of layers with a
        window, those that the token after them attends to.

        Raises:
          UserError: none is here.
        """
        digests = self._names.of_prompt(request)
        pages = find_prefix(self._kinds, digests)
        count = len(pages[0])
        if not count:
            raise UserError("ids", constraint=": no full page of them is here.")
        arrays = self._take([had(each) for each in pages])
        data = _bytes(arrays)
        return ExportedPages(
            digests[count - 1],
            count,
            self._kinds[0].page_size,
            _types(arrays),
            data,
            hashlib.sha256(data).digest(),
        )

    def import_pages(self, request: Request, exported: ExportedPages) -> None:
        """Puts pages where requests that begin with their tokens find them.

        Args:
          request: whose prompt they are of.
          exported: from another engine.

        Raises:
          UserError: they are damaged, of another prompt, model or engine, or there is no room.
        """
        digests = self._names.of_prompt(request)
        _check_bytes(exported)
        page_size = self._kinds[0].page_size
        if exported.page_size != page_size:
            raise UserError("pages.page_size", exported.page_size, f"must be {page_size}.")
        count = exported.count
        if not 0 < count <= len(digests) or digests[count - 1] != exported.digest:
            raise UserError(
                "pages.digest",
                exported.digest.hex(),
                "is of other tokens, parameters, another model or another salt.",
            )
        # Of 5 pages, a kind with a window may have the last 2 alone.
        own_digests = []
        for kind in self._kinds:
            first = kind.first_at(count * page_size)
            own_digests.append(digests[first:count])
        counts = [len(own) for own in own_digests]
        self._check_arrays(exported, counts)

        # Those that are here already are free again below: the first page of a digest keeps it.
        pages = [kind.take(needed) for kind, needed in zip(self._kinds, counts, strict=True)]
        try:
            self._put(pages, exported.arrays, exported.data)
            for kind, taken, own in zip(self._kinds, pages, own_digests, strict=True):
                kind.name(taken, own)
        except BaseException:
            # The program may have taken the pages of all others with it.
            self._begin_again()
            raise
        finally:
            for kind, taken in zip(self._kinds, pages, strict=True):
                kind.release(taken)

    def _check_arrays(self, exported: ExportedPages, counts: Sequence[int]) -> None:
        """Raises UserError where arrays of so many pages of each kind are others, or too many."""
        kinds = _kinds_of_arrays(self._runner.state)
        types = []
        for (dtype, (_, *rest)), kind in zip(self._page_types, kinds, strict=True):
            types.append((dtype, (counts[kind], *rest)))
        if exported.arrays != tuple(types):
            rule = f"must be {tuple(types)}, as they are here."
            raise UserError("pages.arrays", exported.arrays, rule)
        for kind, needed in zip(self._kinds, counts, strict=True):
            free = kind.pool.available
            if needed > free:
                raise UserError("pages.count", needed, f"is above what is free, {free}.")
        size = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for dtype, shape in types)
        if len(exported.data) != size:
            raise UserError("pages.data", constraint=f"must have {size} bytes for these arrays.")

    def _take(self, pages: Sequence[Sequence[int]]) -> list[Shaped[np.ndarray, "pages *rest"]]:
        """Returns pages of each kind, all of one array together."""
        parts: list[list[np.ndarray]] = []
        for _, ids in _parts(pages, 0):
            with on_mesh(self._runner.mesh):
                found = take_pages(self._runner.state, ids)
            parts.append([np.asarray(array) for array in found])
        arrays = []
        # Each array is of a layer's kind, and begins with the kind's pages.
        for kind, *own in zip(_kinds_of_arrays(self._runner.state), *parts, strict=True):
            array = np.concatenate(own)
            arrays.append(array[: len(pages[kind])])
        return arrays

    def _put(self, pages: Sequence[Sequence[int]], types: Sequence[ArrayType], data: bytes) -> None:
        """Writes arrays of pages of each kind, whose bytes are one after the other."""
        arrays = _arrays(types, data)
        # What is past the pages is dropped.
        for start, ids in _parts(pages, max(self._runner.num_pages)):
            moved = []
            for array in arrays:
                part = array[start : start + MOVED_PAGES]
                padded = np.zeros((MOVED_PAGES, *array.shape[1:]), array.dtype)
                padded[: len(part)] = part
                moved.append(padded)
            with on_mesh(self._runner.mesh):
                self._runner.state = put_pages(self._runner.state, ids, moved)


def _check_bytes(exported: ExportedPages) -> None:
    if hashlib.sha256(exported.data).digest() != exported.sha256:
        raise UserError("pages.sha256", exported.sha256.hex(), "is not that of the bytes.")


def _parts(
    pages: Sequence[Sequence[int]], filler: int
) -> Iterator[tuple[int, Int[np.ndarray, "kinds moved"]]]:
    """Yields the pages of each kind that are moved at a time, with the index of the first:
    [5, 7] of 4 at a time -> [5, 7, filler, filler].
    """
    longest = max(len(own) for own in pages)
    for start in range(0, longest, MOVED_PAGES):
        ids = np.full((len(pages), MOVED_PAGES), filler, np.int32)
        for row, own in zip(ids, pages, strict=True):
            part = own[start : start + MOVED_PAGES]
            row[: len(part)] = part
        yield start, ids


def _kinds_of_arrays(state: DeviceState) -> list[int]:
    """Returns the kind of layers that each array of pages is of."""
    kinds = []
    for layer in (*state.layers, *state.draft_layers):
        kinds += [layer.tokens.kind] * len(layer.tokens.pages.arrays())
    return kinds


def _types(arrays: Sequence[np.ndarray]) -> tuple[ArrayType, ...]:
    return tuple((array.dtype.name, array.shape) for array in arrays)


def _bytes(arrays: Sequence[np.ndarray]) -> bytes:
    return b"".join(array.tobytes() for array in arrays)


def _arrays(types: Sequence[ArrayType], data: bytes) -> list[Shaped[np.ndarray, "pages *rest"]]:
    """Returns arrays whose bytes are one after the other."""
    arrays = []
    start = 0
    for name, shape in types:
        dtype = jnp.dtype(name)
        count = math.prod(shape)
        arrays.append(np.frombuffer(data, dtype, count, start).reshape(shape))
        start += count * dtype.itemsize
    return arrays
