"""The search itself, beside plain loops, brute force and searches that are broken on purpose."""

import itertools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.errors import UserError
from research.inference.beam_config import BeamConfig
from research.inference.beam_search import BeamSearch, Hypothesis, completions

STATES, EOS = 97, 1
PROMPTS = ([3], [2, 5, 2, 5, 0], [4, 4, 0])


def number(ids: Any) -> int:
    """The state of a model after these tokens: its logits, a row of a table, depend on all of
    them.
    """
    state = 0
    for position, token in enumerate(ids):
        state = (7 * state + 31 * int(token) + 13 * position + 1) % STATES
    return state


def table(ids: int, seed: int = 0) -> np.ndarray:
    """Logits by state, of a model sure enough that beams differ."""
    return 2 * np.random.default_rng(seed).standard_normal((STATES, ids)).astype(np.float32)


def search_one(
    log_p: np.ndarray,
    prompt: list[int],
    beams: BeamConfig,
    ends: Any = (EOS,),
    num_ids: int | None = None,
    *,
    forgets: bool = False,
) -> list[Hypothesis]:
    """Runs the search of one prompt. One that forgets leaves the state of each hypothesis where it
    is, whichever goes on there.
    """
    found = BeamSearch(prompt, beams, num_ids or log_p.shape[1], ends)
    states = [number(prompt)]
    while found.active:
        rows = np.where(found.allowed(), log_p[states][:, : num_ids or None], -np.inf)
        order = np.argsort(-rows, axis=1, kind="stable")[:, : found.num_candidates]
        found.advance(order, np.take_along_axis(rows, order, axis=1))
        parents = [each.parent for each in found.running]
        if forgets:
            parents = [min(row, len(states) - 1) for row in range(len(parents))]
        places = [len(prompt) + len(each.tokens) - 1 for each in found.running]
        states = [
            (7 * states[parent] + 31 * each.tokens[-1] + 13 * place + 1) % STATES
            for parent, each, place in zip(parents, found.running, places, strict=True)
        ]
    return found.hypotheses()


def search(
    params: np.ndarray, beams: BeamConfig, prompts: Any = PROMPTS, ends: Any = (EOS,), **how: Any
) -> list[list[Hypothesis]]:
    """Runs the search of each prompt."""
    log_p = np.asarray(jax.nn.log_softmax(params))
    return [search_one(log_p, prompt, beams, ends, **how) for prompt in prompts]


def allowed(ids: list[int], made: int, token: int, beams: BeamConfig, ends: Any = (EOS,)) -> bool:
    """Whether `token` may follow `ids`, as the rules are told in words."""
    if token in ends and made < beams.min_tokens:
        return False
    size = beams.no_repeat_ngram
    grams = {tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)} if size else set()
    return not size or tuple([*ids, token][-size:]) not in grams


def extensions(
    log_p: np.ndarray, prompt: list[int], new: list[int], beams: BeamConfig, ends: Any = (EOS,)
) -> list[tuple[np.float32, int]]:
    """Log p and id of each token that may come next."""
    row = log_p[number([*prompt, *new])]
    made = len(new)
    bos = [] if beams.forced_bos is None else [beams.forced_bos]
    forced = [*bos, *beams.forced_prefix]
    may = [i for i in range(len(row)) if allowed([*prompt, *new], made, i, beams, ends)]
    if made < len(forced):
        free = made < len(bos) or forced[made] not in may
        return [(np.float32(0.0) if free else row[forced[made]], forced[made])]
    if beams.forced_eos and made == beams.max_tokens - 1:
        return [(np.float32(0.0), ends[0])]
    return [(row[i], i) for i in may]


def plain_search(
    params: np.ndarray, prompt: list[int], beams: BeamConfig, ends: Any = (EOS,)
) -> list[Hypothesis]:
    """Beam search in loops."""
    log_p = np.asarray(jax.nn.log_softmax(params))
    running, done = [(np.float32(0.0), [])], []
    for made in range(1, beams.max_tokens + 1):
        found = [
            (total + value, [*new, token])
            for total, new in running
            for value, token in extensions(log_p, prompt, new, beams, ends)
        ]
        found.sort(key=lambda item: -item[0])
        running = []
        for rank, (total, new) in enumerate(found[: (len(ends) + 1) * beams.num_beams]):
            if new[-1] not in ends and made < beams.max_tokens:
                running.append((total, new))
            elif rank < beams.num_beams:
                done.append(
                    Hypothesis(
                        tuple(new),
                        float(total / np.float32(made) ** np.float32(beams.length_penalty)),
                    )
                )
        running = running[: beams.num_beams]
        done.sort(key=lambda hypothesis: -hypothesis.score)
        done = done[: beams.num_beams]
        full = len(done) == beams.num_beams
        length = (
            beams.max_tokens
            if beams.early_stopping == "never" and beams.length_penalty > 0
            else made
        )
        hopeless = full and (
            not running or running[0][0] / length**beams.length_penalty <= done[-1].score
        )
        if not running or hopeless or (full and beams.early_stopping is True):
            break
    return done[: beams.num_return]


