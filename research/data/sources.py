"""Where documents come from: the embedded corpus, text files, lines of JSON or of pairs, Parquet, TFDS, as one stream.

Whether a document is held out depends on a hash of its name (a file) or of its text (a record) alone: never on the
order of reading, the number of documents, the machine or the version of Python.
"""

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import io
import itertools
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Literal

from research.core.errors import UserError
from research.data import stdlib

Split = Literal["train", "heldout"]
# Below this many records the share of bad ones is judged only at the end of the source.
EARLY_JUDGEMENT = 1000


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of text.

    Attributes:
      kind: `stdlib` (text that every Python carries), `text` (a document a file), `jsonl` (plain, .gz or .zst),
        `lines` (a pair of texts a line, in two files), `parquet`, or `tfds` (a prepared dataset, or text files that are
        prepared as one).
      path: file, folder (searched recursively) or glob pattern; not used by `stdlib`.
      field: the field of a JSON object, the column of a Parquet file or the feature of a TFDS example with the text.
      pair_field: the field of a JSON object with the text from which the one in `field` is made: a pair of texts for
        `data.objective.kind = "translate"`; empty: documents are single texts.
      pair_path: of `lines`, as many files whose lines are what those of `path` are made from, in the order of names.
      separator: where to cut a text file into several documents; empty: one document a file.
      tfds_split: the TFDS split that is read.
      weight: share of this source in the training mixture, relative to the other weights; above 0.
      heldout_fraction: share of the documents kept for evaluation, in [0, 1]. 1 makes the source evaluation only.
      max_bad_fraction: share of unreadable records, in [0, 1], above which the source fails.
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

    def __post_init__(self):
        if (self.kind == "stdlib") != (self.path == ""):
            need = "must be empty" if self.kind == "stdlib" else "must name a file, folder or glob"
            raise UserError(f"path = {self.path!r} {need} for kind = {self.kind!r}.")
        if not self.field:
            raise UserError("field = '' must name the field that holds the text.")
        if self.pair_field and self.kind != "jsonl":
            raise UserError(f"pair_field = {self.pair_field!r} must be empty for kind = {self.kind!r}.")
        if bool(self.pair_path) != (self.kind == "lines"):
            need = "be empty" if self.pair_path else "name the other files"
            raise UserError(f"pair_path = {self.pair_path!r} must {need} for kind = {self.kind!r}.")
        if not 0 < self.weight < float("inf"):
            raise UserError(f"weight = {self.weight} must be above 0 and finite.")
        for name in ("heldout_fraction", "max_bad_fraction"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"{name} = {value} must lie in [0, 1].")


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
                f"{self.first_bad} ({self.bad} of {seen} records are bad, above max_bad_fraction = {max_bad_fraction})."
            )


def is_heldout(key: str, fraction: float) -> bool:
    """Returns whether the document with this key is held out: blake2b(key) / 2⁶⁴ < fraction."""
    return stable_hash(key) < fraction * 2**64


def stable_hash(key: str) -> int:
    """Returns 64 bits that are the same on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def documents(config: SourceConfig, split: Split, report: SourceReport | None = None) -> Iterator[Document]:
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
    """Yields the documents of both splits in one pass, each with its split; arguments and errors as `documents`."""
    for key, document in _READERS[config.kind](config, report):
        report.documents += 1
        yield "heldout" if is_heldout(key, config.heldout_fraction) else "train", document
        report.judge(config.max_bad_fraction, at_end=False)
    report.judge(config.max_bad_fraction, at_end=True)
    if report.documents == 0:
        raise UserError(f"path = {config.path!r} holds no text.")


def fingerprint(config: SourceConfig) -> list[list[str | int]]:
    """Returns what tells a changed source from an unchanged one: name, size and time of every file."""
    files = sorted(stdlib.files().items()) if config.kind == "stdlib" else sorted(find_files(config.path))
    files += sorted(find_files(config.pair_path)) if config.pair_path else []
    return [[name, path.stat().st_size, path.stat().st_mtime_ns] for name, path in files]


def size_bytes(config: SourceConfig) -> int | None:
    """Returns about how many bytes of text a source holds, or None where only reading it would tell."""
    files = fingerprint(config)
    packed = any(str(name).endswith((".gz", ".zst")) for name, _, _ in files)
    return None if packed or config.kind not in ("stdlib", "text") else sum(int(size) for _, size, _ in files)


def find_files(path: str) -> list[tuple[str, pathlib.Path]]:
    """Returns (name, file) of everything that a file, folder or glob names, in the order of the names' hashes.

    Raises:
      UserError: nothing matches.
    """
    root = pathlib.Path(path)
    if root.is_file():
        return [(root.name, root)]
    if root.is_dir():
        found = [file for file in root.rglob("*") if not any(p.startswith(".") for p in file.relative_to(root).parts)]
    else:
        found = [pathlib.Path(name) for name in glob.glob(path, recursive=True)]
        while glob.has_magic(str(root)):
            root = root.parent
    named = [(file.relative_to(root).as_posix(), file) for file in found if file.is_file()]
    if not named:
        raise UserError(f"path = {path!r} matches no file.")
    return sorted(named, key=lambda pair: (stable_hash(pair[0]), pair[0]))


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[io.BufferedIOBase]:
    """Opens a plain, gzip or Zstandard file by its name's end; raises a UserError where it cannot be read."""
    try:
        with _binary(path) as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _binary(path: pathlib.Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow  # heavy, and only for such files; unlike `zstandard` it notices a file that was cut short

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 20)
    return path.open("rb")


