"""A stream of ids begins anywhere: after a context of any length it is as if the context had been
streamed too.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data.tokenizers import StreamDecoder, Tokenizer
from tests.inference.text_tokenizers import KINDS, tokenizer

PIECES = ["the cat ", "naïve 東京", "  ", "\n", "😀"]


def parts(kind: str) -> st.SearchStrategy[list[tuple[str | int, int]]]:
    """Texts or ids, and how often each is repeated."""
    ids = st.integers(0, tokenizer(kind).vocab_size - 1)
    return st.lists(st.tuples(st.sampled_from(PIECES) | ids, st.integers(1, 40)), max_size=5)


def ids_of(of: Tokenizer, drawn: list[tuple[str | int, int]]) -> list[int]:
    ids = []
    for part, count in drawn:
        ids += count * (of.encode(part) if isinstance(part, str) else [part])
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_the_text_of_all_ids(kind):
    of = tokenizer(kind)

    @settings(max_examples=60, deadline=None)
    @given(drawn=parts(kind))
    def holds(drawn) -> None:
        ids = ids_of(of, drawn)
        stream = StreamDecoder(of)
        pieces = [stream.push(token) for token in ids]
        assert "".join(pieces) + stream.flush() == of.decode(ids)

    holds()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_after_a_context_is_that_of_all_ids(kind):
    of = tokenizer(kind)

    @settings(max_examples=60, deadline=None)
    @given(drawn=parts(kind), text=st.sampled_from([" a cat", "é", "  x", "\n"]))
    def holds(drawn, text: str) -> None:
        context = ids_of(of, drawn)
        whole = StreamDecoder(of)
        for token in context:
            whole.push(token)
        stream = StreamDecoder(of, context)
        # What the context leaves unfinished may be U+FFFD itself, which only the second one knows.
        for token in of.encode("a " + text):
            new = stream.push(token)
            assert new.lstrip("\ufffd") == whole.push(token).lstrip("\ufffd")

    holds()


def test_a_long_context_is_read_from_its_end():
    of = tokenizer("bpe")
    stream = StreamDecoder(of, of.encode("the cat over there " * 500))
    assert len(stream._window) < 40
