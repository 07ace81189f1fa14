"""Decoders with experts in Hugging Face's form: Mixtral, Qwen 2 and 3 MoE, gpt-oss.

transformers 5 has the experts of a layer in one tensor in memory; on disk each has its own, as
released, except in gpt-oss.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from research.core.errors import UserError
from research.interop.llama import (
    ATTENTION,
    CORE,
    MLP,
    PRE_NORMS,
    QK_NORM,
    activation,
    biases,
    decoder,
)
from research.interop.modules import linear
from research.interop.parts import Part, fixed, named, renamed_field
from research.interop.rotary import rotary
from research.interop.tensor import TensorSpec
from research.interop.windows import layer_windows, one_window
from research.models.config import ModelConfig

# Only training reads these: Tessera's loss for the load of the experts is one for each layer.
LOADS = Part(inert=("output_router_logits", "router_aux_loss_coef"))


def experts(block: str, gate: str, up: str, down: str) -> tuple[TensorSpec, ...]:
    """Returns the tensors of a layer's experts, one per expert."""
    ours = {gate: "gate", up: "up", down: "down"}
    return tuple(
        TensorSpec(
            f"{block}.experts.{{expert}}.{theirs}.weight",
            (f"mlp/experts/{name}/kernel",),
            num_inputs=1,
            transposed=True,
        )
        for theirs, name in ours.items()
    )


MIXTRAL = decoder(
    "mixtral",
    "MixtralForCausalLM",
    (
        *PRE_NORMS,
        *ATTENTION,
        *linear("block_sparse_moe.gate", "mlp/router"),
        *experts("block_sparse_moe", "w1", "w3", "w2"),
    ),
    *CORE,
    named({"intermediate_size": "experts.hidden_dim"}),
    named(
        {
            "num_local_experts": "experts.num_experts",
            "num_experts_per_tok": "experts.experts_per_token",
        },
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    Part(read=lambda fields: {"mlp.hidden_dim": fields["intermediate_size"]}),
    activation(),
    rotary(1e6),
    one_window(None),
    LOADS,
    Part(defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5}, inert=("router_jitter_noise",)),
)


