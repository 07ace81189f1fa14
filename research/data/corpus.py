"""Tokenized documents on disk: one memory-mapped array of ids, and where each document begins.

A corpus folder holds `tokens.bin` (uint16 or uint32, the framed documents one after the other), `offsets.npy`,
`bytes.npy` and `corpus.json`. It is written under another name and renamed when whole, so a build that is killed
leaves nothing that could be read. A pair of texts is two documents: what is read, then what is made from it.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int, Shaped, UInt

from research.core.config import plain
from research.core.errors import UserError
from research.core.progress import Progress
from research.data.sources import Document, SourceConfig, SourceReport, Split, fingerprint, size_bytes, split_documents
from research.data.tokenizers import Tokenizer

# Part of every cache key: raise it when the files, or what a source reads, change.
FORMAT = 1
ENCODE_BYTES = 1 << 21
SPLITS: tuple[Split, ...] = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of one split of one source, as ids. Cheap to copy to another process: it is opened by its folder.

    Attributes:
      folder: where it lies.
      tokens: ids of all documents, each framed by `Tokenizer.frame`.
      offsets: where each of the D documents begins in `tokens`, then the total.
      num_bytes: UTF-8 bytes of each document's text.
      pad_id: what fills the rest of a row: the tokenizer's PAD, or 0.
      digest: a hash of the tokens and of where the documents begin.
      report: what reading the source met.
    """

    folder: pathlib.Path
    tokens: UInt[np.ndarray, "_"] = dataclasses.field(repr=False)
    offsets: Int[np.ndarray, "_"] = dataclasses.field(repr=False)
    num_bytes: Int[np.ndarray, "_"] = dataclasses.field(repr=False)
    pad_id: int
    digest: str
    report: SourceReport

    def __reduce__(self) -> tuple[Any, ...]:
        return open_corpus, (self.folder,)

    @property
    def num_documents(self) -> int:
        """Number of documents, D."""
        return len(self.num_bytes)

    @property
    def num_targets(self) -> int:
        """Number of tokens that are predicted in one epoch: every token of a document but the first."""
        lengths = np.diff(self.offsets)
        return int(np.maximum(lengths - 1, 0).sum())

    @property
    def bytes_per_target(self) -> float:
        """UTF-8 bytes that one predicted token stands for: bits per byte = loss / ln 2 / this."""
        return int(self.num_bytes.sum()) / max(self.num_targets, 1)

    def document(self, index: int) -> Shaped[np.ndarray, "_"]:
        """Returns the framed ids of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def open_corpus(folder: str | pathlib.Path) -> Corpus:
    """Opens a corpus folder; raises a UserError where it is none or was cut short."""
    folder = pathlib.Path(folder)
    try:
        info = json.loads((folder / "corpus.json").read_text())
        offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        num_bytes = np.load(folder / "bytes.npy", mmap_mode="r")
        tokens = _map(folder / "tokens.bin", np.dtype(info["dtype"]))
        pad_id, digest, report = info["pad_id"], info["digest"], SourceReport(**info["report"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a tokenized corpus: {error}. Delete it to build it again.") from error
    if offsets[-1] != len(tokens) or len(num_bytes) != len(offsets) - 1:
        raise UserError(f"{folder} has lost part of its files. Delete it to build it again.")
    return Corpus(folder, tokens, offsets, num_bytes, pad_id, digest, report)


def _map(path: pathlib.Path, dtype: np.dtype) -> Shaped[np.ndarray, "_"]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")


def build_corpora(source: SourceConfig, tokenizer: Tokenizer, folder: str | pathlib.Path) -> dict[Split, Corpus]:
    """Tokenizes a source in one pass, or opens what an earlier build with the same inputs left.

    Args:
      source: where the text comes from.
      tokenizer: what encodes it.
      folder: the cache; each distinct (source, its files, tokenizer) gets a folder of its own inside.

    Returns:
      The corpus of each split; one without documents is still a corpus.

    Raises:
      UserError: a source that cannot be read, or a disk that is full.
    """
    name = f"{source.kind}-{_digest(source, tokenizer)[:16]}"
    final = pathlib.Path(folder) / name
    if not final.is_dir():
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            _build(source, tokenizer, final)
        except OSError as error:
            raise UserError(f"{final} cannot be written: {error.strerror}.") from error
    return {split: open_corpus(final / split) for split in SPLITS}


def _digest(source: SourceConfig, tokenizer: Tokenizer) -> str:
    """Hashes what decides the content. The weight does not: it is the mixture's affair."""
    content = plain(dataclasses.replace(source, weight=1.0))
    key = json.dumps([FORMAT, content, fingerprint(source), tokenizer.digest()], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()


def _build(source: SourceConfig, tokenizer: Tokenizer, final: pathlib.Path) -> None:
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        report = SourceReport()
        writers = {split: _Writer(temporary / split, tokenizer) for split in SPLITS}
        try:
            with Progress(f"tokenize {source.kind} {source.path}".strip(), size_bytes(source), "bytes") as progress:
                for batch in _batches(split_documents(source, report)):
                    texts = [(split, text) for split, document in batch for text in document.texts]
                    encoded = tokenizer.encode_batch([text for _, text in texts])
                    for (split, text), ids in zip(texts, encoded, strict=True):
                        progress.advance(writers[split].add(text, tokenizer.frame(ids)))
        finally:
            for writer in writers.values():
                writer.close()
        for writer in writers.values():
            writer.finish(report)
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _batches(pairs: Iterable[tuple[Split, Document]]) -> Iterator[list[tuple[Split, Document]]]:
    """Groups documents until they are worth a parallel encoding."""
    batch: list[tuple[Split, Document]] = []
    size = 0
    for pair in pairs:
        batch.append(pair)
        size += sum(map(len, pair[1].texts))
        if size >= ENCODE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Writer:
    """Appends documents to a corpus folder."""

    def __init__(self, folder: pathlib.Path, tokenizer: Tokenizer):
        folder.mkdir()
        self._folder, self._tokenizer = folder, tokenizer
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self._file: BinaryIO = (folder / "tokens.bin").open("wb")
        self._hash = hashlib.sha256()
        self._lengths: list[int] = []
        self._bytes: list[int] = []

    def add(self, text: str, ids: Int[np.ndarray, "_"]) -> int:
        """Writes one framed text and returns its bytes."""
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._lengths.append(len(ids))
        self._bytes.append(len(text.encode("utf-8")))
        return self._bytes[-1]

    def close(self) -> None:
        self._file.close()

    def finish(self, report: SourceReport) -> None:
        """Writes the tables and brings everything to the disk."""
        offsets = np.zeros(len(self._lengths) + 1, np.int64)
        np.cumsum(self._lengths, out=offsets[1:])
        np.save(self._folder / "offsets.npy", offsets)
        np.save(self._folder / "bytes.npy", np.array(self._bytes, np.int64))
        self._hash.update(offsets.astype("<i8").tobytes())
        pad = self._tokenizer.pad_id
        info = {
            "dtype": self._dtype.str,
            "pad_id": 0 if pad is None else pad,
            "digest": self._hash.hexdigest(),
            "tokenizer": self._tokenizer.digest(),
            "documents": len(self._lengths),
            "tokens": int(offsets[-1]),
            "bytes": sum(self._bytes),
            "report": dataclasses.asdict(report),
        }
        (self._folder / "corpus.json").write_text(json.dumps(info, indent=2) + "\n")
        for path in self._folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
