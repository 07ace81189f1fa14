"""The implementations of attention: each module has `attention(q, k, v, mask, terms)` and
`unsupported_reason(q, k, mask, terms)`.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Literal

from jaxtyping import Array, Float

from research.core.errors import UserError
from research.kernels import choice
from research.kernels.attention import cpu, cudnn, gpu, reference, tpu
from research.kernels.attention.key_exchange import KeyExchange
from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.sharded import context_axes, per_device
from research.kernels.attention.terms import ScoreTerms
from research.parallel.target import platform

Implementation = Literal["auto", "reference", "cpu", "tpu", "gpu", "cudnn"]
AttentionFn = Callable[..., Float[Array, "B T N H"]]

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "reference": reference,
    "cpu": cpu,
    "tpu": tpu,
    "gpu": gpu,
    "cudnn": cudnn,
}
PREFERRED = {"cpu": ("cpu",), "tpu": ("tpu",), "gpu": ("cudnn", "gpu")}
# What computes the scores of some of the keys: see `passes`.
IN_PASSES = ("cpu", "tpu", "gpu")


def choose(
    implementation: Implementation,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
    exchange: KeyExchange,
) -> AttentionFn:
    """Returns the function to call.

    Raises:
      UserError: the implementation named, or every fast one of this platform, does not support
        the call.
    """
    name = choose_name(implementation, q, k, mask, terms)
    # A Pallas or cuDNN call is opaque to the partitioner of a mesh, and so is an exchange of keys.
    # The one for CPU merges rows and heads, which the partitioner can only do on gathered heads.
    if name == "reference":
        return IMPLEMENTATIONS[name].attention
    return per_device(IMPLEMENTATIONS[name], exchange)


def choose_name(
    implementation: Implementation,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
) -> str:
    """Returns the name of the implementation.

    Where the mesh shards the tokens of a row, it is one that works in passes, or the reference,
    whose keys the partitioner gathers.
    """
    preferred = PREFERRED
    in_context = bool(context_axes(q, k))
    if in_context:
        preferred = {
            platform_name: tuple(name for name in names if name in IN_PASSES)
            for platform_name, names in PREFERRED.items()
        }
    name = choice.choose("attention", implementation, IMPLEMENTATIONS, preferred, q, k, mask, terms)
    if in_context and name not in (*IN_PASSES, "reference"):
        raise UserError(
            "model.attention.implementation",
            name,
            "takes no keys of other devices. Use 'auto', or mesh.context = 1.",
        )
    return name


def for_wide_heads(implementation: Implementation) -> Implementation:
    """Returns the implementation for few queries with wide heads.

    The fast ones for GPU and TPU do not take heads that wide. There it is `reference`, which may
    hold the scores because they are few; on CPU it is the one given.
    """
    if platform() == "cpu":
        return implementation
    return "reference"
