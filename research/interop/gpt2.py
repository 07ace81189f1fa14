"""GPT-2 in Hugging Face's form (`transformers.GPT2LMHeadModel`)."""

from collections.abc import Mapping
from typing import Any

from research.core.errors import UserError
from research.interop.activations import THEIRS, to_tessera
from research.interop.architecture import Architecture
from research.interop.tensor import Tensor
from research.models.config import ModelConfig

_LAYER, _OURS = "transformer.h.{layer}", "{layer}"


def _heads(leaf: str) -> tuple[str, ...]:
    return tuple(f"{_OURS}/attention/{part}/{leaf}" for part in ("query", "key", "value"))


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    width, heads = fields["n_embd"], fields["n_head"]
    if fields["embd_pdrop"] != fields["resid_pdrop"]:
        raise UserError(f"embd_pdrop = {fields['embd_pdrop']} must equal resid_pdrop = {fields['resid_pdrop']}.")
    return {
        "vocab_size": fields["vocab_size"],
        "num_layers": fields["n_layer"],
        "embed_dim": width,
        "max_length": fields["n_positions"],
        "attention": {
            "num_heads": heads,
            "num_kv_heads": heads,
            "head_dim": width // heads,
            "qkv_bias": True,
            "out_bias": True,
        },
        "mlp": {
            "hidden_dim": 4 * width if fields["n_inner"] is None else fields["n_inner"],
            "activation": to_tessera(fields["activation_function"], "activation_function"),
            "gated": False,
            "bias": True,
        },
        "norm": {"kind": "layernorm", "placement": "pre", "epsilon": fields["layer_norm_epsilon"], "bias": True},
        "position": {"kind": "learned"},
        "tied_embeddings": fields["tie_word_embeddings"],
        "dropout": fields["resid_pdrop"],
        "init_stddev": fields["initializer_range"],
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_embd": config.embed_dim,
        "n_positions": config.max_length,
        "n_head": config.attention.num_heads,
        "n_inner": config.mlp.hidden_dim,
        "activation_function": THEIRS[config.mlp.activation],
        "layer_norm_epsilon": config.norm.epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "initializer_range": config.init_stddev,
    }


GPT2 = Architecture(
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    prefixes=("transformer.",),
    tensors=(
        Tensor("transformer.wte.weight", ("embed/embedding",), num_inputs=1),
        Tensor("transformer.wpe.weight", ("position_embed/embedding",), num_inputs=1),
        Tensor(f"{_LAYER}.ln_1.weight", (f"{_OURS}/attention_norm/scale",)),
        Tensor(f"{_LAYER}.ln_1.bias", (f"{_OURS}/attention_norm/bias",)),
        Tensor(f"{_LAYER}.attn.c_attn.weight", _heads("kernel"), num_inputs=1),
        Tensor(f"{_LAYER}.attn.c_attn.bias", _heads("bias")),
        Tensor(f"{_LAYER}.attn.c_proj.weight", (f"{_OURS}/attention/out/kernel",), num_inputs=2),
        Tensor(f"{_LAYER}.attn.c_proj.bias", (f"{_OURS}/attention/out/bias",)),
        Tensor(f"{_LAYER}.ln_2.weight", (f"{_OURS}/mlp_norm/scale",)),
        Tensor(f"{_LAYER}.ln_2.bias", (f"{_OURS}/mlp_norm/bias",)),
        Tensor(f"{_LAYER}.mlp.c_fc.weight", (f"{_OURS}/mlp/up/kernel",), num_inputs=1),
        Tensor(f"{_LAYER}.mlp.c_fc.bias", (f"{_OURS}/mlp/up/bias",)),
        Tensor(f"{_LAYER}.mlp.c_proj.weight", (f"{_OURS}/mlp/down/kernel",), num_inputs=1),
        Tensor(f"{_LAYER}.mlp.c_proj.bias", (f"{_OURS}/mlp/down/bias",)),
        Tensor("transformer.ln_f.weight", ("final_norm/scale",)),
        Tensor("transformer.ln_f.bias", ("final_norm/bias",)),
        Tensor("lm_head.weight", ("unembed",), num_inputs=1, transposed=True),
    ),
    copies={"lm_head.weight": "transformer.wte.weight"},
    ignored={r"transformer\.h\.\d+\.attn\.(bias|masked_bias)": "the causal mask, which is no parameter"},
    required=("vocab_size", "n_layer", "n_embd", "n_head", "n_positions"),
    defaults={
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "initializer_range": 0.02,
    },
    only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    inert=(
        # A head for other tasks; a field that n_positions repeats; the order of a product's factors.
        *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
        *("n_ctx", "reorder_and_upcast_attn"),
    ),
    dropouts=("attn_pdrop",),
    read=_read,
    write=_write,
)
