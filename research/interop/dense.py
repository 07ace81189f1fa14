"""Decoders of LLaMA's lineage without experts, in Hugging Face's form: Mistral, Qwen 2 and 3, OLMo
2, Phi-3.
"""

from collections.abc import Mapping
from typing import Any

from research.core.errors import UserError
from research.interop.llama import (
    ATTENTION,
    CORE,
    DENSE,
    MLP,
    PRE_NORMS,
    QK_NORM,
    activation,
    biases,
    decoder,
)
from research.interop.modules import QKV, linear, norm
from research.interop.parts import Part, fixed
from research.interop.rotary import ORIGINAL, position, rope_fields, rope_kind, rotary, write_rotary
from research.interop.windows import layer_windows, one_window
from research.models.config import ModelConfig


def _late(fields: Mapping[str, Any], layer: int) -> bool:
    return layer >= fields["max_window_layers"]


def _every_layer(fields: Mapping[str, Any], layer: int) -> bool:
    return True


QWEN_WINDOWS = layer_windows(4096, _late, switch=True, max_window_layers=28)
MISTRAL = decoder(
    "mistral",
    "MistralForCausalLM",
    (*PRE_NORMS, *ATTENTION, *MLP),
    *CORE,
    DENSE,
    activation(),
    rotary(),
    one_window(4096),
    Part(defaults={"num_key_value_heads": 8}),
)
MINISTRAL = decoder(
    "ministral",
    "MinistralForCausalLM",
    (*PRE_NORMS, *ATTENTION, *MLP),
    *CORE,
    DENSE,
    activation(),
    rotary(),
    layer_windows(4096, _every_layer),
    Part(defaults={"num_key_value_heads": 8}),
)
QWEN2 = decoder(
    "qwen2",
    "Qwen2ForCausalLM",
    (*PRE_NORMS, *ATTENTION, *MLP),
    *CORE,
    DENSE,
    activation(),
    fixed({"attention.qkv_bias": True}),
    rotary(),
    QWEN_WINDOWS,
    Part(defaults={"num_key_value_heads": 32}),
)
QWEN3 = decoder(
    "qwen3",
    "Qwen3ForCausalLM",
    (*PRE_NORMS, *ATTENTION, *QK_NORM, *MLP),
    *CORE,
    DENSE,
    activation(),
    biases(default=False, out=True),
    fixed({"attention.qk_norm": "head"}),
    rotary(),
    QWEN_WINDOWS,
    Part(defaults={"num_key_value_heads": 32, "head_dim": 128}),
)
OLMO2 = decoder(
    "olmo2",
    "Olmo2ForCausalLM",
    (
        *ATTENTION,
        *QK_NORM,
        *norm("post_attention_layernorm", "attention_out_norm"),
        *MLP,
        *norm("post_feedforward_layernorm", "mlp_out_norm"),
    ),
    *CORE,
    DENSE,
    activation(),
    biases(default=False, out=True),
    fixed({"attention.qk_norm": "all", "norm.placement": "output"}),
    rotary(),
    Part(defaults={"rms_norm_eps": 1e-5}),
)


def _read_phi_rotary(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the positions: its scaling has three names and a length beside the group, and RoPE
    may be on a part of each head only.
    """
    rope = {"partial_rotary_factor": fields["partial_rotary_factor"], **rope_fields(fields)}
    part = rope.pop("partial_rotary_factor")
    # `su` and `yarn` are older names of it, as in transformers.
    if rope_kind(rope) in ("su", "yarn", "longrope"):
        rope |= {"rope_type": "longrope", ORIGINAL: fields[ORIGINAL]}
    elif rope_kind(rope) != "default":
        raise UserError(
            "rope_type", rope_kind(rope), "of a Phi-3 is not supported: only 'longrope' is."
        )

    longest = fields["max_position_embeddings"]
    values = {f"position.{name}": value for name, value in position(rope, longest).items()}
    head_dim = fields["hidden_size"] // fields["num_attention_heads"]
    values["position.rotary_dim"] = None if part == 1 else int(head_dim * part)
    return values


def _write_phi_rotary(config: ModelConfig) -> dict[str, Any]:
    fields = write_rotary(config)
    rotary_dim = config.position.rotary_dim
    fields["partial_rotary_factor"] = 1.0
    if rotary_dim is not None:
        fields["partial_rotary_factor"] = rotary_dim / config.attention.head_dim

    scaling = config.position.scaling
    fields[ORIGINAL] = config.max_length if scaling is None else scaling.original_length
    return fields


PHI3 = decoder(
    "phi3",
    "Phi3ForCausalLM",
    (
        *PRE_NORMS,
        *linear("self_attn.qkv_proj", *QKV),
        *linear("self_attn.o_proj", "attention/out", num_inputs=2),
        *linear("mlp.gate_up_proj", "mlp/gate", "mlp/up"),
        *linear("mlp.down_proj", "mlp/down"),
    ),
    *CORE,
    DENSE,
    activation(),
    Part(
        read=_read_phi_rotary,
        write=_write_phi_rotary,
        defaults={ORIGINAL: 4096, "partial_rotary_factor": 1.0, **rotary().defaults},
    ),
    one_window(None),
    Part(
        defaults={"rms_norm_eps": 1e-5},
        # Only the authors' own code reads these.
        inert=("full_attn_mod", "interpolate_factor"),
    ),
)
