"""Parameters of a checkpoint, read into the shards and the type that they are served in.

Of what is on disk a few parts are in memory at a time, in the type that they are stored in. Each is
added to the digest of its array, cast, and copied to the shards that it belongs to.

    array  on disk, layers in one stack   `params/layers/mlp/kernel`   [L, D, F]
    part   a chunk of an array            [1:2, 0:1024, 0:512]
    shard  what a device holds of a parameter of the model: columns 0:256 of `layers_1/mlp/kernel`,
           which in its array are the box [1:2, 0:D, 0:256]
"""

import itertools
import math
import mmap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts
from jaxtyping import Array, Shaped

from research.models.canonical_params import canonical_names, stack_layers
from research.storage.background import BackgroundWorker
from research.storage.digests import RunningDigest
from research.storage.paths import Path
from research.training import checkpoint_arrays
from research.training import checkpoint_files as files
from research.training.checkpoint_arrays import Bounds

# Stored bytes that are read ahead, memory beside the parameters: this share of them, within bounds.
READ_AHEAD = 1 / 64
LEAST_READ_AHEAD = 2**22
MOST_READ_AHEAD = 2**26
# XLA for CPU takes an array without a copy where its address is a multiple of this.
ALIGNMENT = 64
# Bytes from which on an array is a mapping of its own: a process has some ten thousands.
MAPPED = 2**17

Shapes = Mapping[str, jax.ShapeDtypeStruct]


def read_params(
    folder: Path, manifest: Mapping[str, Any], field: str, stored: Shapes, wanted: Shapes
) -> dict[str, Array]:
    """Returns the parameters of a checkpoint in other types and shardings; what is read is compared
    with the digests of what was saved.

    Args:
      folder: of the checkpoint.
      manifest: its content.
      field: of the state that has them, `params` or `ema`.
      stored: shape and type of each parameter as it was saved.
      wanted: shape, type and sharding of each, all of it on devices of this process.

    Raises:
      UserError: the checkpoint is of another architecture.
      Damaged: it is not what was saved.
    """
    # The arrays on disk: mlp/kernel of each layer -> params/layers/mlp/kernel
    stacked = stack_layers(stored)
    shapes = {f"{field}/{name}": shape for name, shape in stacked.items()}
    files.check_architecture(folder, manifest, shapes, exact=False)
    files.check_trees(folder, manifest)

    # By array and layer; a parameter that is an array of its own has the layer None.
    parameters: dict[str, dict[int | None, _Parameter]] = {}
    for name, (array, layer) in canonical_names(stored).items():
        parameter = _Parameter(name, wanted[name], layer)
        parameters.setdefault(f"{field}/{array}", {})[layer] = parameter

    found = {}
    reads = _begin_reads(folder, manifest, shapes)
    parts = checkpoint_arrays.prefetched(reads, _read_ahead(wanted))
    worker = BackgroundWorker()
    try:
        for array, of_array in itertools.groupby(parts, key=_array_of):
            digest = RunningDigest(shapes[array].shape, compiled=True)
            for part in of_array:
                values = part.values(folder)
                # While the next part is read and this one is copied.
                worker.call(digest.add, values, part.start)
                for parameter in _of_part(parameters[array], part):
                    parameter.fill(part.box, values)
                    if parameter.is_filled:
                        found[parameter.name] = parameter.take()

            worker.wait()
            files.compare_digests(manifest, {array: digest.text()})
    finally:
        worker.close()
    return {name: found[name] for name in wanted}


class _Part(NamedTuple):
    """A part of an array whose read has begun.

    Attributes:
      array: its name.
      store: the folder that it is in.
      box: which part.
      size: bytes.
      read: of its values.
    """

    array: str
    store: Path
    box: Bounds
    size: int
    read: ts.Future

    @property
    def start(self) -> tuple[int, ...]:
        """The indices of its first element."""
        return tuple(start for start, _ in self.box)

    def values(self, folder: Path) -> Shaped[np.ndarray, "..."]:
        """Waits for the values; raises Damaged where they cannot be read."""
        with files.as_damaged(folder, self.store):
            return checkpoint_arrays.result(self.array, self.read)


