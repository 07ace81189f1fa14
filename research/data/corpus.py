"""Tokenized documents on disk: one memory-mapped array of ids, and where each document begins.

A corpus folder holds `tokens.bin` (uint16 or uint32, the framed documents one after the other),
`offsets.npy`, `bytes.npy`, `checksums.npy` (of the blocks of `tokens.bin`) and `corpus.json`. It is
written under another name and renamed when whole, so a build that is killed leaves nothing that
could be read. A pair of texts is two documents: what is read, then what is made from it.

`corpus.json` guards itself and the tables, which are verified when a corpus is opened; a block of
tokens is verified when it is first read.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int, Shaped, UInt

from research.core.config import plain
from research.core.errors import UserError
from research.core.progress import Progress
from research.data.sources import (
    Document,
    SourceConfig,
    SourceReport,
    Split,
    fingerprint,
    size_bytes,
    split_documents,
)
from research.data.tokenizers import Tokenizer
from research.storage import files
from research.storage.checksums import BlockChecksums, BlockVerifier, file_checksum

# Part of every cache key: raise it when the files, or what a source reads, change.
FORMAT = 2
ENCODE_BYTES = 1 << 21
SPLITS: tuple[Split, ...] = ("train", "heldout")
TABLES = ("offsets", "bytes", "checksums")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of one split of one source, as ids. Cheap to copy to another process: it is
    opened by its folder.

    Attributes:
      folder: where it lies.
      tokens: ids of all documents, each framed by `Tokenizer.frame`.
      offsets: where each of the D documents begins in `tokens`, then the total.
      num_bytes: UTF-8 bytes of each document's text.
      pad_id: what fills the rest of a row: the tokenizer's PAD, or 0.
      digest: a hash of the tokens and of where the documents begin.
      report: what reading the source met.
      verifier: compares blocks of `tokens` with their checksums; None for tokens that come from no
          file.
    """

    folder: pathlib.Path
    tokens: UInt[np.ndarray, "_"] = dataclasses.field(repr=False)
    offsets: Int[np.ndarray, "_"] = dataclasses.field(repr=False)
    num_bytes: Int[np.ndarray, "_"] = dataclasses.field(repr=False)
    pad_id: int
    digest: str
    report: SourceReport
    verifier: BlockVerifier | None = dataclasses.field(default=None, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_corpus, (self.folder,)

    @property
    def num_documents(self) -> int:
        """Number of documents, D."""
        return len(self.num_bytes)

    def document(self, index: int) -> Shaped[np.ndarray, "_"]:
        """Returns the framed ids of one document; raises a UserError where they are not those that
        were written.
        """
        self.verify(self.offsets[index : index + 1], np.diff(self.offsets[index : index + 2]))
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def verify(self, starts: Int[np.ndarray, "ranges"], lengths: Int[np.ndarray, "ranges"]) -> None:
        """Looks at the blocks of tokens that these ranges touch, each of them once in the life of
        this object.

        Args:
          starts: where each range begins in `tokens`.
          lengths: its tokens.

        Raises:
          UserError: a block that is not what was written.
        """
        damaged = None if self.verifier is None else self.verifier.first_damaged(starts, lengths)
        if damaged is not None:
            raise UserError(
                f"{self.folder / 'tokens.bin'}: ids {damaged[0]:,} to {damaged[1] - 1:,} are not "
                "those that were "
                f"written (checksum). Delete {self.folder.parent} to build it again."
            )


def open_corpus(folder: str | pathlib.Path) -> Corpus:
    """Opens a corpus folder; raises a UserError where it is none, was cut short, or its tables were
    changed.
    """
    folder = pathlib.Path(folder)
    again = f"Delete {folder.parent} to build it again."
    try:
        info = json.loads((folder / "corpus.json").read_text())
        changed = [] if info["check"] == _check(info) else ["corpus.json"]
        for name in TABLES:
            if file_checksum(folder / f"{name}.npy") != info["tables"][name]:
                changed.append(f"{name}.npy")
        if changed:
            raise UserError(f"{folder / changed[0]} is not what was written (checksum). {again}")
        offsets, num_bytes, checksums = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in TABLES
        )
        tokens = _map(folder / "tokens.bin", np.dtype(info["dtype"]))
        pad_id, digest, report = info["pad_id"], info["digest"], SourceReport(**info["report"])
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder} is not a tokenized corpus: {error}. {again}") from error
    if offsets[-1] != len(tokens):
        raise UserError(f"{folder} has lost part of its files. {again}")
    return Corpus(
        folder, tokens, offsets, num_bytes, pad_id, digest, report, BlockVerifier(tokens, checksums)
    )


def _check(info: Mapping[str, Any]) -> int:
    """Returns the checksum of what `corpus.json` holds beside it."""
    rest = {name: value for name, value in info.items() if name != "check"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _map(path: pathlib.Path, dtype: np.dtype) -> Shaped[np.ndarray, "_"]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")


def build_corpora(
    source: SourceConfig, tokenizer: Tokenizer, folder: str | pathlib.Path
) -> dict[Split, Corpus]:
    """Tokenizes a source in one pass, or opens what an earlier build with the same inputs left.

    Args:
      source: where the text comes from.
      tokenizer: what encodes it.
      folder: the cache; each distinct (source, its files, tokenizer) gets a folder of its own
          inside.

    Returns:
      The corpus of each split; one without documents is still a corpus.

    Raises:
      UserError: a source that cannot be read, or a disk that is full.
    """
    name = f"{source.kind}-{_digest(source, tokenizer)[:16]}"
    final = pathlib.Path(folder) / name
    files.remove_leftovers(final.parent, older=True)
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
    # A process that was first has built the same.
    with files.new_folder(final, keep_existing=True) as partial, contextlib.ExitStack() as opened:
        report = SourceReport()
        writers = {split: _Writer(partial / split, tokenizer) for split in SPLITS}
        for writer in writers.values():
            opened.callback(writer.close)
        with Progress(
            f"tokenize {source.kind} {source.path}".strip(), size_bytes(source), "bytes"
        ) as progress:
            for batch in _batches(split_documents(source, report)):
                texts = [(split, text) for split, document in batch for text in document.texts]
                encoded = tokenizer.encode_batch([text for _, text in texts])
                for (split, text), ids in zip(texts, encoded, strict=True):
                    progress.advance(writers[split].add(text, tokenizer.frame(ids)))
        for writer in writers.values():
            writer.close()
            writer.finish(report)


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
        self._hash, self._checksums = hashlib.sha256(), BlockChecksums()
        self._lengths: list[int] = []
        self._bytes: list[int] = []

    def add(self, text: str, ids: Int[np.ndarray, "_"]) -> int:
        """Writes one framed text and returns its bytes."""
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._checksums.add(data)
        self._lengths.append(len(ids))
        self._bytes.append(len(text.encode("utf-8")))
        return self._bytes[-1]

    def close(self) -> None:
        self._file.close()

    def finish(self, report: SourceReport) -> None:
        """Writes the tables and brings everything to the disk."""
        offsets = np.zeros(len(self._lengths) + 1, np.int64)
        np.cumsum(self._lengths, out=offsets[1:])
        tables = (offsets, np.array(self._bytes, np.int64), self._checksums.finish())
        for name, table in zip(TABLES, tables, strict=True):
            np.save(self._folder / f"{name}.npy", table)
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
            "tables": {name: file_checksum(self._folder / f"{name}.npy") for name in TABLES},
            "report": dataclasses.asdict(report),
        }
        info["check"] = _check(info)
        (self._folder / "corpus.json").write_text(json.dumps(info, indent=2) + "\n")
        for path in self._folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
