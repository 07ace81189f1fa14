"""Cross-entropy a tile of tokens by vocabulary at a time: logits are made, used and forgotten,
twice.

The backward pass makes the logits again: their gradient needs the weight of each token, which only
then is known. Under a mesh each device has its share of the tokens and its columns of the kernel,
which never leave it: devices send each other a few numbers a token forward, and backward the
gradient of the hidden states; the gradients of the kernel meet after the last tile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.kernels.cross_entropy.tiles import (
    Terms,
    fold_tokens,
    in_chunks,
    is_target,
    joined,
    local_targets,
    logit_gradients,
    make_logits,
    over_vocabulary,
    per_device,
    take_columns,
    unrolled_chunks,
)
from research.kernels.row_major import row_major, swap_last


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(
    hidden: Float[Array, "M D"], kernel: Float[Array, "D V"], targets: Int[Array, "M"], terms: Terms
) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """Negative log-likelihood and log-partition of each token; the gradient of `kernel` is summed
    in float32.
    """
    vocab_size = kernel.shape[1]

    def share(
        _: Any, tensor: tuple[str, ...], kernel: Array, hidden: Array, targets: Array
    ) -> tuple[Array, Array]:
        tokens, columns = hidden.shape[0], kernel.shape[1]
        arrays = (hidden, local_targets(targets, tensor, columns))
        arrays = tuple(in_chunks(x, terms.token_chunk) for x in arrays)

        def over_tokens(state: Any, start: Any, size: int) -> Any:
            part = take_columns(kernel, start, size, hidden.dtype)

            def tile(
                _: None, state: tuple[Array, ...], hidden: Array, targets: Array
            ) -> tuple[None, Any]:
                top, total, wanted = state
                logits = make_logits(hidden, part, terms.softcap)
                new_top = jnp.maximum(top, logits.max(axis=-1))
                total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[:, None]).sum(
                    axis=-1
                )
                hits = jnp.where(is_target(targets, start, size), logits, 0.0)
                wanted += (1 - terms.label_smoothing) * hits.sum(axis=-1)
                if terms.label_smoothing:
                    wanted += terms.label_smoothing / vocab_size * logits.sum(axis=-1)
                return None, (new_top, total, wanted)

            return fold_tokens(
                tile, None, state, arrays, unrolled_chunks(columns, terms.vocab_chunk)
            )[1]

        zeros = jnp.zeros(arrays[1].shape)
        state = over_vocabulary(
            over_tokens, (zeros - jnp.inf, zeros, zeros), columns, terms.vocab_chunk
        )
        top, total, wanted = (joined(x, tokens) for x in state)
        if tensor:
            local_top, top = top, jax.lax.pmax(top, tensor)
            total, wanted = jax.lax.psum((total * jnp.exp(local_top - top), wanted), tensor)
        log_z = top + jnp.log(total)
        return log_z - wanted, log_z

    return per_device(share, kernel, hidden, targets, sums_kernel=False)


def _fwd(
    hidden: Array, kernel: Array, targets: Array, terms: Terms
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array, Array]]:
    nll, log_z = cross_entropy(hidden, kernel, targets, terms)
    return (nll, log_z), (hidden, kernel, targets, log_z)


def _bwd(
    terms: Terms, saved: tuple[Array, ...], g: tuple[Array, Array]
) -> tuple[Array, Array, None]:
    hidden, kernel, targets, log_z = saved
    dtype, vocab_size = kernel.dtype, kernel.shape[1]

    def share(
        batch: tuple[str, ...],
        tensor: tuple[str, ...],
        kernel: Array,
        hidden: Array,
        *arrays: Array,
    ) -> Any:
        tokens, columns = hidden.shape[0], kernel.shape[1]
        arrays = (hidden, local_targets(arrays[0], tensor, columns), *arrays[1:])
        arrays = tuple(in_chunks(x, terms.token_chunk) for x in arrays)

        def over_tokens(carry: tuple[Array, Array], start: Any, size: int) -> tuple[Array, Array]:
            dkernel, dhidden = carry
            part = take_columns(kernel, start, size, hidden.dtype)

            def tile(
                dpart: Array, dhidden: Array, hidden: Array, targets: Array, log_z: Array, *g: Array
            ) -> Any:
                (g_nll, g_log_z), logits = g, make_logits(hidden, part, terms.softcap)
                hits = is_target(targets, start, size)
                dlogits = logit_gradients(
                    terms, vocab_size, logits, hits, log_z, g_nll, g_log_z, hidden.dtype
                )
                dhidden += jnp.einsum(
                    "CV,DV->CD", dlogits, part, preferred_element_type=jnp.float32
                )
                dpart += row_major(
                    jnp.dot(swap_last(hidden), dlogits, preferred_element_type=jnp.float32)
                )
                return dpart, dhidden

            zeros, unrolled = (
                jnp.zeros(part.shape, jnp.float32),
                unrolled_chunks(columns, terms.vocab_chunk),
            )
            dpart, dhidden = fold_tokens(tile, zeros, dhidden, arrays, unrolled)
            return jax.lax.dynamic_update_slice_in_dim(
                dkernel, dpart.astype(dkernel.dtype), start, axis=1
            ), dhidden

        # What devices have yet to add up is not rounded.
        dkernel = jnp.zeros(kernel.shape, jnp.float32 if batch else kernel.dtype)
        dhidden = jnp.zeros(arrays[0].shape, jnp.float32)
        dkernel, dhidden = over_vocabulary(
            over_tokens, (dkernel, dhidden), columns, terms.vocab_chunk
        )
        dhidden = joined(dhidden, tokens)
        dhidden = jax.lax.psum(dhidden, tensor) if tensor else dhidden
        return dhidden.astype(hidden.dtype), jax.lax.psum(dkernel, batch) if batch else dkernel

    dhidden, dkernel = per_device(share, kernel, hidden, targets, log_z, *g, sums_kernel=True)
    return dhidden, dkernel.astype(dtype), None


cross_entropy.defvjp(_fwd, _bwd)
