"""Qwen 2.5 and 3, dense and with experts: `configs/model/qwen.py:3-0.6b`, `2.5-72b`, `3-30b-a3b`, …

Sources: Qwen Team 2024, arXiv:2412.15115, table 1 (2.5); Qwen Team 2025, arXiv:2505.09388, tables 1
and 2 (3); Yang et al. 2024, arXiv:2407.10671, table 1 (2-57b-a14b); the model cards of 1.5-MoE and
of Qwen3-Coder (480B); the sizes of the vocabularies, epsilons and rotary bases from the
`config.json` released with the weights, of the base model where there is one. No paper states
the weight of a balance loss, and none is set. Parameters:

    2.5  0.5b 494,032,768      1.5b 1,543,714,304     3b 3,085,938,688      7b 7,615,616,512
         14b 14,770,033,664    32b 32,763,876,352     72b 72,706,203,648
    3    0.6b 596,049,920      1.7b 1,720,574,976     4b 4,022,468,096      8b 8,190,735,360
         14b 14,768,307,200    32b 32,762,123,264
         30b-a3b 30,532,122,624    235b-a22b 235,093,634,560    480b-a35b 480,154,875,392
    2    57b-a14b 57,408,658,944   1.5: moe-a2.7b 14,315,784,192
"""

from typing import Any

import ml_collections

from research.core.errors import UserError, nearest


def _experts(number: int, per_token: int, hidden: int, shared: int = 0) -> dict[str, Any]:
    """Returns a mixture; the older ones have a shared expert and do not renormalize."""
    return {
        "experts": {
            "num_experts": number,
            "experts_per_token": per_token,
            "hidden_dim": hidden,
            "shared_dim": shared,
            "shared_gate": shared > 0,
            "score": "softmax",
            "renormalize": shared == 0,
        }
    }


BIASED = {"vocab_size": 151_936, "max_length": 32_768, "attention": {"qkv_bias": True}}
LONG = BIASED | {"max_length": 131_072}
WIDE = LONG | {"vocab_size": 152_064}
THREE = {"vocab_size": 151_936, "max_length": 32_768, "attention": {"qk_norm": "head"}}
TIED = {"tied_embeddings": True}
SHORT = {"max_length": 8192}
LAX = {"norm": {"epsilon": 1e-5}}
CHAT = {"max_length": 40_960}
CODER = {"max_length": 262_144, "position": {"theta": 1e7}}

# what its generation has, then layers, width, heads, key/value heads, head width, width of the MLP
# or of an expert
SIZES = {
    "2.5-0.5b": (BIASED | TIED, 24, 896, 14, 2, 64, 4864),
    "2.5-1.5b": (LONG | TIED, 28, 1536, 12, 2, 128, 8960),
    "2.5-3b": (BIASED | TIED, 36, 2048, 16, 2, 128, 11_008),
    "2.5-7b": (WIDE, 28, 3584, 28, 4, 128, 18_944),
    "2.5-14b": (WIDE | LAX, 48, 5120, 40, 8, 128, 13_824),
    "2.5-32b": (WIDE | LAX, 64, 5120, 40, 8, 128, 27_648),
    "2.5-72b": (WIDE | LAX, 80, 8192, 64, 8, 128, 29_568),
    "3-0.6b": (THREE | TIED, 28, 1024, 16, 8, 128, 3072),
    "3-1.7b": (THREE | TIED, 28, 2048, 16, 8, 128, 6144),
    "3-4b": (THREE | TIED, 36, 2560, 32, 8, 128, 9728),
    "3-8b": (THREE, 36, 4096, 32, 8, 128, 12_288),
    "3-14b": (THREE, 40, 5120, 40, 8, 128, 17_408),
    "3-32b": (THREE | CHAT, 64, 5120, 64, 8, 128, 25_600),
    "3-30b-a3b": (THREE | _experts(128, 8, 768), 48, 2048, 32, 4, 128, 768),
    "3-235b-a22b": (THREE | CHAT | _experts(128, 8, 1536), 94, 4096, 64, 4, 128, 1536),
    "3-480b-a35b": (THREE | CODER | _experts(160, 8, 2560), 62, 6144, 96, 8, 128, 2560),
    "2-57b-a14b": (LONG | _experts(64, 8, 2560, shared=20_480), 28, 3584, 28, 4, 128, 2560),
    "1.5-moe-a2.7b": (
        BIASED | SHORT | _experts(60, 4, 1408, shared=5632),
        24,
        2048,
        16,
        16,
        128,
        1408,
    ),
}


def get_config(size: str = "3-0.6b") -> ml_collections.ConfigDict:
    """Returns the model of one generation and size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not a Qwen. {nearest(size, SIZES)}")
    generation, layers, width, heads, kv_heads, head_dim, hidden = SIZES[size]
    config = ml_collections.ConfigDict(
        {
            "num_layers": layers,
            "embed_dim": width,
            "attention": {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim},
            "mlp": {"hidden_dim": hidden, "activation": "silu", "gated": True},
            "norm": {"kind": "rmsnorm", "placement": "pre", "epsilon": 1e-6},
            "position": {"kind": "rotary", "theta": 1e6},
            "tied_embeddings": False,
        }
    )
    config.update(generation)
    return config
