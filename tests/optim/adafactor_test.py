"""Adafactor's sums over rows and columns of sharded matrices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.core.promotion import promoting
from research.core.trees import named_leaves
from research.optim.optimizers import OptimConfig, build_optimizer
from research.optim.schedules import ScheduleConfig
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.parallel.parameter import Parameter, logical_axes
from research.scaling.collectives import collectives
from research.training.state import abstract_state

# As small as Adafactor still keeps rows and columns alone.
LAYERS, EXPERTS, D, F = 2, 2, 128, 256


def box(names: tuple[str, ...], shape: tuple[int, ...]) -> Parameter:
    return Parameter(
        jax.ShapeDtypeStruct(shape, jnp.float32), names=names, kind="kernel", num_inputs=1
    )


BOXED = {
    "layers": box(("layers", "embed", "mlp"), (LAYERS, D, F)),
    "experts": box(("layers", "expert", "mlp", "embed"), (LAYERS, EXPERTS, F, D)),
}


def run(mesh: jax.sharding.Mesh) -> tuple[dict[str, np.ndarray], float]:
    """Parameters and state after two updates, and the bytes that a device sends in one."""
    config = OptimConfig("adafactor", learning_rate=0.1, schedule=ScheduleConfig(name="constant"))
    optimizer, _ = build_optimizer(config, logical_axes(BOXED), 10)
    abstract = abstract_state(BOXED, optimizer, mesh, keep_ema=False)
    of_params, of_state = jax.tree.map(
        lambda leaf: leaf.sharding, (abstract.params, abstract.opt_state)
    )
    update = jax.jit(promoting(optimizer.update), out_shardings=(of_params, of_state))
    with jax.set_mesh(mesh):
        compiled = update.lower(abstract.params, abstract.opt_state, abstract.params).compile()
        params = jax.device_put(arrays(0), of_params)
        state = jax.device_put(jax.jit(optimizer.init)(arrays(0)), of_state)
        for seed in (1, 2):
            updates, state = compiled(jax.device_put(arrays(seed), of_params), state, params)
            params = jax.block_until_ready(optax.apply_updates(params, updates))
    sent = sum(one.volume for one in collectives(compiled.as_text(), mesh))
    return {name: np.asarray(leaf) for name, leaf in named_leaves((params, state)).items()}, sent


def arrays(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=leaf.value.shape).astype(np.float32) for name, leaf in BOXED.items()
    }


def test_sharded_matrices_take_the_steps_of_one_device_and_exchange_rows_and_columns_alone():
    expected, nothing = run(make_mesh(MeshConfig(), jax.devices()[:1]))
    found, sent = run(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, expert=2)))
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, atol=1e-5, err_msg=name)
    # One number for each row and each column of each matrix, and twice that at most; the matrices
    # themselves are many times as large.
    matrices = LAYERS * (1 + EXPERTS)
    of_vectors = matrices * (D + F) * 4
    of_matrices = matrices * D * F * 4
    assert nothing == 0
    assert of_vectors / 2 < sent < 2 * of_vectors < of_matrices / 20
