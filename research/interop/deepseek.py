"""DeepSeek-V3 in Hugging Face's form; also R1, V3.1 and what else has its model_type."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from research.core.errors import UserError
from research.interop.llama import MLP, PRE_NORMS, RMS, SIZES, activation, decoder
from research.interop.mixtures import LOADS, experts
from research.interop.modules import UNEMBED, linear, norm, table, within
from research.interop.parts import Part, fixed, named
from research.interop.rotary import (
    read_rotary,
    rope_fields,
    rope_kind,
    rotary,
    write_rotary,
    yarn_amplitude,
)
from research.interop.tensor import TensorSpec
from research.models.config import LatentConfig, ModelConfig


def _latent(config: ModelConfig) -> LatentConfig:
    if config.attention.latent is None:
        raise UserError("attention.latent is not set")
    return config.attention.latent


def _interleaved(width: int) -> Int[np.ndarray, "width"]:
    """Returns for each interleaved rotary column its column in the half-split layout:
    width 4 -> [0, 2, 1, 3].
    """
    return np.arange(width).reshape(2, -1).T.reshape(-1)


def _query_order(config: ModelConfig) -> Int[np.ndarray, "outputs"]:
    unrotated = config.attention.head_dim
    rotary = _latent(config).rope_dim
    head = np.concatenate([np.arange(unrotated), unrotated + _interleaved(rotary)])

    # [N, 1] + [H] -> [N · H]: the order within a head, for each head.
    first_columns = np.arange(config.attention.num_heads)[:, None] * (unrotated + rotary)
    return (first_columns + head).reshape(-1)


def _latent_order(config: ModelConfig) -> Int[np.ndarray, "outputs"]:
    latent = _latent(config)
    rotary = latent.kv_dim + _interleaved(latent.rope_dim)
    return np.concatenate([np.arange(latent.kv_dim), rotary])


def _key_value_order(config: ModelConfig) -> Int[np.ndarray, "outputs"]:
    """Returns the order of the concatenated keys and values: head by head, its key and then its
    value.
    """
    num_heads = config.attention.num_heads
    key_columns = num_heads * config.attention.head_dim
    value_columns = num_heads * _latent(config).value_dim

    # Two heads of width 2: keys [[0, 1], [2, 3]], values [[4, 5], [6, 7]]
    # -> [0, 1, 4, 5, 2, 3, 6, 7]
    keys = np.arange(key_columns).reshape(num_heads, -1)
    values = key_columns + np.arange(value_columns).reshape(num_heads, -1)
    return np.concatenate([keys, values], axis=1).reshape(-1)


def _has_query_latent(config: ModelConfig) -> bool:
    return _latent(config).q_dim is not None


def _has_no_query_latent(config: ModelConfig) -> bool:
    return not _has_query_latent(config)


ATTENTION = (
    *linear("self_attn.q_a_proj", "attention/query_down"),
    *norm("self_attn.q_a_layernorm", "attention/query_norm"),
    *linear("self_attn.q_b_proj", "attention/query", order=_query_order, when=_has_query_latent),
    *linear("self_attn.q_proj", "attention/query", order=_query_order, when=_has_no_query_latent),
    *linear(
        "self_attn.kv_a_proj_with_mqa",
        "attention/latent",
        "attention/turned_key",
        order=_latent_order,
    ),
    *norm("self_attn.kv_a_layernorm", "attention/latent_norm"),
    *linear("self_attn.kv_b_proj", "attention/key", "attention/value", order=_key_value_order),
    *linear("self_attn.o_proj", "attention/out", num_inputs=2),
)
# The head width of its config.json is the rotary part of a head (`qk_rope_head_dim`).
HEADS = Part(
    read=lambda fields: {"attention.num_kv_heads": fields["num_attention_heads"]},
    write=lambda config: {"num_key_value_heads": config.attention.num_kv_heads},
    inert=("num_key_value_heads", "head_dim"),
)
LATENT = named(
    {
        "kv_lora_rank": "attention.latent.kv_dim",
        "q_lora_rank": "attention.latent.q_dim",
        "qk_nope_head_dim": "attention.head_dim",
        "qk_rope_head_dim": "attention.latent.rope_dim",
        "v_head_dim": "attention.latent.value_dim",
    },
    q_lora_rank=1536,
)


def _read_scale(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the positions, and the factor on the scores that their scaling has
    (`mscale_all_dim`).
    """
    rope = rope_fields(fields)
    values = read_rotary(fields)
    weight = rope.get("mscale_all_dim") if rope_kind(rope) == "yarn" else None
    if not weight:
        return values

    # Both queries and keys are scaled by the amplitude.
    amplitude = yarn_amplitude(values["position.scaling"]["factor"], weight)
    head_dim = fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]
    return values | {"attention.scale": amplitude**2 / math.sqrt(head_dim)}


