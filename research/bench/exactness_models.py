"""Small models of the families whose answers `tessera bench exactness` compares, and parameters
under which each of their parts tells in an answer.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.tree_util import tree_map_with_path

from research.core.trees import path_name
from research.models.config import (
    AttentionConfig,
    ExpertsConfig,
    HeadConfig,
    LatentConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
    RopeScalingConfig,
)
from research.models.initialization import init_params

# Tokens of a text, at most: some pages.
LENGTH = 128
WIDTH = 64

_PLAIN = ModelConfig(
    # One id more than the bytes and their control tokens: it is never drawn.
    vocab_size=260,
    num_layers=2,
    embed_dim=WIDTH,
    max_length=LENGTH,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
    mlp=MlpConfig(hidden_dim=192),
)
_EXPERTS = ExpertsConfig(num_experts=4, experts_per_token=2, hidden_dim=64)

MODELS: dict[str, ModelConfig] = {
    "GPT-2": dataclasses.replace(
        _PLAIN,
        attention=AttentionConfig(4, 4, 16, qkv_bias=True, out_bias=True),
        mlp=MlpConfig(hidden_dim=256, activation="gelu_tanh", gated=False, bias=True),
        norm=NormConfig(kind="layernorm", bias=True),
        position=PositionConfig(kind="learned"),
        tied_embeddings=True,
    ),
    # Its keys depend on the length that a request may reach.
    "LLaMA": dataclasses.replace(
        _PLAIN,
        position=PositionConfig(
            theta=1000.0,
            scaling=RopeScalingConfig(kind="dynamic", factor=2.0, original_length=32),
        ),
    ),
    "Gemma": dataclasses.replace(
        _PLAIN,
        num_layers=3,
        pattern=(LayerConfig(window=20), LayerConfig()),
        attention=AttentionConfig(4, 2, 16, softcap=20.0),
        mlp=MlpConfig(hidden_dim=192, activation="gelu_tanh"),
        norm=NormConfig(placement="sandwich", unit_offset=True),
        head=HeadConfig(softcap=15.0),
        tied_embeddings=True,
        scale_embeddings=True,
    ),
    # Windows in all layers: pages before them are released.
    "Mistral": dataclasses.replace(_PLAIN, pattern=(LayerConfig(window=20),)),
    "experts": dataclasses.replace(_PLAIN, experts=_EXPERTS),
    "DeepSeek-V3": dataclasses.replace(
        _PLAIN,
        num_layers=3,
        first_layers=(LayerConfig(experts=False),),
        attention=AttentionConfig(
            4, 4, 16, latent=LatentConfig(kv_dim=24, q_dim=40, rope_dim=8, value_dim=20)
        ),
        experts=ExpertsConfig(
            num_experts=8,
            experts_per_token=3,
            hidden_dim=32,
            shared_dim=48,
            score="sigmoid",
            selection_bias=True,
            num_groups=4,
            groups_per_token=2,
            scale=2.5,
        ),
        head=HeadConfig(mtp_depth=1),
    ),
    "T5": dataclasses.replace(
        _PLAIN,
        structure="encoder_decoder",
        encoder_layers=2,
        position=PositionConfig(kind="buckets", num_buckets=8, max_distance=32),
        attention=AttentionConfig(4, 4, 16, scale=1.0),
        mlp=MlpConfig(hidden_dim=192, activation="relu", gated=False),
        tied_embeddings=True,
    ),
}


def random_params(config: ModelConfig, seed: int = 0) -> Any:
    """Returns parameters of which each tells in the logits, biases and scales too, and whose logits
    are as large as those of a trained model.
    """
    random = np.random.default_rng(seed)
    bfloat16 = config.dtype == "bfloat16"

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path_name(path)
        is_scale = name.endswith("scale") and not config.norm.unit_offset
        values = random.normal(float(is_scale), 0.15, leaf.shape).astype(np.float32)
        # Weights are kept in the type of the products, biases of experts' choice are not.
        keeps = name.endswith("selection_bias") or not bfloat16
        return values if keeps else values.astype(ml_dtypes.bfloat16)

    shapes = nn.unbox(boxed_shapes(config))
    return jax.tree.map(jnp.asarray, tree_map_with_path(fill, shapes))


def boxed_shapes(config: ModelConfig) -> Any:
    """Returns the shapes of a model's parameters, each boxed with its logical axis names."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
