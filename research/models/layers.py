"""Building blocks of sublayers: parameters, projections, norms, the embedding."""

from collections.abc import Callable, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.kernels.projection import project
from research.kernels.weights import (
    Weight,
    WeightNode,
    constrain_weight,
    gradient_dtype,
    plain_array,
    take_rows,
)
from research.models.config import NormConfig
from research.parallel import row_gradients
from research.parallel.gradient_sums import in_float32
from research.parallel.parameter import Axes, boxed

# In float32, whatever the type: a bfloat16 chain is rounded at each of its steps, which on CPU
# takes most of the time.
ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype),
    "gelu_tanh": lambda x: jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype),
    "gelu_sigmoid": lambda x: (
        x.astype(jnp.float32) * jax.nn.sigmoid(1.702 * x.astype(jnp.float32))
    ).astype(x.dtype),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def parameter(
    module: nn.Module,
    name: str,
    init: Callable[..., Array],
    shape: tuple[int, ...],
    axes: Axes,
    dtype: str,
) -> Weight:
    """Returns a parameter of a module, made by `init` where it does not exist yet.

    One that exists may be a `WeightNode` instead of an array; its shape is checked too.

    Args:
      module: that has the parameter, in `setup` or a compact method.
      name: of the parameter.
      init: takes a key, a shape and a type.
      shape: of the plain array.
      axes: its logical axes, and what it does with them.
      dtype: of the initial array.
    """
    if module.has_variable("params", name):
        value = module.get_variable("params", name)
        if isinstance(value, WeightNode):
            path = "/".join(module.path)
            assert value.shape == shape, f"{name} of {path} has shape {value.shape}, not {shape}"
            return value
    return module.param(name, boxed(init, axes), shape, dtype)


class Projection(nn.Module):
    """A linear map x W + b over the last axes of x, with named axes.

    Attributes:
      features: the output axes.
      names: logical names of the kernel's axes, inputs first.
      num_inputs: how many trailing axes of x it contracts.
      use_bias: whether b is learned.
      stddev: of the initial kernel.
      dtype: of the product.
      param_dtype: of the initial parameters.
    """

    features: tuple[int, ...]
    names: tuple[str, ...]
    num_inputs: int = 1
    use_bias: bool = False
    stddev: float = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        # x [B, T, N, H] with 2 inputs -> (N, H)
        inputs = x.shape[-self.num_inputs :]
        kernel, bias = self.weights(inputs)
        return project(x.astype(self.dtype), kernel, bias, axes=self.num_inputs)

    @nn.compact
    def weights(self, inputs: tuple[int, ...]) -> tuple[Weight, Float[Array, "..."] | None]:
        """Returns W and b, for callers that multiply in another order (MLA weight absorption).

        Args:
          inputs: the input axes.
        """
        init = nn.initializers.normal(self.stddev)
        axes = Axes(self.names, "kernel", self.num_inputs)
        shape = (*inputs, *self.features)
        kernel = parameter(self, "kernel", init, shape, axes, self.param_dtype)
        if not self.use_bias:
            return kernel, None

        # Names ("embed", "heads", "head") with 1 input -> ("heads", "head")
        zeros = nn.initializers.zeros
        axes = Axes(self.names[self.num_inputs :], "bias")
        bias = parameter(self, "bias", zeros, self.features, axes, self.param_dtype)
        return kernel, bias


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016, arXiv:1607.06450) or RMSNorm (Zhang & Sennrich 2019,
    arXiv:1910.07467), in float32.

    y = (x − μ) / √(σ² + ε) · scale + bias, where RMSNorm takes μ = 0 and σ² = mean(x²), and a scale
    with `unit_offset` is counted from one.

    Attributes:
      config: which norm.
      names: logical names of the trailing axes that are normalized together.
      param_dtype: of the initial parameters.
    """

    config: NormConfig
    names: tuple[str, ...] = ("embed",)
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        c = self.config
        # Two names -> axes (-2, -1)
        axes = tuple(range(-len(self.names), 0))
        y = x.astype(jnp.float32)
        if c.kind == "layernorm":
            y = y - _mean(y, axes)
        variance = _mean(jnp.square(y), axes)
        y = y * jax.lax.rsqrt(variance + c.epsilon)

        # [D] -> [1, 1, D]
        zeros = nn.initializers.zeros
        ones = nn.initializers.ones
        shape = x.shape[axes[0] :]
        init = zeros if c.unit_offset else ones
        scale_axes = Axes(self.names, "scale")
        scale = parameter(self, "scale", init, shape, scale_axes, self.param_dtype)
        scale = in_float32(scale)
        if c.unit_offset:
            scale = 1 + scale
        y = y * jax.lax.broadcast_to_rank(scale, y.ndim)

        if c.bias:
            bias_axes = Axes(self.names, "bias")
            bias = parameter(self, "bias", zeros, shape, bias_axes, self.param_dtype)
            bias = in_float32(bias)
            y = y + jax.lax.broadcast_to_rank(bias, y.ndim)
        return y.astype(x.dtype)


def _mean(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """Returns the mean over the trailing axes, which stay with size 1.

    With one token a row, as in decoding, it adds in pairs: a compiler's own sums of a few rows may
    have another order than those of many, and then an answer would depend on its neighbours.
    """
    is_decoding = x.ndim > 2 and x.shape[1] == 1
    if not is_decoding:
        return x.mean(axis=axes, keepdims=True)

    # [B, 1, N, H] over two axes -> [B, 1, N · H]
    lead = x.shape[: axes[0]]
    sums = x.reshape(*lead, -1)
    count = sums.shape[-1]
    # 12 numbers -> 6 -> 3, which are then added one after the other.
    while sums.shape[-1] % 2 == 0:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    total = sums[..., 0]
    for index in range(1, sums.shape[-1]):
        total = total + sums[..., index]
    return (total / count).reshape(*lead, *[1] * len(axes))


class Embedding(nn.Module):
    """A table with one row for each id.

    Attributes:
      rows: how many.
      width: of a row.
      names: logical names of the table's two axes.
      stddev: of the initial table.
      param_dtype: of the initial table.
      kind: what its rows are: embeddings, or biases that are looked up.
    """

    rows: int
    width: int
    names: Sequence[str]
    stddev: float
    param_dtype: str = "float32"
    kind: Literal["table", "bias"] = "table"

    def setup(self) -> None:
        init = nn.initializers.normal(self.stddev)
        shape = (self.rows, self.width)
        axes = Axes(tuple(self.names), self.kind)
        self.embedding = parameter(self, "embedding", init, shape, axes, self.param_dtype)

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        names = tuple(self.names)
        array = plain_array(self.embedding)
        if array is None or ids.ndim != 2:
            # Biases of heads stay where their heads are.
            kept = tuple(None if name == "embed" else name for name in names)
            rows = take_rows(constrain_weight(self.embedding, kept), ids)
        else:
            dtype = gradient_dtype(self.embedding)
            rows = row_gradients.take_rows(array, ids, names, dtype)
        return rows.astype(jnp.float32)
