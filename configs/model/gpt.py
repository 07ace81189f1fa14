"""The first GPT: `configs/model/gpt.py`.

Source: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section
4.1; the vocabulary of 40,000 merges over 478 symbols, the tanh GELU, the biases and the tied
embeddings are those of the released weights.
Parameters: 116,534,784.
"""

import ml_collections

from research.core.errors import UserError, nearest

# layers, width, heads
SIZES = {"117m": (12, 768, 12)}


def get_config(size: str = "117m") -> ml_collections.ConfigDict:
    """Returns the model; it has one size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not the first GPT. {nearest(size, SIZES)}")
    layers, width, heads = SIZES[size]
    return ml_collections.ConfigDict(
        {
            "vocab_size": 40_478,
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
            "mlp": {
                "hidden_dim": 4 * width,
                "activation": "gelu_tanh",
                "gated": False,
                "bias": True,
            },
            "norm": {"kind": "layernorm", "placement": "post", "epsilon": 1e-5, "bias": True},
            "position": {"kind": "learned"},
            "tied_embeddings": True,
            "dropout": 0.1,
        }
    )
