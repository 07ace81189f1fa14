"""`tessera convert`: bring a model in from another format, or out to it."""

import argparse
import logging
import pathlib

from research.core.errors import UserError, listed, nearest
from research.core.trees import count
from research.data.tokenizers import Tokenizer, folders
from research.interop.architecture import choose
from research.interop.huggingface import ARCHITECTURES, write_hugging_face
from research.recipes.model_source import ModelSource, candidates
from research.recipes.new_folder import new_folder
from research.recipes.workdir import write_config
from research.storage.paths import Path, as_path, local_path
from research.training.checkpoint_files import Damaged
from research.training.checkpoint_stream import write_params

logger = logging.getLogger("tessera")

EXAMPLES = """\
  tessera convert --from=Llama-3.2-1B --to=runs/llama
  tessera convert --from=stories260K.bin --tokenizer=tok512.model --to=runs/stories
  tessera convert --from=runs/stdlib --to=stdlib-hf --format=hf"""

FORMATS, DTYPES = ("tessera", "hf"), ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `convert`."""
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        help="a Hugging Face folder, a llama2.c .bin or a workdir",
    )
    parser.add_argument("--to", dest="target", required=True, help="the folder to make")
    parser.add_argument(
        "--format", help="tessera (a workdir, the default) or hf (a Hugging Face folder)"
    )
    parser.add_argument(
        "--dtype", help="of --format=hf: float32 (the default) or bfloat16, which rounds"
    )
    parser.add_argument(
        "--tokenizer", help="its file or folder, where it does not lie beside the model"
    )


def main(arguments: argparse.Namespace) -> None:
    """Converts."""
    convert(
        arguments.source, arguments.target, arguments.format, arguments.tokenizer, arguments.dtype
    )


def convert(
    source: str, target: str, format: str | None, tokenizer: str | None, dtype: str | None = None
) -> None:
    """Reads a model in any known form and writes it, whole or not at all, a piece at a time.

    Args:
      source: a Hugging Face folder, a llama2.c `.bin`, or a workdir.
      target: a folder that does not exist or is empty.
      format: `tessera` or None for a workdir, `hf` for a Hugging Face folder.
      tokenizer: the tokenizer's file or folder, or None to take the one beside the model.
      dtype: of the tensors of a Hugging Face folder, None for float32; a workdir's are float32.

    Raises:
      UserError: a source that is no model, a target that holds something, an unknown format, a
        tokenizer that is missing or does not fit the model.
    """
    if format is not None and format not in FORMATS:
        raise UserError("format", format, f"is not known. {nearest(format, FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError("dtype", dtype, f"is not known. {nearest(dtype, DTYPES)}")
    if dtype is not None and format != "hf":
        raise UserError("dtype", dtype, "needs format = 'hf': parameters in a workdir are float32.")
    origin, place = as_path(source, "source"), as_path(target, "target")
    write = _write_hugging_face if format == "hf" else _write_workdir
    faults: list[str] = []
    for open_model in candidates(origin):
        try:
            with new_folder(place, last="config.json") as folder:
                model = open_model()
                write(
                    folder, model, _fitting_tokenizer(model, origin, tokenizer), dtype or "float32"
                )
                model.check()
        except Damaged as damage:
            faults.append(str(damage))
            logger.warning("Damaged checkpoint in %s: %s. Trying the one before.", origin, damage)
            continue
        logger.info(
            "%s: %s parameters, %d layers",
            target,
            f"{count(model.shapes):,}",
            model.config.num_layers,
        )
        return
    raise UserError("source", origin, f": no checkpoint is intact: {'; '.join(faults)}.")


def _fitting_tokenizer(model: ModelSource, origin: Path, given: str | None) -> Tokenizer:
    found = (
        model.tokenizer
        if given is None and model.tokenizer is not None
        else _tokenizer(origin, given)
    )
    rows, control = model.config.vocab_size, found.control_tokens
    beyond = sorted(name for name, i in control.items() if i >= rows)
    if found.vocab_size - rows > len(beyond):  # text would become ids that the model has not
        raise UserError(
            "tokenizer",
            constraint=f": its vocabulary of {found.vocab_size} does not fit the model's "
            f"vocab_size = {rows}.",
        )
    if beyond:
        logger.warning(
            "The tokenizer has ids that the model's embedding of %d rows has not: %s",
            rows,
            listed(beyond),
        )
    found.further_end_ids = tuple(i for i in model.end_ids if i != found.eos_id)
    return found


def _tokenizer(source: Path, given: str | None) -> Tokenizer:
    """Returns the tokenizer of the file or folder `given`, or of the files beside the model."""
    if given is not None:
        path = local_path("tokenizer", given)
        return folders.from_folder(path) if path.is_dir() else folders.from_path(path)
    folder = source if source.is_dir() else source.parent
    path = folders.find_or_none(folder)
    if path is None:
        raise UserError(
            "tokenizer",
            constraint=f"is missing: {folder} has none of {', '.join(folders.ALL_FILES)}.",
        )
    return folders.from_path(path)


def _write_workdir(
    folder: pathlib.Path, model: ModelSource, tokenizer: Tokenizer, dtype: str
) -> None:
    values = {"model": model.config}
    if model.model_type is not None:
        values["source"] = {"model_type": model.model_type}  # the way back tries it first
    write_config(folder, values)
    tokenizer.save(folder / "tokenizer")
    write_params(folder, 0, model.shapes, model.pieces())


def _write_hugging_face(
    folder: pathlib.Path, model: ModelSource, tokenizer: Tokenizer, dtype: str
) -> None:
    ends = tokenizer.end_ids if len(tokenizer.end_ids) > 1 else tokenizer.eos_id
    ids = {"bos": tokenizer.bos_id, "eos": ends, "pad": tokenizer.pad_id}
    architecture, fields = choose(ARCHITECTURES.values(), model.config, first=model.model_type)
    write_hugging_face(architecture, fields, model.config, model.read, folder, ids, dtype)
    for name, data in folders.to_hugging_face_files(
        tokenizer, model.config.embedding.num_types > 1
    ).items():
        (folder / name).write_bytes(data)
