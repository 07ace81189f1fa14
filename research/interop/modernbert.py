"""ModernBERT in Hugging Face's form (`transformers.ModernBertForMaskedLM`)."""

from collections.abc import Mapping
from typing import Any

from research.core.errors import UserError
from research.interop.activations import THEIRS, to_tessera
from research.interop.architecture import Architecture
from research.interop.modules import QKV, linear, multi_head, norm, table, within
from research.interop.rotary import position, rope_fields, write_position
from research.interop.tensor import TensorSpec
from research.models.config import LayerConfig, ModelConfig, PositionConfig

_FULL = "full_attention"
_SLIDING = "sliding_attention"
_WITH_HEAD = "ModernBertForMaskedLM"
_WITHOUT = "ModernBertModel"


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    width = fields["hidden_size"]
    num_heads = fields["num_attention_heads"]
    name = fields["architectures"][0]
    activation = fields["hidden_activation"]
    if name not in (_WITH_HEAD, _WITHOUT):
        raise UserError(
            f"architectures = [{name!r}] is not supported: {_WITH_HEAD} and {_WITHOUT} are."
        )
    if fields["classifier_activation"] != activation:
        raise UserError(
            "classifier_activation",
            fields["classifier_activation"],
            f"must be hidden_activation = {activation!r}.",
        )
    head = {
        "transform": True,
        "transform_bias": fields["classifier_bias"],
        "bias": fields["decoder_bias"],
    }
    # Attention of the first layer reads the embeddings, which are normalized already.
    first, *rest = _layers(fields)
    return {
        "structure": "encoder",
        "vocab_size": fields["vocab_size"],
        "num_layers": fields["num_hidden_layers"],
        "embed_dim": width,
        "max_length": fields["max_position_embeddings"],
        "attention": multi_head(width, num_heads, fields["attention_bias"]),
        "mlp": {
            "hidden_dim": fields["intermediate_size"],
            "activation": to_tessera(activation, "hidden_activation"),
            "gated": True,
            "bias": fields["mlp_bias"],
        },
        "norm": {
            "kind": "layernorm",
            "placement": "pre",
            "epsilon": fields["norm_eps"],
            "bias": fields["norm_bias"],
        },
        "position": _position(fields, _FULL),
        "first_layers": [{**first, "attention_norm": False}],
        "pattern": rest,
        "embedding": {"norm": True},
        "head": head if name == _WITH_HEAD else {},
        "tied_embeddings": True,
        "init_stddev": fields["initializer_range"],
    }


