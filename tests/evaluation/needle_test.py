"""The needle test counts what a model finds, and nothing that it guesses."""

import re
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from research.core.errors import UserError
from research.data import needle as needles
from research.data.tokenizers.byte import ByteTokenizer
from research.evaluation import needle
from research.evaluation.needle import NeedleConfig, find_needles, make_questions
from research.models.config import PositionConfig
from tests.tiny import tiny_config

TOKENIZER = ByteTokenizer()
ASKED = NeedleConfig((150, 600), depths=(0.0, 0.5, 1.0), prompts=20, batch_size=8)


def answer_by(monkeypatch: pytest.MonkeyPatch, answer) -> list[int]:
    """Has a function from prompts to values stand for the model; returns the sizes of batches."""
    sizes = []

    def generate(config, params, tokenizer, prompts: Sequence[str], sampling):
        assert sampling.temperature == 0
        sizes.append(len(prompts))
        return [SimpleNamespace(text=answer(prompt)) for prompt in prompts]

    monkeypatch.setattr(needle, "generate", generate)
    return sizes


def lookup(prompt: str) -> str:
    """The value after the earlier occurrence of the key that the prompt ends with."""
    question = prompt[-2:]
    before = prompt[: -len(question)]
    start = before.find(question)
    return before[start + len(question) :][: needles.VALUE_LETTERS] + "]" if start >= 0 else "???"


def test_a_model_that_looks_up_the_key_finds_every_needle_and_none_that_is_left_out(monkeypatch):
    sizes = answer_by(monkeypatch, lookup)
    rows = list(find_needles(tiny_config(), None, TOKENIZER, ASKED))
    assert rows == [(150, (1.0, 1.0, 1.0), 0.0), (600, (1.0, 1.0, 1.0), 0.0)]
    assert set(sizes) == {8, 4}


def test_a_model_that_copies_any_needle_finds_few(monkeypatch):
    def last_line(prompt: str) -> str:
        lines = re.findall(r"\n\[([A-Z]{4})\]\n", prompt)
        return lines[-1][1:]

    answer_by(monkeypatch, last_line)
    (row, _) = find_needles(tiny_config(), None, TOKENIZER, ASKED)
    # At the very end the last needle is the one that is asked for.
    assert row.found[0] < 0.2
    assert row.found[2] == 1
    assert row.guessed == 0


def test_a_model_with_a_window_finds_what_lies_in_it(monkeypatch):
    answer_by(monkeypatch, lambda prompt: lookup(prompt[-200:]))
    short, long = find_needles(tiny_config(), None, TOKENIZER, ASKED)
    assert short.found == (1.0, 1.0, 1.0)
    assert long.found == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [100, 1000])
def test_prompts_have_their_length_and_the_needle_at_its_depth(length: int, depth: float):
    size = needles.LINE_LENGTH
    for question in make_questions(TOKENIZER, length, depth, ASKED):
        num_tokens = len(TOKENIZER.encode_prompt(question.prompt))
        # There is room for the answer.
        assert length - 16 <= num_tokens <= length - 8
        key = question.prompt[-1:]
        place = question.prompt.index(needles.Needle(key, question.value).line)
        # Beside the text there are the needles that distract, before it or after it.
        text_size = len(question.prompt) - needles.NUM_NEEDLES * size - len(key) - 2
        before = place - sum(question.prompt[:place].count(sign) for sign in "[") * size
        assert before == pytest.approx(depth * text_size, abs=1)
        assert question.prompt.count("[") == needles.NUM_NEEDLES + 1


def test_the_control_has_the_question_without_its_needle():
    for question in make_questions(TOKENIZER, 300, None, ASKED):
        assert question.value not in question.prompt
        assert question.prompt.count("[") == needles.NUM_NEEDLES


def test_lengths_beyond_learned_positions_are_refused_and_others_are_not(monkeypatch):
    answer_by(monkeypatch, lookup)
    learned = tiny_config(position=PositionConfig(kind="learned"))
    with pytest.raises(UserError, match=r"^lengths = 600 is beyond the learned positions"):
        list(find_needles(learned, None, TOKENIZER, ASKED))
    with pytest.raises(UserError, match=r"^lengths = 20 leaves no room"):
        list(find_needles(learned, None, TOKENIZER, NeedleConfig((20,))))
