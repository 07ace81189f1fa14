"""What torch models are made of: how their modules lie in a checkpoint, and their attention as configuration."""

from collections.abc import Callable, Sequence
from typing import Any

from research.interop.tensor import Tensor
from research.models.config import ModelConfig

PARTS = ("query", "key", "value")


def table(theirs: str, ours: str) -> Tensor:
    """Returns the rows of a torch `Embedding`."""
    return Tensor(f"{theirs}.weight", (f"{ours}/embedding",), num_inputs=1)


def linear(theirs: str, ours: str, num_inputs: int = 1) -> tuple[Tensor, Tensor]:
    """Returns the weight of a torch `Linear`, and the bias that some have."""
    return (
        Tensor(f"{theirs}.weight", (f"{ours}/kernel",), num_inputs, transposed=True),
        Tensor(f"{theirs}.bias", (f"{ours}/bias",)),
    )


def norm(theirs: str, ours: str, when: Callable[[ModelConfig], bool] | None = None) -> tuple[Tensor, Tensor]:
    """Returns the scale of a norm, and the bias that some have; see `Tensor.when`."""
    return (
        Tensor(f"{theirs}.weight", (f"{ours}/scale",), when=when),
        Tensor(f"{theirs}.bias", (f"{ours}/bias",), when=when),
    )


def projections(theirs: str, ours: str, names: Sequence[str] = PARTS) -> tuple[Tensor, ...]:
    """Returns the linear maps to queries, keys and values.

    Args:
      theirs: their names, with `{part}` in the place of what tells them apart.
      ours: the attention.
      names: what stands there.
    """
    pairs = zip(PARTS, names, strict=True)
    return tuple(each for part, name in pairs for each in linear(theirs.replace("{part}", name), f"{ours}/{part}"))


def joined(leaf: str) -> tuple[str, ...]:
    """Returns the parameters of a layer's queries, keys and values, which one tensor may hold."""
    return tuple(f"{{layer}}/attention/{part}/{leaf}" for part in PARTS)


def multi_head(width: int, num_heads: int, bias: bool) -> dict[str, Any]:
    """Returns the values of an `AttentionConfig` whose heads have a key and a value each, and together the width."""
    return {
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": width // num_heads,
        "qkv_bias": bias,
        "out_bias": bias,
    }


# The output projection of a model whose embedding is not tied to it.
UNEMBED = Tensor("lm_head.weight", ("unembed",), num_inputs=1, transposed=True)
