"""The matmul of tokens with their experts' weights: rows sorted by expert, none dropped, no row
padded.
"""

import functools
from types import ModuleType
from typing import Literal

import jax
from jaxtyping import Array, Float, Int

from research.kernels.choice import choose
from research.kernels.grouped_matmul import cpu, gpu, reference, tpu, xla
from research.kernels.weights import Weight, WeightNode

__all__ = ["Implementation", "grouped_matmul"]

Implementation = Literal["auto", "reference", "cpu", "tpu", "gpu", "xla"]

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "reference": reference,
    "cpu": cpu,
    "tpu": tpu,
    "gpu": gpu,
    "xla": xla,
}
PREFERRED = {"cpu": ("cpu",), "tpu": ("tpu",), "gpu": ("gpu", "xla")}


def grouped_matmul(
    x: Float[Array, "rows D"],
    kernels: Weight,
    group_sizes: Int[Array, "E"],
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "rows F"]:
    """Returns x_e W_e for the rows x_e of each expert e.

    The first `group_sizes[0]` rows are multiplied with `kernels[0]`, the next `group_sizes[1]` rows
    with `kernels[1]`, and so on; rows past the last group give zeros, whatever they hold. Products
    are summed in float32. The gradients are those of the equation, summed in float32 as well, and
    zero for the kernels of empty groups.

    Under a mesh the fast implementations are called inside a `shard_map`, each device with its own
    rows and group sizes.

    Args:
      x: rows sorted by expert.
      kernels: `[E, D, F]`, an array or a `WeightNode`; rounded to the type of `x`; where they are
          float32, so is their gradient.
      group_sizes: rows of each expert, at least 0, together at most those of `x`.
      implementation: the backend; `auto` takes the fastest that supports the call, and never
          `reference`.

    Returns:
      `[rows, F]` in the type of `x`.

    Raises:
      UserError: the implementation does not support the call.

    Source: Gale et al. 2022 (MegaBlocks), arXiv:2211.15841, for experts of any load.
    """
    if isinstance(kernels, WeightNode):
        return kernels.grouped_matmul(x, group_sizes, implementation)
    name = choose("grouped matmul", implementation, IMPLEMENTATIONS, PREFERRED, x, kernels)
    return _grouped(x, kernels, group_sizes, name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(x: Array, kernels: Array, group_sizes: Array, name: str) -> Array:
    implementation = IMPLEMENTATIONS[name]
    return implementation.grouped_matmul(x, kernels.astype(x.dtype), group_sizes)


def _forward(
    x: Array, kernels: Array, group_sizes: Array, name: str
) -> tuple[Array, tuple[Array, ...]]:
    y = _grouped(x, kernels, group_sizes, name)
    residuals = (x, kernels, group_sizes)
    return y, residuals


def _backward(
    name: str, residuals: tuple[Array, ...], g: Float[Array, "rows F"]
) -> tuple[Array, Array, None]:
    x, kernels, group_sizes = residuals
    implementation = IMPLEMENTATIONS[name]

    # y = x_e W_e -> dx = dy W_eᵀ and dW_e = x_eᵀ dy
    dx = implementation.transposed_matmul(g, kernels.astype(x.dtype), group_sizes)
    dkernels = implementation.outer_products(x, g, group_sizes)
    return dx, dkernels.astype(kernels.dtype), None


_grouped.defvjp(_forward, _backward)
