"""Cross-entropy a chunk of tokens (and of vocabulary) at a time: logits are made, used and forgotten, twice.

The backward pass makes the logits again: their gradient needs the weight of each token, which only then is known.
Under a mesh each share of the tokens has chunks of its own, and the gradients of the kernel meet after the last one.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from research.core.mesh_axes import BATCH_AXES
from research.kernels.mesh import shared_axes
from research.kernels.row_major import row_major, swap_last
from research.kernels.target import platform

# float32 logits of a chunk and the fewest tokens in it. On CPU they stay in its caches; elsewhere a chunk must outweigh
# reading the kernel and adding to its gradient.
CPU_CHUNK_ELEMENTS, CPU_MIN_TOKENS = 2**22, 128
CHUNK_ELEMENTS, MIN_TOKENS = 2**26, 1024
# Loops up to this many chunks are written out on CPU, where a loop's body runs slowly.
MAX_UNROLLED = 8


def default_token_chunk(vocab_size: int) -> int:
    """Returns how many tokens a device's share of the batch gives to a chunk."""
    if platform() == "cpu":
        return max(CPU_MIN_TOKENS, CPU_CHUNK_ELEMENTS // vocab_size)
    return max(MIN_TOKENS, CHUNK_ELEMENTS // vocab_size)


def _vocab_slices(vocab_size: int, vocab_chunk: int) -> Iterator[slice]:
    for start in range(0, vocab_size, vocab_chunk):
        yield slice(start, min(start + vocab_chunk, vocab_size))


def _over_tokens(
    body: Callable[..., Any], kernel: Float[Array, "D V"], carry: Any, arrays: tuple[Array, ...], chunk: int
) -> tuple[Any, Any]:
    """Scans `body(kernel, carry, *arrays)` over chunks of the arrays' first axis, in each share of the tokens apart.

    Returns the sum of the shares' carries, and what the body returns for each token, in the order of the arrays.
    """
    axes = shared_axes(BATCH_AXES, arrays[0].shape[0])

    def share(kernel: Array, carry: Any, *arrays: Array) -> tuple[Any, Any]:
        tokens = arrays[0].shape[0]
        count = -(-tokens // chunk)
        pad = -tokens % count

        def split(x: Array) -> Array:
            return jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))).reshape(count, -1, *x.shape[1:])

        unroll = count if platform() == "cpu" and count <= MAX_UNROLLED else 1
        carry, outs = jax.lax.scan(lambda c, xs: body(kernel, c, *xs), carry, tuple(map(split, arrays)), unroll=unroll)
        return jax.lax.psum(carry, axes), jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:tokens], outs)

    if axes:
        whole, shared = PartitionSpec(), PartitionSpec(axes)
        specs = {"in_specs": (whole, whole, *(shared,) * len(arrays)), "out_specs": (whole, shared)}
        # The other axes stay with the partitioner, which only compiled code has.
        share = jax.jit(jax.shard_map(share, axis_names=set(axes), check_vma=False, **specs))
    return share(kernel, carry, *arrays)


def _logits(
    hidden: Float[Array, "C D"], kernel: Float[Array, "D V"], part: slice, softcap: float | None
) -> Float[Array, "C P"]:
    logits = jnp.dot(hidden, kernel[:, part], preferred_element_type=jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _is_target(targets: Int[Array, "C"], part: slice) -> Array:
    # A comparison and not a gather: it stays where it is when the vocabulary is split over devices.
    return targets[:, None] == jnp.arange(part.start, part.stop)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def cross_entropy(
    hidden: Float[Array, "M D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "M"],
    softcap: float | None,
    token_chunk: int,
    vocab_chunk: int,
) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """Negative log-likelihood and log-partition of each token; the gradient of `kernel` is summed in float32."""
    kernel = kernel.astype(hidden.dtype)

    def body(kernel: Array, _: None, hidden: Array, targets: Array) -> tuple[None, tuple[Array, Array]]:
        top = jnp.full(targets.shape, -jnp.inf)
        total, target_logit = jnp.zeros_like(top), jnp.zeros_like(top)
        for part in _vocab_slices(kernel.shape[1], vocab_chunk):
            logits = _logits(hidden, kernel, part, softcap)
            new_top = jnp.maximum(top, logits.max(axis=-1))
            total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[:, None]).sum(axis=-1)
            target_logit += jnp.where(_is_target(targets, part), logits, 0.0).sum(axis=-1)
            top = new_top
        log_z = top + jnp.log(total)
        return None, (log_z - target_logit, log_z)

    _, out = _over_tokens(body, kernel, None, (hidden, targets), token_chunk)
    return out


def _fwd(
    hidden: Array, kernel: Array, targets: Array, softcap: float | None, token_chunk: int, vocab_chunk: int
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    nll, log_z = cross_entropy(hidden, kernel, targets, softcap, token_chunk, vocab_chunk)
    return (nll, log_z), (hidden, kernel, targets, log_z)


def _bwd(
    softcap: float | None, token_chunk: int, vocab_chunk: int, saved: tuple[Array, ...], g: tuple[Array, Array]
) -> tuple[Array, Array, None]:
    hidden, kernel, targets, log_z = saved
    g_nll, g_log_z = g
    dtype, kernel = kernel.dtype, kernel.astype(hidden.dtype)

    def body(
        kernel: Array, dkernel: Array, hidden: Array, targets: Array, log_z: Array, g_nll: Array, g_log_z: Array
    ) -> Any:
        dhidden = jnp.zeros(hidden.shape, jnp.float32)
        dkernels = []
        for part in _vocab_slices(kernel.shape[1], vocab_chunk):
            logits = _logits(hidden, kernel, part, softcap)
            dlogits = jnp.exp(logits - log_z[:, None]) * (g_nll + g_log_z)[:, None]
            dlogits -= jnp.where(_is_target(targets, part), g_nll[:, None], 0.0)
            if softcap is not None:
                dlogits *= 1 - jnp.square(logits / softcap)
            dlogits = jax.lax.optimization_barrier(dlogits.astype(hidden.dtype))
            dhidden += jnp.einsum("CV,DV->CD", dlogits, kernel[:, part], preferred_element_type=jnp.float32)
            dkernels.append(row_major(jnp.dot(swap_last(hidden), dlogits, preferred_element_type=jnp.float32)))
        return dkernel + jnp.concatenate(dkernels, axis=1), dhidden.astype(hidden.dtype)

    arrays = (hidden, targets, log_z, g_nll, g_log_z)
    dkernel, dhidden = _over_tokens(body, kernel, jnp.zeros(kernel.shape, jnp.float32), arrays, token_chunk)
    return dhidden, dkernel.astype(dtype), None


cross_entropy.defvjp(_fwd, _bwd)
