"""Muon on a mesh: each matrix is orthogonalized as a whole, by the device that owns it.

Newton–Schulz multiplies a matrix with itself. On slices of it every iteration would gather them
again; here they are brought together once (`parallel.owners`).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float
from optax import contrib

from research.core.trees import named_leaves, path_name
from research.parallel.owners import Slices
from research.parallel.parameter import Axes
from research.parallel.rules import parameter_spec
from research.parallel.shard_map import shard_map


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the matrices of a kernel lie on the mesh in context.

    Attributes:
      shape: of a matrix, inputs first.
      num_inputs: axes of the shape that are inputs.
      dtype: of the kernel.
      slices: of each matrix.
      stack_axes: mesh axes over which the matrices (layers, experts) are sharded.
      exchanged_alone: the index of a kernel that is exchanged by itself, or None.
    """

    shape: tuple[int, ...]
    num_inputs: int
    dtype: Any
    slices: Slices
    stack_axes: tuple[str, ...]
    exchanged_alone: int | None = None


def muon(
    axes: Any, *, beta: float, adam_beta2: float, epsilon: float, rms: float
) -> optax.GradientTransformation:
    """Returns the update of `optax.contrib.muon` at rate 1 and without weight decay: Muon with
    Nesterov momentum for kernels, AdamW for the rest; the state is the same too.

    Each layer and each expert is a matrix of its own. Tables are left to AdamW: a row belongs to
    one id, and rows of rare ids seldom have a gradient.

    Args:
      axes: tree of the parameters' `parallel.parameter.Axes`.
      beta: decay of the momentum, and of AdamW's first moment.
      adam_beta2: decay of AdamW's second moment.
      epsilon: added to denominators.
      rms: root mean square of an update of a kernel.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; owners of matrices: Liu et al.
        2025, arXiv:2502.16982, section 2.3.
    """

    def label(axes: Axes) -> str:
        return "muon" if axes.kind == "kernel" else "adam"

    adam = optax.adamw(1.0, beta, adam_beta2, epsilon, weight_decay=0.0, nesterov=True)
    orthogonal = _scale_by_muon(named_leaves(axes), beta, epsilon, rms)
    # The steps of both go down.
    kernels = optax.chain(orthogonal, optax.scale(-1.0))
    labels = jax.tree.map(label, axes)
    return optax.partition({"muon": kernels, "adam": adam}, labels)


def _scale_by_muon(
    axes: dict[str, Axes], beta: float, epsilon: float, rms: float
) -> optax.GradientTransformation:
    """Returns the part of `muon` for kernels, whose axes it takes by name."""
    init = contrib.scale_by_muon().init

    def nesterov(momentum: Array, gradient: Array) -> Array:
        old_part = beta * momentum
        new_part = (1 - beta) * gradient
        return old_part + new_part

    def update(updates: Any, state: contrib.MuonState, params: Any = None) -> tuple[Any, Any]:
        momentum = optax.tree.update_moment(updates, state.mu, beta, 1)
        count = optax.safe_increment(state.count)
        # Nesterov: the momentum as it would be after the same gradient once more.
        next_count = optax.safe_increment(count)
        unbiased = optax.tree.bias_correction(momentum, beta, next_count)
        gradient = optax.tree.bias_correction(updates, beta, count)
        direction = jax.tree.map(nesterov, unbiased, gradient)

        def scaled(path: tuple[Any, ...], matrix: Array) -> Array:
            name = path_name(path)
            return _rms_scale(axes[name], matrix.shape, rms) * matrix

        direction = _orthogonalized(direction, axes, epsilon)
        direction = jax.tree_util.tree_map_with_path(scaled, direction)
        return direction, contrib.MuonState(count, momentum, state.ns_coeffs)

    return optax.GradientTransformation(init, update)


def _rms_scale(axes: Axes, shape: tuple[int, ...], rms: float) -> Float[Array, ""]:
    """Returns what gives an orthogonal matrix this root mean square."""
    # [L, D, N, H] -> D inputs, N·H outputs
    inputs, outputs = axes.inputs_and_outputs()
    fan_in = math.prod(shape[axis] for axis in inputs)
    fan_out = math.prod(shape[axis] for axis in outputs)
    larger = max(fan_in, fan_out)
    root = jnp.sqrt(jnp.float32(larger))
    return root * rms


def _orthogonalized(tree: Any, axes_by_name: dict[str, Axes], epsilon: float) -> Any:
    """Returns the kernels of a tree with the singular values of each matrix near 1."""
    paths_and_kernels, structure = jax.tree_util.tree_flatten_with_path(tree)
    kernels = []
    axes = []
    for path, kernel in paths_and_kernels:
        name = path_name(path)
        kernels.append(kernel)
        axes.append(axes_by_name[name])

    # Kernels of one matrix each, as of layers that are not stacked, have owners together.
    groups: dict[Layout, list[int]] = {}
    for index, kernel in enumerate(kernels):
        layout = _layout(axes[index], kernel, index)
        members = groups.setdefault(layout, [])
        members.append(index)

    results = list(kernels)
    for layout, members in groups.items():
        specs = []
        group = []
        for index in members:
            mesh_axes = _mesh_axes(axes[index], kernels[index].shape)
            specs.append(PartitionSpec(*mesh_axes))
            group.append(kernels[index])
        found = _by_owners(layout, specs, group, epsilon)
        for index, result in zip(members, found, strict=True):
            results[index] = result
    return jax.tree.unflatten(structure, results)


