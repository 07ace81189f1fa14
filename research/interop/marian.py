"""Marian's translators, Transformers of 2017, in Hugging Face's form
(`transformers.MarianMTModel`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from research.core.errors import UserError
from research.interop.architecture import Architecture
from research.interop.bart import BART
from research.models.config import ModelConfig

_WITH_HEAD = "MarianMTModel"
_WITHOUT = "MarianModel"


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    if fields["decoder_vocab_size"] not in (None, fields["vocab_size"]):
        raise UserError(
            "decoder_vocab_size",
            fields["decoder_vocab_size"],
            f"must equal vocab_size = {fields['vocab_size']!r}.",
        )
    return BART.read(fields) | {
        "position": {"kind": "sinusoidal", "halves": True},
        "embedding": {"norm": False},
        "head": {"bias": fields["architectures"][0] == _WITH_HEAD},
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return BART.write(config) | {"architectures": [_WITH_HEAD if config.head.bias else _WITHOUT]}


MARIAN: Architecture = dataclasses.replace(
    BART,
    model_type="marian",
    model_class=_WITH_HEAD,
    classes={_WITH_HEAD: "final_logits_bias", _WITHOUT: ""},
    ignored={
        r"model\.(encoder|decoder)\.embed_positions\.weight": "sinusoids that the config gives"
    },
    defaults={
        **BART.defaults,
        "architectures": [_WITH_HEAD],
        "decoder_start_token_id": 58_100,
        "decoder_vocab_size": None,
    },
    only={
        "is_encoder_decoder": True,
        "is_decoder": False,
        "share_encoder_decoder_embeddings": True,
        "add_final_layer_norm": False,
        "normalize_before": False,
        "normalize_embedding": False,
        "static_position_embeddings": True,
    },
    read=_read,
    write=_write,
)
