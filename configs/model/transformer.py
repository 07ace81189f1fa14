"""The Transformer of 2017: `configs/model/transformer.py:base`, `big`.

Source: Vaswani et al. 2017, arXiv:1706.03762, sections 3 and 5 and table 3, with the shared
vocabulary of about 37,000 pairs of English and German (section 5.1). Parameters: 63,045,632 and
214,171,648; the paper says 65 and 213 million. No single vocabulary gives both: 40,800 pairs would
give the first and 35,900 the second.

The paper leaves open, and tensor2tensor, the authors' code, says: no biases in attention, a norm
epsilon of 1e-6. The longest sequence is inferred; sinusoidal positions have no parameters and
no limit. The dropout of `big` is that for English to German; English to French had 0.1.
"""

import ml_collections

from research.core.errors import UserError, nearest

# layers of the encoder and of the decoder, width, heads, MLP width, dropout
SIZES = {
    "base": (6, 512, 8, 2048, 0.1),
    "big": (6, 1024, 16, 4096, 0.3),
}


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """Returns the model of one size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not a Transformer of 2017. {nearest(size, SIZES)}")
    layers, width, heads, hidden, dropout = SIZES[size]
    return ml_collections.ConfigDict(
        {
            "structure": "encoder_decoder",
            "vocab_size": 37_000,
            "num_layers": layers,
            "encoder_layers": layers,
            "embed_dim": width,
            "max_length": 1024,
            "attention": {"num_heads": heads, "num_kv_heads": heads, "head_dim": width // heads},
            "mlp": {"hidden_dim": hidden, "activation": "relu", "gated": False, "bias": True},
            "norm": {"kind": "layernorm", "placement": "post", "epsilon": 1e-6, "bias": True},
            "position": {"kind": "sinusoidal"},
            "tied_embeddings": True,
            "scale_embeddings": True,
            "dropout": dropout,
        }
    )
