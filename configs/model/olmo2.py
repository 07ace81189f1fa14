"""OLMo 2, all sizes: `configs/model/olmo2.py:1b`, `7b`, `13b`, `32b`.

Source: OLMo Team 2024, arXiv:2501.00656, table 1 and section 2.1; the model card of the 1B; the
padded vocabulary and the epsilon from the `config.json` released with the weights. Parameters:
1,484,916,736; 7,298,617,344; 13,716,198,400; 32,234,279,936.
"""

import ml_collections

from research.core.errors import UserError, nearest

# layers, width, heads, key/value heads, MLP width
SIZES = {
    "1b": (16, 2048, 16, 16, 8192),
    "7b": (32, 4096, 32, 32, 11_008),
    "13b": (40, 5120, 40, 40, 13_824),
    "32b": (64, 5120, 40, 8, 27_648),
}


def get_config(size: str = "1b") -> ml_collections.ConfigDict:
    """Returns the model of one size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not an OLMo 2. {nearest(size, SIZES)}")
    layers, width, heads, kv_heads, hidden = SIZES[size]
    return ml_collections.ConfigDict(
        {
            "vocab_size": 100_352,
            "num_layers": layers,
            "embed_dim": width,
            "max_length": 4096,
            "attention": {
                "num_heads": heads,
                "num_kv_heads": kv_heads,
                "head_dim": 128,
                "qk_norm": "all",
            },
            "mlp": {"hidden_dim": hidden, "activation": "silu", "gated": True},
            "norm": {"kind": "rmsnorm", "placement": "output", "epsilon": 1e-6},
            "position": {"kind": "rotary", "theta": 5e5},
            "tied_embeddings": False,
        }
    )
