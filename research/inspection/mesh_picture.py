"""The mesh as a picture of text: each axis with what it carries, the collectives along it, and
their network.
"""

import dataclasses
import itertools
import textwrap
from collections.abc import Iterable

from jax.sharding import AbstractMesh

from research.inspection.sharded_arrays import ShardedArray
from research.kernels.attention import KeyExchange
from research.parallel.mesh_axes import PIPELINE_AXIS
from research.parallel.mesh_config import MeshConfig
from research.scaling.cluster import Cluster

WIDTH = 100
# The most parts of an axis that are all drawn: of more, the first ones and the last.
_MOST_PARTS = 5
_CARRIES = {
    "batch": "rows of the batch",
    "length": "tokens of a row",
    "layers": "stages of layers",
    "expert": "experts",
    "embed": "shards of {}",
    "heads": "heads",
    "kv_heads": "KV heads",
    "mlp": "MLP width",
    "vocab": "vocabulary",
}
_SUM_OF_GRADIENTS = "all-reduce of gradients"
# ZeRO level -> what the axes of the model's width shard, and the collectives that this takes: at
# level 3 parameters are gathered for each layer, at the others new ones once a step.
_SHARDED = {3: "parameters", 2: "gradients and optimizer state", 1: "optimizer state"}
_OF_WIDTH = {
    3: ("all-gather of parameters", "reduce-scatter of gradients"),
    2: ("reduce-scatter of gradients", "all-gather of new parameters"),
    1: (_SUM_OF_GRADIENTS, "all-gather of new parameters"),
}
_HIDDEN_STATES = "all-reduce of hidden states"
_KEY_EXCHANGES = {
    "ring": "ring of keys and values",
    "all_gather": "all-gather of keys and values",
}


@dataclasses.dataclass(frozen=True)
class MeshAxis:
    """An axis of the mesh.

    Attributes:
      name: of the axis.
      size: devices along it.
      slices: of devices, along it.
      carries: what it shards, in words.
      collectives: which run along it in a training step.
      networks: over which they run.
    """

    name: str
    size: int
    slices: int
    carries: tuple[str, ...]
    collectives: tuple[str, ...]
    networks: tuple[str, ...]


def mesh_axes(
    mesh: AbstractMesh,
    config: MeshConfig,
    cluster: Cluster,
    arrays: Iterable[ShardedArray],
    exchange: KeyExchange,
) -> list[MeshAxis]:
    """Returns the axes of more than one device, outermost first.

    Args:
      mesh: sizes of all axes.
      config: of the mesh: its slices, and its ZeRO level.
      cluster: which devices.
      arrays: activations, and parameters as ZeRO level 3 shards them: their logical axes are what
        an axis carries.
      exchange: how queries meet the keys of other devices along `context`.
    """
    arrays = list(arrays)
    axes = []
    for name, size in mesh.shape.items():
        if size == 1:
            continue
        logical = _carried(name, arrays)
        slices = config.slices.sizes()[name]
        axis = MeshAxis(
            name=name,
            size=size,
            slices=slices,
            carries=_carries(logical, config.zero),
            collectives=_collectives(logical, size, exchange, config.zero),
            networks=_networks(size, slices, cluster),
        )
        axes.append(axis)
    return axes


def _carries(logical: tuple[str, ...], zero: int) -> tuple[str, ...]:
    """Returns in words what a mesh axis shards, from its logical axes."""
    sharded = _SHARDED[zero]
    words = []
    for axis in logical:
        text = _CARRIES[axis]
        words.append(text.format(sharded))
    return tuple(words)


def _networks(size: int, slices: int, cluster: Cluster) -> tuple[str, ...]:
    """Returns the networks that join the devices along an axis, in so many slices."""
    networks = []
    if size > slices:
        networks.append(cluster.fast_network)
    if slices > 1:
        networks.append(cluster.slow_network)
    return tuple(networks)


def _carried(name: str, arrays: Iterable[ShardedArray]) -> tuple[str, ...]:
    """Returns the logical axes that a mesh axis shards, in the order of `_CARRIES`."""
    if name == PIPELINE_AXIS:
        # Where stages differ in layers, the state is sharded along other axes, which each step
        # gathers: that is its layout, and not what stages do.
        return ("layers",)
    sharded = set()
    for array in arrays:
        for axis, mesh_axes_of_it in zip(array.axes, array.mesh_axes, strict=True):
            if name in mesh_axes_of_it:
                sharded.add(axis)
    return tuple(axis for axis in _CARRIES if axis in sharded)


