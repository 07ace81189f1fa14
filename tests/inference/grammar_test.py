"""Grammars: under the masks come those texts that an independent check accepts, and all of them."""

import json
import sys
import threading
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.inference.grammar import GrammarCompiler, Matcher
from research.inference.grammar_config import GrammarConfig, GrammarError
from research.inference.id_masks import mask_of, unpack_bits
from research.inference.text import Detokenizer
from tests.inference.grammar_cases import (
    CHOICES,
    ORACLES,
    REGEXES,
    compiler,
    ids_of,
    is_instance,
    sampled,
)
from tests.inference.text_tokenizers import KINDS, tokenizer

pytest.importorskip("llguidance")


def text_of(kind: str, ids: list[int]) -> str:
    """The text of an answer, as a detokenizer gives it."""
    of = tokenizer(kind)
    detokenizer = Detokenizer(of, of.encode("a"), stop=(), max_tokens=1000)
    text = "".join(detokenizer.push(token) for token in ids)
    assert text.encode() == b"".join(of.bytes_of(i) or b"" for i in ids)
    return text


@pytest.mark.parametrize("grammar", ORACLES)
@pytest.mark.parametrize("kind", [*KINDS, "no_bytes"])
def test_texts_drawn_under_the_masks_meet_the_grammar(kind, grammar):
    config, accepts = ORACLES[grammar]
    try:
        compiler(kind).matcher(config)
    except GrammarError:
        assert kind == "no_bytes", "a tokenizer with all bytes spells every text"
        return
    texts = set()
    for seed in range(12):
        try:
            ids = sampled(compiler(kind), compiler(kind).matcher(config), seed)
        except GrammarError:
            assert kind == "no_bytes", "the way leads to a character that others have"
            continue
        if ids is not None:
            texts.add(text_of(kind, ids))
    assert all(accepts(text) for text in texts), texts
    assert texts or kind == "no_bytes"


def test_texts_drawn_under_a_mask_of_all_ids_do_not(monkeypatch):
    """The control."""
    of = compiler("bytes")
    everything = mask_of(range(of.num_ids), of.num_words)
    monkeypatch.setattr(Matcher, "mask", lambda self: everything)
    monkeypatch.setattr(Matcher, "accept", lambda self, token: True)
    monkeypatch.setattr(Matcher, "finished", True)
    found = [sampled(of, of.matcher(ORACLES["json_schema"][0]), seed) for seed in range(3)]
    texts = [tokenizer("bytes").decode(ids) for ids in found if ids is not None]
    assert not any(map(is_instance, texts))


def walked(kind: str, matcher: Matcher, data: bytes, stuck: set[int] | None = None) -> bool:
    """Whether the bytes can be written by tokens that the masks allow, and the text then end.

    Longer tokens are tried first; `stuck` has how many bytes were left where nothing went on.
    """
    of = tokenizer(kind)
    stuck = set() if stuck is None else stuck
    allowed = ids_of(compiler(kind), matcher.mask())
    if not data:
        return bool(set(allowed) & set(of.end_ids))
    fitting = [i for i in allowed if data.startswith(of.bytes_of(i) or b"\xff")]
    for token in sorted(fitting, key=lambda i: -len(of.bytes_of(i))):
        rest = data[len(of.bytes_of(token)) :]
        if len(rest) in stuck:
            continue
        assert matcher.accept(token)
        if walked(kind, matcher, rest, stuck):
            return True
        matcher.rollback(1)
    stuck.add(len(data))
    return False


def instance_text(name: str, age: int, tags: list[str | None] | None) -> str:
    value = {"name": name, "age": age}
    if tags is not None:
        value["tags"] = tags
    return json.dumps(value, ensure_ascii=False)


TEXTS = {
    "json_schema": st.builds(
        instance_text,
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=5),
        st.integers(0, 150),
        st.none() | st.lists(st.sampled_from(["a", "bc", None]), max_size=2),
    ),
    "choices": st.sampled_from(CHOICES),
    "lark": st.tuples(st.integers(0, 6), st.integers(0, 999)).map(
        lambda drawn: "(" * drawn[0] + str(drawn[1]) + ")" * drawn[0]
    ),
}
for _index, _regex in enumerate(REGEXES):
    TEXTS[f"regex{_index}"] = st.from_regex(_regex, fullmatch=True)


