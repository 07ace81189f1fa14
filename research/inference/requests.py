"""Requests to a model: prompts in any of their forms, and how text is generated from them."""

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from research.core import config as configs
from research.core.errors import UserError
from research.data.tokenizers import Tokenizer
from research.inference.beam_config import BeamConfig
from research.inference.grammar_config import GrammarConfig
from research.inference.prompts import Prompt, check_room
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig
from research.inference.slots import LogprobKind
from research.inference.text import Completion
from research.models.language_model import LanguageModelConfig

# Answers to one request, at most.
MOST_SAMPLES = 1024


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of an engine.

    Attributes:
      ids: of the prompt, which an encoder reads where there is one.
      sampling: how answers are drawn.
      beams: makes it a search for the likeliest answers, which `sampling` says nothing of; None for
        none.
      grammar: that the answers keep to; None for none.
      count: answers that are returned; answer i is drawn with the seed of the first one + i.
      best_of: answers that are drawn, of which the `count` best are returned; 0 is `count`.
      reward: what says how good an answer is; None goes by the mean log-probability of its tokens.
      logprobs: likeliest ids whose log-probabilities are returned beside those of each drawn token.
      prompt_logprobs: the same of each token of the prompt but the first; None for none.
      logprob_kind: of which distribution they are.
      kept: whether the ids that truncation kept are returned for each token.
      speculate: whether guesses of its next tokens may be read, which change no answer.
      priority: those of a higher one are served first.
      deadline: seconds after which it ends as it is; None for none.
      salt: only requests with the same one share pages of their prompts.
      adapter: name of one of the engine's adapters; empty for none.
    """

    ids: tuple[int, ...]
    sampling: SamplingConfig = SamplingConfig()
    beams: BeamConfig | None = None
    grammar: GrammarConfig | None = None
    count: int = 1
    best_of: int = 0
    reward: Callable[[Completion], float] | None = None
    logprobs: int = 0
    prompt_logprobs: int | None = None
    logprob_kind: LogprobKind = LogprobKind.RAW
    kept: bool = False
    speculate: bool = True
    priority: int = 0
    deadline: float | None = None
    salt: str = ""
    adapter: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.ids, str) or not isinstance(self.ids, Sequence | np.ndarray):
            raise UserError("ids", constraint=f": {self.ids!r} must be a row of ids.")
        object.__setattr__(self, "ids", tuple(whole_number(i) for i in self.ids))
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            # To Python a bool is an int.
            is_wrong_bool = isinstance(value, bool) and kind is not bool
            if is_wrong_bool or not isinstance(value, kind):
                names = getattr(kind, "__name__", str(kind))
                raise UserError(name, value, f"must be of the type {names}.")

    @property
    def num_samples(self) -> int:
        """Answers that are drawn."""
        return self.best_of or self.count

    @property
    def max_tokens(self) -> int:
        """New tokens at most."""
        return self.sampling.max_tokens if self.beams is None else self.beams.max_tokens

    def check(self, config: LanguageModelConfig, num_ids: int, serve: ServeConfig) -> None:
        """Raises UserError where an engine cannot answer it.

        Args:
          config: of the model.
          num_ids: ids that may be drawn.
          serve: how the engine runs.
        """
        most_top = min(serve.top_logprobs, config.vocab_size)
        if self.beams is not None:
            self._check_beams(self.beams, num_ids, serve)
        if not self.ids:
            raise UserError("ids", constraint=": a prompt has one id at least.")
        for i in self.ids:
            if not 0 <= i < config.vocab_size:
                rule = f": id {i} is out of range: it must lie in [0, {config.vocab_size})."
                raise UserError("ids", constraint=rule)
        self.sampling.check_ids(num_ids)
        # Likeliest ids of the prompt are those of a text that is read token by token.
        is_read_in_rows = config.structure == "decoder"
        deadline = 1.0 if self.deadline is None else self.deadline
        for name, holds, constraint in (
            ("count", self.count >= 1, "be at least 1"),
            ("best_of", not self.best_of or self.best_of >= self.count, "not be below count"),
            ("count", self.count <= MOST_SAMPLES, f"be at most {MOST_SAMPLES}"),
            ("best_of", self.best_of <= MOST_SAMPLES, f"be at most {MOST_SAMPLES}"),
            ("logprobs", 0 <= self.logprobs <= most_top, f"lie in [0, {most_top}]"),
            (
                "prompt_logprobs",
                0 <= (self.prompt_logprobs or 0) <= most_top,
                f"lie in [0, {most_top}]",
            ),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or is_read_in_rows,
                f"be None for model.structure = {config.structure!r}",
            ),
            ("deadline", deadline > 0, "be above 0"),
        ):
            if not holds:
                raise UserError(name, getattr(self, name), f"must {constraint}.")

        start = self.ids
        if config.structure == "encoder_decoder":
            check_room([self.ids], [0], config)
            start = (config.decoder_start_id,)
        check_room([start], [self.max_tokens], config)
        limit = len(start) + self.max_tokens
        if limit > serve.tokens:
            raise UserError(
                "max_tokens",
                self.max_tokens,
                f"after a prompt of {len(start)} tokens is more than the engine's tokens = "
                f"{serve.tokens}.",
            )

    def _check_beams(self, beams: BeamConfig, num_ids: int, serve: ServeConfig) -> None:
        most = min(num_ids, serve.slots)
        what = "the ids of the vocabulary" if most == num_ids else "the engine's slots"
        for name, holds, constraint in (
            ("num_beams", beams.num_beams <= most, f"be at most {most}, {what}"),
        ):
            if not holds:
                raise UserError(name, getattr(beams, name), f"must {constraint}.")
        plain = Request(self.ids)
        drawn = ("grammar", "count", "best_of", "reward", "logprobs", "prompt_logprobs", "kept")
        for name in drawn:
            if getattr(self, name) != getattr(plain, name):
                value = getattr(self, name)
                raise UserError(name, value, "is of answers that are drawn, and beams searches.")


# What each field of a request is, but for its ids.
_KINDS = {
    "sampling": SamplingConfig,
    "beams": BeamConfig | None,
    "grammar": GrammarConfig | None,
    "count": int,
    "best_of": int,
    "reward": Callable | None,
    "logprobs": int,
    "prompt_logprobs": int | None,
    "logprob_kind": LogprobKind,
    "kept": bool,
    "speculate": bool,
    "priority": int,
    "deadline": int | float | None,
    "salt": str,
    "adapter": str,
}


def whole_number(i: Any) -> int:
    """Returns an id as an int; NumPy's integers are whole numbers too.

    Raises:
      UserError: it is none.
    """
    # A bool is an int to Python.
    if isinstance(i, bool) or not isinstance(i, numbers.Integral):
        raise UserError("ids", constraint=f": {i!r} must be a whole number.")
    return int(i)


def collect_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[str] | None,
    ids: Sequence[Any] | None,
    messages: Sequence[Any] | None,
    chat: Mapping[str, Any] | None,
) -> list[Prompt]:
    """Returns the prompts of a request: texts, or rows of ids.

    Args:
      tokenizer: of the model.
      prompts: texts.
      ids: rows of ids.
      messages: a conversation, or a list of conversations.
      chat: further arguments of `Tokenizer.encode_chat`.

    Raises:
      UserError: not exactly one of the three, something else than rows of ids, or a conversation
        that the model's chat template does not take.
    """
    if sum(given is not None for given in (prompts, ids, messages)) != 1:
        raise UserError("prompts, ids and messages: exactly one of them must be given.")
    if chat is not None and messages is None:
        raise UserError(
            "chat",
            constraint=": these are arguments of the chat template, which messages alone have.",
        )

    # Texts and ids need no tokenizer here.
    if prompts is not None:
        return list(prompts)
    if ids is not None:
        return [_id_row(row) for row in ids]

    # One conversation is a list of dicts; several are a list of such lists.
    holds_message = any(isinstance(message, Mapping) for message in messages)
    several = len(messages) > 0 and not holds_message
    conversations = messages if several else [messages]
    arguments = chat or {}
    return [tokenizer.encode_chat(conversation, **arguments) for conversation in conversations]


def _id_row(row: Any) -> list[int]:
    if isinstance(row, str) or not isinstance(row, Sequence | np.ndarray):
        raise UserError(
            "ids", constraint=f": {row!r} must be a row of ids: one prompt is [[1, 2, 3]]."
        )
    if len(row) == 0:
        raise UserError("ids", constraint=": a row of no ids cannot be continued.")
    return [whole_number(i) for i in row]


def decoding_config(fields: Mapping[str, Any]) -> SamplingConfig | BeamConfig:
    """Returns how text is generated: by beam search where `num_beams` is given and not 1, else by
    sampling.

    Raises:
      UserError: a field that is not known, out of range, or of the other way.
    """
    num_beams = 1
    if "num_beams" in fields:
        num_beams = fields["num_beams"]
    if num_beams != 1:
        fault = f"draws, and num_beams = {num_beams} searches"
        _check_fields(fields, BeamConfig, SamplingConfig, fault)
        return configs.bind(BeamConfig, fields)

    # num_beams = 1 is sampling.
    fields = {name: value for name, value in fields.items() if name != "num_beams"}
    _check_fields(fields, SamplingConfig, BeamConfig, "needs num_beams above 1")
    return configs.bind(SamplingConfig, fields)


def _check_fields(fields: Mapping[str, Any], wanted: type, other: type, fault: str) -> None:
    """Raises UserError for a field that the `other` config alone has."""
    known = {field.name for field in dataclasses.fields(wanted)}
    for field in dataclasses.fields(other):
        name = field.name
        if name in fields and name not in known:
            raise UserError(name, fields[name], f"{fault}.")
