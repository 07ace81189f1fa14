"""Modules of torch models: their tensors in a checkpoint, their attention as configuration."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from research.interop.tensor import TensorSpec
from research.models.config import ModelConfig

# The projections of a layer's attention that read its input.
PROJECTIONS = ("query", "key", "value")
QKV = tuple(f"attention/{name}" for name in PROJECTIONS)
# The output projection of a model whose embedding is not tied to it.
UNEMBED = TensorSpec("lm_head.weight", ("unembed",), num_inputs=1, transposed=True)


def table(theirs: str, ours: str) -> TensorSpec:
    """Returns the rows of a torch `Embedding`."""
    return TensorSpec(f"{theirs}.weight", (f"{ours}/embedding",), num_inputs=1)


def linear(
    theirs: str, *ours: str, num_inputs: int = 1, transposed: bool = True, **rest: Any
) -> tuple[TensorSpec, TensorSpec]:
    """Returns the weight of a torch `Linear`, and the bias that some have.

    Args:
      theirs: its name.
      ours: the projections whose outputs are concatenated in it.
      num_inputs, rest: see `TensorSpec`.
      transposed: whether outputs come first; in `Conv1D` of GPT-2 they do not.
    """
    kernels = tuple(f"{name}/kernel" for name in ours)
    biases = tuple(f"{name}/bias" for name in ours)
    return (
        TensorSpec(f"{theirs}.weight", kernels, num_inputs, transposed, **rest),
        TensorSpec(f"{theirs}.bias", biases, **rest),
    )


def norm(
    theirs: str, ours: str, when: Callable[[ModelConfig], bool] | None = None
) -> tuple[TensorSpec, TensorSpec]:
    """Returns the scale of a norm, and the bias that some have; see `TensorSpec.when`."""
    return (
        TensorSpec(f"{theirs}.weight", (f"{ours}/scale",), when=when),
        TensorSpec(f"{theirs}.bias", (f"{ours}/bias",), when=when),
    )


def projections(
    theirs: str, ours: str, names: Sequence[str] = PROJECTIONS
) -> tuple[TensorSpec, ...]:
    """Returns the linear maps to queries, keys and values.

    Args:
      theirs: their names, with `{qkv}` for the name of the projection.
      ours: the attention.
      names: of the three projections.
    """
    tensors = []
    for projection, name in zip(PROJECTIONS, names, strict=True):
        # "self_attn.{qkv}_proj", "q" -> "self_attn.q_proj"
        tensors += linear(theirs.replace("{qkv}", name), f"{ours}/{projection}")
    return tuple(tensors)


def within(theirs: str, ours: str, tensors: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Returns the tensors of a module that is part of another one.

    Args:
      theirs: the module's name in a checkpoint, `model.layers.{layer}` for instance.
      ours: its subtree of the parameters, `{layer}` for instance.
      tensors: of the module, by names within it.
    """
    inner = []
    for tensor in tensors:
        # "mlp.up_proj" -> "model.layers.{layer}.mlp.up_proj"
        full_ours = tuple(f"{ours}/{name}" for name in tensor.ours)
        full_theirs = f"{theirs}.{tensor.theirs}"
        inner.append(dataclasses.replace(tensor, theirs=full_theirs, ours=full_ours))
    return tuple(inner)


def multi_head(width: int, num_heads: int, bias: bool) -> dict[str, Any]:
    """Returns the values of an `AttentionConfig` whose heads have a key and a value each, and
    together the width.
    """
    return {
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": width // num_heads,
        "qkv_bias": bias,
        "out_bias": bias,
    }
