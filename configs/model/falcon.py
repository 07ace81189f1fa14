"""Falcon: `configs/model/falcon.py:7b`, `40b`, `180b`, and Falcon 2, `11b`.

Sources: Almazrouei et al. 2023, arXiv:2311.16867, section 4 (7B, 40B, 180B); Malartic et al. 2024,
arXiv:2407.14885, section 2 (Falcon 2); biases, norms and tied embeddings from the `config.json`
released with the weights and the modeling code released with them. Parameters: 6,921,720,704;
41,303,293,952; 178,557,088,768; 11,102,822,400. The output projection of the first three is their
embedding, of which some of the released files hold a copy.

Left out: Falcon-RW 1B and 7B, which add ALiBi before the scores are divided by √H. Falcon 3 has
LLaMA's design.
"""

import ml_collections

from research.core.errors import UserError, nearest

# layers, width, heads, key/value heads, head width, norms of a layer, rotary base, longest
# sequence, tied embeddings
SIZES = {
    "7b": (32, 4544, 71, 1, 64, "parallel", 1e4, 2048, True),
    "40b": (60, 8192, 128, 8, 64, "parallel_pair", 1e4, 2048, True),
    "180b": (80, 14_848, 232, 8, 64, "parallel_pair", 1e4, 2048, True),
    "11b": (60, 4096, 32, 8, 128, "parallel", 500_042.0, 8192, False),
}


def get_config(size: str = "7b") -> ml_collections.ConfigDict:
    """Returns the model of one size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not a Falcon. {nearest(size, SIZES)}")
    layers, width, heads, kv_heads, head_dim, placement, theta, max_length, tied = SIZES[size]
    return ml_collections.ConfigDict(
        {
            "vocab_size": 65_024,
            "num_layers": layers,
            "embed_dim": width,
            "max_length": max_length,
            "attention": {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim},
            "mlp": {"hidden_dim": 4 * width, "activation": "gelu", "gated": False},
            "norm": {"kind": "layernorm", "placement": placement, "epsilon": 1e-5, "bias": True},
            "position": {"kind": "rotary", "theta": theta},
            "tied_embeddings": tied,
        }
    )
