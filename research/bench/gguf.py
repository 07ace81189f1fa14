"""GGUF files of GPT-2 and LLaMA, which llama.cpp reads, from tensors named as in `transformers`.

Source: the format's description in ggml, docs/gguf.md, version 3; names and layouts of tensors from
llama.cpp's convert_hf_to_gguf.py.
"""

import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from research.models.config import ModelConfig

Tensors = Mapping[str, Float32[np.ndarray, "..."]]
VERSION = 3
ALIGNMENT = 32
# Numbers of the types of fields and tensors.
UINT32 = 4
FLOAT32 = 6
STRING = 8
TENSOR_FLOAT32 = 0

# Of a layer, and of the model, by their names without `transformer.h.0.` or `model.layers.0.`.
GPT2_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
}
LLAMA_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
}
NAMES = {"gpt2": GPT2_NAMES, "llama": LLAMA_NAMES}
_NAME = re.compile(r"(?:transformer\.|model\.)(?:(?:h|layers)\.(\d+)\.)?(.+)\.(weight|bias)")


def write_gguf(path: pathlib.Path, config: ModelConfig, tensors: Tensors) -> None:
    """Writes a model without a vocabulary.

    Args:
      path: of the file.
      config: of a GPT-2 or a LLaMA with tied embeddings.
      tensors: as of `transformers`, float32.
    """
    architecture = "gpt2" if config.position.kind == "learned" else "llama"
    converted = {}
    for name, tensor in tensors.items():
        converted |= _converted(name, tensor, config, NAMES[architecture])
    fields = _fields(config, architecture)

    header = [b"GGUF", struct.pack("<IQQ", VERSION, len(converted), len(fields))]
    header += [_field(name, value) for name, value in fields.items()]
    offset = 0
    for name, tensor in converted.items():
        # The last dimension is written first.
        shape = tensor.shape[::-1]
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        header.append(_text(name) + sizes + struct.pack("<IQ", TENSOR_FLOAT32, offset))
        offset += _aligned(tensor.nbytes)
    with path.open("wb") as file:
        for part in (b"".join(header), *converted.values()):
            data = memoryview(part).cast("B")
            file.write(data)
            file.write(bytes(_aligned(len(data)) - len(data)))


def _converted(
    name: str, tensor: np.ndarray, config: ModelConfig, names: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Returns a tensor under its name in the file; none where it is a copy of the embedding."""
    found = _NAME.fullmatch(name)
    if found is None or found[2] not in names:
        return {}
    layer, part, kind = found.groups()
    attention = config.attention
    # GPT-2's matrices are [inputs, outputs].
    if names is GPT2_NAMES and part.startswith(("attn.", "mlp.")) and kind == "weight":
        tensor = tensor.T
    # Pairs of a head's columns rotate together: (0, H/2), (1, H/2 + 1), … are stored side by side.
    if part in ("self_attn.q_proj", "self_attn.k_proj"):
        is_query = part.endswith("q_proj")
        heads = attention.num_heads if is_query else attention.num_kv_heads
        # [N H, D] -> [N, 2, H / 2, D] -> [N, H / 2, 2, D]
        pairs = tensor.reshape(heads, 2, -1, tensor.shape[1])
        tensor = pairs.swapaxes(1, 2).reshape(tensor.shape)
    prefix = "" if layer is None else f"blk.{layer}."
    return {f"{prefix}{names[part]}.{kind}": np.ascontiguousarray(tensor, np.float32)}


def _fields(config: ModelConfig, architecture: str) -> dict[str, Any]:
    attention = config.attention
    own = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_length,
        "embedding_length": config.embed_dim,
        "feed_forward_length": config.mlp.hidden_dim,
        "block_count": config.num_layers,
        "attention.head_count": attention.num_heads,
        "attention.head_count_kv": attention.num_kv_heads,
    }
    if architecture == "gpt2":
        own["attention.layer_norm_epsilon"] = config.norm.epsilon
    else:
        own["attention.layer_norm_rms_epsilon"] = config.norm.epsilon
        own["rope.dimension_count"] = attention.head_dim
        own["rope.freq_base"] = float(config.position.theta)
    fields = {f"{architecture}.{name}": value for name, value in own.items()}
    general = {"general.architecture": architecture, "tokenizer.ggml.model": "no_vocab"}
    return {**general, **fields}


def _field(name: str, value: int | float | str) -> bytes:
    if isinstance(value, str):
        return _text(name) + struct.pack("<I", STRING) + _text(value)
    if isinstance(value, float):
        return _text(name) + struct.pack("<If", FLOAT32, value)
    return _text(name) + struct.pack("<II", UINT32, value)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
