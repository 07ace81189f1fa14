"""Tokenizers with chat templates, made once a module."""

import pytest

from research.data.tokenizers import TokenizerConfig, build, folders
from tests.data.tokenizers.chats import CHATML, LLAMA, PARTS, write_folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats")
    named = [{"name": "default", "template": LLAMA}, {"name": "tool_use", "template": CHATML}]
    return {
        "chatml": write_folder(path / "chatml", CHATML),
        "llama": write_folder(path / "llama", LLAMA),
        "parts": write_folder(path / "parts", PARTS),
        "named": write_folder(path / "named", named),
    }


@pytest.fixture(scope="module")
def made(sources):
    return {name: folders.from_folder(path) for name, path in sources.items()}


@pytest.fixture(scope="module")
def trained():
    """Tokenizers that Tessera makes, with a template of their own."""
    texts = ["[INST] hello [/INST] <s> </s> <|im_end|> a é"] * 40
    found = {
        "bytes": build(TokenizerConfig(kind="bytes"), ()),
        "sentencepiece": build(TokenizerConfig(kind="bpe", vocab_size=300), texts),
    }
    for tokenizer in found.values():
        tokenizer.chat_templates = {"default": LLAMA}
    return found
