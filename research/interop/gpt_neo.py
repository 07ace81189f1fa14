"""GPT-Neo in Hugging Face's form (`transformers.GPTNeoForCausalLM`): alternating global and local
layers.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from research.core.errors import UserError, shown
from research.interop.activations import THEIRS, to_tessera
from research.interop.architecture import Architecture
from research.interop.modules import UNEMBED, linear, multi_head, norm, projections, table, within
from research.interop.parts import shortest_pattern
from research.models.config import ModelConfig

_GLOBAL = "global"
_LOCAL = "local"
_WINDOW = 256


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    width = fields["hidden_size"]
    if fields["embed_dropout"] != fields["resid_dropout"]:
        raise UserError(
            "embed_dropout",
            fields["embed_dropout"],
            f"must equal resid_dropout = {fields['resid_dropout']!r}.",
        )

    hidden_dim = fields["intermediate_size"]
    attention = multi_head(width, fields["num_heads"], bias=False)
    windows = {_GLOBAL: None, _LOCAL: fields["window_size"]}
    layers = [{"window": windows[kind]} for kind in _kinds(fields)]
    return {
        "vocab_size": fields["vocab_size"],
        "num_layers": fields["num_layers"],
        "embed_dim": width,
        "max_length": fields["max_position_embeddings"],
        # It does not scale its scores.
        "attention": attention | {"out_bias": True, "scale": 1.0},
        "mlp": {
            "hidden_dim": 4 * width if hidden_dim is None else hidden_dim,
            "activation": to_tessera(fields["activation_function"], "activation_function"),
            "gated": False,
            "bias": True,
        },
        "norm": {
            "kind": "layernorm",
            "placement": "pre",
            "epsilon": fields["layer_norm_epsilon"],
            "bias": True,
        },
        "position": {"kind": "learned"},
        **shortest_pattern(layers),
        "tied_embeddings": fields["tie_word_embeddings"],
        "dropout": fields["resid_dropout"],
        "init_stddev": fields["initializer_range"],
    }


def _kinds(fields: Mapping[str, Any]) -> list[str]:
    """Returns the kind of each layer: `attention_types` has groups of kinds, and how often each is
    repeated.
    """
    count = fields["num_layers"]
    groups = fields["attention_types"]
    # [[["global", "local"], 2]] -> global, local, global, local
    repeated = (kind for group, times in groups for _ in range(times) for kind in group)
    # No more than one too many: a file could ask for a number of layers that fills the memory.
    kinds = list(itertools.islice(repeated, count + 1))
    if len(kinds) != count:
        raise UserError("attention_types", groups, f"must name num_layers = {count} layers.")
    for kind in kinds:
        if kind not in (_GLOBAL, _LOCAL):
            raise UserError(
                "attention_types",
                constraint=f": {shown(kind)} is not supported, only {_GLOBAL!r} and {_LOCAL!r} "
                "are.",
            )
    return kinds


def _write(config: ModelConfig) -> dict[str, Any]:
    windows = [layer.window for layer in config.layers()]
    kinds = [_GLOBAL if window is None else _LOCAL for window in windows]
    local_window = next((window for window in windows if window is not None), _WINDOW)
    return {
        "vocab_size": config.vocab_size,
        "num_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "max_position_embeddings": config.max_length,
        "num_heads": config.attention.num_heads,
        # One group of all layers, once.
        "attention_types": [[kinds, 1]],
        "window_size": local_window,
        "intermediate_size": config.mlp.hidden_dim,
        "activation_function": THEIRS[config.mlp.activation],
        "layer_norm_epsilon": config.norm.epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "resid_dropout": config.dropout,
        "embed_dropout": config.dropout,
        "attention_dropout": 0.0,
        "initializer_range": config.init_stddev,
    }


GPT_NEO = Architecture(
    model_type="gpt_neo",
    model_class="GPTNeoForCausalLM",
    prefixes=("transformer.",),
    tensors=(
        table("transformer.wte", "embed"),
        table("transformer.wpe", "position_embed"),
        *within(
            "transformer.h.{layer}",
            "{layer}",
            (
                *norm("ln_1", "attention_norm"),
                *projections("attn.attention.{qkv}_proj", "attention", "qkv"),
                *linear("attn.attention.out_proj", "attention/out", num_inputs=2),
                *norm("ln_2", "mlp_norm"),
                *linear("mlp.c_fc", "mlp/up"),
                *linear("mlp.c_proj", "mlp/down"),
            ),
        ),
        *norm("transformer.ln_f", "final_norm"),
        UNEMBED,
    ),
    copies={"lm_head.weight": "transformer.wte.weight"},
    ignored={
        r"transformer\.h\.\d+\.attn\.attention\.(bias|masked_bias)": "the layer's mask, which is "
        "no parameter"
    },
    required=("vocab_size", "num_layers", "hidden_size", "num_heads", "max_position_embeddings"),
    defaults={
        "attention_types": [[[_GLOBAL, _LOCAL], 12]],
        "window_size": _WINDOW,
        "intermediate_size": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "resid_dropout": 0.0,
        "embed_dropout": 0.0,
        "initializer_range": 0.02,
    },
    inert=("attention_layers",),  # which attention_types repeats
    read=_read,
    write=_write,
)
