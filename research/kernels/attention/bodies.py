"""Which body computes attention, and why.

A body is a module with `attention(q, k, v, mask, terms)` and `refusal(q, k, mask, terms)`, which returns the rule that
keeps it from taking a call, with the nearest value that it allows, or None.
"""

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Literal

from jaxtyping import Array, Float

from research.core.errors import UserError
from research.kernels.attention import cpu, cudnn, gpu, reference, tpu
from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.sharded import per_device
from research.kernels.attention.terms import ScoreTerms
from research.kernels.target import platform

logger = logging.getLogger("tessera")

Implementation = Literal["auto", "reference", "cpu", "tpu", "gpu", "cudnn"]
Body = Callable[..., Float[Array, "B T N H"]]

BODIES: dict[str, ModuleType] = {"reference": reference, "cpu": cpu, "tpu": tpu, "gpu": gpu, "cudnn": cudnn}
# The fast bodies of each platform, the preferred one first.
PREFERRED = {"cpu": ("cpu",), "tpu": ("tpu",), "gpu": ("cudnn", "gpu")}
# What the partitioner may cut by itself; the others run once a device on its share.
PARTITIONED = ("reference", "cpu")


def choose(
    implementation: Implementation,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
) -> Body:
    """Returns the body to call; what `auto` picked is logged once, with its reason.

    Raises:
      UserError: the body named, or every fast body of this platform, refuses the call.
    """
    names = PREFERRED[platform()] if implementation == "auto" else (implementation,)
    refusals: dict[str, str] = {}
    for name in names:
        refusal = BODIES[name].refusal(q, k, mask, terms)
        if refusal is None:
            if implementation == "auto":
                _report(platform(), name, "; ".join(f"{other} refuses {why}" for other, why in refusals.items()))
            body = BODIES[name].attention
            return body if name in PARTITIONED else per_device(body)
        refusals[name] = refusal
    why = "; ".join(f"{name!r} refuses {refusal}" for name, refusal in refusals.items())
    advice = "" if implementation == "reference" else " Or take implementation = 'reference' by name."
    raise UserError(f"implementation = {implementation!r}: {why}.{advice}")


@functools.cache
def _report(on: str, name: str, why: str) -> None:
    """Logs a choice the first time that it is made."""
    logger.info("attention on %s: %s%s", on, name, f" ({why})" if why else "")
