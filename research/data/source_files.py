"""Files of text: found by a pattern, opened whatever compresses them, read record by record in
bounded memory.
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

# Bytes that are read at a time where no line ends them.
CHUNK_BYTES = 2**20
# The largest window that the bundled Zstandard decoder allows, as a power of 2; larger ones need
# `zstandard`.
BUNDLED_WINDOW_LOG = 27


def stable_hash(key: str) -> int:
    """Returns 64 bits that are the same on every machine."""
    return int.from_bytes(
        hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )


def find_files(path: str) -> list[tuple[str, pathlib.Path]]:
    """Returns (name, file) of everything that a file, folder or glob names, in the order of the
    names' hashes.

    Raises:
      UserError: nothing matches, a name that no file system takes, or an address.
    """
    if is_address(path):
        raise UserError(
            "path", path, "is an address: sources are read from local or mounted files."
        )
    try:
        root, named = _match(path)
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        said = error.strerror if isinstance(error, OSError) else error
        raise UserError("path", path, f"cannot be read: {said}.") from error
    if not named:
        raise UserError("path", path, "matches no file.")
    if named == [root]:
        return [(root.name, root)]
    pairs = [(file.relative_to(root).as_posix(), file) for file in named]
    return sorted(pairs, key=lambda pair: (stable_hash(pair[0]), pair[0]))


def _match(path: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """Returns the folder that names are relative to, and the files; of a single file, that file
    twice.
    """
    root = pathlib.Path(path)
    if root.is_file():
        return root, [root]
    if root.is_dir():
        found = [
            file
            for file in root.rglob("*")
            if not any(p.startswith(".") for p in file.relative_to(root).parts)
        ]
    else:
        found = [pathlib.Path(name) for name in glob.glob(path, recursive=True)]
        while glob.has_magic(str(root)):
            root = root.parent
    return root, [file for file in found if file.is_file()]


@contextlib.contextmanager
def opened(
    path: pathlib.Path, zstd_window_log: int = BUNDLED_WINDOW_LOG
) -> Iterator[io.BufferedReader]:
    """Opens a plain, gzip or Zstandard file by its name's end, behind its byte order mark where it
    has one.

    Args:
      path: of the file.
      zstd_window_log: the largest window of a Zstandard frame that is decoded, as a power of 2.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with _binary(path, zstd_window_log) as file:
            if file.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
                file.read(len(codecs.BOM_UTF8))
            yield file
    except (OSError, EOFError, zlib.error) as error:
        if "requires too much memory" in str(error):  # so libzstd says it
            raise UserError(
                f"{path} has a Zstandard frame whose window is above 2^{zstd_window_log} bytes:"
                f" zstd_window_log = {zstd_window_log} must be higher, at most 31, to read it."
            ) from error
        raise UserError(f"{path} cannot be read: {error}.") from error


def _binary(path: pathlib.Path, zstd_window_log: int) -> io.BufferedReader:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"), CHUNK_BYTES)
    if path.suffix == ".zst" and zstd_window_log > BUNDLED_WINDOW_LOG:
        return io.BufferedReader(_WideZstandard(path, zstd_window_log), CHUNK_BYTES)
    if path.suffix == ".zst":
        # heavy, and only for such files; unlike `zstandard` it notices a file that was cut short
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), CHUNK_BYTES)
    return path.open("rb")


class _WideZstandard(io.RawIOBase):
    """Zstandard frames with windows that the bundled decoder refuses; a file that was cut short is
    an OSError.
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
        self._fresh, self._data = (
            True,
            b"",
        )  # whether the frame has had no byte yet; what is decoded and not yet read

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
        """Decodes the next piece of the file; returns False at its end."""
        # Small pieces: one may decode to a thousand times its size.
        piece = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame, self._fresh = self._decompressor.decompressobj(), True
        piece = piece or self._file.read(2**12)
        if not piece:
            if not self._fresh:
                raise OSError("Truncated Zstandard stream")
            return False
        self._fresh = False
        self._data = self._frame.decompress(piece)
        return True

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def lines(file: io.BufferedReader, limit: int) -> Iterator[bytes | None]:
    """Yields the lines of a file with their ends; None for a line of more than `limit` bytes, which
    is not kept.
    """
    line = file.readline(limit + 1)
    while line:
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
        else:
            while line and not line.endswith(b"\n"):
                line = file.readline(CHUNK_BYTES)
            yield None
        line = file.readline(limit + 1)


def parts(
    file: io.BufferedReader, separator: bytes, limit: int
) -> Iterator[tuple[int, bytes | None]]:
    """Yields (number of its first line, bytes) of what stands between separators.

    The bytes are None where they are more than `limit`; these are not kept.

    Args:
      file: is read to its end.
      separator: empty: the whole file is one part.
      limit: bytes of a part.
    """
    line, held, too_long, searched = 1, bytearray(), False, 0
    newlines = 0  # of the bytes of this part that were let go of
    for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
        held += chunk
        # `held[start:end]` is the next part; before `searched` there is no separator.
        start, end = 0, held.find(separator, searched) if separator else -1
        while end >= 0:
            part = bytes(held[start:end])
            yield line, None if too_long or len(part) > limit else part
            start = end + len(separator)
            line += newlines + part.count(b"\n") + separator.count(b"\n")
            newlines, too_long = 0, False
            end = held.find(separator, start)
        del held[:start]
        # Only what may be the beginning of a separator has to be searched again.
        searched = max(0, len(held) - len(separator) + 1) if separator else len(held)
        if searched > limit:
            newlines += held.count(b"\n", 0, searched)
            del held[:searched]
            too_long, searched = True, 0
    yield line, None if too_long or len(held) > limit else bytes(held)
