"""Safetensors files, read and written a part at a time.

    8 bytes: N, little-endian · N bytes of JSON: name -> dtype, shape, data_offsets · the tensors'
    bytes, without gaps

The header comes from a stranger: each of its fields is checked before a byte of data is read.

Source of the format: huggingface/safetensors, README.md, "Format".
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from research.core.errors import UserError
from research.storage.flush import BackgroundFlusher, flush

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# The format's own limit.
_MOST_HEADER_BYTES = 100_000_000
# NumPy's limit of older versions.
_MOST_AXES = 32
# Of a tensor's name, which messages repeat.
_MOST_LETTERS = 512


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file; `np.asarray` maps it into memory, so that only the parts used are read.

    Attributes:
      path: of the file.
      start: its first byte.
      dtype: of its numbers.
      shape: its axes.
    """

    path: pathlib.Path
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Shaped[np.ndarray, "..."]:
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        # Mapped anew each time: the pages of what was read before are given back with its array.
        count = math.prod(self.shape)
        mapped = np.memmap(self.path, self.dtype, "r", self.start, count)
        return mapped.view(np.ndarray).reshape(self.shape)


def read_header(path: pathlib.Path) -> dict[str, Stored]:
    """Returns the tensors of a file by name, in the order of their bytes.

    Raises:
      UserError: the file cannot be read, is cut short, or does not agree with its header.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            # Two bytes are the shortest JSON object.
            longest = min(_MOST_HEADER_BYTES, size - 8)
            if not 2 <= length <= longest:
                raise _HeaderError(f"a header of {length:,} bytes is none for a file of {size:,}")
            header = _parse(file.read(length))
        return _tensors(path, header, start=8 + length, size=size)
    except (OSError, _HeaderError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


class _HeaderError(Exception):
    """A header that does not agree with its file or with the format."""


def _parse(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                raise _HeaderError(f"its header names {name!r} twice")
            values[name] = value
        return values

    # JSON itself would let the last of two equal names win.
    try:
        header = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _HeaderError("its header is not JSON") from error
    if not isinstance(header, dict):
        raise _HeaderError("its header is not a JSON object")
    return header


def _tensors(
    path: pathlib.Path, header: Mapping[str, Any], start: int, size: int
) -> dict[str, Stored]:
    entries = []
    for name, value in header.items():
        # Metadata describes the file, not its tensors.
        if name != "__metadata__":
            _check_name(name)
            entries.append(_entry(name, value))

    tensors = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.offsets):
        first, last = entry.offsets
        if first != end:
            raise _HeaderError(
                f"{entry.name} starts at byte {first:,} of the data, not at {end:,} where the one "
                "before ends"
            )
        shape_bytes = math.prod(entry.shape) * entry.dtype.itemsize
        if last - first != shape_bytes:
            what = f"{entry.dtype}{list(entry.shape)}"
            raise _HeaderError(f"{entry.name} has {last - first:,} bytes, but is {what}")
        tensors[entry.name] = Stored(path, start + first, entry.dtype, entry.shape)
        end = last

    if start + end != size:
        raise _HeaderError(f"its tensors end at byte {start + end:,}, the file at {size:,}")
    return tensors


class _Entry(NamedTuple):
    """A tensor in a header: its bytes are offsets[0]:offsets[1] of the data."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, int]


def _check_name(name: str) -> None:
    if not 0 < len(name) <= _MOST_LETTERS:
        raise _HeaderError(f"{name[:32]!r} … is no tensor's name: it has {len(name):,} letters")
    is_path = any(part in name for part in ("/", "\\", ".."))
    if is_path or not name.isprintable():
        raise _HeaderError(f"{name!r} is no tensor's name, but a path or worse")


def _entry(name: str, value: Any) -> _Entry:
    """Returns the entry of one tensor, each of its fields checked."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _HeaderError(f"{name} is not described by dtype, shape and data_offsets")

    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _HeaderError(f"{name} has the unknown type {dtype!r}")

    shape = value["shape"]
    if not _are_sizes(shape) or len(shape) > _MOST_AXES:
        raise _HeaderError(f"{name} has no shape")

    offsets = value["data_offsets"]
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _HeaderError(f"{name} has no data_offsets")
    start, end = offsets
    if start > end:
        raise _HeaderError(f"{name} has no data_offsets")
    return _Entry(name, _DTYPES[dtype], tuple(shape), (start, end))


def _are_sizes(values: Any) -> bool:
    if not isinstance(values, list):
        return False
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


class Writer:
    """Writes one file: all names first, then the tensors' rows one after the other. A context
    manager.
    """

    def __init__(self, path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], dtype: Any):
        self._dtype = np.dtype(dtype)
        self._names = list(shapes)
        # Bytes of each tensor that are still to be written.
        self._left = {}
        for name, shape in shapes.items():
            self._left[name] = math.prod(shape) * self._dtype.itemsize

        self._file = path.open("wb", buffering=0)
        self._flusher = BackgroundFlusher(lambda: flush(self._file.fileno()))
        text = self._header(shapes)
        length = len(text).to_bytes(8, "little")
        self._write(length + text)

    def _header(self, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
        # The format is that of torch: outputs first.
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            start = end
            end = start + self._left[name]
            header[name] = {
                "dtype": _NAMES[self._dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        # Spaces align the data to 8 bytes.
        padding = -len(text) % 8
        return text + b" " * padding

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        with self._file:
            self._flusher.__exit__(kind)
            if kind is None:
                assert not any(self._left.values()), "all tensors are written"
                os.fsync(self._file.fileno())

    def write(self, name: str, rows: Shaped[np.ndarray, "..."]) -> None:
        """Adds the next rows of a tensor, which must be the next one with bytes left."""
        while self._names[0] != name and not self._left[self._names[0]]:
            self._names.pop(0)
        assert self._names[0] == name, "tensors come one after the other"
        assert rows.dtype == self._dtype
        assert rows.nbytes <= self._left[name]
        self._left[name] -= rows.nbytes
        self._write(rows.reshape(-1).view(np.uint8))

    def _write(self, data: Any) -> None:
        left = memoryview(data)
        while left:
            # A write may take fewer bytes than it is given.
            written = self._file.write(left)
            left = left[written:]
        self._flusher.wrote(memoryview(data).nbytes)
