"""Models of llama2.c: the first version of its `.bin` files, as karpathy/llama2.c's `run.c` reads
them.
"""

import math
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float32

from research.core.errors import UserError, within
from research.interop.llama import LLAMA
from research.interop.mapping import params_from
from research.models.config import (
    AttentionConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
)

HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
_HEADER_BYTES = 4 * len(HEADER)


def from_llama2c(path: str | pathlib.Path) -> tuple[ModelConfig, Any]:
    """Returns the model of a file and its float32 parameters.

    Args:
      path: seven little-endian int32, then float32 tensors without names. A vocabulary below 0
        means that the output projection is a matrix of its own.

    Raises:
      UserError: the header makes no model, or the file has another length than its header has.
    """
    path = pathlib.Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    header = _header(path, data)
    with within("", origin=f"{path} is not a llama2.c model"):
        config = _config(header)

    shapes = _shapes(config)
    sizes = [math.prod(shape) for shape in shapes.values()]
    wanted = _HEADER_BYTES + 4 * sum(sizes)
    if len(data) != wanted:
        raise UserError(
            f"{path} has {len(data):,} bytes, but its header {header} describes {wanted:,}."
        )

    # Sizes [6, 2, 4] -> the numbers 0:6, 6:8, 8:12.
    values = np.frombuffer(data, "<f4", offset=_HEADER_BYTES)
    ends = np.cumsum(sizes)
    parts = np.split(values, ends[:-1])
    tensors = {}
    for (name, shape), part in zip(shapes.items(), parts, strict=True):
        tensors[name] = part.reshape(shape)
    return config, params_from(LLAMA, config, _hugging_face_form(config, tensors))


def _header(path: pathlib.Path, data: bytes) -> dict[str, int]:
    if len(data) < _HEADER_BYTES:
        raise UserError(
            f"{path} is not a llama2.c model: it has no header of {len(HEADER)} numbers."
        )
    numbers = np.frombuffer(data, "<i4", len(HEADER))
    return dict(zip(HEADER, numbers.tolist(), strict=True))


def _config(header: dict[str, int]) -> ModelConfig:
    width = header["dim"]
    heads = header["n_heads"]
    if heads < 1 or width % heads or header["hidden_dim"] < 1:
        raise UserError(f"its header is {header}.")
    return ModelConfig(
        vocab_size=abs(header["vocab_size"]),
        num_layers=header["n_layers"],
        embed_dim=width,
        max_length=header["seq_len"],
        attention=AttentionConfig(
            num_heads=heads, num_kv_heads=header["n_kv_heads"], head_dim=width // heads
        ),
        mlp=MlpConfig(hidden_dim=header["hidden_dim"], activation="silu", gated=True),
        norm=NormConfig(kind="rmsnorm", placement="pre", epsilon=1e-5),
        position=PositionConfig(kind="rotary", theta=10_000.0),
        # A negative number marks a vocabulary with an output projection of its own.
        tied_embeddings=header["vocab_size"] > 0,
    )


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor in the order of the file, under the names of Hugging Face's
    LLaMA.
    """
    layers = config.num_layers
    width = config.embed_dim
    hidden = config.mlp.hidden_dim
    c = config.attention
    q_width = c.num_heads * c.head_dim
    kv_width = c.num_kv_heads * c.head_dim
    shapes = {
        "model.embed_tokens.weight": (config.vocab_size, width),
        "input_layernorm.weight": (layers, width),
        "self_attn.q_proj.weight": (layers, q_width, width),
        "self_attn.k_proj.weight": (layers, kv_width, width),
        "self_attn.v_proj.weight": (layers, kv_width, width),
        "self_attn.o_proj.weight": (layers, width, q_width),
        "post_attention_layernorm.weight": (layers, width),
        "mlp.gate_proj.weight": (layers, hidden, width),
        "mlp.down_proj.weight": (layers, width, hidden),
        "mlp.up_proj.weight": (layers, hidden, width),
        "model.norm.weight": (width,),
        # Tables of cosines and sines: `run.c` computes its own.
        "cosines": (config.max_length, c.head_dim // 2),
        "sines": (config.max_length, c.head_dim // 2),
    }
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def _hugging_face_form(
    config: ModelConfig, tensors: dict[str, Float32[np.ndarray, "..."]]
) -> dict[str, Float32[np.ndarray, "..."]]:
    """Returns the tensors of parameters, layer by layer; interleaved rotary pairs become halves."""
    heads = {
        "self_attn.q_proj.weight": config.attention.num_heads,
        "self_attn.k_proj.weight": config.attention.num_kv_heads,
    }
    named = {}
    for name, value in tensors.items():
        if name.startswith(("model.", "lm_head.")):
            named[name] = value
        elif name not in ("cosines", "sines"):
            # [L, …] -> one tensor for each layer
            for layer, matrix in enumerate(value):
                if name in heads:
                    matrix = _halves(matrix, heads[name])
                named[f"model.layers.{layer}.{name}"] = matrix
    return named


def _halves(matrix: Float32[np.ndarray, "NH D"], heads: int) -> Float32[np.ndarray, "NH D"]:
    """Moves the even rows of each head to its first half and the odd ones to its second."""
    pairs = matrix.reshape(heads, -1, 2, matrix.shape[-1])
    # Rows of a head of width 4: [N, H / 2, 2, D] -> [N, 2, H / 2, D], 0 1 2 3 -> 0 2 1 3
    return pairs.swapaxes(1, 2).reshape(matrix.shape)
