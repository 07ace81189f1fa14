"""What `describe` says of a model on a mesh: the mesh, each parameter, each activation of a layer,
and the bytes on one device.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh

from research.core.config import plain
from research.data.objectives import ObjectiveConfig
from research.inspection.activations import activation_groups
from research.inspection.mesh_picture import MeshAxis, mesh_axes, picture
from research.inspection.report import aligned, short
from research.inspection.schedule_picture import schedule_picture
from research.inspection.sharded_arrays import ArrayGroup, ShardedArray, parameter_groups
from research.models.config import ModelConfig
from research.models.language_model import language_model
from research.optim.optimizers import OptimConfig, build_optimizer
from research.parallel.divisibility import check_batch
from research.parallel.mesh import abstract_mesh
from research.parallel.mesh_axes import PIPELINE_AXIS
from research.parallel.mesh_config import MeshConfig
from research.parallel.parameter import logical_axes
from research.parallel.pipeline_schedule import make_schedule
from research.parallel.rules import param_shardings
from research.parallel.target import compiling_for
from research.scaling.cluster import Cluster
from research.training.config import TrainConfig
from research.training.layout import zero_layout
from research.training.mesh_checks import (
    check_axes,
    check_schedule,
    stacked_for_stages,
    stage_splits,
    unused_schedule,
)
from research.training.partition import build_partition
from research.training.state import abstract_state


@dataclasses.dataclass(frozen=True)
class DeviceBytes:
    """Bytes on one device that stay there from step to step, and the gradients of a step.

    Attributes:
      parameters: frozen ones included.
      gradients: of the trainable parameters.
      optimizer: the state of the optimizer.
      average: of the averaged parameters; 0 where the run keeps none.
    """

    parameters: int
    gradients: int
    optimizer: int
    average: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer + self.average


@dataclasses.dataclass(frozen=True)
class MeshReport:
    """A training run of a model on a mesh.

    Attributes:
      model, train, optim, mesh: the run.
      cluster: its devices.
      axes: of the mesh, those of more than one device.
      parameters: in groups.
      activations: of a microbatch, for each kind of layer.
      device: bytes on one device.
      notes: what was chosen because the config says nothing of it, and what does nothing.
    """

    model: ModelConfig
    train: TrainConfig
    optim: OptimConfig
    mesh: MeshConfig
    cluster: Cluster
    axes: list[MeshAxis]
    parameters: list[ArrayGroup]
    activations: list[ArrayGroup]
    device: DeviceBytes
    notes: tuple[str, ...]

    @property
    def stages(self) -> int:
        """Stages of layers."""
        for axis in self.axes:
            if axis.name == PIPELINE_AXIS:
                return axis.size
        return 1


def mesh_report(
    model: ModelConfig,
    train: TrainConfig,
    optim: OptimConfig,
    mesh: MeshConfig,
    objective: ObjectiveConfig,
    cluster: Cluster,
    notes: tuple[str, ...] = (),
) -> MeshReport:
    """Returns the report of a training run; nothing is compiled, and no array is made.

    Args:
      model, train, optim, mesh, objective: the run.
      cluster: its devices, which need not be here.
      notes: as of `MeshReport`.

    Raises:
      UserError: sizes that do not fit the devices or the model, or an axis that it cannot use.
    """
    sizes = abstract_mesh(mesh, cluster.num_devices, cluster.slices)
    check_axes(model, sizes.shape, train.pipeline.chunks, train.sequence_length)
    check_batch(train.batch_size, train.sequence_length, train.accumulation, sizes)
    check_schedule(model, train, sizes.shape)
    stages = sizes.shape["pipeline"]
    unused = unused_schedule(train, stages)
    if unused is not None:
        notes = (*notes, unused)
    model = stacked_for_stages(model, stages)
    boxed = _abstract_parameters(model, cluster)
    parameters = parameter_groups(model, boxed, sizes, shard_width=mesh.zero == 3)

    rows = train.batch_size // train.accumulation
    activations = activation_groups(model, objective, rows, train.sequence_length, sizes)
    # Whatever the ZeRO level, the optimizer's state is sharded as parameters are at level 3.
    states = parameter_groups(model, boxed, sizes, shard_width=True)
    arrays = [array for group in (*states, *activations) for array in group.arrays]
    axes = mesh_axes(sizes, mesh, cluster, arrays, model.attention.exchange)
    device = _device_bytes(boxed, train, optim, sizes, mesh.zero)
    return MeshReport(
        model, train, optim, mesh, cluster, axes, parameters, activations, device, notes
    )


def _abstract_parameters(model: ModelConfig, cluster: Cluster) -> Any:
    """Returns boxed shapes of the parameters, in the form that suits the devices."""
    init = language_model(model, cluster.platform).init

    def init_there(key: jax.Array) -> Any:
        with compiling_for(cluster.platform, cluster.device_kind):
            return init(key)

    return jax.eval_shape(init_there, jax.random.key(0))


def _device_bytes(
    boxed: Any, train: TrainConfig, optim: OptimConfig, mesh: AbstractMesh, zero: int
) -> DeviceBytes:
    partition = build_partition(train.trainable, boxed)
    trainable, frozen = jax.eval_shape(partition.split, boxed)
    optimizer, _ = build_optimizer(optim, logical_axes(trainable), train.steps)
    keep_ema = optim.ema_decay is not None
    state = abstract_state(trainable, optimizer, mesh, keep_ema=keep_ema, zero=zero)

    frozen_shardings = param_shardings(frozen, mesh, shard_width=zero == 3)
    gradient_shardings = zero_layout(trainable, mesh, zero).gradients
    return DeviceBytes(
        parameters=_bytes(state.params) + _placed_bytes(nn.unbox(frozen), frozen_shardings),
        gradients=_placed_bytes(nn.unbox(trainable), gradient_shardings),
        optimizer=_bytes(state.opt_state),
        average=_bytes(state.ema),
    )


def _bytes(tree: Any) -> int:
    """Returns the bytes on one device of arrays that know their sharding."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, tree)
    return _placed_bytes(tree, shardings)


