"""A checkpoint written and read a part at a time, for models that are never whole in memory.

On disk it is what `Checkpoints` writes and reads (checkpoint_files.py): the same OCDBT store of
canonical arrays, the same manifest with the same digests. Orbax writes arrays whole, so the store
is written here with TensorStore, which Orbax itself is built on, and Orbax's account of the tree
beside it.
"""

import collections
import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tensorstore as ts
from jaxtyping import Shaped

from research.core.errors import UserError
from research.models.layer_stack import canonical_names, stack_layers
from research.storage.background import BackgroundWorker, prefetch
from research.storage.digests import RunningDigest
from research.storage.files import new_folder
from research.storage.flush import BackgroundFlusher, flush, supports_direct_io
from research.storage.paths import Path, absolute, in_bucket
from research.training import checkpoint_files as files
from research.training.checkpoint_arrays import array_kvstore
from research.training.checkpoint_files import Damaged

# Bytes of a chunk, the least that is read from disk at a time: a device that holds a small part of
# an array in a sharded model reads little more than its part.
CHUNK_BYTES = 2**22
# Bytes on their way to the disk while the next part is made.
_IN_FLIGHT = 2**27
# How the names of files end to which TensorStore still writes.
_UNFINISHED = ".__lock"
_FIELD = "params"

Box = tuple[slice, ...]
Part = tuple[str, Box, Shaped[np.ndarray, "..."]]


def write_params(
    workdir: pathlib.Path,
    step: int,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    parts: Iterable[Part],
) -> None:
    """Writes a checkpoint that holds parameters alone, whole or not at all.

    Args:
      workdir: where `checkpoints/<step>` is made.
      step: of the checkpoint, which must not be there.
      shapes: of all parameters of the unrolled model, by name.
      parts: names, boxes (() is the whole parameter) and values; together they are each number
          once.

    Raises:
      UserError: the disk is full.
    """
    folder = workdir.absolute() / "checkpoints" / str(step)
    with _explained(folder), new_folder(folder) as partial:
        arrays, digests = _write_arrays(partial / files.ARRAYS, shapes, parts)
        manifest = files.build_manifest(step, files.describe_arrays(arrays, digests), {})
        (partial / files.MANIFEST).mkdir()
        (partial / files.MANIFEST / "manifest.json").write_text(json.dumps(manifest))
        # As Orbax does, so that a copy in a bucket is known to be all of it.
        (partial / files.COMMIT).write_text(f"Checkpoint commit was successful to {folder}")
        _sync(partial)


def _write_arrays(
    folder: pathlib.Path, shapes: Mapping[str, jax.ShapeDtypeStruct], parts: Iterable[Part]
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, str]]:
    """Writes the arrays of a checkpoint; returns their shapes and digests by name."""
    store = _Store(folder, shapes)
    try:
        with BackgroundFlusher(store.flush) as flusher:
            for name, box, values in prefetch(parts):
                store.write(name, box, values)
                flusher.wrote(values.nbytes)
        return store.arrays, store.finish()
    except BaseException:
        store.abandon()
        raise


class ParamsReader:
    """Reads parts of a checkpoint's parameters by their names in the unrolled model.

    Args:
      workdir: whose checkpoint it is.
      step: of the checkpoint.
      shapes: as in `write_params`.
      fields: the state's fields to look for; the first that the checkpoint has is read.

    Raises:
      UserError: the checkpoint is of another architecture.
      Damaged: its manifest is not what was written.
    """

    def __init__(
        self,
        workdir: Path,
        step: int,
        shapes: Mapping[str, jax.ShapeDtypeStruct],
        fields: tuple[str, ...] = (_FIELD,),
    ):
        folder = absolute(workdir) / "checkpoints" / str(step)
        self._manifest = files.read_manifest(folder)
        held = {name.partition("/")[0] for name in self._manifest["arrays"]}
        self._field = next((field for field in fields if field in held), fields[-1])
        self._places = canonical_names(shapes)
        arrays = {f"{self._field}/{name}": shape for name, shape in stack_layers(shapes).items()}
        files.check_architecture(folder, self._manifest, arrays, whole=False)
        self._digests = {name: RunningDigest(shape.shape) for name, shape in arrays.items()}
        direct = not in_bucket(folder) and supports_direct_io(
            folder / files.MANIFEST / "manifest.json"
        )
        mode = "direct" if direct else "default"
        self._folder, self._context, self._open = folder, _context(mode), {}
        self._counted: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = set()
        self._worker = BackgroundWorker()

    def read(self, name: str, box: Box) -> Shaped[np.ndarray, "..."]:
        """Returns a part of a parameter; raises Damaged where it cannot be read.

        A number that is read again must be read in the same part again.
        """
        stack, index = self._places[name]
        stack = f"{self._field}/{stack}"
        try:
            if stack not in self._open:
                store, stored = files.locate_array(self._folder, self._manifest, stack)
                spec = {"driver": "zarr", "kvstore": array_kvstore(store, stored)}
                self._open[stack] = ts.open(
                    spec, context=self._context, open=True, read=True
                ).result()
            array = self._open[stack]
            box, start = _bounds(array.shape, index, box)
            values = array[box].read().result()
        except ValueError as error:  # all that TensorStore raises
            raise Damaged(
                f"array {stack} cannot be read ({str(error).splitlines()[0][:300]})"
            ) from error
        part = (stack, start, values.shape)
        if part not in self._counted:
            self._counted.add(part)
            self._worker.call(self._digests[stack].add, values, start)
        return values if index is None else values[0]

    def check(self) -> None:
        """Raises Damaged when what was read, each number at least once, is not what was saved."""
        self._worker.wait()
        for name, digest in self._digests.items():
            if digest.text() != self._manifest["arrays"][name]["digest"]:
                raise Damaged(f"the bits of array {name} are not those that were saved (digest)")