def every_text(params: np.ndarray, prompt: list[int], beams: BeamConfig) -> list[Hypothesis]:
    """All finished hypotheses, best first."""
    log_p = np.asarray(jax.nn.log_softmax(params), np.float64)
    found = []
    for length in range(1, beams.max_tokens + 1):
        for new in itertools.product(range(params.shape[1]), repeat=length):
            ends = new[-1] == EOS or length == beams.max_tokens
            fits = all(allowed([*prompt, *new[:i]], i, token, beams) for i, token in enumerate(new))
            if ends and EOS not in new[:-1] and fits:
                total = sum(
                    log_p[number([*prompt, *new[:i]])][token] for i, token in enumerate(new)
                )
                found.append(Hypothesis(tuple(new), total / length**beams.length_penalty))
    return sorted(found, key=lambda hypothesis: -hypothesis.score)


def assert_same(found: list[Hypothesis], wanted: list[Hypothesis]) -> None:
    assert [one.tokens for one in found] == [one.tokens for one in wanted]
    np.testing.assert_allclose(
        [one.score for one in found], [one.score for one in wanted], rtol=1e-5
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(1, 0), (2, 2), (3, 0), (4, 1), (4, 3)]),
    penalty=st.sampled_from([-1.0, 0.0, 0.6, 1.0, 2.0]),
    early=st.sampled_from([False, True, "never"]),
    min_tokens=st.integers(0, 4),
    max_tokens=st.integers(4, 7),
    forced=st.sampled_from(
        [{}, {"forced_prefix": (5, 2)}, {"forced_bos": 2, "forced_prefix": (5,)}]
    ),
    forced_eos=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_beams_are_those_of_plain_loops(
    shape, penalty, early, min_tokens, max_tokens, forced, forced_eos, seed
):
    beams = BeamConfig(
        num_beams=shape[0],
        no_repeat_ngram=shape[1],
        length_penalty=penalty,
        early_stopping=early,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        num_return=shape[0],
        forced_eos=forced_eos,
        **forced,
    )
    params = table(12, seed)
    wanted = [plain_search(params, prompt, beams) for prompt in PROMPTS]
    for found, best in zip(search(params, beams), wanted, strict=True):
        assert_same(found, best)


@pytest.mark.parametrize(
    "rules", [{}, {"min_tokens": 3}, {"forced_eos": True}, {"early_stopping": True}]
)
def test_beams_end_at_any_of_several_ids(rules):
    ends = (EOS, 0, 7)
    beams = BeamConfig(num_beams=3, max_tokens=6, num_return=3, **rules)
    params = table(12)
    params[:, ends] += 3  # all beams may end at once, in every way
    found = search(params, beams, ends=ends)
    for best, prompt in zip(found, PROMPTS, strict=True):
        assert_same(best, plain_search(params, prompt, beams, ends))
    last = {one.tokens[-1] for best in found for one in best}
    assert last & {0, 7}
    assert [best[0].tokens for best in search(params, beams)] != [
        best[0].tokens for best in found
    ]  # the control


@pytest.mark.parametrize(
    "rules", [{}, {"no_repeat_ngram": 2}, {"no_repeat_ngram": 1}, {"min_tokens": 2}]
)
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_beams_as_many_as_texts_find_the_best_of_all_texts(rules, penalty):
    # A width of V² · (V - 1) holds every text of 3 tokens; half of the candidates may end.
    beams = BeamConfig(
        num_beams=64,
        max_tokens=3,
        length_penalty=penalty,
        early_stopping="never",
        num_return=6,
        **rules,
    )
    for found, prompt in zip(search(table(4), beams, ([3], [2, 0])), ([3], [2, 0]), strict=True):
        assert_same(found, every_text(table(4), prompt, beams)[:6])


