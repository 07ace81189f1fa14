"""MPT in Hugging Face's form (`transformers.MptForCausalLM`)."""

from collections.abc import Mapping
from typing import Any

from research.core.errors import UserError, listed, shown
from research.interop.architecture import INERT, Architecture
from research.interop.modules import QKV, UNEMBED, linear, multi_head, norm, table, within
from research.interop.unread import is_off, is_unread
from research.models.config import ModelConfig

# Fields of `attn_config` that have one supported value each, and those that change no logit.
_ATTENTION = {
    "alibi": True,
    "alibi_bias_max": 8,
    "attn_type": "multihead_attention",
    "clip_qkv": None,
    "prefix_lm": False,
    "qk_ln": False,
}
_ATTENTION_INERT = (*INERT, "attn_impl", "attn_pdrop", "attn_uses_sequence_id")


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    attention = _attention(fields["attn_config"])
    width = fields["d_model"]
    heads = multi_head(width, fields["n_heads"], bias=False)
    return {
        "vocab_size": fields["vocab_size"],
        "num_layers": fields["n_layers"],
        "embed_dim": width,
        "max_length": fields["max_seq_len"],
        "attention": heads | {"scale": attention["softmax_scale"]},
        "mlp": {"hidden_dim": 4 * width, "activation": "gelu", "gated": False},
        "norm": {"kind": "layernorm", "placement": "pre", "epsilon": fields["layer_norm_epsilon"]},
        "position": {"kind": "alibi"},
        "tied_embeddings": fields["tie_word_embeddings"],
        "dropout": fields["resid_pdrop"],
        "init_stddev": fields["initializer_range"],
    }


def _attention(given: Any) -> dict[str, Any]:
    """Returns the fields of `attn_config`, of which only `softmax_scale` may vary."""
    if not isinstance(given, dict | None):
        raise UserError("attn_config", given, "must be a group of fields.")
    fields = {"softmax_scale": None, **(given or {})}
    faults = []
    for name, value in fields.items():
        if not _is_supported(name, value):
            faults.append(f"attn_config.{name} = {shown(value)} is not supported")
    if faults:
        raise UserError(f"{listed(faults, '; ')}.")
    return fields


def _is_supported(name: str, value: Any) -> bool:
    """Returns whether a field of `attn_config` is read, changes no logit, or has its one value."""
    if name in _ATTENTION:
        return value == _ATTENTION[name]
    if name == "softmax_scale" or name in _ATTENTION_INERT:
        return True
    return is_unread(name) or is_off(value)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_layers": config.num_layers,
        "d_model": config.embed_dim,
        "max_seq_len": config.max_length,
        "n_heads": config.attention.num_heads,
        "attn_config": {"model_type": "", **_ATTENTION, "softmax_scale": config.attention.scale},
        "expansion_ratio": 4,
        "layer_norm_epsilon": config.norm.epsilon,
        "no_bias": True,
        "tie_word_embeddings": config.tied_embeddings,
        "resid_pdrop": config.dropout,
        "initializer_range": config.init_stddev,
    }


MPT = Architecture(
    model_type="mpt",
    model_class="MptForCausalLM",
    prefixes=("transformer.",),
    tensors=(
        table("transformer.wte", "embed"),
        *within(
            "transformer.blocks.{layer}",
            "{layer}",
            (
                *norm("norm_1", "attention_norm"),
                *linear("attn.Wqkv", *QKV),
                *linear("attn.out_proj", "attention/out", num_inputs=2),
                *norm("norm_2", "mlp_norm"),
                *linear("ffn.up_proj", "mlp/up"),
                *linear("ffn.down_proj", "mlp/down"),
            ),
        ),
        *norm("transformer.norm_f", "final_norm"),
        UNEMBED,
    ),
    copies={"lm_head.weight": "transformer.wte.weight"},
    required=("vocab_size", "n_layers", "d_model", "n_heads", "max_seq_len"),
    defaults={
        "attn_config": None,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
    },
    only={"expansion_ratio": 4, "logit_scale": None, "no_bias": True},
    inert=(
        # How it was trained and run; `learned_pos_emb` has no effect with ALiBi.
        "embedding_fraction",
        "init_config",
        "init_device",
        "norm_type",
        "verbose",
        "learned_pos_emb",
        "fc_type",
    ),
    read=_read,
    write=_write,
)
