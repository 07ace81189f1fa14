"""One side of `tessera bench latent`, a process: decode steps in one of the two forms."""

import functools
import sys
from typing import Any

from research.bench.sides import serve
from research.core import backend


def main(form: str, batch: int, slots: int, dtype: str) -> None:
    """Serves decode steps until the input ends."""
    backend.configure()
    import flax.linen as nn  # after the settings, which JAX reads when it starts
    import jax
    import jax.numpy as jnp

    from research.inference.prefill import next_logits
    from research.models import latent
    from research.models.config import AttentionConfig, LatentConfig, MlpConfig, ModelConfig
    from research.models.language_model import language_model
    from research.parallel.target import platform

    # A model would choose by itself.
    latent.uses_weight_absorption = lambda *_: form == "weight_absorption"
    sizes = LatentConfig(kv_dim=256, q_dim=None, rope_dim=32, value_dim=64)
    config = ModelConfig(
        vocab_size=512,
        num_layers=4,
        embed_dim=512,
        max_length=slots,
        attention=AttentionConfig(num_heads=8, num_kv_heads=8, head_dim=64, latent=sizes),
        mlp=MlpConfig(hidden_dim=1024),
        dtype=dtype,
    )
    model = language_model(config, platform())
    params = nn.unbox(model.init(jax.random.key(0)))
    # As after a prompt that fills half of the cache.
    cache = model.empty_cache(params, batch, slots)
    token = jnp.zeros(batch, jnp.int32)
    position = jnp.full((batch, 1), slots // 2, jnp.int32)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params: Any, cache: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        index = jnp.zeros_like(token)
        logits, cache = next_logits(config, params, token[:, None], position, cache, index)
        return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def take() -> None:
        nonlocal cache, token
        cache, token = step(params, cache, token)
        token.block_until_ready()

    serve(take)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
