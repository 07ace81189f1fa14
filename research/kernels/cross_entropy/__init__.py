"""The loss of a language model from its last hidden states, without float32 logits of the whole batch."""

from typing import Literal

from jaxtyping import Array, Float, Int

from research.core.errors import UserError
from research.kernels.cross_entropy import chunked, reference, tiles

__all__ = ["Implementation", "cross_entropy"]

Implementation = Literal["auto", "reference", "chunked"]


def cross_entropy(
    hidden: Float[Array, "*batch D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "*batch"],
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    implementation: Implementation = "auto",
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Cross-entropy of the logits z = cap(hidden · kernel), a token.

        nll = log_z - (1 - ε) z_target - ε mean_v(z_v),   log_z = log Σ_v exp(z_v)

    It is exact too where the mesh in context shares out the vocabulary over its axis `tensor`: neither logits nor
    columns of the kernel leave their device. A vocabulary that the axis does not divide stays whole on each device.
    Both results are differentiable: weight `nll` outside, and add a multiple of `log_z²` for z-loss.

    Args:
      hidden: the last hidden states, after the final norm.
      kernel: the output embedding, rounded to the type of `hidden`; where it is float32, so is its gradient. A tied
        table `[V, D]` is passed transposed, which copies nothing.
      targets: the id of the token to predict, in [0, V).
      softcap: bound of the logits, above 0; None is no bound.
      label_smoothing: ε, the share of the target distribution that is spread evenly over the vocabulary, in [0, 1).
      implementation: `reference` holds all logits; `chunked` (`auto`) never more than a chunk of them.
      token_chunk: tokens a chunk of each device's share of the batch, at least 1; None chooses by platform.
      vocab_chunk: vocabulary entries a chunk of each device's share of them, at least 1; None chooses.

    Returns:
      (nll, log_z), both float32.

    Raises:
      UserError: a chunk below 1, or a label smoothing outside of [0, 1).

    Source: label smoothing is Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    batch = targets.shape
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if vocab_chunk is None:
        vocab_chunk = tiles.default_vocab_chunk(tiles.vocabulary_share(kernel.shape[1]))
    if token_chunk is None:
        token_chunk = tiles.default_token_chunk(vocab_chunk)
    if min(token_chunk, vocab_chunk) < 1:
        raise UserError(f"token_chunk = {token_chunk} and vocab_chunk = {vocab_chunk} must be at least 1.")
    if not 0 <= label_smoothing < 1:
        raise UserError(f"label_smoothing = {label_smoothing} must lie in [0, 1).")
    if implementation == "reference":
        nll, log_z = reference.cross_entropy(hidden, kernel, targets, softcap, label_smoothing)
    else:
        terms = tiles.Terms(softcap, label_smoothing, token_chunk, vocab_chunk)
        nll, log_z = chunked.cross_entropy(hidden, kernel, targets, terms)
    return nll.reshape(batch), log_z.reshape(batch)
