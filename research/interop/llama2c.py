"""Models of llama2.c: the first version of its `.bin` files, as karpathy/llama2.c's `run.c` reads
them.
"""

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


def from_llama2c(path: str | pathlib.Path) -> tuple[ModelConfig, Any]:
    """Returns the model of a file and its float32 parameters.

    Args:
      path: seven little-endian int32, then float32 tensors without names. A vocabulary below 0
        means that the output projection is a matrix of its own.

    Raises:
      UserError: the header makes no model, or the file is not as long as its header says.
    """
    path = pathlib.Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if len(data) < 4 * len(HEADER):
        raise UserError(
            f"{path} is not a llama2.c model: it has no header of {len(HEADER)} numbers."
        )
    header = dict(zip(HEADER, np.frombuffer(data, "<i4", len(HEADER)).tolist(), strict=True))
    with within("", origin=f"{path} is not a llama2.c model"):
        config = _config(header)
    shapes = _shapes(config)
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    wanted = 4 * (len(HEADER) + sum(sizes))
    if len(data) != wanted:
        raise UserError(
            f"{path} has {len(data):,} bytes, but its header {header} describes {wanted:,}."
        )
    values = np.frombuffer(data, "<f4", offset=4 * len(HEADER))
    parts = np.split(values, np.cumsum(sizes)[:-1])
    tensors = {
        name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
    return config, params_from(LLAMA, config, _hugging_face_form(config, tensors))


def _config(header: dict[str, int]) -> ModelConfig:
    width, heads = header["dim"], header["n_heads"]
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
        tied_embeddings=header["vocab_size"] > 0,
    )


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor in the order of the file, under the names of Hugging Face's
    LLaMA.
    """
    layers, width, hidden = config.num_layers, config.embed_dim, config.mlp.hidden_dim
    c = config.attention
    q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
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
    """Returns the tensors that hold parameters, layer by layer; rotary pairs that were neighbours
    become halves.
    """
    heads = {
        "self_attn.q_proj.weight": config.attention.num_heads,
        "self_attn.k_proj.weight": config.attention.num_kv_heads,
    }
    named = {}
    for name, value in tensors.items():
        if name.startswith(("model.", "lm_head.")):
            named[name] = value
        elif name not in ("cosines", "sines"):
            for layer, matrix in enumerate(value):
                named[f"model.layers.{layer}.{name}"] = (
                    _halves(matrix, heads[name]) if name in heads else matrix
                )
    return named


def _halves(matrix: Float32[np.ndarray, "NH D"], heads: int) -> Float32[np.ndarray, "NH D"]:
    """Moves the even rows of each head to its first half and the odd ones to its second."""
    pairs = matrix.reshape(heads, -1, 2, matrix.shape[-1])
    return pairs.swapaxes(1, 2).reshape(matrix.shape)
