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
    kernel = kernel.astype(hidden.dtype)
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    if softcap is not None:
        bounded = jnp.tanh(logits / softcap)
        logits = softcap * bounded
    log_z = jax.nn.logsumexp(logits, axis=-1)

    # [tokens, V] -> [tokens, 1] -> [tokens]
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    target_logit = target_logits[:, 0]

    # The logit of the smoothed label: (1 - ε) times the target's, plus ε times the mean of all.
    of_target = (1 - label_smoothing) * target_logit
    mean_logit = logits.mean(axis=-1)
    of_all = label_smoothing * mean_logit
    nll = log_z - (of_target + of_all)
    return nll, log_z
