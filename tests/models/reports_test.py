"""Reports of layers: each selection bias is updated by the load of its own experts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.trees import named_leaves
from research.models.config import ExpertsConfig, HeadConfig, LayerConfig, ModelConfig
from research.models.reports import LayerReports
from research.models.transformer import Transformer
from tests.models.variants import pack, rows
from tests.tiny import random_params, stack, tiny_config

EXPERTS = ExpertsConfig(
    num_experts=4,
    experts_per_token=1,
    hidden_dim=8,
    score="sigmoid",
    selection_bias=True,
    balance_weight=0.1,
)
MODELS = {
    "dense first layer": tiny_config(
        num_layers=3, first_layers=(LayerConfig(experts=False),), experts=EXPERTS
    ),
    "encoder-decoder": tiny_config(structure="encoder_decoder", encoder_layers=3, experts=EXPERTS),
    "multi-token prediction": tiny_config(head=HeadConfig(mtp_depth=2), experts=EXPERTS),
}


def reports_of(config: ModelConfig, params: Any) -> LayerReports:
    document = pack(rows(config, [5, 3]), padding=2)  # eight real tokens, and padding

    @jax.jit
    def call(params: Any) -> LayerReports:
        def apply(module: Transformer) -> LayerReports:
            return module({**document, "targets": document["tokens"]}).reports

        return Transformer(config).apply({"params": params}, method=apply)

    return call(params)


def send_to(params: Any, expert_of: dict[str, int]) -> Any:
    """Parameters whose selection biases send every token of a layer to one expert."""

    def select_expert(path: Any, leaf: np.ndarray) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return 10 * np.eye(4, dtype=np.float32)[expert_of[name]] if name in expert_of else leaf

    return jax.tree_util.tree_map_with_path(select_expert, params)


@pytest.mark.parametrize("name", MODELS)
def test_every_selection_bias_finds_the_number_of_real_tokens_of_each_expert(name: str):
    config = MODELS[name]
    params = random_params(config)
    biases = [bias for bias in named_leaves(params) if bias.endswith("selection_bias")]
    expert_of = {bias: index % 4 for index, bias in enumerate(biases)}
    loads = reports_of(config, send_to(params, expert_of)).experts
    assert {f"{path}/selection_bias" for path in loads} == set(biases)
    for bias, expert in expert_of.items():
        # The encoder's rows are two tokens longer each.
        real = 12 if bias.startswith("encoder") else 8
        found = loads[bias.removesuffix("/selection_bias")].load
        np.testing.assert_array_equal(found, real * np.eye(4)[expert], err_msg=bias)


def test_scanned_layers_report_what_unrolled_ones_do():
    config = tiny_config(
        num_layers=3, pattern=(LayerConfig(), LayerConfig(window=4)), experts=EXPERTS
    )
    params = random_params(config)
    unrolled = reports_of(config, params)
    scanned = reports_of(dataclasses.replace(config, layer_loop="scan"), stack(params, 3))
    loads = jnp.stack([unrolled.experts[f"layers_{i}/mlp"].load for i in range(3)])
    # Layers differ, so that a wrong order would show.
    assert len({tuple(load) for load in np.asarray(loads)}) > 1
    np.testing.assert_array_equal(scanned.experts["layers/mlp"].load, loads)
    assert set(scanned.experts) == {"layers/mlp"}
    np.testing.assert_allclose(scanned.router_loss, unrolled.router_loss, rtol=1e-6)
    assert unrolled.router_loss > 0


def test_a_model_without_experts_reports_nothing():
    config = tiny_config()
    found = reports_of(config, random_params(config))
    assert found.experts == {}
    assert found.router_loss == 0
