"""The conversion engine: which numbers of a checkpoint are which of a model, both ways, a piece at
a time.

It knows no architecture and no file: tensors come from any mapping of names to arrays, and
parameters go, named as an unrolled model names them, wherever the caller puts them. A piece is a
part of one tensor, so that a model of any size passes through a few hundred megabytes.
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
from research.interop.tensor import Shape, TensorMapping, TensorSpec, same_numbers
from research.models.config import ModelConfig
from research.models.language_model import abstract_params
from research.models.layer_stack import stack_layers, unstack_layers
from research.parallel.target import platform
from research.storage.background import prefetch

logger = logging.getLogger("tessera")

# The most bytes of a piece, as float32: small enough that its memory is used again and not given
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
    return named_leaves(
        abstract_params(dataclasses.replace(config, layer_loop="unroll"), platform())
    )


def layer_names(names: Iterable[str], before: str) -> list[str]:
    """Returns the subtrees of a stack of layers, in the order in which they are run.

    Args:
      names: of all parameters.
      before: what is before the layer in the names of its parameters, `encoder/` for instance.
    """
    subtrees = {
        name.removeprefix(before).partition("/")[0] for name in names if name.startswith(before)
    }
    layers = [match for match in map(_LAYER.fullmatch, subtrees) if match]
    return [
        match[0]
        for match in sorted(layers, key=lambda match: (match["first"] is None, int(match["index"])))
    ]


def map_tensors(architecture: Architecture, config: ModelConfig) -> list[TensorMapping]:
    """Returns the tensors of a model, those of a layer after each other.

    Raises:
      UserError: parameters that the architecture has no place for, all of them named.
    """
    shapes = {name: shape.shape for name, shape in unrolled_shapes(config).items()}
    mappings = []
    for stack, group in itertools.groupby(architecture.tensors, key=_stack_of):
        tensors = list(group)
        for number, layer in _members(stack, shapes, config):
            mappings += [
                each
                for tensor in tensors
                for each in _map_tensor(tensor, number, layer, shapes, config)
            ]
    unmapped = sorted(set(shapes) - {name for each in mappings for name in each.ours})
    if unmapped:
        raise UserError(
            f"a {architecture.model_type} checkpoint has no place for {listed(unmapped)}."
        )
    return mappings


def _stack_of(tensor: TensorSpec) -> str | None:
    """Returns what is before the layer in the names of its parameters; `{mtp}` is the stack of
    the predictors.
    """
    if _MTP in tensor.theirs:
        return _MTP
    before, layer, _ = tensor.ours[0].partition("{layer}")
    return before if layer else None


def _members(
    stack: str | None, names: Iterable[str], config: ModelConfig
) -> Iterable[tuple[int, str]]:
    """Returns the number and the subtree of each layer of a stack; what is in none stands by
    itself.
    """
    if stack is None:
        return [(0, "")]
    if stack == _MTP:
        return [(config.num_layers + k, f"future_{k}") for k in range(config.head.mtp_depth)]
    return enumerate(layer_names(names, stack))


def _map_tensor(
    tensor: TensorSpec, number: int, layer: str, shapes: Mapping[str, Shape], config: ModelConfig
) -> Iterator[TensorMapping]:
    ours = tuple(name.replace("{layer}", layer).replace(_MTP, layer) for name in tensor.ours)
    if not all(name in shapes for name in ours) or (
        tensor.when is not None and not tensor.when(config)
    ):
        return
    held = tuple(shapes[name] for name in ours)
    theirs = tensor.theirs.replace("{layer}", str(number)).replace(_MTP, str(number))
    names = [
        theirs.replace("{expert}", str(expert))
        for expert in range(held[0][0] if "{expert}" in theirs else 1)
    ]
    order = None if tensor.order is None else np.asarray(tensor.order(config))
    yield TensorMapping(tensor, tuple(names), ours, held, order)


@dataclasses.dataclass(frozen=True)
class CheckpointWeights:
    """The tensors of a checkpoint, found to be those of a model.

    Attributes:
      mappings: where each goes.
      tensors: by the names that `mappings` has; arrays, or what `np.asarray` makes one.
    """

    mappings: tuple[TensorMapping, ...]
    tensors: Mapping[str, Any]

    def slices(self, limit: int = SLICE_BYTES) -> Iterator[ParameterSlice]:
        """Yields all parameters, piece by piece, in the order in which their tensors lie in the
        checkpoint.
        """
        rank = {name: i for i, name in enumerate(self.tensors)}
        for mappings in sorted(self.mappings, key=lambda each: rank[each.theirs[0]]):
            for cut in mappings.cuts(limit):
                for name, values in zip(
                    mappings.ours, mappings.unpack(self.tensors, cut), strict=True
                ):
                    yield ParameterSlice(name, mappings.slices(cut), values)

    def get_slice(self, name: str, slices: Slices) -> Float32[np.ndarray, "..."]:
        """Returns a part of one parameter."""
        mappings = self._mapping_of[name]
        return mappings.unpack(self.tensors, None)[mappings.ours.index(name)][slices]

    @functools.cached_property
    def _mapping_of(self) -> dict[str, TensorMapping]:
        return {name: mappings for mappings in self.mappings for name in mappings.ours}


def match_tensors(
    architecture: Architecture, config: ModelConfig, tensors: Mapping[str, Any]
) -> CheckpointWeights:
    """Returns the tensors of a model in a checkpoint; no number is read but those of copies.

    Args:
      architecture: whose tensors they are.
      config: the model.
      tensors: by name, in the order in which they lie; each has `shape` and `dtype`, and
          `np.asarray` reads it.

    Raises:
      UserError: tensors that are missing, not known, of another shape or quantized, all of them
          named.
    """
    mappings, copies = _without_copies(map_tensors(architecture, config))
    copies = {**architecture.copies, **copies}
    wanted = shapes_of(mappings)
    found, left, faults = _recognize(architecture, wanted.keys(), copies, tensors)
    quantized = [name for name in tensors if _is_quantized(name, tensors[name].dtype)]
    if quantized:
        raise UserError(
            f"{quantized[0]} is quantized, and {len(quantized) - 1} others are: only plain "
            "floating weights are read."
        )
    for name, shape in wanted.items():
        if name not in found:
            faults.append(f"{name} is missing")
            continue
        tensor = tensors[found[name]]
        if tuple(tensor.shape) != shape:
            faults.append(f"{found[name]} has the shape {list(tensor.shape)}, not {list(shape)}")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            faults.append(f"{found[name]} has the type {tensor.dtype}, not a floating one")
    faults += _leftovers(architecture, copies, found, left, tensors)
    if faults:
        raise UserError(
            f"not a {architecture.model_type} checkpoint of this config: {listed(faults, '; ')}."
        )
    order = {name: i for i, name in enumerate(tensors)}
    names = sorted(wanted, key=lambda name: order[found[name]])
    return CheckpointWeights(tuple(mappings), {name: tensors[found[name]] for name in names})


def _without_copies(
    mappings: Iterable[TensorMapping],
) -> tuple[list[TensorMapping], dict[str, str]]:
    """Returns the tensors but for copies, and copy -> the tensor that it repeats."""
    mappings = list(mappings)
    originals = [each for each in mappings if not each.spec.copy]
    homes = {each.ours: each.theirs[0] for each in originals}
    return originals, {each.theirs[0]: homes[each.ours] for each in mappings if each.spec.copy}


def _is_quantized(name: str, dtype: Any) -> bool:
    return _QUANTIZED.fullmatch(name) is not None or np.dtype(dtype).name.startswith("float8")


def _recognize(
    architecture: Architecture,
    wanted: Iterable[str],
    copies: Mapping[str, str],
    tensors: Iterable[str],
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Returns full names -> names of the wanted tensors that are there, the same of others, and
    what is double.
    """
    wanted = set(wanted)
    known = wanted | copies.keys()
    ignored = [re.compile(pattern) for pattern in architecture.ignored]
    found, left, faults = {}, {}, []
    for name in tensors:
        spelled = name
        for pattern, replacement in architecture.spellings:
            spelled = re.sub(pattern, replacement, spelled)
        candidates = [spelled, *(prefix + spelled for prefix in architecture.prefixes)]
        candidates += [spelled.removeprefix(prefix) for prefix in architecture.prefixes]
        full = next((each for each in candidates if each in known), None) or next(
            (each for each in candidates if any(pattern.fullmatch(each) for pattern in ignored)),
            name,
        )
        into = found if full in wanted else left
        if full in into:
            faults.append(f"{name} and {into[full]} are the same tensor")
        into[full] = name
    for copy, original in copies.items():
        if original in wanted and original not in found and copy in left:
            found[original] = left.pop(copy)
    return found, left, faults


