"""`tessera describe --serve`: what an engine takes of a device, and what fits."""

import argparse
import json
from collections.abc import Sequence

import flax.linen as nn
import jax
import psutil

from research.core import config as configs
from research.core.errors import UserError, within
from research.inference.serve_config import bind_serve
from research.inference.sizing import engine_bytes
from research.inspection.serve_report import (
    ServeReport,
    serve_report,
    serve_report_json,
    serve_report_lines,
)
from research.models.config import ModelConfig
from research.models.language_model import abstract_boxed_params
from research.parallel.mesh import abstract_mesh
from research.parallel.mesh_axes import DATA_AXIS
from research.parallel.mesh_config import MeshConfig
from research.parallel.target import compiling_for
from research.recipes.generation_mesh import check_generation_axes, shardings_for_generation
from research.scaling.cluster import Cluster, parse_cluster
from research.training.mesh_checks import check_axes

Overrides = Sequence[tuple[str, str]]
HOST = "the free memory of this host"


def add_serve_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--serve`."""
    parser.add_argument(
        "--serve",
        metavar="FILE.py",
        help="config of an engine: show what it takes of a device (--devices, or this host), and "
        "what fits",
    )


def take_mesh(arguments: argparse.Namespace) -> Overrides:
    """Takes overrides of the mesh from those of the model where there is `--serve`, and returns
    them: the mesh is the engine's.
    """
    if arguments.serve is None:
        return []
    of_mesh = [item for item in arguments.overrides if item[0].startswith("mesh.")]
    arguments.overrides = [item for item in arguments.overrides if item not in of_mesh]
    return of_mesh


def print_serving(arguments: argparse.Namespace, model: ModelConfig, of_mesh: Overrides) -> None:
    """Prints what fits.

    Args:
      arguments: of `describe`, with `--serve`.
      model: that answers.
      of_mesh: overrides of its mesh.

    Raises:
      UserError: a config that is none, a mesh that does not fit the devices, or memory too small.
    """
    for flag in ("length", "out"):
        if getattr(arguments, flag) is not None:
            raise UserError(flag, constraint=": --serve draws no attention masks.")
    cluster = parse_cluster(arguments.devices or "cpu:1")
    report = _report(arguments.serve, model, cluster, of_mesh)
    if arguments.json:
        print(json.dumps(serve_report_json(report), indent=2), flush=True)
    else:
        print("\n".join(serve_report_lines(report)), flush=True)


def _report(path: str, model: ModelConfig, cluster: Cluster, of_mesh: Overrides) -> ServeReport:
    with within("", origin=path.partition(":")[0]):
        serve = bind_serve(configs.load_file(path)).of_structure(model.structure)
    values = configs.override({"mesh": {"data": -1}}, of_mesh)
    mesh = configs.bind(MeshConfig, values["mesh"], "mesh")
    check_generation_axes(mesh)
    sizes = abstract_mesh(mesh, cluster.num_devices, cluster.slices)
    check_axes(model, sizes.shape)

    # What fits follows from the platform's kernels.
    with compiling_for(cluster.platform, cluster.device_kind):
        boxed = abstract_boxed_params(model, cluster.platform)
        shardings = shardings_for_generation(boxed, sizes, mesh.zero)
        params = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            nn.unbox(boxed),
            shardings,
        )
        taken = engine_bytes(model, params, serve, model.vocab_size, sizes.shape)
    memory = cluster.memory_bytes
    device = f"one of {cluster.name}"
    if memory is None:
        memory = psutil.virtual_memory().available // cluster.num_devices
        device = HOST if cluster.num_devices == 1 else f"a part of {HOST}"
    return serve_report(model, serve, taken, memory, device, sizes.shape[DATA_AXIS])
