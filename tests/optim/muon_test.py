"""Muon's matrices have owners: whole ones on single devices, exchanged once each way."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from research.core.promotion import promoting
from research.core.trees import named_leaves
from research.optim.muon import muon
from research.optim.optimizers import OptimConfig, build_optimizer
from research.optim.schedules import ScheduleConfig
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.parallel.parameter import Axes, Parameter, logical_axes
from research.scaling.collectives import collectives
from research.training.state import abstract_state

D, F = 16, 24
FSDP_TENSOR = MeshConfig(data=1, fsdp=4, tensor=2)
FSDP_TENSOR_EXPERT = MeshConfig(data=1, fsdp=2, tensor=2, expert=2)
# name -> axes, shape of a kernel
KERNELS: dict[str, tuple[Axes, tuple[int, ...]]] = {
    "layers": (Axes(("layers", "embed", "mlp"), "kernel", 1), (8, D, F)),
    "layers that devices do not divide": (Axes(("layers", "mlp", "embed"), "kernel", 1), (3, F, D)),
    "experts": (Axes(("layers", "expert", "embed", "mlp"), "kernel", 1), (2, 4, D, F)),
    "heads": (Axes(("layers", "heads", "head", "embed"), "kernel", 2), (2, 4, 3, D)),
    "one matrix": (Axes(("embed", "mlp"), "kernel", 1), (D, F)),
    "one of two matrices": (Axes(("mlp", "embed"), "kernel", 1), (F, D)),
    "the other": (Axes(("mlp", "embed"), "kernel", 1), (F, D)),
    "not sharded": (Axes(("rank", "router"), "kernel", 1), (5, 7)),
    "table": (Axes(("vocab", "embed"), "table"), (8, D)),
    "scale": (Axes(("layers", "embed"), "scale"), (8, D)),
}


def random_tree(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, (_, shape) in KERNELS.items()}


def boxed(names: Any = tuple(KERNELS)) -> dict[str, Parameter]:
    return {
        name: Parameter(
            jax.ShapeDtypeStruct(shape, jnp.float32),
            names=axes.names,
            kind=axes.kind,
            num_inputs=axes.num_inputs,
        )
        for name, (axes, shape) in KERNELS.items()
        if name in names
    }


def steps(optimizer: optax.GradientTransformation, gradients: list[Any], place: Any) -> Any:
    """Parameters and state after an update for each gradient, laid out by `place`."""
    params, state = place(random_tree(0), jax.jit(optimizer.init)(random_tree(0)))
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(place(gradient), state, params)
        params = promoting(optax.apply_updates)(params, updates)
        jax.block_until_ready(params)
    return params, state


def in_place(*trees: Any) -> Any:
    return trees if len(trees) > 1 else trees[0]


def test_update_and_state_are_those_of_optax_on_one_device():
    axes = {name: axes for name, (axes, _) in KERNELS.items()}

    def numbers(axes: Axes) -> contrib.MuonDimensionNumbers | None:
        inputs, outputs = axes.inputs_and_outputs()
        is_kernel = axes.kind == "kernel"
        return contrib.MuonDimensionNumbers(inputs, outputs) if is_kernel else None

    options = {"adam_b1": 0.9, "adam_b2": 0.95, "consistent_rms": 0.2}
    theirs = contrib.muon(
        1.0,
        beta=0.9,
        eps=1e-6,
        muon_weight_dimension_numbers={name: numbers(each) for name, each in axes.items()},
        **options,
    )
    ours = muon(axes, beta=0.9, adam_beta2=0.95, epsilon=1e-6, rms=0.2)
    gradients = [random_tree(1), random_tree(2)]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected, found = (
            named_leaves(steps(optimizer, gradients, in_place)) for optimizer in (theirs, ours)
        )
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(leaf), err_msg=name)


def on_mesh(name: str, mesh: jax.sharding.Mesh) -> Any:
    """Parameters and state after two updates on a mesh."""
    config = OptimConfig(name=name, schedule=ScheduleConfig(name="constant"), learning_rate=0.1)
    optimizer, _ = build_optimizer(config, logical_axes(boxed()), 10)
    abstract = abstract_state(boxed(), optimizer, mesh, keep_ema=False)

    def place(params: Any, state: Any = None) -> Any:
        placed = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, abstract.params))
        if state is None:
            return placed
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state)
        return placed, jax.device_put(state, shardings)

    with jax.set_mesh(mesh):
        return steps(optimizer, [random_tree(1), random_tree(2)], place)


@pytest.mark.parametrize("mesh", [FSDP_TENSOR, FSDP_TENSOR_EXPERT], ids=["fsdp", "expert"])
def test_sharded_matrices_take_the_steps_of_one_device(mesh: MeshConfig):
    found = named_leaves(on_mesh("muon", make_mesh(mesh)))
    expected = named_leaves(on_mesh("muon", make_mesh(MeshConfig(), jax.devices()[:1])))
    for name, leaf in expected.items():
        np.testing.assert_allclose(
            np.asarray(found[name]), np.asarray(leaf), atol=1e-5, err_msg=name
        )


def bytes_sent(
    optimizer: optax.GradientTransformation, names: tuple[str, ...], mesh: jax.sharding.Mesh
) -> dict[str, float]:
    """Bytes that a device sends in an update, by the kind of collective."""
    state = abstract_state(boxed(names), optimizer, mesh, keep_ema=False)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (state.params, state.opt_state))
    update = jax.jit(promoting(optimizer.update), out_shardings=shardings)
    with jax.set_mesh(mesh):
        compiled = update.lower(state.params, state.opt_state, state.params).compile()
    sent: dict[str, float] = {}
    for one in collectives(compiled.as_text(), mesh):
        sent[one.kind] = sent.get(one.kind, 0.0) + one.volume
    return {kind: volume for kind, volume in sent.items() if volume}


@pytest.mark.parametrize(
    ("names", "mesh", "padded", "devices"),
    [
        # Matrices after padding to a multiple of the devices that slice each of them
        (("layers",), FSDP_TENSOR, 8, 8),
        (("layers that devices do not divide",), FSDP_TENSOR, 8, 8),
        (("experts",), FSDP_TENSOR, 8, 8),
        # Each device has 2 layers of 2 experts, whose matrices 4 devices slice.
        (("experts",), FSDP_TENSOR_EXPERT, 4, 4),
        (("one of two matrices", "the other"), FSDP_TENSOR, 8, 8),
    ],
)
def test_one_exchange_each_way_of_the_bytes_of_the_momentum(
    names: tuple[str, ...], mesh: MeshConfig, padded: int, devices: int
):
    axes = {name: KERNELS[name][0] for name in names}
    optimizer = muon(axes, beta=0.9, adam_beta2=0.95, epsilon=1e-6, rms=0.2)
    of_device = padded * 4 * D * F / devices
    expected = 2 * of_device * (devices - 1) / devices
    assert bytes_sent(optimizer, names, make_mesh(mesh)) == {"all-to-all": expected}


def test_a_single_matrix_is_gathered_once():
    axes = {"one matrix": KERNELS["one matrix"][0]}
    optimizer = muon(axes, beta=0.9, adam_beta2=0.95, epsilon=1e-6, rms=0.2)
    found = bytes_sent(optimizer, ("one matrix",), make_mesh(FSDP_TENSOR))
    assert found == {"all-gather": 4 * D * F * 7 / 8}


def test_iterations_on_slices_would_exchange_many_times_as_much():  # the control
    numbers = {"layers": contrib.MuonDimensionNumbers((1,), (2,))}
    optimizer = contrib.muon(1.0, muon_weight_dimension_numbers=numbers)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = bytes_sent(optimizer, ("layers",), make_mesh(FSDP_TENSOR))
    one_exchange_each_way = 2 * 4 * D * F * 7 / 8
    assert sum(found.values()) > 10 * one_exchange_each_way
