"""The mixture of experts instead of a feed-forward sublayer; no token is dropped."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from research.kernels.grouped_matmul import grouped_matmul
from research.kernels.weights import Weight, split_axes
from research.models.attention import residual_stddev
from research.models.config import MlpConfig, ModelConfig
from research.models.layers import Projection, parameter
from research.models.mlp import Mlp, activate
from research.models.reports import LayerReport
from research.models.router import expert_load, route
from research.parallel.mesh_axes import BATCH_AXES, TENSOR_AXIS
from research.parallel.parameter import Axes
from research.parallel.shard_map import shard_map, sharding_axes

# A kernel [E, inputs, outputs] and its bias [E, outputs] or None.
KernelAndBias = tuple[Weight, Float[Array, "E outputs"] | None]


class Experts(nn.Module):
    """A mixture of experts: Σ_e w_e · expert_e(x) over the chosen experts e, plus the shared
    expert.

    Returns the sum, and the layer's router loss and expert load.

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

        kernels = ExpertKernels(model, name="experts")()
        y = _apply_experts(model.mlp, x, chosen, weights.astype(x.dtype), kernels)
        if c.shared_dim:
            y = y + self._shared_expert(x)
        return y, LayerReport(router_loss, expert_load(c.num_experts, chosen, real))

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
    config: MlpConfig,
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T choices"],
    weights: Float[Array, "B T choices"],
    kernels: dict[str, KernelAndBias],
) -> Float[Array, "B T D"]:
    """Returns the weighted sum of the chosen experts' outputs.

    On a mesh each device takes its own tokens through all experts. Where the width F is sharded, it
    has a slice of each expert, and the devices' sums are added.
    """
    batch_axes = sharding_axes(BATCH_AXES, x.shape[0])
    up_kernel, _ = kernels["up"]
    width_axes = sharding_axes((TENSOR_AXIS,), up_kernel.shape[2])
    if not batch_axes and not width_axes:
        return _apply_local_experts(config, x, chosen, weights, kernels)

    def apply_shard(x: Array, chosen: Array, weights: Array, kernels: dict[str, Any]) -> Array:
        if not width_axes:
            return _apply_local_experts(config, x, chosen, weights, kernels)
        kernel, bias = kernels["down"]
        if bias is not None:
            # Added by the first shard of the width only, not once by each.
            bias = jnp.where(jax.lax.axis_index(width_axes) == 0, bias, 0.0)
            kernels = kernels | {"down": (kernel, bias)}
        y = _apply_local_experts(config, x, chosen, weights, kernels)
        return jax.lax.psum(y, width_axes)

    tokens = PartitionSpec(batch_axes or None)
    specs = _kernel_specs(kernels, width_axes)
    apply = shard_map(apply_shard, (tokens, tokens, tokens, specs), tokens)
    return apply(x, chosen, weights, kernels)


def _kernel_specs(kernels: dict[str, KernelAndBias], width_axes: tuple[str, ...]) -> dict[str, Any]:
    """Returns how kernels and biases are sharded over the mesh axes of the width F."""
    # `up` and `gate` are [E, D, F] with biases [E, F]; `down` is [E, F, D] with a bias [E, D].
    width = width_axes or None
    inward = (PartitionSpec(None, None, width), PartitionSpec(None, width))
    outward = (PartitionSpec(None, width), PartitionSpec())
    specs = {}
    for name, (kernel, bias) in kernels.items():
        kernel_spec, bias_spec = outward if name == "down" else inward
        kernel_specs = split_axes(kernel, kernel_spec)
        specs[name] = (kernel_specs, None if bias is None else bias_spec)
    return specs


def _apply_local_experts(
    config: MlpConfig,
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T choices"],
    weights: Float[Array, "B T choices"],
    kernels: dict[str, KernelAndBias],
) -> Float[Array, "B T D"]:
    """Sorts the choices by expert, multiplies each expert's group of rows with its kernels, and
    puts the rows back in order.
    """
    up_kernel, _ = kernels["up"]
    num_experts = up_kernel.shape[0]
    num_choices = chosen.shape[-1]

    # Two tokens with the experts [[2, 0], [0, 1]] are four rows: expert_of_row [2, 0, 0, 1] ->
    # order [1, 2, 3, 0], so that rows of expert 0 come first; inverse [3, 0, 1, 2].
    expert_of_row = chosen.reshape(-1)
    order = jnp.argsort(expert_of_row, stable=True)
    inverse = jnp.argsort(order)
    tokens = x.reshape(-1, x.shape[-1])
    rows = _permute(jnp.repeat(tokens, num_choices, axis=0), order, inverse)
    group_sizes = jnp.bincount(expert_of_row, length=num_experts).astype(jnp.int32)
    sorted_expert = expert_of_row[order]

    def project(name: str, rows: Float[Array, "rows inputs"]) -> Float[Array, "rows outputs"]:
        kernel, bias = kernels[name]
        y = grouped_matmul(rows, kernel, group_sizes)
        if bias is None:
            return y
        return y + bias[sorted_expert].astype(y.dtype)

    up = project("up", rows)
    gate = project("gate", rows) if "gate" in kernels else None
    y = project("down", activate(config, up, gate))

    # c counts the choices of a token: [rows, D] -> [B, T, c, D] -> [B, T, D]
    y = _permute(y, inverse, order).reshape(*chosen.shape, -1)
    return jnp.einsum("btcd,btc->btd", y, weights)


@jax.custom_vjp
def _permute(
    x: Float[Array, "rows D"], order: Int[Array, "rows"], inverse: Int[Array, "rows"]
) -> Float[Array, "rows D"]:
    """Returns x[order]; with the inverse order, the gradient is a gather too instead of a
    scatter.
    """
    return x[order]


def _permute_forward(x: Array, order: Array, inverse: Array) -> tuple[Array, Array]:
    return x[order], inverse


def _permute_backward(inverse: Array, g: Array) -> tuple[Array, None, None]:
    return g[inverse], None, None


_permute.defvjp(_permute_forward, _permute_backward)
