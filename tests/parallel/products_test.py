"""Any product of mesh axes gives the run of one device, whatever the model and the optimizer.

Products are drawn, and compared in float64; TESSERA_TEST_PRODUCTS=60 in the environment draws 60
others.
"""

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from research.core.trees import named_leaves
from research.models.config import HeadConfig, ModelConfig
from research.parallel.mesh_axes import MESH_AXES
from research.parallel.mesh_config import MeshConfig
from research.training.config import PipelineConfig
from tests.models.variants import VARIANTS
from tests.parallel.plain_step import assert_plain_step
from tests.parallel.products import RATES, STEPS, Run, assert_equal_runs, train
from tests.tiny import random_params, tiny_config

MODELS: dict[str, ModelConfig] = {
    "tied": dataclasses.replace(VARIANTS["sinks"], tied_embeddings=True),
    "untied": dataclasses.replace(VARIANTS["sinks"], tied_embeddings=False),
    "experts": VARIANTS["experts"],
    "MTP": dataclasses.replace(VARIANTS["sinks"], head=HeadConfig(mtp_depth=1)),
    "encoder-decoder": VARIANTS["encoder-decoder"],
}
# The models have four layers, four experts and two key/value heads.
LARGEST = {"pipeline": 4, "expert": 4, "tensor": 2}
DRAWN = os.environ.get("TESSERA_TEST_PRODUCTS")


class Product(NamedTuple):
    """What is trained, by which optimizer, and on which mesh."""

    model: str
    sizes: dict[str, int]
    zero: int
    optimizer: str
    microbatches: int
    sequence_parallel: bool = False

    @property
    def is_cut(self) -> bool:
        """Whether the layers are cut into the parts of a pipeline."""
        return self.model != "encoder-decoder" and self.sizes.get("pipeline", 1) > 1

    @property
    def dropout(self) -> float:
        """Stages that are not such parts draw their dropout otherwise."""
        staged = self.sizes.get("pipeline", 1) > 1
        return 0.0 if staged and not self.is_cut else 0.1


def model_of(name: str, dropout: float = 0.1) -> ModelConfig:
    """Four scanned layers with dropout, for up to four stages; an encoder of another depth."""
    return dataclasses.replace(MODELS[name], num_layers=4, dropout=dropout, layer_loop="scan")


@st.composite
def products(draw: Any) -> Product:
    """A model, an optimizer, and sizes of axes that the model can use."""
    name = draw(st.sampled_from(sorted(MODELS)))
    usable = list(MESH_AXES)
    if name != "experts":
        usable.remove("expert")
    largest = LARGEST
    if name == "encoder-decoder":
        # The encoder has three layers.
        largest = LARGEST | {"pipeline": 2}
    sizes = dict.fromkeys(MESH_AXES, 1)
    for _ in range(3):
        axis = draw(st.sampled_from(usable))
        if sizes[axis] == largest.get(axis, 8):
            axis = "fsdp"
        sizes[axis] *= 2
    # Eight rows in two microbatches.
    while sizes["data"] * sizes["fsdp"] * sizes["expert"] > 4:
        axis = "fsdp" if sizes["fsdp"] > 1 else "data"
        sizes[axis] //= 2
        sizes["context"] *= 2
    microbatches = 2 if sizes["pipeline"] > 1 else draw(st.sampled_from([1, 2]))
    zero = draw(st.sampled_from([1, 2, 3]))
    optimizer = draw(st.sampled_from(sorted(RATES)))
    return Product(name, sizes, zero, optimizer, microbatches, draw(st.booleans()))


@functools.lru_cache
def alone(name: str, optimizer: str, microbatches: int, dropout: float) -> Run:
    """The run on one device."""
    options = {"accumulation": microbatches, "optimizer": optimizer}
    return train(model_of(name, dropout), MeshConfig(), jax.devices()[:1], **options)


@settings(
    max_examples=int(DRAWN or 1),
    deadline=None,
    derandomize=DRAWN is None,
    database=None,
    # A product that fails is printed; a simpler one would take minutes to find.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(products())
@example(Product("encoder-decoder", {"pipeline": 2, "context": 2, "tensor": 2}, 2, "adafactor", 2))
@example(Product("MTP", {"fsdp": 2, "context": 2, "tensor": 2}, 1, "muon", 1, True))
@example(Product("experts", {"pipeline": 2, "expert": 2, "tensor": 2}, 3, "lion", 2))
def check_products(product: Product) -> None:
    """Fails where a product of axes does not give the run of one device."""
    print(product, flush=True)
    model = model_of(product.model, product.dropout)
    model = dataclasses.replace(model, sequence_parallel=product.sequence_parallel)
    options = {"accumulation": product.microbatches, "optimizer": product.optimizer}
    if not product.is_cut:
        options["pipeline"] = PipelineConfig("gpipe")
    found = train(model, MeshConfig(**product.sizes, zero=product.zero), **options)
    assert found.last["params/embed/embedding"].itemsize == 8
    expected = alone(product.model, product.optimizer, product.microbatches, product.dropout)
    assert_equal_runs(found, expected, model)


def check_plain_encoder_decoder() -> None:
    """Fails where the first step of an encoder-decoder on a mesh is not the plain one."""
    assert_plain_step(model_of("encoder-decoder"), MeshConfig(data=2, fsdp=2, tensor=2))


PROGRAM = """
from tests.float64 import use_float64
use_float64()
from tests.parallel import products_test
products_test.check_products()
products_test.check_plain_encoder_decoder()
"""


@pytest.mark.thorough
def test_any_product_of_axes_gives_the_run_of_one_device_in_float64():
    # Integers have 64 bits there too, which the code mixes with those of batches.
    environment = os.environ | {"JAX_NUMPY_DTYPE_PROMOTION": "standard"}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment
    )
    assert found.returncode == 0, found.stdout + found.stderr


def run_of(model: ModelConfig) -> Run:
    """What a run could return, whose state is the parameters and gradients."""
    initial = named_leaves(random_params(model))
    state = {f"params/{name}": np.asarray(leaf) + 0.1 for name, leaf in initial.items()}
    state |= {f"trace/{name}": np.asarray(leaf) * 0.1 for name, leaf in initial.items()}
    metrics = [{"loss": 3.0, "grad_norm": 2.0} for _ in range(STEPS)]
    return Run(metrics, state, dict(state))


def change_loss(run: Run) -> None:
    run.metrics[4]["loss"] += 1e-4


def change_first_norm(run: Run) -> None:
    run.metrics[0]["grad_norm"] += 5e-5


def change_gradient(run: Run) -> None:
    run.first["trace/embed/embedding"] = run.first["trace/embed/embedding"].copy()
    run.first["trace/embed/embedding"][3, 5] += 3e-5


def lose_parameter(run: Run) -> None:
    del run.last["params/embed/embedding"]


@pytest.mark.parametrize(
    "change", [change_loss, change_first_norm, change_gradient, lose_parameter]
)
def test_runs_that_differ_in_one_place_are_told_apart(change: Callable[[Run], None]):
    model = tiny_config()
    assert_equal_runs(run_of(model), run_of(model), model)
    changed = run_of(model)
    change(changed)
    with pytest.raises(AssertionError):
        assert_equal_runs(changed, run_of(model), model)
