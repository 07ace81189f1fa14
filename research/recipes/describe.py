"""`tessera describe`: what a config makes: layers, shapes and counts as a tree, attention masks as
a picture.
"""

import argparse
import dataclasses
import logging
import pathlib
import re

import jax

from research.core import config as configs
from research.core.errors import UserError, within
from research.inspection import description, parameter_summary
from research.inspection.mask_pictures import draw_masks, mask_pictures, row_length
from research.inspection.parameter_summary import Part
from research.models.config import ModelConfig
from research.models.flops import train_flops_per_token
from research.recipes.experiment import add_config_argument, load_experiment
from research.recipes.workdir import read_config
from research.storage import files
from research.storage.paths import Path, absolute, as_path, reason

logger = logging.getLogger("tessera")

EXAMPLES = """\
  tessera describe --config=configs/model/llama.py:3-8b
  tessera describe --config=configs/model/gpt2.py:xl --config.pattern.0.window=128 --length=64
  tessera describe --config=configs/pretrain/stdlib.py --config.model.num_layers=12 --out=pictures
  tessera describe --workdir=runs/stdlib"""

BYTES = {"float32": 4, "bfloat16": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this verb."""
    add_config_argument(parser, required=False)
    parser.add_argument("--workdir", help="folder of a trained model, in the place of --config")
    parser.add_argument(
        "--out", help="folder for the picture (default WORKDIR/plots or describe/CONFIG)"
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens in the picture (default 32, or four windows)",
    )


def main(arguments: argparse.Namespace) -> None:
    """Prints the model and draws its masks."""
    # Nothing here needs a device, and one that another process holds must not stand in the way.
    jax.config.update("jax_platforms", "cpu")
    name, model, folder = _source(arguments)
    pictures = mask_pictures(model, row_length(model, arguments.length))
    path = (folder if arguments.out is None else as_path(arguments.out, "out")) / "attention.png"
    try:
        files.make_folder(path.parent)
        draw_masks(pictures, name, path)
    except OSError as error:
        raise UserError(f"--out = {path.parent} cannot be written: {reason(error)}.") from error
    print("\n".join(report(model)), flush=True)
    logger.info("%s: the attention masks", path)


def _source(arguments: argparse.Namespace) -> tuple[str, ModelConfig, Path]:
    """Returns what the model is called, the model, and where its picture goes."""
    if (arguments.config is None) == (arguments.workdir is None):
        raise UserError("describe takes either --config or --workdir.")
    if arguments.config is not None:
        name = re.sub(r"[^\w.-]+", "-", pathlib.Path(arguments.config).name.replace(".py", ""))
        return (
            name,
            load_model(arguments.config, arguments.overrides),
            pathlib.Path("describe") / name,
        )
    if arguments.overrides:
        raise UserError(
            f"--config.{arguments.overrides[0][0]}: it changes a --config, and a --workdir has "
            "its own."
        )
    workdir = as_path(arguments.workdir, "workdir")
    return (
        absolute(workdir).name,
        configs.bind(ModelConfig, read_config(workdir)["model"], "model"),
        workdir / "plots",
    )


def load_model(spec: str, overrides: list[tuple[str, str]]) -> ModelConfig:
    """Returns the model of a training config, or the one that a preset is.

    Raises:
      UserError: what `core.config` refuses, with the file's name in front.
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


def report(config: ModelConfig) -> list[str]:
    """Returns all that is printed: the sentence, the facts, the tree and the sums."""
    model = parameter_summary.take_apart(config)
    facts = description.facts(config)
    if config.structure == "encoder_decoder":
        facts |= _layers(config.encoder(), "encoder, ") | _layers(config, "decoder, ")
    else:
        facts |= _layers(config, "")
    sections = [_table(facts), parameter_summary.tree_lines(model), _table(sums(config, model))]
    return [
        description.sentence(config, model.count),
        *(line for lines in sections for line in ("", *lines)),
    ]


def _layers(config: ModelConfig, stack: str) -> dict[str, str]:
    kinds = parameter_summary.layer_kinds(config).items()
    return {
        f"{stack}{parameter_summary.layers_name(numbers)}": description.layer(config, kind)
        for kind, numbers in kinds
    }


def _table(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"{name:{width}}  {words}" for name, words in rows.items()]


def sums(config: ModelConfig, model: Part) -> dict[str, str]:
    """Returns what the model comes to, by name."""
    tables = sum(part.count for part in model.parts if part.name in ("embed", "unembed"))
    plain = dataclasses.replace(config, head=dataclasses.replace(config.head, mtp_depth=0))
    whole = config.max_length if config.structure == "encoder_decoder" else 0
    forward = round(train_flops_per_token(plain, config.max_length, whole) / 3)
    said = {
        "parameters": f"{model.count:,}",
        "embedding": f"{tables:,} of them, {tables / model.count:.1%}"
        + ("" if config.tied_embeddings else ", the output projection with it"),
        "memory": ", ".join(
            f"{_short(size * model.count)}B in {dtype}" for dtype, size in BYTES.items()
        ),
        "forward": f"{_short(forward)}FLOP a token of a sequence of {config.max_length:,}"
        + (", which reads as many of the encoder" if whole else ""),
    }
    if config.experts is not None:
        active = parameter_summary.active_parameters(config, model)
        said["active"] = (
            f"{active:,} a token, {active / model.count:.1%}: its experts and all that is no expert"
        )
    if config.structure != "encoder":
        own, encoder = (2 * numbers for numbers in parameter_summary.cache_numbers(config))
        more = f", and {encoder:,} for one of the encoder" if encoder else ""
        said["KV cache"] = f"{own:,} bytes a token{more}, in bfloat16"
    return said


def _short(number: int) -> str:
    """Returns a number with three digits or four and the letter of its thousands."""
    power = min(4, max(0, (len(str(number)) - 1) // 3))
    return f"{number / 1000**power:,.{1 if power else 0}f} {'kMGT'[power - 1] if power else ''}"
