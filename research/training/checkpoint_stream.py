"""A checkpoint of parameters written and read a part at a time, for models larger than memory.

Three words, with their examples:

    parameter  of the unrolled model            `layers_1/mlp/kernel`        [D, F]
    array      on disk, layers in one stack     `params/layers/mlp/kernel`   [L, D, F]
    part       the values in a box of a parameter, rows 0:4 of `layers_1/mlp/kernel`; in its array
               this is the box [1:2, 0:4, 0:F]

The files are those that `Checkpoints` writes and reads (checkpoint_files.py): the same OCDBT store,
the same manifest with the same digests. Orbax saves complete arrays only, so parts are written with
TensorStore, which Orbax is built on, and Orbax's description of the tree is written beside them.
"""

import collections
import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import tensorstore as ts
from jaxtyping import Shaped

from research.core.errors import UserError
from research.models.canonical_params import canonical_names, stack_layers
from research.storage.background import BackgroundWorker, prefetch
from research.storage.digests import RunningDigest
from research.storage.files import new_folder
from research.storage.flush import BackgroundFlusher, flush, supports_direct_io
from research.storage.paths import Path, absolute, in_bucket
from research.training import checkpoint_files as files
from research.training import orbax_tree
from research.training.checkpoint_arrays import CHUNK_BYTES, array_kvstore
from research.training.checkpoint_files import Damaged

# Most bytes that are being written while the next part is made.
MAX_PENDING_BYTES = 2**27
# Suffix of files that TensorStore is still writing.
_UNFINISHED = ".__lock"
_FIELD = "params"

Box = tuple[slice, ...]  # one slice for each leading axis; () is the whole parameter
Part = tuple[str, Box, Shaped[np.ndarray, "..."]]  # parameter, box, values


def write_params(
    workdir: pathlib.Path,
    step: int,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    parts: Iterable[Part],
) -> None:
    """Writes a checkpoint of parameters alone; its folder appears when it is complete.

    Args:
      workdir: gets `checkpoints/<step>`.
      step: of the checkpoint, which must not exist.
      shapes: of all parameters of the unrolled model, by name.
      parts: together hold each element of each parameter exactly once.

    Raises:
      UserError: the disk is full.
    """
    folder = workdir.absolute() / "checkpoints" / str(step)
    with _full_disk_as_user_error(folder), new_folder(folder) as partial:
        arrays, digests = _write_arrays(partial / files.ARRAYS, shapes, parts)

        described = files.describe_arrays(arrays, digests)
        manifest = files.build_manifest(step, described, {})
        (partial / files.MANIFEST).mkdir()
        (partial / files.MANIFEST / "manifest.json").write_text(json.dumps(manifest))

        # Orbax writes this file last. With it, a copy in a bucket is known to be complete.
        (partial / files.COMMIT).write_text(f"Checkpoint commit was successful to {folder}")
        _sync_all(partial)


def _write_arrays(
    folder: pathlib.Path, shapes: Mapping[str, jax.ShapeDtypeStruct], parts: Iterable[Part]
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, str]]:
    """Writes the arrays of a checkpoint; returns their shapes and digests by name."""
    writer = _ArrayWriter(folder, shapes)
    try:
        with BackgroundFlusher(writer.flush) as flusher:
            for name, box, values in prefetch(parts):
                writer.write(name, box, values)
                flusher.wrote(values.nbytes)
        return writer.arrays, writer.finish()
    except BaseException:
        # The caller removes the folder: nothing may still be written into it then.
        writer.wait_after_failure()
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
        self._folder = absolute(workdir) / "checkpoints" / str(step)
        self._manifest = files.read_manifest(self._folder)
        self._layout = _Layout(shapes, files.first_field(self._manifest, fields))
        files.check_architecture(self._folder, self._manifest, self._layout.arrays, exact=False)

        io_mode = "direct" if self._can_read_directly() else "default"
        self._context = _context(io_mode)
        self._stores: dict[str, ts.TensorStore] = {}
        self._digests = self._layout.running_digests()
        # (array, start, shape) of the boxes that are in the digests already.
        self._digested: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = set()
        self._digest_worker = BackgroundWorker()

    def read(self, name: str, box: Box) -> Shaped[np.ndarray, "..."]:
        """Returns a part of a parameter; raises Damaged where it cannot be read.

        An element may be read again only through the same box: the digest counts every box once.
        """
        target = self._layout.locate(name, box)
        try:
            values = self._store(target.array)[target.box].read().result()
        except ValueError as error:  # TensorStore raises no other
            message = str(error).splitlines()[0][:300]
            raise Damaged(f"array {target.array} cannot be read ({message})") from error

        box_on_disk = (target.array, target.start, values.shape)
        if box_on_disk not in self._digested:
            self._digested.add(box_on_disk)
            digest = self._digests[target.array]
            self._digest_worker.call(digest.add, values, target.start)

        # [1, rows, F] -> [rows, F]
        return values[0] if target.in_stack else values

    def check(self) -> None:
        """Raises Damaged where the digest of the elements read differs from the manifest's.

        Every element must have been read.
        """
        self._digest_worker.wait()
        for name, digest in self._digests.items():
            if digest.text() != self._manifest["arrays"][name]["digest"]:
                raise Damaged(f"the bits of array {name} are not those that were saved (digest)")

    def _store(self, array: str) -> ts.TensorStore:
        """Returns an array, opened when it is first asked for."""
        if array not in self._stores:
            folder, stored_name = files.locate_array(self._folder, self._manifest, array)
            spec = {"driver": "zarr", "kvstore": array_kvstore(folder, stored_name)}
            opening = ts.open(spec, context=self._context, open=True, read=True)
            self._stores[array] = opening.result()
        return self._stores[array]

    def _can_read_directly(self) -> bool:
        """Whether the files can be read past the page cache."""
        if in_bucket(self._folder):
            return False
        return supports_direct_io(self._folder / files.MANIFEST / "manifest.json")


