"""Which layers attend to a window, in config.json."""

from collections.abc import Callable, Mapping
from typing import Any

from research.core.errors import UserError, nearest, shown
from research.interop.parts import Part
from research.models.config import ModelConfig

LOCAL = "sliding_attention"
GLOBAL = "full_attention"


def one_window(default: int | None = None, switch: bool = False) -> Part:
    """Returns the part of a window that all layers have.

    Args:
      default: the window where the field is missing.
      switch: whether the window is on only where `use_sliding_window` is.
    """

    def read(fields: Mapping[str, Any]) -> dict[str, Any]:
        window = _window(fields, switch)
        # A window of the longest sequence hides nothing.
        longest = fields["max_position_embeddings"]
        if window is not None and window >= longest:
            window = None
        num_layers = fields["num_hidden_layers"]
        windows = [window] * num_layers
        return {"layers.window": windows}

    def write(config: ModelConfig) -> dict[str, Any]:
        first_layer, *_ = config.layers()
        window = first_layer.window
        fields = {"sliding_window": window}
        is_on = window is not None
        return fields | _switched(switch, is_on)

    defaults = {"sliding_window": default}
    defaults |= _switched(switch, False)
    return Part(read=read, write=write, defaults=defaults)


def _window(fields: Mapping[str, Any], switch: bool) -> int | None:
    """Returns the window of config.json, None where its switch is off."""
    if switch and not fields["use_sliding_window"]:
        return None
    return fields["sliding_window"]


def _switched(switch: bool, on: bool) -> dict[str, Any]:
    """Returns the field of the switch, where an architecture has one."""
    if not switch:
        return {}
    return {"use_sliding_window": on}


def layer_windows(
    default: int,
    local: Callable[[Mapping[str, Any], int], bool],
    switch: bool = False,
    **defaults: Any,
) -> Part:
    """Returns the part of a window for the layers that are local by `layer_types`.

    Args:
      default: the window where the field is missing.
      local: whether a layer has it, from the fields and its number, where `layer_types` is missing.
      switch: whether the window is on only where `use_sliding_window` is.
      defaults: of the fields that `local` reads.
    """

    def read(fields: Mapping[str, Any]) -> dict[str, Any]:
        # Without a window local layers see all tokens, as global ones do.
        window_of = {
            GLOBAL: None,
            LOCAL: _window(fields, switch),
        }
        kinds = layer_types(fields, local)
        windows = [window_of[kind] for kind in kinds]
        return {"layers.window": windows}

    def write(config: ModelConfig) -> dict[str, Any]:
        windows = [layer.window for layer in config.layers()]
        kinds = [GLOBAL if window is None else LOCAL for window in windows]
        # All local layers have the same window, or else reading it back shows the difference.
        local_windows = [window for window in windows if window is not None]
        window = default
        if local_windows:
            window = local_windows[0]
        fields = {"sliding_window": window, "layer_types": kinds}
        is_on = bool(local_windows)
        return fields | _switched(switch, is_on)

    defaults |= {"sliding_window": default, "layer_types": None}
    defaults |= _switched(switch, False)
    return Part(read=read, write=write, defaults=defaults)


def layer_types(
    fields: Mapping[str, Any], local: Callable[[Mapping[str, Any], int], bool]
) -> list[str]:
    """Returns the kind of each layer: `layer_types`, or by `local` where it is missing."""
    count = fields["num_hidden_layers"]
    kinds = fields["layer_types"]
    if kinds is None:
        return [LOCAL if local(fields, i) else GLOBAL for i in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count:
        raise UserError(
            "layer_types", kinds, f"must be a list of num_hidden_layers = {count} names."
        )
    for kind in kinds:
        if kind not in (LOCAL, GLOBAL):
            hint = nearest(str(kind), (LOCAL, GLOBAL))
            constraint = f": {shown(kind)} is not supported. {hint}"
            raise UserError("layer_types", constraint=constraint)
    return kinds
