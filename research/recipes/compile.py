"""`tessera compile`: what the compiler says of a training run on devices that need not be here."""

import argparse
import json
import logging

import jax

from research.core import config as configs
from research.core.errors import UserError
from research.inspection.compile_lines import compile_report_lines
from research.inspection.compile_report import compile_report, compile_report_json
from research.parallel.mesh_config import MeshConfig
from research.recipes.describe_devices import load_run
from research.recipes.experiment import add_config_argument
from research.recipes.pods import compile_pods, pod_specs
from research.scaling.cluster import parse_cluster
from research.training.mesh_checks import unused_schedule

logger = logging.getLogger("tessera")

EXAMPLES = """\
  tessera compile --config=configs/pods/llama3.py:70b-v5p-512
  tessera compile --config=configs/pods/llama3.py:70b-v5p-512 --config.model.remat=dots --json
  tessera compile --config=configs/pretrain/stdlib.py:2m --devices=cpu:8 --config.mesh.fsdp=2
  tessera compile --all=configs/pods"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this verb."""
    add_config_argument(parser, required=False)
    parser.add_argument(
        "--devices",
        metavar="NAME",
        help="devices that need not be here, v5p:4x8x8, h200:512 or cpu:8 (default mesh.devices)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object instead: devices, mesh, memory, traffic, exposed, cost, "
        "accidents",
    )
    parser.add_argument(
        "--all",
        metavar="FOLDER",
        help="compile each preset of these configs whose figures are not those of its values and "
        "of this compiler; they are kept in docs/figures/pods.json, or FOLDER/figures.json",
    )
    parser.add_argument("--only", metavar="TEXT", help="of --all, presets whose name has this text")
    parser.add_argument(
        "--again", action="store_true", help="of --all, compile presets with figures too"
    )


def main(arguments: argparse.Namespace) -> int:
    """Compiles one run, or all presets of a folder; returns the exit status."""
    # The compilers need no device, and waiting for one that another process uses would block.
    jax.config.update("jax_platforms", "cpu")
    if (arguments.config is None) == (arguments.all is None):
        raise UserError("compile takes either --config or --all.")
    if arguments.all is not None:
        return _compile_all(arguments)

    for name in ("only", "again"):
        if getattr(arguments, name):
            raise UserError(f"--{name} is for --all.")
    cluster = parse_cluster(_devices(arguments))
    if cluster.platform == "cpu":
        _make_cpu_devices(cluster.num_devices)
    run, notes = load_run(
        cluster, configs.load_file(arguments.config), arguments.overrides, arguments.config
    )
    objective = run.data.objective
    report = compile_report(run.model, run.train, run.optim, run.mesh, objective, cluster)
    # Axes of one device are left out of the report's mesh.
    stages = report.mesh.get("pipeline", 1)
    unused = unused_schedule(run.train, stages)
    if unused is not None:
        logger.warning("%s", unused)
    if arguments.json:
        print(json.dumps(compile_report_json(report), indent=2), flush=True)
    else:
        print("\n".join([*notes, *compile_report_lines(report)]), flush=True)
    return 1 if report.accidents else 0


def _compile_all(arguments: argparse.Namespace) -> int:
    """Compiles the presets of a folder; returns the exit status."""
    for name in ("devices", "json"):
        if getattr(arguments, name):
            raise UserError(f"--{name} is not for --all.")
    if arguments.overrides:
        raise UserError(f"--config.{arguments.overrides[0][0]} is not for --all.")
    specs = pod_specs(arguments.all)
    part = arguments.only or ""
    chosen = [spec for spec in specs if part in spec]
    if not chosen:
        raise UserError("only", part, f"is in no name of {', '.join(specs)}.")
    return 1 if compile_pods(arguments.all, specs, chosen, again=arguments.again) else 0


def _devices(arguments: argparse.Namespace) -> str:
    """Returns the name of the devices: that of the flag, or of the config."""
    if arguments.devices is not None:
        return arguments.devices
    values = configs.override(configs.load_file(arguments.config), arguments.overrides)
    mesh: MeshConfig = configs.bind(MeshConfig, values.get("mesh", {}), "mesh")
    if not mesh.devices:
        raise UserError(
            "devices", constraint="is needed: the config names none, as mesh.devices would."
        )
    return mesh.devices


def _make_cpu_devices(count: int) -> None:
    """Gives this process as many CPU devices as a cluster has, where JAX has not started."""
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        # JAX has its devices already; `cluster_devices` says whether they are enough.
        return
