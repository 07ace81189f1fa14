"""Files of text: found by a pattern, opened plain or compressed, read record by record in bounded
memory.
"""

import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import pathlib
import zlib
from collections.abc import Iterator

from research.core.errors import UserError
from research.storage.paths import is_address

# Bytes per read where lines do not matter.
CHUNK_BYTES = 2**20
# The largest window that the bundled Zstandard decoder allows, as a power of 2; larger ones need
# `zstandard`.
BUNDLED_WINDOW_LOG = 27


def stable_hash(key: str) -> int:
    """Returns 64 bits that are the same on every machine."""
    data = key.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "big")


def find_files(path: str) -> list[tuple[str, pathlib.Path]]:
    """Returns (name, file) of everything that a file, folder or glob names, in the order of the
    names' hashes.

    Raises:
      UserError: no file matches, the path is invalid, or it is an address.
    """
    if is_address(path):
        raise UserError(
            "path", path, "is an address: sources are read from local or mounted files."
        )
    try:
        root, named = _match(path)
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError("path", path, f"cannot be read: {reason}.") from error
    if not named:
        raise UserError("path", path, "matches no file.")
    if named == [root]:
        return [(root.name, root)]

    pairs = [(file.relative_to(root).as_posix(), file) for file in named]
    return sorted(pairs, key=lambda pair: (stable_hash(pair[0]), pair[0]))


def _match(path: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """Returns the folder that names are relative to, and the files; for a single file: that file,
    and a list of it.
    """
    root = pathlib.Path(path)
    if root.is_file():
        return root, [root]
    if root.is_dir():
        found = [file for file in root.rglob("*") if not _is_hidden(file.relative_to(root))]
    else:
        found = [pathlib.Path(name) for name in glob.glob(path, recursive=True)]
        # a/b/*.txt -> a/b
        while glob.has_magic(str(root)):
            root = root.parent
    return root, [file for file in found if file.is_file()]


def _is_hidden(path: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


@contextlib.contextmanager
def opened(
    path: pathlib.Path, zstd_window_log: int = BUNDLED_WINDOW_LOG
) -> Iterator[io.BufferedReader]:
    """Opens a plain, gzip or Zstandard file by the suffix of its name, after its byte order mark
    where it has one.

    Args:
      path: of the file.
      zstd_window_log: the largest window of a Zstandard frame that is decoded, as a power of 2.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with _binary(path, zstd_window_log) as file:
            mark = codecs.BOM_UTF8
            if file.peek(len(mark)).startswith(mark):
                file.read(len(mark))
            yield file
    except (OSError, EOFError, zlib.error) as error:
        if "requires too much memory" in str(error):  # the message of libzstd
            raise UserError(
                f"{path} has a Zstandard frame whose window is above 2^{zstd_window_log} bytes:"
                f" zstd_window_log = {zstd_window_log} must be higher, at most 31, to read it."
            ) from error
        raise UserError(f"{path} cannot be read: {error}.") from error


def _binary(path: pathlib.Path, zstd_window_log: int) -> io.BufferedReader:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"), CHUNK_BYTES)
    if path.suffix != ".zst":
        return path.open("rb")

    if zstd_window_log > BUNDLED_WINDOW_LOG:
        stream = _WideZstandard(path, zstd_window_log)
    else:
        # Slow to import, and only such files need it. Unlike `zstandard` it detects truncation.
        import pyarrow

        stream = pyarrow.input_stream(str(path), compression="zstd")
    return io.BufferedReader(stream, CHUNK_BYTES)


class _WideZstandard(io.RawIOBase):
    """Zstandard frames with larger windows than the bundled decoder reads; a truncated file is an
    OSError.
    """

    def __init__(self, path: pathlib.Path, window_log: int):
        try:
            import zstandard
        except ImportError as error:
            raise UserError(
                "zstd_window_log",
                window_log,
                f"must be at most {BUNDLED_WINDOW_LOG} until the package zstandard is installed: "
                "pip install -c constraints.txt -e '.[zstd]'.",
            ) from error
        self._errors = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**window_log)
        self._file = path.open("rb")
        self._frame = self._decompressor.decompressobj()
        # Whether no byte of the frame has been read.
        self._frame_is_empty = True
        # Decoded bytes that are not yet read.
        self._data = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        try:
            while not self._data and self._decode():
                pass
        except self._errors as error:
            raise OSError(str(error)) from error
        size = min(len(buffer), len(self._data))
        buffer[:size] = self._data[:size]
        self._data = self._data[size:]
        return size

    def _decode(self) -> bool:
        """Decodes the next chunk of the file; returns False at its end."""
        chunk = b""
        if self._frame.eof:
            # What the file holds after the end of this frame belongs to the next one.
            chunk = self._frame.unused_data
            self._frame = self._decompressor.decompressobj()
            self._frame_is_empty = True

        # Small chunks: one may decode to a thousand times its size.
        chunk = chunk or self._file.read(2**12)
        if not chunk:
            if not self._frame_is_empty:
                raise OSError("Truncated Zstandard stream")
            return False

        self._frame_is_empty = False
        self._data = self._frame.decompress(chunk)
        return True

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def lines(file: io.BufferedReader, limit: int) -> Iterator[bytes | None]:
    """Yields the lines of a file with their ends; None for a line of more than `limit` bytes, which
    is not kept.
    """
    for line in iter(lambda: file.readline(limit + 1), b""):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
            continue

        # The rest of a line that is too long is read in chunks, none of which is kept.
        while line and not line.endswith(b"\n"):
            line = file.readline(CHUNK_BYTES)
        yield None


def parts(
    file: io.BufferedReader, separator: bytes, limit: int
) -> Iterator[tuple[int, bytes | None]]:
    """Yields (number of its first line, bytes) of each part between separators.

    The bytes are None where they are more than `limit`; these are not kept.

    Args:
      file: is read to its end.
      separator: empty: the whole file is one part.
      limit: bytes of a part.
    """
    line = 1
    buffer = bytearray()
    too_long = False
    # Newlines of this part that are no longer in `buffer`, and how far `buffer` has no separator.
    newlines = 0
    searched = 0
    for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
        buffer += chunk

        # `buffer[start:end]` is the next part: separator "--", buffer b"a--b--c" -> 0:1, then 3:4
        start = 0
        end = buffer.find(separator, searched) if separator else -1
        while end >= 0:
            part = bytes(buffer[start:end])
            is_bad = too_long or len(part) > limit
            yield line, None if is_bad else part

            start = end + len(separator)
            line += newlines + part.count(b"\n") + separator.count(b"\n")
            newlines = 0
            too_long = False
            end = buffer.find(separator, start)
        del buffer[:start]

        # Only what may be the beginning of a separator has to be searched again.
        searched = len(buffer)
        if separator:
            searched = max(0, len(buffer) - len(separator) + 1)

        # Of a part that is too long only the count of its newlines is kept.
        if searched > limit:
            newlines += buffer.count(b"\n", 0, searched)
            del buffer[:searched]
            too_long = True
            searched = 0

    is_bad = too_long or len(buffer) > limit
    yield line, None if is_bad else bytes(buffer)