def _leftovers(
    architecture: Architecture,
    copies: Mapping[str, str],
    found: Mapping[str, str],
    left: Mapping[str, str],
    tensors: Mapping[str, Any],
) -> list[str]:
    """Returns what is wrong with the tensors that no parameter takes."""
    faults, reasons = [], {}
    for full, name in left.items():
        reason = next(
            (why for pattern, why in architecture.ignored.items() if re.fullmatch(pattern, full)),
            None,
        )
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
        elif full not in copies:
            faults.append(f"{name} is not known")
        elif copies[full] in found:
            original = found[copies[full]]
            if not same_numbers(tensors[name], tensors[original]):
                why = " (tie_word_embeddings)" if full in architecture.copies else ""
                faults.append(f"{name} differs from {original}, which it repeats{why}")
    for reason, names in reasons.items():
        logger.info(
            "%s%s left out: %s",
            names[0],
            f" and {len(names) - 1} more" if names[1:] else "",
            reason,
        )
    return faults


def params_from_slices(config: ModelConfig, slices: Iterable[ParameterSlice]) -> Any:
    """Returns the tree of parameters, in the form that `config` has in memory, that pieces make."""
    named = {
        name: np.empty(shape.shape, shape.dtype) for name, shape in unrolled_shapes(config).items()
    }
    for name, where, values in slices:
        named[name][where] = values
    named, abstract = jax.tree.map(jnp.asarray, named), abstract_params(config, platform())
    if "layers" in abstract:  # all but the first layers are stacked
        named = unstack_layers(stack_layers(named), named_leaves(abstract))
    return jax.tree.unflatten(
        jax.tree.structure(abstract), [named[name] for name in named_leaves(abstract)]
    )


