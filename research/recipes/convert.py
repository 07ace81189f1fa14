"""`tessera convert`: bring a model in from another format, or out to it."""

import argparse
import contextlib
import logging
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from research.core.errors import UserError, nearest
from research.core.trees import count
from research.data.tokenizers import Tokenizer, folders
from research.interop.huggingface import from_hugging_face, to_hugging_face
from research.interop.llama2c import from_llama2c
from research.models.config import ModelConfig
from research.recipes import loaded
from research.recipes.workdir import local_path, write_config
from research.training.checkpoints import CheckpointConfig, Checkpoints

logger = logging.getLogger("tessera")

EXAMPLES = """\
  tessera convert --from=Llama-3.2-1B --to=runs/llama
  tessera convert --from=stories260K.bin --tokenizer=tok512.model --to=runs/stories
  tessera convert --from=runs/stdlib --to=stdlib-hf --format=hf"""

FORMATS = ("tessera", "hf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `convert`."""
    parser.add_argument(
        "--from", dest="source", required=True, help="a Hugging Face folder, a llama2.c .bin or a workdir"
    )
    parser.add_argument("--to", dest="target", required=True, help="the folder to make")
    parser.add_argument("--format", help="tessera (a workdir, the default) or hf (a Hugging Face folder)")
    parser.add_argument("--tokenizer", help="its file or folder, where it does not lie beside the model")


def main(arguments: argparse.Namespace) -> None:
    """Converts."""
    convert(arguments.source, arguments.target, arguments.format, arguments.tokenizer)


def convert(source: str, target: str, format: str | None, tokenizer: str | None) -> None:
    """Reads a model in any known form and writes it, whole or not at all.

    Args:
      source: a Hugging Face folder, a llama2.c `.bin`, or a workdir.
      target: a folder that does not exist or is empty.
      format: `tessera` or None for a workdir, `hf` for a Hugging Face folder.
      tokenizer: the tokenizer's file or folder, or None to take the one beside the model.

    Raises:
      UserError: a source that is no model, a target that holds something, an unknown format, a tokenizer that is
        missing or does not fit the model.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"--format = {format!r} is not known. {nearest(format, FORMATS)}")
    origin = local_path("--from", source)
    with _new_folder(local_path("--to", target)) as folder:
        config, params, held = _read(origin)
        found = held if tokenizer is None and held is not None else _tokenizer(origin, tokenizer)
        if found.vocab_size > config.vocab_size:
            raise UserError(
                f"--tokenizer: its vocabulary of {found.vocab_size} does not fit the model's vocab_size = "
                f"{config.vocab_size}."
            )
        write = _write_hugging_face if format == "hf" else _write_workdir
        write(folder, config, params, found)
    logger.info("%s: %s parameters, %d layers", target, f"{count(params):,}", config.num_layers)


@contextlib.contextmanager
def _new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a folder beside `target` that takes its name when all is written, and vanishes when not."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to = {target} exists already and is not an empty folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        # mkdtemp's folders are their owner's alone; a workdir is like any other folder.
        folder.chmod(0o755)
        yield folder
        folder.replace(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _read(source: pathlib.Path) -> tuple[ModelConfig, Any, Tokenizer | None]:
    """Returns config, parameters, and the tokenizer where the source has one of Tessera's."""
    if (source / "checkpoints").is_dir():
        model = loaded.load(source)
        return model.config, model.params, model.tokenizer
    if (source / "config.json").is_file():
        return *from_hugging_face(source), None
    if source.is_file() and source.suffix == ".bin":
        return *from_llama2c(source), None
    raise UserError(f"--from = {source} is neither a Hugging Face folder, a workdir, nor a llama2.c .bin file.")


def _tokenizer(source: pathlib.Path, given: str | None) -> Tokenizer:
    """Returns the tokenizer of the file or folder `given`, or of the files beside the model."""
    if given is not None:
        path = local_path("--tokenizer", given)
        return folders.from_folder(path) if path.is_dir() else folders.from_path(path)
    try:
        path = folders.find(source if source.is_dir() else source.parent)
    except UserError as error:
        raise UserError(f"--tokenizer is missing: {error}") from error
    return folders.from_path(path)


def _write_workdir(folder: pathlib.Path, config: ModelConfig, params: Any, tokenizer: Tokenizer) -> None:
    write_config(folder, {"model": config})
    tokenizer.save(folder / "tokenizer")
    checkpoints = Checkpoints(folder, CheckpointConfig(asynchronous=False))
    try:
        checkpoints.save(0, {"params": params}, {})
    finally:
        checkpoints.close()


def _write_hugging_face(folder: pathlib.Path, config: ModelConfig, params: Any, tokenizer: Tokenizer) -> None:
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    to_hugging_face(config, params, folder, ids)
    for name, data in folders.to_hugging_face_files(tokenizer).items():
        (folder / name).write_bytes(data)
