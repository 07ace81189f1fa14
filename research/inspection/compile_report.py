"""What the compiler says of a training run on devices that need not be here: memory, collectives,
how long it takes, and what the partitioner did by accident.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

from research.data.objectives import ObjectiveConfig
from research.inspection.expected_collectives import expected_collectives
from research.inspection.program_arrays import program_arrays
from research.models.config import ModelConfig
from research.optim.optimizers import OptimConfig
from research.parallel.mesh_config import MeshConfig
from research.scaling.accidents import Finding, accidents
from research.scaling.cluster import Cluster
from research.scaling.collectives import Collective, collectives, exposed_share
from research.scaling.compiled_step import (
    CompileCost,
    DeviceMemory,
    compile_step,
    device_memory,
)
from research.scaling.topology import cluster_devices
from research.training.config import TrainConfig
from research.training.language_model import language_model_program


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind along the same axes.

    Attributes:
      axes: of the mesh.
      kind: of the collectives.
      network: that they run over.
      places: how many the program has.
      times: how many a step runs.
      sent_bytes: by a device in a step.
      exposed: the share of these bytes that go while nothing is computed.
      is_least: whether loops around them have turns that the program does not say, and that are
        counted as one.
    """

    axes: tuple[str, ...]
    kind: str
    network: str
    places: int
    times: int
    sent_bytes: int
    exposed: float
    is_least: bool


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """A compiled training step.

    Attributes:
      cluster: its devices.
      mesh: sizes of the axes of more than one device.
      memory: of one device.
      traffic: the collectives, those that send most first.
      exposed: the share of all bytes that go while nothing is computed.
      cost: of compiling.
      accidents: what the partitioner should not have done.
    """

    cluster: Cluster
    mesh: dict[str, int]
    memory: DeviceMemory
    traffic: tuple[Traffic, ...]
    exposed: float
    cost: CompileCost
    accidents: tuple[Finding, ...]


def compile_report(
    model: ModelConfig,
    train: TrainConfig,
    optim: OptimConfig,
    mesh: MeshConfig,
    objective: ObjectiveConfig,
    cluster: Cluster,
) -> CompileReport:
    """Compiles the step of a training run, and returns what the compiler says of it.

    Args:
      model, train, optim, mesh, objective: the run.
      cluster: its devices.

    Raises:
      UserError: sizes that do not fit the devices or the model, no compiler for the devices, or a
        step that does not fit their memory.
    """
    # The loop of the layers that the devices get is told from the parameters of the checks too.
    if model.layer_loop == "auto" and cluster.platform != "cpu":
        model = dataclasses.replace(model, layer_loop="scan")
    devices = cluster_devices(cluster)
    program = language_model_program(model, optim, train, mesh, devices, objective)
    compiled, cost = compile_step(program, cluster)

    text = compiled.as_text()
    found = [each for each in collectives(text, program.mesh, mesh.slices) if each.axes]
    arrays = program_arrays(
        program, model, objective, accumulation=train.accumulation, slices=mesh.slices
    )
    sizes = dict(program.mesh.shape)
    expected = None
    if cluster.platform != "cpu":
        # On CPU gradients are summed whole.
        expected = expected_collectives(sizes, mesh.zero)
    return CompileReport(
        cluster=cluster,
        mesh={axis: size for axis, size in sizes.items() if size > 1},
        memory=device_memory(compiled, cluster.memory_bytes),
        traffic=tuple(_traffic(found, cluster)),
        exposed=exposed_share(found),
        cost=cost,
        accidents=tuple(accidents(text, arrays, expected)),
    )


def _traffic(found: Iterable[Collective], cluster: Cluster) -> list[Traffic]:
    """Returns the collectives in groups."""

    def group_of(each: Collective) -> tuple[Any, ...]:
        return each.axes, each.kind, each.crosses_slices

    groups = []
    for (axes, kind, is_slow), members in itertools.groupby(sorted(found, key=group_of), group_of):
        members = list(members)
        network = cluster.slow_network if is_slow else cluster.fast_network
        sent = round(sum(each.volume for each in members))
        times = sum(each.times for each in members)
        exposed = exposed_share(members)
        is_least = not all(each.trips_known for each in members)
        groups.append(Traffic(axes, kind, network, len(members), times, sent, exposed, is_least))
    return sorted(groups, key=lambda group: -group.sent_bytes)


def compile_report_json(report: CompileReport) -> dict[str, Any]:
    """Returns the report for programs.

    The object has `devices`, `mesh`, `memory` (bytes on one device; `total`, `limit`, `margin`),
    `traffic` (the collectives), `exposed`, `cost` (seconds and bytes of this machine) and
    `accidents`.
    """
    memory = report.memory
    return {
        "devices": report.cluster.name,
        "num_devices": report.cluster.num_devices,
        "mesh": report.mesh,
        "memory": {
            **dataclasses.asdict(memory),
            "total": memory.total,
            "margin": memory.margin,
        },
        "traffic": [dataclasses.asdict(group) for group in report.traffic],
        "exposed": report.exposed,
        "cost": dataclasses.asdict(report.cost),
        "accidents": [finding._asdict() for finding in report.accidents],
    }
