"""The sides of `tessera bench attention` that are timed; each imports its own framework only."""

import sys
from collections.abc import Callable
from typing import Any

from research.bench.sides import serve
from research.core import backend


def jax_side(
    side: str, dtype: str, batch: int, length: int, heads: int, width: int
) -> Callable[[], Any]:
    """Returns forward plus backward of `tessera`, of `jax.nn`, or of `cudnn` through `jax.nn`."""
    import jax

    from research.core.promotion import promoting
    from research.kernels.attention import AttentionMask, attention

    if side == "tessera":
        mask = AttentionMask(causal=True)

        def call(q, k, v):
            return attention(q, k, v, mask=mask)

    else:
        implementation = "cudnn" if side == "cudnn" else "xla"

        def call(q, k, v):
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=True, implementation=implementation
            )

    # [B, T, N, H] each.
    shape = (batch, length, heads, width)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(key, shape, dtype) for key in keys)

    def step(q: Any, k: Any, v: Any, g: Any) -> Any:
        out, pull_back = jax.vjp(call, q, k, v)
        return out, pull_back(g)

    def compiled() -> Callable[..., Any]:
        return jax.jit(step).lower(q, k, v, g).compile()

    # JAX's own attention mixes types, even while it is lowered.
    run = compiled() if side == "tessera" else promoting(compiled)()
    return lambda: jax.block_until_ready(run(q, k, v, g))


def torch_side(dtype: str, batch: int, length: int, heads: int, width: int) -> Callable[[], Any]:
    """Returns forward plus backward of torch's scaled dot-product attention."""
    import torch

    # Torch has heads before tokens: [B, N, T, H].
    shape = (batch, heads, length, width)
    torch_dtype = getattr(torch, dtype)
    q, k, v, g = (torch.randn(shape, dtype=torch_dtype) for _ in range(4))
    for leaf in (q, k, v):
        leaf.requires_grad_()

    def step() -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(out, (q, k, v), g)

    return step


def main(side: str, dtype: str, *sizes: str) -> None:
    """Serves rounds of a side until its input ends."""
    if side == "torch":
        serve(torch_side(dtype, *map(int, sizes)))
        return
    backend.configure()
    serve(jax_side(side, dtype, *map(int, sizes)))


if __name__ == "__main__":
    main(*sys.argv[1:])
