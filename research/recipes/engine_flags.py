"""The flags of what decides how texts are computed: guesses, types, the mesh, the engine."""

import argparse
from collections.abc import Mapping
from typing import Any

from research.core import config as configs
from research.core.errors import UserError
from research.inference.serve_config import ServeConfig, bind_serve
from research.recipes.load import load
from research.recipes.loaded import LoadedModel
from research.storage.paths import Path, as_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what decides how texts are computed."""
    parser.add_argument(
        "--speculate",
        metavar="KIND",
        help="who guesses tokens ahead, which changes no text: lookup (what followed in the text "
        "before), first_layers (--draft_layers of the model), draft (the model of --draft), mtp "
        "(the model's multi-token prediction)",
    )
    parser.add_argument(
        "--draft_layers", type=int, metavar="N", help="how many first layers of the model guess"
    )
    parser.add_argument(
        "--draft", metavar="WORKDIR", help="a smaller model with the same tokenizer, which guesses"
    )
    parser.add_argument(
        "--dtype",
        help="of parameters and activations: float32 or bfloat16 (default: those of the config)",
    )
    parser.add_argument(
        "--debug_nans",
        action="store_true",
        help="where logits are no numbers, read the text again and name the first such value: its "
        "layer, array and token",
    )
    # `cli` takes these as overrides; the flag shows that there are such.
    parser.add_argument(
        "--config.mesh",
        dest="mesh",
        metavar=".AXIS=SIZE",
        help="shards the model over devices: --config.mesh.tensor=2",
    )


def serve_config(path: str | None, guessing: Mapping[str, Any], debug_nans: bool) -> ServeConfig:
    """Returns how an engine runs.

    Args:
      path: of a config file; None is what `ServeConfig` says.
      guessing: fields about guesses, instead of what the file says.
      debug_nans: whether the first value that is no number is named, also where the file does not.

    Raises:
      UserError: the file is none, or a field that is not known or out of range.
    """
    values = {} if path is None else configs.load_file(path)
    values.update(guessing)
    if debug_nans:
        values["debug_nans"] = True
    return bind_serve(values)


def guessing(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of `ServeConfig` about guesses that flags give.

    Raises:
      UserError: a value that is none, or a flag of another kind of guesses than `--speculate`'s.
    """
    fields = {}
    for name in ("speculate", "draft_layers"):
        value = getattr(arguments, name)
        if value is not None:
            fields[name] = value
    bind_serve(fields)
    return fields


def load_models(
    arguments: argparse.Namespace, workdir: Path, serve: ServeConfig
) -> tuple[LoadedModel, LoadedModel | None]:
    """Returns the model of a workdir, and that of `--draft`.

    Args:
      arguments: of the command line.
      workdir: of the model that answers.
      serve: says who guesses.

    Raises:
      UserError: as of `load`, or flags of another kind of guesses than the engine's.
    """
    kind = serve.speculate
    for name, of_kind in (("draft_layers", "first_layers"), ("draft", "draft")):
        value = getattr(arguments, name)
        if value is not None and kind != of_kind:
            raise UserError(name, value, f"is for speculate = {of_kind!r}, not {kind!r}.")
    if kind == "draft" and arguments.draft is None:
        raise UserError("draft", constraint="is missing: speculate = 'draft' needs a model.")

    how = (mesh_sizes(arguments), arguments.dtype)
    model = load(workdir, *how, unroll=kind == "first_layers")
    if arguments.draft is None:
        return model, None
    return model, load(as_path(arguments.draft, "draft"), *how)


def mesh_sizes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of `MeshConfig` that `--config.mesh.…` gives."""
    given = configs.override({"mesh": {}}, arguments.overrides)
    return given["mesh"]
