"""Rotary positions in config.json: `rope_parameters` of transformers 5, `rope_theta` and
`rope_scaling` before it.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

from research.core.errors import UserError, listed, nearest, shown
from research.interop.parts import Part
from research.models.config import ModelConfig, PositionConfig, RopeScalingConfig

logger = logging.getLogger("tessera")

ORIGINAL = "original_max_position_embeddings"
# Their name of a scaling's field, and ours.
_OURS = {
    "factor": "factor",
    ORIGINAL: "original_length",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "amplitude",
    "short_factor": "short_factors",
    "long_factor": "long_factors",
}
# What each kind of scaling needs, and what it may have beside.
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (ORIGINAL,),
    "llama3": ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor", ORIGINAL),
}
_ALLOWED = {
    "yarn": (
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "truncate",
        "mscale",
        "mscale_all_dim",
    ),
    "longrope": ("factor", "attention_factor"),
}
# What transformers does not read, with a warning: fields of other kinds, other projects' name of a
# factor, a remark.
_UNREAD = (*_OURS, "mscale", "mscale_all_dim", "attn_factor", "finetuned")


def rotary(theta: float = 10_000.0, default: Mapping[str, Any] | None = None) -> Part:
    """Returns the part of rotary positions that all layers share.

    Args:
      theta: the base where the field is missing.
      default: the `rope_parameters` where there are none.
    """
    return Part(
        read=read_rotary,
        write=write_rotary,
        only={"partial_rotary_factor": 1},
        defaults={"rope_theta": theta, "rope_scaling": None, "rope_parameters": default},
    )


def read_rotary(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the positions, by dotted names, and the longest sequence where a scaling changes
    it.
    """
    rope = rope_fields(fields)
    longest = fields["max_position_embeddings"]
    values = {f"position.{name}": value for name, value in position(rope, longest).items()}
    if rope_kind(rope) == "dynamic":
        # Its `max_position_embeddings` is that of the model before scaling.
        values["max_length"] = round(longest * rope["factor"])
    return values


def write_rotary(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields in the older form, which every version of transformers reads."""
    scaling = config.position.scaling
    fields = {"rope_theta": config.position.theta, "rope_scaling": write_scaling(scaling)}
    if scaling is not None and scaling.kind == "dynamic":
        fields["max_position_embeddings"] = scaling.original_length
    return fields


def rope_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of rotary positions as one group, `rope_theta` and all."""
    for group in ("rope_scaling", "rope_parameters"):
        if not isinstance(fields[group], dict | None):
            raise UserError(group, fields[group], "must be a group of fields.")
    rope = fields["rope_scaling"] or fields["rope_parameters"] or {}
    return {"rope_theta": fields["rope_theta"], **rope}


def rope_kind(rope: Mapping[str, Any]) -> Any:
    """Returns the name of the scaling; the older form calls it `type`."""
    return rope["rope_type"] if "rope_type" in rope else rope.get("type", "default")


def position(rope: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """Returns the values of a `PositionConfig`.

    Args:
      rope: what `rope_fields` returns.
      longest: `max_position_embeddings`, which some scalings fall back to.
    """
    kind = rope_kind(rope)
    if kind not in _NEEDED:
        raise UserError("rope_type", kind, f"is not supported. {nearest(str(kind), _NEEDED)}")
    given = _read_by(kind, rope, longest)
    scaling = None if kind == "default" else _scaling(kind, given, longest)
    return {"kind": "rotary", "theta": rope["rope_theta"], "scaling": scaling}


def _read_by(kind: str, rope: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """Returns the fields that a kind of scaling reads; those that transformers does not read either
    are left out.
    """
    read = (*_NEEDED[kind], *_ALLOWED.get(kind, ()))
    # A group without a length of its own has the length of the model.
    given = {ORIGINAL: longest} if ORIGINAL in _NEEDED[kind] else {}
    faults = []
    unread = []
    for name, value in rope.items():
        if value is None or name in ("rope_theta", "rope_type", "type"):
            continue
        if name in read:
            given[name] = value
        elif name in _UNREAD:
            unread.append(f"{name} = {shown(value)}")
        elif name != "partial_rotary_factor" or value != 1:
            faults.append(f"{name} = {shown(value)} of rope_type = {kind!r} is not supported")
    faults += [
        f"{name} of rope_type = {kind!r} is missing" for name in _NEEDED[kind] if name not in given
    ]
    if faults:
        raise UserError(f"{listed(faults, '; ')}.")
    if unread:
        logger.warning(
            "left out of rope_type = %r, which does not read it: %s", kind, listed(unread)
        )
    return given


def _scaling(kind: str, given: Mapping[str, Any], longest: int) -> dict[str, Any]:
    values = {
        "kind": kind,
        **{_OURS[name]: value for name, value in given.items() if name in _OURS},
    }
    if kind == "dynamic":
        values["original_length"] = longest
    if kind in _ALLOWED:
        # Without a factor it is how many times longer the context became.
        factor = values.setdefault("factor", longest / given[ORIGINAL])
        values.setdefault("amplitude", _amplitude(kind, factor, given))
    if kind == "longrope":
        # Its factor is for the amplitude alone.
        del values["factor"]
    return values


def _amplitude(kind: str, factor: float | int, given: Mapping[str, Any]) -> float:
    """Returns the factor on cosines and sines where none is given: arXiv:2309.00071, section 3.4;
    arXiv:2402.13753, 3.3.
    """
    if kind == "longrope":
        if factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(factor) / math.log(given[ORIGINAL]))

    mscale = given.get("mscale")
    mscale_all_dim = given.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        # DeepSeek's code scales the scores by `mscale_all_dim`, and divides it out here.
        return yarn_amplitude(factor, mscale) / yarn_amplitude(factor, mscale_all_dim)
    return yarn_amplitude(factor, 1)


def yarn_amplitude(factor: float | int, weight: float | int) -> float:
    """Returns 0.1 · weight · ln(factor) + 1: Peng et al. 2023, arXiv:2309.00071, equation 22."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def write_scaling(scaling: RopeScalingConfig | None) -> dict[str, Any] | None:
    """Returns the fields of a scaling."""
    if scaling is None:
        return None
    names = dict.fromkeys((*_NEEDED[scaling.kind], *_ALLOWED.get(scaling.kind, ())))
    if scaling.kind == "longrope":
        del names["factor"]

    fields: dict[str, Any] = {"rope_type": scaling.kind}
    for name in names:
        if name in _OURS:
            fields[name] = getattr(scaling, _OURS[name])
    return fields


def write_position(position: PositionConfig) -> dict[str, Any]:
    """Returns the fields of a position as one group, as transformers 5 has them for a kind of
    layers each.
    """
    scaling = write_scaling(position.scaling) or {"rope_type": "default"}
    return {"rope_theta": position.theta, **scaling}
