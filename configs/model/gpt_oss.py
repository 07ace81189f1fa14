"""gpt-oss: `configs/model/gpt_oss.py:20b`, `120b`.

Source: OpenAI 2025, arXiv:2508.10925, section 2 and table 1, and the `config.json` and reference
code released with the weights: learned sinks, local and global attention alternating, a softmax
over the chosen experts, SwiGLU with clamps and with 1 added to the linear branch, YaRN from 4,096
tokens. Parameters: 20,914,757,184; 116,829,156,672.
"""

import math

import ml_collections

from research.core.errors import UserError, nearest

FACTOR = 32.0
# layers, experts
SIZES = {"20b": (24, 32), "120b": (36, 128)}


def get_config(size: str = "20b") -> ml_collections.ConfigDict:
    """Returns the model of one size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not a gpt-oss. {nearest(size, SIZES)}")
    layers, experts = SIZES[size]
    scaling = {
        "kind": "yarn",
        "factor": FACTOR,
        "original_length": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "amplitude": 0.1 * math.log(FACTOR) + 1,
    }
    return ml_collections.ConfigDict(
        {
            "vocab_size": 201_088,
            "num_layers": layers,
            "embed_dim": 2880,
            "max_length": 131_072,
            "attention": {
                "num_heads": 64,
                "num_kv_heads": 8,
                "head_dim": 64,
                "qkv_bias": True,
                "out_bias": True,
                "sinks": True,
            },
            "mlp": {
                "hidden_dim": 2880,
                "activation": "gelu_sigmoid",
                "gated": True,
                "bias": True,
                "clamp": 7.0,
                "up_offset": 1.0,
            },
            "experts": {
                "num_experts": experts,
                "experts_per_token": 4,
                "hidden_dim": 2880,
                "score": "softmax",
                "renormalize": True,
                "router_bias": True,
            },
            "norm": {"kind": "rmsnorm", "placement": "pre", "epsilon": 1e-5},
            "position": {"kind": "rotary", "theta": 150_000.0, "scaling": scaling},
            "pattern": [{"window": 128}, {}],
            "tied_embeddings": False,
        }
    )
