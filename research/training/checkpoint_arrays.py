"""The arrays of a checkpoint, read as whole sharded arrays: each process reads the boxes that its
devices hold.

Orbax writes them; they are read with TensorStore itself, which Orbax is built on. Orbax's reader
runs many reads in one event loop, and closes that at the first error: the others then each print a
traceback from threads of their own.
"""

import collections
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import tensorstore as ts
from jaxtyping import Array

from research.storage.paths import Path, kvstore

# Bytes that are read ahead while an array is put on its devices.
AHEAD_BYTES = 2**29

Box = tuple[tuple[int, int], ...]  # (start, stop) an axis


class UnreadableArray(Exception):
    """An array that is not there, or whose files are not what was written; the message names it."""


def array_kvstore(folder: Path, name: str) -> dict[str, Any]:
    """Returns where an array lies in the store of a checkpoint, as TensorStore describes it."""
    path = f"{name.replace('/', '.')}/"
    return {"driver": "ocdbt", "base": kvstore(folder), "path": path}


def read_arrays(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    """Returns arrays in the shardings of `wanted`; their bits are not checked.

    Args:
      folder: of the store.
      wanted: shape, type and sharding of each array.

    Raises:
      UnreadableArray: an array cannot be read, or is stored in another shape or type.
    """
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    opening = {
        name: ts.open(
            {"driver": "zarr", "kvstore": array_kvstore(folder, name)},
            context=context,
            open=True,
            read=True,
        )
        for name in wanted
    }
    arrays = {}
    # A read that has been started ends in the background; whether it failed is asked when its turn
    # comes.
    for name, parts in _ahead(_started(opening, wanted)):
        shape = wanted[name]
        values = {box: _result(name, future) for box, future in parts.items()}
        arrays[name] = jax.make_array_from_callback(
            shape.shape,
            shape.sharding,
            lambda index, values=values, shape=shape: values[_box(index, shape.shape)],
        )
    return arrays


def _started(
    opening: Mapping[str, ts.Future], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, int, dict[Box, ts.Future]]]:
    """Yields (name, bytes, reads by box) of each array, its reads begun when it is asked for."""
    for name, shape in wanted.items():
        store = _result(name, opening[name])
        dtype = store.dtype.numpy_dtype
        if store.shape != shape.shape or dtype != shape.dtype:
            stored = f"{dtype}[{', '.join(map(str, store.shape))}]"
            raise UnreadableArray(f"array {name} cannot be read (it is stored as {stored})")
        # Replicas are read once: {((0, 4), (0, 8)), ((4, 8), (0, 8))} for [8, 8] over two devices
        # by rows.
        boxes = {
            _box(index, shape.shape)
            for index in shape.sharding.addressable_devices_indices_map(shape.shape).values()
        }
        reads = {box: store[tuple(slice(*bounds) for bounds in box)].read() for box in boxes}
        size = sum(math.prod(stop - start for start, stop in box) for box in boxes)
        yield name, size * shape.dtype.itemsize, reads


def _ahead(
    started: Iterator[tuple[str, int, dict[Box, ts.Future]]],
) -> Iterator[tuple[str, dict[Box, ts.Future]]]:
    """Yields the reads of arrays in order, so many begun before they are needed as fill
    `AHEAD_BYTES`.
    """
    waiting: collections.deque[tuple[str, int, dict[Box, ts.Future]]] = collections.deque()
    held = 0
    for name, size, reads in started:
        waiting.append((name, size, reads))
        held += size
        while held > AHEAD_BYTES:
            name, size, reads = waiting.popleft()
            held -= size
            yield name, reads
    for name, _, reads in waiting:
        yield name, reads


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """Returns the bounds of a device's part, (slice(None), slice(0, 4)) of [2, 8] as ((0, 2), (0,
    4)).
    """
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _result(name: str, future: ts.Future) -> Any:
    try:
        return future.result()
    except (
        ValueError,
        OSError,
    ) as error:  # TensorStore raises ValueError for nearly all that can be wrong with a file
        said, _, _ = str(error).partition(" [tensorstore_spec=")
        said = " ".join(f"{type(error).__name__}: {said}".split())
        raise UnreadableArray(f"array {name} cannot be read ({said[:300]})") from error
