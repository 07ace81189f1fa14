"""A million draws of each sampler follow its distribution, with guesses and without."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from research.inference import drawing
from research.inference.drawing import Allowed, draw_rows, draw_step
from research.inference.sampling_config import SamplingConfig, SamplingParams
from research.inference.slots import Slots, StepRows, empty_slots
from tests.inference.sampling_test import softmax

VOCAB = 12
SLOTS = 4096
DRAWS = 1_000_000
# Logits after each id, of a model of pairs, and of another one that guesses.
TABLE = np.random.default_rng(3).normal(size=(VOCAB, VOCAB)).astype(np.float32) * 1.5
GUESSES = (TABLE + np.random.default_rng(4).normal(size=TABLE.shape)).astype(np.float32)
SAMPLERS = {
    "temperature": SamplingConfig(temperature=0.7),
    "top-k": SamplingConfig(top_k=4),
    "top-p": SamplingConfig(top_p=0.8),
    "min-p": SamplingConfig(min_p=0.1),
    "typical": SamplingConfig(typical_p=0.7),
}


def distribution(logits: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """The probability of each id, by sorting in float64."""
    p = softmax(logits.astype(np.float64) / config.temperature)
    order = np.argsort(-p)
    kept = np.zeros(VOCAB, bool)
    if config.top_k:
        kept[order[: config.top_k]] = True
    elif config.top_p < 1:
        kept[order[: np.searchsorted(np.cumsum(p[order]), config.top_p) + 1]] = True
    elif config.typical_p < 1:
        surprise = np.abs(-np.log(p) + (p * np.log(p)).sum())
        order = np.argsort(surprise)
        kept[order[: np.searchsorted(np.cumsum(p[order]), config.typical_p) + 1]] = True
    else:
        kept = p >= config.min_p * p.max()
    return np.where(kept, p, 0.0) / p[kept].sum()


def rows_of(slots: Slots, position: jax.Array) -> StepRows:
    """Returns a row for the newest token of each slot, and one for each draft."""
    count, drafts = slots.drafts.shape
    # 2 slots with 2 drafts -> slots 0 0 0 1 1 1, drafts 0 1 2 0 1 2
    slot = jnp.repeat(jnp.arange(count), 1 + drafts)
    draft = jnp.tile(jnp.arange(1 + drafts), count)
    tokens = jnp.concatenate([slots.newest[:, None], slots.drafts], axis=1)
    unused = jnp.full_like(slot, -1)
    always = jnp.ones(slot.shape, bool)
    return StepRows(
        slot, position[slot] + draft, tokens.ravel(), draft, always, unused, unused, ~always
    )


def guess(slots: Slots, position: jax.Array) -> Slots:
    """Returns the slots with guesses, drawn with the noise of the tokens to come."""
    slot = jnp.arange(len(slots.newest))
    token = slots.newest
    no = jnp.zeros(slot.shape, bool)
    for index in range(slots.drafts.shape[1]):
        draft = jnp.full_like(slot, index)
        row = StepRows(slot, position + index, token, draft, ~no, draft, draft, no)
        token = draw_rows(jnp.asarray(GUESSES)[token], row, slots, 1).token
        slots = slots.replace(drafts=slots.drafts.at[:, index].set(token))
    return slots


def count_pairs(config: SamplingConfig, drafts: int, count: int = SLOTS) -> np.ndarray:
    """Returns how often each id was followed by each, in a million draws and more."""
    empty = empty_slots(count, VOCAB, drafts)
    keys = jax.vmap(lambda seed: jax.random.key_data(jax.random.key(seed)))(jnp.arange(count))
    sampling = SamplingParams.of([config] * count)
    start = empty.replace(keys=keys, sampling=sampling, newest=jnp.arange(count) % VOCAB)
    width = 1 + drafts
    order = jnp.arange(count * width)
    words = start.rules.allowed
    nothing = Allowed(jnp.full(count, count), words)

    def step(_: Any, carry: tuple[Slots, jax.Array, jax.Array]) -> tuple[Slots, Any, Any]:
        slots, position, pairs = carry
        slots = guess(slots, position)
        rows = rows_of(slots, position)
        logits = jnp.asarray(TABLE)[rows.token]
        found = draw_step(
            slots, rows, logits, order, jnp.int32(len(order)), nothing, group=len(order), num_top=1
        )
        slots, drawn, accepted = found
        # Drafts [7, 8, 9] of which one is right, after 5: pairs (5, 7) and (7, drawn).
        before = rows.token.reshape(count, width)
        after = drawn.token.reshape(count, width)
        is_new = jnp.arange(width)[None, :] <= accepted[:, None]
        last = jnp.arange(width)[None, :] == accepted[:, None]
        after = jnp.where(last, after, jnp.roll(before, -1, axis=1))
        pairs = pairs.at[before, after].add(is_new.astype(jnp.int32))
        return slots, position + accepted + 1, pairs

    @jax.jit
    def run(slots: Slots) -> jax.Array:
        def more(carry: tuple[Slots, jax.Array, jax.Array]) -> jax.Array:
            return carry[2].sum() < DRAWS

        position = jnp.zeros(count, jnp.int32)
        pairs = jnp.zeros((VOCAB, VOCAB), jnp.int32)
        return jax.lax.while_loop(more, functools.partial(step, None), (slots, position, pairs))[2]

    return np.asarray(run(start))


def p_value(pairs: np.ndarray, config: SamplingConfig) -> float:
    """Returns how likely counts as far from a sampler's distribution are."""
    rows = np.stack([distribution(logits, config) for logits in TABLE])
    assert (pairs[rows == 0] == 0).all()
    expected = rows * pairs.sum(axis=1, keepdims=True)
    statistic = ((pairs - expected)[rows > 0] ** 2 / expected[rows > 0]).sum()
    degrees = (rows > 0).sum() - VOCAB
    return scipy.stats.chi2.sf(statistic, degrees)


@pytest.mark.thorough
@pytest.mark.parametrize("drafts", [0, 2], ids=["alone", "guessed"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_million_draws_follow_the_sampler(sampler: str, drafts: int):
    config = SAMPLERS[sampler]
    pairs = count_pairs(config, drafts)
    assert pairs.sum() >= DRAWS
    assert p_value(pairs, config) > 1e-3


@pytest.mark.thorough
def test_a_sampler_that_is_a_little_warmer_is_found():  # the control
    pairs = count_pairs(SamplingConfig(temperature=0.71), 0)
    assert p_value(pairs, SAMPLERS["temperature"]) < 1e-9


@pytest.mark.thorough
def test_guesses_that_are_taken_unasked_are_found(monkeypatch):  # the control
    accept = drawing.accept

    def unasked(slots: Slots, rows: StepRows, token: jax.Array) -> tuple[Slots, jax.Array]:
        # What is drawn from the newest token and from each draft but the last: the next draft.
        given = jnp.roll(rows.token, -1)
        width = 1 + slots.drafts.shape[1]
        return accept(slots, rows, jnp.where(rows.draft < width - 1, given, token))

    monkeypatch.setattr(drawing, "accept", unasked)
    # As many slots as no other test has, for which the step is traced anew.
    pairs = count_pairs(SAMPLERS["temperature"], 2, count=4000)
    assert p_value(pairs, SAMPLERS["temperature"]) < 1e-9
