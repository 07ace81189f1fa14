"""Text as it arrives: what is streamed is the text of the whole, cut where a search over the whole
would cut it.
"""

import dataclasses
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from research.data.tokenizers import Tokenizer
from research.data.tokenizers.byte import ByteTokenizer
from research.inference import text as text_module
from research.inference.text import Completion, Detokenizer, StopString
from tests.inference.text_tokenizers import KINDS, tokenizer

BYTES = ByteTokenizer()
REPLACEMENT = "\ufffd"
# Few letters, so that stop strings and their beginnings are found often.
LETTERS = "aab é😀"


@dataclasses.dataclass(frozen=True)
class Case:
    """What a detokenizer is made for, and the tokens it is given."""

    prompt: list[int]
    tokens: list[int]
    stop: tuple[str, ...] = ()
    max_tokens: int = 100
    stop_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_end: bool = False

    def detokenizer(self, of: Tokenizer) -> Detokenizer:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields.pop("tokens")
        return Detokenizer(of, fields.pop("prompt"), **fields)


def certain(text: str) -> str:
    """A text without the up to three U+FFFD at its end, which may become a character."""
    count = len(text) - len(text.rstrip(REPLACEMENT))
    return text[: len(text) - min(count, 3)]


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[int, int, str] | None:
    """Where the first stop string begins, its length and itself."""
    found = [(text.index(stop), len(stop), stop) for stop in stops if stop in text]
    return min(found, default=None)


def shown(text: str, stops: tuple[str, ...]) -> str:
    """A text without the longest suffix that a stop string begins with."""
    for start in range(len(text)):
        if any(len(stop) > len(text) - start and stop.startswith(text[start:]) for stop in stops):
            return text[:start]
    return text


def expected(of: Tokenizer, case: Case) -> tuple[Completion, list[str]]:
    """The completion, and what of its text is certain after each token, by decoding and searching
    the whole text each time.
    """
    before = len(certain(of.decode(case.prompt)))
    ends = {*case.stop_ids} if case.ignore_end else {*case.stop_ids, *of.end_ids}
    unspelt = {*case.stop_ids, *of.end_ids}
    spelt, after = list(case.prompt), []
    tokens = case.tokens[: case.max_tokens]
    for count, token in enumerate(tokens, start=1):
        if token not in unspelt:
            spelt.append(token)
        last = token in ends or count == len(case.tokens) or count == case.max_tokens
        whole = of.decode(spelt)[before:]
        if not last:
            # What is certain is counted over the prompt too.
            whole = certain(of.decode(spelt))[before:]
        stop = first_stop(whole, case.stop)
        match = token if token in ends else None
        if stop is not None:
            start, length, match = stop
            whole = whole[: start + length * case.include_stop]
        if match is not None or last:
            finish = "length" if match is None else "stop"
            after.append(whole)
            return Completion(whole, tuple(tokens[:count]), finish, stop_match=match), after
        after.append(shown(whole, case.stop))
    raise AssertionError("a case has a token")


def check(of: Tokenizer, case: Case) -> None:
    """Asserts that what is streamed, when, and the completion are as expected."""
    completion, after = expected(of, case)
    detokenizer = case.detokenizer(of)
    pieces = [detokenizer.push(token) for token in case.tokens]
    pieces.append(detokenizer.flush())
    assert detokenizer.finished
    assert detokenizer.completion() == completion
    assert "".join(pieces) == completion.text
    # As soon as it is certain, and no sooner; the last piece may come with `flush`.
    for count, text in enumerate(after[:-1], start=1):
        assert "".join(pieces[:count]) == text


def cases(kind: str) -> st.SearchStrategy[Case]:
    """Cases whose prompt and tokens are, until `with_ids`, parts: a text and how many of its ids
    are taken, or ids.
    """
    ids = st.integers(0, tokenizer(kind).vocab_size - 1)
    anything = st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT)
    texts = st.text(LETTERS, max_size=12) | st.text(anything, max_size=12)
    cut = st.tuples(texts, st.integers(0, 40))
    stops = st.text(LETTERS, min_size=1, max_size=4) | st.just(REPLACEMENT)
    return st.builds(
        Case,
        prompt=st.tuples(cut),
        # Bytes that are no text, control ids, spaces.
        tokens=st.lists(cut | st.lists(ids, max_size=6), max_size=5),
        stop=st.lists(stops, max_size=3).map(tuple),
        max_tokens=st.integers(1, 30),
        stop_ids=st.lists(ids, max_size=2).map(tuple),
        include_stop=st.booleans(),
        ignore_end=st.booleans(),
    )


