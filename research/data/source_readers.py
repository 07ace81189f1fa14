"""Documents from the files of each kind of source: text, lines of JSON or of pairs, Parquet, TFDS,
the embedded corpus.

A record that cannot be read is counted in the source's report and skipped.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from research.core.errors import UserError
from research.data import needle, source_files, stdlib
from research.data.source_config import SourceConfig
from research.data.source_files import find_files, opened

# Below this many records the share of bad ones is checked only at the end of the source.
MIN_RECORDS_FOR_EARLY_CHECK = 1000


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, or a pair of texts, and its name in messages.

    Attributes:
      name: file, or file and line.
      text: the text; of a pair, the second one.
      source: the first text of a pair, from which `text` is made; None: not a pair.
    """

    name: str
    text: str
    source: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The source, where there is one, and the text."""
        return (self.text,) if self.source is None else (self.source, self.text)


# The key of the split, whose hash decides whether a document is held out, and the document.
Keyed = tuple[str, Document]


@dataclasses.dataclass
class SourceReport:
    """Counts of the documents and the bad records of a source.

    Bad records belong to no split, so each pass counts all of them.
    """

    documents: int = 0
    bad: int = 0
    first_bad: str = ""

    def skip(self, where: str, why: str) -> None:
        """Counts a record that cannot be read."""
        self.bad += 1
        if not self.first_bad:
            self.first_bad = f"{where}: {why}"

    def check(self, max_bad_fraction: float, at_end: bool) -> None:
        """Raises a UserError where too many of the records so far are bad."""
        seen = self.documents + self.bad
        if not at_end and seen < MIN_RECORDS_FOR_EARLY_CHECK:
            return
        if self.bad > max_bad_fraction * seen:
            raise UserError(
                f"{self.first_bad} ({self.bad} of {seen} records are bad, above max_bad_fraction "
                f"= {max_bad_fraction})."
            )


def _read_stdlib(config: SourceConfig, report: SourceReport) -> Iterator[Keyed]:
    for name, key, text in stdlib.texts(report.skip):
        yield key, Document(name, text)


def _read_needle(config: SourceConfig, report: SourceReport) -> Iterator[Keyed]:
    texts = needle.documents(config.documents, config.length)
    for index, text in enumerate(texts):
        yield text, Document(f"needle:{index}", text)


def _read_text(config: SourceConfig, report: SourceReport) -> Iterator[Keyed]:
    separator = config.separator.encode()
    for name, path in find_files(config.path):
        with opened(path, config.zstd_window_log) as file:
            parts = source_files.parts(file, separator, config.max_record_bytes)
            for index, (line, data) in enumerate(parts):
                text = _decoded(data, config, report, path, line)
                if not text:
                    continue
                # A part of a file is split by its text, a whole file by its name.
                if separator:
                    yield text, Document(f"{name}:{index}", text)
                else:
                    yield name, Document(name, text)


def _decoded(
    data: bytes | None,
    config: SourceConfig,
    report: SourceReport,
    path: object,
    line: int,
    addition: str = "",
) -> str | None:
    """Returns a record as text, or None where it is bad; the report then counts it.

    Args:
      data: its bytes, None where they were too many.
      config: the source.
      report: where bad records are counted.
      path: of the file.
      line: the number of the record's first line.
      addition: appended to the reason why a record is bad.
    """
    if data is None:
        limit = f"max_record_bytes = {config.max_record_bytes}"
        report.skip(f"{path}:{line}", f"longer than {limit}{addition}")
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        report.skip(f"{path}:{line}", f"bad UTF-8 at byte {error.start}{addition}")
        return None
    # Files with byte order marks may have been joined; no record itself begins with one.
    return text.removeprefix("\ufeff")


def _read_jsonl(config: SourceConfig, report: SourceReport) -> Iterator[Keyed]:
    fields = [config.field]
    if config.pair_field:
        fields.append(config.pair_field)

    for name, path in find_files(config.path):
        with opened(path, config.zstd_window_log) as file:
            lines = source_files.lines(file, config.max_record_bytes)
            for number, data in enumerate(lines, start=1):
                line = _decoded(data, config, report, path, number)
                if line is None or not line.strip():
                    continue
                texts = _json_texts(line.strip(), fields, report, f"{path}:{number}")
                if texts and all(texts):
                    yield "\n".join(texts), Document(f"{name}:{number}", *texts)


def _json_texts(line: str, fields: list[str], report: SourceReport, where: str) -> list[str] | None:
    """Returns the texts of one JSON line, or None where the line is bad."""
    try:
        record = json.loads(line)
    # Not JSON, a number of too many digits, or nested too deeply.
    except (ValueError, RecursionError) as error:
        report.skip(where, f"broken JSON: {error}")
        return None

    texts = []
    for field in fields:
        if not isinstance(record, dict) or field not in record:
            report.skip(where, f"no field {field!r}")
            return None
        text = _checked(record[field], field, report, where)
        if text is None:
            return None
        texts.append(text)
    return texts


def _checked(text: object, field: str, report: SourceReport, where: str) -> str | None:
    """Returns `text` if it is one that UTF-8 can hold (JSON may escape half a character)."""
    if not isinstance(text, str):
        report.skip(where, f"field {field!r} is not a string")
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        report.skip(where, f"half a surrogate pair at character {error.start}")
        return None
    return text


def _read_lines(config: SourceConfig, report: SourceReport) -> Iterator[Keyed]:
    found = find_files(config.path)
    found_sources = find_files(config.pair_path)
    if len(found) != len(found_sources):
        raise UserError(
            "pair_path",
            config.pair_path,
            f"matches {len(found_sources)} files, path {len(found)}: not pairs.",
        )

    # Files are matched in the order of their names, and read in the order of `found`.
    source_of = dict(zip(sorted(found), sorted(found_sources), strict=True))
    for name, path in found:
        _, source_path = source_of[name, path]
        for number, pair in enumerate(_line_pairs(config, path, source_path), start=1):
            addition = f", here or in {source_path.name}"
            texts = _pair_texts(pair, config, report, path, number, addition)
            if all(texts):
                yield "\n".join(texts), Document(f"{name}:{number}", *texts)


def _pair_texts(
    pair: tuple[bytes | None, bytes | None],
    config: SourceConfig,
    report: SourceReport,
    path: pathlib.Path,
    number: int,
    addition: str,
) -> tuple[str, str]:
    """Returns the texts of a pair of lines, empty ones where it is bad."""
    texts = []
    for data in pair:
        text = _decoded(data, config, report, path, number, addition)
        # A bad pair is one bad record, whether one of its lines is bad or both.
        if text is None:
            return "", ""
        texts.append(text.rstrip("\r\n"))
    return texts[0], texts[1]


def _line_pairs(
    config: SourceConfig, path: pathlib.Path, source_path: pathlib.Path
) -> Iterator[tuple[bytes | None, bytes | None]]:
    """Yields the lines of two files side by side; raises a UserError where one has more of them."""
    end = object()
    with (
        opened(path, config.zstd_window_log) as file,
        opened(source_path, config.zstd_window_log) as source_file,
    ):
        lines = source_files.lines(file, config.max_record_bytes)
        source_lines = source_files.lines(source_file, config.max_record_bytes)
        pairs = itertools.zip_longest(lines, source_lines, fillvalue=end)
        for number, pair in enumerate(pairs):
            if end in pair:
                is_first = pair[0] is end
                short = path if is_first else source_path
                long = source_path if is_first else path
                raise UserError(
                    f"{short} has {number} lines and {long} has more: they must be pairs of lines."
                )
            yield pair


def _read_parquet(config: SourceConfig, report: SourceReport) -> Iterator[Keyed]:
    import pyarrow  # slow to import, and only this kind needs it

    for name, path in find_files(config.path):
        try:
            for number, value in enumerate(_parquet_values(config, path), start=1):
                text = _arrow_text(value, config, report, f"{path}:{number}")
                if text:
                    yield text, Document(f"{name}:{number}", text)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}.") from error


def _parquet_values(config: SourceConfig, path: pathlib.Path) -> Iterator[Any]:
    """Yields the Arrow scalars of the column `field` of a Parquet file."""
    from pyarrow import parquet  # slow to import, and only this kind needs it

    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if config.field not in names:
            known = ", ".join(names)
            raise UserError("field", config.field, f"is not a column of {path}. Columns: {known}.")
        for batch in file.iter_batches(batch_size=1024, columns=[config.field]):
            yield from batch.column(0)


def _arrow_text(value: Any, config: SourceConfig, report: SourceReport, where: str) -> str | None:
    """Returns the text of an Arrow scalar, or None where it is bad."""
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        report.skip(where, f"bad UTF-8 at byte {error.start}")
        return None
    except (ValueError, ArithmeticError):  # a date that Python has no object for, say
        text = None
    return _bounded(text, config, report, where)


def _bounded(value: object, config: SourceConfig, report: SourceReport, where: str) -> str | None:
    """Returns a value of `field`, text or its UTF-8 bytes, as text, or None where it is bad."""
    data = value
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
    if isinstance(data, bytes) and len(data) > config.max_record_bytes:
        report.skip(where, f"longer than max_record_bytes = {config.max_record_bytes}")
        return None

    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            report.skip(where, f"bad UTF-8 at byte {error.start}")
            return None
    return _checked(value, config.field, report, where)


def _read_tfds(config: SourceConfig, report: SourceReport) -> Iterator[Keyed]:
    from research.data import tfds_text  # TFDS takes long to import

    files = dict(find_files(config.path))
    examples = tfds_text.texts(config.path, config.tfds_split, config.field, files)
    for name, value in examples:
        text = _bounded(value, config, report, f"{config.path}[{name}]")
        if text:
            yield text, Document(name, text)


READERS: dict[str, Callable[[SourceConfig, SourceReport], Iterator[Keyed]]] = {
    "stdlib": _read_stdlib,
    "needle": _read_needle,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "lines": _read_lines,
    "parquet": _read_parquet,
    "tfds": _read_tfds,
}