def _read_sparse(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns which layers have experts, and the width of the others' MLP."""
    dense = fields["mlp_only_layers"] or ()
    step = fields["decoder_sparse_step"]
    # Step 2, layer 3 dense -> [False, True, False, False, False, True, …]
    has_experts = []
    for layer in range(fields["num_hidden_layers"]):
        has_experts.append((layer + 1) % step == 0 and layer not in dense)

    # Where all layers have experts, any width will do for the MLP that none has.
    field = "moe_intermediate_size" if all(has_experts) else "intermediate_size"
    return {"layers.experts": has_experts, "mlp.hidden_dim": fields[field]}


SPARSE = Part(
    read=_read_sparse,
    write=lambda config: {
        "intermediate_size": config.mlp.hidden_dim,
        "mlp_only_layers": [i for i, layer in enumerate(config.layers()) if not layer.experts],
        "decoder_sparse_step": 1,
    },
    required=("intermediate_size",),
    defaults={"mlp_only_layers": None, "decoder_sparse_step": 1},
)
QWEN_EXPERTS = named(
    {
        "num_experts_per_tok": "experts.experts_per_token",
        "moe_intermediate_size": "experts.hidden_dim",
        "norm_topk_prob": "experts.renormalize",
    },
    norm_topk_prob=False,
)
# transformers 5 writes the second name.
NUM_EXPERTS = ("num_experts", "num_local_experts", "experts.num_experts")
QWEN2_MOE = decoder(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    (
        *PRE_NORMS,
        *ATTENTION,
        *MLP,
        *linear("mlp.gate", "mlp/router"),
        *experts("mlp", "gate_proj", "up_proj", "down_proj"),
        *linear("mlp.shared_expert.gate_proj", "mlp/shared/gate"),
        *linear("mlp.shared_expert.up_proj", "mlp/shared/up"),
        *linear("mlp.shared_expert.down_proj", "mlp/shared/down"),
        *linear("mlp.shared_expert_gate", "mlp/shared_gate"),
    ),
    *CORE,
    SPARSE,
    QWEN_EXPERTS,
    renamed_field(*NUM_EXPERTS, default=60),
    named({"shared_expert_intermediate_size": "experts.shared_dim"}),
    fixed({"experts.shared_gate": True}),
    activation(),
    biases(default=True, field="qkv_bias"),
    rotary(),
    layer_windows(
        4096,
        lambda fields, i: i % 2 == 0 and i < fields["max_window_layers"],
        switch=True,
        max_window_layers=28,
    ),
    LOADS,
    Part(defaults={"num_key_value_heads": 16}),
)
QWEN3_MOE = decoder(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    (
        *PRE_NORMS,
        *ATTENTION,
        *QK_NORM,
        *MLP,
        *linear("mlp.gate", "mlp/router"),
        *experts("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
    *CORE,
    SPARSE,
    QWEN_EXPERTS,
    renamed_field(*NUM_EXPERTS, default=128),
    activation(),
    biases(default=False, out=True),
    fixed({"attention.qk_norm": "head"}),
    rotary(),
    one_window(4096, switch=True),
    LOADS,
    Part(defaults={"num_key_value_heads": 4}, inert=("max_window_layers",)),
)


def _interleaved(config: ModelConfig) -> Int[np.ndarray, "outputs"]:
    """Returns the interleaved columns of gate and up: gate 0, up 0, gate 1, up 1, …"""
    if config.experts is None:
        raise UserError("experts is not set")
    # Width 3: gate [0, 1, 2], up [3, 4, 5] -> [0, 3, 1, 4, 2, 5]
    gate_up = np.arange(2 * config.experts.hidden_dim).reshape(2, -1)
    return gate_up.T.reshape(-1)


def _all_experts(theirs: str, leaf: str, *ours: str) -> TensorSpec:
    num_inputs = 1 if leaf == "kernel" else 0
    order = _interleaved if len(ours) > 1 else None
    return TensorSpec(
        f"mlp.experts.{theirs}",
        tuple(f"mlp/experts/{name}/{leaf}" for name in ours),
        num_inputs=num_inputs,
        experts=True,
        order=order,
    )


def _read_clamp(fields: Mapping[str, Any]) -> dict[str, Any]:
    if fields["swiglu_limit"] is None:
        raise UserError("swiglu_limit, which is mlp.clamp, must be set.")
    return {"mlp.clamp": fields["swiglu_limit"], "mlp.hidden_dim": fields["intermediate_size"]}


GPT_OSS = decoder(
    "gpt_oss",
    "GptOssForCausalLM",
    (
        *PRE_NORMS,
        *ATTENTION,
        TensorSpec("self_attn.sinks", ("attention/sinks",)),
        *linear("mlp.router", "mlp/router"),
        _all_experts("gate_up_proj", "kernel", "gate", "up"),
        _all_experts("gate_up_proj_bias", "bias", "gate", "up"),
        _all_experts("down_proj", "kernel", "down"),
        _all_experts("down_proj_bias", "bias", "down"),
    ),
    *CORE,
    named(
        {
            "intermediate_size": "experts.hidden_dim",
            "num_local_experts": "experts.num_experts",
            "num_experts_per_tok": "experts.experts_per_token",
        },
        num_local_experts=128,
        num_experts_per_tok=4,
    ),
    Part(
        read=_read_clamp,
        write=lambda config: {"swiglu_limit": config.mlp.clamp},
        defaults={"swiglu_limit": 7.0},
    ),
    fixed(
        {
            "attention.sinks": True,
            "mlp.activation": "gelu_sigmoid",
            "mlp.bias": True,
            "mlp.up_offset": 1.0,
            "experts.router_bias": True,
        }
    ),
    biases(default=True, out=True),
    rotary(
        150_000.0,
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    layer_windows(128, lambda _, i: i % 2 == 0),
    LOADS,
    Part(
        defaults={"num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5},
        only={"hidden_act": "silu", "swiglu_alpha": 1.702},
        # Other names of fields that are read.
        inert=("experts_per_token", "initial_context_length"),
    ),
)
