"""Picks the implementation of an operation for a call, and logs why.

An implementation is a module with the operation and with `unsupported_reason(...)`. That takes the
call's arguments and returns None, or the rule that the call breaks with the nearest value that the
implementation allows.
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
    implementations: Mapping[str, ModuleType],
    preferred: Mapping[str, Sequence[str]],
    *arguments: Any,
) -> str:
    """Returns the name of the implementation to call.

    What `auto` picked of several is logged once, with its reason.

    Args:
      operation: what the log calls it.
      implementation: an implementation's name, or `auto`.
      implementations: by name.
      preferred: the fast implementations of each platform, the first choice first.
      *arguments: what `unsupported_reason` takes.

    Raises:
      UserError: the implementation named, or every fast one of this platform, does not
        support the call.
    """
    names: Sequence[str] = (implementation,)
    if implementation == "auto":
        names = preferred[platform()]

    reasons: dict[str, str] = {}
    for name in names:
        reason = implementations[name].unsupported_reason(*arguments)
        if reason is None:
            # Where a platform has one fast implementation, nothing was chosen.
            if len(names) > 1:
                why = "; ".join(
                    f"{other} does not support {rule}" for other, rule in reasons.items()
                )
                _report(operation, platform(), name, why)
            return name
        reasons[name] = reason
    why = "; ".join(f"{name!r} does not support {rule}" for name, rule in reasons.items())
    advice = ""
    if implementation != "reference":
        advice = " Or take implementation = 'reference' by name."
    raise UserError("implementation", implementation, f": {why}.{advice}")


@functools.cache
def _report(operation: str, on: str, name: str, why: str) -> None:
    """Logs a choice the first time that it is made."""
    reason = f" ({why})" if why else ""
    logger.info("%s on %s: %s%s", operation, on, name, reason)
