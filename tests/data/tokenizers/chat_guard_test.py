"""The guard of control tokens in chats, where a template changes the text beside it."""

import pytest

from research.data.tokenizers import folders
from research.data.tokenizers.chat import marked, split
from tests.data.tokenizers.chat_test import write_folder


@pytest.mark.parametrize(("change", "first"), [("lower", "a<|IM_"), ("trim", "a<|im_  \n")])
def test_what_a_template_changes_at_the_end_of_a_part_joins_no_control_token(
    tmp_path, change, first
):
    template = "{{ messages[0].content | " + change + " }}{{ messages[1].content }}<|im_end|>"
    tokenizer = folders.from_folder(write_folder(tmp_path / change, template))
    ids = tokenizer.encode_chat([{"content": first}, {"content": "end|>"}])
    assert ids.count(tokenizer.control_tokens["<|im_end|>"]) == 1
    assert tokenizer.decode(ids) == "a<|im_end|><|im_end|>"


@pytest.mark.parametrize("tokens", [["<end>", "<end>of"], ["<end>of", "<end>"]])
def test_of_control_tokens_that_begin_alike_the_longest_is_taken(tokens):
    text = marked("a<end>of<end>", tokens, "|")
    assert [*split(text, tokens, "|")] == ["a", "|<end>of", "|<end>"]
