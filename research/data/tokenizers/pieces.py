"""SentencePiece: byte-pair and unigram pieces with byte fallback, trained here or loaded.

Sources: Sennrich et al. 2016, arXiv:1508.07909 (byte pairs); Kudo 2018, arXiv:1804.10959 (unigram);
Kudo and Richardson 2018, arXiv:1808.06226 (SentencePiece).
"""

import io
import itertools
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import sentencepiece
from jaxtyping import Int
from sentencepiece import sentencepiece_model_pb2

from research.core.errors import UserError
from research.data.tokenizers.base import SENTINEL, Tokenizer, check_sentinels

# SentencePiece writes a space as this character, and so would read this character as a space.
META_SPACE = "\u2581"
MAX_LINE_BYTES = 1 << 16
# Part of the result of unigram training, whose sums are taken thread by thread: a constant, never
# the machine's count.
TRAINING_THREADS = 4
MASKS = ("<mask>", "[MASK]")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    A model trained by `train_sentencepiece` is exact: it normalizes nothing, so
    `decode(encode(text)) == text` for any text. The one character that SentencePiece itself would
    lose, U+2581, is spelt here by its three byte pieces. A loaded model keeps its own normalization
    (LLaMA's puts a space in front) and gives the ids that SentencePiece gives.
    """

    kind: ClassVar[str] = "sentencepiece"

    def __init__(self, model: bytes, exact: bool = False, sentinels: int = 0):
        """Reads a model.

        Args:
          model: the serialized model.
          exact: whether `train_sentencepiece` made it.
          sentinels: ids after the model's own, the first sentinel having the last, as T5's 100; a
            model that holds sentinels among its pieces needs none.

        Raises:
          UserError: `model` is not a SentencePiece model.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (
            RuntimeError,
            UnicodeDecodeError,
        ) as error:  # its own message may hold a damaged piece
            raise UserError(
                f"is not a SentencePiece model: {' '.join(str(error).split())}."
            ) from error
        check_sentinels(sentinels)
        self._model, self._exact = model, exact
        self._marked: tuple[str, list[str], SentencePieceTokenizer] | None = None
        self._pieces, self._appended = self._processor.get_piece_size(), sentinels
        self.vocab_size = self._pieces + sentinels
        processor = self._processor
        ids = (processor.bos_id(), processor.eos_id(), processor.pad_id(), processor.unk_id())
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (None if i < 0 else i for i in ids)
        controls = {
            processor.id_to_piece(i): i for i in range(self._pieces) if processor.is_control(i)
        }
        self.mask_id = next((controls[name] for name in MASKS if name in controls), None)
        held = itertools.takewhile(controls.__contains__, map(SENTINEL.format, itertools.count()))
        self.sentinel_ids = (
            tuple(controls[name] for name in held)
            if sentinels == 0
            else tuple(range(self.vocab_size - 1, self._pieces - 1, -1))
        )
        self._control = controls | {SENTINEL.format(n): i for n, i in enumerate(self.sentinel_ids)}
        self._spelt = {i: name for name, i in self._control.items()}
        self._threads = os.cpu_count() or 1
        pieces = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in META_SPACE.encode()]
        self._meta_space = np.array(pieces, np.int32)

    def _encode_batch(self, texts: list[str]) -> list[Int[np.ndarray, "_"]]:
        if not self._exact or not any(META_SPACE in text for text in texts):
            return self._plain(texts)
        parts = [text.split(META_SPACE) for text in texts]
        encoded = iter(self._plain([part for text in parts for part in text]))
        return [self._join([next(encoded) for _ in text]) for text in parts]

    def _plain(self, texts: list[str]) -> list[Int[np.ndarray, "_"]]:
        if len(texts) == 1:  # a pool of threads costs more than one text
            return [np.array(self._processor.encode(texts[0]), np.int32)]
        return [
            np.array(ids, np.int32)
            for ids in self._processor.encode(texts, num_threads=self._threads)
        ]

    def _join(self, parts: list[Int[np.ndarray, "_"]]) -> Int[np.ndarray, "_"]:
        joined = [parts[0]]
        for part in parts[1:]:
            joined += [self._meta_space, part]
        return np.concatenate(joined)

    @property
    def specials(self) -> dict[str, str]:
        """The spelling of the tokens that have a part to play, by their `ROLES`."""
        ids = {
            "bos": self.bos_id,
            "eos": self.eos_id,
            "unk": self.unk_id,
            "pad": self.pad_id,
            "mask": self.mask_id,
        }
        return {role: self._processor.id_to_piece(i) for role, i in ids.items() if i is not None}

    @property
    def control_tokens(self) -> dict[str, int]:
        """The ids of the control pieces and the sentinels."""
        return self._control

    def token_of(self, token_id: int) -> str | None:
        return (
            self._spelt[token_id]
            if token_id in self._spelt
            else self._processor.id_to_piece(token_id)
        )

    def id_of(self, token: str) -> int | None:
        if token in self._control:
            return self._control[token]
        found = self._processor.piece_to_id(token)  # UNK where there is no such piece
        return found if self._processor.id_to_piece(found) == token else None

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """Lets SentencePiece find the pieces that are no control tokens, since text goes on behind
        them as before.
        """
        further = [name for name in self.chat_tokens if name not in self._control]
        if not further:
            return super()._encode_marked(text, mark)
        if self._marked is None or self._marked[:2] != (mark, further):
            model = _with_marks(self._model, further, mark)
            self._marked = (
                mark,
                further,
                SentencePieceTokenizer(model, self._exact, self._appended),
            )
        return self._marked[2]._encode_marked(text, mark)

    def _decode(self, ids: list[int]) -> str:
        text = ""
        for is_control, run in itertools.groupby(ids, key=self._spelt.__contains__):
            if is_control:
                text += "".join(self._spelt[i] for i in run)
            else:
                text += self._text(list(run), first=not text)
        return text

    def _text(self, ids: list[int], first: bool) -> str:
        """Decodes pieces; the library drops the space that they begin with, which is right only for
        the first ones.
        """
        text = self._processor.decode(ids)
        spaced = self._processor.id_to_piece(ids[0]).startswith(META_SPACE)
        return text if first or not spaced or text.startswith(" ") else " " + text

    def files(self) -> dict[str, bytes]:
        return {"sentencepiece.model": self._model}

    def options(self) -> dict[str, Any]:
        return {"exact": self._exact, "sentinels": self._appended}


