"""Tokenized documents on disk: one memory-mapped array of ids, and where each document begins.

A corpus folder holds `tokens.bin` (uint16 or uint32, the framed documents one after the other),
`offsets.npy`, `bytes.npy`, `checksums.npy` (of the blocks of `tokens.bin`) and `corpus.json`. It is
written under another name and renamed when complete, so a build that is killed leaves no folder of
that name. A pair of texts is two documents: the source, then the text that is made from it.

`corpus.json` has the checksums of itself and of the tables, which are verified when a corpus is
opened; a block of tokens is verified when it is first read.
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
from research.data.source_stats import fingerprint, size_bytes
from research.data.sources import (
    Document,
    SourceConfig,
    SourceReport,
    Split,
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
      folder: the corpus folder.
      tokens: ids of all documents, each framed by `Tokenizer.frame`.
      offsets: index in `tokens` of each document's first token, then the number of tokens.
      num_bytes: UTF-8 bytes of each document's text.
      pad_id: what fills the rest of a row: the tokenizer's PAD, or 0.
      digest: a hash of the tokens and the offsets.
      report: counts of documents and of bad records in the source.
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
        """Number of documents."""
        return len(self.num_bytes)

    def document(self, index: int) -> Shaped[np.ndarray, "_"]:
        """Returns the framed ids of one document; raises a UserError where a checksum differs."""
        # Arrays of one range.
        starts = self.offsets[index : index + 1]
        ends = self.offsets[index + 1 : index + 2]
        self.verify(starts, ends - starts)
        return self.tokens[starts[0] : ends[0]]

    def verify(self, starts: Int[np.ndarray, "ranges"], lengths: Int[np.ndarray, "ranges"]) -> None:
        """Verifies the blocks of tokens that these ranges touch, each of them once in the life of
        this object.

        Args:
          starts: where each range begins in `tokens`.
          lengths: its tokens.

        Raises:
          UserError: a block that is not what was written.
        """
        if self.verifier is None:
            return
        damaged = self.verifier.first_damaged(starts, lengths)
        if damaged is None:
            return
        first, end = damaged
        raise UserError(
            f"{self.folder / 'tokens.bin'}: ids {first:,} to {end - 1:,} are not those that were "
            f"written (checksum). Delete {self.folder.parent} to build it again."
        )


def open_corpus(folder: str | pathlib.Path) -> Corpus:
    """Opens a corpus folder; raises a UserError where it is no corpus, is truncated, or its tables
    have changed.
    """
    folder = pathlib.Path(folder)
    advice = f"Delete {folder.parent} to build it again."
    try:
        info = json.loads((folder / "corpus.json").read_text())
        changed = _first_changed(folder, info)
        if changed is not None:
            raise UserError(f"{folder / changed} is not what was written (checksum). {advice}")
        return _read_corpus(folder, info, advice)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder} is not a tokenized corpus: {error}. {advice}") from error


def _first_changed(folder: pathlib.Path, info: Mapping[str, Any]) -> str | None:
    """Returns the first of `corpus.json` and the tables whose checksum differs, or None."""
    changed = []
    if info["check"] != _info_checksum(info):
        changed.append("corpus.json")
    for name in TABLES:
        file = f"{name}.npy"
        if file_checksum(folder / file) != info["tables"][name]:
            changed.append(file)
    return changed[0] if changed else None


def _read_corpus(folder: pathlib.Path, info: Mapping[str, Any], advice: str) -> Corpus:
    offsets, num_bytes, checksums = (
        np.load(folder / f"{name}.npy", mmap_mode="r") for name in TABLES
    )
    tokens = _map(folder / "tokens.bin", np.dtype(info["dtype"]))
    if offsets[-1] != len(tokens):
        raise UserError(f"{folder} has lost part of its files. {advice}")
    return Corpus(
        folder=folder,
        tokens=tokens,
        offsets=offsets,
        num_bytes=num_bytes,
        pad_id=info["pad_id"],
        digest=info["digest"],
        report=SourceReport(**info["report"]),
        verifier=BlockVerifier(tokens, checksums),
    )


def _info_checksum(info: Mapping[str, Any]) -> int:
    """Returns the checksum of `corpus.json` without the field that holds it."""
    rest = {name: value for name, value in info.items() if name != "check"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _map(path: pathlib.Path, dtype: np.dtype) -> Shaped[np.ndarray, "_"]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")


def build_corpora(
    source: SourceConfig, tokenizer: Tokenizer, folder: str | pathlib.Path
) -> dict[Split, Corpus]:
    """Tokenizes a source in one pass, or opens the corpora of an earlier build with equal inputs.

    Args:
      source: where the text comes from.
      tokenizer: what encodes it.
      folder: the cache; each distinct (source, its files, tokenizer) has its own folder inside.

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
    """Returns a hash of all that decides the content. Not of the weight: only mixing reads it."""
    content = plain(dataclasses.replace(source, weight=1.0))
    key = [FORMAT, content, fingerprint(source), tokenizer.digest()]
    text = json.dumps(key, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _build(source: SourceConfig, tokenizer: Tokenizer, final: pathlib.Path) -> None:
    # Another process may have built the same folder meanwhile: then that one is kept.
    with files.new_folder(final, keep_existing=True) as partial, contextlib.ExitStack() as opened:
        writers = {split: _Writer(partial / split, tokenizer) for split in SPLITS}
        for writer in writers.values():
            opened.callback(writer.close)

        report = SourceReport()
        _tokenize(source, tokenizer, writers, report)

        for writer in writers.values():
            writer.close()
            writer.finish(report)


def _tokenize(
    source: SourceConfig,
    tokenizer: Tokenizer,
    writers: Mapping[Split, "_Writer"],
    report: SourceReport,
) -> None:
    """Writes the documents of a source, each with the writer of its split."""
    title = f"tokenize {source.kind} {source.path}".strip()
    with Progress(title, size_bytes(source), "bytes") as progress:
        for batch in _batches(split_documents(source, report)):
            # A pair is two texts, the source first.
            splits = []
            texts = []
            for split, document in batch:
                for text in document.texts:
                    splits.append(split)
                    texts.append(text)

            encoded = tokenizer.encode_batch(texts)
            for split, text, ids in zip(splits, texts, encoded, strict=True):
                num_bytes = writers[split].add(text, tokenizer.frame(ids))
                progress.advance(num_bytes)


def _batches(documents: Iterable[tuple[Split, Document]]) -> Iterator[list[tuple[Split, Document]]]:
    """Groups documents into batches that are large enough for parallel encoding."""
    batch: list[tuple[Split, Document]] = []
    size = 0
    for split, document in documents:
        batch.append((split, document))
        # Characters approximate bytes, and are known without encoding.
        size += sum(map(len, document.texts))
        if size >= ENCODE_BYTES:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


class _Writer:
    """Appends documents to a corpus folder."""

    def __init__(self, folder: pathlib.Path, tokenizer: Tokenizer):
        folder.mkdir()
        self._folder = folder
        self._tokenizer = tokenizer
        # The smallest type that holds every id.
        code = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
        self._dtype = np.dtype(code)
        self._file: BinaryIO = (folder / "tokens.bin").open("wb")
        self._hash = hashlib.sha256()
        self._checksums = BlockChecksums()
        self._lengths: list[int] = []
        self._bytes: list[int] = []

    def add(self, text: str, ids: Int[np.ndarray, "_"]) -> int:
        """Writes one framed text and returns its bytes."""
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._checksums.add(data)

        num_bytes = len(text.encode("utf-8"))
        self._lengths.append(len(ids))
        self._bytes.append(num_bytes)
        return num_bytes

    def close(self) -> None:
        self._file.close()

    def finish(self, report: SourceReport) -> None:
        """Writes the tables and flushes everything to the disk."""
        # lengths [5, 3] -> offsets [0, 5, 8]
        offsets = np.zeros(len(self._lengths) + 1, np.int64)
        np.cumsum(self._lengths, out=offsets[1:])
        self._hash.update(offsets.astype("<i8").tobytes())

        num_bytes = np.array(self._bytes, np.int64)
        tables = (offsets, num_bytes, self._checksums.finish())
        checksums = {}
        for name, table in zip(TABLES, tables, strict=True):
            path = self._folder / f"{name}.npy"
            np.save(path, table)
            checksums[name] = file_checksum(path)

        self._write_info(int(offsets[-1]), checksums, report)
        for path in self._folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def _write_info(self, num_tokens: int, checksums: dict[str, int], report: SourceReport) -> None:
        pad_id = self._tokenizer.pad_id
        info = {
            "dtype": self._dtype.str,
            "pad_id": 0 if pad_id is None else pad_id,
            "digest": self._hash.hexdigest(),
            "tokenizer": self._tokenizer.digest(),
            "documents": len(self._lengths),
            "tokens": num_tokens,
            "bytes": sum(self._bytes),
            "tables": checksums,
            "report": dataclasses.asdict(report),
        }
        info["check"] = _info_checksum(info)
        text = json.dumps(info, indent=2)
        (self._folder / "corpus.json").write_text(text + "\n")
