"""The mixture of experts instead of a feed-forward sublayer."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from research.kernels.grouped_matmul import grouped_matmul
from research.kernels.weights import Weight, as_shard_map_argument, is_weight, split_axes
from research.models.attention import residual_stddev
from research.models.config import MlpConfig, ModelConfig
from research.models.layers import Projection, parameter
from research.models.mlp import Mlp, activate
from research.models.reports import LayerReport
from research.models.router import count_experts, keep_within_capacity, route
from research.parallel.expert_dispatch import Dispatch, run_experts
from research.parallel.mesh_axes import CONTEXT_AXIS, EXPERT_AXIS, TENSOR_AXIS
from research.parallel.parameter import Axes
from research.parallel.row_gradients import width_axes_of
from research.parallel.scattered_gradient import scatter_gradient
from research.parallel.shard_map import batch_axes, dividing_axes, shard_map

# A kernel [E, inputs, outputs] and its bias [E, outputs] or None.
KernelAndBias = tuple[Weight, Float[Array, "E outputs"] | None]


class Experts(nn.Module):
    """A mixture of experts: Σ_e w_e · expert_e(x) over the chosen experts e, plus the shared
    expert.

    Returns the sum, and the layer's router loss and counts.

    Source: Shazeer et al. 2017, arXiv:1701.06538, equation 1; dropless as in Gale et al. 2022,
    arXiv:2211.15841; shared experts, sigmoid scores and groups: DeepSeek-AI 2024, arXiv:2412.19437,
    equations 12 to 16.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T D"], LayerReport]:
        model = self.config
        c = model.experts
        assert c is not None

        # The router is small and its choice is sharp, so it is computed in float32 whatever the
        # type.
        router = Projection(
            (c.num_experts,),
            ("embed", "router"),
            use_bias=c.router_bias,
            stddev=model.init_stddev,
            param_dtype=model.param_dtype,
            name="router",
        )
        logits = router(x.astype(jnp.float32))
        chosen, weights, router_loss = route(c, logits, self._selection_bias(), real)

        kept = keep_within_capacity(c, chosen, real)
        kernels = ExpertKernels(model, name="experts")()
        y, lost = _apply_experts(model, x, kept, weights.astype(x.dtype), kernels)
        if c.shared_dim:
            y = y + self._shared_expert(x)

        counts = count_experts(c, logits, chosen, kept, real)
        counts = dataclasses.replace(counts, dropped=counts.dropped + lost.astype(jnp.float32))
        return y, LayerReport(router_loss, counts)

    def _selection_bias(self) -> Float[Array, "E"] | None:
        """Returns the bias of each expert's score in the choice, if the model has one."""
        c = self.config.experts
        if not c.selection_bias:
            return None
        zeros = nn.initializers.zeros
        axes = Axes(("selection",), "selection")
        # In float32 whatever the type of the others: its small steps would be lost in bfloat16.
        return parameter(self, "selection_bias", zeros, (c.num_experts,), axes, "float32")

    def _shared_expert(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the output of the expert that every token goes to, gated where the config says
        so.
        """
        model = self.config
        y = Mlp(model, model.experts.shared_dim, name="shared")(x)
        if not model.experts.shared_gate:
            return y
        gate = Projection(
            (1,),
            ("embed", "single"),
            stddev=model.init_stddev,
            dtype=model.dtype,
            param_dtype=model.param_dtype,
            name="shared_gate",
        )
        return y * jax.nn.sigmoid(gate(x))


class ExpertKernels(nn.Module):
    """The projections of all experts: `up`, `gate` [E, D, F] and `down` [E, F, D], each with its
    bias or None.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self) -> dict[str, KernelAndBias]:
        model = self.config
        width = model.experts.hidden_dim
        inward = (model.embed_dim, width)
        outward = (width, model.embed_dim)

        kernels = {"up": self._kernel("up", inward, ("embed", "mlp"), model.init_stddev)}
        if model.mlp.gated:
            kernels["gate"] = self._kernel("gate", inward, ("embed", "mlp"), model.init_stddev)
        kernels["down"] = self._kernel("down", outward, ("mlp", "embed"), residual_stddev(model))
        return kernels

    def _kernel(
        self, name: str, shape: tuple[int, int], names: tuple[str, str], stddev: float
    ) -> KernelAndBias:
        kernel = ExpertKernel(
            self.config.experts.num_experts,
            shape,
            names,
            stddev,
            use_bias=self.config.mlp.bias,
            param_dtype=self.config.param_dtype,
            name=name,
        )
        return kernel()