@pytest.mark.parametrize("grammar", ORACLES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_text_that_meets_the_grammar_can_be_written(kind, grammar):
    config, accepts = ORACLES[grammar]

    @settings(max_examples=15, deadline=None)
    @given(TEXTS[grammar])
    def holds(text: str) -> None:
        assert accepts(text)
        assert walked(kind, compiler(kind).matcher(config), text.encode())
        # The control: a text with something after it, where the grammar has an end.
        if not accepts(text + "\x07"):
            assert not walked(kind, compiler(kind).matcher(config), text.encode() + b"\x07")

    holds()


@pytest.mark.parametrize("grammar", ["json_schema", "lark", "regex2", "choices"])
@pytest.mark.parametrize("kind", ["bytes", "bpe", "llama", "huggingface"])
def test_after_a_rollback_masks_are_those_of_a_text_that_never_went_there(kind, grammar):
    of = compiler(kind)
    config = ORACLES[grammar][0]

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from("aaarfm"), st.integers(0, 10**6)), max_size=14))
    def holds(operations: list[tuple[str, int]]) -> None:
        matcher, tokens = of.matcher(config), []
        for name, number in operations:
            if name == "a":
                allowed = ids_of(of, matcher.mask())
                token = allowed[number % len(allowed)]
                if matcher.accept(token):
                    tokens.append(token)
            elif name == "r":
                count = number % (len(tokens) + 1)
                matcher.rollback(count)
                tokens = tokens[: len(tokens) - count]
            elif name == "f":
                matcher.forced()
            else:
                matcher.mask()
        fresh = of.matcher(config)
        assert all(map(fresh.accept, tokens))
        np.testing.assert_array_equal(matcher.mask(), fresh.mask())
        assert matcher.finished == fresh.finished
        assert matcher.forced() == fresh.forced()
        np.testing.assert_array_equal(matcher.copy().mask(), fresh.mask())

    holds()


@pytest.mark.parametrize("kind", KINDS)
def test_forced_tokens_are_the_only_ones_allowed(kind):
    of = compiler(kind)
    count = 0
    for grammar in ("json_schema", "choices", "regex0", "regex2", "regex3"):
        for seed in range(4):
            ids = sampled(of, of.matcher(ORACLES[grammar][0]), seed) or []
            matcher = of.matcher(ORACLES[grammar][0])
            for token in ids:
                forced = matcher.forced()
                for each in forced:
                    assert ids_of(of, matcher.mask()) == [each]
                    assert matcher.accept(each)
                matcher.rollback(len(forced))
                count += len(forced)
                assert matcher.accept(token)
    assert count > 20


def test_not_more_tokens_are_forced_than_asked_for():
    matcher = compiler("bytes").matcher(GrammarConfig(regex="a{200}"))
    assert matcher.forced(3) == [*b"aaa"]
    assert len(matcher.forced()) == 32


def test_a_token_that_may_not_come_is_not_accepted_and_changes_nothing():
    of = compiler("bytes")
    matcher = of.matcher(GrammarConfig(regex="ab+"))
    for token in (ord("b"), of.end_ids[0], 256, -1, of.num_ids, of.num_ids + 1):
        assert not matcher.accept(token)
    assert matcher.accept(ord("a"))
    assert ids_of(of, matcher.mask()) == [ord("b")]


def test_an_end_id_is_allowed_exactly_where_the_grammar_may_end():
    of = compiler("bytes")
    end = of.end_ids[0]
    matcher = of.matcher(GrammarConfig(regex="ab+"))
    found = []
    for token in b"abb":
        found.append(end in ids_of(of, matcher.mask()))
        matcher.accept(token)
    assert found == [False, False, True]
    assert matcher.accept(end)
    assert matcher.finished
    assert not matcher.accept(ord("b"))
    assert ids_of(of, matcher.mask()) == [end]
    matcher.rollback(2)
    assert not matcher.finished
    assert ids_of(of, matcher.mask()) == [ord("b"), end]


def test_every_end_id_ends_a_text_and_has_no_letters_in_it(monkeypatch):
    of = tokenizer("plain")
    monkeypatch.setattr(of, "further_end_ids", (ord("d"), 9999))
    ends = GrammarCompiler(of)
    matcher = ends.matcher(GrammarConfig(regex="a[cd]?"))
    assert matcher.accept(ord("a"))
    assert ids_of(ends, matcher.mask()) == [ord("c"), ord("d"), of.eos_id]
    assert matcher.accept(ord("d"))
    assert matcher.finished
    with pytest.raises(GrammarError):
        ends.matcher(GrammarConfig(regex="d"))


def test_a_tokenizer_without_end_ids_is_told_by_finished(monkeypatch):
    of = tokenizer("plain")
    monkeypatch.setattr(of, "eos_id", None)
    # One word more than the ids of 256 bytes have: the end's own.
    endless = GrammarCompiler(of, num_ids=256)
    matcher = endless.matcher(GrammarConfig(regex="ab"))
    assert matcher.accept(ord("a"))
    assert matcher.accept(ord("b"))
    assert matcher.finished
    assert matcher.forced() == ids_of(endless, matcher.mask()) == []
    with pytest.raises(GrammarError, match="is met by the empty text alone"):
        endless.matcher(GrammarConfig(choices=("",)))


