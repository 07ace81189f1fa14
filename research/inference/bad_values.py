"""Where the values of a text stop being numbers: for `debug_nans`, outside of what an engine serves
with.

The text is read at once by a program of its own, which looks at what each module takes and gives in
the order in which they run.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from research.core.trees import named_leaves
from research.inference.answers import NOT_NUMBERS
from research.inference.compilations import compiling
from research.inference.page_names import PageNames
from research.inference.requests import Request
from research.inference.runner import Runner
from research.inference.sequence import Sequence as Answered
from research.inference.serve_config import ServeConfig
from research.models.canonical_params import canonical_names
from research.models.config import ModelConfig
from research.models.language_model import LanguageModelConfig, language_model
from research.models.transformer import compute_logits
from research.parallel.mesh import on_mesh
from research.parallel.shard_map import whole_batch

# Of an array: whether it has a value that is no number, the index of the first one, and this value.
Found = tuple[Bool[Array, ""], Int[Array, "axes"], Float[Array, ""]]
# What is said where a text that is read at once has none: the engine's pages may be of a type that
# a value does not fit in.
NONE = "read again without pages, no layer has such a value"
_INPUT = ", its input"
_LOGITS = "logits"


def explain(
    serve: ServeConfig,
    config: LanguageModelConfig,
    runner: Runner,
    names: PageNames,
    request: Request,
    sequence: Answered,
    num_drawn: int | None = None,
) -> str:
    """Returns why a text ends whose logits are no numbers.

    Args:
      serve: how the engine runs.
      config: of the model.
      runner: that has its parameters.
      names: which know its adapters.
      request: which the text answers.
      sequence: of its tokens.
      num_drawn: how many of them were drawn from logits that are numbers; None for all.
    """
    if not serve.debug_nans:
        return NOT_NUMBERS
    tokens = sequence.tokens
    if num_drawn is not None:
        num_prompt = sequence.limit - request.max_tokens
        tokens = tokens[: num_prompt + num_drawn]
    adapter = names.adapter_index(request.adapter)
    with compiling(), on_mesh(runner.mesh):
        bad = first_bad_value(config, runner.params, request, tokens, sequence.limit, adapter)
    return f"{NOT_NUMBERS}: {bad}"


def first_bad_value(
    config: LanguageModelConfig,
    params: Any,
    request: Request,
    tokens: Sequence[int],
    limit: int,
    adapter: int = 0,
) -> str:
    """Returns the first value that is no number when a text is read: what it is, in which layer and
    array, at which token; and the parameter there that is none, if there is one.

    Args:
      config: of the model.
      params: its parameters.
      request: which the text answers.
      tokens: of it, as the decoder has them.
      limit: tokens that it may have, by which some models' positions go.
      adapter: which of the model's adapters reads it, from 1; 0 for none.
    """
    inputs = _inputs(config, request, tokens, limit, adapter)
    found = _read(_looked_into(config), params, inputs)
    # "000007 layers_0/mlp/up" comes before "000009 layers_0/mlp/down".
    for name in sorted(found):
        is_bad, index, value = jax.device_get(found[name])
        if not is_bad:
            continue
        _, _, array = name.partition(" ")
        place = _place(array, index, value)
        parameter = _of_parameter(params, array)
        return f"{place}{parameter}"
    return NONE


def _inputs(
    config: LanguageModelConfig,
    request: Request,
    tokens: Sequence[int],
    limit: int,
    adapter: int,
) -> dict[str, Int[np.ndarray, "1 _"]]:
    """Returns what the model reads of one text."""
    ids = np.array([tokens], np.int32)
    index = np.arange(len(tokens), dtype=np.int32)
    index = index[None, :]
    inputs = {
        "tokens": ids,
        "positions": index,
        "lengths": np.full_like(ids, limit),
        "adapters": np.full_like(ids, adapter),
    }
    if config.structure == "prefix":
        is_prompt = index < len(request.ids)
        inputs["prefix"] = is_prompt.astype(np.int32)
    if config.structure == "encoder_decoder":
        inputs["encoder_tokens"] = np.array([request.ids], np.int32)
    return inputs


def _looked_into(config: LanguageModelConfig) -> LanguageModelConfig:
    """Returns a model whose modules run one by one, none inside another program's loop."""
    if not isinstance(config, ModelConfig):
        return config
    return dataclasses.replace(config, layer_loop="unroll", remat="none", dropout=0.0)


