"""The given texts of a request as a model reads them: checked ids, in batches."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from research.core.errors import UserError
from research.data.tokenizers import Tokenizer
from research.inference.text_batches import Reading, Text, TextBatches, TokenLogprobs
from research.models.config import ModelConfig
from research.models.language_model import LanguageModelConfig


def refuse_capacity(config: LanguageModelConfig) -> None:
    """Raises UserError where experts drop tokens by the room that others leave."""
    if not isinstance(config, ModelConfig) or config.experts is None:
        return
    factor = config.experts.capacity_factor
    if factor is not None:
        reason = "drops tokens by the room that others leave. Use None."
        raise UserError("model.experts.capacity_factor", factor, reason)


class TextReader:
    """Reads given texts with a model.

    Args:
      config: of the model.
      params: its parameters.
      tokenizer: the one it was trained with.
      mesh: that the parameters are sharded over; None is one device.

    Attributes:
      config: of the model.
      tokenizer: the one it was trained with.

    Raises:
      UserError: experts of a limited capacity, which drop a token for its neighbours.
    """

    def __init__(
        self, config: ModelConfig, params: Any, tokenizer: Tokenizer, mesh: Mesh | None = None
    ):
        refuse_capacity(config)
        self.config = config
        self.tokenizer = tokenizer
        self._batches = TextBatches(config, params, mesh)
        self._num_ids = min(tokenizer.vocab_size, config.vocab_size)

    def read(self, reading: Reading, texts: Sequence[Text]) -> list[Any]:
        """Returns what is read of each text, as NumPy arrays, in their order."""
        return self._batches.run(reading, texts)

    def rows(
        self,
        texts: Sequence[str] | None,
        ids: Sequence[Any] | None,
        encode: Callable[[str], list[int]],
    ) -> list[list[int]]:
        """Returns the checked ids of all texts."""
        field, given = given_texts("texts", texts, ids)
        rows = given if field == "ids" else [encode(text) for text in given]
        return [self.checked(field, number, row) for number, row in enumerate(rows)]

    def checked(self, field: str, number: int, row: Any) -> list[int]:
        """Returns the ids of a row; raises UserError where the model cannot read them."""
        if isinstance(row, str) or not isinstance(row, Sequence | np.ndarray):
            raise UserError(field, constraint=f": {row!r} must be a row of ids.")
        if len(row) == 0:
            raise UserError(field, constraint=f": {number} has no ids.")
        room = self.config.max_length
        if len(row) > room:
            raise UserError(
                field,
                constraint=f": {number} has {len(row)} tokens, and the model's max_length is "
                f"{room}. Use a shorter one.",
            )
        bound = self.config.vocab_size
        for i in row:
            is_whole = isinstance(i, numbers.Integral) and not isinstance(i, bool)
            if not is_whole or not 0 <= i < bound:
                raise UserError(
                    field,
                    constraint=f": {number} has {i!r}; ids are whole numbers in [0, {bound}).",
                )
        return [int(i) for i in row]

    def check_classes(self) -> None:
        config = self.config
        if config.structure != "encoder":
            raise UserError("model.structure", config.structure, "has no classes: 'encoder' has.")
        if not config.head.num_classes:
            raise UserError(
                "model.head.num_classes", 0, ": the model has no head that scores classes."
            )

    def check_top(self, top: int, least: int) -> None:
        if type(top) is not int or not least <= top <= self._num_ids:
            raise UserError(
                "top", top, f"must be a whole number in [{least}, {self._num_ids}], the ids."
            )

    def token_logprobs(self, top: int) -> TokenLogprobs:
        # 5 -> 8, so that few programs are compiled.
        rounded = 1 << (top - 1).bit_length() if top else 0
        return TokenLogprobs(min(rounded, self._num_ids), self._num_ids)


def given_texts(name: str, texts: Any, ids: Any) -> tuple[str, Sequence[Any]]:
    """Returns the name and value of the argument that is given."""
    if (texts is None) == (ids is None):
        raise UserError(f"{name} and ids: exactly one of them must be given.")
    field = "ids" if texts is None else name
    given = ids if texts is None else texts
    if isinstance(given, str) or len(given) == 0:
        raise UserError(field, given, "must be a list with at least one entry.")
    return field, given