def with_ids(of: Tokenizer, case: Case) -> Case:
    """Returns a case with the ids of its parts."""
    ids = {}
    for name in ("prompt", "tokens"):
        ids[name] = []
        for part in getattr(case, name):
            ids[name] += of.encode(part[0])[: part[1]] if isinstance(part, tuple) else part
    ids["tokens"] = ids["tokens"] or [0]
    return dataclasses.replace(case, **ids)


def check_many(kind: str, count: int) -> None:
    @settings(max_examples=count, deadline=None)
    @given(case=cases(kind))
    def holds(case: Case) -> None:
        check(tokenizer(kind), with_ids(tokenizer(kind), case))

    holds()


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_is_that_of_the_whole(kind):
    check_many(kind, 150)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_is_that_of_the_whole_in_many_cases(kind):
    check_many(kind, 1500)


def test_a_search_that_forgets_between_tokens_is_found_out(monkeypatch):
    """The control of the tests above."""
    case = Case([], [*b"xaby"], stop=("ab",))
    check(BYTES, case)
    push = StopString.push

    def forgetful(self: StopString, text: str) -> int | None:
        self.matched = 0
        return push(self, text)

    monkeypatch.setattr(StopString, "push", forgetful)
    with pytest.raises(AssertionError):
        check(BYTES, case)


def run(case: Case) -> tuple[list[str], Completion]:
    detokenizer = case.detokenizer(BYTES)
    pieces = [detokenizer.push(token) for token in case.tokens]
    return pieces, detokenizer.completion()


def test_only_a_suffix_that_may_become_a_stop_string_is_pending():
    pieces, _ = run(Case([], [*b"aababc"], stop=("abc", "bd")))
    #               a   aa   aab -> "ab"  aaba -> "a"  aabab  aababc: stop
    assert pieces == ["", "a", "", "ab", "", ""]


def test_a_stop_string_across_a_character_of_several_tokens_is_cut_at_its_first_letter():
    pieces, completion = run(Case([], [*"xyé!".encode()], stop=("yé",)))
    assert pieces == ["x", "", "", "", ""]
    assert (completion.text, completion.finish, completion.stop_match) == ("x", "stop", "yé")
    assert len(completion.tokens) == 4


def one_push(of: Tokenizer, stop: tuple[str, ...], include_stop: bool = False) -> Completion:
    """A completion of one token whose text has several letters."""
    token = next(i for i in range(of.vocab_size) if of.decode([*of.encode("a"), i]) == "athe")
    return Case(of.encode("a"), [token], stop, include_stop=include_stop).detokenizer(of), token


@pytest.mark.parametrize(
    ("stop", "text", "match"),
    [
        (("h", "the"), "", "the"),
        (("the", "h"), "", "the"),
        (("e", "h"), "t", "h"),
        (("he", "h"), "t", "h"),
    ],
)
def test_of_stop_strings_that_one_token_completes_the_first_one_ends_the_text(stop, text, match):
    of = tokenizer("huggingface")
    detokenizer, token = one_push(of, stop)
    assert detokenizer.push(token) == text
    assert detokenizer.completion().stop_match == match
    detokenizer, token = one_push(of, stop, include_stop=True)
    assert detokenizer.push(token) == text + match


def test_an_unfinished_character_at_max_tokens_is_the_same_streamed_and_not():
    first, second = "é".encode()
    pieces, completion = run(Case([], [*b"ab", first, second], max_tokens=3))
    assert pieces == ["a", "b", REPLACEMENT, ""]
    assert (completion.text, completion.finish) == ("ab" + REPLACEMENT, "length")
    pieces, _ = run(Case([], [*b"ab", first, second], max_tokens=4))
    assert pieces == ["a", "b", "", "é"]


