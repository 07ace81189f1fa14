"""GPT-2, all four sizes: `configs/model/gpt2.py:small` (or `124m`), `medium`, `large`, `xl`.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2, and the
released weights, whose tanh GELU, biases and tied embeddings these are. Parameters: 124,439,808;
354,823,168; 774,030,080; 1,557,611,200. The paper names no dropout, and none is set.
"""

import ml_collections

from research.core.errors import UserError, nearest

# layers, width, heads
SIZES = {
    "small": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (36, 1280, 20),
    "xl": (48, 1600, 25),
}
SIZES |= {
    "124m": SIZES["small"],
    "355m": SIZES["medium"],
    "774m": SIZES["large"],
    "1558m": SIZES["xl"],
}


def get_config(size: str = "small") -> ml_collections.ConfigDict:
    """Returns the model of one size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not a GPT-2. {nearest(size, SIZES)}")
    layers, width, heads = SIZES[size]
    return ml_collections.ConfigDict(
        {
            "vocab_size": 50_257,
            "num_layers": layers,
            "embed_dim": width,
            "max_length": 1024,
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
            "norm": {"kind": "layernorm", "placement": "pre", "epsilon": 1e-5, "bias": True},
            "position": {"kind": "learned"},
            "tied_embeddings": True,
        }
    )