class _Target(NamedTuple):
    """Where a part of a parameter is on disk.

    Attributes:
      array: name of the array.
      box: a slice with start and stop for each axis of the array.
      in_stack: whether axis 0 of the array counts layers, of which the box has one.
    """

    array: str
    box: Box
    in_stack: bool

    @property
    def start(self) -> tuple[int, ...]:
        """The indices of the first element of the box."""
        return tuple(bounds.start for bounds in self.box)


class _Layout:
    """The arrays on disk that hold the parameters of an unrolled model.

    Args:
      shapes: of all parameters, by name.
      field: of the state, `params` or `ema`: it comes first in the names of the arrays.
    """

    def __init__(self, shapes: Mapping[str, jax.ShapeDtypeStruct], field: str):
        self._field = field
        self._stack_and_layer = canonical_names(shapes)
        stacked = stack_layers(shapes)
        self.arrays = {f"{field}/{name}": shape for name, shape in stacked.items()}

    def locate(self, name: str, box: Box) -> _Target:
        """Returns where the part of a parameter is on disk."""
        stack, layer = self._stack_and_layer[name]
        array = f"{self._field}/{stack}"
        shape = self.arrays[array].shape

        # Box (0:4,) of layer 1 -> (1:2, 0:4, :) of [L, D, F] -> (1:2, 0:4, 0:F)
        if layer is not None:
            box = (slice(layer, layer + 1), *box)
        missing = len(shape) - len(box)
        box = (*box, *[slice(None)] * missing)
        bounds = [axis_slice.indices(size) for axis_slice, size in zip(box, shape, strict=True)]
        box = tuple(slice(start, stop) for start, stop, _ in bounds)
        return _Target(array, box, in_stack=layer is not None)

    def running_digests(self) -> dict[str, RunningDigest]:
        """Returns a new digest for each array."""
        return {name: RunningDigest(shape.shape) for name, shape in self.arrays.items()}


