"""DeepSeek-V3 and V2-Lite: `configs/model/deepseek.py:v3-671b`, `v3-671b-mtp`, `v2-lite-16b`.

Sources: DeepSeek-AI 2024, arXiv:2412.19437, sections 2 and 4.2 (V3; R1 and V3.1 are the same);
DeepSeek-AI 2024, arXiv:2405.04434, appendix B (V2-Lite); YaRN's numbers from the `config.json`
released with the weights, where the scores' factor is (0.1 m ln 40 + 1)² / √(H + rope_dim) with
`mscale_all_dim` for m. The balance loss of V3, which the paper computes for one sequence
at a time, is computed over the batch. Its selection biases move by 0.001 per step; in the paper
they stay constant for the last 500 of the 14,800 billion tokens. Parameters:

    v3-671b 671,026,419,200    v3-671b-mtp, with one MTP module, 682,636,487,424
    v2-lite-16b 15,706,484,224

The released files of V3 hold 685 billion: the MTP module has copies of the embedding and the output
projection, and each block of 8-bit numbers has a scale. V2, 236B, is left out: it ranks groups of
experts by their best expert, V3 and this configuration by their best two.
"""

import math
from typing import Any

import ml_collections

from research.core.errors import UserError, nearest

FACTOR = 40.0
THREE = {
    "vocab_size": 129_280,
    "embed_dim": 7168,
    "attention": {"latent": {"q_dim": 1536}},
    "mlp": {"hidden_dim": 18_432},
    "experts": {
        "num_experts": 256,
        "experts_per_token": 8,
        "hidden_dim": 2048,
        "shared_dim": 2048,
        "score": "sigmoid",
        "renormalize": True,
        "selection_bias": True,
        "bias_speed": 1e-3,
        "num_groups": 8,
        "groups_per_token": 4,
        "scale": 2.5,
        "balance_weight": 1e-4,
    },
}
TWO_LITE = {
    "vocab_size": 102_400,
    "embed_dim": 2048,
    "attention": {"latent": {"q_dim": None}},
    "mlp": {"hidden_dim": 10_944},
    "experts": {
        "num_experts": 64,
        "experts_per_token": 6,
        "hidden_dim": 1408,
        "shared_dim": 2816,
        "score": "softmax",
        "renormalize": False,
    },
}

# what its generation has, then layers, leading ones without experts, heads, `mscale_all_dim`,
# MTP modules
SIZES: dict[str, tuple[dict[str, Any], int, int, int, float, int]] = {
    "v3-671b": (THREE, 61, 3, 128, 1.0, 0),
    "v3-671b-mtp": (THREE, 61, 3, 128, 1.0, 1),
    "v2-lite-16b": (TWO_LITE, 27, 1, 16, 0.707, 0),
}


def get_config(size: str = "v3-671b") -> ml_collections.ConfigDict:
    """Returns the model of one generation and size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not a DeepSeek. {nearest(size, SIZES)}")
    generation, layers, dense, heads, mscale, mtp_depth = SIZES[size]
    head_dim, rope_dim = 128, 64
    scaling = {
        "kind": "yarn",
        "factor": FACTOR,
        "original_length": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    config = ml_collections.ConfigDict(
        {
            "num_layers": layers,
            "max_length": 163_840,
            "attention": {
                "num_heads": heads,
                "num_kv_heads": heads,
                "head_dim": head_dim,
                "scale": (0.1 * mscale * math.log(FACTOR) + 1) ** 2
                / math.sqrt(head_dim + rope_dim),
                "latent": {"kv_dim": 512, "rope_dim": rope_dim, "value_dim": 128},
            },
            "mlp": {"activation": "silu", "gated": True},
            "norm": {"kind": "rmsnorm", "placement": "pre", "epsilon": 1e-6},
            "position": {"kind": "rotary", "theta": 1e4, "scaling": scaling},
            "first_layers": [{"experts": False}] * dense,
            "head": {"mtp_depth": mtp_depth, "mtp_weight": 0.3},
            "tied_embeddings": False,
            "init_stddev": 0.006,
        }
    )
    config.update(generation)
    return config
