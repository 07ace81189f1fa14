"""Rotary positions in Hugging Face's form, where nothing scales them."""

from collections.abc import Mapping
from typing import Any

from research.core.errors import UserError


def theta_of(fields: Mapping[str, Any]) -> float:
    """Returns the base of the wavelengths: of `rope_parameters` (transformers 5), or `rope_theta` of its elders.

    Raises:
      UserError: a group of fields asks for more than a base.
    """
    theta = fields["rope_theta"]
    for group in ("rope_scaling", "rope_parameters"):
        if not isinstance(fields[group], dict | None):
            raise UserError(f"{group} = {fields[group]!r} must be a group of fields.")
        rope = dict(fields[group] or {})
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        theta = rope.pop("rope_theta", theta)
        if kind != "default" or rope:
            raise UserError(f"{group} = {fields[group]!r} is not supported: only a base, rope_theta, is.")
    return theta