def _layout(axes: Axes, kernel: Float[Array, "..."], index: int) -> Layout:
    """Returns the layout of a kernel; `index` tells it from others."""
    inputs, outputs = axes.inputs_and_outputs()
    rank = len(inputs) + len(outputs)
    stacked = kernel.ndim - rank
    assert inputs[0] == stacked, f"stacked axes of {axes.names} come first"

    # ("layers", "embed", "mlp") of 4 × 2 devices: (), ("fsdp",), ("tensor",) and 1, 4, 2
    mesh = jax.sharding.get_abstract_mesh()
    mesh_axes = _mesh_axes(axes, kernel.shape)
    shards = []
    for names in mesh_axes:
        sizes = [mesh.shape[name] for name in names]
        shards.append(math.prod(sizes))
    slices = Slices(mesh_axes[stacked:], tuple(shards[stacked:]))
    stack_axes = itertools.chain.from_iterable(mesh_axes[:stacked])

    # A device's part of the stack may be enough for all owners.
    matrices = math.prod(kernel.shape[:stacked])
    local_matrices = matrices // math.prod(shards[:stacked])
    exchanged_alone = None
    if local_matrices >= slices.devices:
        exchanged_alone = index
    return Layout(
        shape=kernel.shape[stacked:],
        num_inputs=len(inputs),
        dtype=kernel.dtype,
        slices=slices,
        stack_axes=tuple(stack_axes),
        exchanged_alone=exchanged_alone,
    )


def _mesh_axes(axes: Axes, shape: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
    """Returns for each axis of a kernel the mesh axes that shard it over several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ((),) * len(shape)
    mesh_axes = []
    for entry in parameter_spec(axes.names, shape, mesh):
        # None, "tensor" or ("fsdp", "context") -> a tuple
        names = entry or ()
        if isinstance(names, str):
            names = (names,)
        present = [name for name in names if name in mesh.axis_names]
        used = [name for name in present if mesh.shape[name] > 1]
        mesh_axes.append(tuple(used))
    return tuple(mesh_axes)


def _by_owners(
    layout: Layout, specs: Sequence[PartitionSpec], kernels: Sequence[Array], epsilon: float
) -> Sequence[Array]:
    """Returns kernels of one layout, each matrix orthogonalized by the device that owns it.

    Args:
      layout: of all of them.
      specs: of each of them.
      kernels: stacked matrices.
      epsilon: added to the norm of a matrix.
    """
    orthogonalize = functools.partial(_orthogonalize_slices, layout, epsilon)
    joined = layout.slices.joined
    if not joined:
        return orthogonalize(*kernels)
    by_kernel = tuple(specs)
    mapped = shard_map(orthogonalize, by_kernel, by_kernel, axes=(*joined, *layout.stack_axes))
    return mapped(*kernels)


def _orthogonalize_slices(layout: Layout, epsilon: float, *kernels: Array) -> tuple[Array, ...]:
    """Returns a device's slices of orthogonalized matrices from its slices of the kernels."""
    # [L, E, d, f] and [L, d, f] -> [L·E + L, d, f]
    rank = len(layout.shape)
    stacks = []
    for kernel in kernels:
        matrix = kernel.shape[-rank:]
        stacks.append(kernel.reshape(-1, *matrix))
    slices = jnp.concatenate(stacks)

    if layout.slices.joined:
        matrices = layout.slices.to_owners(slices)
        matrices = _newton_schulz(layout, matrices, epsilon)
        slices = layout.slices.to_slices(matrices, slices.shape[0])
    else:
        slices = _newton_schulz(layout, slices, epsilon)

    results = []
    start = 0
    for stack, kernel in zip(stacks, kernels, strict=True):
        stop = start + stack.shape[0]
        result = slices[start:stop]
        results.append(result.reshape(kernel.shape))
        start = stop
    return tuple(results)


def _newton_schulz(
    layout: Layout, matrices: Float[Array, "n ..."], epsilon: float
) -> Float[Array, "n ..."]:
    """Returns matrices with singular values near 1."""
    # Axis 0 counts matrices: [n, D, N, H] -> inputs (1,), outputs (2, 3)
    first_output = 1 + layout.num_inputs
    inputs = tuple(range(1, first_output))
    outputs = tuple(range(first_output, matrices.ndim))
    # Without momentum the update of optax is the iteration alone.
    iteration = contrib.scale_by_muon(
        beta=0.0,
        eps=epsilon,
        nesterov=False,
        weight_dimension_numbers=contrib.MuonDimensionNumbers(inputs, outputs),
    )
    state = iteration.init(matrices)
    result, _ = iteration.update(matrices, state)
    return result