def _collectives(
    logical: tuple[str, ...], size: int, exchange: KeyExchange, zero: int
) -> tuple[str, ...]:
    """Returns the collectives that follow from the logical axes that a mesh axis shards."""
    found: list[str] = []
    if "embed" in logical:
        found += _OF_WIDTH[zero]
    elif "batch" in logical or "length" in logical:
        found.append(_SUM_OF_GRADIENTS)
    if "length" in logical:
        found += _key_exchange(size, exchange)
    if "layers" in logical:
        found.append("hidden states from stage to stage")
    if "expert" in logical:
        found.append("all-to-all of tokens to their experts")
    tensor_axes = {"heads", "kv_heads", "mlp", "vocab"}
    if tensor_axes.intersection(logical):
        found.append(_HIDDEN_STATES)
    return tuple(found)


def _key_exchange(size: int, exchange: KeyExchange) -> list[str]:
    """Returns how attention meets the keys of other devices."""
    found = []
    if exchange.all_to_all > 1:
        found.append("all-to-all of heads")
    # Groups of all devices exchange heads alone.
    if exchange.all_to_all < size:
        found.append(_KEY_EXCHANGES[exchange.kind])
    return found


def picture(axes: list[MeshAxis], cluster: Cluster, device_text: str) -> list[str]:
    """Returns the lines of the picture, at most `WIDTH` characters each.

    Every axis is a row of parts; the first part of it is cut further by the next axis. A double
    line stands between slices.

    Args:
      axes: of more than one device, outermost first.
      cluster: which devices.
      device_text: what one device holds.
    """
    labels = [f"{axis.name} {axis.size}" for axis in axes]
    boxes = [_box(axis) for axis in axes]
    tops = [top for top, _, _ in boxes]
    label_width = max(map(len, labels), default=0) + 2
    box_width = max(map(len, tops), default=0) + 2
    text_width = WIDTH - label_width - box_width

    lines = [_title(cluster)]
    for index, axis in enumerate(axes):
        top, middle, bottom = boxes[index]
        # The first part hangs from that of the axis above.
        if index > 0:
            top = f"{top[:2]}┴{top[3:]}"
        bottom = f"{bottom[:2]}┬{bottom[3:]}"

        # Three columns: the label beside the first line of the box, a line down where the box has
        # ended, and the text.
        left = [labels[index]]
        boxed = [top, middle, bottom]
        text = _axis_text(axis, text_width)
        rows = itertools.zip_longest(left, boxed, text)
        for label, box, words in rows:
            label = label or ""
            box = box or "  │"
            words = words or ""
            line = f"{label:{label_width}}{box:{box_width}}{words}"
            lines.append(line.rstrip())
    lines.append(f"{'':{label_width}}{device_text}")
    return lines


def _title(cluster: Cluster) -> str:
    noun = "device" if cluster.num_devices == 1 else "devices"
    title = f"{cluster.num_devices:,} {noun}, {cluster.name}"
    if cluster.slices > 1:
        title += f": {cluster.slices} slices of {cluster.devices_per_slice:,}"
    return title


def _axis_text(axis: MeshAxis, width: int) -> list[str]:
    """Returns what an axis carries, its collectives and its network, in lines."""
    carries = ", ".join(axis.carries) or "nothing: copies"
    collectives = ", ".join(axis.collectives)
    network = f"over {' and '.join(axis.networks)}"
    lines = []
    for text in (carries, collectives, network):
        # A text that goes on is indented.
        lines += textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)
    return lines


def _box(axis: MeshAxis) -> tuple[str, str, str]:
    """Returns the three lines of the row of parts.

    Size 64 in one slice:        │ 0 │ 1 │ 2 │ … │ 63 │
    Size 8 in 2 slices of 4:     │ 0–3 ║ 4–7 │
    """
    within = axis.size // axis.slices
    count = axis.size
    labels = [str(index) for index in range(axis.size)]
    between = ("┬", "│", "┴")
    if axis.slices > 1:
        count = axis.slices
        between = ("╥", "║", "╨")
        if within > 1:
            labels = []
            for first in range(0, axis.size, within):
                last = first + within - 1
                labels.append(f"{first}–{last}")
    if count > _MOST_PARTS:
        first_labels = labels[: _MOST_PARTS - 2]
        last_label = labels[-1]
        labels = [*first_labels, "…", last_label]

    width = max(map(len, labels)) + 2
    cells = [f"{label:^{width}}" for label in labels]
    bar = "─" * width
    bars = [bar] * len(cells)
    top_bar, middle_bar, bottom_bar = between
    top = f"┌{top_bar.join(bars)}┐"
    middle = f"│{middle_bar.join(cells)}│"
    bottom = f"└{bottom_bar.join(bars)}┘"
    return top, middle, bottom
