"""Reading with a cache, token by token, gives the logits of reading at once."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels.attention import AttentionMask
from research.models.cache import Cache, DenseCache, empty_cache
from research.models.config import LayerConfig, ModelConfig, PositionConfig
from research.models.transformer import Transformer
from tests.tiny import logits, random_params, random_tokens, stack, tiny_config

LENGTHS, WIDTH, TOTAL, SLOTS = np.array([5, 9, 1]), 10, 14, 16


@functools.partial(jax.jit, static_argnums=0)
def read(
    config: ModelConfig, params: Any, tokens: Any, positions: Any, cache: Cache
) -> tuple[jax.Array, Cache]:
    def apply(module: Transformer) -> tuple[jax.Array, Cache]:
        output = module({"tokens": tokens, "positions": positions}, cache)
        return module.logits(output.hidden), output.cache

    return Transformer(config).apply({"params": params}, method=apply)


def read_by_token(config: ModelConfig, params: Any, tokens: np.ndarray) -> list[np.ndarray]:
    """Prompts of different lengths in one padded batch, then one token a step; each row's logits by
    position.
    """
    rows = np.arange(len(tokens))
    prompts = np.where(np.arange(WIDTH) < LENGTHS[:, None], tokens[:, :WIDTH], 7)
    positions = np.tile(np.arange(WIDTH), (len(tokens), 1))
    cache = empty_cache(config, len(tokens), SLOTS, stacked=config.layer_loop == "scan")
    first, cache = read(config, params, prompts, positions, cache)
    found = [list(first[row, :length]) for row, length in enumerate(LENGTHS)]
    for step in range(TOTAL - LENGTHS.max()):
        at = (LENGTHS + step)[:, None]
        new, cache = read(config, params, tokens[rows[:, None], at], at, cache)
        for row in rows:
            found[row].append(new[row, 0])
    return [np.stack(row) for row in found]


@pytest.mark.fast_cases("rotary", "alibi")
@pytest.mark.parametrize("kind", ["none", "learned", "sinusoidal", "rotary", "alibi"])
def test_cached_steps_give_the_training_logits(kind: str):
    config = tiny_config(position=PositionConfig(kind=kind))
    params, tokens = random_params(config), random_tokens(len(LENGTHS), TOTAL)
    expected = np.asarray(logits(config, params, tokens))
    scanned = dataclasses.replace(config, layer_loop="scan"), stack(params, config.num_layers)
    for found in (read_by_token(config, params, tokens), read_by_token(*scanned, tokens)):
        for row, length in enumerate(LENGTHS + TOTAL - LENGTHS.max()):
            assert len(found[row]) == length
            np.testing.assert_allclose(found[row], expected[row, :length], atol=1e-5)
    # The control: logits of neighbouring positions are far apart.
    assert np.abs(np.diff(expected, axis=1)).max(axis=-1).min() > 0.1


def test_unused_slots_are_never_attended_to():
    config = tiny_config()
    params, tokens = random_params(config), random_tokens(1, 3)
    full = jax.tree.map(
        lambda leaf: jnp.full_like(leaf, 1e4), empty_cache(config, 1, SLOTS, stacked=False)
    )
    found, _ = read(config, params, tokens, np.arange(3)[None], full)
    np.testing.assert_allclose(found, logits(config, params, tokens), atol=1e-5)


def test_the_layers_at_a_place_of_a_scanned_pattern_share_a_cache():
    layer = LayerConfig()
    config = tiny_config(num_layers=7, first_layers=(layer,) * 2, pattern=(layer,) * 3)
    found = empty_cache(config, 1, SLOTS, stacked=True)
    shapes = [each.tokens.key.shape for each in found.layers]
    assert [shape[:-4] for shape in shapes] == [(), (), (2,), (2,), (1,)]
    # Fewer layers than the pattern has.
    short = empty_cache(dataclasses.replace(config, num_layers=4), 1, SLOTS, stacked=True)
    assert [each.tokens.key.shape[:-4] for each in short.layers] == [(), (), (1,), (1,)]


def test_cache_holds_a_token_in_the_slot_of_its_position():
    cache = empty_cache(tiny_config(num_layers=1), 2, 4, stacked=False).layers[0].tokens
    assert isinstance(cache, DenseCache)
    assert cache.key.shape == cache.value.shape == (2, 4, 2, 4)
    key = jnp.arange(2 * 2 * 2 * 4, dtype=jnp.float32).reshape(2, 2, 2, 4)
    seen: list[AttentionMask] = []

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask) -> jax.Array:
        seen.append(mask)
        return q

    where = {"positions": jnp.array([[0, 1], [2, 3]]), "page_table": None}
    _, new = cache.attend(
        key, key, -key, mask=AttentionMask(causal=True), attention=attention, **where
    )
    np.testing.assert_array_equal(new.key[0, :2], key[0])
    np.testing.assert_array_equal(new.key[1, 2:], key[1])
    np.testing.assert_array_equal(new.value, -new.key)
    assert not new.key[0, 2:].any()
    np.testing.assert_array_equal(seen[0].kv_positions, [[0, 1, 2, 3]] * 2)
    expected = [[[1, 0, 0, 0], [1, 1, 0, 0]], [[1, 1, 1, 0], [1, 1, 1, 1]]]
    np.testing.assert_array_equal(seen[0].dense(2, 4)[:, 0], expected)
