"""A grammar that is none, or takes too much, ends its own request with one line and no other."""

import dataclasses
import sys

import numpy as np
import pytest

from research.core.errors import UserError
from research.inference.grammar import GrammarCompiler, Matcher
from research.inference.grammar_config import GrammarConfig, GrammarError, GrammarLimits
from research.inference.guided import masks_after
from research.inference.id_masks import mask_of
from tests.inference.grammar_cases import ORACLES, compiler, ids_of
from tests.inference.text_tokenizers import tokenizer

pytest.importorskip("llguidance")

# Its automaton has 2^13 states, and each random text needs some of them.
LARGE = GrammarConfig(regex="(a|b)*a(a|b){12}")
SMALL = GrammarLimits(lexer_states=600)


def until_error(matcher: Matcher, seed: int) -> int:
    """Tokens until the limits are reached."""
    tokens = np.random.default_rng(seed).integers(ord("a"), ord("c"), size=1000).tolist()
    count = 0

    def walk() -> None:
        nonlocal count
        for token in tokens:
            matcher.mask()
            assert matcher.accept(token)
            count += 1

    with pytest.raises(GrammarError, match=r"lexer error: too many states: 600"):
        walk()
    return count


def test_limits_end_a_request_with_one_line_and_no_other_request():
    of = GrammarCompiler(tokenizer("bytes"), limits=SMALL)
    first, second = of.matcher(LARGE), of.matcher(LARGE)
    copy = first.copy()
    counts = [until_error(first, 1), until_error(second, 2), until_error(copy, 1)]
    assert counts[0] == counts[2] > 20
    assert counts[1] > 20
    assert str(first.error()).count("\n") == 0


def test_what_llguidance_copies_shares_its_limits():
    """Why a matcher is compiled for each request: the control of the test above."""
    of = GrammarCompiler(tokenizer("bytes"), limits=SMALL)
    first = of.matcher(LARGE)
    copy = of.matcher(LARGE)
    copy.native = first.native.deep_copy()
    until_error(first, 1)
    assert until_error(copy, 2) == 0


def test_a_rejected_draft_takes_its_error_along():
    of = GrammarCompiler(tokenizer("bytes"), limits=SMALL)
    matcher = of.matcher(LARGE)
    count = until_error(matcher, 1)
    mask = mask_of([ord("a"), ord("b")], of.num_words)
    matcher.rollback(count - 5)
    np.testing.assert_array_equal(matcher.mask() & mask, mask)


def error_after(matcher: Matcher, of: GrammarCompiler, drafts: list[int]) -> GrammarError:
    """The error of the end id after drafts that were right."""
    masks = masks_after(of, {matcher: drafts})[matcher]
    # Whether the drafts are right is not known yet, so what comes after them is no error here.
    assert not isinstance(masks, GrammarError)
    assert len(masks) == 1 + len(drafts)
    assert all(matcher.accept(draft) for draft in drafts)
    with pytest.raises(GrammarError) as caught:
        matcher.accept(of.end_ids[0])
    return caught.value


@pytest.mark.parametrize("num_drafts", [1, 6])
@pytest.mark.parametrize(("seed", "may_end"), [(1, False), (2, True)])
def test_a_limit_reached_after_right_drafts_ends_a_text_where_it_does_without(
    seed: int, may_end: bool, num_drafts: int
):
    of = GrammarCompiler(tokenizer("bytes"), limits=SMALL)
    tokens = np.random.default_rng(seed).integers(ord("a"), ord("c"), size=1000).tolist()
    alone = of.matcher(LARGE)
    count = until_error(alone, seed)
    # The text may end where its 13th letter from the end is an a; but not beyond the limits.
    assert (tokens[count - 13] == ord("a")) == may_end

    drafting = of.matcher(LARGE)
    for token in tokens[: count - num_drafts]:
        drafting.mask()
        assert drafting.accept(token)
    error = error_after(drafting, of, tokens[count - num_drafts : count])
    assert str(error) == str(alone.error())


