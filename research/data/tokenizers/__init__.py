"""Tokenizers: one API for SentencePiece (trained here or loaded), bytes and Hugging Face files."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable
from typing import Literal

from research.core.errors import UserError, nearest, within
from research.data.tokenizers import descriptor, pieces
from research.data.tokenizers.base import DESCRIPTOR, Tokenizer, check_sentinels
from research.data.tokenizers.byte import ByteTokenizer
from research.data.tokenizers.streaming import StreamDecoder
from research.storage.paths import Path, as_path

__all__ = ["StreamDecoder", "Tokenizer", "TokenizerConfig", "build", "load"]

TRAINED = ("bpe", "unigram")
# Four control ids, 256 bytes and some pieces: fewer would be a byte tokenizer.
MIN_TRAINED_VOCAB = 300


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer.

    Attributes:
      kind: `bpe` or `unigram` (trained on the sources with SentencePiece), `bytes`, or files to
        load: `huggingface` (`tokenizer.json`, `vocab.txt`, or `vocab.json` with `merges.txt`) or
            `sentencepiece` (`*.model`).
      vocab_size: ids of a trained tokenizer, at least 300 beside the mask and the sentinels; the
          others have their own.
      path: the file to load, or the folder that holds it under its usual name; files beside it hold
        its special tokens and chat templates.
      training_bytes: how much text to train on, above 0; the sources give it in proportion to their
          weights.
      mask: whether `bpe`, `unigram` or `bytes` have a MASK, for masked objectives.
      sentinels: how many sentinels they have, for span objectives; of `sentencepiece`, how many
        follow its own ids, 0 for as many as the files beside it state.
    """

    kind: Literal["bpe", "unigram", "bytes", "huggingface", "sentencepiece"] = "bpe"
    vocab_size: int = 4096
    path: str = ""
    training_bytes: int = 20_000_000
    mask: bool = False
    sentinels: int = 0

    def __post_init__(self):
        loaded = self.kind in ("huggingface", "sentencepiece")
        if loaded != bool(self.path):
            need = "must name the file to load" if loaded else "must be empty"
            raise UserError("path", self.path, f"{need} for kind = {self.kind!r}.")
        if self.sentinels < 0:
            raise UserError("sentinels", self.sentinels, "must not be negative.")
        check_sentinels(self.sentinels)
        if loaded and self.mask:
            raise UserError(
                "mask", True, f"has no place in a tokenizer that is loaded: kind = {self.kind!r}."
            )
        if self.kind == "huggingface" and self.sentinels:
            raise UserError(
                "sentinels",
                self.sentinels,
                "must be 0 for kind = 'huggingface': its file has its own.",
            )

        least = MIN_TRAINED_VOCAB
        if self.kind in TRAINED:
            least += self.mask + self.sentinels
        if self.vocab_size < least:
            raise UserError("vocab_size", self.vocab_size, f"must be at least {least}.")
        if self.training_bytes <= 0:
            raise UserError("training_bytes", self.training_bytes, "must be above 0.")


def build(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Returns the tokenizer of a config: trained on `texts`, or loaded from its file.

    Raises:
      UserError: no text to train on, no such file, or a file of another kind.
    """
    if config.kind in TRAINED:
        return pieces.train_sentencepiece(
            config.kind, texts, config.vocab_size, config.mask, config.sentinels
        )
    if config.kind == "bytes":
        return ByteTokenizer(config.mask, config.sentinels)

    # Imports a library that tokenizers trained here do not need.
    from research.data.tokenizers import folders

    path = pathlib.Path(config.path)
    if not path.exists():
        raise UserError("path", config.path, "cannot be read: there is no such file or folder.")
    try:
        if path.is_dir():
            path = folders.find(path, folders.FILES[config.kind])
        tokenizer = folders.from_path(path, config.kind, config.sentinels)
    except UserError as error:
        raise error.about("path", config.path) from error
    # A model that is trained here reads prompts as its documents begin, whatever another model's
    # tokenizer puts there.
    tokenizer.prompt_frame = None
    return tokenizer


def load(folder: str | Path) -> Tokenizer:
    """Returns the tokenizer that `Tokenizer.save` wrote into `folder`.

    Raises:
      UserError: no descriptor, one with wrong fields or an unknown kind, or a file that is missing
          or has changed.
    """
    folder = as_path(folder, "folder")
    saved = descriptor.read_descriptor(folder)
    files = _saved_files(folder, saved)
    tokenizer_class = _class_of(folder, saved.kind)
    try:
        with within("", str(folder)):
            tokenizer = tokenizer_class(*files, **saved.options)
    except (TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / DESCRIPTOR}: options do not fit kind = {saved.kind!r}: {error}."
        ) from error

    tokenizer.chat_templates = saved.chat_templates
    tokenizer.further_end_ids = saved.further_end_ids
    tokenizer.named_tokens = saved.named_tokens
    tokenizer.guarded_tokens = saved.guarded_tokens
    tokenizer.prompt_frame = saved.prompt_frame
    return tokenizer


def _saved_files(folder: Path, saved: descriptor.Descriptor) -> list[bytes]:
    """Returns the files that a descriptor names; raises a UserError where one has changed."""
    try:
        files = [(folder / name).read_bytes() for name in saved.files]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} does not hold a saved tokenizer: {error}.") from error
    for (name, digest), data in zip(saved.files.items(), files, strict=True):
        if hashlib.sha256(data).hexdigest() != digest:
            raise UserError(f"{folder / name} is not the file that was saved: its digest differs.")
    return files


def _class_of(folder: Path, kind: str) -> type[Tokenizer]:
    """Returns the class of a kind; raises a UserError where there is none."""
    classes = {cls.kind: cls for cls in (ByteTokenizer, pieces.SentencePieceTokenizer)}
    if kind == "huggingface":
        # Imports a library that only this kind needs.
        from research.data.tokenizers import huggingface

        classes[kind] = huggingface.HuggingFaceTokenizer
    if kind not in classes:
        known = nearest(kind, [*classes, "huggingface"])
        raise UserError(f"{folder / DESCRIPTOR}: kind = {kind!r} is unknown. {known}")
    return classes[kind]
