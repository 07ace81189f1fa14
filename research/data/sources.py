"""Where documents come from: the embedded corpus, text files, lines of JSON or of pairs, Parquet,
TFDS, as one stream.

Whether a document is held out depends on a hash of its name (a file) or of its text (a record)
alone: never on the order of reading, the number of documents, the machine or the version of Python.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

from research.core.errors import UserError
from research.data import source_files, stdlib
from research.data.source_files import find_files, opened, stable_hash

Split = Literal["train", "heldout"]
# Below this many records the share of bad ones is judged only at the end of the source.
EARLY_JUDGEMENT = 1000


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of text.

    Attributes:
      kind: `stdlib` (text that every Python carries), `text` (a document a file), `jsonl` (plain,
        .gz or .zst), `lines` (a pair of texts a line, in two files), `parquet`, or `tfds` (a
        prepared dataset, or text files that are prepared as one).
      path: file, folder (searched recursively) or glob pattern; not used by `stdlib`.
      field: the field of a JSON object, the column of a Parquet file or the feature of a TFDS
          example with the text.
      pair_field: the field of a JSON object with the text from which the one in `field` is made: a
        pair of texts for `data.objective.kind = "translate"`; empty: documents are single texts.
      pair_path: of `lines`, as many files whose lines are what those of `path` are made from, in
          the order of names.
      separator: where to cut a text file into several documents; empty: one document a file.
      tfds_split: the TFDS split that is read.
      weight: share of this source in the training mixture, relative to the other weights; above 0.
      heldout_fraction: share of the documents kept for evaluation, in [0, 1]. 1 makes the source
          evaluation only.
      max_bad_fraction: share of unreadable records, in [0, 1], above which the source fails.
      max_record_bytes: bytes of a record (a file of text, a part between separators, a line, a
        value), at least 1; a longer one counts as unreadable and is never held in memory, however
        well it was compressed.
      zstd_window_log: the largest window of a Zstandard frame, as a power of 2 in [10, 31]; reading
        takes that much memory. Above 27 it needs the package `zstandard`.
    """

    kind: Literal["stdlib", "text", "jsonl", "lines", "parquet", "tfds"] = "stdlib"
    path: str = ""
    field: str = "text"
    pair_field: str = ""
    pair_path: str = ""
    separator: str = ""
    tfds_split: str = "train"
    weight: float = 1.0
    heldout_fraction: float = 0.05
    max_bad_fraction: float = 0.01
    max_record_bytes: int = 2**28
    zstd_window_log: int = source_files.BUNDLED_WINDOW_LOG

    def __post_init__(self):
        if (self.kind == "stdlib") != (self.path == ""):
            need = "must be empty" if self.kind == "stdlib" else "must name a file, folder or glob"
            raise UserError("path", self.path, f"{need} for kind = {self.kind!r}.")
        if not self.field:
            raise UserError("field", "", "must name the field that holds the text.")
        if self.pair_field and self.kind != "jsonl":
            raise UserError(
                "pair_field", self.pair_field, f"must be empty for kind = {self.kind!r}."
            )
        if bool(self.pair_path) != (self.kind == "lines"):
            need = "be empty" if self.pair_path else "name the other files"
            raise UserError("pair_path", self.pair_path, f"must {need} for kind = {self.kind!r}.")
        if not 0 < self.weight < float("inf"):
            raise UserError("weight", self.weight, "must be above 0 and finite.")
        for name in ("heldout_fraction", "max_bad_fraction"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(name, value, "must lie in [0, 1].")
        if self.max_record_bytes < 1:
            raise UserError("max_record_bytes", self.max_record_bytes, "must be at least 1.")
        if not 10 <= self.zstd_window_log <= 31:
            raise UserError("zstd_window_log", self.zstd_window_log, "must lie in [10, 31].")


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and the name by which messages and the split know it.

    Attributes:
      name: file, or file and line.
      text: what it says.
      source: of a pair, what the text is made from; None: it is no pair.
    """

    name: str
    text: str
    source: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The source, where there is one, and the text."""
        return (self.text,) if self.source is None else (self.source, self.text)


@dataclasses.dataclass
class SourceReport:
    """What reading a source met. Bad records belong to no split, so each pass counts them."""

    documents: int = 0
    bad: int = 0
    first_bad: str = ""

    def skip(self, where: str, why: str) -> None:
        """Counts a record that cannot be read."""
        self.bad += 1
        if not self.first_bad:
            self.first_bad = f"{where}: {why}"

    def judge(self, max_bad_fraction: float, at_end: bool) -> None:
        """Raises a UserError where too many of the records so far are bad."""
        seen = self.documents + self.bad
        if self.bad > max_bad_fraction * seen and (at_end or seen >= EARLY_JUDGEMENT):
            raise UserError(
                f"{self.first_bad} ({self.bad} of {seen} records are bad, above max_bad_fraction "
                f"= {max_bad_fraction})."
            )


def is_heldout(key: str, fraction: float) -> bool:
    """Returns whether the document with this key is held out: blake2b(key) / 2⁶⁴ < fraction."""
    return stable_hash(key) < fraction * 2**64


def documents(
    config: SourceConfig, split: Split, report: SourceReport | None = None
) -> Iterator[Document]:
    """Yields the documents of one split, always in the same order, which no name or date decides.

    Args:
      config: the source.
      split: `train` or `heldout`.
      report: receives the counts of documents (of both splits) and of bad records.

    Raises:
      UserError: nothing there, nothing in it, or too many bad records (the first is named).
    """
    report = SourceReport() if report is None else report
    return (document for side, document in split_documents(config, report) if side == split)


def split_documents(config: SourceConfig, report: SourceReport) -> Iterator[tuple[Split, Document]]:
    """Yields the documents of both splits in one pass, each with its split; arguments and errors as
    `documents`.
    """
    for key, document in _READERS[config.kind](config, report):
        report.documents += 1
        yield "heldout" if is_heldout(key, config.heldout_fraction) else "train", document
        report.judge(config.max_bad_fraction, at_end=False)
    report.judge(config.max_bad_fraction, at_end=True)
    if report.documents == 0:
        raise UserError("path", config.path, "holds no text.")


def fingerprint(config: SourceConfig) -> list[list[str | int]]:
    """Returns what tells a changed source from an unchanged one: name, size and time of every
    file.
    """
    files = (
        sorted(stdlib.files().items())
        if config.kind == "stdlib"
        else sorted(find_files(config.path))
    )
    files += sorted(find_files(config.pair_path)) if config.pair_path else []
    return [[name, path.stat().st_size, path.stat().st_mtime_ns] for name, path in files]


def size_bytes(config: SourceConfig) -> int | None:
    """Returns about how many bytes of text a source holds, or None where only reading it would
    tell.
    """
    files = fingerprint(config)
    packed = any(str(name).endswith((".gz", ".zst")) for name, _, _ in files)
    return (
        None
        if packed or config.kind not in ("stdlib", "text")
        else sum(int(size) for _, size, _ in files)
    )


Keyed = tuple[str, Document]


def _read_stdlib(config: SourceConfig, report: SourceReport) -> Iterator[Keyed]:
    for name, key, text in stdlib.texts(report.skip):
        yield key, Document(name, text)


def _read_text(config: SourceConfig, report: SourceReport) -> Iterator[Keyed]:
    separator = config.separator.encode()
    for name, path in find_files(config.path):
        with opened(path, config.zstd_window_log) as file:
            parts = source_files.parts(file, separator, config.max_record_bytes)
            for index, (line, data) in enumerate(parts):
                text = _decoded(data, config, report, path, line)
                if text and separator:
                    yield text, Document(f"{name}:{index}", text)
                elif text:
                    yield name, Document(name, text)


def _decoded(
    data: bytes | None,
    config: SourceConfig,
    report: SourceReport,
    path: object,
    line: int,
    also: str = "",
) -> str | None:
    """Returns a record as text, or None where it is bad: its line is then counted.

    Args:
      data: its bytes, None where they were too many.
      config: the source.
      report: where bad records are counted.
      path: of the file.
      line: the number of the record's first line.
      also: what to say after a fault.
    """
    if data is None:
        return report.skip(
            f"{path}:{line}", f"longer than max_record_bytes = {config.max_record_bytes}{also}"
        )
    try:
        # Files with byte order marks may have been joined; no record itself begins with one.
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        return report.skip(f"{path}:{line}", f"bad UTF-8 at byte {error.start}{also}")


def _read_jsonl(config: SourceConfig, report: SourceReport) -> Iterator[Keyed]:
    fields = (config.field, config.pair_field) if config.pair_field else (config.field,)
    for name, path in find_files(config.path):
        with opened(path, config.zstd_window_log) as file:
            for number, data in enumerate(
                source_files.lines(file, config.max_record_bytes), start=1
            ):
                line = _decoded(data, config, report, path, number)
                line = None if line is None else line.strip()
                texts = _json_texts(line, fields, report, f"{path}:{number}") if line else None
                if texts and all(texts):
                    yield "\n".join(texts), Document(f"{name}:{number}", *texts)


def _read_lines(config: SourceConfig, report: SourceReport) -> Iterator[Keyed]:
    found, beside = find_files(config.path), find_files(config.pair_path)
    if len(found) != len(beside):
        raise UserError(
            "pair_path",
            config.pair_path,
            f"matches {len(beside)} files, path {len(found)}: not pairs.",
        )
    other = dict(zip(sorted(found), sorted(beside), strict=True))
    for name, path in found:
        other_path = other[name, path][1]
        for number, pair in enumerate(_line_pairs(config, path, other_path), start=1):
            also = f", here or in {other_path.name}"
            # A bad pair is one bad record, whether one of its lines is bad or both.
            texts = []
            for data in pair:
                text = _decoded(data, config, report, path, number, also)
                if text is None:
                    break
                texts.append(text.rstrip("\r\n"))
            if len(texts) == len(pair) and all(texts):
                yield "\n".join(texts), Document(f"{name}:{number}", *texts)


def _line_pairs(
    config: SourceConfig, path: pathlib.Path, other_path: pathlib.Path
) -> Iterator[tuple[bytes | None, bytes | None]]:
    """Yields the lines of two files side by side; raises a UserError where one has more of them."""
    end = object()
    with (
        opened(path, config.zstd_window_log) as file,
        opened(other_path, config.zstd_window_log) as other_file,
    ):
        both = [source_files.lines(each, config.max_record_bytes) for each in (file, other_file)]
        for number, pair in enumerate(itertools.zip_longest(*both, fillvalue=end)):
            if end in pair:
                short, long = (path, other_path) if pair[0] is end else (other_path, path)
                raise UserError(
                    f"{short} has {number} lines and {long} has more: they must be pairs of lines."
                )
            yield pair


def _json_texts(
    line: str, fields: tuple[str, ...], report: SourceReport, where: str
) -> list[str] | None:
    """Returns the texts of one JSON line, or None where the line is bad."""
    try:
        record = json.loads(line)
    except (
        ValueError,
        RecursionError,
    ) as error:  # broken, a number of too many digits, nested too deeply
        return report.skip(where, f"broken JSON: {error}")
    texts = []
    for field in fields:
        if not isinstance(record, dict) or field not in record:
            return report.skip(where, f"no field {field!r}")
        texts.append(_checked(record[field], field, report, where))
        if texts[-1] is None:
            return None
    return texts


def _checked(text: object, field: str, report: SourceReport, where: str) -> str | None:
    """Returns `text` if it is one that UTF-8 can hold (JSON may escape half a character)."""
    if not isinstance(text, str):
        return report.skip(where, f"field {field!r} is not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return report.skip(where, f"half a surrogate pair at character {error.start}")
    return text


def _read_parquet(config: SourceConfig, report: SourceReport) -> Iterator[Keyed]:
    import pyarrow  # heavy, and only for this kind
    from pyarrow import parquet

    for name, path in find_files(config.path):
        try:
            with parquet.ParquetFile(path) as file:
                if config.field not in file.schema_arrow.names:
                    known = ", ".join(file.schema_arrow.names)
                    raise UserError(
                        "field", config.field, f"is not a column of {path}. Columns: {known}."
                    )
                number = 0
                for batch in file.iter_batches(batch_size=1024, columns=[config.field]):
                    for value in batch.column(0):
                        number += 1
                        text = _arrow_text(value, config, report, f"{path}:{number}")
                        if text:
                            yield text, Document(f"{name}:{number}", text)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}.") from error


def _arrow_text(value: Any, config: SourceConfig, report: SourceReport, where: str) -> str | None:
    """Returns the text of an Arrow scalar, or None where it is bad."""
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return report.skip(where, f"bad UTF-8 at byte {error.start}")
    except (ValueError, ArithmeticError):  # a date that Python has no object for, say
        text = None
    return _bounded(text, config, report, where)


def _bounded(value: object, config: SourceConfig, report: SourceReport, where: str) -> str | None:
    """Returns a value of `field` as text, or None where it is bad: its text may stand in bytes."""
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    if isinstance(data, bytes) and len(data) > config.max_record_bytes:
        return report.skip(where, f"longer than max_record_bytes = {config.max_record_bytes}")
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            return report.skip(where, f"bad UTF-8 at byte {error.start}")
    return _checked(value, config.field, report, where)


def _read_tfds(config: SourceConfig, report: SourceReport) -> Iterator[Keyed]:
    from research.data import tfds_text  # TFDS takes long to import

    files = dict(find_files(config.path))
    for name, value in tfds_text.texts(config.path, config.tfds_split, config.field, files):
        text = _bounded(value, config, report, f"{config.path}[{name}]")
        if text:
            yield text, Document(name, text)


_READERS: dict[str, Callable[[SourceConfig, SourceReport], Iterator[Keyed]]] = {
    "stdlib": _read_stdlib,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "lines": _read_lines,
    "parquet": _read_parquet,
    "tfds": _read_tfds,
}
