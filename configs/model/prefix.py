"""The prefix decoder of the T5 paper: `configs/model/prefix.py`.

Source: Raffel et al. 2020, arXiv:1910.10683, section 3.2.1 and table 2, "Prefix LM": the decoder of
T5 base alone; attention is bidirectional within the prefix and causal after it. Parameters:
109,628,544; the paper says half of the 220 million that its baseline has with an encoder.
"""

import math

import ml_collections

from research.core.errors import UserError, nearest

# layers, width, heads
SIZES = {"base": (12, 768, 12)}


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """Returns the model; it has one size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not a prefix decoder. {nearest(size, SIZES)}")
    layers, width, heads = SIZES[size]
    return ml_collections.ConfigDict(
        {
            "structure": "prefix",
            "vocab_size": 32_128,
            "num_layers": layers,
            "embed_dim": width,
            "max_length": 1024,
            "attention": {
                "num_heads": heads,
                "num_kv_heads": heads,
                "head_dim": width // heads,
                "scale": 1.0,
            },
            "mlp": {"hidden_dim": 4 * width, "activation": "relu", "gated": False},
            "norm": {"kind": "rmsnorm", "placement": "pre", "epsilon": 1e-6},
            "position": {"kind": "buckets", "num_buckets": 32, "max_distance": 128},
            "head": {"scale": 1 / math.sqrt(width)},
            "tied_embeddings": True,
            "dropout": 0.1,
        }
    )
