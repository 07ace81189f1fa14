"""What an architecture of Hugging Face is: data that says where each tensor goes and what each config field means.

An architecture is a value, as a family is a value of `ModelConfig`: the engine below knows none by name.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Shaped

from research.core.config import bind, first_difference, plain
from research.core.errors import UserError
from research.core.trees import named_leaves
from research.models.config import ModelConfig
from research.models.layer_stack import stack_layers, unstack_layers
from research.models.stack import scans_layers
from research.models.transformer import init_params

logger = logging.getLogger("tessera")

# Fields of every config.json that change nothing a model computes from tokens to logits.
INERT = (
    *("_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label", "label2id", "model_type"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "problem_type", "return_dict", "task_specific_params"),
    *("tokenizer_class", "torch_dtype", "transformers_version", "unk_token_id", "use_cache"),
)
# What a checkpoint's config does not settle: where and how it runs, and dropout, which only training sees.
NOT_CONVERTED = ("dropout", "dtype", "layer_loop", "remat")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint and the parameters that it holds.

    Attributes:
      theirs: its name; `{layer}` stands for the number of a layer.
      ours: the parameters whose output axes lie in it one after the other; `{layer}` as above.
      num_inputs: how many leading axes of a parameter are inputs; the others are outputs, and both are made one axis.
        0 for vectors.
      transposed: whether outputs come first, as in torch's `Linear`.
    """

    theirs: str
    ours: tuple[str, ...]
    num_inputs: int = 0
    transposed: bool = False

    def pack(self, parameters: list[Float[np.ndarray, "..."]]) -> Float[np.ndarray, "..."]:
        """Returns the tensor of these parameters."""
        flat = [value.reshape(*self._flat_shape(value.shape)) for value in parameters]
        packed = np.concatenate(flat, axis=-1)
        return np.ascontiguousarray(packed.T if self.transposed else packed)

    def unpack(self, tensor: Float[np.ndarray, "..."], shapes: list[tuple[int, ...]]) -> list[Float[np.ndarray, "..."]]:
        """Returns the parameters of these shapes; the inverse of `pack`."""
        tensor = tensor.T if self.transposed else tensor
        ends = np.cumsum([self._flat_shape(shape)[-1] for shape in shapes])
        parts = np.split(tensor, ends[:-1], axis=-1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """Returns the tensor's own shape."""
        flat = [self._flat_shape(shape) for shape in shapes]
        shape = (*flat[0][:-1], sum(each[-1] for each in flat))
        return shape[::-1] if self.transposed else shape

    def _flat_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        inputs = (math.prod(shape[: self.num_inputs]),) if self.num_inputs else ()
        return (*inputs, math.prod(shape[self.num_inputs :]))


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture of Hugging Face.

    Attributes:
      model_type: its name in config.json.
      model_class: the class of `transformers` that has a language model's head.
      prefix: of tensor names; folders written without a head leave it out.
      tensors: where each tensor goes; one whose parameters a model does not have is not there.
      tied: the tensor that repeats the embedding where embeddings are tied, and the embedding.
      buffers: regular expressions of tensors that hold no parameters.
      required: fields of config.json without a default, all of them counts.
      defaults: fields that may be missing, with the defaults of `transformers`.
      only: fields that have one supported value each.
      inert: fields that change no logit, beside `INERT`.
      dropouts: rates of dropout where Tessera has none.
      read: returns the values of a `ModelConfig` from the fields.
      write: returns the fields of a `ModelConfig`.
    """

    model_type: str
    model_class: str
    prefix: str
    tensors: tuple[Tensor, ...]
    tied: tuple[str, str]
    buffers: tuple[str, ...]
    required: tuple[str, ...]
    defaults: Mapping[str, Any]
    only: Mapping[str, Any]
    inert: tuple[str, ...]
    dropouts: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


def config_from(architecture: Architecture, fields: Mapping[str, Any]) -> ModelConfig:
    """Returns the model of a config.json.

    Raises:
      UserError: a field is missing, or asks for what Tessera does not have, or is not known and not off.
    """
    a = architecture
    known = {*a.required, *a.defaults, *a.inert, *a.dropouts, *INERT}
    for name in a.required:
        if name not in fields:
            raise UserError(f"{name} is missing.")
        if not isinstance(fields[name], int) or fields[name] < 1:
            raise UserError(f"{name} = {fields[name]!r} must be a whole number of at least 1.")
    for name, value in fields.items():
        if name in a.only:
            if value != a.only[name]:
                raise UserError(f"{name} = {value!r} is not supported: only {a.only[name]!r} is.")
        elif name not in known and value not in (None, False):
            raise UserError(f"{name} = {value!r} is a field of {a.model_type!r} that is not supported.")
        if name in a.dropouts and value:
            logger.warning("%s = %s is left out: Tessera drops nothing there. Only training would differ.", name, value)
    return bind(ModelConfig, a.read({**a.defaults, **fields}))


def fields_from(architecture: Architecture, config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model.

    Raises:
      UserError: the architecture cannot say what the model is; the message starts with the field.
    """
    fields = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "dtype": "float32",
        **architecture.write(config),
    }
    difference = first_difference(_settled(config), _settled(config_from(architecture, fields)))
    if difference is not None:
        raise UserError(f"{difference} is not what {architecture.model_type!r} has.")
    return fields


