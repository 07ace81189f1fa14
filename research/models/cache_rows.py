"""Arrays of caches by row: where they lie on a mesh, and how tokens are written into them."""

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from research.parallel.rules import constrain

# The logical axes of a layer's keys and values: all slots of a row are on the devices of its heads.
HEADS = ("batch", None, "kv_heads", "head")


def write_tokens(
    slots: Float[Array, "B S *rest"],
    new: Float[Array, "B T *rest"],
    start: Int[Array, "B"],
    names: tuple[str | None, ...],
) -> Array:
    """Returns the slots with T tokens written from slot `start` of each row on, laid out by the
    names of their axes.
    """

    def write_row(row: Array, tokens: Array, first: Array) -> Array:
        # [S, ...] with [T, ...] written at slot `first`.
        return jax.lax.dynamic_update_slice_in_dim(row, tokens, first, axis=0)

    written = jax.vmap(write_row)(slots, new.astype(slots.dtype), start)
    return constrain(written, names)


def slice_layer(stacked: Any, index: int | Int[Array, ""]) -> Any:
    """Returns the arrays of one layer: [L, ...] -> [...]."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 0, False), stacked)


def put_layer(stacked: Any, index: int | Int[Array, ""], layer: Any) -> Any:
    """Returns stacked arrays with those of one layer put into them."""

    def put(leaf: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(leaf, new.astype(leaf.dtype), index, 0)

    return jax.tree.map(put, stacked, layer)


def lay_out_rows(leaf: Array, names: tuple[str | None, ...]) -> Array:
    """Lays out an array of one layer, or of stacked ones: [L, B, S, K, H] as [B, S, K, H]."""
    stack = [None] * (leaf.ndim - len(names))
    return constrain(leaf, (*stack, *names))
