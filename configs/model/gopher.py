"""Gopher, six models from 44M to 280B: `configs/model/gopher.py:280b`, `7.1b`, …

Source: Rae et al. 2021, arXiv:2112.11446, table 1 and section 3.1: RMSNorm, relative positions (Dai
et al. 2019, arXiv:1901.02860), a vocabulary of 32,000, 2,048 tokens of context. Parameters, where
the table says 44M, 117M, 417M, 1.4B, 7.1B and 280B: 43,700,736; 116,709,120; 417,443,328;
1,374,799,872; 7,112,101,888; 279,714,217,984.

The paper does not say which projections have biases, whether embeddings are tied, nor what the
activation is. The counts agree with the table with biases everywhere and tied embeddings; GELU is
that of GPT-2, whose design Gopher follows.
"""

import ml_collections

from research.core.errors import UserError, nearest

# layers, width, heads, head width
SIZES = {
    "44m": (8, 512, 16, 32),
    "117m": (12, 768, 12, 64),
    "417m": (12, 1536, 12, 128),
    "1.4b": (24, 2048, 16, 128),
    "7.1b": (32, 4096, 32, 128),
    "280b": (80, 16_384, 128, 128),
}


def get_config(size: str = "280b") -> ml_collections.ConfigDict:
    """Returns the model of one size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not a Gopher. {nearest(size, SIZES)}")
    return build(*SIZES[size])


def build(layers: int, width: int, heads: int, head_dim: int) -> ml_collections.ConfigDict:
    """Returns a model of these sizes; Chinchilla's are of the same build."""
    return ml_collections.ConfigDict(
        {
            "vocab_size": 32_000,
            "num_layers": layers,
            "embed_dim": width,
            "max_length": 2048,
            "attention": {
                "num_heads": heads,
                "num_kv_heads": heads,
                "head_dim": head_dim,
                "qkv_bias": True,
                "out_bias": True,
            },
            "mlp": {
                "hidden_dim": 4 * width,
                "activation": "gelu_tanh",
                "gated": False,
                "bias": True,
            },
            "norm": {"kind": "rmsnorm", "placement": "pre"},
            "position": {"kind": "relative"},
            "tied_embeddings": True,
        }
    )
