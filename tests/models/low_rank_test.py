"""A model works with low-rank weights, base + a b, instead of every matrix, in every structure."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.trees import named_leaves
from research.kernels.low_rank import LowRank
from research.kernels.weights import as_array, split_axes
from research.models.cache import empty_cache
from research.models.config import HeadConfig, ModelConfig
from research.models.language_model import language_model
from research.models.transformer import compute_logits
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.parallel.rules import is_box, param_shardings
from research.training.language_model import LanguageModelLoss
from tests.models.variants import VARIANTS, pack, rows
from tests.tiny import abstract_params, random_params, random_tokens, summed, tiny_config

RANK, STEPS, RATE = 2, 20, 0.05
STRUCTURES: dict[str, ModelConfig] = {
    "dense": tiny_config(num_layers=1),
    "experts": dataclasses.replace(VARIANTS["shared experts"], num_layers=2),
    "latent": dataclasses.replace(VARIANTS["latent"], num_layers=1),
    "tied": tiny_config(num_layers=1, tied_embeddings=True, head=HeadConfig(bias=True)),
    "encoder-decoder": dataclasses.replace(
        VARIANTS["encoder-decoder"], num_layers=1, encoder_layers=1
    ),
}


def is_node(leaf: Any) -> bool:
    return isinstance(leaf, LowRank)


def with_low_rank(boxed: Any, params: Any) -> Any:
    """Parameters with base + a b instead of every matrix, a and b as large as the base."""
    rng = np.random.default_rng(1)

    def widen(box: nn.LogicallyPartitioned, base: Any) -> Any:
        stacks = len([name for name in box.names if name in ("layers", "expert")])
        axes = box.names[stacks:]
        if len(axes) < 2 or "buckets" in axes:
            return jnp.asarray(base)
        # What is projected back to the model width has one output axis; all else has one input
        # axis.
        inputs = len(axes) - 1 if axes[-1] == "embed" else 1
        split = stacks + inputs
        a = rng.normal(0, 0.3, (*base.shape[:split], RANK)).astype(np.float32)
        b = rng.normal(0, 0.3, (*base.shape[:stacks], RANK, *base.shape[split:])).astype(np.float32)
        return LowRank(*map(jnp.asarray, (base, a, b)))

    return jax.tree.map(widen, boxed, params, is_leaf=is_box)


def merged(params: Any) -> Any:
    return jax.tree.map(
        lambda leaf: as_array(leaf) if is_node(leaf) else leaf, params, is_leaf=is_node
    )


def batch_of(config: ModelConfig) -> dict[str, jax.Array]:
    inputs = pack(rows(config, [7, 5]))
    weights = (inputs["segments"] != 0).astype(jnp.float32)
    return {
        **inputs,
        "targets": jnp.asarray(random_tokens(1, weights.shape[1], seed=5)),
        "weights": weights,
    }


def split(params: Any) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The factors a and b by name, and all other arrays."""
    named = named_leaves(params)
    factors = {name: leaf for name, leaf in named.items() if name.endswith(("/a", "/b"))}
    return factors, {name: leaf for name, leaf in named.items() if name not in factors}


def joined(like: Any, factors: Any, others: Any) -> Any:
    both = factors | others
    return jax.tree.unflatten(jax.tree.structure(like), [both[name] for name in named_leaves(like)])


def gradients_of(config: ModelConfig, like: Any, merge: bool) -> Any:
    """The loss and its gradients for a and b, through the node or through the plain sum."""
    loss, batch = summed(LanguageModelLoss(config)), batch_of(config)

    def total(factors: Any, others: Any) -> jax.Array:
        params = joined(like, factors, others)
        return loss(merged(params) if merge else params, batch, None)[0] / batch["weights"].sum()

    return jax.jit(jax.value_and_grad(total))


