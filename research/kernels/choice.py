"""Which body of an operation computes a call, and why.

A body is a module with the operation and with `refusal(...)`, which takes the call's arguments and
returns the rule that keeps the body from taking them, with the nearest value that it allows, or
None.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from research.core.errors import UserError
from research.parallel.target import platform

logger = logging.getLogger("tessera")


def choose(
    operation: str,
    implementation: str,
    bodies: Mapping[str, ModuleType],
    preferred: Mapping[str, Sequence[str]],
    *arguments: Any,
) -> str:
    """Returns the name of the body to call; what `auto` picked of several is logged once, with its
    reason.

    Args:
      operation: what the log calls it.
      implementation: a body's name, or `auto`.
      bodies: by name.
      preferred: the fast bodies of each platform, the first choice first.
      *arguments: what `refusal` takes.

    Raises:
      UserError: the body named, or every fast body of this platform, refuses the call.
    """
    names = preferred[platform()] if implementation == "auto" else (implementation,)
    refusals: dict[str, str] = {}
    for name in names:
        refusal = bodies[name].refusal(*arguments)
        if refusal is None:
            # Where a platform has one fast body, nothing was chosen.
            if len(names) > 1:
                why = "; ".join(f"{other} refuses {rule}" for other, rule in refusals.items())
                _report(operation, platform(), name, why)
            return name
        refusals[name] = refusal
    why = "; ".join(f"{name!r} refuses {rule}" for name, rule in refusals.items())
    advice = (
        "" if implementation == "reference" else " Or take implementation = 'reference' by name."
    )
    raise UserError("implementation", implementation, f": {why}.{advice}")


@functools.cache
def _report(operation: str, on: str, name: str, why: str) -> None:
    """Logs a choice the first time that it is made."""
    logger.info("%s on %s: %s%s", operation, on, name, f" ({why})" if why else "")
