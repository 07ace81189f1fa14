"""What the compiler says of a preset, as a row of a table."""

from collections.abc import Mapping
from typing import Any

from research.inspection.report import short

COLUMNS = (
    "preset",
    "devices",
    "mesh",
    "memory",
    "left",
    "sent a step",
    "exposed",
    "compiled in",
    "host memory",
    "accidents",
)


def report_row(name: str, entry: Mapping[str, Any]) -> list[str]:
    """Returns the cells of a preset.

    Args:
      name: of the preset.
      entry: its `report`, as `compile_report_json` gives it.
    """
    found = entry["report"]
    memory = found["memory"]
    cost = found["cost"]
    sent = sum(group["sent_bytes"] for group in found["traffic"])
    at_least = "≥ " if any(group["is_least"] for group in found["traffic"]) else ""
    used = f"{short(memory['total'])}B"
    left = "–"
    if memory["limit"] is not None:
        used += f" of {short(memory['limit'])}B"
        left = f"{memory['margin']:.0%}"
    return [
        f"`{name}`",
        found["devices"],
        " × ".join(f"{axis} {size}" for axis, size in found["mesh"].items()),
        used,
        left,
        f"{at_least}{short(sent)}B",
        f"{found['exposed']:.0%}",
        f"{cost['compile_seconds']:.0f} s, {cost['cpu_seconds']:.0f} s of processors",
        f"{short(cost['host_bytes'])}B",
        str(len(found["accidents"])),
    ]
