"""`tessera describe`: sizes, parameters as a tree, attention masks as a picture; or on the
mesh of devices that need not be here; or what an engine takes; or all as JSON.
"""

import argparse
import json
import logging
import pathlib
import re

import jax

from research.core import config as configs
from research.core.errors import UserError, within
from research.inspection.mask_figure import draw_masks
from research.inspection.mask_pictures import mask_pictures, row_length
from research.inspection.report import report_json, report_lines
from research.models.config import ModelConfig
from research.recipes.describe_devices import print_on_devices
from research.recipes.describe_serve import add_serve_argument, print_serving, take_mesh
from research.recipes.experiment import add_config_argument, load_experiment
from research.recipes.workdir import read_config
from research.storage import files
from research.storage.paths import Path, absolute, as_path, reason

logger = logging.getLogger("tessera")

EXAMPLES = """\
  tessera describe --config=configs/model/llama.py:3-8b
  tessera describe --config=configs/model/gpt2.py:xl --config.pattern.0.window=128 --length=64
  tessera describe --config=configs/pretrain/stdlib.py --config.model.num_layers=12 --out=pictures
  tessera describe --config=configs/pretrain/stdlib.py:2m --devices=cpu:8 --config.mesh.fsdp=2
  tessera describe --config=configs/model/llama.py:3-70b --devices=v5p:8x8x8 \\
      --config.mesh.fsdp=64 --config.mesh.tensor=8
  tessera describe --serve=configs/serve/default.py --workdir=runs/stdlib
  tessera describe --workdir=runs/stdlib --json | jq .costs.parameters"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this verb."""
    add_config_argument(parser, required=False)
    parser.add_argument("--workdir", help="folder of a trained model, instead of --config")
    parser.add_argument(
        "--devices",
        metavar="NAME",
        help="devices that need not be here: draw the mesh on them, and show the sharding of each "
        "parameter and activation, with its bytes on one device; v5p:4x4x4, v5p:4x4x4*2 (two "
        "slices), h200:16 (nodes of eight) or cpu:8",
    )
    add_serve_argument(parser)
    parser.add_argument(
        "--out", help="folder for the picture (default WORKDIR/plots or describe/CONFIG)"
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens in the picture (default 32, or four windows)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object instead: config, summary, costs, parameters (as a tree: name, "
        "count, shape, axes, children), masks (layers, window, text); with --devices config, "
        "devices, mesh, parameters, activations, one_device, notes",
    )


def main(arguments: argparse.Namespace) -> None:
    """Prints the model and draws its masks."""
    # Nothing here needs a device, and waiting for one that another process uses would block.
    jax.config.update("jax_platforms", "cpu")
    of_mesh = take_mesh(arguments)
    _check_source(arguments)
    if arguments.serve is not None:
        _, model, _ = _source(arguments)
        print_serving(arguments, model, of_mesh)
        return
    if arguments.devices is not None:
        print_on_devices(arguments)
        return
    name, model, folder = _source(arguments)
    if arguments.out is not None:
        folder = as_path(arguments.out, "out")
    _draw(model, arguments.length, name, folder / "attention.png")

    if arguments.json:
        print(json.dumps(report_json(model), indent=2), flush=True)
    else:
        print("\n".join(report_lines(model)), flush=True)


def _draw(model: ModelConfig, length: int | None, name: str, path: Path) -> None:
    pictures = mask_pictures(model, row_length(model, length))
    try:
        files.make_folder(path.parent)
        draw_masks(pictures, name, path)
    except OSError as error:
        raise UserError(f"--out = {path.parent} cannot be written: {reason(error)}.") from error
    logger.info("%s: the attention masks", path)


def _source(arguments: argparse.Namespace) -> tuple[str, ModelConfig, Path]:
    """Returns the name of the model, the model, and the folder of its picture."""
    if arguments.config is not None:
        # configs/model/llama.py:3-8b -> llama-3-8b
        file = pathlib.Path(arguments.config).name.replace(".py", "")
        name = re.sub(r"[^\w.-]+", "-", file)
        model = load_model(arguments.config, arguments.overrides)
        return name, model, pathlib.Path("describe") / name

    workdir = as_path(arguments.workdir, "workdir")
    model = configs.bind(ModelConfig, read_config(workdir)["model"], "model")
    return absolute(workdir).name, model, workdir / "plots"


def _check_source(arguments: argparse.Namespace) -> None:
    """Raises UserError unless there is either a config or a workdir, which is not changed."""
    if (arguments.config is None) == (arguments.workdir is None):
        raise UserError("describe takes either --config or --workdir.")
    if arguments.workdir is not None and arguments.overrides:
        raise UserError(
            f"--config.{arguments.overrides[0][0]}: it changes a --config, and a --workdir has "
            "its own."
        )


def load_model(spec: str, overrides: list[tuple[str, str]]) -> ModelConfig:
    """Returns the model of a training config, or the one that a preset is.

    Raises:
      UserError: what `core.config` does not accept, with the file's name in front.
    """
    values = configs.load_file(spec)
    if "model" in values:
        return load_experiment(spec, overrides).model

    for name, _ in overrides:
        if name.startswith("model."):
            raise UserError(
                f"--config.{name}: {spec} is a model itself: say "
                f"--config.{name.removeprefix('model.')}."
            )
    with within("", origin=spec.partition(":")[0]):
        return configs.bind(ModelConfig, configs.override(values, overrides))
