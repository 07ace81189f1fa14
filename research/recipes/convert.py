"""`tessera convert`: bring a model in from another format, or out to it."""

import argparse
import logging
import pathlib

from research.core.errors import UserError, nearest
from research.core.trees import count
from research.data.tokenizers import Tokenizer, folders
from research.interop.architecture import choose
from research.interop.huggingface import ARCHITECTURES, write_hugging_face
from research.models.config import DTYPES
from research.recipes.convert_tokenizer import fitting_tokenizer
from research.recipes.model_source import ModelSource, model_openers
from research.recipes.new_folder import new_folder
from research.recipes.workdir import write_config
from research.storage.paths import as_path
from research.training.checkpoint_files import Damaged
from research.training.checkpoint_stream import write_params

logger = logging.getLogger("tessera")

EXAMPLES = """\
  tessera convert --from=Llama-3.2-1B --to=runs/llama
  tessera convert --from=stories260K.bin --tokenizer=tok512.model --to=runs/stories
  tessera convert --from=runs/stdlib --to=stdlib-hf --format=hf"""

FORMATS = ("tessera", "hf")


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
    parser.add_argument("--tokenizer", help="its file or folder, where it is not beside the model")


def main(arguments: argparse.Namespace) -> None:
    """Converts."""
    convert(
        arguments.source, arguments.target, arguments.format, arguments.tokenizer, arguments.dtype
    )


def convert(
    source: str, target: str, format: str | None, tokenizer: str | None, dtype: str | None = None
) -> None:
    """Reads a model in any known form and writes it, whole or not at all, a part at a time.

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
    _check_options(format, dtype)
    origin = as_path(source, "source")
    destination = as_path(target, "target")
    write = _write_hugging_face if format == "hf" else _write_workdir

    # Of a workdir, the newest checkpoint that is whole.
    faults: list[str] = []
    for open_model in model_openers(origin):
        try:
            with new_folder(destination, last="config.json") as folder:
                model = open_model()
                model_tokenizer = fitting_tokenizer(model, origin, tokenizer)
                write(folder, model, model_tokenizer, dtype or "float32")
                model.check()
        except Damaged as damage:
            faults.append(str(damage))
            logger.warning("Damaged checkpoint in %s: %s. Trying the one before.", origin, damage)
            continue
        parameters = f"{count(model.shapes):,}"
        logger.info("%s: %s parameters, %d layers", target, parameters, model.config.num_layers)
        return
    raise UserError("source", origin, f": no checkpoint is intact: {'; '.join(faults)}.")


def _check_options(format: str | None, dtype: str | None) -> None:
    if format is not None and format not in FORMATS:
        raise UserError("format", format, f"is not known. {nearest(format, FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError("dtype", dtype, f"is not known. {nearest(dtype, DTYPES)}")
    if dtype is not None and format != "hf":
        raise UserError("dtype", dtype, "needs format = 'hf': parameters in a workdir are float32.")


def _write_workdir(
    folder: pathlib.Path, model: ModelSource, tokenizer: Tokenizer, dtype: str
) -> None:
    values = {"model": model.config}
    if model.model_type is not None:
        # Converting back tries this architecture first.
        values["source"] = {"model_type": model.model_type}
    write_config(folder, values)
    tokenizer.save(folder / "tokenizer")
    write_params(folder, 0, model.shapes, model.slices())


def _write_hugging_face(
    folder: pathlib.Path, model: ModelSource, tokenizer: Tokenizer, dtype: str
) -> None:
    # `eos_token_id` is one id, or a list of several.
    ends = tokenizer.end_ids if len(tokenizer.end_ids) > 1 else tokenizer.eos_id
    ids = {"bos": tokenizer.bos_id, "eos": ends, "pad": tokenizer.pad_id}
    architecture, fields = choose(ARCHITECTURES.values(), model.config, first=model.model_type)
    write_hugging_face(architecture, fields, model.config, model.get_slice, folder, ids, dtype)

    has_types = model.config.embedding.num_types > 1
    for name, data in folders.to_hugging_face_files(tokenizer, has_types).items():
        (folder / name).write_bytes(data)