Keyed = tuple[str, Document]


def _read_stdlib(config: SourceConfig, report: SourceReport) -> Iterator[Keyed]:
    for name, key, text in stdlib.texts(report.skip):
        yield key, Document(name, text)


def _read_text(config: SourceConfig, report: SourceReport) -> Iterator[Keyed]:
    for name, path in find_files(config.path):
        with opened(path) as file:
            data = file.read()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            report.skip(f"{path}:{line}", f"bad UTF-8 at byte {error.start}")
            continue
        if not config.separator:
            if text:
                yield name, Document(name, text)
            continue
        for index, part in enumerate(text.split(config.separator)):
            if part:
                yield part, Document(f"{name}:{index}", part)


def _read_jsonl(config: SourceConfig, report: SourceReport) -> Iterator[Keyed]:
    fields = (config.field, config.pair_field) if config.pair_field else (config.field,)
    for name, path in find_files(config.path):
        with opened(path) as file:
            for number, line in enumerate(file, start=1):
                texts = _json_texts(line, fields, report, f"{path}:{number}") if line.strip() else None
                if texts and all(texts):
                    yield "\n".join(texts), Document(f"{name}:{number}", *texts)


def _read_lines(config: SourceConfig, report: SourceReport) -> Iterator[Keyed]:
    found, beside = find_files(config.path), find_files(config.pair_path)
    if len(found) != len(beside):
        raise UserError(f"pair_path = {config.pair_path!r} matches {len(beside)} files, path {len(found)}: not pairs.")
    other = dict(zip(sorted(found), sorted(beside), strict=True))
    for name, path in found:
        other_path = other[name, path][1]
        with opened(path) as file, opened(other_path) as other_file:
            for number, lines in enumerate(itertools.zip_longest(file, other_file), start=1):
                if None in lines:
                    short, long = (path, other_path) if lines[0] is None else (other_path, path)
                    raise UserError(f"{short} has {number - 1} lines and {long} has more: they must be pairs of lines.")
                try:
                    texts = [line.decode("utf-8").rstrip("\r\n") for line in lines]
                except UnicodeDecodeError as error:
                    report.skip(f"{path}:{number}", f"bad UTF-8 at byte {error.start}, here or in {other_path.name}")
                    continue
                if all(texts):
                    yield "\n".join(texts), Document(f"{name}:{number}", *texts)


def _json_texts(line: bytes, fields: tuple[str, ...], report: SourceReport, where: str) -> list[str] | None:
    """Returns the texts of one JSON line, or None where the line is bad."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return report.skip(where, f"bad UTF-8 at byte {error.start}")
    except (json.JSONDecodeError, RecursionError) as error:
        return report.skip(where, f"broken JSON: {error}")
    texts = []
    for field in fields:
        if not isinstance(record, dict) or field not in record:
            return report.skip(where, f"no field {field!r}")
        texts.append(_checked(record[field], field, report, where))
    return None if None in texts else texts


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
                    raise UserError(f"field = {config.field!r} is not a column of {path}. Columns: {known}.")
                number = 0
                for batch in file.iter_batches(batch_size=1024, columns=[config.field]):
                    for value in batch.column(0):
                        number += 1
                        text = _checked(_arrow_text(value), config.field, report, f"{path}:{number}")
                        if text:
                            yield text, Document(f"{name}:{number}", text)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}.") from error


def _arrow_text(value: object) -> object:
    """Returns the value of an Arrow scalar, None where its bytes are not UTF-8."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return None


def _read_tfds(config: SourceConfig, report: SourceReport) -> Iterator[Keyed]:
    from research.data import tfds_text  # TFDS takes long to import

    files = dict(find_files(config.path))
    for name, value in tfds_text.texts(config.path, config.tfds_split, config.field, files):
        where = f"{config.path}[{name}]"
        try:
            text = _checked(value.decode("utf-8") if isinstance(value, bytes) else value, config.field, report, where)
        except UnicodeDecodeError as error:
            text = report.skip(where, f"bad UTF-8 at byte {error.start}")
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