def test_ids_beyond_those_that_may_be_drawn_are_not_allowed():
    of = tokenizer("huggingface")
    few = GrammarCompiler(of, num_ids=270)
    matcher = few.matcher(GrammarConfig(regex="the cat"))
    while not matcher.finished:
        forced = matcher.forced()
        assert max(ids_of(few, matcher.mask())) < 270
        assert matcher.accept(forced[0])


def test_control_tokens_are_text_only_where_they_are_spelt():
    of = compiler("huggingface")
    name = "<|im_end|>"
    token = tokenizer("huggingface").id_of(name)
    spelt = of.matcher(GrammarConfig(choices=(name,)))
    assert token not in ids_of(of, spelt.mask())
    named = of.matcher(GrammarConfig(lark=f'start: "a" {name}'))
    assert named.accept(tokenizer("huggingface").encode("a")[0])
    assert ids_of(of, named.mask()) == [token]


def test_an_end_id_that_a_grammar_names_can_be_taken_back():
    of = compiler("huggingface")
    matcher = of.matcher(GrammarConfig(lark='start: "a" <|endoftext|>'))
    assert matcher.accept(tokenizer("huggingface").encode("a")[0])
    before = matcher.mask()
    assert ids_of(of, before) == [*of.end_ids]
    assert matcher.accept(of.end_ids[0])
    assert matcher.finished
    matcher.rollback(1)
    np.testing.assert_array_equal(matcher.mask(), before)
    matcher.rollback(1)
    np.testing.assert_array_equal(matcher.mask(), of.matcher(matcher._config).mask())


def test_copies_share_nothing():
    of = compiler("bytes")
    matcher = of.matcher(ORACLES["json_schema"][0])
    matcher.accept(ord("{"))
    copy = matcher.copy()
    before = matcher.mask()
    for token in b'"name":"x"':
        assert copy.accept(token)
    np.testing.assert_array_equal(matcher.mask(), before)
    copy.rollback(10)
    np.testing.assert_array_equal(copy.mask(), before)


def test_masks_can_be_made_in_another_thread():
    of = compiler("huggingface")
    matchers = [of.matcher(ORACLES["json_schema"][0]) for _ in range(3)]
    for matcher in matchers:
        # What is forced then is encoded by the tokenizer, in that thread.
        assert matcher.accept(tokenizer("huggingface").encode("{")[0])
    made = []
    thread = threading.Thread(target=lambda: made.append(of.masks(matchers)))
    thread.start()
    thread.join(timeout=60)
    np.testing.assert_array_equal(made[0][0][2], matchers[2].mask())


def others_run_meanwhile(call: Callable[[], object]) -> bool:
    """Whether this thread runs while another one is in `call`, although the interpreter does not
    take its lock from a thread that holds it.
    """
    begun, done = threading.Event(), []

    def work() -> None:
        begun.set()
        call()
        done.append(True)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        begun.wait()
        return not done
    finally:
        sys.setswitchinterval(interval)
        thread.join()


def test_masks_are_made_without_the_interpreters_lock():
    of = compiler("bpe")
    matchers = [of.matcher(ORACLES["json_schema"][0]) for _ in range(300)]
    for matcher in matchers:
        assert matcher.accept(tokenizer("bpe").encode("{")[-1])
    # A busy machine may be late.
    assert any(others_run_meanwhile(lambda: of.masks(matchers)) for _ in range(5))
    # The control: a call that keeps the lock.
    assert not any(others_run_meanwhile(lambda: sum(range(10**6))) for _ in range(5))


def test_masks_are_unpacked_on_the_device():
    of = compiler("bpe")
    matcher = of.matcher(ORACLES["json_schema"][0])
    mask = matcher.mask()
    allowed = np.asarray(unpack_bits(jnp.asarray(mask)[None], of.num_ids))
    assert allowed.shape == (1, of.num_ids)
    assert np.flatnonzero(allowed[0]).tolist() == ids_of(of, mask)


def test_a_grammar_is_compiled_once_and_the_last_used_are_kept(monkeypatch):
    of = GrammarCompiler(tokenizer("bytes"), cached=2)
    compiled, compile_ = [], of._compile
    monkeypatch.setattr(of, "_compile", lambda config: compiled.append(config) or compile_(config))
    a, b, c = [GrammarConfig(choices=(name,)) for name in "abc"]
    for config in (a, b, a, GrammarConfig(choices=["a"]), c, a, b):
        of.matcher(config)
    assert compiled == [a, b, c, b]