class ExpertKernel(nn.Module):
    """One projection of all experts, and its bias or None."""

    num_experts: int
    shape: tuple[int, int]
    names: tuple[str, str]
    stddev: float
    use_bias: bool
    param_dtype: str

    @nn.compact
    def __call__(self) -> KernelAndBias:
        init = nn.initializers.normal(self.stddev)
        shape = (self.num_experts, *self.shape)
        axes = Axes(("expert", *self.names), "kernel", num_inputs=1)
        kernel = parameter(self, "kernel", init, shape, axes, self.param_dtype)
        if not self.use_bias:
            return kernel, None

        zeros = nn.initializers.zeros
        shape = (self.num_experts, self.shape[1])
        axes = Axes(("expert", self.names[1]), "bias")
        return kernel, parameter(self, "bias", zeros, shape, axes, self.param_dtype)


def _apply_experts(
    model: ModelConfig,
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T choices"],
    weights: Float[Array, "B T choices"],
    kernels: dict[str, KernelAndBias],
) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
    """Returns the weighted sum of the chosen experts' outputs, and how many choices were lost.

    On a mesh each device has some of the tokens and some of the experts (`parallel.expert_dispatch`
    brings them together). Where the width F is sharded, it has a slice of each of its experts, and
    the devices' sums are added.
    """
    up_kernel, _ = kernels["up"]
    experts = up_kernel.shape[0]
    row_axes = batch_axes(x.shape[0])
    context_axes = dividing_axes((CONTEXT_AXIS,), x.shape[1])
    width_axes = dividing_axes((TENSOR_AXIS,), up_kernel.shape[2])
    expert_axes = dividing_axes((EXPERT_AXIS,), experts)
    dispatch = Dispatch(experts, buffer_factor=model.experts.buffer_factor)
    if expert_axes:
        dispatch = dataclasses.replace(
            dispatch,
            axis=EXPERT_AXIS,
            devices=jax.sharding.get_abstract_mesh().shape[EXPERT_AXIS],
            tokens_sharded=EXPERT_AXIS in row_axes,
        )
    # The mesh axes of tokens that shard the width D of kernels too.
    summing_axes = tuple(axis for axis in (*row_axes, *context_axes) if axis not in expert_axes)
    part_axes = width_axes_of(summing_axes, x.shape[2])
    # What is added up: slices of the width, and experts that all devices' tokens went to.
    sum_axes = width_axes
    if expert_axes and not dispatch.tokens_sharded:
        sum_axes = (*width_axes, EXPERT_AXIS)

    def apply_shard(
        x: Array, chosen: Array, weights: Array, kernels: dict[str, Any], parts: dict[str, Array]
    ) -> tuple[Array, Array]:
        kernels = _join_gradients(kernels, parts, part_axes)
        if width_axes:
            kernels = _bias_on_one_shard(kernels, width_axes)
        apply = functools.partial(_apply_local_experts, model.mlp, kernels)
        flat = (array.reshape(-1, array.shape[-1]) for array in (x, chosen, weights))
        y, lost = run_experts(dispatch, apply, *flat)
        y = y.reshape(x.shape)
        if sum_axes:
            y = jax.lax.psum(y, sum_axes)
        if row_axes or context_axes:
            lost = jax.lax.psum(lost, (*row_axes, *context_axes))
        return y, lost

    if not (row_axes or context_axes or width_axes or expert_axes):
        return apply_shard(x, chosen, weights, kernels, {})
    tokens = PartitionSpec(row_axes or None, context_axes or None)
    kernels = jax.tree.map(as_shard_map_argument, kernels, is_leaf=is_weight)
    specs = _kernel_specs(kernels, width_axes, expert_axes)
    kernels, parts = _split_gradients(kernels, part_axes)
    in_specs = (tokens, tokens, tokens, specs, _part_specs(parts, specs, part_axes))
    apply = shard_map(apply_shard, in_specs, (tokens, PartitionSpec()))
    return apply(x, chosen, weights, kernels, parts)


