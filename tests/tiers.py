"""The tiers of tests: a test without a mark is in `fast`; pyproject.toml says what the marks of the
others mean.
"""

from collections.abc import Iterable
from typing import Any

import pytest


def rest_in(tier: str, values: Iterable[Any], *first: Any) -> list[Any]:
    """Returns the values of a parametrization, all but the `first` marked for a slower tier."""
    values = list(values)
    assert set(first) <= set(values)
    return [
        value if value in first else pytest.param(value, marks=getattr(pytest.mark, tier))
        for value in values
    ]