def _write_scale(config: ModelConfig) -> dict[str, Any]:
    fields = write_rotary(config)
    scale = config.attention.scale
    scaling = config.position.scaling
    if scale is None:
        return fields
    if scaling is None or scaling.kind != "yarn" or scaling.factor == 1:
        raise UserError("attention.scale needs position.scaling of kind 'yarn'")

    # The inverse of `_read_scale`: scale = (0.1 · weight · ln(factor) + 1)² / √head_dim.
    head_dim = config.attention.head_dim + _latent(config).rope_dim
    amplitude = math.sqrt(scale * math.sqrt(head_dim))
    weight = (amplitude - 1) / (0.1 * math.log(scaling.factor))
    # Twelve digits, so that 1 is written as 1: the root and its square are not inverse to the last
    # bit.
    weight = float(f"{weight:.12g}")
    rope = fields["rope_scaling"] | {"mscale_all_dim": weight}
    if scaling.amplitude == 1:
        # The authors' own code reads `mscale`, not `attention_factor`.
        del rope["attention_factor"]
        rope["mscale"] = weight
    return fields | {"rope_scaling": rope}


BLOCK = (
    *PRE_NORMS,
    *ATTENTION,
    *MLP,
    *linear("mlp.gate", "mlp/router"),
    TensorSpec("mlp.gate.e_score_correction_bias", ("mlp/selection_bias",)),
    *experts("mlp", "gate_proj", "up_proj", "down_proj"),
    *linear("mlp.shared_experts.gate_proj", "mlp/shared/gate"),
    *linear("mlp.shared_experts.up_proj", "mlp/shared/up"),
    *linear("mlp.shared_experts.down_proj", "mlp/shared/down"),
)


def _is_tied(config: ModelConfig) -> bool:
    return config.tied_embeddings


_LAYER = "model.layers.{mtp}"
# As released: each of these layers repeats the main model's embedding and output projection.
MTP_LAYERS = (
    dataclasses.replace(table(f"{_LAYER}.embed_tokens", "embed"), copy=True),
    *norm(f"{_LAYER}.enorm", "{mtp}/embed_norm"),
    *norm(f"{_LAYER}.hnorm", "{mtp}/hidden_norm"),
    *linear(f"{_LAYER}.eh_proj", "{mtp}/projection"),
    *within(_LAYER, "{mtp}/block", BLOCK),
    *norm(f"{_LAYER}.shared_head.norm", "{mtp}/final_norm"),
    dataclasses.replace(UNEMBED, theirs=f"{_LAYER}.shared_head.head.weight", copy=True),
    dataclasses.replace(table(f"{_LAYER}.shared_head.head", "embed"), copy=True, when=_is_tied),
)


def _read_dense(fields: Mapping[str, Any]) -> dict[str, Any]:
    first = fields["first_k_dense_replace"]
    count = fields["num_hidden_layers"]
    width = fields["intermediate_size" if first else "moe_intermediate_size"]
    return {
        "layers.experts": [i >= first for i in range(count)],
        "mlp.hidden_dim": width,
        "experts.shared_dim": fields["n_shared_experts"] * fields["moe_intermediate_size"],
    }


def _write_dense(config: ModelConfig) -> dict[str, Any]:
    if config.experts is None or config.experts.shared_dim % config.experts.hidden_dim:
        raise UserError("experts.shared_dim is not a multiple of experts.hidden_dim")
    if config.head.mtp_depth and not config.layers()[-1].experts:
        raise UserError("head.mtp_depth needs experts in the last layer, for its layers have them")
    return {
        "first_k_dense_replace": sum(not layer.experts for layer in config.layers()),
        "intermediate_size": config.mlp.hidden_dim,
        "n_shared_experts": config.experts.shared_dim // config.experts.hidden_dim,
    }


DEEPSEEK_V3 = decoder(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    BLOCK,
    SIZES,
    RMS,
    HEADS,
    LATENT,
    named(
        {
            "n_routed_experts": "experts.num_experts",
            "num_experts_per_tok": "experts.experts_per_token",
            "moe_intermediate_size": "experts.hidden_dim",
            "norm_topk_prob": "experts.renormalize",
            "n_group": "experts.num_groups",
            "topk_group": "experts.groups_per_token",
            "routed_scaling_factor": "experts.scale",
        },
        norm_topk_prob=True,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
    ),
    fixed({"experts.score": "sigmoid", "experts.selection_bias": True}),
    Part(
        read=_read_dense,
        write=_write_dense,
        required=("intermediate_size",),
        defaults={"n_shared_experts": 1, "first_k_dense_replace": 3},
    ),
    named({"num_nextn_predict_layers": "head.mtp_depth"}, num_nextn_predict_layers=1),
    activation(),
    Part(read=_read_scale, write=_write_scale, defaults=rotary().defaults),
    LOADS,
    Part(
        only={
            "rope_interleave": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
        },
        # Sizes that follow from other fields; how training balances the experts and where they run.
        inert=("qk_head_dim", "aux_loss_alpha", "ep_size", "seq_aux", "num_mtp_layers"),
    ),
    further=MTP_LAYERS,
    counted={"num_nextn_predict_layers": r"\.eh_proj\.weight$"},
    ignored={
        # transformers leaves it out by this number, too.
        r"model\.layers\.61\..*": "a multi-token prediction layer, which config.json does not count"
    },
)
