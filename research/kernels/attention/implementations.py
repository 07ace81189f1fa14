"""The implementations of attention: each module has `attention(q, k, v, mask, terms)` and
`unsupported_reason(q, k, mask, terms)`.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Literal

from jaxtyping import Array, Float

from research.kernels import choice
from research.kernels.attention import cpu, cudnn, gpu, reference, tpu
from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.sharded import per_device
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
# What XLA's partitioner can cut under a mesh; the others run in a `shard_map`.
PARTITIONED = ("reference", "cpu")


def choose(
    implementation: Implementation,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
) -> AttentionFn:
    """Returns the function to call.

    Raises:
      UserError: the implementation named, or every fast one of this platform, does not support
        the call.
    """
    name = choice.choose("attention", implementation, IMPLEMENTATIONS, PREFERRED, q, k, mask, terms)
    function = IMPLEMENTATIONS[name].attention
    # A Pallas or cuDNN call is opaque to the partitioner of a mesh.
    if name in PARTITIONED:
        return function
    return per_device(function)


def for_wide_heads(implementation: Implementation) -> Implementation:
    """Returns the implementation for few queries with wide heads.

    The fast ones for GPU and TPU do not take heads that wide. There it is `reference`, which may
    hold the scores because they are few; on CPU it is the one given.
    """
    if platform() == "cpu":
        return implementation
    return "reference"