def _placed_bytes(tree: Any, shardings: Any) -> int:
    """Returns the bytes on one device of arrays."""

    def bytes_of_part(leaf: Any, sharding: jax.sharding.Sharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(bytes_of_part, tree, shardings)))


def mesh_report_lines(report: MeshReport) -> list[str]:
    """Returns the report for people."""
    train = report.train
    rows = train.batch_size // train.accumulation
    device = f"one device: {short(report.device.total)}B of parameters, gradients and optimizer"
    notes = [*report.notes, ""] if report.notes else []
    activations = f"activations of one layer, {rows:,} rows of {train.sequence_length:,} tokens"
    return [
        *notes,
        *picture(report.axes, report.cluster, device),
        "",
        *_schedule_lines(report),
        "An axis of an array is written with its size; after / are the mesh axes that shard it.",
        "",
        *_table("parameters", report.parameters, each=False),
        "",
        *_table(activations, report.activations, each=True),
        "",
        *_totals(report),
    ]


def _schedule_lines(report: MeshReport) -> list[str]:
    """Returns the schedule of the pipeline, if the mesh has one."""
    stages = report.stages
    if stages == 1:
        return []
    train = report.train
    config = train.pipeline
    schedule = make_schedule(config.schedule, stages, train.accumulation, config.chunks)
    sizes = []
    for split in stage_splits(report.model, stages, config.chunks):
        counts = split.counts
        layers = ", ".join(str(count) for count in counts)
        if len(set(counts)) == 1:
            layers = f"{counts[0]} each"
        sizes.append(f"layers of the stages of {split.stack}: {layers}")
    return [*schedule_picture(schedule), *sizes, ""]