class _Store:
    """The arrays of a checkpoint, being written."""

    def __init__(self, folder: pathlib.Path, shapes: Mapping[str, jax.ShapeDtypeStruct]):
        self._folder, self._places, self._context = folder, canonical_names(shapes), _context()
        self.arrays = {f"{_FIELD}/{name}": shape for name, shape in stack_layers(shapes).items()}
        self._digests = {name: RunningDigest(shape.shape) for name, shape in self.arrays.items()}
        self._open: dict[str, ts.TensorStore] = {}
        self._pending: collections.deque[tuple[int, Any]] = collections.deque()
        self._flushed: set[pathlib.Path] = set()
        self._worker = BackgroundWorker()
        folder.mkdir(parents=True)

    def write(self, name: str, box: Box, values: Shaped[np.ndarray, "..."]) -> None:
        """Starts to write a part; waits for those before it where too much is under way."""
        stack, index = self._places[name]
        stack = f"{_FIELD}/{stack}"
        values = values if index is None else values[None]
        if stack not in self._open:
            self._open[stack] = self._create(stack, values.shape)
        box, start = _bounds(self.arrays[stack].shape, index, box)
        self._worker.call(self._digests[stack].add, values, start)
        self._wait(_IN_FLIGHT - values.nbytes)
        future = self._open[stack][box].write(values, can_reference_source_data_indefinitely=True)
        self._pending.append((values.nbytes, future))

    def finish(self) -> dict[str, str]:
        """Waits, writes Orbax's account of the tree, and returns the digests."""
        self._wait(0)
        self._worker.wait()
        keys = {name: name.split("/") for name in self.arrays}
        tree = {
            str(tuple(parts)): {
                "key_metadata": [{"key": part, "key_type": 2} for part in parts],
                "value_metadata": {
                    "value_type": "np.ndarray",
                    "skip_deserialize": False,
                    "write_shape": list(self.arrays[name].shape),
                },
            }
            for name, parts in keys.items()
        }
        account = {
            "tree_metadata": tree,
            "use_ocdbt": True,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self._folder / "_METADATA").write_text(json.dumps(account))
        return {name: digest.text() for name, digest in self._digests.items()}

    def flush(self) -> None:
        """Flushes the files that are complete and were not flushed before."""
        complete = {
            path for path in self._folder.glob("d/*") if not path.name.endswith(_UNFINISHED)
        }
        for path in complete - self._flushed:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                flush(descriptor)
            finally:
                os.close(descriptor)
        self._flushed |= complete

    def abandon(self) -> None:
        """Returns when nothing more is written."""
        while self._pending:
            self._pending.popleft()[1].exception()

    def _wait(self, room: int) -> None:
        """Waits until no more than so many bytes are under way."""
        while self._pending and sum(size for size, _ in self._pending) > room:
            self._pending.popleft()[1].result()

    def _create(self, name: str, part: tuple[int, ...]) -> ts.TensorStore:
        shape, dtype = self.arrays[name].shape, np.dtype(self.arrays[name].dtype)
        metadata = {
            "shape": list(shape),
            "chunks": list(chunk_shape(part, dtype.itemsize)),
            "dtype": "bfloat16" if dtype == ml_dtypes.bfloat16 else dtype.str,
            "compressor": None,  # weights hardly compress
        }
        spec = {
            "driver": "zarr",
            "kvstore": array_kvstore(self._folder, name),
            "metadata": metadata,
            "create": True,
            "store_data_equal_to_fill_value": True,
        }
        return ts.open(spec, context=self._context).result()


def chunk_shape(part: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Returns chunks of at most `CHUNK_BYTES` whose edges are edges of parts of this shape.

    The longest axes are halved, so that chunks suit a model that is sharded along any of them.
    """
    chunk = [max(size, 1) for size in part]
    while itemsize * math.prod(chunk) > CHUNK_BYTES:
        axis = chunk.index(max(chunk))
        chunk[axis] = 1 << (chunk[axis] - 1).bit_length() - 1
    return tuple(chunk)


def _bounds(shape: tuple[int, ...], index: int | None, box: Box) -> tuple[Box, tuple[int, ...]]:
    """Returns the box of a layer's part in its stack, with a slice an axis, and where it starts."""
    box = box if index is None else (slice(index, index + 1), *box)
    box = (*box, *[slice(None)] * (len(shape) - len(box)))
    ranges = [each.indices(size) for each, size in zip(box, shape, strict=True)]
    return tuple(slice(start, stop) for start, stop, _ in ranges), tuple(
        start for start, _, _ in ranges
    )


def _context(mode: str = "default") -> ts.Context:
    # Files are synced by `flush`, many at a time, and once more when all is written.
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            "file_io_sync": False,
            "file_io_mode": {"mode": mode},
        }
    )


def _sync(folder: pathlib.Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _explained(folder: pathlib.Path) -> Iterator[None]:
    """Turns a full disk into a UserError."""
    try:
        yield
    except (OSError, ValueError) as error:
        for full in ("No space left on device", "Disk quota exceeded"):
            if full in str(error):
                raise UserError(f"{folder}: {full}; it was not written.") from error
        raise
