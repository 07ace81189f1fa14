"""The feed-forward sublayers: dense, and a mixture of experts without dropped tokens."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from research.kernels.grouped_matmul import grouped_matmul
from research.kernels.weights import Weight, split_axes
from research.models.attention import residual_stddev
from research.models.config import ExpertsConfig, MlpConfig, ModelConfig
from research.models.layers import ACTIVATIONS, Projection, parameter
from research.models.reports import LayerReport
from research.parallel.mesh_axes import BATCH_AXES, TENSOR_AXIS
from research.parallel.parameter import Axes
from research.parallel.rules import constrain
from research.parallel.shard_map import shard_map, sharding_axes


def activate(
    config: MlpConfig, up: Float[Array, "*rows F"], gate: Float[Array, "*rows F"] | None
) -> Float[Array, "*rows F"]:
    """Returns act(up), or act(gate) ⊙ (up + offset) where gated, both clamped where the config says
    so.
    """
    act = ACTIVATIONS[config.activation]
    if gate is None:
        return act(up)
    if config.clamp is not None:
        gate, up = jnp.minimum(gate, config.clamp), jnp.clip(up, -config.clamp, config.clamp)
    return act(gate) * (up + config.up_offset if config.up_offset else up)


class Mlp(nn.Module):
    """The feed-forward sublayer: act(x U) D, or (act(x G) ⊙ x U) D where gated.

    Attributes:
      config: the model.
      hidden_dim: width F; None is the config's.

    Source: Shazeer 2020, arXiv:2002.05202, equations 5 and 6.
    """

    config: ModelConfig
    hidden_dim: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c, model = self.config.mlp, self.config
        width = c.hidden_dim if self.hidden_dim is None else self.hidden_dim
        options = {"use_bias": c.bias, "dtype": model.dtype, "param_dtype": model.param_dtype}
        inner = {"features": (width,), "names": ("embed", "mlp"), "stddev": model.init_stddev}
        up = Projection(name="up", **inner, **options)(x)
        gate = Projection(name="gate", **inner, **options)(x) if c.gated else None
        h = constrain(activate(c, up, gate), ("batch", "length", "mlp"))
        return Projection(
            x.shape[-1:], ("mlp", "embed"), stddev=residual_stddev(model), name="down", **options
        )(h)


class Experts(nn.Module):
    """A mixture of experts: Σ_e w_e · expert_e(x) over the chosen experts e, plus the shared
    expert.

    Returns the sum, and what the layer tells beside it: the loss of the router, and the load of
    each expert.

    Source: Shazeer et al. 2017, arXiv:1701.06538, equation 1; dropless as in Gale et al. 2022,
        arXiv:2211.15841; shared
    experts, sigmoid scores and groups: DeepSeek-AI 2024, arXiv:2412.19437, equations 12 to 16.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T D"], LayerReport]:
        model, c = self.config, self.config.experts
        assert c is not None
        # The router is small and its choice is sharp, so it is computed in float32 whatever the
        # type.
        logits = Projection(
            (c.num_experts,),
            ("embed", "router"),
            use_bias=c.router_bias,
            stddev=model.init_stddev,
            param_dtype=model.param_dtype,
            name="router",
        )(x.astype(jnp.float32))
        selection = None
        if c.selection_bias:
            # In float32 whatever the type of the others: its small steps would be lost in bfloat16.
            shape = (c.num_experts,)
            axes = Axes(("selection",), "selection")
            selection = parameter(
                self, "selection_bias", nn.initializers.zeros, shape, axes, "float32"
            )
        chosen, weights, loss = route(c, logits, selection, real)
        kernels = ExpertKernels(model, name="experts")()
        y = _mix(model.mlp, x, chosen, weights.astype(x.dtype), kernels)
        if c.shared_dim:
            shared = Mlp(model, c.shared_dim, name="shared")(x)
            if c.shared_gate:
                options = {
                    "stddev": model.init_stddev,
                    "dtype": model.dtype,
                    "param_dtype": model.param_dtype,
                }
                gate = Projection((1,), ("embed", "types"), name="shared_gate", **options)
                shared = shared * jax.nn.sigmoid(gate(x))
            y = y + shared
        return y, LayerReport(loss, expert_load(c.num_experts, chosen, real))


