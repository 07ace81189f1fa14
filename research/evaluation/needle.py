"""How often a model finds a needle in a long text, by the text's length and the needle's depth."""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from research.core.errors import UserError
from research.data import needle
from research.data.tokenizers import Tokenizer
from research.inference.generate import generate
from research.inference.sampling_config import SamplingConfig
from research.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class NeedleConfig:
    """What a model is asked.

    Attributes:
      lengths: of the prompts with their answers, in tokens.
      depths: where the needle lies in the text: 0 is its beginning, 1 its end.
      prompts: for each length and depth, at least 1.
      batch_size: prompts that are answered together, at least 1.
      seed: of the needles, and of where they are hidden.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    prompts: int = 32
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(name, getattr(self, name), "must be at least 1.")
        if not self.lengths or min(self.lengths) < 1:
            raise UserError("lengths", self.lengths, "must name lengths of at least 1 token.")
        if not self.depths or min(self.depths) < 0 or max(self.depths) > 1:
            raise UserError("depths", self.depths, "must name depths in [0, 1].")


class Row(NamedTuple):
    """What a model finds in prompts of one length.

    Attributes:
      length: tokens of a prompt with its answer, at most.
      found: share of the needles whose value the model writes, for each depth.
      guessed: the same where the needle is left out: what the model has without it.
    """

    length: int
    found: tuple[float, ...]
    guessed: float


class Question(NamedTuple):
    """A prompt, and the value that must follow it."""

    prompt: str
    value: str


def find_needles(
    config: ModelConfig, params: Any, tokenizer: Tokenizer, asked: NeedleConfig
) -> Iterator[Row]:
    """Yields how often greedy decoding writes the value of a needle, for each length.

    Args:
      config: the model, which makes text. It may be asked beyond `max_length`, unless its positions
        are learned.
      params: its parameters.
      tokenizer: the one it was trained with.
      asked: lengths, depths, and how many prompts.

    Raises:
      UserError: a length that the positions do not reach, or that has no room for text.
    """
    longest = max(asked.lengths)
    if longest > config.max_length:
        if config.position.kind == "learned":
            raise UserError(
                "lengths",
                longest,
                f"is beyond the learned positions: model.max_length = {config.max_length}.",
            )
        config = dataclasses.replace(config, max_length=longest)
    # The shortest one has the least room, whatever the depth: it is found before any work.
    make_questions(tokenizer, min(asked.lengths), None, asked)

    def share(length: int, depth: float | None) -> float:
        questions = make_questions(tokenizer, length, depth, asked)
        found = 0
        for start in range(0, len(questions), asked.batch_size):
            batch = questions[start : start + asked.batch_size]
            found += _count_found(config, params, tokenizer, batch)
        return found / len(questions)

    for length in asked.lengths:
        found = tuple(share(length, depth) for depth in asked.depths)
        yield Row(length, found, share(length, None))


def make_questions(
    tokenizer: Tokenizer, length: int, depth: float | None, asked: NeedleConfig
) -> list[Question]:
    """Returns prompts that have at most `length` tokens with their answers: texts with needles in
    them, and the key of one.

    That one lies at the depth, or is left out where it is None. The others distract, and lie
    anywhere.

    Raises:
      UserError: the length leaves no room for text.
    """
    questions = []
    # A token has one character of the answer, or more.
    limit = length - needle.LINE_LENGTH
    for index in range(asked.prompts):
        size = limit
        question = _make_question(size, (length, depth, index), asked.seed)
        num_tokens = len(tokenizer.encode_prompt(question.prompt))
        # 1,000 characters are 1,100 tokens of at most 1,000: 909 characters
        while num_tokens > limit:
            size = size * limit // num_tokens
            if size <= 0:
                raise UserError("lengths", length, "leaves no room for text between the needles.")
            question = _make_question(size, (length, depth, index), asked.seed)
            num_tokens = len(tokenizer.encode_prompt(question.prompt))
        questions.append(question)
    return questions


def _make_question(size: int, place: tuple[int, float | None, int], seed: int) -> Question:
    """Returns a question about a text of `size` characters; the same place draws the same."""
    length, depth, index = place
    draws = random.Random(f"{seed}:{length}:{depth}:{index}")
    wanted, *others = needle.draw_needles(draws)
    depths = [draws.random() for _ in others]

    hidden = list(others)
    if depth is not None:
        hidden.append(wanted)
        depths.append(depth)
    text = needle.noise(draws, size)
    prompt = needle.hide(text, hidden, depths) + wanted.question
    return Question(prompt, wanted.value)


def _count_found(
    config: ModelConfig, params: Any, tokenizer: Tokenizer, questions: Sequence[Question]
) -> int:
    """Returns how many of the questions greedy decoding answers with the value."""
    # A value has at most a token for each of its letters, and one that begins a word.
    sampling = SamplingConfig(max_tokens=needle.VALUE_LETTERS + 1, temperature=0.0)
    prompts = [question.prompt for question in questions]
    completions = generate(config, params, tokenizer, prompts, sampling)
    found = 0
    for question, completion in zip(questions, completions, strict=True):
        found += completion.text.strip().startswith(question.value)
    return found
