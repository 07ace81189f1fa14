"""What the backward kernels of attention on Hopper GPUs share.

They recompute the scores of a tile, and its softmax weights from the saved logsumexp.
`gpu_query_gradient` holds a block of queries and visits keys. `gpu_key_gradients` holds a block of
keys and visits the queries of all heads of the group, so that no gradient needs an atomic addition.
`gpu_bias_gradient` holds a tile of a bias and visits the sequences and heads that share it.

Source: Dao 2023 (FlashAttention-2), arXiv:2307.08691, algorithm 2.
"""

from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.attention.gpu_plan import ROWS, WARPGROUPS, Plan
from research.kernels.attention.gpu_scores import Tile, scores
from research.kernels.attention.gpu_tile import along, load, swizzled

# Keys, or queries, per step.
STEP = 64


class Operands(NamedTuple):
    """What every backward kernel reads, as arrays or in a kernel as refs.

    Attributes:
      q, k, v: padded by `pad_tokens`.
      g: the gradient of the result, padded too.
      lse: logsumexp of each row of scores to base 2, sink included; +inf where there is no sink and
          a query attends to no key.
      delta: Σ_H g · out of each query.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    g: Float[Array, "B T N H"]
    lse: Float[Array, "B N T"]
    delta: Float[Array, "B N T"]


class ScoreGradients(NamedTuple):
    """Of one tile, rows and columns as in `Tile`.

    Attributes:
      weights: the softmax weights.
      scores: the gradient of the scores, which is that of a bias.
      product: the gradient of scale · q kᵀ, before the cap.
    """

    weights: Float[Array, "rows columns"]
    scores: Float[Array, "rows columns"]
    product: Float[Array, "rows columns"]


def ring_stages(width: int) -> int:
    """Returns for how many steps shared memory has room, next to the block's own operands."""
    return 2 if width <= 192 else 1


def scratch(
    width: int, dtype: Any, *, own: tuple[str, str], copied: tuple[str, str]
) -> dict[str, Any]:
    """Returns the shared memory of a block and its barriers, by name.

    Args:
      width: H, padded.
      dtype: of the operands.
      own: the operands of which each warpgroup holds its rows.
      copied: the operands that are copied step by step in a ring.
    """
    stages = ring_stages(width)
    # own=("q", "g"), copied=("k", "v") -> q_smem, g_smem, k_smem, v_smem, k_full, …
    found = {}
    for name in own:
        found[f"{name}_smem"] = swizzled((WARPGROUPS, ROWS, width), dtype)
    for name in copied:
        found[f"{name}_smem"] = swizzled((stages, STEP, width), dtype)
    for name in copied:
        found[f"{name}_full"] = plgpu.Barrier(num_barriers=stages)
    for name in copied:
        found[f"{name}_free"] = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
    for name in own:
        found[f"{name}_full"] = plgpu.Barrier(num_barriers=WARPGROUPS)
    return found


def load_statistics(plan: Plan, operands: Operands, tile: Tile) -> tuple[Array, Array]:
    """Loads the logsumexp and delta of a tile's queries."""
    axis = tile.axis("q")
    index = (tile.batch, tile.head, tile.tokens("q"))
    lse = load(plan, operands.lse, index, axis)
    delta = load(plan, operands.delta, index, axis)
    return lse, delta


def score_gradients(
    plan: Plan,
    extras: dict[str, Any],
    raw: Float[Array, "rows columns"],
    dweights: Float[Array, "rows columns"],
    statistics: tuple[Array, Array],
    tile: Tile,
    *,
    masked: bool,
) -> ScoreGradients:
    """Returns the softmax weights of a tile and the gradients of its scores.

    Args:
      plan: the static plan.
      extras: the refs of `gpu_plan.extra_arrays`.
      raw: q kᵀ, or k qᵀ of a transposed tile.
      dweights: the gradient of the weights, g vᵀ or v gᵀ.
      statistics: of `load_statistics`.
      tile: its position.
      masked: whether the mask hides anything here.
    """
    s, cap_derivative = scores(plan, extras, raw, tile, masked=masked)
    # [T] -> [T, S], or [S, T] of a transposed tile
    axis = tile.axis("q")
    lse, delta = (along(x, axis, s.shape) for x in statistics)

    # Softmax weights: 2^s / Σ 2^s = 2^(s - lse). Through the softmax: ds = w (dw - delta).
    weights = jnp.exp2(s - lse)
    dscores = weights * (dweights - delta)
    dproduct = dscores
    if cap_derivative is not None:
        dproduct = dscores * cap_derivative
    return ScoreGradients(weights, dscores, dproduct)
