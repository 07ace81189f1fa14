"""Folders in Hugging Face's form: `config.json` and `*.safetensors`, read and written."""

import dataclasses
import json
import logging
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Shaped

from research.core.errors import UserError, listed, nearest, shown, within
from research.interop import mapping
from research.interop.architecture import Architecture, choose, config_from, fields_of
from research.interop.bart import BART, MBART
from research.interop.bert import BERT, ROBERTA, XLM_ROBERTA
from research.interop.deepseek import DEEPSEEK_V3
from research.interop.dense import MINISTRAL, MISTRAL, OLMO2, PHI3, QWEN2, QWEN3
from research.interop.end_tokens import GENERATION, generation_config, read_end_ids
from research.interop.falcon import FALCON
from research.interop.gemma import GEMMA2, GEMMA3, GEMMA3_TEXT
from research.interop.gpt2 import GPT, GPT2
from research.interop.gpt_neo import GPT_NEO
from research.interop.llama import LLAMA
from research.interop.marian import MARIAN
from research.interop.mixtures import GPT_OSS, MIXTRAL, QWEN2_MOE, QWEN3_MOE
from research.interop.modernbert import MODERNBERT
from research.interop.mpt import MPT
from research.interop.safetensors_files import Stored, Writer, read_header
from research.interop.t5 import MT5, T5
from research.models.config import ModelConfig
from research.storage.background import prefetch
from research.storage.json_files import read_object

logger = logging.getLogger("tessera")

# A model is written as the first one that can express it, where its own model_type is not known.
_ALL = (
    GPT2,
    LLAMA,
    MISTRAL,
    MINISTRAL,
    QWEN2,
    QWEN3,
    OLMO2,
    PHI3,
    GEMMA2,
    GEMMA3_TEXT,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    GPT_OSS,
    DEEPSEEK_V3,
    GEMMA3,
    GPT,
    GPT_NEO,
    FALCON,
    MPT,
    BERT,
    ROBERTA,
    XLM_ROBERTA,
    MODERNBERT,
    T5,
    MT5,
    BART,
    MBART,
    MARIAN,
)
ARCHITECTURES = {architecture.model_type: architecture for architecture in _ALL}
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
NO_TOKENS = dict.fromkeys(("bos", "eos", "pad"))
# The most bytes of a file, as transformers has it.
SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Model:
    """The model of a folder; its weights are still on disk.

    Attributes:
      architecture: what it was.
      config: what it is here.
      weights: of it.
      end_ids: what ends its text, as its config.json and its generation_config.json say.
    """

    architecture: Architecture
    config: ModelConfig
    weights: mapping.CheckpointWeights
    end_ids: tuple[int, ...]


def open_hugging_face(folder: str | pathlib.Path) -> Model:
    """Returns the model of a folder; all that can be wrong with it is found, but no weights are
    read.

    Raises:
      UserError: an architecture or a feature that is not supported, a file that is missing or
        broken, or tensors that are not those of the config; what is wrong is named. Pickled weights
        are never opened.
    """
    folder = pathlib.Path(folder)
    fields = read_object(folder / CONFIG)
    if "model_type" not in fields:
        raise UserError(f"{folder / CONFIG}: model_type is missing.")
    model_type = fields["model_type"]
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        known = f"Known: {', '.join(sorted(ARCHITECTURES))}."
        hint = nearest(str(model_type), ARCHITECTURES).replace(known, "")
        raise UserError(
            f"{folder / CONFIG}: model_type = {shown(model_type)} is not supported. {hint} {known}"
        )

    # The headers of the files are read here, their data only with `Model.weights`.
    architecture = ARCHITECTURES[model_type]
    tensors = _tensors(folder)
    with within("", origin=str(folder / CONFIG)):
        config = config_from(architecture, fields_of(architecture, fields, tensors))
    _check_layer_count(folder, config, len(tensors))
    end_ids = read_end_ids(folder, fields)
    with within("", origin=str(folder)):
        weights = mapping.match_tensors(architecture, config, tensors)
    return Model(architecture, config, weights, end_ids)


