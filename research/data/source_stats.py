"""What changes with a source of text, and how much of it there is, without reading it."""

from research.data import needle, stdlib
from research.data.source_config import EMBEDDED, SourceConfig
from research.data.source_files import find_files


def fingerprint(config: SourceConfig) -> list[list[str | int]]:
    """Returns [name, size, modification time] of every file: a key that changes with the source."""
    if config.kind == "needle":
        # It has no files: the first text changes with how they are made.
        [text] = needle.documents(1, config.length)
        return [[text, len(text), 0]]
    embedded = config.kind in EMBEDDED
    found = stdlib.files().items() if embedded else find_files(config.path)
    files = sorted(found)
    if config.pair_path:
        files += sorted(find_files(config.pair_path))

    stats = []
    for name, path in files:
        stat = path.stat()
        stats.append([name, stat.st_size, stat.st_mtime_ns])
    return stats


def size_bytes(config: SourceConfig) -> int | None:
    """Returns the approximate bytes of text in a source; None where one would have to read it."""
    if config.kind not in ("stdlib", "text"):
        return None
    # The size of a compressed file does not say how much text it holds.
    size = 0
    for name, file_size, _ in fingerprint(config):
        if str(name).endswith((".gz", ".zst")):
            return None
        size += int(file_size)
    return size
