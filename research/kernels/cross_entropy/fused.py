"""Cross-entropy whose gradient is made beside it, so that logits are made once.

A few tokens at a time have all of their logits at once, and the gradient follows while they are
there: it takes three products where a backward pass of its own takes four. For that it must know
what will be made of the losses of tokens, which is the objective; and a device must have the whole
vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.kernels.cross_entropy import chunked
from research.kernels.cross_entropy.tiles import (
    Terms,
    default_token_chunk,
    fold_tokens,
    in_chunks,
    is_target,
    joined,
    logit_gradients,
    make_logits,
    over_vocabulary,
    per_device,
    take_columns,
)
from research.kernels.row_major import row_major, swap_last

# float32 logits that there are at once; tokens, more of which gain nothing; tokens, fewer of which
# make too little of a kernel that must be rounded for them.
LOGITS, TOKENS, FEW_TOKENS = 2**25, 2**11, 2**9

# What is made of the losses and log-partitions of tokens, and other arrays over them: a sum over
# tokens, and more.
Objective = Callable[..., tuple[Float[Array, ""], Any]]


def token_chunk(vocab_size: int) -> int:
    """Returns how many tokens have all of their logits at once."""
    return max(1, min(TOKENS, LOGITS // vocab_size))


def is_fast(vocab_size: int, dtype: Any) -> bool:
    """Returns whether this takes less time than two passes, for hidden states of a type, on a
    CPU.
    """
    return dtype == jnp.float32 or token_chunk(vocab_size) >= FEW_TOKENS


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def objective_of_tokens(
    objective: Objective,
    hidden: Float[Array, "M D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "M"],
    per_token: tuple[Float[Array, "M"], ...],
    terms: Terms,
) -> tuple[Float[Array, ""], Any]:
    """Returns `objective(nll, log_z, *per_token)`; only its first result has a gradient."""
    terms = dataclasses.replace(terms, token_chunk=default_token_chunk(terms.vocab_chunk))
    return objective(*chunked.cross_entropy(hidden, kernel, targets, terms), *per_token)


def _fwd(
    objective: Objective,
    hidden: Array,
    kernel: Array,
    targets: Array,
    per_token: tuple[Array, ...],
    terms: Terms,
) -> tuple[tuple[Array, Any], tuple[Array, ...]]:
    vocab_size = kernel.shape[1]

    def share(
        batch: tuple[str, ...], _: tuple[str, ...], kernel: Array, hidden: Array, *arrays: Array
    ) -> Any:
        tokens = hidden.shape[0]
        chunks = tuple(in_chunks(x, terms.token_chunk) for x in (jnp.ones(tokens), hidden, *arrays))

        def tile(
            sums: Any, _: Any, real: Array, hidden: Array, targets: Array, *per_token: Array
        ) -> tuple[Any, Any]:
            def fill(logits: Array, start: Any, size: int) -> Array:
                part = make_logits(
                    hidden, take_columns(kernel, start, size, hidden.dtype), terms.softcap
                )
                return jax.lax.dynamic_update_slice_in_dim(logits, part, start, axis=1)

            dkernel, logits = sums
            logits = over_vocabulary(fill, logits, vocab_size, terms.vocab_chunk)
            log_z = jax.nn.logsumexp(logits, axis=-1)
            wanted = (1 - terms.label_smoothing) * jnp.take_along_axis(
                logits, targets[:, None], axis=1
            )[:, 0]
            nll = (
                log_z
                - wanted
                - (terms.label_smoothing * logits.mean(axis=-1) if terms.label_smoothing else 0.0)
            )
            g = jax.grad(lambda *losses: objective(*losses, *per_token)[0], argnums=(0, 1))(
                nll, log_z
            )
            # What chunks were filled up with is no token.
            g = tuple(jnp.where(real > 0, x, 0.0) for x in g)

            def add(carry: tuple[Array, Array], start: Any, size: int) -> tuple[Array, Array]:
                dkernel, dhidden = carry
                some = jax.lax.dynamic_slice_in_dim(logits, start, size, axis=1)
                hits = is_target(targets, start, size)
                dlogits = logit_gradients(terms, vocab_size, some, hits, log_z, *g, hidden.dtype)
                part = take_columns(kernel, start, size, hidden.dtype)
                dhidden += jnp.einsum(
                    "CV,DV->CD", dlogits, part, preferred_element_type=jnp.float32
                )
                dpart = row_major(
                    jnp.dot(swap_last(hidden), dlogits, preferred_element_type=jnp.float32)
                )
                dpart += jax.lax.dynamic_slice_in_dim(dkernel, start, size, axis=1)
                return jax.lax.dynamic_update_slice_in_dim(dkernel, dpart, start, axis=1), dhidden

            zeros = jnp.zeros(hidden.shape, jnp.float32)
            dkernel, dhidden = over_vocabulary(add, (dkernel, zeros), vocab_size, terms.vocab_chunk)
            return (dkernel, logits), (nll, log_z, dhidden.astype(hidden.dtype))

        count, size, _ = chunks[1].shape
        sums = jnp.zeros(kernel.shape, jnp.float32), jnp.zeros((size, vocab_size), jnp.float32)
        found = jnp.zeros((count, size)), jnp.zeros((count, size)), jnp.zeros_like(chunks[1])
        (dkernel, _), found = fold_tokens(tile, sums, found, chunks, unrolled=1)
        return tuple(joined(x, tokens) for x in found), jax.lax.psum(
            dkernel, batch
        ) if batch else dkernel

    (nll, log_z, dhidden), dkernel = per_device(
        share, kernel, hidden, targets, *per_token, sums_kernel=True
    )
    return objective(nll, log_z, *per_token), (dhidden, dkernel.astype(kernel.dtype))


def _bwd(
    objective: Objective, terms: Terms, saved: tuple[Array, Array], g: tuple[Array, Any]
) -> tuple[Any, ...]:
    dhidden, dkernel = ((g[0] * x.astype(jnp.float32)).astype(x.dtype) for x in saved)
    return dhidden, dkernel, None, None


objective_of_tokens.defvjp(_fwd, _bwd)
