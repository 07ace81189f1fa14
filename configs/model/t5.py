"""T5, T5 1.1 and UL2: `configs/model/t5.py:base`, `11b`, `1.1-xl`, `ul2-20b`, …

Sources: Raffel et al. 2020, arXiv:1910.10683, sections 2.1 and 3.7 (T5); Shazeer 2020,
arXiv:2002.05202, and the list of released checkpoints of text-to-text-transfer-transformer (1.1;
Flan-T5, Chung et al. 2022, arXiv:2210.11416, is the same); Tay et al. 2022, arXiv:2205.05131,
section 4 (UL2; Flan-UL2 is the same); the epsilon and the padded vocabulary from the `config.json`
released with the weights. Parameters:

    T5   small 60,506,624  base 222,903,552  large 737,668,096  3b 2,851,598,336  11b 11,307,321,344
    1.1  small 76,961,152  base 247,577,856  large 783,150,080  xl 2,849,757,184  xxl 11,135,332,352
    UL2  20b 19,591,209,984

Dropout is that of pre-training: 0.1 for T5, none for the others. 512 is the training length;
relative positions have no limit.
"""

import math

import ml_collections

from research.core.errors import UserError, nearest

ONE = {"mlp": {"activation": "relu", "gated": False}, "tied_embeddings": True, "dropout": 0.1}
ONE_1 = {"mlp": {"activation": "gelu_tanh", "gated": True}, "tied_embeddings": False}
UL2 = {"mlp": {"activation": "silu", "gated": True}, "tied_embeddings": False}

# what its generation has, then layers of the encoder and of the decoder, width, heads, head width,
# MLP width
SIZES = {
    "small": (ONE, 6, 512, 8, 64, 2048),
    "base": (ONE, 12, 768, 12, 64, 3072),
    "large": (ONE, 24, 1024, 16, 64, 4096),
    "3b": (ONE, 24, 1024, 32, 128, 16_384),
    "11b": (ONE, 24, 1024, 128, 128, 65_536),
    "1.1-small": (ONE_1, 8, 512, 6, 64, 1024),
    "1.1-base": (ONE_1, 12, 768, 12, 64, 2048),
    "1.1-large": (ONE_1, 24, 1024, 16, 64, 2816),
    "1.1-xl": (ONE_1, 24, 2048, 32, 64, 5120),
    "1.1-xxl": (ONE_1, 24, 4096, 64, 64, 10_240),
    "ul2-20b": (UL2, 32, 4096, 16, 256, 16_384),
}


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """Returns the model of one generation and size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not a T5. {nearest(size, SIZES)}")
    generation, layers, width, heads, head_dim, hidden = SIZES[size]
    config = ml_collections.ConfigDict(
        {
            "structure": "encoder_decoder",
            "vocab_size": 32_128,
            "num_layers": layers,
            "encoder_layers": layers,
            "embed_dim": width,
            "max_length": 512,
            "attention": {
                "num_heads": heads,
                "num_kv_heads": heads,
                "head_dim": head_dim,
                "scale": 1.0,
            },
            "mlp": {"hidden_dim": hidden},
            "norm": {"kind": "rmsnorm", "placement": "pre", "epsilon": 1e-6},
            "position": {"kind": "buckets", "num_buckets": 32, "max_distance": 128},
        }
    )
    config.update(generation)
    if config.tied_embeddings:
        config.head = {"scale": 1 / math.sqrt(width)}
    return config