def _split_gradients(
    kernels: dict[str, KernelAndBias], part_axes: tuple[str, ...]
) -> tuple[dict[str, KernelAndBias], dict[str, Array]]:
    """Returns kernels without a gradient, and by name those that get it in parts."""
    if not part_axes:
        return kernels, {}
    without = {}
    parts = {}
    for name, (kernel, bias) in kernels.items():
        if is_weight(kernel):
            # Of several arrays, which are not trained
            without[name] = (kernel, bias)
            continue
        without[name] = (jax.lax.stop_gradient(kernel), bias)
        parts[name] = kernel
    return without, parts


def _join_gradients(
    kernels: dict[str, KernelAndBias], parts: dict[str, Array], part_axes: tuple[str, ...]
) -> dict[str, KernelAndBias]:
    """Returns the kernels, whose gradients are those of the parts; inside a `shard_map`."""
    joined = dict(kernels)
    for name, part in parts.items():
        kernel, bias = kernels[name]
        joined[name] = (scatter_gradient(kernel, part, part_axes, _embed_axis(name)), bias)
    return joined


def _embed_axis(name: str) -> int:
    """Returns which axis of a kernel is D: `up` and `gate` are [E, D, F], `down` is [E, F, D]."""
    return 2 if name == "down" else 1


def _part_specs(
    parts: dict[str, Array], wholes: dict[str, Any], part_axes: tuple[str, ...]
) -> dict[str, PartitionSpec]:
    """Returns how the parts of kernels are sharded: as the kernels, and D over `part_axes`."""
    specs = {}
    for name in parts:
        whole, _ = wholes[name]
        padding = (None,) * (3 - len(whole))
        axes = [*whole, *padding]
        axes[_embed_axis(name)] = part_axes
        specs[name] = PartitionSpec(*axes)
    return specs


def _bias_on_one_shard(
    kernels: dict[str, KernelAndBias], width_axes: tuple[str, ...]
) -> dict[str, KernelAndBias]:
    """Returns the kernels with a bias of `down` that is added by the first shard of the width only,
    not once by each.
    """
    kernel, bias = kernels["down"]
    if bias is None:
        return kernels
    bias = jnp.where(jax.lax.axis_index(width_axes) == 0, bias, 0.0)
    return kernels | {"down": (kernel, bias)}


def _kernel_specs(
    kernels: dict[str, KernelAndBias], width_axes: tuple[str, ...], expert_axes: tuple[str, ...]
) -> dict[str, Any]:
    """Returns how kernels and biases are sharded over the mesh axes of the width F and of the
    experts.
    """
    # `up` and `gate` are [E, D, F] with biases [E, F]; `down` is [E, F, D] with a bias [E, D].
    width = width_axes or None
    experts = expert_axes or None
    inward = (PartitionSpec(experts, None, width), PartitionSpec(experts, width))
    outward = (PartitionSpec(experts, width), PartitionSpec(experts))
    specs = {}
    for name, (kernel, bias) in kernels.items():
        kernel_spec, bias_spec = outward if name == "down" else inward
        kernel_specs = split_axes(kernel, kernel_spec)
        specs[name] = (kernel_specs, None if bias is None else bias_spec)
    return specs


def _apply_local_experts(
    config: MlpConfig,
    kernels: dict[str, KernelAndBias],
    rows: Float[Array, "rows D"],
    group_sizes: Int[Array, "E"],
    expert_of_row: Int[Array, "rows"],
) -> Float[Array, "rows D"]:
    """Returns the outputs of each expert for its group of rows.

    Args:
      config: of each expert.
      kernels: of the experts of this device.
      rows: sorted by expert.
      group_sizes: rows of each expert.
      expert_of_row: of each row.
    """

    def project(name: str, rows: Float[Array, "rows inputs"]) -> Float[Array, "rows outputs"]:
        kernel, bias = kernels[name]
        y = grouped_matmul(rows, kernel, group_sizes)
        if bias is None:
            return y
        return y + bias[expert_of_row].astype(y.dtype)

    up = project("up", rows)
    gate = project("gate", rows) if "gate" in kernels else None
    return project("down", activate(config, up, gate))
