"""SentencePiece: byte-pair and unigram pieces with byte fallback, trained here or loaded.

Sources: Sennrich et al. 2016, arXiv:1508.07909 (byte pairs); Kudo 2018, arXiv:1804.10959 (unigram);
Kudo and Richardson 2018, arXiv:1808.06226 (SentencePiece).
"""

import dataclasses
import io
import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import sentencepiece
from jaxtyping import Int
from sentencepiece import sentencepiece_model_pb2

from research.core.errors import UserError
from research.data.tokenizers.base import SENTINEL, Tokenizer, check_sentinels

# SentencePiece writes a space as this character, and would read this character as a space.
META_SPACE = "\u2581"
MAX_LINE_BYTES = 1 << 16
# The result of unigram training depends on it, as sums are taken per thread: a constant, so that it
# does not depend on the machine.
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
        processor = _loaded(model)
        check_sentinels(sentinels)
        self._processor = processor
        self._model = model
        self._exact = exact
        self._marked: _Marked | None = None

        num_pieces = processor.get_piece_size()
        self._appended = sentinels
        self.vocab_size = num_pieces + sentinels
        self.bos_id = _id_or_none(processor.bos_id())
        self.eos_id = _id_or_none(processor.eos_id())
        self.pad_id = _id_or_none(processor.pad_id())
        self.unk_id = _id_or_none(processor.unk_id())

        controls = {}
        for i in range(num_pieces):
            if processor.is_control(i):
                controls[processor.id_to_piece(i)] = i
        masks = [controls[name] for name in MASKS if name in controls]
        self.mask_id = masks[0] if masks else None

        # 32,000 pieces and 100 sentinels: the first has id 32,099 and the last 32,000.
        self.sentinel_ids = tuple(range(self.vocab_size - 1, num_pieces - 1, -1))
        if sentinels == 0:
            self.sentinel_ids = _sentinels(controls)
        self._control = controls | {SENTINEL.format(n): i for n, i in enumerate(self.sentinel_ids)}
        self._spelling = {i: name for name, i in self._control.items()}

        self._threads = os.cpu_count() or 1
        meta_space = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in META_SPACE.encode()]
        self._meta_space = np.array(meta_space, np.int32)

    def _encode_batch(self, texts: list[str]) -> list[Int[np.ndarray, "_"]]:
        if not self._exact or not any(META_SPACE in text for text in texts):
            return self._encode_plain(texts)

        # Texts are cut at U+2581, whose bytes join the ids of their parts again.
        parts = [text.split(META_SPACE) for text in texts]
        encoded = iter(self._encode_plain(list(itertools.chain(*parts))))
        joined = []
        for text_parts in parts:
            ids = list(itertools.islice(encoded, len(text_parts)))
            joined.append(self._join(ids))
        return joined

    def _encode_plain(self, texts: list[str]) -> list[Int[np.ndarray, "_"]]:
        if len(texts) == 1:  # a pool of threads costs more than one text
            encoded = [self._processor.encode(texts[0])]
        else:
            encoded = self._processor.encode(texts, num_threads=self._threads)
        return [np.array(ids, np.int32) for ids in encoded]

    def _join(self, parts: list[Int[np.ndarray, "_"]]) -> Int[np.ndarray, "_"]:
        """Returns the ids of a text from those of its parts, with U+2581 between."""
        joined = [parts[0]]
        for part in parts[1:]:
            joined += [self._meta_space, part]
        return np.concatenate(joined)

    @property
    def specials(self) -> dict[str, str]:
        """The spelling of the special tokens, by their `ROLES`."""
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
        if token_id in self._spelling:
            return self._spelling[token_id]
        return self._processor.id_to_piece(token_id)

    def id_of(self, token: str) -> int | None:
        if token in self._control:
            return self._control[token]
        found = self._processor.piece_to_id(token)  # UNK where there is no such piece
        return found if self._processor.id_to_piece(found) == token else None

    def bytes_of(self, token_id: int) -> bytes | None:
        processor = self._processor
        if token_id in self._spelling or processor.is_unknown(token_id):
            return None
        piece = processor.id_to_piece(token_id)
        if processor.is_byte(token_id):
            # <0x0A>
            return bytes([int(piece[3:5], 16)])
        return piece.replace(META_SPACE, " ").encode("utf-8")

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """Lets SentencePiece find the pieces that are no control tokens, since text after them is
        not the beginning of a text.
        """
        further = [name for name in self.chat_tokens if name not in self._control]
        if not further:
            return super()._encode_marked(text, mark)

        marked = self._marked
        if marked is None or marked.mark != mark or marked.names != further:
            model = _with_marks(self._model, further, mark)
            tokenizer = SentencePieceTokenizer(model, self._exact, self._appended)
            marked = _Marked(mark, further, tokenizer)
            self._marked = marked
        return marked.tokenizer._encode_marked(text, mark)

    def _decode(self, ids: list[int]) -> str:
        text = ""
        for is_control, run in itertools.groupby(ids, key=self._spelling.__contains__):
            if is_control:
                text += "".join(self._spelling[i] for i in run)
            else:
                text += self._decode_pieces(list(run), is_first=not text)
        return text

    def _decode_pieces(self, ids: list[int], is_first: bool) -> str:
        """Decodes pieces; the library drops the space that they begin with, which is right only for
        the first ones.
        """
        text = self._processor.decode(ids)
        begins_with_space = self._processor.id_to_piece(ids[0]).startswith(META_SPACE)
        if begins_with_space and not is_first and not text.startswith(" "):
            return " " + text
        return text

    def files(self) -> dict[str, bytes]:
        return {"sentencepiece.model": self._model}

    def options(self) -> dict[str, Any]:
        return {"exact": self._exact, "sentinels": self._appended}


@dataclasses.dataclass(frozen=True)
class _Marked:
    """A copy of a tokenizer in which some pieces are spelt with `mark` before their name."""

    mark: str
    names: list[str]
    tokenizer: SentencePieceTokenizer


def _loaded(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """Returns the library's processor of a model; raises UserError where it is none."""
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, UnicodeDecodeError) as error:
        # Its own message may hold a damaged piece.
        reason = " ".join(str(error).split())
        raise UserError(f"is not a SentencePiece model: {reason}.") from error


def _sentinels(controls: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the ids of the sentinels among control pieces, in their order."""
    ids: list[int] = []
    while SENTINEL.format(len(ids)) in controls:
        ids.append(controls[SENTINEL.format(len(ids))])
    return tuple(ids)


def _id_or_none(token_id: int) -> int | None:
    return None if token_id < 0 else token_id


def _with_marks(model: bytes, names: Collection[str], mark: str) -> bytes:
    """Returns a model to which the pieces of these names are user-defined symbols, spelt with
    `mark` before the name.

    Text without the mark becomes the pieces that a model without these would find.
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
    """Yields lines short enough for the trainer, which skips longer ones without a warning."""
    most_characters = MAX_LINE_BYTES // 4  # of up to four bytes
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), most_characters):
                yield line[start : start + most_characters]