def _layers(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns what the first layer does, and what the others do over and over."""
    period = fields["global_attn_every_n_layers"]
    count = fields["num_hidden_layers"]
    named = fields["layer_types"]
    if not isinstance(period, int) or period < 1:
        raise UserError(
            "global_attn_every_n_layers", period, "must be a whole number of at least 1."
        )
    # Period 3 -> full, sliding, sliding, full, …
    periodic = [_SLIDING if i % period else _FULL for i in range(max(count, period + 1))]
    kinds = periodic[:count] if named is None else list(named)
    if len(kinds) != count or not {*kinds} <= {_FULL, _SLIDING}:
        raise UserError(
            "layer_types", named, f"must name {count} layers, each {_FULL!r} or {_SLIDING!r}."
        )

    # The first layer is no part of the pattern.
    pattern = periodic[1 : period + 1]
    if kinds != periodic[:count]:
        pattern = _shortest_pattern(kinds[1:])
    local = {
        # A token attends to those at up to half of this distance; our window is one more.
        "window": fields["local_attention"] // 2 + 1,
        "position": _position(fields, _SLIDING),
    }
    return [local if kind == _SLIDING else {} for kind in (kinds[0], *pattern)]


def _shortest_pattern(kinds: list[str]) -> list[str]:
    """Returns the fewest leading kinds that repeated give all; at least one."""
    for length in range(1, len(kinds)):
        # [a, b, a, b, a] has the period 2: from the third on it is the same list again.
        if kinds[length:] == kinds[:-length]:
            return kinds[:length]
    return kinds or [_FULL]


def _position(fields: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Returns the positions of a kind of layer; folders of transformers 4 have a field for each."""
    older_field = {_FULL: "global_rope_theta", _SLIDING: "local_rope_theta"}[kind]
    ropes = fields["rope_parameters"] or {}
    rope = rope_fields(
        {
            "rope_theta": fields[older_field],
            "rope_scaling": None,
            "rope_parameters": ropes.get(kind),
        }
    )
    return position(rope, fields["max_position_embeddings"])


def _write(config: ModelConfig) -> dict[str, Any]:
    layers = config.layers()
    local = next((layer for layer in layers if layer.window is not None), _LOCAL)
    local_position = config.position_of(local)
    ropes = {_FULL: write_position(config.position), _SLIDING: write_position(local_position)}
    return {
        "architectures": [_WITH_HEAD if config.head.transform else _WITHOUT],
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "max_position_embeddings": config.max_length,
        "num_attention_heads": config.attention.num_heads,
        "attention_bias": config.attention.qkv_bias,
        "intermediate_size": config.mlp.hidden_dim,
        "hidden_activation": THEIRS[config.mlp.activation],
        "classifier_activation": THEIRS[config.mlp.activation],
        "mlp_bias": config.mlp.bias,
        "norm_eps": config.norm.epsilon,
        "norm_bias": config.norm.bias,
        "classifier_bias": config.head.transform_bias,
        "decoder_bias": config.head.bias,
        # transformers 4 reads the period and the thetas, 5 the types and the groups.
        "global_attn_every_n_layers": len(config.pattern),
        "layer_types": [_FULL if layer.window is None else _SLIDING for layer in layers],
        "local_attention": 2 * (local.window - 1),
        "global_rope_theta": config.position.theta,
        "local_rope_theta": local_position.theta,
        "rope_parameters": ropes,
        "initializer_range": config.init_stddev,
    }


# What is written of local attention where no layer has it.
_LOCAL = LayerConfig(window=65, position=PositionConfig(theta=10_000.0))

MODERNBERT = Architecture(
    model_type="modernbert",
    model_class=_WITH_HEAD,
    classes={_WITH_HEAD: r"head\.dense", _WITHOUT: ""},
    prefixes=("model.",),
    tensors=(
        table("model.embeddings.tok_embeddings", "embed"),
        *norm("model.embeddings.norm", "embed_norm"),
        *within(
            "model.layers.{layer}",
            "{layer}",
            (
                *norm("attn_norm", "attention_norm"),
                *linear("attn.Wqkv", *QKV),
                *linear("attn.Wo", "attention/out", num_inputs=2),
                *norm("mlp_norm", "mlp_norm"),
                *linear("mlp.Wi", "mlp/gate", "mlp/up"),
                *linear("mlp.Wo", "mlp/down"),
            ),
        ),
        *norm("model.final_norm", "final_norm"),
        *linear("head.dense", "transform/projection"),
        *norm("head.norm", "transform/norm"),
        TensorSpec("decoder.bias", ("logit_bias",)),
    ),
    copies={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    required=(
        "vocab_size",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
    ),
    defaults={
        "architectures": [_WITH_HEAD],
        "max_position_embeddings": 8192,
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "attention_bias": False,
        "mlp_bias": False,
        "norm_bias": False,
        "classifier_bias": False,
        "decoder_bias": True,
        "norm_eps": 1e-5,
        "global_attn_every_n_layers": 3,
        "layer_types": None,
        "local_attention": 128,
        "global_rope_theta": 160_000.0,
        "local_rope_theta": 10_000.0,
        "rope_parameters": None,
        "initializer_range": 0.02,
    },
    only={"tie_word_embeddings": True},
    inert=(
        # How weights begin, how sparse losses and kernels are run, a head for other tasks.
        "initializer_cutoff_factor",
        "sparse_prediction",
        "sparse_pred_ignore_index",
        "reference_compile",
        "deterministic_flash_attn",
        "repad_logits_with_grad",
        "classifier_pooling",
        # The kind of positions and an epsilon, which follow from other fields.
        "position_embedding_type",
        "layer_norm_eps",
    ),
    read=_read,
    write=_write,
)
