"""GPT and GPT-2 in Hugging Face's form (`transformers.OpenAIGPTLMHeadModel` and
`GPT2LMHeadModel`).
"""

import functools
from collections.abc import Mapping
from typing import Any

from research.core.errors import UserError, nearest
from research.interop.activations import THEIRS, to_tessera
from research.interop.architecture import Architecture
from research.interop.modules import QKV, UNEMBED, linear, multi_head, norm, table, within
from research.interop.tensor import TensorSpec
from research.models.config import ModelConfig

# The first GPT's names of activations: its "gelu" is the tanh approximation.
_FIRST_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}


def _model(
    fields: Mapping[str, Any], hidden_dim: int, activation: str, placement: str
) -> dict[str, Any]:
    width = fields["n_embd"]
    num_heads = fields["n_head"]
    if fields["embd_pdrop"] != fields["resid_pdrop"]:
        raise UserError(
            "embd_pdrop",
            fields["embd_pdrop"],
            f"must equal resid_pdrop = {fields['resid_pdrop']!r}.",
        )
    return {
        "vocab_size": fields["vocab_size"],
        "num_layers": fields["n_layer"],
        "embed_dim": width,
        "max_length": fields["n_positions"],
        "attention": multi_head(width, num_heads, bias=True),
        "mlp": {"hidden_dim": hidden_dim, "activation": activation, "gated": False, "bias": True},
        "norm": {
            "kind": "layernorm",
            "placement": placement,
            "epsilon": fields["layer_norm_epsilon"],
            "bias": True,
        },
        "position": {"kind": "learned"},
        "tied_embeddings": fields["tie_word_embeddings"],
        "dropout": fields["resid_pdrop"],
        "init_stddev": fields["initializer_range"],
    }


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    hidden_dim = 4 * fields["n_embd"] if fields["n_inner"] is None else fields["n_inner"]
    activation = to_tessera(fields["activation_function"], "activation_function")
    return _model(fields, hidden_dim, activation, "pre")


def _read_first(fields: Mapping[str, Any]) -> dict[str, Any]:
    name = fields["afn"]
    if name not in _FIRST_ACTIVATIONS:
        raise UserError("afn", name, f"is not supported. {nearest(str(name), _FIRST_ACTIVATIONS)}")
    return _model(fields, 4 * fields["n_embd"], _FIRST_ACTIVATIONS[name], "post")


def _fields(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_embd": config.embed_dim,
        "n_positions": config.max_length,
        "n_head": config.attention.num_heads,
        "layer_norm_epsilon": config.norm.epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "initializer_range": config.init_stddev,
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return _fields(config) | {
        "n_inner": config.mlp.hidden_dim,
        "activation_function": THEIRS[config.mlp.activation],
    }


def _write_first(config: ModelConfig) -> dict[str, Any]:
    activation = config.mlp.activation
    # Of two names of an activation the first is written.
    theirs = {ours: name for name, ours in reversed(_FIRST_ACTIVATIONS.items())}
    if activation not in theirs:
        raise UserError("mlp.activation", activation, "is not what 'openai-gpt' has")
    return _fields(config) | {"afn": theirs[activation]}


_conv = functools.partial(linear, transposed=False)
_BLOCK = (
    *norm("ln_1", "attention_norm"),
    *_conv("attn.c_attn", *QKV),
    *_conv("attn.c_proj", "attention/out", num_inputs=2),
    *norm("ln_2", "mlp_norm"),
    *_conv("mlp.c_fc", "mlp/up"),
    *_conv("mlp.c_proj", "mlp/down"),
)


def _tensors(tokens: str, positions: str) -> tuple[TensorSpec, ...]:
    return (
        table(f"transformer.{tokens}", "embed"),
        table(f"transformer.{positions}", "position_embed"),
        *within("transformer.h.{layer}", "{layer}", _BLOCK),
        *norm("transformer.ln_f", "final_norm"),
        UNEMBED,
    )


_REQUIRED = ("vocab_size", "n_layer", "n_embd", "n_head", "n_positions")
_DEFAULTS = {
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "initializer_range": 0.02,
}
GPT = Architecture(
    model_type="openai-gpt",
    model_class="OpenAIGPTLMHeadModel",
    prefixes=("transformer.",),
    tensors=_tensors("tokens_embed", "positions_embed"),
    copies={"lm_head.weight": "transformer.tokens_embed.weight"},
    ignored={r"transformer\.h\.\d+\.attn\.bias": "the causal mask, which is no parameter"},
    required=_REQUIRED,
    defaults=_DEFAULTS | {"afn": "gelu"},
    # A field that n_positions repeats; tokens that fine-tuning was to add.
    inert=("n_ctx", "n_special", "predict_special_tokens"),
    read=_read_first,
    write=_write_first,
)

GPT2 = Architecture(
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    prefixes=("transformer.",),
    tensors=_tensors("wte", "wpe"),
    copies={"lm_head.weight": "transformer.wte.weight"},
    ignored={
        r"transformer\.h\.\d+\.attn\.(bias|masked_bias)": "the causal mask, which is no parameter"
    },
    required=_REQUIRED,
    defaults=_DEFAULTS | {"n_inner": None, "activation_function": "gelu_new"},
    only={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    # A field that n_positions repeats; the order of a product's factors.
    inert=("n_ctx", "reorder_and_upcast_attn"),
    read=_read,
    write=_write,
)