def test_bytes_that_a_prompt_leaves_unfinished_belong_to_the_text():
    first, second = "é".encode()
    assert run(Case([*b"a", first], [second, *b"b"]))[0] == ["é", "b"]
    assert run(Case([*b"a", first], [*b"b"]))[0] == [REPLACEMENT + "b"]
    # U+FFFD itself is whole, and part of the prompt.
    assert run(Case([*"a\ufffd".encode()], [*b"b"]))[0] == ["b"]


def test_end_ids_and_stop_ids_end_the_text_and_are_no_part_of_it():
    _, completion = run(Case([], [*b"ab", BYTES.eos_id, *b"c"]))
    assert (completion.text, completion.stop_match) == ("ab", BYTES.eos_id)
    assert completion.tokens == (*b"ab", BYTES.eos_id)
    _, completion = run(Case([], [*b"abc"], stop_ids=(ord("b"),)))
    assert (completion.text, completion.finish, completion.stop_match) == ("a", "stop", ord("b"))


def test_ignored_end_ids_do_not_end_the_text_but_stop_ids_do():
    tokens = [*b"a", BYTES.eos_id, *b"bc"]
    _, completion = run(Case([], tokens, ignore_end=True, stop_ids=(ord("c"),)))
    assert (completion.text, completion.stop_match) == ("ab", ord("c"))
    assert completion.tokens == tuple(tokens)


def test_an_end_id_returns_what_a_stop_string_held_back():
    pieces, completion = run(Case([], [*b"xab", BYTES.eos_id], stop=("abc",)))
    assert pieces == ["x", "", "", "ab"]
    assert (completion.text, completion.stop_match) == ("xab", BYTES.eos_id)


class CountingTokenizer(ByteTokenizer):
    """Counts the ids that it decodes."""

    decoded = 0

    def decode(self, ids) -> str:
        self.decoded += len(ids)
        return super().decode(ids)


def work(tokens: list[int], stop: tuple[str, ...]) -> int:
    """Lines of code that run and ids that are decoded, for a text of these tokens."""
    of = CountingTokenizer()
    detokenizer = Detokenizer(of, [*b"prompt"], stop=stop, max_tokens=len(tokens) + 1)
    files = {text_module.__file__, sys.modules["research.data.tokenizers.streaming"].__file__}
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename not in files:
            return None
        lines += event == "line"
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        for token in tokens:
            detokenizer.push(token)
    finally:
        sys.settrace(previous)
    longest = max(len(value) for value in vars(detokenizer).values() if isinstance(value, str))
    assert longest <= max(map(len, stop)), "the text so far is searched again"
    return lines + of.decoded


@pytest.mark.parametrize(
    ("repeated", "stop"),
    [
        (b"abc d ", "abc !"),
        (b" ", "a"),
        (b"\n", "a"),
        (b"\x80", "a"),
        (b"\xf0", "a"),
        (b"\xe2\x82", "a"),
        (b"a", "a" * 60 + "b"),
        ([BYTES.pad_id], "a"),
    ],
    ids=repr,
)
def test_work_is_linear_in_the_tokens(repeated, stop):
    few = work(([*repeated] * 1000)[:1000], (stop,))
    many = work(([*repeated] * 4000)[:4000], (stop,))
    assert few > 1000
    assert many < 4.4 * few


def test_quadratic_work_is_counted(monkeypatch):
    """The control of the test above: a window that never moves on."""
    stream = sys.modules["research.data.tokenizers.streaming"].StreamDecoder
    monkeypatch.setattr(stream, "_move_on", lambda self: None)
    assert work([*b"a"] * 800, ("b",)) > 8 * work([*b"a"] * 200, ("b",))


@settings(max_examples=200, deadline=None)
@given(st.text("ab", min_size=1, max_size=6), st.lists(st.text("abc", max_size=5), max_size=8))
@example("aab", ["aaab"])
def test_a_string_is_found_in_pieces_as_in_the_whole(string, pieces):
    stop, before = StopString(string), ""
    for piece in pieces:
        end = stop.push(piece)
        whole = before + piece
        if string in whole:
            assert end == whole.index(string) + len(string) - len(before)
            return
        assert end is None
        lengths = range(min(len(string) - 1, len(whole)), 0, -1)
        assert stop.matched == next((n for n in lengths if whole.endswith(string[:n])), 0)
        before = whole