def test_one_beam_misses_the_best_of_all_texts():  # the control
    beams = BeamConfig(num_beams=1, max_tokens=3, length_penalty=0.0, early_stopping="never")
    missed = [
        search(table(4, seed), beams, ([3],))[0][0] != every_text(table(4, seed), [3], beams)[0]
        for seed in range(9)
    ]
    assert any(missed)


def test_states_that_stay_where_they_are_give_other_texts():  # the control
    beams = BeamConfig(num_beams=3, max_tokens=7, num_return=3, no_repeat_ngram=2)
    assert search(table(12), beams, forgets=True) != search(table(12), beams)


def test_no_ngram_stands_twice_with_those_of_the_prompt():
    for size in (2, 3):
        free, strict = (
            search(table(4), BeamConfig(num_beams=2, max_tokens=7, min_tokens=7, no_repeat_ngram=n))
            for n in (0, size)
        )
        assert free != strict
        for (best,), prompt in zip(strict, PROMPTS, strict=True):
            ids = [*prompt, *best.tokens]
            grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
            late = grams[len(prompt) - size + 1 :] if len(prompt) >= size else grams
            assert not [gram for gram in late if grams.count(gram) > 1]


def test_repeats_are_those_that_complete_an_ngram():
    for tokens, wanted in (
        ([1, 2, 3, 1, 2], {0: set(), 1: {1, 2, 3}, 3: {3}, 9: set()}),
        ([5, 5], {1: {5}, 2: {5}, 3: set()}),
    ):
        for size, ids in wanted.items():
            assert set(completions(tokens, size)) == ids


def test_equal_continuations_go_by_beam_and_then_by_id():
    beams = BeamConfig(num_beams=3, max_tokens=2, min_tokens=2, num_return=3)
    [found] = search(np.zeros((STATES, 12), np.float32), beams, ([3],))
    assert [one.tokens for one in found] == [(0, 0), (0, 2), (0, 3)]


def test_ids_past_the_last_are_not_chosen_and_weigh_all_the_same():
    params = table(12)
    beams = BeamConfig(num_beams=2, max_tokens=5, length_penalty=0.0)
    [[few]] = search(params, beams, ([3],), num_ids=4)
    assert max(few.tokens) < 4
    log_p = jax.nn.log_softmax(params)
    terms = [log_p[number([3, *few.tokens[:i]]), token] for i, token in enumerate(few.tokens)]
    assert few.score == pytest.approx(float(sum(terms)), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_beams": 0}, "num_beams = 0 must be at least 1."),
        ({"max_tokens": 0}, "max_tokens = 0 must be at least 1."),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens = 9 must lie in [0, max_tokens = 8]."),
        ({"length_penalty": float("nan")}, "length_penalty = nan must be a finite number."),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram = -1 must not be below 0."),
        ({"num_return": 5}, "num_return = 5 must lie in [1, num_beams = 4]."),
        ({"max_tokens": 2, "forced_prefix": (2, 3)}, None),
        (
            {"max_tokens": 2, "forced_prefix": (2, 3), "forced_eos": True},
            "max_tokens = 2 must be at least 3, the number of forced ids.",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, said):
    if said is None:
        BeamConfig(**fields)
        return
    with pytest.raises(UserError) as caught:
        BeamConfig(**fields)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"forced_prefix": (3, 12)},
            "forced_prefix: id 12 is out of range: it must lie in [0, 12).",
        ),
        ({"forced_bos": -1}, "forced_bos: id -1 is out of range: it must lie in [0, 12)."),
        (
            {"forced_prefix": (EOS,)},
            "forced_prefix: id 1 is the end of text, which nothing can follow.",
        ),
    ],
)
def test_forced_ids_that_cannot_be_are_refused(fields, said):
    with pytest.raises(UserError) as caught:
        search(table(12), BeamConfig(max_tokens=4, **fields))
    assert str(caught.value) == said


def test_forced_end_needs_an_end():
    beams = BeamConfig(max_tokens=4, forced_eos=True)
    with pytest.raises(
        UserError, match="forced_eos = True needs a tokenizer that has an end-of-text id"
    ):
        BeamSearch([3], beams, 12, ())


def test_rules_that_leave_no_text_are_named():
    beams = BeamConfig(num_beams=2, max_tokens=7, min_tokens=7, no_repeat_ngram=1)
    with pytest.raises(UserError) as caught:
        search(table(4), beams, ([3],))
    assert str(caught.value) == (
        "no_repeat_ngram = 1 with min_tokens = 7 leaves no continuation of max_tokens = 7."
    )
