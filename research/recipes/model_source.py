"""The model that `convert` reads: a Hugging Face folder, a llama2.c file, or a workdir."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable

import jax

from research.core import config as configs
from research.core.errors import UserError
from research.data import tokenizers
from research.data.tokenizers import Tokenizer
from research.interop import mapping
from research.interop.huggingface import open_hugging_face
from research.interop.llama2c import from_llama2c
from research.interop.mapping import GetSlice, ParameterSlice
from research.models.config import ModelConfig
from research.recipes.workdir import read_config
from research.storage.paths import Path, in_bucket
from research.training.checkpoint_stream import ParamsReader
from research.training.checkpoints import CheckpointConfig, Checkpoints


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model whose parameters are read on demand: each once by `slices`, or at least once by
    `get_slice`.

    Attributes:
      config: what it is.
      shapes: of its parameters, unrolled.
      slices: yields all of them.
      get_slice: returns a part of one.
      check: raises `Damaged` when what was read is not what was saved.
      model_type: its `model_type` at Hugging Face, where it came from there.
      tokenizer: its own, where that is stored with it in Tessera's form.
      end_ids: end-of-text ids, as far as the files beside its weights give them.
    """

    config: ModelConfig
    shapes: dict[str, jax.ShapeDtypeStruct]
    slices: Callable[[], Iterable[ParameterSlice]]
    get_slice: GetSlice
    check: Callable[[], None] = lambda: None
    model_type: str | None = None
    tokenizer: Tokenizer | None = None
    end_ids: tuple[int, ...] = ()


def model_openers(path: Path) -> list[Callable[[], ModelSource]]:
    """Returns functions that open the model of a path: one for each checkpoint of a workdir, the
    newest first, else only one.

    Raises:
      UserError: there is no model. A function raises UserError for a model that is not supported
        or broken, and `Damaged` for a checkpoint that is not what was saved.
    """
    # A workdir: a damaged checkpoint has the one before it as a replacement.
    if (path / "checkpoints").is_dir():
        checkpoints = Checkpoints(path, CheckpointConfig())
        steps = checkpoints.steps()
        checkpoints.close()
        if not steps:
            raise UserError(f"{path / 'checkpoints'} has no checkpoint.")
        return [functools.partial(_workdir, path, step) for step in reversed(steps)]
    if in_bucket(path):
        raise UserError(
            "source",
            path,
            "is no workdir with checkpoints: copy what else a bucket holds to a folder.",
        )
    # Hugging Face's folders and workdirs both have a config.json.
    if (path / "config.json").is_file():
        return [functools.partial(_hugging_face, path)]
    if path.is_file() and path.suffix == ".bin":
        return [functools.partial(_llama2c, path)]
    raise UserError(
        "source", path, "is neither a Hugging Face folder, a workdir, nor a llama2.c .bin file."
    )


def _hugging_face(path: pathlib.Path) -> ModelSource:
    model = open_hugging_face(path)
    return ModelSource(
        config=model.config,
        shapes=mapping.unrolled_shapes(model.config),
        slices=model.weights.slices,
        get_slice=model.weights.get_slice,
        model_type=model.architecture.model_type,
        end_ids=model.end_ids,
    )


def _llama2c(path: pathlib.Path) -> ModelSource:
    config, params = from_llama2c(path)
    shapes = mapping.unrolled_shapes(config)
    get_slice = mapping.slice_getter(config, params)
    slices = functools.partial(_slices, shapes, get_slice)
    return ModelSource(config, shapes, slices, get_slice, model_type="llama")


def _workdir(path: Path, step: int) -> ModelSource:
    values = read_config(path)
    config = configs.bind(ModelConfig, values["model"], "model")
    tokenizer = tokenizers.load(path / "tokenizer")
    shapes = mapping.unrolled_shapes(config)
    # Averaged parameters where the run kept them.
    reader = ParamsReader(path, step, shapes, fields=("ema", "params"))
    model_type = values["source"]["model_type"] if "source" in values else None
    return ModelSource(
        config=config,
        shapes=shapes,
        slices=functools.partial(_slices, shapes, reader.read),
        get_slice=reader.read,
        check=reader.check,
        model_type=model_type,
        tokenizer=tokenizer,
        end_ids=tokenizer.further_end_ids,
    )


def _slices(shapes: Iterable[str], get_slice: GetSlice) -> Iterable[ParameterSlice]:
    # Each parameter whole: the slices () are all of it.
    return (ParameterSlice(name, (), get_slice(name, ())) for name in shapes)