class _ArrayWriter:
    """Writes arrays in parts, several at a time, and takes their digests.

    Args:
      folder: of the store, which is made.
      shapes: of all parameters of the unrolled model, by name.
    """

    def __init__(self, folder: pathlib.Path, shapes: Mapping[str, jax.ShapeDtypeStruct]):
        self._folder = folder
        self._layout = _Layout(shapes, _FIELD)
        self._context = _context()
        self._stores: dict[str, ts.TensorStore] = {}
        self._digests = self._layout.running_digests()
        self._digest_worker = BackgroundWorker()
        # (bytes, write) of the parts that are not written yet, oldest first.
        self._pending: collections.deque[tuple[int, Any]] = collections.deque()
        self._flushed: set[pathlib.Path] = set()
        folder.mkdir(parents=True)

    @property
    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes by the arrays' names on disk."""
        return self._layout.arrays

    def write(self, name: str, box: Box, values: Shaped[np.ndarray, "..."]) -> None:
        """Starts to write a part; first waits for older ones where too many bytes are pending."""
        target = self._layout.locate(name, box)
        if target.in_stack:
            values = values[None]  # [rows, F] -> [1, rows, F]
        if target.array not in self._stores:
            self._stores[target.array] = self._create(target.array, values.shape)
        store = self._stores[target.array]

        digest = self._digests[target.array]
        self._digest_worker.call(digest.add, values, target.start)

        self._reduce_pending_to(MAX_PENDING_BYTES - values.nbytes)
        # Nobody changes `values` any more, so TensorStore need not copy them.
        write = store[target.box].write(values, can_reference_source_data_indefinitely=True)
        self._pending.append((values.nbytes, write))

    def finish(self) -> dict[str, str]:
        """Waits for all writes, describes the tree for Orbax, and returns the digests."""
        self._reduce_pending_to(0)
        self._digest_worker.wait()
        metadata = orbax_tree.tree_metadata(self.arrays)
        (self._folder / orbax_tree.FILE).write_text(json.dumps(metadata))
        return {name: digest.text() for name, digest in self._digests.items()}

    def flush(self) -> None:
        """Flushes the data files that are complete and were not flushed before."""
        complete = {
            path for path in self._folder.glob("d/*") if not path.name.endswith(_UNFINISHED)
        }
        for path in complete - self._flushed:
            with _descriptor(path) as descriptor:
                flush(descriptor)
        self._flushed |= complete

    def wait_after_failure(self) -> None:
        """Returns when nothing is written any more, whatever became of the pending writes."""
        while self._pending:
            _, write = self._pending.popleft()
            write.exception()

    def _reduce_pending_to(self, max_bytes: int) -> None:
        """Waits until at most this many bytes are pending."""
        while self._pending and sum(size for size, _ in self._pending) > max_bytes:
            _, write = self._pending.popleft()
            write.result()

    def _create(self, array: str, part_shape: tuple[int, ...]) -> ts.TensorStore:
        """Makes an array, in chunks that suit the shape of its first part."""
        shape = self.arrays[array].shape
        dtype = np.dtype(self.arrays[array].dtype)
        chunks = chunk_shape(part_shape, dtype.itemsize)
        metadata = {
            "shape": list(shape),
            "chunks": list(chunks),
            "dtype": "bfloat16" if dtype == ml_dtypes.bfloat16 else dtype.str,
            "compressor": None,  # weights hardly compress
        }
        spec = {
            "driver": "zarr",
            "kvstore": array_kvstore(self._folder, array),
            "metadata": metadata,
            "create": True,
            "store_data_equal_to_fill_value": True,
        }
        return ts.open(spec, context=self._context).result()


def chunk_shape(part_shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Returns the shape of chunks of at most `CHUNK_BYTES` that no two parts share.

    A shared chunk would be written with the first part, then read, changed and written again with
    the second. Callers cut an axis only at multiples of a power of two, so power-of-two chunks
    never cross a cut: parts 0:4, 4:8 -> chunks 0:2, 2:4, 4:6, 6:8.

    The longest axes are halved, so that chunks suit a model that is sharded along any of them:
    float32 (1, 4096, 28672) -> (1, 1024, 1024).
    """
    chunk = [max(size, 1) for size in part_shape]
    while itemsize * math.prod(chunk) > CHUNK_BYTES:
        longest = chunk.index(max(chunk))
        # The largest power of two below: 28672 -> 16384 -> 8192
        exponent = (chunk[longest] - 1).bit_length() - 1
        chunk[longest] = 2**exponent
    return tuple(chunk)


def _context(io_mode: str = "default") -> ts.Context:
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            # Files are synced by `flush`, many at a time, and once more when all is written.
            "file_io_sync": False,
            "file_io_mode": {"mode": io_mode},
        }
    )


@contextlib.contextmanager
def _descriptor(path: pathlib.Path) -> Iterator[int]:
    """Opens a file or folder, as a descriptor of the system."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _sync_all(folder: pathlib.Path) -> None:
    """Syncs all files and folders in a folder, and the folder itself."""
    for path in [*folder.rglob("*"), folder]:
        with _descriptor(path) as descriptor:
            os.fsync(descriptor)


@contextlib.contextmanager
def _full_disk_as_user_error(folder: pathlib.Path) -> Iterator[None]:
    """Raises a full disk, which TensorStore reports as a ValueError, as a UserError.

    Only a write finds a full disk. The other faults that `checkpoint_faults.disk_fault` knows may
    be of the file that the parts are read from, and must not be blamed on this folder.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        for reason in ("No space left on device", "Disk quota exceeded"):
            if reason in str(error):
                raise UserError(f"{folder}: {reason}; it was not written.") from error
        raise
