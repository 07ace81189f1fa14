"""MPT: `configs/model/mpt.py:7b`, `7b-8k`, `30b`.

Source: MosaicML NLP Team 2023, "Introducing MPT-7B" and "MPT-30B: Raising the bar", the model cards
and `config.json` released with the weights: no biases, not even in norms; ALiBi (Press et al. 2021,
arXiv:2108.12409); tied embeddings of a vocabulary padded to 50,432. Parameters: 7b and 7b-8k
6,649,286,656; 30b 29,957,200,896.

Left out: MPT-7B-StoryWriter, which clips queries, keys and values.
"""

import ml_collections

from research.core.errors import UserError, nearest

# layers, width, heads, longest sequence
SIZES = {
    "7b": (32, 4096, 32, 2048),
    "7b-8k": (32, 4096, 32, 8192),
    "30b": (48, 7168, 64, 8192),
}


def get_config(size: str = "7b") -> ml_collections.ConfigDict:
    """Returns the model of one size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not an MPT. {nearest(size, SIZES)}")
    layers, width, heads, max_length = SIZES[size]
    return ml_collections.ConfigDict(
        {
            "vocab_size": 50_432,
            "num_layers": layers,
            "embed_dim": width,
            "max_length": max_length,
            "attention": {"num_heads": heads, "num_kv_heads": heads, "head_dim": width // heads},
            "mlp": {"hidden_dim": 4 * width, "activation": "gelu", "gated": False},
            "norm": {"kind": "layernorm", "placement": "pre", "epsilon": 1e-5},
            "position": {"kind": "alibi"},
            "tied_embeddings": True,
        }
    )
