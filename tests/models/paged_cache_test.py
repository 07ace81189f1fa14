"""A paged cache gives what a dense one gives, for every model that makes text."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.inference.prefill import next_logits, prefill
from research.inference.prompts import Prompts
from research.kernels.decode_attention import PAGE_SIZE
from research.models.cache import Cache
from research.models.config import ModelConfig, PositionConfig
from research.models.paged_cache import PageTable, contiguous_table
from tests.models.variants import VARIANTS
from tests.models.variants_test import scanned
from tests.tiny import random_params, random_tokens, tiny_config

# Prompts of one, two and three pages; the second fills its last page.
LENGTHS, STEPS, SLOTS = (5, 2 * PAGE_SIZE, 2 * PAGE_SIZE + 3), 3, 4 * PAGE_SIZE
MODELS = VARIANTS | {
    "alibi": tiny_config(position=PositionConfig(kind="alibi")),
    "multi-query": tiny_config(attention={"num_kv_heads": 1}),
    "learned positions": tiny_config(position=PositionConfig(kind="learned")),
}
# All that make text.
PAGED = [name for name, config in MODELS.items() if config.structure != "encoder"]


def prompts_for(config: ModelConfig) -> Prompts:
    """Prompts of mixed lengths in padded rows; for an encoder-decoder its encoder reads them."""
    width = max(LENGTHS) + 2
    tokens, lengths = jnp.asarray(random_tokens(len(LENGTHS), width)), jnp.asarray(LENGTHS)
    if config.structure != "encoder_decoder":
        return Prompts(tokens, lengths)
    start = jnp.zeros((len(LENGTHS), 1), jnp.int32)
    return Prompts(start, jnp.ones(len(LENGTHS), jnp.int32), tokens, lengths)


def read(
    config: ModelConfig, params: Any, page_table: PageTable | None
) -> tuple[np.ndarray, Cache]:
    """Logits [1 + STEPS, B, V] after the prompts and after each of some more tokens."""
    prompts = prompts_for(config)
    logits, cache = prefill(params, prompts, config=config, slots=SLOTS, page_table=page_table)
    return continued(config, params, prompts, logits, cache)


def continued(
    config: ModelConfig, params: Any, prompts: Prompts, logits: jax.Array, cache: Cache
) -> tuple[np.ndarray, Cache]:
    step = jax.jit(next_logits, static_argnums=0)
    found, more = [logits], random_tokens(len(LENGTHS), STEPS, seed=9)
    for i in range(STEPS):
        positions = (prompts.lengths + i)[:, None].astype(jnp.int32)
        logits, cache = step(
            config, params, more[:, i : i + 1], positions, cache, jnp.zeros(len(LENGTHS), jnp.int32)
        )
        found.append(logits)
    return np.stack(found), cache


def table_of(config: ModelConfig) -> PageTable:
    return contiguous_table([int(length) + STEPS for length in prompts_for(config).lengths], SLOTS)


def cases() -> list[Any]:
    return [*((name, "unroll") for name in PAGED), ("windows", "scan"), ("latent", "scan")]


@pytest.mark.fast_cases("windows-scan", "latent-scan", "buckets-unroll", "multi-query-unroll")
@pytest.mark.parametrize(("name", "loop"), cases())
def test_pages_give_the_logits_of_rows(name: str, loop: str):
    config = MODELS[name]
    params = random_params(config)
    if loop == "scan":
        config, params = scanned(config, params)
    expected, _ = read(config, params, None)
    found, _ = read(config, params, table_of(config))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("page_index", [0, 1])
def test_a_wrong_page_gives_other_logits(page_index: int):  # the control
    config = tiny_config()
    params, prompts, table = random_params(config), prompts_for(config), table_of(config)
    logits, cache = prefill(params, prompts, config=config, slots=SLOTS, page_table=table)
    expected, _ = continued(config, params, prompts, logits, cache)
    # The page of the last row's first or second 16 tokens becomes one of the second row's.
    wrong = dataclasses.replace(
        table, ids=table.ids.at[2, page_index].set(table.ids[1, page_index])
    )
    found, _ = continued(config, params, prompts, logits, cache.replace(page_table=wrong))
    np.testing.assert_allclose(found[:, :2], expected[:, :2], atol=1e-5)
    assert np.abs(found[1:, 2] - expected[1:, 2]).max() > 0.1


def test_pages_may_have_any_order():
    config = tiny_config()
    params, table = random_params(config), table_of(config)
    expected, _ = read(config, params, table)
    order = np.random.default_rng(0).permutation(np.arange(1, table.num_pages))
    shuffled = jnp.asarray(np.concatenate([[0], order]), jnp.int32)[table.ids]
    assert (np.diff(np.asarray(shuffled), axis=1) != 1).any()
    found, _ = read(config, params, dataclasses.replace(table, ids=shuffled))
    np.testing.assert_array_equal(found, expected)


def test_rows_take_the_pages_that_they_need():
    table = contiguous_table([1, PAGE_SIZE, PAGE_SIZE + 1, 2], 3 * PAGE_SIZE)
    np.testing.assert_array_equal(table.ids, [[1, 0, 0], [2, 0, 0], [3, 4, 0], [5, 0, 0]])
    # 5 pages in whole rows of 3, and page 0: fewer than the 12 that four full rows would take.
    assert (table.num_pages, table.slots) == (7, 3 * PAGE_SIZE)


@pytest.mark.parametrize("name", ["windows", "latent"])
def test_a_row_with_copied_pages_goes_on_as_the_other(name: str):
    config = dataclasses.replace(VARIANTS[name], max_length=SLOTS)
    params, prompts = random_params(config), prompts_for(config)
    table = contiguous_table([SLOTS] * 3, SLOTS)
    _, cache = prefill(params, prompts, config=config, slots=SLOTS, page_table=table)
    # Row 0 gets copies of the pages of row 2.
    sources, targets = table.ids[2], table.ids[0]
    layers = [each.replace(tokens=each.tokens.copy(sources, targets)) for each in cache.layers]
    before = jnp.array([2, 1, 2])
    lengths = prompts.lengths[before]
    tokens = random_tokens(1, 1)
    read_next = jax.jit(next_logits, static_argnums=0)
    inputs = (jnp.tile(tokens, (3, 1)), lengths[:, None])
    index = jnp.zeros(3, jnp.int32)
    copied, _ = read_next(config, params, *inputs, cache.replace(layers=tuple(layers)), index)
    np.testing.assert_array_equal(copied[0], copied[2])
    plain, _ = read_next(config, params, *inputs, cache, index)  # the control
    assert np.abs(plain[0] - plain[2]).max() > 0.01
    np.testing.assert_array_equal(plain[1], copied[1])


def test_a_row_that_has_ended_counts_on_without_reading_what_is_not_there():
    config = tiny_config()
    params, prompts = random_params(config), prompts_for(config)
    table = contiguous_table([int(length) for length in prompts.lengths], SLOTS)
    _, cache = prefill(params, prompts, config=config, slots=SLOTS, page_table=table)
    step = jax.jit(next_logits, static_argnums=0)
    far = jnp.full((len(LENGTHS), 1), SLOTS + 40, jnp.int32).at[0].set(LENGTHS[0])
    found, _ = step(
        config,
        params,
        random_tokens(len(LENGTHS), 1),
        far,
        cache,
        jnp.zeros(len(LENGTHS), jnp.int32),
    )
    alone, _ = step(
        config,
        params,
        random_tokens(len(LENGTHS), 1),
        far.at[1:].set(LENGTHS[0]),
        cache,
        jnp.zeros(3, jnp.int32),
    )
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0], alone[0])
