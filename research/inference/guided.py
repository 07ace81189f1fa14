"""Samples that keep to a grammar, among the steps of an engine."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt32

from research.inference.grammar import GrammarCompiler, Matcher
from research.inference.grammar_config import GrammarError


def allowed_drafts(matcher: Matcher, drafts: Sequence[int]) -> list[int]:
    """Returns the drafts before the first that the grammar forbids, or that is beyond its limits;
    the matcher does not move.
    """
    taken: list[int] = []
    for draft in drafts:
        if not _accepts(matcher, draft):
            break
        taken.append(draft)
    matcher.rollback(len(taken))
    return taken


def _accepts(matcher: Matcher, draft: int) -> bool:
    """Adds a draft, if it may come next within the limits of the grammar; returns whether it may.

    A draft may be rejected, so its error is none of the request's.
    """
    try:
        return matcher.accept(draft)
    except GrammarError:
        return False


def masks_after(
    compiler: GrammarCompiler, drafts_of: Mapping[Matcher, Sequence[int]]
) -> dict[Matcher, UInt32[np.ndarray, "drafts words"] | GrammarError]:
    """Returns which ids may come next, now and after each draft, or why none can.

    Args:
      compiler: that made the matchers, which stay where they are.
      drafts_of: drafts that each matcher's grammar allows.
    """
    rows: dict[Matcher, list[np.ndarray]] = {matcher: [] for matcher in drafts_of}
    faults: dict[Matcher, GrammarError] = {}
    depth = 0
    here = list(drafts_of)
    while here:
        # All matchers that have come to this draft.
        masks, errors = compiler.masks(here)
        failed = set()
        for matcher, mask, error in zip(here, masks, errors, strict=True):
            if error is not None:
                mask, error = matcher.retried_mask()
            rows[matcher].append(mask)
            if error is not None:
                # After a draft, it is the request's error only if the draft is right.
                failed.add(matcher)
                if not depth:
                    faults[matcher] = error
        going_on = []
        for matcher in here:
            drafts = drafts_of[matcher]
            if matcher not in failed and depth < len(drafts) and _accepts(matcher, drafts[depth]):
                going_on.append(matcher)
        here = going_on
        depth += 1
    found: dict[Matcher, np.ndarray | GrammarError] = dict(faults)
    for matcher, masks in rows.items():
        if matcher not in faults:
            matcher.rollback(len(masks) - 1)
            found[matcher] = np.stack(masks)
    return found
