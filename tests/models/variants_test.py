"""What holds for every variant: packing, scanned layers, caches, gradients for all parameters."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.trees import named_leaves
from research.models.config import ModelConfig
from research.models.layer_stack import canonical, unstack_layers
from research.models.transformer import Transformer
from tests.models.variants import VARIANTS, pack, rows, unpacked
from tests.tiny import abstract_params, random_params

LENGTHS = [9, 5, 7]


@functools.partial(jax.jit, static_argnums=0)
def logits(config: ModelConfig, params: Any, inputs: dict[str, Any]) -> jax.Array:
    def apply(module: Transformer) -> jax.Array:
        return module.logits(module(**inputs).hidden)

    return Transformer(config).apply({"params": params}, method=apply)


def scanned(config: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """The same model with its layers in a loop."""
    config = dataclasses.replace(config, layer_loop="scan")
    like = named_leaves(_unboxed(config))
    held = unstack_layers(canonical(jax.tree.map(jnp.asarray, params)), like)
    return config, jax.tree.unflatten(jax.tree.structure(_unboxed(config)), [held[name] for name in like])


def _unboxed(config: ModelConfig) -> Any:
    return nn.unbox(abstract_params(config))


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_give_what_they_give_alone(name: str):
    config = VARIANTS[name]
    params, documents = random_params(config), rows(config, LENGTHS)
    packed = np.asarray(logits(config, params, pack(documents)))[0]
    apart = np.asarray(logits(config, params, unpacked(documents)))
    alone = np.concatenate([row[:length] for row, length in zip(apart, LENGTHS, strict=True)])
    np.testing.assert_allclose(packed[: len(alone)], alone, atol=1e-5 * np.abs(alone).max())
    assert np.abs(alone).max() > 0.1


@pytest.mark.parametrize("name", VARIANTS)
def test_scanned_layers_give_the_same(name: str):
    config = VARIANTS[name]
    params, inputs = random_params(config), pack(rows(config, LENGTHS))
    expected = logits(config, params, inputs)
    found = logits(*scanned(config, params), inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
