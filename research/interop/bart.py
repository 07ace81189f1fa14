"""BART and mBART in Hugging Face's form (`transformers.BartForConditionalGeneration`)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from research.core.errors import UserError
from research.interop.activations import THEIRS, to_tessera
from research.interop.architecture import Architecture
from research.interop.modules import UNEMBED, linear, multi_head, norm, projections, table, within
from research.interop.tensor import TensorSpec
from research.models.config import ModelConfig

# The first rows of the position embeddings, which no token has.
_OFFSET = 2


def _read(placement: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    width = fields["d_model"]
    num_heads = fields["encoder_attention_heads"]
    for name in ("ffn_dim", "attention_heads"):
        encoder = fields[f"encoder_{name}"]
        decoder = fields[f"decoder_{name}"]
        if encoder != decoder:
            raise UserError(f"decoder_{name}", decoder, f"must equal encoder_{name} = {encoder!r}.")

    decoder_start_id = fields["decoder_start_token_id"]
    if decoder_start_id is None:
        # BART starts with its end of text, which transformers leaves out.
        decoder_start_id = 2
    return {
        "structure": "encoder_decoder",
        "vocab_size": fields["vocab_size"],
        "num_layers": fields["decoder_layers"],
        "encoder_layers": fields["encoder_layers"],
        "embed_dim": width,
        "max_length": fields["max_position_embeddings"],
        "attention": multi_head(width, num_heads, bias=True),
        "mlp": {
            "hidden_dim": fields["encoder_ffn_dim"],
            "activation": to_tessera(fields["activation_function"], "activation_function"),
            "gated": False,
            "bias": True,
        },
        "norm": {"kind": "layernorm", "placement": placement, "epsilon": 1e-5, "bias": True},
        "position": {"kind": "learned", "offset": _OFFSET},
        "embedding": {"norm": True},
        "head": {"bias": fields["architectures"][0].endswith("ForConditionalGeneration")},
        "decoder_start_id": decoder_start_id,
        "tied_embeddings": fields["tie_word_embeddings"],
        "scale_embeddings": fields["scale_embedding"],
        "dropout": fields["dropout"],
        "init_stddev": fields["init_std"],
    }


def _write(architecture: str, config: ModelConfig) -> dict[str, Any]:
    attention = config.attention
    mlp = config.mlp
    suffix = "ForConditionalGeneration" if config.head.bias else "Model"
    return {
        "architectures": [architecture + suffix],
        "vocab_size": config.vocab_size,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.num_layers,
        "d_model": config.embed_dim,
        "max_position_embeddings": config.max_length,
        "encoder_attention_heads": attention.num_heads,
        "decoder_attention_heads": attention.num_heads,
        "encoder_ffn_dim": mlp.hidden_dim,
        "decoder_ffn_dim": mlp.hidden_dim,
        "activation_function": THEIRS[mlp.activation],
        "scale_embedding": config.scale_embeddings,
        "tie_word_embeddings": config.tied_embeddings,
        "dropout": config.dropout,
        "attention_dropout": 0.0,
        "init_std": config.init_stddev,
        "is_encoder_decoder": True,
        "decoder_start_token_id": config.decoder_start_id,
    }


def _layer(*attentions: tuple[str, str]) -> tuple[TensorSpec, ...]:
    """Returns the tensors of a layer with these attentions, and an MLP."""
    tensors = []
    for name, attention in attentions:
        tensors += projections(f"{name}.{{qkv}}_proj", attention, "qkv")
        tensors += linear(f"{name}.out_proj", f"{attention}/out", num_inputs=2)
        tensors += norm(f"{name}_layer_norm", f"{attention}_norm")
    return (
        *tensors,
        *linear("fc1", "mlp/up"),
        *linear("fc2", "mlp/down"),
        *norm("final_layer_norm", "mlp_norm"),
    )


def _stack(theirs: str, ours: str, layer: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return (
        table(f"{theirs}.embed_positions", f"{ours}position_embed"),
        *norm(f"{theirs}.layernorm_embedding", f"{ours}embed_norm"),
        *within(f"{theirs}.layers.{{layer}}", f"{ours}{{layer}}", layer),
        *norm(f"{theirs}.layer_norm", f"{ours}final_norm"),
    )


_SELF = ("self_attn", "attention")
_CROSS = ("encoder_attn", "cross_attention")

BART = Architecture(
    model_type="bart",
    model_class="BartForConditionalGeneration",
    classes={"BartForConditionalGeneration": "final_logits_bias", "BartModel": ""},
    prefixes=("model.",),
    tensors=(
        TensorSpec("final_logits_bias", ("logit_bias",), unsqueezed=True),
        table("model.shared", "embed"),
        *_stack("model.encoder", "encoder/", _layer(_SELF)),
        *_stack("model.decoder", "", _layer(_SELF, _CROSS)),
        UNEMBED,
    ),
    copies={
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
        "lm_head.weight": "model.shared.weight",
    },
    required=(
        "vocab_size",
        "d_model",
        "encoder_layers",
        "decoder_layers",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "encoder_attention_heads",
        "decoder_attention_heads",
    ),
    defaults={
        "architectures": ["BartForConditionalGeneration"],
        "max_position_embeddings": 1024,
        "activation_function": "gelu",
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "dropout": 0.1,
        "init_std": 0.02,
        "decoder_start_token_id": None,
    },
    only={
        "is_encoder_decoder": True,
        "is_decoder": False,
        "normalize_embedding": True,
        "extra_pos_embeddings": 2,
        "add_final_layer_norm": False,
        "normalize_before": False,
        "static_position_embeddings": False,
    },
    # A field with the value of others, and those of fine-tuning.
    inert=("num_hidden_layers", "add_bias_logits", "save_step"),
    read=functools.partial(_read, "post"),
    write=functools.partial(_write, "Bart"),
)

MBART = dataclasses.replace(
    BART,
    model_type="mbart",
    model_class="MBartForConditionalGeneration",
    classes={"MBartForConditionalGeneration": "final_logits_bias", "MBartModel": ""},
    defaults={**BART.defaults, "architectures": ["MBartForConditionalGeneration"]},
    only={**BART.only, "add_final_layer_norm": True, "normalize_before": True},
    read=functools.partial(_read, "pre"),
    write=functools.partial(_write, "MBart"),
)
