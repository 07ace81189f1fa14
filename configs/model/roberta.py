"""RoBERTa: `configs/model/roberta.py:base`, `large`.

Source: Liu et al. 2019, arXiv:1907.11692, section 3 and table 9, and the files released with the
weights: position 0 is row 2 of the position table, there is one token type, and no pooler.
Parameters: 124,697,433; 355,412,057.
"""

import ml_collections

from research.core.errors import UserError, nearest

# layers, width, heads
SIZES = {"base": (12, 768, 12), "large": (24, 1024, 16)}


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """Returns the model of one size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not a RoBERTa. {nearest(size, SIZES)}")
    layers, width, heads = SIZES[size]
    return ml_collections.ConfigDict(
        {
            "structure": "encoder",
            "vocab_size": 50_265,
            "num_layers": layers,
            "embed_dim": width,
            "max_length": 512,
            "attention": {
                "num_heads": heads,
                "num_kv_heads": heads,
                "head_dim": width // heads,
                "qkv_bias": True,
                "out_bias": True,
            },
            "mlp": {"hidden_dim": 4 * width, "activation": "gelu", "gated": False, "bias": True},
            "norm": {"kind": "layernorm", "placement": "post", "epsilon": 1e-5, "bias": True},
            "position": {"kind": "learned", "offset": 2},
            "embedding": {"norm": True, "num_types": 1},
            "head": {"transform": True, "bias": True},
            "tied_embeddings": True,
            "dropout": 0.1,
        }
    )
