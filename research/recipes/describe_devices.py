"""`tessera describe --devices`: a training run on devices that need not be here; a model alone gets
a run.
"""

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

from research.core import config as configs
from research.core.errors import UserError, within
from research.inspection.mesh_report import mesh_report, mesh_report_json, mesh_report_lines
from research.models.config import ModelConfig
from research.parallel.mesh import abstract_mesh
from research.parallel.mesh_axes import BATCH_AXES
from research.parallel.mesh_config import MeshConfig
from research.recipes.experiment import STRUCTURES, ExperimentConfig
from research.recipes.workdir import read_config
from research.scaling.cluster import Cluster, parse_cluster
from research.storage.paths import as_path

# Groups of a run that overrides of a model alone may name: `--config.mesh.fsdp=8`.
_GROUPS = ("mesh", "train", "optim")
Overrides = Sequence[tuple[str, str]]


def print_on_devices(arguments: argparse.Namespace) -> None:
    """Prints the mesh, and each parameter and activation on it.

    Args:
      arguments: of `describe`, with `--devices`, and with a config or a workdir.
    """
    for flag in ("length", "out"):
        if getattr(arguments, flag) is not None:
            raise UserError(flag, constraint=": --devices draws no attention masks.")
    cluster = parse_cluster(arguments.devices)
    if arguments.config is not None:
        origin = arguments.config
        values = configs.load_file(origin)
    else:
        origin = arguments.workdir
        values = read_config(as_path(origin, "workdir"))

    run, notes = load_run(cluster, values, arguments.overrides, origin)
    objective = run.data.objective
    report = mesh_report(run.model, run.train, run.optim, run.mesh, objective, cluster, notes)
    if arguments.json:
        print(json.dumps(mesh_report_json(report), indent=2), flush=True)
    else:
        print("\n".join(mesh_report_lines(report)), flush=True)


def load_run(
    cluster: Cluster, values: dict[str, Any], overrides: Overrides, origin: str
) -> tuple[ExperimentConfig, tuple[str, ...]]:
    """Returns a run, and in words what was chosen where the config says nothing.

    A model alone gets AdamW, a mesh with `data` = -1 and the slices along `data`, and batches of
    one row of `max_length` tokens for each shard of a microbatch; overrides of `mesh`, `train` and
    `optim` change them.

    Args:
      cluster: its devices.
      values: of a config of a run, or of a model alone.
      overrides: of the values.
      origin: of the values, `FILE.py:arg` or a workdir.

    Raises:
      UserError: what `core.config` refuses, with the origin in front, or sizes that do not fit.
    """
    file = origin.partition(":")[0]
    if "train" in values:
        with within("", origin=file):
            return configs.bind(ExperimentConfig, configs.override(values, overrides)), ()

    # The workdir of a converted model has its model in a group.
    model_values = values
    if "model" in values:
        model_values = values["model"]
    of_run = [item for item in overrides if item[0].partition(".")[0] in _GROUPS]
    of_model = [item for item in overrides if item not in of_run]
    with within("", origin=file):
        model = configs.bind(ModelConfig, configs.override(model_values, of_model))
        return _around(model, cluster, of_run)


def _around(
    model: ModelConfig, cluster: Cluster, overrides: Overrides
) -> tuple[ExperimentConfig, tuple[str, ...]]:
    """Returns the run of a model alone."""
    given = {name for name, _ in overrides}
    notes = ["The config is a model alone. Chosen for it, and changed by --config.…=VALUE:"]
    values: dict[str, Any] = {"mesh": {}, "train": {"steps": 1}, "optim": {}}
    if not any(name.startswith("mesh.slices.") for name in given) and cluster.slices > 1:
        values["mesh"]["slices"] = {"data": cluster.slices}
        notes.append(f"  mesh.slices.data = {cluster.slices}")

    # One row for each shard of the batch.
    values = configs.override(values, overrides)
    mesh = configs.bind(MeshConfig, values["mesh"], "mesh")
    sizes = abstract_mesh(mesh, cluster.num_devices, cluster.slices).shape
    train = values["train"]
    if "train.sequence_length" not in given:
        train["sequence_length"] = model.max_length
        notes.append(f"  train.sequence_length = {model.max_length:,}, the model's max_length")
    if "train.batch_size" not in given:
        shards = dict(sizes)
        accumulation = str(train.get("accumulation", 1))
        # What is no number of microbatches is refused where the config is bound.
        if accumulation.isdecimal():
            shards["train.accumulation"] = max(int(accumulation), 1)
        axes = BATCH_AXES
        if shards.get("train.accumulation", 1) > 1:
            axes = (*BATCH_AXES, "train.accumulation")
        rows = math.prod(shards[axis] for axis in axes)
        train["batch_size"] = rows
        listed = " × ".join(axes)
        notes.append(f"  train.batch_size = {rows:,}, a row for each shard ({listed})")
    if "optim.name" not in given:
        notes.append("  optim.name = adamw")

    # The first objective that makes batches for the model's structure.
    kind = next(kind for kind, fits in STRUCTURES.items() if model.structure in fits)
    values["data"] = {"objective": {"kind": kind}}
    values["model"] = configs.plain(model)
    return configs.bind(ExperimentConfig, values), tuple(notes)
