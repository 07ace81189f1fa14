"""Which layers attend to a window, in config.json."""

from collections.abc import Callable, Mapping
from typing import Any

from research.core.errors import UserError, nearest, shown
from research.interop.parts import Part
from research.models.config import ModelConfig

LOCAL, GLOBAL = "sliding_attention", "full_attention"


def one_window(default: int | None = None, switch: bool = False) -> Part:
    """Returns the part of a window that all layers have.

    Args:
      default: where no field says it.
      switch: whether the window is on only where `use_sliding_window` is.
    """

    def read(fields: Mapping[str, Any]) -> dict[str, Any]:
        window = None if switch and not fields["use_sliding_window"] else fields["sliding_window"]
        # One that holds the longest sequence hides nothing.
        window = (
            None if window is not None and window >= fields["max_position_embeddings"] else window
        )
        return {"layers.window": [window] * fields["num_hidden_layers"]}

    def write(config: ModelConfig) -> dict[str, Any]:
        window = config.layers()[0].window
        return {
            "sliding_window": window,
            **({"use_sliding_window": window is not None} if switch else {}),
        }

    defaults = {"sliding_window": default, **({"use_sliding_window": False} if switch else {})}
    return Part(read=read, write=write, defaults=defaults)


def layer_windows(
    default: int,
    local: Callable[[Mapping[str, Any], int], bool],
    switch: bool = False,
    **defaults: Any,
) -> Part:
    """Returns the part of a window that `layer_types` says which layers have.

    Args:
      default: the window where no field says it.
      local: whether a layer has it, from the fields and its number, where `layer_types` is missing.
      switch: whether the window is on only where `use_sliding_window` is.
      defaults: of the fields that `local` reads.
    """

    def read(fields: Mapping[str, Any]) -> dict[str, Any]:
        window = None if switch and not fields["use_sliding_window"] else fields["sliding_window"]
        kinds = layer_types(fields, local)
        if window is None and switch:
            return {"layers.window": [None] * len(kinds)}
        return {"layers.window": [window if kind == LOCAL else None for kind in kinds]}

    def write(config: ModelConfig) -> dict[str, Any]:
        windows = [layer.window for layer in config.layers()]
        window = next((each for each in windows if each is not None), None)
        fields = {
            "sliding_window": default if window is None else window,
            "layer_types": [GLOBAL if each is None else LOCAL for each in windows],
        }
        return fields | ({"use_sliding_window": window is not None} if switch else {})

    defaults |= {"sliding_window": default, "layer_types": None}
    return Part(
        read=read,
        write=write,
        defaults=defaults | ({"use_sliding_window": False} if switch else {}),
    )


def layer_types(
    fields: Mapping[str, Any], local: Callable[[Mapping[str, Any], int], bool]
) -> list[str]:
    """Returns the kind of each layer: what `layer_types` says, or else `local`."""
    count, kinds = fields["num_hidden_layers"], fields["layer_types"]
    if kinds is None:
        return [LOCAL if local(fields, i) else GLOBAL for i in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count:
        raise UserError(
            "layer_types", kinds, f"must be a list of num_hidden_layers = {count} names."
        )
    for kind in kinds:
        if kind not in (LOCAL, GLOBAL):
            raise UserError(
                "layer_types",
                constraint=f": {shown(kind)} is not supported. "
                f"{nearest(str(kind), (LOCAL, GLOBAL))}",
            )
    return kinds
