"""One small model for each thing that a family's configuration can say, shared by the tests of
models.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.models.config import (
    EmbeddingConfig,
    ExpertsConfig,
    HeadConfig,
    LatentConfig,
    LayerConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
    RopeScalingConfig,
)
from tests.tiny import random_tokens, tiny_config

_LOCAL, _GLOBAL = LayerConfig(window=4, position=PositionConfig(theta=100.0)), LayerConfig()
_LAYER_NORM = NormConfig(kind="layernorm", bias=True)


def _rotary(**scaling: Any) -> PositionConfig:
    return PositionConfig(theta=1000.0, scaling=RopeScalingConfig(**scaling))


_EXPERTS = ExpertsConfig(
    num_experts=4, experts_per_token=2, hidden_dim=8, balance_weight=0.01, z_weight=0.001
)

VARIANTS: dict[str, ModelConfig] = {
    "windows": tiny_config(num_layers=5, pattern=(_LOCAL, _GLOBAL)),
    "first layers": tiny_config(
        num_layers=4, first_layers=(LayerConfig(attention_norm=False),), pattern=(_LOCAL,)
    ),
    "soft caps": tiny_config(
        attention={"softcap": 2.0, "scale": 0.7}, head=HeadConfig(softcap=3.0)
    ),
    "sinks": tiny_config(attention={"sinks": True}),
    "head norm": tiny_config(attention={"qk_norm": "head"}, norm=NormConfig(unit_offset=True)),
    "qk norm": tiny_config(attention={"qk_norm": "all"}, norm=NormConfig(placement="output")),
    "sandwich": tiny_config(norm=NormConfig(placement="sandwich"), scale_embeddings=True),
    "parallel": tiny_config(
        norm=dataclasses.replace(_LAYER_NORM, placement="parallel"), mlp={"gated": False}
    ),
    "parallel pair": tiny_config(norm=dataclasses.replace(_LAYER_NORM, placement="parallel_pair")),
    "post-norm": tiny_config(norm=dataclasses.replace(_LAYER_NORM, placement="post")),
    "part of a head": tiny_config(position=PositionConfig(rotary_dim=2)),
    "linear": tiny_config(position=_rotary(kind="linear", factor=2.0)),
    "dynamic": tiny_config(position=_rotary(kind="dynamic", factor=2.0, original_length=6)),
    "yarn": tiny_config(
        position=_rotary(kind="yarn", factor=4.0, original_length=16, amplitude=1.1)
    ),
    "longrope": tiny_config(
        position=_rotary(
            kind="longrope", original_length=6, short_factors=(1.0, 1.2), long_factors=(2.0, 3.0)
        )
    ),
    "buckets": tiny_config(position=PositionConfig(kind="buckets", num_buckets=8, max_distance=8)),
    "rounded alibi": tiny_config(position=PositionConfig(kind="alibi_bfloat16")),
    "relative": tiny_config(
        position=PositionConfig(kind="relative"), attention={"num_kv_heads": 4}
    ),
    "learned with offset": tiny_config(
        position=PositionConfig(kind="learned", offset=2), embedding=EmbeddingConfig(True)
    ),
    "experts": tiny_config(experts=_EXPERTS),
    "clamped experts": tiny_config(
        experts=dataclasses.replace(_EXPERTS, router_bias=True),
        mlp={"clamp": 0.5, "up_offset": 1.0, "activation": "gelu_sigmoid", "bias": True},
    ),
    "shared experts": tiny_config(
        num_layers=3,
        first_layers=(LayerConfig(experts=False),),
        experts=ExpertsConfig(
            num_experts=8,
            experts_per_token=3,
            hidden_dim=8,
            shared_dim=12,
            shared_gate=True,
            score="sigmoid",
            selection_bias=True,
            bias_speed=0.01,
            num_groups=4,
            groups_per_token=2,
            scale=2.5,
        ),
    ),
    "latent": tiny_config(
        attention={
            "num_kv_heads": 4,
            "latent": LatentConfig(kv_dim=6, q_dim=10, rope_dim=4, value_dim=5),
        }
    ),
    "latent, direct queries": tiny_config(
        attention={
            "num_kv_heads": 4,
            "latent": LatentConfig(kv_dim=6, q_dim=None, rope_dim=2, value_dim=9),
        }
    ),
    "multi-token prediction": tiny_config(head=HeadConfig(mtp_depth=2)),
    "encoder": tiny_config(
        structure="encoder",
        position=PositionConfig(kind="learned"),
        norm=dataclasses.replace(_LAYER_NORM, placement="post"),
        embedding=EmbeddingConfig(norm=True, num_types=2),
        head=HeadConfig(transform=True, bias=True, pooler=True, num_classes=3),
        tied_embeddings=True,
    ),
    "local encoder": tiny_config(structure="encoder", num_layers=3, pattern=(_LOCAL, _GLOBAL)),
    "prefix": tiny_config(structure="prefix"),
    "encoder-decoder": tiny_config(
        structure="encoder_decoder",
        encoder_layers=3,
        position=PositionConfig(kind="buckets", num_buckets=8, max_distance=8),
        attention={"scale": 1.0},
        head=HeadConfig(scale=0.25),
        tied_embeddings=True,
    ),
    "post-norm encoder-decoder": tiny_config(
        structure="encoder_decoder",
        encoder_layers=2,
        position=PositionConfig(kind="learned", offset=2),
        norm=dataclasses.replace(_LAYER_NORM, placement="post"),
        embedding=EmbeddingConfig(norm=True),
        head=HeadConfig(bias=True),
        tied_embeddings=True,
    ),
    "sinusoidal encoder-decoder": tiny_config(
        structure="encoder_decoder",
        encoder_layers=1,
        position=PositionConfig(kind="sinusoidal"),
        norm=dataclasses.replace(_LAYER_NORM, placement="post"),
        scale_embeddings=True,
    ),
}


def rows(config: ModelConfig, lengths: list[int], seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Documents of these lengths, each as a row of its own with all that its structure reads."""
    documents = []
    for number, length in enumerate(lengths):
        tokens = random_tokens(1, length, seed + number)
        document = {"tokens": tokens, "positions": np.arange(length)[None]}
        if config.structure == "encoder_decoder":
            more = random_tokens(1, length + 2, seed + 100 + number)
            document |= {"encoder_tokens": more, "encoder_positions": np.arange(length + 2)[None]}
        if config.structure == "prefix":
            document["prefix"] = (np.arange(length) < length // 2).astype(np.int32)[None]
        if config.embedding.num_types:
            document["types"] = (np.arange(length) % 2).astype(np.int32)[None]
        documents.append(document)
    return documents


def pack(documents: list[dict[str, np.ndarray]], padding: int = 3) -> dict[str, jnp.ndarray]:
    """The documents one after the other in one row, with padding behind them."""
    packed: dict[str, Any] = {}
    for name in documents[0]:
        packed[name] = jnp.asarray(
            np.pad(np.concatenate([d[name] for d in documents], axis=1), ((0, 0), (0, padding)))
        )
    for segments, tokens in (("segments", "tokens"), ("encoder_segments", "encoder_tokens")):
        if tokens in documents[0]:
            numbers = [np.full(d[tokens].shape, i + 1) for i, d in enumerate(documents)]
            packed[segments] = jnp.asarray(
                np.pad(np.concatenate(numbers, axis=1), ((0, 0), (0, padding)))
            )
    return packed


def unpacked(documents: list[dict[str, np.ndarray]]) -> dict[str, jnp.ndarray]:
    """Each document in a row of its own, with padding behind the shorter ones."""
    singles = [pack([document], padding=0) for document in documents]
    width = {name: max(single[name].shape[1] for single in singles) for name in singles[0]}
    return {
        name: jnp.concatenate(
            [jnp.pad(s[name], ((0, 0), (0, width[name] - s[name].shape[1]))) for s in singles]
        )
        for name in width
    }
