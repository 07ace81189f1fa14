"""The conversion engine: which tensor of a checkpoint holds which parameters of a model, both ways,
a slice at a time.

It knows no architecture and no file: tensors come from any mapping of names to arrays, and
parameters, named as in an unrolled model, go wherever the caller puts them. A model of any size
passes through a few hundred megabytes.
"""

import dataclasses
import functools
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Shaped

from research.core.errors import UserError, listed
from research.core.trees import named_leaves
from research.interop.architecture import Architecture
from research.interop.tensor import Shape, TensorMapping, TensorSpec
from research.interop.tensor_names import TensorNames, leftover_faults
from research.models.canonical_params import stack_layers, unstack_layers
from research.models.config import ModelConfig
from research.models.language_model import abstract_params
from research.parallel.target import platform
from research.storage.background import prefetch

logger = logging.getLogger("tessera")

# The most bytes of a slice, as float32: small enough that its memory is used again and not given
# back in between.
SLICE_BYTES = 2**25
# Names that only quantized weights have: the scales beside them, or the packed numbers themselves.
_QUANTIZED = re.compile(
    r".*(_scale_inv|_scales|_blocks|\.qweight|\.qzeros|\.scales|\.absmax|\.weight_scale)"
)
_MTP = "{mtp}"
_LAYER = re.compile(r"(?P<first>first_)?layers_(?P<index>\d+)")

Slices = tuple[slice, ...]
GetSlice = Callable[[str, Slices], Float[np.ndarray, "..."]]


class ParameterSlice(NamedTuple):
    """A part of a parameter.

    Attributes:
      name: of the parameter in an unrolled model.
      slices: the part; () is all of it.
      values: its numbers.
    """

    name: str
    slices: Slices
    values: Float32[np.ndarray, "..."]


