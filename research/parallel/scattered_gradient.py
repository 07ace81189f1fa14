"""Gradients of parameters that a `shard_map` takes whole, scattered as they are summed.

The gradient of an argument that `shard_map` takes whole on each device is summed over all of them
at once. Where `data` replicates what `fsdp` shards, the partitioner makes no reduce-scatter of that
sum: each device gets the whole of it, and drops all but its part.
"""

import functools

import jax
from jaxtyping import Array, Float

from research.parallel.target import platform


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def scatter_gradient(
    whole: Float[Array, "..."],
    part: Float[Array, "..."],
    axes: tuple[str, ...],
    sharded_axis: int,
) -> Float[Array, "..."]:
    """Returns `whole`, whose gradient becomes that of `part`; inside a `shard_map`.

    Each device gets its part of the sum over `axes`. What sums over other mesh axes is the
    `shard_map`, which must not differentiate `whole`.

    Args:
      whole: on each device the same.
      part: of it, this device's.
      axes: mesh axes that shard `part`, outermost first.
      sharded_axis: which axis of `whole` they shard.
    """
    return whole


def _scatter_fwd(
    whole: Array, part: Array, axes: tuple[str, ...], sharded_axis: int
) -> tuple[Array, None]:
    return whole, None


def _scatter_bwd(
    axes: tuple[str, ...], sharded_axis: int, saved: None, g: Float[Array, "..."]
) -> tuple[None, Array]:
    # XLA for CPU cannot compile sums in bfloat16 over some axes.
    added_in = "float32" if platform() == "cpu" else g.dtype
    total = jax.lax.psum_scatter(
        g.astype(added_in), axes, scatter_dimension=sharded_axis, tiled=True
    )
    return None, total.astype(g.dtype)


scatter_gradient.defvjp(_scatter_fwd, _scatter_bwd)
