"""The names of the tensors of a checkpoint: spellings, prefixes, copies and what is left out."""

import dataclasses
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from research.interop.architecture import Architecture
from research.interop.tensor import same_numbers

logger = logging.getLogger("tessera")


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """The tensors of a checkpoint, recognized.

    Attributes:
      found: full name -> name in the checkpoint, of the tensors of the model.
      others: the same of all other tensors.
      repeated: faults: tensors that are there under two names.
    """

    found: dict[str, str] = dataclasses.field(default_factory=dict)
    others: dict[str, str] = dataclasses.field(default_factory=dict)
    repeated: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def recognize(
        cls,
        architecture: Architecture,
        wanted: Iterable[str],
        copies: Mapping[str, str],
        tensors: Iterable[str],
    ) -> "TensorNames":
        """Returns which tensor is which.

        Args:
          architecture: whose spellings and prefixes they have.
          wanted: full names of the tensors of the model.
          copies: copy -> the tensor that it repeats.
          tensors: names in the checkpoint.
        """
        names = cls()
        wanted = set(wanted)
        known = wanted | copies.keys()
        for name in tensors:
            full = _full_name(architecture, known, name)
            group = names.found if full in wanted else names.others
            if full in group:
                names.repeated.append(f"{name} and {group[full]} are the same tensor")
            group[full] = name

        # A copy takes the place of an original that is not there.
        for copy, original in copies.items():
            is_missing = original in wanted and original not in names.found
            if is_missing and copy in names.others:
                names.found[original] = names.others.pop(copy)
        return names


def _full_name(architecture: Architecture, known: set[str], name: str) -> str:
    """Returns the name of a tensor with the prefix and the spelling of the architecture."""
    spelled = name
    for pattern, replacement in architecture.spellings:
        spelled = re.sub(pattern, replacement, spelled)

    # "h.0.ln_1.weight" -> "h.0.ln_1.weight", "transformer.h.0.ln_1.weight"
    candidates = [spelled]
    candidates += [prefix + spelled for prefix in architecture.prefixes]
    candidates += [spelled.removeprefix(prefix) for prefix in architecture.prefixes]
    for candidate in candidates:
        if candidate in known:
            return candidate
    for candidate in candidates:
        if _ignored_reason(architecture, candidate) is not None:
            return candidate
    return name


def _ignored_reason(architecture: Architecture, name: str) -> str | None:
    """Returns why no parameter takes a tensor, or None where one should."""
    for pattern, reason in architecture.ignored.items():
        if re.fullmatch(pattern, name):
            return reason
    return None


def leftover_faults(
    architecture: Architecture,
    copies: Mapping[str, str],
    names: TensorNames,
    tensors: Mapping[str, Any],
) -> Iterator[str]:
    """Yields what is wrong with the tensors that no parameter takes; logs those left out."""
    ignored_by_reason: dict[str, list[str]] = {}
    for full, name in names.others.items():
        reason = _ignored_reason(architecture, full)
        if reason is not None:
            ignored_by_reason.setdefault(reason, []).append(name)
            continue
        if full not in copies:
            yield f"{name} is not known"
            continue

        # A copy, whose original is in the checkpoint, too: other numbers than those would be lost.
        original = names.found.get(copies[full])
        if original is not None and not same_numbers(tensors[name], tensors[original]):
            tied = " (tie_word_embeddings)" if full in architecture.copies else ""
            yield f"{name} differs from {original}, which it repeats{tied}"

    for reason, ignored in ignored_by_reason.items():
        more = f" and {len(ignored) - 1} more" if len(ignored) > 1 else ""
        logger.info("%s%s left out: %s", ignored[0], more, reason)
