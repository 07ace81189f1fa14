"""The arrays of a checkpoint, read as sharded arrays: each process reads what its devices hold.

Orbax writes them; they are read with TensorStore, which Orbax is built on. Orbax's reader runs many
reads in one event loop, and closes it at the first error: each of the others then prints a
traceback from a thread.
"""

import collections
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import tensorstore as ts
from jaxtyping import Array

from research.storage.paths import Path, kvstore

# Bytes that are read ahead while an array is put on its devices.
PREFETCH_BYTES = 2**29
# Largest chunk, the unit in which TensorStore reads: a device that holds a small part of an array
# in a sharded model reads little more than its part.
CHUNK_BYTES = 2**22

Bounds = tuple[tuple[int, int], ...]  # (start, stop) of each axis


class UnreadableArray(Exception):
    """An array that is missing, or whose files are not what was written; the message names it."""


class _Sized(Protocol):
    """What has been begun to be read.

    Attributes:
      size: its bytes.
    """

    @property
    def size(self) -> int: ...


Reads = TypeVar("Reads", bound=_Sized)


class _ArrayReads(NamedTuple):
    """The reads of one array that this process has begun.

    Attributes:
      name: of the array.
      size: bytes of all of them.
      by_bounds: the read of each part that a device of this process holds.
    """

    name: str
    size: int
    by_bounds: dict[Bounds, ts.Future]


def array_kvstore(folder: Path, name: str) -> dict[str, Any]:
    """Returns TensorStore's description of the key-value store of one array.

    Args:
      folder: of the OCDBT store.
      name: slash-separated, as in the tree.
    """
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
    context = uncached()
    # All are being opened before the first is waited for.
    stores = {name: open_array(folder, name, context) for name in wanted}
    begun = _begin_reads(stores, wanted)

    arrays = {}
    for reads in prefetched(begun, PREFETCH_BYTES):
        name = reads.name
        # A failed read raises here.
        parts = {}
        for part, read in reads.by_bounds.items():
            parts[part] = result(name, read)
        arrays[name] = put_on_devices(parts, wanted[name])
    return arrays


def uncached(**resources: Any) -> ts.Context:
    """Returns what arrays are opened in that are read once.

    Args:
      resources: further ones of TensorStore.
    """
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, **resources})


def open_array(folder: Path, name: str, context: ts.Context) -> ts.Future:
    """Begins to open an array, of which `result` waits for the store."""
    spec = {"driver": "zarr", "kvstore": array_kvstore(folder, name)}
    return ts.open(spec, context=context, open=True, read=True)


def _begin_reads(
    stores: Mapping[str, ts.Future], wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[_ArrayReads]:
    """Yields the reads of each array; they begin when it is asked for."""
    for name, shape in wanted.items():
        store = result(name, stores[name])
        check_type(name, store, shape)

        # [8, 8], rows sharded over two devices -> {((0, 4), (0, 8)), ((4, 8), (0, 8))}; replicas
        # have the same bounds and are read once.
        index_of_device = shape.sharding.addressable_devices_indices_map(shape.shape)
        distinct_bounds = {bounds(index, shape.shape) for index in index_of_device.values()}

        reads = {}
        elements = 0
        for part_bounds in distinct_bounds:
            part = store[slices(part_bounds)]
            reads[part_bounds] = part.read()
            elements += math.prod(part.shape)
        size = elements * shape.dtype.itemsize
        yield _ArrayReads(name, size, reads)


def check_type(name: str, store: ts.TensorStore, wanted: jax.ShapeDtypeStruct) -> None:
    """Raises UnreadableArray where an array is stored in another shape or type."""
    dtype = store.dtype.numpy_dtype
    if store.shape == wanted.shape and dtype == wanted.dtype:
        return
    sizes = ", ".join(map(str, store.shape))
    raise UnreadableArray(f"array {name} cannot be read (it is stored as {dtype}[{sizes}])")


def prefetched(begun: Iterator[Reads], most: int) -> Iterator[Reads]:
    """Yields reads in order, after those of the next bytes have begun.

    Args:
      begun: begins each when it is asked for.
      most: bytes that are read ahead.
    """
    waiting: collections.deque[Reads] = collections.deque()
    waiting_bytes = 0
    for reads in begun:
        waiting.append(reads)
        waiting_bytes += reads.size
        while waiting_bytes > most:
            first = waiting.popleft()
            waiting_bytes -= first.size
            yield first
    yield from waiting


def put_on_devices(parts: Mapping[Bounds, Any], shape: jax.ShapeDtypeStruct) -> Array:
    """Returns a sharded array of the parts that the devices of this process hold."""

    def part(index: tuple[slice, ...]) -> Any:
        return parts[bounds(index, shape.shape)]

    return jax.make_array_from_callback(shape.shape, shape.sharding, part)


def bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    """Returns JAX's index of a device's part as bounds.

    (slice(None), slice(0, 4)) of [2, 8] -> ((0, 2), (0, 4))
    """
    found = []
    for axis_slice, size in zip(index, shape, strict=True):
        start, stop, _ = axis_slice.indices(size)
        found.append((start, stop))
    return tuple(found)


def slices(box: Bounds) -> tuple[slice, ...]:
    """Returns bounds as an index."""
    return tuple(slice(start, stop) for start, stop in box)


def result(name: str, future: ts.Future) -> Any:
    """Returns what TensorStore has opened or read; raises UnreadableArray where it could not."""
    try:
        return future.result()
    # TensorStore raises ValueError for nearly all that can be wrong with a file.
    except (ValueError, OSError) as error:
        # The description of the store, which TensorStore appends, is pages long.
        message, _, _ = str(error).partition(" [tensorstore_spec=")
        message = f"{type(error).__name__}: {message}"
        message = " ".join(message.split())
        raise UnreadableArray(f"array {name} cannot be read ({message[:300]})") from error
