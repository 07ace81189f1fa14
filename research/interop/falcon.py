"""Falcon and Falcon 2 in Hugging Face's form (`transformers.FalconForCausalLM`)."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from research.core.errors import UserError
from research.interop.activations import THEIRS, to_tessera
from research.interop.architecture import Architecture
from research.interop.modules import QKV, UNEMBED, linear, multi_head, norm, table, within
from research.interop.rotary import position, rope_fields, rope_kind, write_rotary
from research.models.config import ModelConfig


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    width = fields["hidden_size"]
    attention = multi_head(width, fields["num_attention_heads"], fields["bias"])
    hidden_dim = fields["ffn_hidden_size"]
    return {
        "vocab_size": fields["vocab_size"],
        "num_layers": fields["num_hidden_layers"],
        "embed_dim": width,
        "max_length": fields["max_position_embeddings"],
        "attention": attention | {"num_kv_heads": _kv_heads(fields)},
        "mlp": {
            "hidden_dim": 4 * width if hidden_dim is None else hidden_dim,
            "activation": to_tessera(fields["activation"], "activation"),
            "gated": False,
            "bias": fields["bias"],
        },
        "norm": {
            "kind": "layernorm",
            "placement": _placement(fields),
            "epsilon": fields["layer_norm_epsilon"],
            "bias": True,
        },
        "position": _position(fields),
        "tied_embeddings": fields["tie_word_embeddings"],
        "dropout": fields["hidden_dropout"],
        "init_stddev": fields["initializer_range"],
    }


def _position(fields: Mapping[str, Any]) -> dict[str, Any]:
    if fields["alibi"]:
        return {"kind": "alibi_bfloat16"}
    rope = rope_fields(fields)
    if rope_kind(rope) == "dynamic":
        raise UserError("rope_type", "dynamic", "is not supported.")
    return position(rope, fields["max_position_embeddings"])


def _kv_heads(fields: Mapping[str, Any]) -> int:
    num_heads = fields["num_attention_heads"]
    kv_heads = fields["num_kv_heads"]
    if fields["new_decoder_architecture"]:
        return num_heads if kv_heads is None else kv_heads
    if fields["multi_query"]:
        return 1
    if kv_heads not in (None, num_heads):
        raise UserError(
            "num_kv_heads",
            kv_heads,
            f"must be num_attention_heads = {num_heads} without multi_query.",
        )
    return num_heads


def _placement(fields: Mapping[str, Any]) -> str:
    norms = fields["num_ln_in_parallel_attn"]
    new = fields["new_decoder_architecture"]
    parallel = fields["parallel_attn"]
    # Falcon 7B has one norm, 40B two, Falcon 2 one with the new design.
    supported_norms = (None, 1, 2) if new else (None, 1)
    if (new and not parallel) or norms not in supported_norms:
        raise UserError(
            "num_ln_in_parallel_attn",
            norms,
            f"and parallel_attn = {parallel!r} are not supported with new_decoder_architecture = "
            f"{new!r}.",
        )
    if new:
        return "parallel" if norms == 1 else "parallel_pair"
    return "parallel" if parallel else "pre"


def _write(config: ModelConfig) -> dict[str, Any]:
    attention = config.attention
    placement = config.norm.placement
    # The older design has neither two parallel norms nor grouped-query attention.
    one_or_all = attention.num_kv_heads in (1, attention.num_heads)
    older = one_or_all and placement != "parallel_pair"
    num_norms = 2 if placement == "parallel_pair" else 1
    rotary = write_rotary(config) if config.position.kind == "rotary" else {}
    return rotary | {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "max_position_embeddings": config.max_length,
        "num_attention_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "new_decoder_architecture": not older,
        "multi_query": attention.num_kv_heads == 1,
        "parallel_attn": placement.startswith("parallel"),
        "num_ln_in_parallel_attn": None if older else num_norms,
        "bias": attention.qkv_bias,
        "ffn_hidden_size": config.mlp.hidden_dim,
        "activation": THEIRS[config.mlp.activation],
        "layer_norm_epsilon": config.norm.epsilon,
        "alibi": config.position.kind == "alibi_bfloat16",
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_dropout": config.dropout,
        "attention_dropout": 0.0,
        "initializer_range": config.init_stddev,
    }


def _by_group(config: ModelConfig) -> Int[np.ndarray, "outputs"]:
    """Returns the order of the concatenated queries, keys and values: each key/value head comes
    after the query heads of its group.
    """
    c = config.attention
    # 4 query heads, 2 key/value heads: queries [[0, 1], [2, 3]], keys [[4], [5]],
    # values [[6], [7]] -> [0, 1, 4, 6, 2, 3, 5, 7]
    queries = np.arange(c.num_heads).reshape(c.num_kv_heads, -1)
    keys = c.num_heads + np.arange(c.num_kv_heads)[:, None]
    values = keys + c.num_kv_heads
    heads = np.concatenate([queries, keys, values], axis=1).reshape(-1)

    # [heads] -> [heads, H] -> [heads · H]
    columns = np.arange(c.head_dim)
    return (heads[:, None] * c.head_dim + columns).reshape(-1)


def _with_placement(*placements: str) -> Callable[[ModelConfig], bool]:
    return lambda config: config.norm.placement in placements


FALCON = Architecture(
    model_type="falcon",
    model_class="FalconForCausalLM",
    prefixes=("transformer.",),
    tensors=(
        table("transformer.word_embeddings", "embed"),
        *within(
            "transformer.h.{layer}",
            "{layer}",
            (
                *norm("input_layernorm", "attention_norm", _with_placement("pre", "parallel")),
                *norm("ln_attn", "attention_norm", _with_placement("parallel_pair")),
                *linear("self_attention.query_key_value", *QKV, order=_by_group),
                *linear("self_attention.dense", "attention/out", num_inputs=2),
                *norm("post_attention_layernorm", "mlp_norm", _with_placement("pre")),
                *norm("ln_mlp", "mlp_norm", _with_placement("parallel_pair")),
                *linear("mlp.dense_h_to_4h", "mlp/up"),
                *linear("mlp.dense_4h_to_h", "mlp/down"),
            ),
        ),
        *norm("transformer.ln_f", "final_norm"),
        UNEMBED,
    ),
    copies={"lm_head.weight": "transformer.word_embeddings.weight"},
    ignored={
        r"transformer\.h\.\d+\.self_attention\.rotary_emb\.inv_freq": "frequencies that the "
        "config gives"
    },
    required=("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads"),
    defaults={
        "num_kv_heads": None,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "num_ln_in_parallel_attn": None,
        "bias": False,
        "alibi": False,
        "ffn_hidden_size": None,
        "activation": "gelu",
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "rope_parameters": None,
        "tie_word_embeddings": True,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
    },
    only={"apply_residual_connection_post_layernorm": False},
    # A factor that ffn_hidden_size repeats.
    inert=("ff_factor",),
    read=_read,
    write=_write,
)