def slice_getter(config: ModelConfig, params: Any) -> GetSlice:
    """Returns what reads parts of a tree of parameters by the names of the unrolled model; inverse
    of `params_from_slices`.
    """
    named = unstack_layers(stack_layers(named_leaves(params)), unrolled_shapes(config))
    return lambda name, slices: np.asarray(named[name])[slices]


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
      limit: the most bytes of a piece, as float32.
    """
    cuts = ((each, cut) for each in mappings for cut in each.cuts(limit))
    for each, cut, values in prefetch(
        (each, cut, [get_slice(name, each.slices(cut)) for name in each.ours]) for each, cut in cuts
    ):
        yield from each.pack(values, cut, np.dtype(dtype))


def shapes_of(mappings: Iterable[TensorMapping]) -> dict[str, Shape]:
    """Returns the shape of each tensor."""
    return {name: each.shape() for each in mappings for name in each.theirs}


def params_from(architecture: Architecture, config: ModelConfig, tensors: Mapping[str, Any]) -> Any:
    """Returns the float32 parameters of a checkpoint whose tensors are in memory."""
    return params_from_slices(config, match_tensors(architecture, config, tensors).slices())


def tensors_from(
    architecture: Architecture, config: ModelConfig, params: Any
) -> dict[str, Float32[np.ndarray, "..."]]:
    """Returns the tensors of a model in memory; the inverse of `params_from`."""
    mappings = map_tensors(architecture, config)
    parts: dict[str, list[np.ndarray]] = {}
    for name, rows in tensor_rows(mappings, slice_getter(config, params), np.float32):
        parts.setdefault(name, []).append(rows)
    shapes = shapes_of(mappings)
    return {name: np.concatenate(rows).reshape(shapes[name]) for name, rows in parts.items()}
