"""Small training states: one dict of parameters, Adam's state of it, scanned or unrolled, on any
mesh.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.core.promotion import promoting
from research.training.checkpoints import Checkpoints

LAYERS, WIDTH, HIDDEN, VOCABULARY = 3, 8, 32, 96


@struct.dataclass
class State:
    """The same fields as a training state."""

    step: Any
    params: Any
    opt_state: Any
    ema: Any


def params(seed: int, scanned: bool) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(seed), LAYERS)
    layers = [
        {
            "mlp": {
                "kernel": jax.random.normal(key, (WIDTH, HIDDEN)),
                "bias": jnp.full((HIDDEN,), i, jnp.bfloat16),
            },
            "scale": jax.random.uniform(key, (WIDTH,)),
        }
        for i, key in enumerate(keys)
    ]
    blocks = {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)} if scanned else {}
    unrolled = {} if scanned else {f"layers_{i}": layer for i, layer in enumerate(layers)}
    return (
        {"embed": jax.random.normal(keys[0], (VOCABULARY, WIDTH)).astype(jnp.bfloat16)}
        | blocks
        | unrolled
    )


def new_state(seed: int = 0, scanned: bool = False, ema: bool = False) -> State:
    """A state whose every leaf differs from zero, so that a lost array shows."""
    p = params(seed, scanned)
    optimizer = optax.adam(1e-3)
    gradients = jax.tree.map(lambda x: x * 2 + 1, p)
    _, opt_state = promoting(optimizer.update)(gradients, optimizer.init(p), p)
    return State(jnp.int32(7), p, opt_state, jax.tree.map(lambda x: x * 3, p) if ema else None)


def shardings(state: Any, mesh: Mesh, axes: tuple[str, ...]) -> Any:
    """The last axis of each array over `axes`, where they divide it."""
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]

    def one(leaf: Any) -> NamedSharding:
        divides = leaf.ndim > 0 and leaf.shape[-1] % size == 0
        return NamedSharding(
            mesh, PartitionSpec(*([None] * (leaf.ndim - 1)), axes) if divides else PartitionSpec()
        )

    return jax.tree.map(one, state)


def on_mesh(state: Any, mesh: Mesh, axes: tuple[str, ...]) -> Any:
    return jax.device_put(state, shardings(state, mesh, axes))


def abstract(state: Any, mesh: Mesh | None = None, axes: tuple[str, ...] = ()) -> Any:
    """Shapes of `state`, on a mesh or where it lies now."""
    places = (
        jax.tree.map(lambda x: x.sharding, state) if mesh is None else shardings(state, mesh, axes)
    )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places
    )


def assert_same(a: Any, b: Any) -> None:
    """Asserts the same structure, types and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert jax.device_get(x).tobytes() == jax.device_get(y).tobytes()


def write(checkpoints: Checkpoints, step: int, state: Any) -> None:
    """Saves a checkpoint, and returns when it is whole."""
    checkpoints.save(step, state, {})
    checkpoints.wait()
