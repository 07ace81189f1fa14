"""Attention over tokens that the mesh shards equals that of one device: value and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels.attention import AttentionMask, KeyExchange, attention
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.parallel.rules import constrain

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 32, 8, 2, 4

RING = KeyExchange()
GATHER = KeyExchange("all_gather")
HEADS_ONLY = KeyExchange("ring", 4)
BOTH = KeyExchange("ring", 2)
BOTH_GATHER = KeyExchange("all_gather", 2)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def segments(lengths: list[list[int]]) -> jax.Array:
    """Packed documents of these lengths, then padding."""
    rows = []
    for row in lengths:
        ids = np.repeat(np.arange(1, len(row) + 1), row)
        rows.append(np.pad(ids, (0, LENGTH - len(ids))))
    return jnp.array(rows, jnp.int32)


PACKED = segments([[9, 14, 6], [3, 27]])
INDEX = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (BATCH, LENGTH))
# A prefix of 5 tokens in the order of `models.masks.sequence_mask`.
WITH_PREFIX = jnp.where(INDEX < 5, 0, INDEX)
SLOPES = jnp.linspace(0.1, 0.8, HEADS)
CASES: dict[str, tuple[AttentionMask, dict[str, Any]]] = {
    "full": (AttentionMask(), {}),
    "causal": (AttentionMask(causal=True), {}),
    "packed": (AttentionMask(causal=True, q_segments=PACKED, kv_segments=PACKED), {}),
    "packed encoder": (AttentionMask(q_segments=PACKED, kv_segments=PACKED), {}),
    "window": (AttentionMask(causal=True, window=11), {}),
    "window of a device": (AttentionMask(causal=True, window=8), {}),
    "window without order": (
        AttentionMask(window=5, q_segments=PACKED, kv_segments=PACKED),
        {},
    ),
    "prefix": (AttentionMask(causal=True, prefix=jnp.array([7, 20], jnp.int32)), {}),
    "prefix in positions": (
        AttentionMask(causal=True, q_positions=WITH_PREFIX, kv_positions=WITH_PREFIX),
        {},
    ),
    "sinks": (AttentionMask(causal=True), {"sinks": normal(5, HEADS)}),
    "sinks and window": (AttentionMask(causal=True, window=6), {"sinks": normal(5, HEADS)}),
    "softcap": (AttentionMask(causal=True), {"softcap": 1.5}),
    "alibi": (AttentionMask(causal=True), {"alibi": SLOPES}),
    "alibi encoder": (AttentionMask(), {"alibi": SLOPES}),
    "bias": (AttentionMask(causal=True), {"bias": normal(6, 1, HEADS, LENGTH, LENGTH)}),
    "bias by key": (AttentionMask(), {"bias": normal(6, BATCH, 1, 1, LENGTH)}),
    # Beside a sink: alone it changes all scores of a query alike, and so no weight.
    "bias by query": (
        AttentionMask(causal=True),
        {"bias": normal(6, 1, HEADS, LENGTH, 1), "sinks": normal(5, HEADS)},
    ),
}


def value_and_gradients(
    mask: AttentionMask,
    terms: dict[str, Any],
    exchange: KeyExchange,
    mesh: jax.sharding.Mesh | None,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    implementation: str = "auto",
) -> dict[str, np.ndarray]:
    """The output, and the gradients of all that has one, for one fixed cotangent."""
    arrays = {
        "q": normal(0, BATCH, LENGTH, heads, WIDTH),
        "k": normal(1, BATCH, LENGTH, kv_heads, WIDTH),
        "v": normal(2, BATCH, LENGTH, kv_heads, WIDTH),
    }
    learned = {name: terms[name] for name in ("bias", "sinks") if name in terms}
    constants = {name: term for name, term in terms.items() if name not in learned}
    g = normal(3, BATCH, LENGTH, heads, WIDTH)

    def weighed(inputs: dict[str, Any]) -> tuple[Any, Any]:
        q, k, v = (
            constrain(inputs[name], ("batch", "length", axis, "head"))
            for name, axis in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads"))
        )
        out = attention(
            q,
            k,
            v,
            mask=mask,
            exchange=exchange,
            implementation=implementation,
            **{name: inputs[name] for name in learned},
            **constants,
        )
        return jnp.sum(out * g), out

    run = jax.jit(jax.grad(weighed, has_aux=True))
    if mesh is None:
        gradients, out = run(arrays | learned)
    else:
        with jax.set_mesh(mesh):
            gradients, out = run(arrays | learned)
    found = {f"gradient of {name}": np.asarray(x) for name, x in gradients.items()}
    return found | {"output": np.asarray(out)}


def assert_equal_to_one_device(
    mask: AttentionMask, terms: dict[str, Any], exchange: KeyExchange, **options: Any
) -> None:
    mesh = make_mesh(MeshConfig(data=1, context=4, tensor=options.pop("tensor", 2)), jax.devices())
    found = value_and_gradients(mask, terms, exchange, mesh, **options)
    expected = value_and_gradients(
        mask, terms, exchange, None, **(options | {"implementation": "reference"})
    )
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=2e-5, rtol=2e-5, err_msg=name)
        assert np.abs(array).max() > 0.01


@pytest.mark.parametrize("case", CASES)
def test_a_ring_gives_the_attention_of_one_device(case: str):
    assert_equal_to_one_device(*CASES[case], RING)


@pytest.mark.parametrize("case", CASES)
def test_groups_of_a_ring_that_exchange_heads_give_the_attention_of_one_device(case: str):
    assert_equal_to_one_device(*CASES[case], BOTH)


@pytest.mark.parametrize(
    "exchange", [GATHER, HEADS_ONLY, BOTH_GATHER], ids=["gather", "heads", "gather and heads"]
)
@pytest.mark.parametrize("case", CASES)
def test_other_exchanges_give_the_attention_of_one_device(case: str, exchange: KeyExchange):
    assert_equal_to_one_device(*CASES[case], exchange)
