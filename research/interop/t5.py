"""T5, T5 1.1, Flan-T5, UL2 and mT5 in Hugging Face's form
(`transformers.T5ForConditionalGeneration`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from research.core.errors import UserError
from research.interop.activations import THEIRS, to_tessera
from research.interop.architecture import Architecture
from research.interop.modules import UNEMBED, linear, norm, projections, table, within
from research.interop.tensor import TensorSpec, same_numbers
from research.models.config import ModelConfig


def _is_scaled(fields: Mapping[str, Any]) -> bool:
    """Returns whether the decoder's states are divided by √D before the output projection (T5 1.0).

    Until transformers 5 they were where `tie_word_embeddings` is set; since then a field of its own
    says it, and all models are tied.
    """
    scaled = fields["scale_decoder_outputs"]
    return fields["tie_word_embeddings"] if scaled is None else scaled


def _from_tensors(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns whether the output projection is tied to the embedding: with other numbers it is
    not.
    """
    tied = "lm_head.weight" not in tensors
    if not tied:
        # The projection is tied where it equals the embeddings, or where there are none beside it.
        projection = tensors["lm_head.weight"]
        embeddings = [tensors[name] for name in _EMBEDDINGS if name in tensors]
        tied = all(same_numbers(projection, embedding) for embedding in embeddings)
    return {"tie_word_embeddings": tied, "scale_decoder_outputs": _is_scaled(fields)}


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    width = fields["d_model"]
    encoder_layers = fields["num_layers"]
    decoder_layers = fields["num_decoder_layers"]
    return {
        "structure": "encoder_decoder",
        "vocab_size": fields["vocab_size"],
        "num_layers": encoder_layers if decoder_layers is None else decoder_layers,
        "encoder_layers": encoder_layers,
        "embed_dim": width,
        "max_length": fields["n_positions"],
        "attention": {
            "num_heads": fields["num_heads"],
            "num_kv_heads": fields["num_heads"],
            "head_dim": fields["d_kv"],
            "scale": 1.0,
        },
        "mlp": {"hidden_dim": fields["d_ff"], **_read_activation(fields)},
        "norm": {"kind": "rmsnorm", "placement": "pre", "epsilon": fields["layer_norm_epsilon"]},
        "position": {
            "kind": "buckets",
            "num_buckets": fields["relative_attention_num_buckets"],
            "max_distance": fields["relative_attention_max_distance"],
        },
        "head": {"scale": 1 / math.sqrt(width)} if _is_scaled(fields) else {},
        # A decoder of this family starts with the padding token.
        "decoder_start_id": fields["decoder_start_token_id"] or 0,
        "tied_embeddings": fields["tie_word_embeddings"],
        "dropout": fields["dropout_rate"],
        "init_stddev": fields["initializer_range"],
    }


def _read_activation(fields: Mapping[str, Any]) -> dict[str, Any]:
    name = fields["feed_forward_proj"]
    kind, _, activation = str(name).rpartition("-")
    if kind not in ("", "gated"):
        raise UserError("feed_forward_proj", name, "must be an activation, or `gated-` and one.")
    # `gated-gelu` is the tanh approximation: the name is older than `gelu_new`.
    activation = "gelu_new" if name == "gated-gelu" else activation
    gated = kind == "gated"
    agrees = fields["dense_act_fn"] in (None, activation)
    if not agrees or fields["is_gated_act"] not in (None, gated):
        raise UserError(
            "dense_act_fn",
            fields["dense_act_fn"],
            f"and is_gated_act = {fields['is_gated_act']!r} must agree with feed_forward_proj = "
            f"{name!r}.",
        )
    return {"activation": to_tessera(activation, "feed_forward_proj"), "gated": gated}


