"""A mesh changes where arrays lie, and no value, whatever the model is: steps on eight devices and
on one.
"""

import dataclasses

import jax
import pytest

from research.parallel.mesh_config import MeshConfig
from tests.models.variants import VARIANTS
from tests.parallel.products import assert_equal_runs, train


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name",
    [
        "clamped experts",
        "shared experts",
        "latent",
        "buckets",
        "multi-token prediction",
        "encoder",
        "encoder-decoder",
    ],
)
def test_a_mesh_gives_the_run_of_one_device(name: str):
    model = dataclasses.replace(VARIANTS[name], dropout=0.1)
    found = train(model, MeshConfig(data=2, fsdp=2, tensor=2))
    assert_equal_runs(found, train(model, MeshConfig(), jax.devices()[:1]), model)
