"""ModernBERT: `configs/model/modernbert.py:base`, `large`.

Source: Warner et al. 2024, arXiv:2412.13663, section 2.1 and table 4, and the `config.json`
released with the weights: no biases but the logits', no norm before the first attention, which
takes the normalized embeddings; one layer in three has global attention, the others a window of 64
tokens to each side and their own rotary base. Parameters: 149,655,232; 395,881,664.
"""

import ml_collections

from research.core.errors import UserError, nearest

# layers, width, heads, MLP width
SIZES = {"base": (22, 768, 12, 1152), "large": (28, 1024, 16, 2624)}
# Tokens at this distance are the first that are hidden.
LOCAL = {"window": 65, "position": {"kind": "rotary", "theta": 1e4}}


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """Returns the model of one size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not a ModernBERT. {nearest(size, SIZES)}")
    layers, width, heads, hidden = SIZES[size]
    return ml_collections.ConfigDict(
        {
            "structure": "encoder",
            "vocab_size": 50_368,
            "num_layers": layers,
            "embed_dim": width,
            "max_length": 8192,
            "attention": {"num_heads": heads, "num_kv_heads": heads, "head_dim": width // heads},
            "mlp": {"hidden_dim": hidden, "activation": "gelu", "gated": True},
            "norm": {"kind": "layernorm", "placement": "pre", "epsilon": 1e-5},
            "position": {"kind": "rotary", "theta": 160_000.0},
            "first_layers": [{"attention_norm": False}],
            "pattern": [LOCAL, LOCAL, {}],
            "embedding": {"norm": True},
            "head": {"transform": True, "transform_bias": False, "bias": True},
            "tied_embeddings": True,
        }
    )
