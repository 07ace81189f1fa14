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
from research.inference.pages import PagePool
from research.inference.runner import Runner
from research.inference.slots import DeviceState
from research.kernels.decode_attention import PAGE_SIZE, KVPages
from research.models.cache import LayerCache
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
      arrays: types and shapes, of which the pages are the first axis.
      data: the bytes of the arrays, one after the other.
      sha256: of `data`.
    """

    digest: bytes
    count: int
    page_size: int
    arrays: tuple[ArrayType, ...]
    data: bytes
    sha256: bytes


def find_pages(pool: PagePool, digests: Sequence[bytes]) -> list[int]:
    """Returns the pages of a prompt that are here, from the first on."""
    pages = []
    # Pages [5, 7, None, 9] -> [5, 7]
    for digest in digests:
        page = pool.find(digest)
        if page is None:
            break
        pages.append(page)
    return pages


def export_pages(runner: Runner, pool: PagePool, digests: Sequence[bytes]) -> ExportedPages:
    """Returns those pages of a prompt that are here, from the first on.

    Args:
      runner: that has them.
      pool: that knows which they are.
      digests: of the prompt's full pages.

    Raises:
      UserError: none is here.
    """
    pages = find_pages(pool, digests)
    if not pages:
        raise UserError("ids", constraint=": no full page of them is here.")
    ids = np.zeros(runner.pages_per_sequence, np.int32)
    ids[: len(pages)] = pages
    with on_mesh(runner.mesh):
        found = _take(runner.state, jnp.asarray(ids))
    arrays = [np.asarray(array)[: len(pages)] for array in found]
    data = b"".join(array.tobytes() for array in arrays)
    return ExportedPages(
        digests[len(pages) - 1],
        len(pages),
        PAGE_SIZE,
        tuple((array.dtype.name, array.shape) for array in arrays),
        data,
        hashlib.sha256(data).digest(),
    )


def import_pages(
    runner: Runner, pool: PagePool, digests: Sequence[bytes], exported: ExportedPages
) -> None:
    """Puts pages where requests that begin with their tokens find them.

    Args:
      runner, pool: as of `export_pages`.
      digests: of the prompt's full pages, here.
      exported: from another engine.

    Raises:
      UserError: they are damaged, of another prompt, model or engine, or there is no room.
    """
    count = exported.count
    if hashlib.sha256(exported.data).digest() != exported.sha256:
        raise UserError("pages.sha256", exported.sha256.hex(), "is not that of the bytes.")
    if exported.page_size != PAGE_SIZE:
        raise UserError("pages.page_size", exported.page_size, f"must be {PAGE_SIZE}.")
    if not 0 < count <= len(digests) or digests[count - 1] != exported.digest:
        raise UserError(
            "pages.digest",
            exported.digest.hex(),
            "is of other tokens, parameters, another model or another salt.",
        )
    types = _types(runner, count)
    if exported.arrays != types:
        raise UserError("pages.arrays", exported.arrays, f"must be {types}, as they are here.")
    if count > pool.available:
        raise UserError("pages.count", count, f"is above what is free, {pool.available}.")

    # Those that are here already are free again below: the first page of a digest keeps it.
    pages = [pool.take() for _ in range(count)]
    width = runner.pages_per_sequence
    # Ids [5, 7] of 4 -> [5, 7, pages, pages], where what is past the pages is dropped.
    ids = np.full(width, runner.num_pages, np.int32)
    ids[:count] = pages
    arrays = [jnp.asarray(array) for array in _padded(exported, width)]
    with on_mesh(runner.mesh):
        runner.state = _put(runner.state, jnp.asarray(ids), arrays)
    # The last one first: of idle pages, those that fewer sequences begin with go first.
    for page, digest in reversed(list(zip(pages, digests, strict=False))):
        pool.name(page, digest)
        pool.release(page)


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


def _types(runner: Runner, count: int) -> tuple[ArrayType, ...]:
    """Returns types and shapes of the arrays of so many pages."""
    ids = jnp.zeros(count, jnp.int32)
    with on_mesh(runner.mesh):
        arrays = jax.eval_shape(_take, runner.state, ids)
    return tuple((array.dtype.name, array.shape) for array in arrays)


def _stack_axes(pages: KVPages) -> int:
    """Returns how many axes come before that of the pages: 1 where layers are stacked, else 0."""
    return pages.key.ndim - 4


@jax.jit
@whole_batch()
def _take(state: DeviceState, ids: Int[Array, "pages"]) -> list[Shaped[Array, "pages *rest"]]:
    """Returns some pages of all layers, the pages first."""
    found = []
    for layer in (*state.layers, *state.draft_layers):
        axis = _stack_axes(layer.tokens.pages)
        for leaf in layer.tokens.pages.arrays():
            found.append(jnp.moveaxis(jnp.take(leaf, ids, axis=axis, mode="clip"), axis, 0))
    return found


@functools.partial(jax.jit, donate_argnames=("state",))
@whole_batch()
def _put(
    state: DeviceState, ids: Int[Array, "pages"], arrays: list[Shaped[Array, "pages *rest"]]
) -> DeviceState:
    """Returns the state with pages from `_take`."""
    new = iter(arrays)

    def put(layer: LayerCache) -> LayerCache:
        axis = _stack_axes(layer.tokens.pages)
        stack = (slice(None),) * axis

        def put_leaf(leaf: Array) -> Array:
            return leaf.at[(*stack, ids)].set(jnp.moveaxis(next(new), 0, axis), mode="drop")

        pages = jax.tree.map(put_leaf, layer.tokens.pages)
        return layer.replace(tokens=layer.tokens.replace(pages=pages).lay_out())

    layers = tuple(put(layer) for layer in state.layers)
    return state.replace(layers=layers, draft_layers=tuple(map(put, state.draft_layers)))
