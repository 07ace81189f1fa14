"""Prompts in each of their forms."""

import numpy as np
import pytest

from research.core.errors import UserError
from research.data.tokenizers.byte import ByteTokenizer
from research.inference.requests import collect_prompts

ASKED = [{"role": "user", "content": "a<s>"}]


def tokenizer() -> ByteTokenizer:
    made = ByteTokenizer()
    made.chat_templates = {"default": "{{ bos_token }}{{ messages[0].content }}{{ mood }}"}
    return made


def test_texts_and_rows_of_ids_are_taken_as_they_are():
    assert collect_prompts(tokenizer(), ["a", ""], None, None, None) == ["a", ""]
    rows = [[1, 2], np.array([3], np.int64), (4,)]
    assert collect_prompts(tokenizer(), None, rows, None, None) == [[1, 2], [3], [4]]


def test_one_conversation_or_several_become_ids():
    wanted = [256, *b"a<s>"]
    assert collect_prompts(tokenizer(), None, None, ASKED, None) == [wanted]
    assert collect_prompts(tokenizer(), None, None, [ASKED, ASKED], None) == [wanted, wanted]
    assert collect_prompts(tokenizer(), None, None, ASKED, {"mood": "!"}) == [[*wanted, ord("!")]]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "prompts, ids and messages: exactly one of them must be given."),
        (
            {"prompts": ["a"], "ids": [[1]]},
            "prompts, ids and messages: exactly one of them must be given.",
        ),
        (
            {"prompts": ["a"], "chat": {}},
            "chat: these are arguments of the chat template, which messages alone have.",
        ),
        ({"ids": [1, 2]}, "ids: 1 must be a row of ids: one prompt is [[1, 2, 3]]."),
        ({"ids": ["ab"]}, "ids: 'ab' must be a row of ids: one prompt is [[1, 2, 3]]."),
        ({"ids": [[]]}, "ids: a row of no ids cannot be continued."),
        ({"ids": [[1.0]]}, "ids: 1.0 must be a whole number."),
        ({"ids": [[True]]}, "ids: True must be a whole number."),
        ({"messages": []}, "messages is empty: a conversation has at least one."),
        (
            {"messages": ["Hello"]},
            "messages: 'H' must be a dict, as in {'role': 'user', 'content': 'Hello'}.",
        ),
    ],
)
def test_what_is_no_prompt_is_refused(given, said):
    none = {"prompts": None, "ids": None, "messages": None, "chat": None}
    with pytest.raises(UserError) as caught:
        collect_prompts(tokenizer(), **(none | given))
    assert str(caught.value) == said
