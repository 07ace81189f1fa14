"""The bytes of tokens, put together, are the text that the tokenizer decodes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data.tokenizers import Tokenizer, TokenizerConfig, build
from research.data.tokenizers.huggingface import HuggingFaceTokenizer
from research.data.tokenizers.vocabularies import from_word_pieces
from tests.inference.text_tokenizers import KINDS, TEXTS, tokenizer


def bytes_of(of: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(of.bytes_of(i) or b"" for i in ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_has_the_bytes_of_its_tokens(kind):
    of = tokenizer(kind)
    start = of.encode("a")
    for text in TEXTS[:3]:
        ids = of.encode("a" + text)
        assert bytes_of(of, ids).decode().removeprefix(" ") == of.decode(ids)
        assert None not in map(of.bytes_of, [*start, *ids])


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokens_have_the_bytes_of_their_text(kind):
    of = tokenizer(kind)
    ids = [i for i in range(of.vocab_size) if of.bytes_of(i) is not None]
    start = of.encode("a")

    @settings(max_examples=80, deadline=None)
    @given(st.lists(st.sampled_from(ids), max_size=6))
    def holds(drawn: list[int]) -> None:
        data = bytes_of(of, drawn)
        before = of.decode(start)
        text = of.decode([*start, *drawn])
        if "\ufffd" in text:
            # Decoders count the bytes that are no text in different ways.
            assert "\ufffd" in data.decode("utf-8", errors="replace")
            return
        assert before + data.decode() == text

    holds()


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_and_the_unknown_have_no_bytes(kind):
    of = tokenizer(kind)
    silent = [*of.control_tokens.values(), *([] if of.unk_id is None else [of.unk_id])]
    assert [of.bytes_of(i) for i in silent] == [None] * len(silent)
    have = {of.bytes_of(i) for i in range(of.vocab_size)}
    assert have >= {bytes([byte]) for byte in range(256)}


def test_pieces_of_words_have_the_space_that_they_are_written_with():
    of = HuggingFaceTokenizer(from_word_pieces(b"[UNK]\ncat\n##s\nbyte\n", {}, {}))
    found = [of.bytes_of(i) for i in range(of.vocab_size)]
    assert found == [None, b" cat", b"s", b" byte"]


def test_byte_fallback_of_a_tokenizer_json_has_its_byte():
    vocab = {"<unk>": 0, "<0x0A>": 1, "▁a": 2, "<0xZZ>": 3}
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True},
    }
    of = HuggingFaceTokenizer(json.dumps(content).encode())
    assert [of.bytes_of(i) for i in (1, 2, 3)] == [b"\n", b" a", b"<0xZZ>"]


@pytest.mark.parametrize("name", ["tok-gpt2/tokenizer.json", "tok-gpt2"])
def test_every_token_of_gpt2_has_bytes(shared_data, name):
    of = build(TokenizerConfig(kind="huggingface", path=str(shared_data / name)), ())
    without = [i for i in range(of.vocab_size) if of.bytes_of(i) is None]
    assert without == [of.eos_id]
    text = "Hello wörld's 123  tokens 😀"
    assert bytes_of(of, of.encode(text)).decode() == text
