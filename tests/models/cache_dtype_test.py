"""Pages of each type: every model decodes in them, near what it computes in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UserError
from research.inference.prefill import next_logits
from research.kernels.decode_attention import PAGE_SIZE, gather, quantize, write
from research.models import dot_product, latent_cache, paged_cache
from research.models.cache import CACHE_DTYPES, Cache, empty_cache
from research.models.config import ModelConfig
from research.models.language_model import language_model
from research.models.paged_cache import PageTable, contiguous_table
from research.parallel.target import compiling_for
from tests.models.paged_cache_test import MODELS
from tests.models.variants_test import scanned
from tests.tiny import random_params, random_tokens, tiny_config

LENGTH = PAGE_SIZE + 3
QUANTIZED = ("int8", "float8_e4m3fn")


def read(config: ModelConfig, params: Any, cache_dtype: str) -> np.ndarray:
    """Logits [tokens, 2, V] of two sequences in pages, read token by token; what a model reads in
    one piece comes before.
    """
    table = contiguous_table([LENGTH] * 2, 2 * PAGE_SIZE)
    tokens = jnp.asarray(random_tokens(2, LENGTH))
    read_at_once, segments = {}, None
    if config.structure == "encoder_decoder":
        segments = jnp.ones((2, 9), jnp.int32)
        read_at_once = {
            "encoder_tokens": jnp.asarray(random_tokens(2, 9, seed=5)),
            "encoder_positions": jnp.broadcast_to(jnp.arange(9), (2, 9)),
            "encoder_segments": segments,
        }
    if config.structure == "prefix":
        read_at_once = {"prefix": jnp.ones((2, 4), jnp.int32)}
    model = language_model(config)
    cache = model.empty_cache(params, 2, 0, segments, page_table=table, cache_dtype=cache_dtype)

    step = jax.jit(next_logits, static_argnums=0)
    last, start = jnp.zeros(2, jnp.int32), 0
    if read_at_once:
        start = 4
        positions = jnp.broadcast_to(jnp.arange(start), (2, start))
        first = tokens[:, :start]
        _, cache = step(config, params, first, positions, cache, last, **read_at_once)
    found = []
    for index in range(start, LENGTH):
        position = jnp.full((2, 1), index)
        new = tokens[:, index : index + 1]
        logits, cache = step(config, params, new, position, cache, last)
        found.append(logits)
    return np.stack(found)


def rounding(dtype: str) -> Any:
    """A `write` that first rounds what it writes as a type with scales does."""

    def put(pages, table, lengths, key, value):
        rounded = []
        for tokens in (key, value):
            numbers, scale = quantize(tokens, dtype)
            rounded.append(numbers.astype(jnp.float32) * scale[..., None])
        return write(pages, table, lengths, *rounded)

    return put


# How keys are read: in place, by window, with sinks and few heads; gathered with each kind of bias,
# as latents, for a prefix and beside an encoder.
KINDS = (
    "windows",
    "sinks",
    "multi-query",
    "alibi",
    "rounded alibi",
    "buckets",
    "relative",
    "latent",
    "prefix",
    "encoder-decoder",
)


@pytest.mark.fast_cases("windows", "latent")
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_decodes_in_quantized_pages_near_its_float32_logits(name: str):
    config = MODELS[name]
    params = random_params(config)
    exact = read(config, params, "float32")
    latent = config.attention.latent
    width = config.attention.head_dim if latent is None else latent.kv_dim
    # How far the keys of a head, or the values, are off beside their length: in int8 each number by
    # half a step, and all of them by √H / 2 steps of max / 127; in float8 each by 1 / 16 of itself.
    # To first order the keys and the values of all layers add up.
    bounds = {"int8": np.sqrt(width) / 254, "float8_e4m3fn": 1 / 16}
    errors = {}
    for dtype, bound in bounds.items():
        difference = read(config, params, dtype) - exact
        errors[dtype] = np.sqrt(np.mean(difference**2) / np.mean(exact**2))
        assert 0 < errors[dtype] < 2 * config.num_layers * bound
    # The control: the error is seen, and a coarser type has more of it.
    assert errors["float8_e4m3fn"] > 2 * errors["int8"]


@pytest.mark.fast_cases("windows-int8", "latent-float8_e4m3fn")
@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("name", ["windows", "latent", "buckets"])
def test_quantized_pages_give_the_logits_of_rounded_keys_and_values(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    config = MODELS[name]
    params = random_params(config)
    found = read(config, params, dtype)
    for module in (paged_cache, latent_cache):
        monkeypatch.setattr(module, "write", rounding(dtype))
    jax.clear_caches()
    expected = read(config, params, "float32")
    jax.clear_caches()
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("name", ["latent", "windows"])
def test_every_type_of_pages_has_its_bytes(name: str, dtype: str):
    config = MODELS[name]
    table = contiguous_table([40], 48)
    cache = empty_cache(config, 1, 0, False, page_table=table, cache_dtype=dtype)
    c = config.attention
    key, value, heads = (6, 4, 1) if name == "latent" else (c.head_dim, c.head_dim, c.num_kv_heads)
    scales = 8 if dtype in QUANTIZED else 0
    token = heads * ((key + value) * jnp.dtype(dtype).itemsize + scales)
    for layer in cache.layers:
        leaves = jax.tree.leaves(layer)
        assert sum(leaf.nbytes for leaf in leaves) == table.num_pages * PAGE_SIZE * token


@pytest.mark.fast_cases("windows-bfloat16", "windows-int8", "latent-float8_e4m3fn")
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("name", ["windows", "latent", "rounded alibi", "windows, stacked"])
def test_a_compiled_step_holds_no_copy_of_a_layer(name: str, dtype: str):
    config = MODELS[name.removesuffix(", stacked")]
    params = random_params(config)
    if name.endswith("stacked"):
        config, params = scanned(config, params)
    # Few rows of a large pool: what is gathered for a row is small beside a layer's pages. Layers
    # with a window have another pool of the same size, so that all layers' pages are as large.
    kinds = 1 + name.startswith("windows")
    ids = jnp.zeros((2, 4), jnp.int32)
    counts = [20_000] * kinds
    table = PageTable.of_kinds([ids] * kinds, counts, PAGE_SIZE)
    cache = language_model(config).empty_cache(params, 2, 0, page_table=table, cache_dtype=dtype)
    layers = cache.layers
    # Stacked, a cache has all layers at a place of the pattern.
    pages = sum(leaf.nbytes for leaf in jax.tree.leaves(layers)) // config.num_layers
    token = jnp.zeros((2, 1), jnp.int32)

    def step(params, layers, ids):
        cache = Cache(layers, page_table=PageTable.of_kinds(ids, counts, PAGE_SIZE))
        index = jnp.zeros(2, jnp.int32)
        logits, cache = next_logits(config, params, token, token, cache, index)
        return logits, cache.layers

    compiled = jax.jit(step, donate_argnums=1).lower(params, layers, [ids] * kinds).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < pages


def test_a_type_that_does_not_exist_is_named_with_those_that_do():
    config = tiny_config()
    table = contiguous_table([5], PAGE_SIZE)
    with pytest.raises(
        UserError, match="cache_dtype = 'int4' is not one of float32, bfloat16, int8, float8_e4m3fn"
    ):
        empty_cache(config, 1, 0, False, page_table=table, cache_dtype="int4")
    with pytest.raises(UserError, match="cache_dtype = 'int8' is a type of pages"):
        empty_cache(config, 1, 16, False, cache_dtype="int8")


def test_the_model_has_its_own_type_in_pages_where_none_is_named():
    config = tiny_config(dtype="bfloat16")
    table = contiguous_table([5], PAGE_SIZE)
    (layer, *_) = empty_cache(config, 1, 0, False, page_table=table).layers
    assert layer.tokens.pages.dtype == jnp.bfloat16
    found = gather(layer.tokens.pages, table.ids)
    assert found[0].dtype == jnp.bfloat16


@pytest.mark.parametrize(("platform", "kind"), [("tpu", "TPU v5 lite"), ("gpu", "NVIDIA H200")])
def test_pages_that_a_platform_does_not_read_in_place_are_gathered(
    platform: str, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """Neither kernel takes int8 in pages of 16 tokens."""
    config = tiny_config(dtype="bfloat16")
    params = jax.tree.map(jnp.asarray, random_params(config))
    table = contiguous_table([LENGTH] * 2, 2 * PAGE_SIZE)
    in_place = []

    def attend(q, *rest, **options):
        in_place.append(q.shape)
        return q

    monkeypatch.setattr(dot_product, "decode_attention", attend)
    calls = {}
    with compiling_for(platform, kind):
        for dtype in (None, "int8"):
            model = language_model(config)
            cache = model.empty_cache(params, 2, 0, page_table=table, cache_dtype=dtype)
            token = jnp.zeros((2, 1), jnp.int32)
            in_place.clear()
            jax.eval_shape(
                lambda cache, token=token: next_logits(
                    config, params, token, token, cache, jnp.zeros(2, jnp.int32)
                )[0],
                cache,
            )
            calls[dtype] = bool(in_place)
    # The control: bfloat16 is read in place.
    assert calls == {None: True, "int8": False}
