"""What a model says of given texts, without drawing any: embeddings, classes, log-probabilities of
their tokens, and what stands behind a mask.

Each answer is, bit for bit, that of the text alone: see `text_batches`.
"""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from research.core.errors import UserError
from research.inference.prompts import Prompt
from research.inference.text_batches import (
    Text,
    TokenScores,
    class_logits,
    pooled_states,
)
from research.inference.text_reader import TextReader, given_texts
from research.models.config import ModelConfig

POOLINGS = ("mean", "first", "last")

# Ids and their log-probabilities, the likeliest first.
Likeliest = tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class TextScore:
    """The log-probabilities of a text's tokens, in nats.

    Attributes:
      ids: of the tokens that have one: all that follow the prompt, or the first token where there
        is none.
      logprobs: of each: a float32 log-softmax over all V of the model's logits.
      top: the likeliest ids in the place of each, as many as were asked for.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[Likeliest, ...]

    @property
    def total(self) -> float:
        """The log-probability of the text: their sum."""
        return math.fsum(self.logprobs)


@dataclasses.dataclass(frozen=True)
class MaskScore:
    """What may stand behind a mask.

    Attributes:
      position: of the mask among the text's ids.
      top: the likeliest ids, with their log-probabilities in nats.
    """

    position: int
    top: Likeliest


class WholeTexts(abc.ABC):
    """The methods of models and of engines that read whole texts.

    What is said of a text is, bit for bit, what is said of it alone. Each method takes texts, which
    the tokenizer frames as the model reads them, or `ids`, which are used unchanged. A text that is
    too long is refused, never cut.
    """

    @property
    @abc.abstractmethod
    def _reader(self) -> TextReader:
        """What reads the texts."""

    def embed(
        self,
        texts: Sequence[str] | None = None,
        *,
        ids: Sequence[Any] | None = None,
        pooling: str = "mean",
        normalize: bool = True,
        dimensions: int | None = None,
    ) -> Float[np.ndarray, "B D"]:
        """Returns an embedding of each text, from the last hidden states: those of the encoder,
        where there is one.

        Args:
          texts: as an encoder reads them, or as the prompts of a decoder.
          ids: rows of ids instead.
          pooling: `mean` of all tokens, or the `first` or the `last` token's state.
          normalize: whether embeddings have length 1.
          dimensions: the first ones alone are kept, in [1, D], before they are normalized; None
            keeps all. Of use where the model was trained for it (arXiv:2205.13147).

        Raises:
          UserError: texts that the model cannot read, or settings out of range; the first token of
            a decoder, which attends to no other.
        """
        reader = self._reader
        config = reader.config
        width = config.embed_dim
        if pooling not in POOLINGS:
            raise UserError("pooling", pooling, f"is not one of {', '.join(POOLINGS)}.")
        if pooling == "first" and config.structure == "decoder":
            raise UserError(
                "pooling",
                pooling,
                "says nothing of a text: a decoder's first token attends to no other. Use 'mean' "
                "or 'last'.",
            )
        is_number = type(dimensions) is int
        if dimensions is not None and not (is_number and 1 <= dimensions <= width):
            raise UserError(
                "dimensions", dimensions, f"must be a whole number in [1, {width}], the width."
            )

        reads_source = config.structure in ("encoder", "encoder_decoder")
        tokenizer = reader.tokenizer
        encode = tokenizer.encode_source if reads_source else tokenizer.encode_prompt
        rows = [_pooled_text(config, row, pooling) for row in reader.rows(texts, ids, encode)]
        states = reader.read(pooled_states, rows)
        return np.stack([_embedding(state, dimensions, normalize) for state in states])

    def score(
        self,
        texts: Sequence[str] | None = None,
        *,
        ids: Sequence[Any] | None = None,
        prompts: Sequence[Prompt] | None = None,
        top: int = 0,
    ) -> list[TextScore]:
        """Returns the log-probabilities of each text's tokens.

        Args:
          texts: without prompts framed as a prompt, whose first token has no log-probability; after
            a prompt their ids alone.
          ids: rows of ids instead.
          prompts: what comes before each text, texts or rows of ids: the source that an encoder
            reads, or the prefix of a prefix decoder. None: nothing does.
          top: how many of the likeliest ids are named in the place of each token.

        Raises:
          UserError: texts that the model cannot read, a model that predicts no next token, or one
            with an encoder and no prompts.
        """
        reader = self._reader
        structure = reader.config.structure
        if structure == "encoder":
            raise UserError(
                "model.structure", structure, "predicts no next token. Use fill_masks or embed."
            )
        if structure == "encoder_decoder" and prompts is None:
            raise UserError("prompts", constraint="are missing: the encoder reads them.")
        reader.check_top(top, least=0)

        tokenizer = reader.tokenizer
        encode = tokenizer.encode_prompt if prompts is None else tokenizer.encode
        rows = reader.rows(texts, ids, encode)
        field = "ids" if texts is None else "texts"
        if prompts is None:
            scored = [_alone(field, number, row) for number, row in enumerate(rows)]
        else:
            scored = self._after_prompts(field, rows, prompts)

        found = reader.read(reader.token_logprobs(top), [text for text, _ in scored])
        return [
            _text_score(text, start, scores, top)
            for (text, start), scores in zip(scored, found, strict=True)
        ]

    def classify(
        self, texts: Sequence[str] | None = None, *, ids: Sequence[Any] | None = None
    ) -> Float[np.ndarray, "B classes"]:
        """Returns the float32 logits of each text's class, of an encoder with `head.num_classes`.

        Raises:
          UserError: texts that the model cannot read, or a model without classes.
        """
        reader = self._reader
        reader.check_classes()
        rows = reader.rows(texts, ids, reader.tokenizer.encode_source)
        return np.stack(reader.read(class_logits, [Text(row) for row in rows]))

    def score_pairs(
        self,
        pairs: Sequence[Sequence[str]] | None = None,
        *,
        ids: Sequence[Any] | None = None,
    ) -> Float[np.ndarray, "B classes"]:
        """Returns the float32 logits of the class of each pair of texts. Of BERT's two the first
        says that the second text follows.

        Args:
          pairs: read as [CLS] first [SEP] second [SEP], the second with type 1.
          ids: pairs of rows of ids instead.

        Raises:
          UserError: texts that the model cannot read, or a model without classes or types.
        """
        reader = self._reader
        reader.check_classes()
        num_types = reader.config.embedding.num_types
        if num_types < 2:
            raise UserError(
                "model.embedding.num_types",
                num_types,
                "does not tell the second text of a pair from the first: 2 are needed.",
            )
        field, given = given_texts("pairs", pairs, ids)
        for number, pair in enumerate(given):
            if isinstance(pair, str) or len(pair) != 2:
                raise UserError(field, constraint=f": {number} is {pair!r} and must be a pair.")

        rows = []
        for number, (first, second) in enumerate(given):
            if field == "pairs":
                row, types = reader.tokenizer.encode_pair(first, second)
            else:
                left = reader.checked("ids", number, first)
                right = reader.checked("ids", number, second)
                row = left + right
                types = [0] * len(left) + [1] * len(right)
            rows.append(Text(reader.checked(field, number, row), types=types))
        return np.stack(reader.read(class_logits, rows))

    def fill_masks(
        self,
        texts: Sequence[str] | None = None,
        *,
        ids: Sequence[Any] | None = None,
        top: int = 5,
    ) -> list[list[MaskScore]]:
        """Returns the likeliest ids behind each mask of each text.

        Args:
          texts: in which the tokenizer's mask is spelt: `<mask>`, or `[MASK]`.
          ids: rows of ids instead.
          top: how many ids.

        Raises:
          UserError: texts that the model cannot read or that have no mask, or a model that is no
            encoder, or whose tokenizer has no mask.
        """
        reader = self._reader
        structure = reader.config.structure
        if structure != "encoder":
            raise UserError("model.structure", structure, "fills no masks: an encoder does.")
        mask = reader.tokenizer.mask_id
        if mask is None:
            raise UserError("tokenizer.mask_id", None, ": the tokenizer has no mask token.")
        reader.check_top(top, least=1)

        rows = reader.rows(texts, ids, reader.tokenizer.encode_masked)
        for number, row in enumerate(rows):
            if mask not in row:
                name = reader.tokenizer.specials["mask"]
                field = "ids" if texts is None else "texts"
                raise UserError(field, constraint=f": {number} has no {name}, id {mask}.")

        given = [Text(row, targets=row) for row in rows]
        found = reader.read(reader.token_logprobs(top), given)
        answers = []
        for row, scores in zip(rows, found, strict=True):
            places = [position for position, token in enumerate(row) if token == mask]
            answers.append([MaskScore(place, _likeliest(scores, place, top)) for place in places])
        return answers

    def _after_prompts(
        self, field: str, rows: list[list[int]], prompts: Sequence[Prompt]
    ) -> list[tuple[Text, int]]:
        """Returns texts with their prompts, and the index of the first token that is scored."""
        reader = self._reader
        if isinstance(prompts, str) or len(prompts) != len(rows):
            count = len(rows)
            raise UserError("prompts", prompts, f"must be a list of {count}, one for each text.")
        config = reader.config
        has_source = config.structure == "encoder_decoder"
        tokenizer = reader.tokenizer
        encode = tokenizer.encode_source if has_source else tokenizer.encode_prompt

        scored = []
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            before = encode(prompt) if isinstance(prompt, str) else prompt
            before = reader.checked("prompts", number, before)
            source: list[int] = []
            if has_source:
                source = before
                before = [config.decoder_start_id]
            whole = reader.checked(field, number, before + row)
            start = len(before)
            text = _scored_text(whole, start)
            if config.structure == "prefix":
                text = dataclasses.replace(text, prefix=start)
            scored.append((dataclasses.replace(text, source=source), start))
        return scored


def _pooled_text(config: ModelConfig, row: list[int], pooling: str) -> Text:
    # Of 5 tokens: [0, 5), [0, 1) or [4, 5).
    length = len(row)
    chosen = {"mean": range(length), "first": range(1), "last": range(length - 1, length)}[pooling]
    if config.structure == "encoder_decoder":
        return Text((), source=row, chosen=chosen)
    # All of a prefix decoder's text may attend to all of it.
    prefix = length if config.structure == "prefix" else 0
    return Text(row, prefix=prefix, chosen=chosen)


def _embedding(
    state: Float[np.ndarray, "D"], dimensions: int | None, normalize: bool
) -> Float[np.ndarray, "kept"]:
    """Returns the first dimensions of a state, of length 1 where it is normalized.

    Source: Kusupati et al. 2022 (Matryoshka representations), arXiv:2205.13147, section 3.
    """
    cut = state[:dimensions]
    if not normalize:
        return cut
    norm = np.linalg.norm(cut)
    return cut / np.maximum(norm, np.float32(1e-12))


def _alone(field: str, number: int, row: list[int]) -> tuple[Text, int]:
    """Returns a text without a prompt, and the index of its first token that is scored."""
    if len(row) < 2:
        raise UserError(field, constraint=f": {number} is {row}: no token follows the first.")
    return _scored_text(row, start=1), 1


def _scored_text(row: list[int], start: int) -> Text:
    """Returns a text each of whose tokens asks for the one that follows."""
    assert 1 <= start < len(row)
    return Text(row, targets=row[1:])


def _text_score(text: Text, start: int, scores: TokenScores, top: int) -> TextScore:
    # The token with index 3 is predicted after that with index 2.
    length = len(text.tokens)
    before = range(start - 1, length - 1)
    return TextScore(
        tuple(text.tokens[start:]),
        tuple(scores.logprob[before.start : before.stop].tolist()),
        tuple(_likeliest(scores, place, top) for place in before),
    )


def _likeliest(scores: TokenScores, place: int, top: int) -> Likeliest:
    ids = scores.top_ids[place, :top].tolist()
    logprobs = scores.top_logprobs[place, :top].tolist()
    return tuple(zip(ids, logprobs, strict=True))
