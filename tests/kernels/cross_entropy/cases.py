"""What the tests of cross-entropy share: inputs, losses and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from research.kernels.cross_entropy import cross_entropy

D, V = 12, 101


def inputs(batch, dtype=jnp.float32, vocab=V, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(*batch, D)), dtype)
    table = jnp.asarray(rng.normal(size=(vocab, D)), jnp.float32)
    cotangents = tuple(jnp.asarray(rng.normal(size=batch), jnp.float32) for _ in range(2))
    return hidden, table, jnp.asarray(rng.integers(vocab, size=batch)), cotangents


def weighted(nll, log_z, g_nll, g_log_z):
    """Returns a sum whose gradients by both losses are the weights, and the losses."""
    return jnp.vdot(nll, g_nll) + jnp.vdot(log_z, g_log_z), (nll, log_z)


def value_and_gradients(hidden, table, targets, cotangents, implementation="chunked", **options):
    """Returns nll and log_z of each token, and the gradients of `hidden` and `table`."""
    options["implementation"] = implementation

    def run(hidden, table):
        return cross_entropy(weighted, hidden, table.T, targets, *cotangents, **options)

    gradients = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
    (_, losses), (dhidden, dtable) = jax.jit(gradients)(hidden, table)
    nll, log_z = (x.reshape(targets.shape) for x in losses)
    return nll, log_z, dhidden, dtable


def with_z_loss(nll, log_z, weights):
    """Returns what training minimizes and reports, summed over tokens."""
    return jnp.vdot(nll + 0.01 * log_z**2, weights), jnp.vdot(nll, weights)


def summed(implementation, inputs, weights, **options):
    hidden, table, targets, _ = inputs

    def call(hidden, table):
        return cross_entropy(
            with_z_loss, hidden, table.T, targets, weights, implementation=implementation, **options
        )

    (total, nll_sum), gradients = jax.jit(jax.value_and_grad(call, argnums=(0, 1), has_aux=True))(
        hidden, table
    )
    return jnp.stack([total, nll_sum]), *gradients