def route(
    config: ExpertsConfig,
    logits: Float[Array, "B T E"],
    selection: Float[Array, "E"] | None,
    real: Bool[Array, "B T"] | None,
) -> tuple[Int[Array, "B T choices"], Float[Array, "B T choices"], Float[Array, ""]]:
    """Returns the experts of each token, best first, their weights, and the router's loss.

    Args:
      config: the mixture.
      logits: of the router, float32.
      selection: added to the scores for the choice alone; it has no gradient, but may follow the
        load (`optim.balancing`).
      real: tokens that count for the loss; None is all of them.
    """
    scores = jax.nn.softmax(logits) if config.score == "softmax" else jax.nn.sigmoid(logits)
    ranked = scores if selection is None else scores + jax.lax.stop_gradient(selection)[None, None]
    if config.num_groups > 1:
        grouped = ranked.reshape(*ranked.shape[:-1], config.num_groups, -1)
        best_two = jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
        _, groups = jax.lax.top_k(best_two, config.groups_per_token)
        allowed = jax.nn.one_hot(groups, config.num_groups, dtype=bool).any(axis=-2)
        ranked = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(ranked.shape)
    _, chosen = jax.lax.top_k(ranked, config.experts_per_token)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if config.renormalize:
        # The small number is for sigmoids that are all zero.
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return chosen, weights * config.scale, _router_loss(config, logits, scores, chosen, real)


def expert_load(
    num_experts: int, chosen: Int[Array, "B T choices"], real: Bool[Array, "B T"] | None
) -> Float[Array, "E"]:
    """Returns how many real tokens chose each expert.

    Args:
      num_experts: E.
      chosen: the experts of each token.
      real: tokens that count; None is all of them.
    """
    picked = jax.nn.one_hot(chosen, num_experts)
    return jnp.sum(
        picked if real is None else picked * real[..., None, None].astype(picked.dtype),
        axis=(0, 1, 2),
    )


def _router_loss(
    config: ExpertsConfig,
    logits: Float[Array, "B T E"],
    scores: Float[Array, "B T E"],
    chosen: Int[Array, "B T choices"],
    real: Bool[Array, "B T"] | None,
) -> Float[Array, ""]:
    """Returns balance_weight · E Σ_e f_e P_e + z_weight · mean(logsumexp²), f the share of choices,
    P of scores.
    """
    weight = jnp.ones(logits.shape[:2]) if real is None else real.astype(jnp.float32)
    weight = weight / jnp.maximum(weight.sum(), 1.0)
    loss = jnp.zeros(())
    if config.balance_weight:
        picked = jax.nn.one_hot(chosen, config.num_experts).mean(axis=-2)
        share = jnp.einsum("bt,bte->e", weight, scores / scores.sum(axis=-1, keepdims=True))
        even = config.num_experts * jnp.sum(jnp.einsum("bt,bte->e", weight, picked) * share)
        loss = loss + config.balance_weight * even
    if config.z_weight:
        loss = loss + config.z_weight * jnp.sum(weight * jax.nn.logsumexp(logits, axis=-1) ** 2)
    return loss


