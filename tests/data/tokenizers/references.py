"""Independent implementations to compare with, and real texts to compare on.

`python -m tests.data.tokenizers.references DATA CHARACTERS` compares, over that many characters of
each text file.

BERT: the pure Python tokenizer that `transformers` keeps. GPT-2: the published algorithm in plain
Python, below (Radford et al. 2019; Sennrich et al. 2016, arXiv:1508.07909). T5 and others: the
SentencePiece library.
"""

import functools
import gzip
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import sentencepiece

from research.data.tokenizers import Tokenizer, folders

PATTERNS = (
    "*.txt",
    "*.txt.gz",
    "*.jsonl",
    "*.jsonl.gz",
    "*.json.gz",
    "*.html.gz",
    "*.md",
    "*.tsv",
    "*.csv",
    "*.cs.gz",
)
PATTERNS += ("*.de.gz", "*.en.gz", "*.fr.gz")
BLOCK_LINES = 20
# GPT-2's rule for what pairs may not cross.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def texts(data: pathlib.Path, characters: int) -> Iterator[tuple[str, list[str]]]:
    """Yields each text file's name and its first characters, in blocks of lines; tokenizers' own
    files are no texts.
    """
    for path in sorted({path for pattern in PATTERNS for path in data.rglob(pattern)}):
        if path.relative_to(data).parts[0].startswith("tok-"):
            continue
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read(4 * characters)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:  # the end of what was read, or another encoding
            text = (
                raw[: error.start].decode("utf-8")
                if error.start > len(raw) - 4
                else raw.decode("latin-1")
            )
        lines = text[:characters].split("\n")
        blocks = [
            "\n".join(lines[start : start + BLOCK_LINES])
            for start in range(0, len(lines), BLOCK_LINES)
        ]
        yield str(path.relative_to(data)), blocks


def bert(vocab: pathlib.Path, **options: bool) -> Callable[[str], list[int]]:
    """Returns the pure Python BERT of `transformers`."""
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    tokenizer = BertTokenizerLegacy(str(vocab), **options)
    return lambda text: tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def gpt2(folder: pathlib.Path) -> Callable[[str], list[int]]:
    """Returns GPT-2's byte pairs in plain Python: in each word the best-ranked pair is merged until
    there is none.
    """
    import regex

    ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
    ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(filter(None, lines))}
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    signs = {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + i) for i, byte in enumerate(hidden)
    }
    words = regex.compile(WORDS)

    @functools.cache
    def word_ids(word: str) -> list[int]:
        parts = [signs[byte] for byte in word.encode("utf-8")]
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            merged = []
            while parts:
                together = tuple(parts[:2]) == best
                merged.append("".join(parts[: 1 + together]))
                parts = parts[1 + together :]
            parts = merged
        return [ids[part] for part in parts]

    return lambda text: [i for word in words.findall(text) for i in word_ids(word)]


def sentence_pieces(path: pathlib.Path) -> Callable[[str], list[int]]:
    """Returns the SentencePiece library's encoding."""
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode


def compare(
    tokenizer: Tokenizer, reference: Callable[[str], list[int]], blocks: list[str]
) -> tuple[int, list[str]]:
    """Returns the number of ids, and the blocks that the two encode differently."""
    batch = [ids.tolist() for ids in tokenizer.encode_batch(blocks)]
    different = [block for block, ids in zip(blocks, batch, strict=True) if ids != reference(block)]
    return sum(map(len, batch)), different


def main(data: pathlib.Path, characters: int, families: list[str]) -> None:
    """Compares the named families, or all, over all texts, and prints what was found."""
    pairs = {
        "WordPiece": (data / "tok-bert-uncased" / "vocab.txt", bert),
        "GPT-2": (data / "tok-gpt2" / "vocab.json", lambda path: gpt2(path.parent)),
        "T5": (data / "tok-t5-base" / "t5-base.model", sentence_pieces),
        "C4 BPE": (data / "tok-c4-sentencepiece" / "bpe_32k_c4.model", sentence_pieces),
    }
    for name, (path, make) in pairs.items():
        if families and name not in families:
            continue
        start, tokenizer, reference = time.monotonic(), folders.from_path(path), make(path)
        files = blocks = signs = ids = 0
        faults: list[tuple[str, str]] = []
        for file, held in texts(data, characters):
            count, different = compare(tokenizer, reference, held)
            files, blocks, signs, ids = (
                files + 1,
                blocks + len(held),
                signs + sum(map(len, held)),
                ids + count,
            )
            faults += [(file, block) for block in different]
        seconds = time.monotonic() - start
        print(
            f"{name}: {files} files, {blocks:,} texts, {signs:,} characters, {ids:,} ids: "
            f"{len(faults)} differ"
        )
        print(f"  {seconds:.0f} s", [(file, block[:80]) for file, block in faults[:5]], flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