def test_masks_are_made_together_and_errors_are_their_own():
    of = GrammarCompiler(tokenizer("bytes"), limits=SMALL, threads=2)
    ended, started, fresh, broken = [of.matcher(LARGE) for _ in range(4)]
    for token in [*b"a" * 13, of.end_ids[0]]:
        assert ended.accept(token)
    started.accept(ord("b"))
    until_error(broken, 1)
    masks, errors = of.masks([ended, started, broken, fresh])
    assert [error is None for error in errors] == [True, True, False, True]
    for row, matcher in ((0, ended), (1, started), (3, fresh)):
        np.testing.assert_array_equal(masks[row], matcher.mask())
    assert ids_of(of, masks[0]) == [*of.end_ids]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "grammar: exactly one of json_schema, regex, choices, lark must be given, not 0."),
        ({"regex": "a", "lark": "b"}, "must be given, not 2."),
        ({"choices": []}, "choices = [] must be a list of at least one text."),
        ({"choices": "ab"}, "choices = 'ab' must be a list of at least one text."),
        ({"choices": ["a", 1]}, "choices = 1 must be text."),
        ({"choices": ["\ud800"]}, "choices: half a surrogate pair at character 0."),
        ({"json_schema": "{x"}, "json_schema = '{x' is no JSON: Expecting property name"),
        ({"json_schema": "[1]"}, "json_schema = '[1]' must be an object, true or false."),
        ({"json_schema": {"a": float("nan")}}, "is no JSON: Out of range float values"),
        ({"json_schema": {"a": {1}}}, "is no JSON: Object of type set"),
        ({"lark": '{"grammars": []}'}, "must be a grammar with the rule start."),
        ({"regex": "a("}, "regex = 'a(' cannot be compiled: at 1(8): invalid regex"),
        ({"regex": "a(?=b)"}, "look-around, including look-ahead and look-behind, is not"),
        ({"regex": r"[^\s\S]"}, "cannot be met: no token can come next."),
        ({"json_schema": {"type": "foo"}}, "cannot be compiled: Invalid type: foo."),
        ({"json_schema": False}, "cannot be compiled: Unsatisfiable schema"),
        ({"lark": "start: foo"}, 'cannot be compiled: at 1(8): unknown name: "foo".'),
        ({"lark": ""}, "lark = '' cannot be compiled: Empty grammar."),
    ],
)
def test_a_grammar_that_is_none_is_one_line(fields, message):
    with pytest.raises(UserError) as caught:
        compiler("bytes").matcher(GrammarConfig(**fields))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_grammar_beyond_its_limits_is_one_line():
    of = GrammarCompiler(tokenizer("bytes"), limits=GrammarLimits(letters=30))
    with pytest.raises(GrammarError, match=r"is longer than letters = 30\.$"):
        of.matcher(GrammarConfig(choices=("a" * 40,)))
    of = GrammarCompiler(tokenizer("bytes"), limits=GrammarLimits(symbols=5))
    with pytest.raises(GrammarError, match=r"^json_schema = .* cannot be compiled: "):
        of.matcher(ORACLES["json_schema"][0])
    with pytest.raises(UserError, match=r"^symbols = 0 must be at least 1\.$"):
        GrammarLimits(symbols=0)


def test_schemas_differ_by_the_order_of_their_properties():
    properties = {"a": {"const": 1}, "b": {"const": 2}}
    turned = dict(reversed(properties.items()))
    one, other = [
        GrammarConfig(json_schema={"properties": each, "required": ["a", "b"]})
        for each in (properties, turned)
    ]
    assert one != other
    assert one == dataclasses.replace(one)
    assert hash(one) == hash(dataclasses.replace(one))


def test_without_the_library_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '.\[grammar\]'"):
        GrammarCompiler(tokenizer("bytes"))
