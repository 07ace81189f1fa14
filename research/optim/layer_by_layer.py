"""Statistics of whole arrays, taken of each layer of stacked arrays."""

from typing import Any

import jax
import optax


def layer_by_layer(inner: optax.GradientTransformation, axes: Any) -> optax.GradientTransformation:
    """Maps a transformation that uses statistics of whole arrays over the layers of stacked arrays.

    So a scanned model takes the steps of an unrolled one, and their states are the same on disk.
    Stacks may differ in depth, as those of an encoder and a decoder do.

    Args:
      inner: the transformation, which takes each array by itself.
      axes: tree of the parameters' `parallel.parameter.Axes`.
    """
    stacked = jax.tree.map(lambda axes: "layers" in axes.names, axes)
    if not any(jax.tree.leaves(stacked)):
        return inner

    # A map has one size: arrays of one depth are taken together, and all others are None then.
    def init(params: Any) -> Any:
        depths = _depths(params, stacked)

        def init_depth(depth: int) -> Any:
            own = _select(params, depths, depth)
            if depth == 0:
                return inner.init(own)
            state = jax.eval_shape(inner.init, own)
            by_layer = jax.vmap(inner.init, out_axes=_layer_axes(inner, state))
            return by_layer(own)

        return _join([init_depth(depth) for depth in _distinct(depths)])

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        depths = _depths(params, stacked)

        def update_depth(depth: int) -> tuple[Any, Any]:
            own_updates = _select(updates, depths, depth)
            own_state = _select_state(inner, state, depths, depth)
            own_params = _select(params, depths, depth)
            if depth == 0:
                return inner.update(own_updates, own_state, own_params)
            axes = _layer_axes(inner, own_state)
            by_layer = jax.vmap(inner.update, in_axes=(0, axes, 0), out_axes=(0, axes))
            return by_layer(own_updates, own_state, own_params)

        return _join([update_depth(depth) for depth in _distinct(depths)])

    return optax.GradientTransformation(init, update)


def _depths(params: Any, stacked: Any) -> Any:
    """Returns how many layers each array has: 4 of ("layers", "embed", "mlp") [4, 16, 24], 0 of
    one that is not stacked.
    """

    def depth(stacked: bool, param: Any) -> int:
        return param.shape[0] if stacked else 0

    return jax.tree.map(depth, stacked, params)


def _distinct(depths: Any) -> list[int]:
    return sorted(set(jax.tree.leaves(depths)))


def _select(tree: Any, depths: Any, depth: int) -> Any:
    """Returns the arrays of one depth, with None for the others."""

    def select(leaf: Any, its_depth: int) -> Any:
        return leaf if its_depth == depth else None

    return jax.tree.map(select, tree, depths)


def _select_state(inner: optax.GradientTransformation, state: Any, depths: Any, depth: int) -> Any:
    """Returns the state of the arrays of one depth, with None for the others; the rest of the state
    is as it was.
    """

    def select(leaf: Any, its_depth: int) -> Any:
        return leaf if its_depth == depth else None

    return optax.tree.map_params(inner.init, select, state, depths)


def _layer_axes(inner: optax.GradientTransformation, state: Any) -> Any:
    """Returns 0 for each array of a state that has layers, None for the others: a counter has
    none.
    """
    return optax.tree.map_params(
        inner.init, lambda _: 0, state, transform_non_params=lambda _: None
    )


def _join(parts: list[Any]) -> Any:
    """Returns each array of the one part that has it; counters are the same in all parts."""

    def first(*leaves: Any) -> Any:
        return next(leaf for leaf in leaves if leaf is not None)

    return jax.tree.map(first, *parts, is_leaf=lambda leaf: leaf is None)
