"""Cross-entropy written as its equation: all logits at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    hidden: Float[Array, "M D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "M"],
    softcap: float | None,
    label_smoothing: float,
) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """Negative log-likelihood and log-partition of each token, holding float32 `[M, V]`."""
    logits = jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    wanted = (1 - label_smoothing) * target_logits + label_smoothing * logits.mean(axis=-1)
    return log_z - wanted, log_z
