"""BERT, RoBERTa and XLM-RoBERTa in Hugging Face's form (`transformers.BertForPreTraining`,
`RobertaForMaskedLM`, …).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from research.core.errors import UserError
from research.interop.activations import THEIRS, to_tessera
from research.interop.architecture import Architecture
from research.interop.modules import linear, multi_head, norm, projections, table, within
from research.interop.tensor import TensorSpec
from research.models.config import HeadConfig, ModelConfig

# Class of `transformers` -> the heads that it has, the fullest class first.
Heads = Mapping[str, HeadConfig]
_MASKED_LM = HeadConfig(transform=True, bias=True)
_BERT: Heads = {
    "BertForPreTraining": dataclasses.replace(_MASKED_LM, pooler=True, num_classes=2),
    "BertForMaskedLM": _MASKED_LM,
    "BertModel": HeadConfig(pooler=True),
}
_ROBERTA: Heads = {"RobertaForMaskedLM": _MASKED_LM, "RobertaModel": HeadConfig(pooler=True)}
_XLM_ROBERTA: Heads = {f"XLM{name}": head for name, head in _ROBERTA.items()}


def _read(heads: Heads, offset: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    name = fields["architectures"][0]
    width = fields["hidden_size"]
    num_heads = fields["num_attention_heads"]
    if name not in heads:
        raise UserError(f"architectures = [{name!r}] is not supported: {', '.join(heads)} are.")
    return {
        "structure": "encoder",
        "vocab_size": fields["vocab_size"],
        "num_layers": fields["num_hidden_layers"],
        "embed_dim": width,
        "max_length": fields["max_position_embeddings"] - offset,
        "attention": multi_head(width, num_heads, bias=True),
        "mlp": {
            "hidden_dim": fields["intermediate_size"],
            "activation": to_tessera(fields["hidden_act"], "hidden_act"),
            "gated": False,
            "bias": True,
        },
        "norm": {
            "kind": "layernorm",
            "placement": "post",
            "epsilon": fields["layer_norm_eps"],
            "bias": True,
        },
        "position": {"kind": "learned", "offset": offset},
        "embedding": {"norm": True, "num_types": fields["type_vocab_size"]},
        "head": dataclasses.asdict(heads[name]),
        "tied_embeddings": True,
        "dropout": fields["hidden_dropout_prob"],
        "init_stddev": fields["initializer_range"],
    }


def _read_roberta(heads: Heads, fields: Mapping[str, Any]) -> dict[str, Any]:
    if fields["hidden_act"] != "gelu":
        raise UserError(
            "hidden_act", fields["hidden_act"], "is not supported: the head has 'gelu' in any case."
        )
    # Positions start after that of padding, which has the number of the padding token.
    return _read(heads, fields["pad_token_id"] + 1, fields)


def _write(heads: Heads, config: ModelConfig) -> dict[str, Any]:
    # Where no class has these heads, the fullest one is written: what differs when it is read back
    # is named in the error.
    name = next((name for name, head in heads.items() if head == config.head), next(iter(heads)))
    return {
        "architectures": [name],
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "max_position_embeddings": config.max_length + config.position.offset,
        "num_attention_heads": config.attention.num_heads,
        "intermediate_size": config.mlp.hidden_dim,
        "hidden_act": THEIRS[config.mlp.activation],
        "layer_norm_eps": config.norm.epsilon,
        # A model without types differs when it is read back, and is not written.
        "type_vocab_size": max(config.embedding.num_types, 1),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": config.init_stddev,
    }


def _write_roberta(heads: Heads, config: ModelConfig) -> dict[str, Any]:
    return _write(heads, config) | {"pad_token_id": max(config.position.offset - 1, 0)}


_LAYER = (
    *projections("attention.self.{qkv}", "attention"),
    *linear("attention.output.dense", "attention/out", num_inputs=2),
    *norm("attention.output.LayerNorm", "attention_norm"),
    *linear("intermediate.dense", "mlp/up"),
    *linear("output.dense", "mlp/down"),
    *norm("output.LayerNorm", "mlp_norm"),
)


def _tensors(root: str) -> tuple[TensorSpec, ...]:
    return (
        table(f"{root}.embeddings.word_embeddings", "embed"),
        table(f"{root}.embeddings.position_embeddings", "position_embed"),
        table(f"{root}.embeddings.token_type_embeddings", "type_embed"),
        *norm(f"{root}.embeddings.LayerNorm", "embed_norm"),
        *within(f"{root}.encoder.layer.{{layer}}", "{layer}", _LAYER),
        *linear(f"{root}.pooler.dense", "pooler/projection"),
    )


def _ignored(root: str) -> dict[str, str]:
    return {
        rf"{root}\.embeddings\.(position_ids|token_type_ids)": "numbers from 0 on, or zeros",
        rf"{root}\.pooler\.dense\.(weight|bias)": "the pooler, which a masked language model does "
        "not have",
    }


BERT = Architecture(
    model_type="bert",
    model_class="BertForPreTraining",
    classes={
        "BertForPreTraining": r"cls\.seq_relationship",
        "BertForMaskedLM": r"cls\.predictions",
        "BertModel": "",
    },
    prefixes=("bert.",),
    # The names of norms in the first releases.
    spellings=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    tensors=(
        *_tensors("bert"),
        *linear("cls.predictions.transform.dense", "transform/projection"),
        *norm("cls.predictions.transform.LayerNorm", "transform/norm"),
        TensorSpec("cls.predictions.bias", ("logit_bias",)),
        *linear("cls.seq_relationship", "pooler/classes"),
    ),
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    ignored=_ignored("bert"),
    required=(
        "vocab_size",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
    ),
    defaults={
        "architectures": ["BertForPreTraining"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.02,
    },
    only={
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    },
    inert=(
        # How the pooler of a release was built.
        "directionality",
        "pooler_fc_size",
        "pooler_num_attention_heads",
        "pooler_type",
        "pooler_num_fc_layers",
        "pooler_size_per_head",
    ),
    read=functools.partial(_read, _BERT, 0),
    write=functools.partial(_write, _BERT),
)

ROBERTA = dataclasses.replace(
    BERT,
    model_type="roberta",
    model_class="RobertaForMaskedLM",
    classes={"RobertaForMaskedLM": r"lm_head\.", "RobertaModel": ""},
    prefixes=("roberta.",),
    tensors=(
        *_tensors("roberta"),
        *linear("lm_head.dense", "transform/projection"),
        *norm("lm_head.layer_norm", "transform/norm"),
        TensorSpec("lm_head.bias", ("logit_bias",)),
    ),
    copies={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    ignored=_ignored("roberta"),
    defaults=BERT.defaults | {"architectures": ["RobertaForMaskedLM"], "pad_token_id": 1},
    read=functools.partial(_read_roberta, _ROBERTA),
    write=functools.partial(_write_roberta, _ROBERTA),
)

XLM_ROBERTA = dataclasses.replace(
    ROBERTA,
    model_type="xlm-roberta",
    model_class="XLMRobertaForMaskedLM",
    classes={f"XLM{name}": pattern for name, pattern in ROBERTA.classes.items()},
    defaults=ROBERTA.defaults | {"architectures": ["XLMRobertaForMaskedLM"]},
    read=functools.partial(_read_roberta, _XLM_ROBERTA),
    write=functools.partial(_write_roberta, _XLM_ROBERTA),
)