def _write(config: ModelConfig) -> dict[str, Any]:
    activation = THEIRS[config.mlp.activation]
    if config.mlp.gated:
        activation = "gated-gelu" if activation == "gelu_new" else f"gated-{activation}"
    return {
        "vocab_size": config.vocab_size,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.num_layers,
        "d_model": config.embed_dim,
        "n_positions": config.max_length,
        "num_heads": config.attention.num_heads,
        "d_kv": config.attention.head_dim,
        "d_ff": config.mlp.hidden_dim,
        "feed_forward_proj": activation,
        "layer_norm_epsilon": config.norm.epsilon,
        "relative_attention_num_buckets": config.position.num_buckets,
        "relative_attention_max_distance": config.position.max_distance,
        "tie_word_embeddings": config.tied_embeddings,
        "scale_decoder_outputs": config.head.scale != 1,
        "dropout_rate": config.dropout,
        "initializer_range": config.init_stddev,
        "is_encoder_decoder": True,
        "decoder_start_token_id": config.decoder_start_id,
    }


def _gated(config: ModelConfig) -> bool:
    return config.mlp.gated


def _not_gated(config: ModelConfig) -> bool:
    return not config.mlp.gated


def _layer(*sublayers: tuple[str, str]) -> tuple[TensorSpec, ...]:
    """Returns the tensors of a layer with these sublayers of attention, and an MLP."""
    tensors = []
    for number, (name, attention) in enumerate(sublayers):
        # In the decoder layer.0 is self-attention, layer.1 cross-attention, layer.2 the MLP.
        sublayer = f"layer.{number}"
        tensors += projections(f"{sublayer}.{name}.{{qkv}}", attention, "qkv")
        tensors += linear(f"{sublayer}.{name}.o", f"{attention}/out", num_inputs=2)
        tensors += norm(f"{sublayer}.layer_norm", f"{attention}_norm")
    mlp = f"layer.{len(sublayers)}"
    return (
        *tensors,
        *linear(f"{mlp}.DenseReluDense.wi", "mlp/up", when=_not_gated),
        *linear(f"{mlp}.DenseReluDense.wi_0", "mlp/gate"),
        *linear(f"{mlp}.DenseReluDense.wi_1", "mlp/up", when=_gated),
        *linear(f"{mlp}.DenseReluDense.wo", "mlp/down"),
        *norm(f"{mlp}.layer_norm", "mlp_norm"),
    )


def _stack(theirs: str, ours: str, layer: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return (
        table(
            f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias",
            f"{ours}position_bias",
        ),
        *within(f"{theirs}.block.{{layer}}", f"{ours}{{layer}}", layer),
        *norm(f"{theirs}.final_layer_norm", f"{ours}final_norm"),
    )


_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_SELF = ("SelfAttention", "attention")
_CROSS = ("EncDecAttention", "cross_attention")

T5 = Architecture(
    model_type="t5",
    model_class="T5ForConditionalGeneration",
    tensors=(
        table("shared", "embed"),
        *_stack("encoder", "encoder/", _layer(_SELF)),
        *_stack("decoder", "", _layer(_SELF, _CROSS)),
        UNEMBED,
    ),
    copies={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    },
    ignored={
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight": (
            "cross-attention has no positions"
        )
    },
    required=("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
    defaults={
        "num_decoder_layers": None,
        "n_positions": 512,
        "feed_forward_proj": "relu",
        "dense_act_fn": None,
        "is_gated_act": None,
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "tie_word_embeddings": True,
        "scale_decoder_outputs": None,
        "dropout_rate": 0.1,
        "initializer_range": 0.02,
        "decoder_start_token_id": None,
    },
    only={"is_encoder_decoder": True, "is_decoder": False},
    # A factor on the standard deviations of initialization.
    inert=("initializer_factor",),
    from_tensors=_from_tensors,
    read=_read,
    write=_write,
)

MT5 = dataclasses.replace(
    T5,
    model_type="mt5",
    model_class="MT5ForConditionalGeneration",
    defaults={**T5.defaults, "feed_forward_proj": "gated-gelu", "scale_decoder_outputs": False},
    only={**T5.only, "scale_decoder_outputs": False},
)
