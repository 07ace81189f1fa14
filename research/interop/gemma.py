"""Gemma 2 and 3 in Hugging Face's form, of Gemma 3 the text."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from research.core.config import plain
from research.core.errors import UserError
from research.interop.architecture import config_from
from research.interop.llama import ATTENTION, CORE, DENSE, MLP, QK_NORM, activation, biases, decoder
from research.interop.modules import norm
from research.interop.parts import Part, fixed, named
from research.interop.rotary import position, rotary, write_position
from research.interop.windows import GLOBAL, LOCAL, layer_types, layer_windows
from research.models.config import ModelConfig

SANDWICH = (
    *norm("input_layernorm", "attention_norm"),
    *norm("post_attention_layernorm", "attention_out_norm"),
    *norm("pre_feedforward_layernorm", "mlp_norm"),
    *norm("post_feedforward_layernorm", "mlp_out_norm"),
)


def _write_scale(config: ModelConfig) -> dict[str, Any]:
    # The field is the square of 1 / scale: a scale of 1 / 16 is written as 256.
    scale = config.attention.scale
    scalar = config.attention.head_dim if scale is None else scale**-2
    return {"query_pre_attn_scalar": round(scalar)}


GEMMA = (
    *CORE,
    DENSE,
    activation("hidden_activation", "gelu_pytorch_tanh", gelu_tanh="gelu_pytorch_tanh"),
    biases(default=False, out=True),
    fixed({"norm.placement": "sandwich", "norm.unit_offset": True, "scale_embeddings": True}),
    Part(
        read=lambda fields: {"attention.scale": 1 / math.sqrt(fields["query_pre_attn_scalar"])},
        write=_write_scale,
        defaults={"query_pre_attn_scalar": 256},
    ),
    Part(
        defaults={"head_dim": 256, "num_key_value_heads": 4, "tie_word_embeddings": True},
        inert=("hidden_act",),
    ),
)
GEMMA2 = decoder(
    "gemma2",
    "Gemma2ForCausalLM",
    (*SANDWICH, *ATTENTION, *MLP),
    *GEMMA,
    named(
        {"final_logit_softcapping": "head.softcap", "attn_logit_softcapping": "attention.softcap"},
        final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0,
    ),
    rotary(),
    layer_windows(4096, lambda _, i: i % 2 == 0),
    Part(inert=("sliding_window_size",)),
)


def _local(fields: Mapping[str, Any], layer: int) -> bool:
    """Returns whether a layer is local: all but every sixth, for instance."""
    period = fields["sliding_window_pattern"]
    if period is None:
        period = fields["_sliding_window_pattern"]
    return (layer + 1) % period != 0


def _read_rotary(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the positions: local and global layers have a RoPE each, in older folders by other
    fields.
    """
    ropes = fields["rope_parameters"] or {}
    scaling = fields["rope_scaling"] or {}
    are_groups = isinstance(ropes, dict) and isinstance(scaling, dict)
    if not are_groups or ropes.keys() - {LOCAL, GLOBAL}:
        raise UserError(
            "rope_parameters", ropes, f"must be a group for {LOCAL} and one for {GLOBAL}."
        )

    longest = fields["max_position_embeddings"]
    # rope_parameters (transformers 5) replace the theta, rope_scaling (4) is of global layers only.
    global_rope = {"rope_theta": fields["rope_theta"]}
    global_rope |= ropes.get(GLOBAL) or {}
    global_rope |= scaling
    local_rope = {"rope_theta": fields["rope_local_base_freq"]}
    local_rope |= ropes.get(LOCAL) or {}

    # The model has the global positions, and local layers their own.
    local_position = position(local_rope, longest)
    values: dict[str, Any] = {}
    for name, value in position(global_rope, longest).items():
        values[f"position.{name}"] = value
    values["layers.position"] = [
        local_position if kind == LOCAL else None for kind in layer_types(fields, _local)
    ]
    return values


def _write_rotary(config: ModelConfig) -> dict[str, Any]:
    ropes = {GLOBAL: write_position(config.position)}
    local_layers = [layer for layer in config.layers() if layer.window is not None]
    if local_layers:
        ropes[LOCAL] = write_position(config.position_of(local_layers[0]))
    return {"rope_parameters": ropes}


GEMMA3_TEXT = decoder(
    "gemma3_text",
    "Gemma3ForCausalLM",
    (*SANDWICH, *ATTENTION, *QK_NORM, *MLP),
    *GEMMA,
    fixed({"attention.qk_norm": "head"}),
    named({"final_logit_softcapping": "head.softcap"}, final_logit_softcapping=None),
    Part(
        read=_read_rotary,
        write=_write_rotary,
        defaults={
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": None,
            "rope_parameters": None,
        },
    ),
    layer_windows(4096, _local, sliding_window_pattern=None, _sliding_window_pattern=6),
)


def _read_text(fields: Mapping[str, Any]) -> dict[str, Any]:
    text = fields["text_config"]
    if not isinstance(text, dict):
        raise UserError("text_config is missing.")
    return plain(config_from(GEMMA3_TEXT, {**TEXT_DEFAULTS, **text}))


def _write_unsupported(_: ModelConfig) -> dict[str, Any]:
    raise UserError("it takes images, too")


# Fields that released folders leave out of `text_config`.
TEXT_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131_072,
}
# The text model of 4B and more, which take images, too; it is written as `gemma3_text`.
GEMMA3 = dataclasses.replace(
    GEMMA3_TEXT,
    model_type="gemma3",
    model_class="Gemma3ForConditionalGeneration",
    # Older folders have the whole text model under one name, newer ones its parts under two.
    spellings=(
        (r"^(model\.)?language_model\.(model\.)?(?!lm_head)", "model."),
        (r"^language_model\.lm_head", "lm_head"),
    ),
    ignored=GEMMA3_TEXT.ignored
    | {
        r"(model\.)?(vision_tower|multi_modal_projector)\..*": "the vision model, which Tessera "
        "does not have"
    },
    required=(),
    defaults={"text_config": None},
    inert=(
        "vision_config",
        "mm_tokens_per_image",
        "boi_token_index",
        "eoi_token_index",
        "image_token_index",
        "initializer_range",
        "tie_word_embeddings",
    ),
    read=_read_text,
    write=_write_unsupported,
)
