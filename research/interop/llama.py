"""LLaMA 1, 2 and 3 in Hugging Face's form (`transformers.LlamaForCausalLM`)."""

from collections.abc import Mapping
from typing import Any

from research.core.errors import UserError
from research.interop.activations import THEIRS, to_tessera
from research.interop.architecture import Architecture
from research.interop.tensor import Tensor
from research.models.config import ModelConfig, PositionConfig

_LAYER, _OURS = "model.layers.{layer}", "{layer}"
# Their name of a rotary scaling's field, and ours.
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_length",
}


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    return {
        "vocab_size": fields["vocab_size"],
        "num_layers": fields["num_hidden_layers"],
        "embed_dim": width,
        "max_length": fields["max_position_embeddings"],
        "attention": {
            "num_heads": heads,
            "num_kv_heads": heads if fields["num_key_value_heads"] is None else fields["num_key_value_heads"],
            "head_dim": width // heads if fields["head_dim"] is None else fields["head_dim"],
            "qkv_bias": fields["attention_bias"],
            "out_bias": fields["attention_bias"],
        },
        "mlp": {
            "hidden_dim": fields["intermediate_size"],
            "activation": to_tessera(fields["hidden_act"], "hidden_act"),
            "gated": True,
            "bias": fields["mlp_bias"],
        },
        "norm": {"kind": "rmsnorm", "placement": "pre", "epsilon": fields["rms_norm_eps"], "bias": False},
        "position": _read_rotary(fields),
        "tied_embeddings": fields["tie_word_embeddings"],
        "init_stddev": fields["initializer_range"],
    }


def _read_rotary(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Reads `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of its elders."""
    rope = {"rope_theta": fields["rope_theta"]}
    for group in ("rope_scaling", "rope_parameters"):
        if not isinstance(fields[group], dict | None):
            raise UserError(f"{group} = {fields[group]!r} must be a group of fields.")
        rope |= fields[group] or {}
    theta = rope.pop("rope_theta")
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    wanted = {"default": (), "llama3": tuple(_SCALING)}
    if kind not in wanted:
        raise UserError(f"rope_type = {kind!r} is not supported: {' and '.join(map(repr, wanted))} are.")
    for name in {*rope, *wanted[kind]}:
        if name not in rope:
            raise UserError(f"{name} of rope_type = {kind!r} is missing.")
        if name not in wanted[kind]:
            raise UserError(f"{name} = {rope[name]!r} of rope_type = {kind!r} is not supported.")
    scaling = {ours: rope[theirs] for theirs, ours in _SCALING.items()} if kind == "llama3" else None
    return {"kind": "rotary", "theta": theta, "scaling": scaling}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "max_position_embeddings": config.max_length,
        "num_attention_heads": config.attention.num_heads,
        "num_key_value_heads": config.attention.num_kv_heads,
        "head_dim": config.attention.head_dim,
        "attention_bias": config.attention.qkv_bias,
        "intermediate_size": config.mlp.hidden_dim,
        "hidden_act": THEIRS[config.mlp.activation],
        "mlp_bias": config.mlp.bias,
        "rms_norm_eps": config.norm.epsilon,
        **_write_rotary(config.position),
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_stddev,
    }


def _write_rotary(position: PositionConfig) -> dict[str, Any]:
    """Writes the elder form, which every version of transformers reads."""
    scaling = None
    if position.scaling is not None:
        values = {theirs: getattr(position.scaling, ours) for theirs, ours in _SCALING.items()}
        scaling = {"rope_type": "llama3", **values}
    return {"rope_theta": position.theta, "rope_scaling": scaling}


def _linear(theirs: str, ours: str, num_inputs: int = 1) -> tuple[Tensor, Tensor]:
    """Returns the weight of a torch `Linear`, and the bias that some checkpoints have."""
    return (
        Tensor(f"{_LAYER}.{theirs}.weight", (f"{_OURS}/{ours}/kernel",), num_inputs, transposed=True),
        Tensor(f"{_LAYER}.{theirs}.bias", (f"{_OURS}/{ours}/bias",)),
    )


LLAMA = Architecture(
    model_type="llama",
    model_class="LlamaForCausalLM",
    prefixes=("model.",),
    tensors=(
        Tensor("model.embed_tokens.weight", ("embed/embedding",), num_inputs=1),
        Tensor(f"{_LAYER}.input_layernorm.weight", (f"{_OURS}/attention_norm/scale",)),
        *_linear("self_attn.q_proj", "attention/query"),
        *_linear("self_attn.k_proj", "attention/key"),
        *_linear("self_attn.v_proj", "attention/value"),
        *_linear("self_attn.o_proj", "attention/out", num_inputs=2),
        Tensor(f"{_LAYER}.post_attention_layernorm.weight", (f"{_OURS}/mlp_norm/scale",)),
        *_linear("mlp.gate_proj", "mlp/gate"),
        *_linear("mlp.up_proj", "mlp/up"),
        *_linear("mlp.down_proj", "mlp/down"),
        Tensor("model.norm.weight", ("final_norm/scale",)),
        Tensor("lm_head.weight", ("unembed",), num_inputs=1, transposed=True),
    ),
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    ignored={r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "frequencies that the config gives"},
    required=(
        *("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"),
        "max_position_embeddings",
    ),
    defaults={
        "num_key_value_heads": None,
        "head_dim": None,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "rope_parameters": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    },
    # How many pieces a product was once taken in; the sum is the same.
    inert=("pretraining_tp",),
    dropouts=("attention_dropout",),
    read=_read,
    write=_write,
)