def _check_layer_count(folder: pathlib.Path, config: ModelConfig, num_tensors: int) -> None:
    """Raises for more layers than tensors, before the tensors of each layer are named."""
    layers = config.num_layers + config.encoder_layers + config.head.mtp_depth
    if layers > num_tensors:
        raise UserError(
            f"{folder}: {num_tensors} tensors are none of {layers:,} layers, as its {CONFIG} has "
            "them."
        )


def from_hugging_face(folder: str | pathlib.Path) -> tuple[ModelConfig, Any]:
    """Returns the model of a folder and its float32 parameters in memory; raises as
    `open_hugging_face`.
    """
    model = open_hugging_face(folder)
    return model.config, mapping.params_from_slices(model.config, model.weights.slices())


def to_hugging_face(
    config: ModelConfig,
    params: Any,
    folder: str | pathlib.Path,
    token_ids: Mapping[str, int | Sequence[int] | None] | None = None,
    model_type: str | None = None,
) -> None:
    """Writes a folder that `from_pretrained` of `transformers` loads.

    Args:
      config: the model.
      params: its parameters, layers scanned or unrolled.
      folder: made where it is missing.
      token_ids: `bos`, `eos` (one, or all that end a text) and `pad` of its tokenizer. None writes
        null for each: without a field `transformers` would take the ids of the family's own
        tokenizer, which may be outside of the vocabulary.
      model_type: the architecture to try before all others.

    Raises:
      UserError: no architecture can express this model; for the nearest ones, the field that
        differs is named.
    """
    architecture, fields = choose(ARCHITECTURES.values(), config, first=model_type)
    get_slice = mapping.slice_getter(config, params)
    write_hugging_face(architecture, fields, config, get_slice, folder, token_ids or NO_TOKENS)


