"""The table of a model says what its config says, in the field's terms."""

import dataclasses

from research.inspection.description import layer_text, mask_text, model_table, positions
from research.models.config import (
    ExpertsConfig,
    HeadConfig,
    LatentConfig,
    LayerConfig,
    ModelConfig,
    PositionConfig,
    RopeScalingConfig,
)
from tests.tiny import tiny_config


def test_plain_decoder_has_no_row_for_what_it_does_not_have():
    assert model_table(tiny_config()) == {
        "structure": "decoder-only",
        "layers": "2",
        "width": "16",
        "query heads": "4",
        "KV heads": "2",
        "head dim": "4",
        "positions": "RoPE, theta 10,000",
        "MLP width": "24",
        "activation": "SiLU, gated",
        "norm": "RMSNorm before each sublayer, epsilon 1e-05",
        "context": "64 tokens",
        "vocabulary": "48",
        "output projection": "not tied",
    }


def test_options_of_attention_mlp_embedding_and_head_have_rows():
    attention = {"scale": 1.0, "softcap": 50.0, "qk_norm": "head", "qkv_bias": True, "sinks": True}
    mlp = {"activation": "gelu_tanh", "clamp": 7.0, "up_offset": 1.0, "bias": True}
    head = HeadConfig(scale=0.25, softcap=30.0, bias=True, mtp_depth=1)
    config = tiny_config(attention, mlp, head=head, tied_embeddings=True, scale_embeddings=True)
    wanted = {
        "attention scale": "1",
        "attention softcap": "50",
        "QK norm": "RMSNorm of each head's queries and keys",
        "attention biases": "query, key and value projections",
        "attention sinks": "a learned logit for each head",
        "activation": "GELU (tanh approximation), gated",
        "MLP clamp": "7",
        "MLP up offset": "1",
        "MLP biases": "yes",
        "output projection": "tied to the embedding",
        "embedding scale": "√16",
        "hidden state scale": "0.25",
        "logit softcap": "30",
        "logit bias": "yes",
        "MTP depth": "1 (multi-token prediction, training)",
    }
    assert wanted.items() <= model_table(config).items()


def test_latent_attention_has_its_widths_and_no_kv_heads():
    latent = LatentConfig(kv_dim=6, q_dim=8, rope_dim=2, value_dim=3)
    table = model_table(tiny_config({"num_kv_heads": 4, "latent": latent}))
    wanted = {
        "head dim": "4 without RoPE + 2 with RoPE",
        "value head dim": "3",
        "KV latent": "width 6 (multi-head latent attention)",
        "query latent": "width 8",
    }
    assert wanted.items() <= table.items()
    assert "KV heads" not in table


def test_experts_have_count_widths_and_router():
    experts = ExpertsConfig(
        num_experts=8,
        experts_per_token=2,
        hidden_dim=20,
        shared_dim=12,
        shared_gate=True,
        score="sigmoid",
        selection_bias=True,
        num_groups=4,
        groups_per_token=2,
        scale=2.5,
    )
    config = tiny_config(experts=experts, first_layers=(LayerConfig(experts=False),))
    wanted = {
        "experts": "8, 2 per token",
        "expert width": "20",
        "shared expert": "width 12, sigmoid gate",
        "router": "sigmoid, from 2 of 4 groups, chosen with a selection bias, "
        "weights of the chosen renormalized, weights × 2.5",
        "MLP width": "24",
    }
    assert wanted.items() <= model_table(config).items()
    first, second = config.layers()
    assert layer_text(config, first) == "causal attention, dense MLP"
    assert layer_text(config, second) == "causal attention, experts: 8, 2 per token"


def test_a_model_of_experts_alone_has_no_mlp_width():
    experts = ExpertsConfig(num_experts=8, experts_per_token=2, hidden_dim=20)
    table = model_table(tiny_config(experts=experts))
    assert "MLP width" not in table
    assert table["router"] == "softmax, weights of the chosen renormalized"
    assert (table["expert width"], table["activation"]) == ("20", "SiLU, gated")


def test_positions_have_their_parameters():
    yarn = RopeScalingConfig(kind="yarn", factor=40.0, original_length=4096)
    rope = PositionConfig(theta=5e5, rotary_dim=2, scaling=yarn)
    assert positions(rope) == (
        "RoPE, theta 500,000, 2 columns of a head, YaRN scaling × 40 from 4,096 tokens"
    )
    buckets = PositionConfig(kind="buckets", num_buckets=8, max_distance=24)
    assert positions(buckets) == "relative bias, 8 buckets up to a distance of 24 (T5)"


def masked(structure: str) -> ModelConfig:
    return dataclasses.replace(tiny_config(), structure=structure)


def test_masks_are_named_by_their_pattern():
    assert mask_text(masked("decoder"), None) == "causal attention"
    assert mask_text(masked("encoder"), None) == "bidirectional attention"
    assert mask_text(masked("prefix"), None) == (
        "attention bidirectional in the prefix, causal after it"
    )
    # A window hides tokens at its distance: of 4 tokens there are 3 to each side.
    assert mask_text(masked("encoder"), 4) == (
        "bidirectional attention, sliding window of 3 tokens to each side"
    )
    assert mask_text(masked("decoder"), 4) == (
        "causal attention, sliding window of 4 tokens (itself included)"
    )
