"""GPT-3, the eight models of the paper: `configs/model/gpt3.py:175b`, `small` (or `125m`), `6.7b`,
…

Source: Brown et al. 2020, arXiv:2005.14165, table 2.1 and section 2.1: GPT-2's design and
vocabulary, 2,048 tokens of context, dense and locally banded attention alternating. Parameters,
where the table says 125M, 350M, 760M, 1.3B, 2.7B, 6.7B, 13.0B and 175.0B: 125,226,240; 355,871,744;
760,300,032; 1,315,723,264; 2,651,553,280; 6,658,404,352; 12,936,488,380; 174,604,259,328.

Two rows of the table do not agree with themselves. `xl` has 24 heads of 128 there, which would make
1.5 billion parameters; 16 heads, which fill its width, make the 1.3 that it names. `13b` has 40
heads of 128 and a width of 5,140; both are kept. The paper leaves open how broad the band is and
which layers come first: 256 tokens are those of GPT-Neo, EleutherAI's replication, and dense layers
come first, as the paper names them first.
"""

import ml_collections

from research.core.errors import UserError, nearest

BAND = 256
# layers, width, heads, head width
SIZES = {
    "small": (12, 768, 12, 64),
    "medium": (24, 1024, 16, 64),
    "large": (24, 1536, 16, 96),
    "xl": (24, 2048, 16, 128),
    "2.7b": (32, 2560, 32, 80),
    "6.7b": (32, 4096, 32, 128),
    "13b": (40, 5140, 40, 128),
    "175b": (96, 12_288, 96, 128),
}
SIZES |= {
    "125m": SIZES["small"],
    "350m": SIZES["medium"],
    "760m": SIZES["large"],
    "1.3b": SIZES["xl"],
}


def get_config(size: str = "175b") -> ml_collections.ConfigDict:
    """Returns the model of one size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not a GPT-3. {nearest(size, SIZES)}")
    layers, width, heads, head_dim = SIZES[size]
    return ml_collections.ConfigDict(
        {
            "vocab_size": 50_257,
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
            "norm": {"kind": "layernorm", "placement": "pre", "epsilon": 1e-5, "bias": True},
            "position": {"kind": "learned"},
            "pattern": [{}, {"window": BAND}],
            "tied_embeddings": True,
        }
    )
