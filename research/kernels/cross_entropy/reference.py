"""Cross-entropy written as its equation: all logits at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_losses(
    hidden: Float[Array, "tokens D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "tokens"],
    softcap: float | None,
    label_smoothing: float,
) -> tuple[Float[Array, "tokens"], Float[Array, "tokens"]]:
    """Returns nll and log_z of each token, holding float32 logits `[tokens, V]`."""
    logits = jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    log_z = jax.nn.logsumexp(logits, axis=-1)

    # [tokens, V] -> [tokens]
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    smoothed = (1 - label_smoothing) * target_logits + label_smoothing * logits.mean(axis=-1)
    return log_z - smoothed, log_z
