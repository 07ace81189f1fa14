"""Safetensors files, read and written a part at a time.

    8 bytes: N, little-endian · N bytes of JSON: name -> dtype, shape, data_offsets · the tensors'
    bytes, without gaps

The header is somebody else's word: each of its claims is checked before a byte of data is looked
at.

Source of the format: huggingface/safetensors, README.md, "Format".
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

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
# The format's own limit, NumPy's of axes, and letters of a name, which messages repeat.
_HEADER_BYTES, _AXES, _LETTERS = 100_000_000, 32, 512


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file; `np.asarray` maps it into memory and reads what is looked at.

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
        mapped = np.memmap(self.path, self.dtype, "r", self.start, math.prod(self.shape))
        return mapped.view(np.ndarray).reshape(self.shape)


def read_header(path: pathlib.Path) -> dict[str, Stored]:
    """Returns the tensors of a file by name, in the order in which they lie in it.

    Raises:
      UserError: the file cannot be read, is cut short, or its header lies about it.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_HEADER_BYTES, size - 8):
                raise _Lie(f"a header of {length:,} bytes is none for a file of {size:,}")
            header = _parse(file.read(length))
        return _tensors(path, header, start=8 + length, size=size)
    except (OSError, _Lie) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


class _Lie(Exception):
    """What is wrong with a header."""


def _parse(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                raise _Lie(f"its header names {name!r} twice")
            values[name] = value
        return values

    try:
        header = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _Lie("its header is not JSON") from error
    if not isinstance(header, dict):
        raise _Lie("its header is not a JSON object")
    return header


def _tensors(
    path: pathlib.Path, header: Mapping[str, Any], start: int, size: int
) -> dict[str, Stored]:
    spans = {}
    for name, entry in header.items():
        if name != "__metadata__":  # words about the file, which say nothing of its tensors
            spans[name] = _entry(name, entry)
    tensors, end = {}, 0
    for name in sorted(spans, key=lambda each: spans[each][2]):
        dtype, shape, (first, last) = spans[name]
        if first != end:
            raise _Lie(
                f"{name} starts at byte {first:,} of the data, not at {end:,} where the one "
                "before ends"
            )
        if last - first != math.prod(shape) * dtype.itemsize:
            raise _Lie(f"{name} has {last - first:,} bytes, but is {dtype}{list(shape)}")
        tensors[name], end = Stored(path, start + first, dtype, shape), last
    if start + end != size:
        raise _Lie(f"its tensors end at byte {start + end:,}, the file at {size:,}")
    return tensors


def _entry(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    """Returns type, shape and span of one tensor."""
    if not 0 < len(name) <= _LETTERS:
        raise _Lie(f"{name[:32]!r} … is no tensor's name: it has {len(name):,} letters")
    if not name.isprintable() or any(part in name for part in ("/", "\\", "..")):
        raise _Lie(f"{name!r} is no tensor's name, but a path or worse")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Lie(f"{name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _Lie(f"{name} has the unknown type {dtype!r}")
    if not _are_sizes(shape) or len(shape) > _AXES:
        raise _Lie(f"{name} has no shape")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Lie(f"{name} has no data_offsets")
    return _DTYPES[dtype], tuple(shape), (offsets[0], offsets[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


class Writer:
    """Writes one file: all names first, then the tensors' rows one after the other. A context
    manager.
    """

    def __init__(self, path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], dtype: Any):
        self._dtype, self._left = np.dtype(dtype), {}
        header: dict[str, Any] = {
            "__metadata__": {"format": "pt"}
        }  # the tensors lie as torch has them
        end = 0
        for name, shape in shapes.items():
            self._left[name] = math.prod(shape) * self._dtype.itemsize
            start, end = end, end + self._left[name]
            header[name] = {
                "dtype": _NAMES[self._dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the data is aligned
        self._names = list(shapes)
        self._file = path.open("wb", buffering=0)
        self._flusher = BackgroundFlusher(lambda: flush(self._file.fileno()))
        self._write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        with self._file:
            self._flusher.__exit__(kind)
            if kind is None:
                assert not any(self._left.values()), "all tensors are written"
                os.fsync(self._file.fileno())

    def write(self, name: str, rows: Shaped[np.ndarray, "..."]) -> None:
        """Adds the next rows of a tensor, whose turn it must be."""
        while not self._left[self._names[0]] and self._names[0] != name:
            self._names.pop(0)
        assert self._names[0] == name, "tensors come one after the other"
        assert rows.dtype == self._dtype
        assert rows.nbytes <= self._left[name]
        self._left[name] -= rows.nbytes
        self._write(rows.reshape(-1).view(np.uint8))

    def _write(self, data: Any) -> None:
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]
        self._flusher.wrote(memoryview(data).nbytes)