@functools.partial(jax.jit, static_argnums=0)
@whole_batch()
def _read(
    config: LanguageModelConfig, params: Any, inputs: dict[str, Int[Array, "1 _"]]
) -> dict[str, Found]:
    """Returns what is found in each array, by the place in the order of all and its name."""
    found: dict[str, Found] = {}

    def look(name: str, value: Any) -> None:
        for array, leaf in _arrays(name, value):
            found[f"{len(found):06d} {array}"] = _first_bad(leaf)

    def intercept(
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        path = "/".join(context.module.path)
        # The model itself has no path.
        if context.method_name != "__call__" or not path:
            return call(*args, **kwargs)
        look(f"{path}{_INPUT}", args[:1])
        result = call(*args, **kwargs)
        look(path, result)
        return result

    model = language_model(config)
    with nn.intercept_methods(intercept):
        hidden = model.hidden(_unstacked(params), inputs).hidden
        terms = model.projection(params, hidden)
    look(_LOGITS, compute_logits(terms))
    return found


def _arrays(name: str, value: Any) -> Iterator[tuple[str, Array]]:
    """Yields the arrays of real numbers in what a module takes or gives."""
    for leaf_name, leaf in named_leaves(value).items():
        if not isinstance(leaf, jax.Array):
            continue
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        # Of a tuple the first is the hidden states; of a dict each has a name.
        is_named = leaf_name and not leaf_name[0].isdecimal()
        array = name
        if is_named:
            array = f"{name}/{leaf_name}"
        yield array, leaf


def _first_bad(array: Float[Array, "..."]) -> Found:
    flat = array.reshape(-1)
    is_bad = ~jnp.isfinite(flat)
    first = jnp.argmax(is_bad)
    value = flat[first]
    # Of [B, T, D]: 130 -> (0, 8, 2) where D = 16
    index = jnp.unravel_index(first, array.shape)
    index = jnp.array(index, jnp.int32)
    return jnp.any(is_bad), index, value.astype(jnp.float32)


def _unstacked(params: Any) -> Any:
    """Returns the parameters with one subtree for each layer, `layers_0`, `layers_1`, …"""
    if not isinstance(params, dict):
        return params
    unstacked = {}
    for name, subtree in params.items():
        if name != "layers":
            unstacked[name] = _unstacked(subtree)
            continue
        first, *_ = jax.tree.leaves(subtree)
        for index in range(len(first)):
            layer = jax.tree.map(operator.itemgetter(index), subtree)
            unstacked[f"layers_{index}"] = layer
    return unstacked


def _place(array: str, index: Int[np.ndarray, "axes"], value: np.ndarray) -> str:
    """Returns such as `inf at [5, 17] of layers_0/mlp/up`."""
    # Of [B, T, D] with one row: the token, then the column.
    _, *place = index.tolist() or [0]
    return f"{float(value)} at {place} of {array}"


def _of_parameter(params: Any, array: str) -> str:
    """Returns which parameter of an array's module is no number, as the end of a sentence; nothing
    where all are.
    """
    module = array.removesuffix(_INPUT)
    if module != array:
        # What comes before a module's input is computed by the one that it is in.
        module, _, _ = module.rpartition("/")
    shapes = named_leaves(jax.eval_shape(_unstacked, params))
    stored = named_leaves(params)
    for name, (stack, layer) in canonical_names(shapes).items():
        if name != module and not name.startswith(f"{module}/"):
            continue
        # layers_1/mlp/up/kernel, or layer 1 of layers/mlp/up/kernel
        leaf = stored[name] if name in stored else stored[stack][layer]
        values = np.asarray(jax.device_get(leaf))
        if not jnp.issubdtype(values.dtype, jnp.floating):
            continue
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            first = bad[0].tolist()
            value = float(values[tuple(first)])
            return f", where {name} is {value} at {first}"
    return ""
