"""Pages that leave an engine as bytes, for another one with the same parameters: so the one that
reads prompts and the one that answers may be on different machines.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from research.core.errors import UserError
from research.inference.page_kinds import PageKind, find_prefix, had
from research.inference.runner import Runner
from research.inference.slots import DeviceState
from research.models.cache import LayerCache
from research.models.paged_cache import stack_axes
from research.parallel.mesh import on_mesh
from research.parallel.shard_map import whole_batch

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


def export_pages(
    runner: Runner, kinds: Sequence[PageKind], digests: Sequence[bytes]
) -> ExportedPages:
    """Returns those pages of a prompt that are here, from the first on; of layers with a window,
    those that the token after them attends to.

    Args:
      runner: that has them.
      kinds: which know what they are.
      digests: of the prompt's full pages.

    Raises:
      UserError: none is here.
    """
    pages = find_prefix(kinds, digests)
    count = len(pages[0])
    if not count:
        raise UserError("ids", constraint=": no full page of them is here.")
    had_pages = [had(each) for each in pages]
    with on_mesh(runner.mesh):
        found = _take(runner.state, _device_ids(runner, had_pages, 0))
    # Each array is of a layer's kind, and begins with the kind's pages.
    counts = [len(had_pages[kind]) for kind in _kinds_of_arrays(runner.state)]
    arrays = []
    for array, own in zip(found, counts, strict=True):
        arrays.append(np.asarray(array)[:own])
    data = b"".join(array.tobytes() for array in arrays)
    return ExportedPages(
        digests[count - 1],
        count,
        kinds[0].page_size,
        tuple((array.dtype.name, array.shape) for array in arrays),
        data,
        hashlib.sha256(data).digest(),
    )


def import_pages(
    runner: Runner, kinds: Sequence[PageKind], digests: Sequence[bytes], exported: ExportedPages
) -> None:
    """Puts pages where requests that begin with their tokens find them.

    Args:
      runner, kinds: as of `export_pages`.
      digests: of the prompt's full pages, here.
      exported: from another engine.

    Raises:
      UserError: they are damaged, of another prompt, model or engine, or there is no room.
    """
    count = exported.count
    if hashlib.sha256(exported.data).digest() != exported.sha256:
        raise UserError("pages.sha256", exported.sha256.hex(), "is not that of the bytes.")
    page_size = kinds[0].page_size
    if exported.page_size != page_size:
        raise UserError("pages.page_size", exported.page_size, f"must be {page_size}.")
    if not 0 < count <= len(digests) or digests[count - 1] != exported.digest:
        raise UserError(
            "pages.digest",
            exported.digest.hex(),
            "is of other tokens, parameters, another model or another salt.",
        )
    # Of 5 pages, a kind with a window may have the last 2 alone.
    own_digests = []
    for kind in kinds:
        first = kind.first_at(count * page_size)
        own_digests.append(digests[first:count])
    counts = [len(own) for own in own_digests]
    types = _types(runner, counts)
    if exported.arrays != types:
        raise UserError("pages.arrays", exported.arrays, f"must be {types}, as they are here.")
    for kind, needed in zip(kinds, counts, strict=True):
        free = kind.pool.available
        if needed > free:
            raise UserError("pages.count", needed, f"is above what is free, {free}.")

    size = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for dtype, shape in exported.arrays)
    if len(exported.data) != size:
        raise UserError("pages.data", constraint=f"must have {size} bytes for these arrays.")
    arrays = [jnp.asarray(array) for array in _padded(exported, runner.pages_per_sequence)]

    # Those that are here already are free again below: the first page of a digest keeps it.
    pages = [kind.take(needed) for kind, needed in zip(kinds, counts, strict=True)]
    # What is past the pages is dropped.
    ids = _device_ids(runner, pages, max(runner.num_pages))
    with on_mesh(runner.mesh):
        runner.state = _put(runner.state, ids, arrays)
    for kind, taken, own in zip(kinds, pages, own_digests, strict=True):
        kind.name(taken, own)
        kind.release(taken)


def _device_ids(
    runner: Runner, pages: Sequence[Sequence[int]], filler: int
) -> Int[Array, "kinds pages"]:
    """Returns pages of each kind: [5, 7] of 4 -> [5, 7, filler, filler]."""
    ids = np.full((len(pages), runner.pages_per_sequence), filler, np.int32)
    for row, own in zip(ids, pages, strict=True):
        row[: len(own)] = own
    return jnp.asarray(ids)


def _layers(state: DeviceState) -> tuple[LayerCache, ...]:
    return (*state.layers, *state.draft_layers)


def _kinds_of_arrays(state: DeviceState) -> list[int]:
    """Returns the kind of layers that each array of pages is of."""
    kinds = []
    for layer in _layers(state):
        kinds += [layer.tokens.kind] * len(layer.tokens.pages.arrays())
    return kinds


def _padded(exported: ExportedPages, width: int) -> Iterator[Shaped[np.ndarray, "pages *rest"]]:
    """Yields the arrays, with zeros up to a number of pages."""
    start = 0
    for name, shape in exported.arrays:
        dtype = jnp.dtype(name)
        count = math.prod(shape)
        array = np.frombuffer(exported.data, dtype, count, start).reshape(shape)
        start += count * dtype.itemsize
        padded = np.zeros((width, *shape[1:]), dtype)
        padded[: len(array)] = array
        yield padded


def _types(runner: Runner, counts: Sequence[int]) -> tuple[ArrayType, ...]:
    """Returns types and shapes of the arrays of so many pages of each kind."""
    ids = jnp.zeros((len(counts), 1), jnp.int32)
    with on_mesh(runner.mesh):
        arrays = jax.eval_shape(_take, runner.state, ids)
    types = []
    for array, kind in zip(arrays, _kinds_of_arrays(runner.state), strict=True):
        shape = (counts[kind], *array.shape[1:])
        types.append((array.dtype.name, shape))
    return tuple(types)


@jax.jit
@whole_batch()
def _take(state: DeviceState, ids: Int[Array, "kinds pages"]) -> list[Shaped[Array, "pages *rest"]]:
    """Returns some pages of all layers, those of its kind of each, the pages first."""
    found = []
    for layer in _layers(state):
        axis = stack_axes(layer.tokens.pages)
        own = ids[layer.tokens.kind]
        for leaf in layer.tokens.pages.arrays():
            taken = jnp.take(leaf, own, axis=axis, mode="clip")
            found.append(jnp.moveaxis(taken, axis, 0))
    return found


@functools.partial(jax.jit, donate_argnames=("state",))
@whole_batch()
def _put(
    state: DeviceState, ids: Int[Array, "kinds pages"], arrays: list[Shaped[Array, "pages *rest"]]
) -> DeviceState:
    """Returns the state with pages from `_take`."""
    new = iter(arrays)

    def put(layer: LayerCache) -> LayerCache:
        axis = stack_axes(layer.tokens.pages)
        stack = (slice(None),) * axis
        own = ids[layer.tokens.kind]

        def put_leaf(leaf: Array) -> Array:
            put_pages = jnp.moveaxis(next(new), 0, axis)
            return leaf.at[(*stack, own)].set(put_pages, mode="drop")

        pages = jax.tree.map(put_leaf, layer.tokens.pages)
        return layer.replace(tokens=layer.tokens.replace(pages=pages).lay_out())

    layers = tuple(put(layer) for layer in state.layers)
    return state.replace(layers=layers, draft_layers=tuple(map(put, state.draft_layers)))
