"""How layers are run is handed in: a strategy may cut the batch inside the stack."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models.block import Block
from research.models.config import LayerConfig, ModelConfig
from research.models.layer_loops import LayerGroup, LayerLoop, Scanned, TracedOnce, Unrolled
from research.models.transformer import Transformer
from research.parallel.target import compiling_for
from tests.models.variants import VARIANTS, rows, unpacked
from tests.tiny import abstract_params, random_params, stack, tiny_config

LENGTHS = [9, 5, 7, 8]


@dataclasses.dataclass(frozen=True)
class Halves:
    """Runs all layers on each half of the batch separately.

    With `first_context` both halves get the context of the first one: the control.
    """

    inner: LayerLoop
    first_context: bool = False

    def run(self, group: LayerGroup, x: Any, caches: Any, context: Any) -> Any:
        assert caches is None
        half = len(x) // 2

        def rows_of(leaf: jax.Array, start: int) -> jax.Array:
            return leaf[start : start + half] if leaf.shape[0] == len(x) else leaf

        parts = []
        for start in (0, half):
            of = 0 if self.first_context else start
            own = jax.tree.map(lambda leaf, of=of: rows_of(leaf, of), context)
            parts.append(self.inner.run(group, x[start : start + half], None, own))
        states, _, reports = zip(*parts, strict=True)
        together = jax.tree.map(lambda first, second: (first + second) / 2, *reports)
        return jnp.concatenate(states), None, together


def hidden(name: str, params: Any, loop: LayerLoop | None) -> np.ndarray:
    inputs = unpacked(rows(VARIANTS[name], LENGTHS))
    model = Transformer(VARIANTS[name], loop=loop)
    return np.asarray(
        jax.jit(lambda params: model.apply({"params": params}, inputs).hidden)(params)
    )


def dropped(config: ModelConfig, params: Any, loop: LayerLoop) -> np.ndarray:
    """Returns hidden states with dropout."""
    inputs = unpacked(rows(config, LENGTHS))

    def call(params: Any) -> jax.Array:
        model = Transformer(config, loop=loop)
        rngs = {"dropout": jax.random.key(0)}
        return model.apply({"params": params}, inputs, deterministic=False, rngs=rngs).hidden

    return np.asarray(jax.jit(call)(params))


@pytest.mark.fast_cases("windows")
@pytest.mark.parametrize("name", ["windows", "encoder-decoder"])
def test_a_batch_may_be_cut_inside_the_stack(name: str):
    params = random_params(VARIANTS[name])
    expected = hidden(name, params, None)
    np.testing.assert_allclose(hidden(name, params, Halves(Unrolled())), expected, atol=1e-5)
    wrong = hidden(name, params, Halves(Unrolled(), first_context=True))
    assert np.abs(wrong[:2] - expected[:2]).max() < 1e-5
    assert np.abs(wrong[2:] - expected[2:]).max() > 0.01


def test_scanned_layers_may_be_cut_too():
    params = random_params(VARIANTS["windows"])
    found = hidden("windows", stack(params, 5), Halves(Scanned()))
    np.testing.assert_allclose(found, hidden("windows", params, None), atol=1e-5)


@pytest.mark.parametrize(
    "first_layers", [(), (LayerConfig(),)], ids=["all scanned", "after a first layer"]
)
def test_scanned_layers_drop_the_same_as_unrolled_ones(first_layers: tuple[LayerConfig, ...]):
    # Two rounds of the pattern and a leftover layer: the index of each in the stack makes its key.
    num_layers = len(first_layers) + 5
    config = dataclasses.replace(
        VARIANTS["windows"], num_layers=num_layers, first_layers=first_layers, dropout=0.5
    )
    assert len(config.pattern) == 2
    params = random_params(config)
    unrolled = dropped(config, params, Unrolled())
    np.testing.assert_allclose(dropped(config, stack(params, 5), Scanned()), unrolled, atol=1e-5)


@pytest.mark.parametrize("name", ["windows", "encoder-decoder"])
def test_layers_that_are_traced_once_compute_what_unrolled_ones_do(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    config = dataclasses.replace(VARIANTS[name], dropout=0.5)
    params = random_params(config)
    traced = []
    call = Block.__call__

    def count(block: Block, *args: Any) -> Any:
        traced.append((block.config, block.layer))
        return call(block, *args)

    monkeypatch.setattr(Block, "__call__", count)

    def run(loop: LayerLoop) -> np.ndarray:
        traced.clear()
        return dropped(config, params, loop)

    expected = run(Unrolled())
    unrolled = len(traced)
    np.testing.assert_array_equal(run(TracedOnce()), expected)
    assert len(traced) == len(set(traced)) < unrolled


def test_stacked_layers_are_made_for_a_gpu_that_is_not_here():
    # Types and widths that cuDNN takes, which can neither be mapped over layers nor traced here.
    sizes = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 64}
    config = tiny_config(sizes, embed_dim=128, dtype="bfloat16", layer_loop="scan")
    with compiling_for("gpu", "NVIDIA H200"):
        params = abstract_params(config)
    assert params["layers"]["attention"]["query"]["kernel"].value.shape == (2, 128, 2, 64)
