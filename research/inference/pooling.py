"""What a model says of given texts, without drawing any: embeddings, classes, log-probabilities of
their tokens, and what stands behind a mask.

Each answer is, bit for bit, that of the text alone: see `text_batches`.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from research.core.errors import UserError
from research.data.tokenizers import Tokenizer
from research.inference.prompts import Prompt
from research.inference.text_batches import (
    Text,
    TextBatches,
    TokenLogprobs,
    TokenScores,
    class_logits,
    pooled_states,
)
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


class WholeTexts:
    """Reads whole texts with a model.

    Args:
      config: of the model.
      params: its parameters.
      tokenizer: the one it was trained with.
      tokens: of a batch; None suits the platform.

    Raises:
      UserError: experts of a limited capacity, which drop a token for its neighbours.
    """

    def __init__(
        self, config: ModelConfig, params: Any, tokenizer: Tokenizer, tokens: int | None = None
    ):
        experts = config.experts
        if experts is not None and experts.capacity_factor is not None:
            raise UserError(
                "model.experts.capacity_factor",
                experts.capacity_factor,
                "drops tokens by the room that others leave. Use None.",
            )
        self._config = config
        self._tokenizer = tokenizer
        self._batches = TextBatches(config, params, tokens)
        self._num_ids = min(tokenizer.vocab_size, config.vocab_size)

    def embed(
        self,
        texts: Sequence[str] | None = None,
        *,
        ids: Sequence[Any] | None = None,
        pooling: str = "mean",
        normalize: bool = True,
        dimensions: int | None = None,
    ) -> Float[np.ndarray, "B D"]:
        """Implements `LoadedModel.embed`."""
        config = self._config
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
        tokenizer = self._tokenizer
        encode = tokenizer.encode_source if reads_source else tokenizer.encode_prompt
        rows = [_pooled_text(config, row, pooling) for row in self._rows(texts, ids, encode)]
        states = self._batches.run(pooled_states, rows)
        return np.stack([_embedding(state, dimensions, normalize) for state in states])

    def classify(
        self, texts: Sequence[str] | None = None, *, ids: Sequence[Any] | None = None
    ) -> Float[np.ndarray, "B classes"]:
        """Implements `LoadedModel.classify`."""
        self._check_classes()
        rows = self._rows(texts, ids, self._tokenizer.encode_source)
        return np.stack(self._batches.run(class_logits, [Text(row) for row in rows]))

    def score_pairs(
        self,
        pairs: Sequence[Sequence[str]] | None = None,
        *,
        ids: Sequence[Any] | None = None,
    ) -> Float[np.ndarray, "B classes"]:
        """Implements `LoadedModel.score_pairs`."""
        self._check_classes()
        num_types = self._config.embedding.num_types
        if num_types < 2:
            raise UserError(
                "model.embedding.num_types",
                num_types,
                "does not tell the second text of a pair from the first: 2 are needed.",
            )
        field, given = _given("pairs", pairs, ids)
        for number, pair in enumerate(given):
            if isinstance(pair, str) or len(pair) != 2:
                raise UserError(field, constraint=f": {number} is {pair!r} and must be a pair.")

        rows = []
        for number, (first, second) in enumerate(given):
            if field == "pairs":
                row, types = self._tokenizer.encode_pair(first, second)
            else:
                left = self._checked("ids", number, first)
                right = self._checked("ids", number, second)
                row = left + right
                types = [0] * len(left) + [1] * len(right)
            rows.append(Text(self._checked(field, number, row), types=types))
        return np.stack(self._batches.run(class_logits, rows))

    def fill_masks(
        self,
        texts: Sequence[str] | None = None,
        *,
        ids: Sequence[Any] | None = None,
        top: int = 5,
    ) -> list[list[MaskScore]]:
        """Implements `LoadedModel.fill_masks`."""
        structure = self._config.structure
        if structure != "encoder":
            raise UserError("model.structure", structure, "fills no masks: an encoder does.")
        mask = self._tokenizer.mask_id
        if mask is None:
            raise UserError("tokenizer.mask_id", None, ": the tokenizer has no mask token.")
        self._check_top(top, least=1)

        rows = self._rows(texts, ids, self._tokenizer.encode_masked)
        for number, row in enumerate(rows):
            if mask not in row:
                name = self._tokenizer.specials["mask"]
                field = "ids" if texts is None else "texts"
                raise UserError(field, constraint=f": {number} has no {name}, id {mask}.")

        given = [Text(row, targets=row) for row in rows]
        found = self._batches.run(self._token_logprobs(top), given)
        answers = []
        for row, scores in zip(rows, found, strict=True):
            places = [position for position, token in enumerate(row) if token == mask]
            answers.append([MaskScore(place, _likeliest(scores, place, top)) for place in places])
        return answers

    def score(
        self,
        texts: Sequence[str] | None = None,
        *,
        ids: Sequence[Any] | None = None,
        prompts: Sequence[Prompt] | None = None,
        top: int = 0,
    ) -> list[TextScore]:
        """Implements `LoadedModel.score`."""
        structure = self._config.structure
        if structure == "encoder":
            raise UserError(
                "model.structure", structure, "predicts no next token. Use fill_masks or embed."
            )
        if structure == "encoder_decoder" and prompts is None:
            raise UserError("prompts", constraint="are missing: the encoder reads them.")
        self._check_top(top, least=0)

        tokenizer = self._tokenizer
        encode = tokenizer.encode_prompt if prompts is None else tokenizer.encode
        rows = self._rows(texts, ids, encode)
        field = "ids" if texts is None else "texts"
        if prompts is None:
            scored = [_alone(field, number, row) for number, row in enumerate(rows)]
        else:
            scored = self._after_prompts(field, rows, prompts)

        found = self._batches.run(self._token_logprobs(top), [text for text, _ in scored])
        return [
            _text_score(text, start, scores, top)
            for (text, start), scores in zip(scored, found, strict=True)
        ]

    def _after_prompts(
        self, field: str, rows: list[list[int]], prompts: Sequence[Prompt]
    ) -> list[tuple[Text, int]]:
        """Returns texts with their prompts, and the index of the first token that is scored."""
        if isinstance(prompts, str) or len(prompts) != len(rows):
            count = len(rows)
            raise UserError("prompts", prompts, f"must be a list of {count}, one for each text.")
        config = self._config
        has_source = config.structure == "encoder_decoder"
        tokenizer = self._tokenizer
        encode = tokenizer.encode_source if has_source else tokenizer.encode_prompt

        scored = []
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            before = encode(prompt) if isinstance(prompt, str) else prompt
            before = self._checked("prompts", number, before)
            source: list[int] = []
            if has_source:
                source = before
                before = [config.decoder_start_id]
            whole = self._checked(field, number, before + row)
            start = len(before)
            text = _scored_text(whole, start)
            if config.structure == "prefix":
                text = dataclasses.replace(text, prefix=start)
            scored.append((dataclasses.replace(text, source=source), start))
        return scored

    def _rows(
        self,
        texts: Sequence[str] | None,
        ids: Sequence[Any] | None,
        encode: Callable[[str], list[int]],
    ) -> list[list[int]]:
        """Returns the checked ids of all texts."""
        field, given = _given("texts", texts, ids)
        rows = given if field == "ids" else [encode(text) for text in given]
        return [self._checked(field, number, row) for number, row in enumerate(rows)]

    def _checked(self, field: str, number: int, row: Any) -> list[int]:
        """Returns the ids of a row; raises UserError where the model cannot read them."""
        if isinstance(row, str) or not isinstance(row, Sequence | np.ndarray):
            raise UserError(field, constraint=f": {row!r} must be a row of ids.")
        if len(row) == 0:
            raise UserError(field, constraint=f": {number} has no ids.")
        room = self._config.max_length
        if len(row) > room:
            raise UserError(
                field,
                constraint=f": {number} has {len(row)} tokens, and the model's max_length is "
                f"{room}. Use a shorter one.",
            )
        bound = self._config.vocab_size
        for i in row:
            is_whole = isinstance(i, numbers.Integral) and not isinstance(i, bool)
            if not is_whole or not 0 <= i < bound:
                raise UserError(
                    field,
                    constraint=f": {number} has {i!r}; ids are whole numbers in [0, {bound}).",
                )
        return [int(i) for i in row]

    def _check_classes(self) -> None:
        config = self._config
        if config.structure != "encoder":
            raise UserError("model.structure", config.structure, "has no classes: 'encoder' has.")
        if not config.head.num_classes:
            raise UserError(
                "model.head.num_classes", 0, ": the model has no head that scores classes."
            )

    def _check_top(self, top: int, least: int) -> None:
        if type(top) is not int or not least <= top <= self._num_ids:
            raise UserError(
                "top", top, f"must be a whole number in [{least}, {self._num_ids}], the ids."
            )

    def _token_logprobs(self, top: int) -> TokenLogprobs:
        # 5 -> 8, so that few programs are compiled.
        rounded = 1 << (top - 1).bit_length() if top else 0
        return TokenLogprobs(min(rounded, self._num_ids), self._num_ids)


def _given(name: str, texts: Any, ids: Any) -> tuple[str, Sequence[Any]]:
    """Returns the name and value of the argument that is given."""
    if (texts is None) == (ids is None):
        raise UserError(f"{name} and ids: exactly one of them must be given.")
    field = "ids" if texts is None else name
    given = ids if texts is None else texts
    if isinstance(given, str) or len(given) == 0:
        raise UserError(field, given, "must be a list with at least one entry.")
    return field, given


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
