"""The models that this project and its peers serve beside each other: random weights of known
shapes, written for each of them.
"""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import numpy as np

from research.bench.gguf import write_gguf
from research.bench.llama_shapes import LLAMA_134M
from research.interop import mapping
from research.interop.architecture import choose
from research.interop.huggingface import ARCHITECTURES, NO_TOKENS, write_hugging_face
from research.models.config import AttentionConfig, MlpConfig, ModelConfig, NormConfig
from research.models.language_model import language_model
from research.models.position_config import PositionConfig
from research.parallel.target import platform

GGUF = "model.gguf"
MODELS = {
    "GPT-2 124 M": ModelConfig(
        vocab_size=50_257,
        num_layers=12,
        embed_dim=768,
        max_length=1024,
        attention=AttentionConfig(12, 12, 64, qkv_bias=True, out_bias=True),
        mlp=MlpConfig(hidden_dim=3072, activation="gelu_tanh", gated=False, bias=True),
        norm=NormConfig(kind="layernorm", bias=True),
        position=PositionConfig(kind="learned"),
        tied_embeddings=True,
    ),
    "LLaMA 134 M": LLAMA_134M,
}


def write_model(folder: pathlib.Path, config: ModelConfig, dtype: str) -> None:
    """Writes random weights as a folder of `transformers`, which this project reads too, and in
    float32 as a file of llama.cpp.

    Args:
      folder: where to.
      config: of the model.
      dtype: `float32` or `bfloat16`.
    """
    model = language_model(dataclasses.replace(config, layer_loop="unroll"), platform())
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0)))
    architecture, fields = choose(ARCHITECTURES.values(), config)
    get_slice = mapping.slice_getter(config, params)
    write_hugging_face(architecture, fields, config, get_slice, folder, NO_TOKENS, dtype)
    if dtype == "float32":
        write_gguf(folder / GGUF, config, mapping.tensors_from(architecture, config, params))


def bytes_a_step(config: ModelConfig, dtype: str) -> int:
    """Returns the bytes of the weights that a step reads: of all that are multiplied, the tied
    embeddings once.
    """
    sizes = {
        name: int(np.prod(shape.shape)) for name, shape in mapping.unrolled_shapes(config).items()
    }
    # Of learned positions a step reads a row.
    read = sum(size for name, size in sizes.items() if "position" not in name)
    return read * (2 if dtype == "bfloat16" else 4)