def _table(title: str, groups: Sequence[ArrayGroup], each: bool) -> list[str]:
    """Returns lines of three columns: names, axes, bytes on one device.

    Args:
      title: over the names.
      groups: of arrays.
      each: whether the bytes of a group are those of one of its layers, not of all.
    """
    rows = [(title, "", "bytes on one device")]
    for group in groups:
        indent = ""
        if group.name:
            size = group.device_bytes_each if each else group.device_bytes
            rows.append((_group_text(group), "", f"{size:,}"))
            indent = "  "
        for array in group.arrays:
            rows.append((indent + array.name, _axes_text(array), f"{array.device_bytes:,}"))

    # Beside a title and a group's name stands nothing but bytes.
    name_width = max((len(name) for name, axes, _ in rows if axes), default=0)
    axes_width = max(len(axes) for _, axes, _ in rows)
    size_width = max(len(size) for *_, size in rows[1:]) if groups else 0
    left_width = max(name_width + 2 + axes_width, len(title) + 8)
    lines = []
    for name, axes, size in rows:
        left = f"{name:{name_width}}  {axes}" if axes else name
        width = left_width + 2 + size_width
        lines.append(f"{left}{size:>{max(width - len(left), len(size) + 2)}}")
    return lines


def _group_text(group: ArrayGroup) -> str:
    if group.stacked:
        return f"{group.name}, stacked"
    return f"{group.name}, {group.count} ×" if group.count > 1 else group.name


def _axes_text(array: ShardedArray) -> str:
    # embed 8,192/fsdp·expert × heads 64/tensor × head 128
    texts = []
    for name, size, mesh_names in zip(array.axes, array.shape, array.mesh_axes, strict=True):
        text = f"{size:,}" if name is None else f"{name} {size:,}"
        if mesh_names:
            text += f"/{'·'.join(mesh_names)}"
        texts.append(text)
    return " × ".join(texts)


def _totals(report: MeshReport) -> list[str]:
    """Returns the bytes on one device beside those that it has."""
    device = report.device
    rows = {
        "parameters": device.parameters,
        "gradients": device.gradients,
        f"optimizer, {report.optim.name}": device.optimizer,
    }
    if device.average:
        rows["average"] = device.average
    rows["together"] = device.total

    width = len(f"{device.total:,}")
    texts = {name: f"{size:>{width},}  {short(size)}B" for name, size in rows.items()}
    memory = report.cluster.memory_bytes
    if memory is not None:
        texts["together"] += f", {device.total / memory:.1%} of its {short(memory)}B"
    return [
        "bytes on one device, without activations and without what is gathered for a layer",
        *aligned(texts),
    ]


def mesh_report_json(report: MeshReport) -> dict[str, Any]:
    """Returns the report for programs.

    The object has `config` (model, train, optim, mesh), `devices`, `mesh` (its axes), `parameters`,
    `activations` (groups of arrays), `one_device` (bytes), and `notes`.
    """
    cluster = report.cluster
    devices = {
        **dataclasses.asdict(cluster),
        "num_devices": cluster.num_devices,
        "memory_bytes": cluster.memory_bytes,
    }
    return {
        "config": {
            "model": plain(report.model),
            "train": plain(report.train),
            "optim": plain(report.optim),
            "mesh": plain(report.mesh),
        },
        "devices": devices,
        "mesh": [dataclasses.asdict(axis) for axis in report.axes],
        "parameters": [_group_json(group) for group in report.parameters],
        "activations": [_group_json(group) for group in report.activations],
        "one_device": {**dataclasses.asdict(report.device), "total": report.device.total},
        "notes": list(report.notes),
    }


def _group_json(group: ArrayGroup) -> dict[str, Any]:
    arrays = []
    for array in group.arrays:
        arrays.append({**dataclasses.asdict(array), "device_bytes": array.device_bytes})
    return {
        "name": group.name,
        "count": group.count,
        "stacked": group.stacked,
        "device_bytes_each": group.device_bytes_each,
        "device_bytes": group.device_bytes,
        "arrays": arrays,
    }
