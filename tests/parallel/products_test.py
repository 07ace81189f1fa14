"""Any product of mesh axes gives the run of one device, whatever the model."""

import dataclasses
import functools
from typing import Any

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from research.models.config import HeadConfig, ModelConfig
from research.parallel.mesh_axes import MESH_AXES
from research.parallel.mesh_config import MeshConfig
from tests.models.variants import VARIANTS
from tests.parallel.products import assert_equal_runs, train

MODELS: dict[str, ModelConfig] = {
    "tied": dataclasses.replace(VARIANTS["sinks"], tied_embeddings=True),
    "untied": dataclasses.replace(VARIANTS["sinks"], tied_embeddings=False),
    "experts": VARIANTS["experts"],
    "MTP": dataclasses.replace(VARIANTS["sinks"], head=HeadConfig(mtp_depth=2)),
    "encoder-decoder": VARIANTS["encoder-decoder"],
}
MICROBATCHES = 2


def model_of(name: str) -> ModelConfig:
    """Four scanned layers with dropout, for up to four stages."""
    changes: dict[str, Any] = {"num_layers": 4}
    if MODELS[name].structure == "encoder_decoder":
        changes["encoder_layers"] = 4
    return dataclasses.replace(MODELS[name], dropout=0.1, layer_loop="scan", **changes)


@st.composite
def products(draw: Any) -> tuple[str, dict[str, int], int]:
    """A model, sizes of axes that it can use, and a ZeRO level."""
    name = draw(st.sampled_from(sorted(MODELS)))
    usable = list(MESH_AXES)
    if name != "experts":
        usable.remove("expert")
    if name == "encoder-decoder":
        usable.remove("pipeline")
    sizes = dict.fromkeys(MESH_AXES, 1)
    for _ in range(3):
        axis = draw(st.sampled_from(usable))
        # The models have two key/value heads and four layers.
        if axis == "tensor" and sizes["tensor"] == 2:
            axis = "fsdp"
        if axis == "pipeline" and sizes["pipeline"] == 4:
            axis = "fsdp"
        sizes[axis] *= 2
    # Eight rows in two microbatches.
    while sizes["data"] * sizes["fsdp"] * sizes["expert"] > 4:
        axis = "fsdp" if sizes["fsdp"] > 1 else "data"
        sizes[axis] //= 2
        sizes["context"] *= 2
    return name, sizes, draw(st.sampled_from([1, 2, 3]))


@functools.lru_cache
def alone(name: str) -> Any:
    """The run on one device."""
    return train(model_of(name), MeshConfig(), jax.devices()[:1], accumulation=MICROBATCHES)


@pytest.mark.thorough
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(products())
def test_any_product_of_axes_gives_the_run_of_one_device(product):
    name, sizes, zero = product
    found = train(model_of(name), MeshConfig(**sizes, zero=zero), accumulation=MICROBATCHES)
    metrics, params = alone(name)
    assert_equal_runs(found, ([dict(row) for row in metrics], params), model_of(name))
