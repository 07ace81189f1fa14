"""Slices become whole matrices of single devices, and slices again."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.parallel.owners import Slices
from research.parallel.shard_map import shard_map

SLICES = Slices((("fsdp", "context"), ("tensor",)), (4, 2))
SPEC = PartitionSpec(None, ("fsdp", "context"), "tensor")
# Device i's matrices, one after the other
OWNED = PartitionSpec(SLICES.joined)


def run(function: Any, in_spec: PartitionSpec, out_spec: PartitionSpec, x: Any) -> np.ndarray:
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    with jax.set_mesh(mesh):
        return np.asarray(shard_map(function, in_spec, out_spec)(x))


@pytest.mark.parametrize(("count", "padded"), [(8, 8), (11, 16), (3, 8)])
def test_each_matrix_has_one_owner_and_returns_to_its_slices(count: int, padded: int):
    matrices = np.random.default_rng(0).normal(size=(count, 12, 6)).astype(np.float32)
    owned = run(SLICES.to_owners, SPEC, OWNED, matrices)
    assert owned.shape == (padded, 12, 6)
    np.testing.assert_array_equal(owned[:count], matrices)
    assert not owned[count:].any()

    def there_and_back(x: jax.Array) -> jax.Array:
        return SLICES.to_slices(SLICES.to_owners(x), count)

    np.testing.assert_array_equal(run(there_and_back, SPEC, SPEC, matrices), matrices)


def test_a_single_matrix_is_whole_on_every_device():
    matrix = np.random.default_rng(0).normal(size=(1, 12, 6)).astype(np.float32)
    owned = run(SLICES.to_owners, SPEC, OWNED, matrix)
    np.testing.assert_array_equal(owned, np.repeat(matrix, 8, axis=0))

    def doubled(x: jax.Array) -> jax.Array:
        return SLICES.to_slices(2 * SLICES.to_owners(x), 1)

    np.testing.assert_array_equal(run(doubled, SPEC, SPEC, jnp.asarray(matrix)), 2 * matrix)