def _with_marks(model: bytes, names: Collection[str], mark: str) -> bytes:
    """Returns a model to which the pieces of these names are symbols that are spelt with `mark` in
    front of the name.

    Text without the mark so becomes the pieces that it would without these.
    """
    content = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece in content.pieces:
        if piece.piece in names:
            piece.piece = mark + piece.piece
            piece.type = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    return content.SerializeToString()


def train_sentencepiece(
    kind: Literal["bpe", "unigram"],
    texts: Iterable[str],
    vocab_size: int,
    mask: bool = False,
    sentinels: int = 0,
) -> SentencePieceTokenizer:
    """Trains an exact tokenizer; the same texts in the same order give the same bytes.

    Args:
      kind: byte pairs or unigram.
      texts: the documents.
      vocab_size: largest number of ids; a small corpus gives fewer.
      mask: whether there is a MASK among them.
      sentinels: how many there are among them.

    Raises:
      UserError: no text, or a vocabulary too small for the bytes and the characters of the corpus.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=MAX_LINE_BYTES,
            num_threads=TRAINING_THREADS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            control_symbols=[*MASKS[: int(mask)], *map(SENTINEL.format, range(sentinels))],
            minloglevel=2,
        )
    except RuntimeError as error:
        if "sentences_.empty()" in str(error):
            raise UserError("tokenizer", constraint=": there is no text to train on.") from error
        raise UserError("vocab_size", vocab_size, f"does not suit this corpus: {error}.") from error
    return SentencePieceTokenizer(model.getvalue(), exact=True)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Yields lines short enough for the trainer, which leaves out longer ones in silence."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), MAX_LINE_BYTES // 4):
                yield line[start : start + MAX_LINE_BYTES // 4]