def write_hugging_face(
    architecture: Architecture,
    fields: Mapping[str, Any],
    config: ModelConfig,
    get_slice: mapping.GetSlice,
    folder: str | pathlib.Path,
    token_ids: Mapping[str, int | Sequence[int] | None],
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder, slice by slice.

    Args:
      architecture: what the model is to be.
      fields: its config.json, as `choose` gives it.
      config: the model.
      get_slice: returns parts of its parameters.
      folder: made where it is missing.
      token_ids: see `to_hugging_face`.
      dtype: `float32`, or `bfloat16`, which rounds.
      shard_bytes: the most bytes of a file, unless one tensor has more.

    Weights of an earlier model in the folder are removed, whatever number of files they have.

    Raises:
      UserError: a file that cannot be written.
    """
    folder = pathlib.Path(folder)
    ids = {f"{role}_token_id": token for role, token in token_ids.items()}
    # The architecture's own field of a token wins: some count positions from it.
    fields = {**ids, **fields, "dtype": dtype}
    mappings = mapping.map_tensors(architecture, config)
    stored_dtype = np.dtype(dtype)
    files = _shards(mapping.shapes_of(mappings), stored_dtype.itemsize, shard_bytes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / CONFIG, fields)
        (folder / GENERATION).write_bytes(generation_config(fields))
        rows = mapping.tensor_rows(mappings, get_slice, stored_dtype)
        _write_files(folder, files, stored_dtype, rows)
        if len(files) > 1:
            _write_json(folder / INDEX, _index(files, stored_dtype.itemsize))
        _remove_older(folder, files)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}.") from error


def _remove_older(folder: pathlib.Path, files: Mapping[str, Any]) -> None:
    """Removes the weights of a model that was saved here before: a reader could take them for those
    of this one.
    """
    written = set(files)
    if len(files) > 1:
        written.add(INDEX)
    for path in list(folder.iterdir()):
        is_weights = path.name in (WEIGHTS, INDEX) or _SHARD.fullmatch(path.name)
        if is_weights and path.name not in written:
            path.unlink()


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2)
    path.write_text(f"{text}\n")


def _index(files: Mapping[str, Mapping[str, tuple[int, ...]]], itemsize: int) -> dict[str, Any]:
    """Returns the index of the files: tensor -> file, and the bytes of all tensors."""
    file_of = {}
    numbers = 0
    for file, shapes in files.items():
        for name, shape in shapes.items():
            file_of[name] = file
            numbers += math.prod(shape)
    return {"metadata": {"total_size": itemsize * numbers}, "weight_map": file_of}


def _shards(
    shapes: Mapping[str, tuple[int, ...]], itemsize: int, limit: int
) -> dict[str, dict[str, Any]]:
    """Returns files -> the shapes of their tensors, in order."""
    shards = [{}]
    room = limit
    for name, shape in shapes.items():
        size = itemsize * math.prod(shape)
        # A tensor larger than the limit has a file of its own.
        if size > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = shape
        room -= size

    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    files = {}
    for number, shard in enumerate(shards, 1):
        # A name that `_SHARD` matches.
        files[f"model-{number:05}-of-{len(shards):05}.safetensors"] = shard
    return files


def _write_files(
    folder: pathlib.Path,
    files: Mapping[str, Mapping[str, tuple[int, ...]]],
    dtype: np.dtype,
    parts: Iterable[tuple[str, Shaped[np.ndarray, "..."]]],
) -> None:
    parts = prefetch(parts)
    for file, shapes in files.items():
        left = dtype.itemsize * sum(map(math.prod, shapes.values()))
        with Writer(folder / file, shapes, dtype) as writer:
            while left:
                name, rows = next(parts)
                writer.write(name, rows)
                left -= rows.nbytes


def _tensors(folder: pathlib.Path) -> dict[str, Stored]:
    """Returns the tensors of a folder by name, file after file."""
    files, file_of = _weight_files(folder)
    tensors: dict[str, Stored] = {}
    for path in files:
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise UserError(f"{path}: {name} is in {tensors[name].path.name}, too.")
            tensors[name] = tensor

    missing = []
    for name, file in file_of.items():
        if name not in tensors or tensors[name].path.name != file:
            missing.append(name)
    if missing:
        names = listed(map(shown, sorted(missing)))
        raise UserError(f"{folder / INDEX}: not in the files that it names: {names}.")
    return tensors


def _weight_files(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
    """Returns the files with the weights, all in the folder itself, and tensor -> file of an index.

    A single file wins over an index, as in transformers: a small model that was saved over a large
    one leaves the index and perhaps the shards of the large one behind.
    """
    if (folder / WEIGHTS).is_file():
        if (folder / INDEX).exists():
            logger.warning(
                "%s is left out: %s is there, and has all weights.", folder / INDEX, WEIGHTS
            )
        return [folder / WEIGHTS], {}
    if not (folder / INDEX).is_file():
        _raise_without_weights(folder)

    index = read_object(folder / INDEX)
    if not isinstance(index.get("weight_map"), dict):
        raise UserError(f"{folder / INDEX}: weight_map is missing.")
    file_of = {name: str(file) for name, file in index["weight_map"].items()}
    files = sorted(set(file_of.values()))

    # Compared with the names in the folder, never opened by name: an index may have any text, and
    # not every text is a file name.
    present = {path.name for path in folder.iterdir() if path.is_file()}
    missing = [file for file in files if file not in present]
    if missing:
        names = listed(map(shown, missing))
        raise UserError(f"{folder / INDEX}: {names} is not a file of this folder.")
    for file in files:
        if not file.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX}: {file!r} is not a safetensors file.")
    return [folder / file for file in files], file_of


def _raise_without_weights(folder: pathlib.Path) -> NoReturn:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    hint = ""
    if pickled:
        hint = f" {pickled[0]} is pickled, and running a pickle runs its author's code."
    raise UserError(f"{folder} has no {WEIGHTS} and no {INDEX}.{hint}")