class _Parameter:
    """A parameter of the model whose shards are being filled.

    Args:
      name: of it.
      shape: its shape, type and sharding.
      layer: its index in its array on disk; None where it is that array.
    """

    def __init__(self, name: str, shape: jax.ShapeDtypeStruct, layer: int | None):
        self.name = name
        self._shape = shape
        self._layer = layer
        # Replicas are one shard.
        index_of_device = shape.sharding.addressable_devices_indices_map(shape.shape)
        shards = set()
        for index in index_of_device.values():
            shards.add(checkpoint_arrays.bounds(index, shape.shape))
        self._missing = sum(map(_size, shards))
        # A shard has memory from its first element on.
        self._values: dict[Bounds, np.ndarray | None] = dict.fromkeys(shards)

    @property
    def is_filled(self) -> bool:
        """Whether nothing is missing."""
        return self._missing == 0

    def fill(self, box: Bounds, values: Shaped[np.ndarray, "..."]) -> None:
        """Takes what a part of its array on disk has of its shards, each element once.

        Args:
          box: of the part.
          values: in it.
        """
        for shard, filled in self._values.items():
            whole = self._in_array(shard)
            common = _intersection(whole, box)
            if common is None:
                continue
            if filled is None:
                filled = aligned(_shape(whole), self._shape.dtype)
                self._values[shard] = filled

            source = _within(common, box)
            target = _within(common, whole)
            # NumPy rounds to the nearest, and to even between two, as XLA does.
            filled[target] = values[source]
            self._missing -= _size(common)

    def _in_array(self, shard: Bounds) -> Bounds:
        """Returns the box that a shard is in its array on disk."""
        if self._layer is None:
            return shard
        # Columns 0:256 of layer 1 -> (1:2, 0:D, 0:256) of [L, D, F]
        layer = (self._layer, self._layer + 1)
        return (layer, *shard)

    def take(self) -> Array:
        """Returns it on its devices, and keeps no memory for it."""
        parts = self._values
        self._values = {}
        if self._layer is not None:
            # [1, D, F] -> [D, F]
            parts = {shard: values[0] for shard, values in parts.items()}
        return checkpoint_arrays.put_on_devices(parts, self._shape)


def aligned(shape: tuple[int, ...], dtype: Any) -> Shaped[np.ndarray, "..."]:
    """Returns an array that is not initialized, and that XLA for CPU takes without a copy.

    A large one is a mapping of its own. In the C library's heap it would lie between what is read
    and freed, which leaves gaps that are too small for what is read next.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size >= MAPPED:
        memory = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # As NumPy asks of its own: weights are read at the rate of the memory.
            memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, dtype).reshape(shape)

    memory = np.empty(size + ALIGNMENT, np.uint8)
    # Address 200 -> the next multiple of 64 is 56 bytes further.
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _begin_reads(folder: Path, manifest: Mapping[str, Any], shapes: Shapes) -> Iterator[_Part]:
    """Yields the chunks of arrays, array by array; a read begins when it is asked for."""
    # One thread copies what is read: memory that a thread has freed stays its own.
    context = checkpoint_arrays.uncached(data_copy_concurrency={"limit": 1})
    opening = {}
    for array in shapes:
        store, name = files.locate_array(folder, manifest, array)
        future = checkpoint_arrays.open_array(store, name, context)
        opening[array] = (store, future)

    for array, (store, future) in opening.items():
        with files.as_damaged(folder, store):
            opened = checkpoint_arrays.result(array, future)
            checkpoint_arrays.check_type(array, opened, shapes[array])
        itemsize = shapes[array].dtype.itemsize
        for box in _chunks(opened):
            index = checkpoint_arrays.slices(box)
            read = opened[index].read()
            yield _Part(array, store, box, _size(box) * itemsize, read)


def _chunks(opened: ts.TensorStore) -> Iterator[Bounds]:
    """Yields the chunks that an array is stored in, in row-major order.

    [4, 6] in chunks of [2, 4] -> (0:2, 0:4), (0:2, 4:6), (2:4, 0:4), (2:4, 4:6)
    """
    chunk = opened.chunk_layout.read_chunk.shape
    intervals = []
    for size, step in zip(opened.shape, chunk, strict=True):
        starts = range(0, size, step)
        along_axis = [(start, min(start + step, size)) for start in starts]
        intervals.append(along_axis)
    yield from itertools.product(*intervals)


def _read_ahead(wanted: Shapes) -> int:
    """Returns the stored bytes that are read ahead."""
    served = 0
    for shape in wanted.values():
        served += math.prod(shape.shape) * shape.dtype.itemsize
    ahead = int(READ_AHEAD * served)
    return min(max(ahead, LEAST_READ_AHEAD), MOST_READ_AHEAD)


def _array_of(part: _Part) -> str:
    return part.array


def _of_part(of_array: Mapping[int | None, _Parameter], part: _Part) -> list[_Parameter]:
    """Returns the parameters that a part of their array has elements of."""
    if None in of_array:
        return list(of_array.values())
    first, stop = part.box[0]
    return [of_array[layer] for layer in range(first, stop)]


def _intersection(a: Bounds, b: Bounds) -> Bounds | None:
    """Returns what two boxes have in common: (0:4) and (2:6) -> (2:4); None for nothing."""
    common = []
    for (a_start, a_stop), (b_start, b_stop) in zip(a, b, strict=True):
        start = max(a_start, b_start)
        stop = min(a_stop, b_stop)
        if start >= stop:
            return None
        common.append((start, stop))
    return tuple(common)


def _within(inner: Bounds, outer: Bounds) -> tuple[slice, ...]:
    """Returns the index of a box in another one that it lies in: (4:6) in (3:8) -> [1:3]."""
    index = []
    for (start, stop), (first, _) in zip(inner, outer, strict=True):
        own = slice(start - first, stop - first)
        index.append(own)
    return tuple(index)


def _shape(box: Bounds) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def _size(box: Bounds) -> int:
    return math.prod(_shape(box))
