"""Which body computes an operation, and why.

A body is a module with a function of the operation's name, and with `refusal`, which takes what decides the choice and
returns the rule that keeps the body from taking the call, with the nearest value that it allows, or None.
"""

import functools
import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from research.core.errors import UserError
from research.kernels.target import platform

logger = logging.getLogger("tessera")


def choose(
    operation: str,
    implementation: str,
    bodies: Mapping[str, ModuleType],
    preferred: Mapping[str, tuple[str, ...]],
    arguments: tuple[Any, ...],
) -> str:
    """Returns the name of the body to call; what `auto` picked is logged once, with its reason.

    Args:
      operation: for the log.
      implementation: `auto`, or the name of a body.
      bodies: by name.
      preferred: the fast bodies of each platform, the preferred one first; `auto` takes no other.
      arguments: what every `refusal` takes.

    Raises:
      UserError: the body named, or every fast body of this platform, refuses the call.
    """
    names = preferred[platform()] if implementation == "auto" else (implementation,)
    refusals: dict[str, str] = {}
    for name in names:
        refusal = bodies[name].refusal(*arguments)
        if refusal is None:
            if implementation == "auto":
                why = "; ".join(f"{other} refuses {rule}" for other, rule in refusals.items())
                report(operation, platform(), name, why)
            return name
        refusals[name] = refusal
    why = "; ".join(f"{name!r} refuses {refusal}" for name, refusal in refusals.items())
    advice = "" if implementation == "reference" else " Or take implementation = 'reference' by name."
    raise UserError(f"implementation = {implementation!r}: {why}.{advice}")


@functools.cache
def report(operation: str, on: str, name: str, why: str) -> None:
    """Logs a choice the first time that it is made."""
    logger.info("%s on %s: %s%s", operation, on, name, f" ({why})" if why else "")