@pytest.mark.fast_cases("tied", "latent")
@pytest.mark.parametrize("name", STRUCTURES)
def test_low_rank_differences_train_as_their_product_beside_plain_weights(name: str):
    config = STRUCTURES[name]
    base = random_params(config)
    params = with_low_rank(abstract_params(config), base)
    nodes = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_node) if is_node(leaf)]
    assert len(nodes) >= 7  # of a layer, and the embedding
    step, values = gradients_of(config, params, merge=False), []
    factors, others = split(params)
    for _ in range(STEPS):
        value, gradients = step(factors, others)
        factors = jax.tree.map(lambda p, g: p - RATE * g, factors, gradients)
        values.append(float(value))
    assert values[-1] < values[0] - 0.1
    for leaf, array in factors.items():
        assert np.abs(array - split(params)[0][leaf]).max() > 1e-5, leaf
    for leaf, array in others.items():  # the base has not moved by a bit
        np.testing.assert_array_equal(
            array, named_leaves(base)[leaf.removesuffix("/base")], err_msg=leaf
        )

    model, inputs, trained = (
        language_model(config),
        batch_of(config),
        joined(params, factors, others),
    )
    logits = jax.jit(
        lambda params: compute_logits(model.projection(params, model.hidden(params, inputs).hidden))
    )
    by_node, by_sum = np.asarray(logits(trained)), np.asarray(logits(merged(trained)))
    np.testing.assert_allclose(by_node, by_sum, atol=1e-6 * max(1, np.abs(by_sum).max()))
    (value, found), (plain, expected) = (
        step(factors, others),
        gradients_of(config, params, merge=True)(factors, others),
    )
    assert float(value) == pytest.approx(float(plain), rel=1e-6)
    for leaf, gradient in expected.items():
        # A sum over tokens in another order: float32 rounds the largest of these to about 1e-5 of
        # it.
        np.testing.assert_allclose(
            found[leaf], gradient, atol=1e-4 * np.abs(gradient).max(), err_msg=leaf
        )


def test_latents_of_a_cache_meet_low_rank_weights():
    config = STRUCTURES["latent"]
    params = with_low_rank(abstract_params(config), random_params(config))
    model = language_model(config)
    tokens = jnp.asarray(random_tokens(1, 33))

    @jax.jit
    def last_two(params: Any) -> jax.Array:
        cache = empty_cache(config, 1, 33, stacked=False)
        index = jnp.arange(33)[None]
        cache = model.hidden(
            params, {"tokens": tokens[:, :32], "positions": index[:, :32]}, cache=cache
        ).cache
        # One token over many slots: MLA weight absorption multiplies W_k into the query.
        return model.hidden(
            params, {"tokens": tokens[:, 32:], "positions": index[:, 32:]}, cache=cache
        ).hidden

    np.testing.assert_allclose(last_two(params), last_two(merged(params)), atol=1e-5)


@pytest.mark.thorough
def test_sharding_of_a_node_is_that_of_its_arrays():
    config = dataclasses.replace(
        STRUCTURES["experts"], mlp=dataclasses.replace(STRUCTURES["experts"].mlp, bias=True)
    )
    boxed, mesh = (
        abstract_params(config),
        make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4]),
    )
    params = with_low_rank(boxed, random_params(config))

    def box_leaves(box: nn.LogicallyPartitioned, leaf: Any) -> Any:
        if not is_node(leaf):
            return box
        return jax.tree.map(nn.LogicallyPartitioned, leaf, split_axes(leaf, box.names, "rank"))

    shardings = param_shardings(jax.tree.map(box_leaves, boxed, params, is_leaf=is_box), mesh)
    down = shardings["layers_0"]["mlp"]["experts"]["down"]["kernel"]
    assert (down.base.spec[1], down.a.spec[1], down.b.spec[1]) == ("tensor", "tensor", None)
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch_of(config))
    loss = summed(LanguageModelLoss(config))
    expected = float(jax.jit(lambda params: loss(params, batch, None)[0])(params))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        found = float(jax.jit(lambda params: loss(params, batch, None)[0])(placed))
    assert found == pytest.approx(expected, rel=1e-5)
