"""Streams of documents from a source: the embedded corpus, text files, JSONL, lines of pairs,
Parquet, TFDS.

Whether a document is held out depends on a hash of its name (a file) or of its text (a record)
alone: never on the order of reading, the number of documents, the machine or the version of Python.
"""

from collections.abc import Iterator
from typing import Literal

from research.core.errors import UserError
from research.data.source_config import SourceConfig
from research.data.source_files import stable_hash
from research.data.source_readers import READERS, Document, SourceReport

__all__ = [
    "Document",
    "SourceConfig",
    "SourceReport",
    "Split",
    "documents",
    "is_heldout",
    "split_documents",
]

Split = Literal["train", "heldout"]


def is_heldout(key: str, fraction: float) -> bool:
    """Returns whether the document with this key is held out: blake2b(key) / 2⁶⁴ < fraction."""
    return stable_hash(key) < fraction * 2**64


def documents(
    config: SourceConfig, split: Split, report: SourceReport | None = None
) -> Iterator[Document]:
    """Yields the documents of one split, always in the same order: files by the hashes of their
    names, examples of TFDS by their index.

    Args:
      config: the source.
      split: `train` or `heldout`.
      report: receives the counts of documents (of both splits) and of bad records.

    Raises:
      UserError: no such file, no text, or too many bad records (the first is named).
    """
    report = SourceReport() if report is None else report
    in_splits = split_documents(config, report)
    return (document for its_split, document in in_splits if its_split == split)


def split_documents(config: SourceConfig, report: SourceReport) -> Iterator[tuple[Split, Document]]:
    """Yields the documents of both splits in one pass, each with its split; arguments and errors as
    `documents`.
    """
    read = READERS[config.kind]
    # Checked while reading, so that files of another format fail early, and again at the end.
    for key, document in read(config, report):
        report.documents += 1
        heldout = is_heldout(key, config.heldout_fraction)
        yield "heldout" if heldout else "train", document
        report.check(config.max_bad_fraction, at_end=False)

    report.check(config.max_bad_fraction, at_end=True)
    if report.documents == 0:
        raise UserError("path", config.path, "holds no text.")
