"""`tessera doctor`: checks on one screen what would make a run fail later."""

import argparse
import json

import jax

from research.core.errors import UserError
from research.data.prepare import check_sources
from research.inspection.machine_checks import Check, machine_checks
from research.recipes import workdir as workdirs
from research.recipes.experiment import add_config_argument, load_experiment
from research.storage.paths import Path, as_path
from research.training.language_model import language_model_program

EXAMPLES = """\
  tessera doctor
  tessera doctor --workdir=runs/stdlib
  tessera doctor --config=configs/pretrain/stdlib.py --workdir=runs/stdlib
  tessera doctor --json | jq '.checks[] | select(.status != "ok")'"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this verb."""
    parser.add_argument(
        "--workdir", default="runs", help="folder that a run will write to (default runs)"
    )
    add_config_argument(parser, required=False)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object instead: ok (whether nothing failed), checks (name, status: "
        "ok, warn or fail, message)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Prints every check and returns 1 where one failed."""
    workdir = as_path(arguments.workdir, "workdir")
    checks, devices = machine_checks(workdir)
    if arguments.config is not None:
        checks.append(_config_check(arguments.config, arguments.overrides, workdir, devices))
    failed = any(check.status == "fail" for check in checks)

    if arguments.json:
        _print_json(checks, failed)
    else:
        _print_lines(checks)
    return int(failed)


def _print_json(checks: list[Check], failed: bool) -> None:
    rows = [check._asdict() for check in checks]
    result = {"ok": not failed, "checks": rows}
    print(json.dumps(result, indent=2))


def _print_lines(checks: list[Check]) -> None:
    for check in checks:
        # Capitals, so that a failure catches the eye.
        status = "FAIL" if check.status == "fail" else check.status
        print(f"{status:5} {check.name:12} {check.message}")


def _config_check(
    spec: str, overrides: list[tuple[str, str]], workdir: Path, devices: list[jax.Device]
) -> Check:
    """Returns whether the config can be read and its program fits the devices."""
    try:
        config = load_experiment(spec, overrides)
        check_sources(config.data)
        workdirs.check(workdir, config)
        if not devices:
            message = f"{spec} can be read; whether it fits is not known without a device"
            return Check("config", "warn", message)
        # Building the program checks mesh, batch and model against each other; no step is run.
        program = language_model_program(
            config.model, config.optim, config.train, config.mesh, devices
        )
    except UserError as error:
        message = error.text({"workdir": "--workdir", "config": "--config"})
        return Check("config", "fail", message)

    sizes = [f"{name} {size}" for name, size in program.mesh.shape.items() if size > 1]
    mesh = ", ".join(sizes) or "one device"
    return Check("config", "ok", f"{spec} fits: mesh of {mesh}")