def unrolled_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape of each parameter of the unrolled model, by name."""
    unrolled = dataclasses.replace(config, layer_loop="unroll")
    params = abstract_params(unrolled, platform())
    return named_leaves(params)


def layer_names(names: Iterable[str], before: str) -> list[str]:
    """Returns the subtrees of a stack of layers, in the order in which they are run.

    Args:
      names: of all parameters.
      before: what is before the layer in the names of its parameters, `encoder/` for instance.
    """
    # "encoder/layers_3/mlp/up/kernel" -> "layers_3"
    subtrees = set()
    for name in names:
        if name.startswith(before):
            subtree, _, _ = name.removeprefix(before).partition("/")
            subtrees.add(subtree)

    matches = map(_LAYER.fullmatch, subtrees)
    layers = [match for match in matches if match]
    # first_layers_0, first_layers_1, layers_0, layers_1, …
    layers.sort(key=lambda match: (match["first"] is None, int(match["index"])))
    return [match[0] for match in layers]


def map_tensors(architecture: Architecture, config: ModelConfig) -> list[TensorMapping]:
    """Returns the tensors of a model, layer after layer, with the parameters in each.

    Raises:
      UserError: parameters that are in no tensor of the architecture, all of them named.
    """
    shapes = {name: shape.shape for name, shape in unrolled_shapes(config).items()}
    mappings = []
    # The specs of a stack follow each other: all tensors of layer 0, then all of layer 1, …
    for stack, group in itertools.groupby(architecture.tensors, key=_stack_of):
        specs = list(group)
        for number, subtree in _layers_of(stack, shapes, config):
            for spec in specs:
                mapping = _map_tensor(spec, number, subtree, shapes, config)
                if mapping is not None:
                    mappings.append(mapping)

    mapped = {name for mapping in mappings for name in mapping.ours}
    unmapped = sorted(set(shapes) - mapped)
    if unmapped:
        raise UserError(
            f"a {architecture.model_type} checkpoint has no tensor for {listed(unmapped)}."
        )
    return mappings


def _stack_of(spec: TensorSpec) -> str | None:
    """Returns the text before the layer in the names of its parameters; `{mtp}` for the stack of
    multi-token prediction, None for a tensor of no layer.
    """
    if _MTP in spec.theirs:
        return _MTP
    before, layer, _ = spec.ours[0].partition("{layer}")
    return before if layer else None


def _layers_of(
    stack: str | None, names: Iterable[str], config: ModelConfig
) -> Iterable[tuple[int, str]]:
    """Returns the number and the subtree of each layer of a stack; of no stack one empty layer."""
    if stack is None:
        return [(0, "")]
    if stack == _MTP:
        # Their numbers follow those of the other layers.
        return [(config.num_layers + k, f"future_{k}") for k in range(config.head.mtp_depth)]
    return enumerate(layer_names(names, stack))


def _map_tensor(
    spec: TensorSpec, number: int, subtree: str, shapes: Mapping[str, Shape], config: ModelConfig
) -> TensorMapping | None:
    """Returns the tensor of a layer, or None where the model does not have it."""
    # "{layer}/mlp/up/kernel", "layers_3" -> "layers_3/mlp/up/kernel"
    ours = tuple(_with_layer(name, subtree) for name in spec.ours)
    if not all(name in shapes for name in ours):
        return None
    if spec.when is not None and not spec.when(config):
        return None

    our_shapes = tuple(shapes[name] for name in ours)
    theirs = _with_layer(spec.theirs, str(number))
    names = [theirs]
    if "{expert}" in theirs:
        num_experts = our_shapes[0][0]
        # "experts.{expert}.up" -> "experts.0.up", "experts.1.up", …
        names = [theirs.replace("{expert}", str(expert)) for expert in range(num_experts)]
    order = None
    if spec.order is not None:
        order = np.asarray(spec.order(config))
    return TensorMapping(spec, tuple(names), ours, our_shapes, order)


def _with_layer(name: str, layer: str) -> str:
    return name.replace("{layer}", layer).replace(_MTP, layer)


@dataclasses.dataclass(frozen=True)
class CheckpointWeights:
    """The tensors of a checkpoint, matched with the parameters of a model.

    Attributes:
      mappings: the parameters in each tensor.
      tensors: by the names that `mappings` has; arrays, or what `np.asarray` makes one.
    """

    mappings: tuple[TensorMapping, ...]
    tensors: Mapping[str, Any]

    def slices(self, limit: int = SLICE_BYTES) -> Iterator[ParameterSlice]:
        """Yields all parameters, slice by slice, in the order of the tensors in the checkpoint."""
        rank = {name: i for i, name in enumerate(self.tensors)}
        for mapping in sorted(self.mappings, key=lambda mapping: rank[mapping.theirs[0]]):
            for cut in mapping.cuts(limit):
                parameters = mapping.unpack(self.tensors, cut)
                for name, values in zip(mapping.ours, parameters, strict=True):
                    yield ParameterSlice(name, mapping.slices(cut), values)

    def get_slice(self, name: str, slices: Slices) -> Float32[np.ndarray, "..."]:
        """Returns a part of one parameter."""
        mapping = self._mapping_of[name]
        parameters = mapping.unpack(self.tensors, None)
        index = mapping.ours.index(name)
        return parameters[index][slices]

    @functools.cached_property
    def _mapping_of(self) -> dict[str, TensorMapping]:
        return {name: mapping for mapping in self.mappings for name in mapping.ours}


def match_tensors(
    architecture: Architecture, config: ModelConfig, tensors: Mapping[str, Any]
) -> CheckpointWeights:
    """Returns the tensors of a model in a checkpoint; no number is read but those of copies.

    Args:
      architecture: whose tensors they are.
      config: the model.
      tensors: by name, in the order of the file; each has `shape` and `dtype`, and `np.asarray`
        reads it.

    Raises:
      UserError: tensors that are missing, not known, of another shape or quantized, all of them
        named.
    """
    mappings, copies = _without_copies(map_tensors(architecture, config))
    wanted = shapes_of(mappings)
    all_copies = {**architecture.copies, **copies}
    names = TensorNames.recognize(architecture, wanted, all_copies, tensors)
    _check_plain(tensors)

    faults = list(names.repeated)
    for name, shape in wanted.items():
        if name not in names.found:
            faults.append(f"{name} is missing")
        else:
            stored_name = names.found[name]
            faults += _tensor_faults(stored_name, tensors[stored_name], shape)
    faults += leftover_faults(architecture, all_copies, names, tensors)
    if faults:
        raise UserError(
            f"not a {architecture.model_type} checkpoint of this config: {listed(faults, '; ')}."
        )

    order = {name: i for i, name in enumerate(tensors)}
    # In the order of the file, which is then read from front to back.
    in_order = sorted(wanted, key=lambda name: order[names.found[name]])
    found = {name: tensors[names.found[name]] for name in in_order}
    return CheckpointWeights(tuple(mappings), found)


def _without_copies(
    mappings: Iterable[TensorMapping],
) -> tuple[list[TensorMapping], dict[str, str]]:
    """Returns the tensors without copies, and copy -> the tensor that it repeats."""
    mappings = list(mappings)
    originals = [mapping for mapping in mappings if not mapping.spec.copy]
    # The original of a copy is the tensor with the same parameters.
    tensor_of = {mapping.ours: mapping.theirs[0] for mapping in originals}

    original_of = {}
    for mapping in mappings:
        if mapping.spec.copy:
            copy = mapping.theirs[0]
            original_of[copy] = tensor_of[mapping.ours]
    return originals, original_of


def _check_plain(tensors: Mapping[str, Any]) -> None:
    quantized = [name for name in tensors if _is_quantized(name, tensors[name].dtype)]
    if quantized:
        raise UserError(
            f"{quantized[0]} is quantized, and {len(quantized) - 1} others are: only plain "
            "floating weights are read."
        )


def _is_quantized(name: str, dtype: Any) -> bool:
    if _QUANTIZED.fullmatch(name):
        return True
    return np.dtype(dtype).name.startswith("float8")


def _tensor_faults(name: str, tensor: Any, shape: Shape) -> Iterator[str]:
    """Yields what is wrong with a tensor that should have this shape."""
    if tuple(tensor.shape) != shape:
        yield f"{name} has the shape {list(tensor.shape)}, not {list(shape)}"
    elif not jnp.issubdtype(tensor.dtype, jnp.floating):
        yield f"{name} has the type {tensor.dtype}, not a floating one"


def params_from_slices(config: ModelConfig, slices: Iterable[ParameterSlice]) -> Any:
    """Returns the tree of parameters, in the form that `config` has in memory, from its slices."""
    arrays = {}
    for name, shape in unrolled_shapes(config).items():
        arrays[name] = np.empty(shape.shape, shape.dtype)
    for name, where, values in slices:
        arrays[name][where] = values

    # Cast and moved to the device only now: until here each number is written once.
    named = jax.tree.map(jnp.asarray, arrays)
    abstract = abstract_params(config, platform())
    if "layers" in abstract:
        # The model scans its layers: layers_0/…, layers_1/… -> layers/… with a leading axis.
        named = unstack_layers(stack_layers(named), named_leaves(abstract))
    leaves = [named[name] for name in named_leaves(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def slice_getter(config: ModelConfig, params: Any) -> GetSlice:
    """Returns a function that returns slices of a tree of parameters by the names of the unrolled
    model; the inverse of `params_from_slices`.
    """
    # Stacked first: whether the layers of `params` are stacked or not, they are unstacked then.
    stacked = stack_layers(named_leaves(params))
    named = unstack_layers(stacked, unrolled_shapes(config))

    def get_slice(name: str, slices: Slices) -> Float[np.ndarray, "..."]:
        return np.asarray(named[name])[slices]

    return get_slice


def tensor_rows(
    mappings: Iterable[TensorMapping], get_slice: GetSlice, dtype: Any, limit: int = SLICE_BYTES
) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
    """Yields names of tensors and the next rows of each, tensor after tensor in the order of
    `shapes_of`.

    Args:
      mappings: what `map_tensors` returns for the model.
      get_slice: returns a slice of a parameter; each number is asked for once, and once more for
        each copy, in equal slices.
      dtype: of the tensors.
      limit: the most bytes of a slice, as float32.
    """
    for mapping, cut, values in prefetch(_parameters_of(mappings, get_slice, limit)):
        yield from mapping.pack(values, cut, np.dtype(dtype))


def _parameters_of(
    mappings: Iterable[TensorMapping], get_slice: GetSlice, limit: int
) -> Iterator[tuple[TensorMapping, slice | None, list[Float[np.ndarray, "..."]]]]:
    """Yields each cut of each tensor with the numbers of its parameters."""
    for mapping in mappings:
        for cut in mapping.cuts(limit):
            slices = mapping.slices(cut)
            values = [get_slice(name, slices) for name in mapping.ours]
            yield mapping, cut, values


def shapes_of(mappings: Iterable[TensorMapping]) -> dict[str, Shape]:
    """Returns the shape of each tensor."""
    return {name: mapping.shape() for mapping in mappings for name in mapping.theirs}


def params_from(architecture: Architecture, config: ModelConfig, tensors: Mapping[str, Any]) -> Any:
    """Returns the float32 parameters of a checkpoint whose tensors are in memory."""
    weights = match_tensors(architecture, config, tensors)
    return params_from_slices(config, weights.slices())


def tensors_from(
    architecture: Architecture, config: ModelConfig, params: Any
) -> dict[str, Float32[np.ndarray, "..."]]:
    """Returns the tensors of a model in memory; the inverse of `params_from`."""
    mappings = map_tensors(architecture, config)
    get_slice = slice_getter(config, params)
    rows_of: dict[str, list[np.ndarray]] = {}
    for name, rows in tensor_rows(mappings, get_slice, np.float32):
        rows_of.setdefault(name, []).append(rows)

    tensors = {}
    for name, shape in shapes_of(mappings).items():
        tensor = np.concatenate(rows_of[name])
        tensors[name] = tensor.reshape(shape)
    return tensors