class ExpertKernels(nn.Module):
    """The projections of all experts: `up`, `gate` [E, D, F] and `down` [E, F, D], each with its
    bias or None.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self) -> dict[str, tuple[Weight, Float[Array, "E outputs"] | None]]:
        model, c = self.config, self.config.experts
        assert c is not None
        inward = ((model.embed_dim, c.hidden_dim), ("embed", "mlp"), model.init_stddev)
        outward = ((c.hidden_dim, model.embed_dim), ("mlp", "embed"), residual_stddev(model))
        wanted = {"up": inward, **({"gate": inward} if model.mlp.gated else {}), "down": outward}
        return {
            name: ExpertKernel(
                c.num_experts,
                *of,
                use_bias=model.mlp.bias,
                param_dtype=model.param_dtype,
                name=name,
            )()
            for name, of in wanted.items()
        }


class ExpertKernel(nn.Module):
    """One projection of all experts, and its bias or None."""

    num_experts: int
    shape: tuple[int, int]
    names: tuple[str, str]
    stddev: float
    use_bias: bool
    param_dtype: str

    @nn.compact
    def __call__(self) -> tuple[Weight, Float[Array, "E outputs"] | None]:
        init = nn.initializers.normal(self.stddev)
        shape = (self.num_experts, *self.shape)
        axes = Axes(("expert", *self.names), "kernel", num_inputs=1)
        kernel = parameter(self, "kernel", init, shape, axes, self.param_dtype)
        if not self.use_bias:
            return kernel, None
        shape = (self.num_experts, self.shape[1])
        axes = Axes(("expert", self.names[1]), "bias")
        return kernel, parameter(self, "bias", nn.initializers.zeros, shape, axes, self.param_dtype)


def _mix(
    config: MlpConfig,
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T choices"],
    weights: Float[Array, "B T choices"],
    kernels: dict[str, Any],
) -> Float[Array, "B T D"]:
    """Returns the weighed sum of the chosen experts' outputs.

    On a mesh each device takes its own tokens through all experts, of whose width it has its share.
    """
    batch = sharding_axes(BATCH_AXES, x.shape[0])
    width = sharding_axes((TENSOR_AXIS,), kernels["up"][0].shape[2])
    if not batch and not width:
        return _mix_local(config, x, chosen, weights, kernels)
    tokens = PartitionSpec(batch or None)
    columns, rows = PartitionSpec(None, None, width or None), PartitionSpec(None, width or None)
    specs = {"up": (columns, rows), "gate": (columns, rows), "down": (rows, PartitionSpec())}

    def local(x: Array, chosen: Array, weights: Array, kernels: dict[str, Any]) -> Array:
        if not width:
            return _mix_local(config, x, chosen, weights, kernels)
        kernel, bias = kernels["down"]
        if bias is not None:  # which is added once, not by every share of the width
            kernels = kernels | {
                "down": (kernel, jnp.where(jax.lax.axis_index(width) == 0, bias, 0.0))
            }
        return jax.lax.psum(_mix_local(config, x, chosen, weights, kernels), width)

    specs = {
        name: (split_axes(kernel, specs[name][0]), None if bias is None else specs[name][1])
        for name, (kernel, bias) in kernels.items()
    }
    return shard_map(local, (tokens, tokens, tokens, specs), tokens)(x, chosen, weights, kernels)


def _mix_local(
    config: MlpConfig,
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T choices"],
    weights: Float[Array, "B T choices"],
    kernels: dict[str, Any],
) -> Float[Array, "B T D"]:
    """Sorts the choices by expert, takes each run of rows through its expert, and puts them
    back.
    """
    per_token, num_experts = chosen.shape[-1], kernels["up"][0].shape[0]
    expert = chosen.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    back = jnp.argsort(order)
    rows = _permute(jnp.repeat(x.reshape(-1, x.shape[-1]), per_token, axis=0), order, back)
    sizes = jnp.bincount(expert, length=num_experts).astype(jnp.int32)
    sorted_expert = expert[order]

    def project(name: str, rows: Float[Array, "rows inputs"]) -> Float[Array, "rows outputs"]:
        kernel, bias = kernels[name]
        y = grouped_matmul(rows, kernel, sizes)
        return y if bias is None else y + bias[sorted_expert].astype(y.dtype)

    h = activate(config, project("up", rows), project("gate", rows) if "gate" in kernels else None)
    y = _permute(project("down", h), back, order).reshape(*chosen.shape, -1)
    return jnp.einsum("btcd,btc->btd", y, weights)


@jax.custom_vjp
def _permute(
    x: Float[Array, "rows D"], order: Int[Array, "rows"], back: Int[Array, "rows"]
) -> Float[Array, "rows D"]:
    """Returns x[order]; `back` undoes the order, so that the gradient is picked too, where it would
    be scattered.
    """
    return x[order]


def _permute_forward(x: Array, order: Array, back: Array) -> tuple[Array, Array]:
    return x[order], back


def _permute_backward(back: Array, g: Array) -> tuple[Array, None, None]:
    return g[back], None, None


_permute.defvjp(_permute_forward, _permute_backward)