def _settled(config: ModelConfig) -> dict[str, Any]:
    values = {name: value for name, value in plain(config).items() if name not in NOT_CONVERTED}
    values["attention"].pop("implementation")
    return values


def params_from(
    architecture: Architecture, config: ModelConfig, tensors: Mapping[str, Shaped[np.ndarray, "..."]]
) -> Any:
    """Returns float32 parameters in the form that `config` has in memory.

    Args:
      architecture: whose tensors they are.
      config: the model.
      tensors: by name, with or without the prefix; taken one by one.

    Raises:
      UserError: tensors that are missing, not known or of another shape, all of them named.
    """
    full_names = {_full_name(architecture, name): name for name in tensors}
    shapes = {name: leaf.shape for name, leaf in _unrolled_shapes(config).items()}
    named, faults = {}, []
    for tensor in _tensors_of(architecture, config, shapes):
        if tensor.theirs not in full_names:
            faults.append(f"{tensor.theirs} is missing")
            continue
        value = tensors[full_names.pop(tensor.theirs)]
        wanted = [shapes[name] for name in tensor.ours]
        if value.shape != tensor.shape(wanted):
            faults.append(f"{tensor.theirs} has the shape {list(value.shape)}, not {list(tensor.shape(wanted))}")
            continue
        if not jnp.issubdtype(value.dtype, jnp.floating):
            faults.append(f"{tensor.theirs} has the type {value.dtype}, not a floating one")
            continue
        parts = tensor.unpack(value.astype(np.float32), wanted)
        named |= {name: jnp.asarray(part) for name, part in zip(tensor.ours, parts, strict=True)}
    faults += _leftovers(architecture, config, full_names, tensors)
    if faults:
        raise UserError(f"not a {architecture.model_type} checkpoint of this config: {'; '.join(faults)}.")
    if scans_layers(config):
        named = stack_layers(named)
    abstract = _abstract_params(config)
    return jax.tree.unflatten(jax.tree.structure(abstract), [named[name] for name in named_leaves(abstract)])


def tensors_from(architecture: Architecture, config: ModelConfig, params: Any) -> dict[str, Float32[np.ndarray, "..."]]:
    """Returns the tensors of a model; the inverse of `params_from`.

    Raises:
      UserError: parameters that the architecture has no place for, all of them named.
    """
    named = unstack_layers(stack_layers(named_leaves(params)), _unrolled_shapes(config))
    tensors, placed = {}, set()
    for tensor in _tensors_of(architecture, config, named):
        tensors[tensor.theirs] = tensor.pack([np.asarray(named[name], np.float32) for name in tensor.ours])
        placed |= set(tensor.ours)
    homeless = sorted(set(named) - placed)
    if homeless:
        raise UserError(f"a {architecture.model_type} checkpoint has no place for {', '.join(homeless)}.")
    return tensors


def _leftovers(
    architecture: Architecture,
    config: ModelConfig,
    full_names: Mapping[str, str],
    tensors: Mapping[str, Shaped[np.ndarray, "..."]],
) -> list[str]:
    """Returns what is wrong with the tensors that no parameter took."""
    faults = []
    copy, embedding = architecture.tied
    for full, name in full_names.items():
        if any(re.fullmatch(buffer, full) for buffer in architecture.buffers):
            continue
        if config.tied_embeddings and full == copy:
            original = next((each for each in tensors if _full_name(architecture, each) == embedding), None)
            if original is None or not np.array_equal(tensors[name], tensors[original]):
                faults.append(f"{name} differs from {embedding}, though tie_word_embeddings = True")
        else:
            faults.append(f"{name} is not known")
    return faults


def _full_name(architecture: Architecture, name: str) -> str:
    bare = name.startswith(architecture.prefix) or name == architecture.tied[0]
    return name if bare else architecture.prefix + name


def _tensors_of(architecture: Architecture, config: ModelConfig, named: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yields the tensors of a model, a layer's number in each name."""
    for tensor in architecture.tensors:
        for layer in range(config.num_layers if "{layer}" in tensor.theirs else 1):
            ours = tuple(name.format(layer=layer) for name in tensor.ours)
            if all(name in named for name in ours):
                yield dataclasses.replace(tensor, theirs=tensor.theirs.format(layer=layer), ours=ours)


def _abstract_params(config: ModelConfig) -> Any:
    return jax.eval_shape(lambda: nn.unbox(init_params(config, jax.random.key(0))))


def _unrolled_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    return named_leaves(_abstract_params(dataclasses.replace(config, layer_loop="unroll")))
