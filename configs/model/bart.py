"""BART: `configs/model/bart.py:base`, `large`.

Source: Lewis et al. 2020, arXiv:1910.13461, section 2.1, and the files released with the weights:
learned positions, of which position 0 is row 2 of the table; normalized embeddings; one embedding
table for encoder, decoder and logits.
Parameters: 139,420,416; 406,291,456.
"""

import ml_collections

from research.core.errors import UserError, nearest

# layers of the encoder and of the decoder, width, heads
SIZES = {"base": (6, 768, 12), "large": (12, 1024, 16)}


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """Returns the model of one size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not a BART. {nearest(size, SIZES)}")
    layers, width, heads = SIZES[size]
    return ml_collections.ConfigDict(
        {
            "structure": "encoder_decoder",
            "decoder_start_id": 2,  # the end of text
            "vocab_size": 50_265,
            "num_layers": layers,
            "encoder_layers": layers,
            "embed_dim": width,
            "max_length": 1024,
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
            "embedding": {"norm": True},
            "tied_embeddings": True,
            "dropout": 0.1,
        }
    )
