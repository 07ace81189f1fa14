"""LLaMA 1, 2 and 3, all sizes: `configs/model/llama.py:3-8b`, `1-65b`, `3.2-1b`, …

Sources: Touvron et al. 2023, arXiv:2302.13971, table 2 (LLaMA 1); Touvron et al. 2023,
arXiv:2307.09288, section 2.2 (LLaMA 2, grouped queries at 70B); Dubey et al. 2024,
arXiv:2407.21783, table 3 (LLaMA 3 and 3.1); the model cards of 3.2 and 3.3; norm epsilons and
rotary scaling from the `params.json` and `config.json` released with the weights. Parameters:

    1    7b 6,738,415,616   13b 13,015,864,320   33b 32,528,943,616   65b 65,285,660,672
    2    7b and 13b as 1    70b 68,976,648,192
    3    8b 8,030,261,248   70b 70,553,706,496   (3.1 and 3.3 alike)   405b 405,853,388,800
    3.2  1b 1,235,814,400   3b 3,212,749,824     (tied embeddings)
"""

from typing import Any

import ml_collections

from research.core.errors import UserError, nearest


def _rope_scaling(factor: float) -> dict[str, Any]:
    scaling = {
        "factor": factor,
        "low_frequency_factor": 1.0,
        "high_frequency_factor": 4.0,
        "original_length": 8192,
    }
    return THREE | {"max_length": 131_072, "position": {"theta": 500_000.0, "scaling": scaling}}


ONE = {"vocab_size": 32_000, "max_length": 2048, "norm": {"epsilon": 1e-6}}
TWO = {"vocab_size": 32_000, "max_length": 4096}
THREE = {"vocab_size": 128_256, "max_length": 8192, "position": {"theta": 500_000.0}}
THREE_1 = _rope_scaling(factor=8.0)
THREE_2 = _rope_scaling(factor=32.0) | {"tied_embeddings": True}

# what its generation changes, then layers, width, heads, key/value heads, MLP width
SIZES = {
    "1-7b": (ONE, 32, 4096, 32, 32, 11_008),
    "1-13b": (ONE, 40, 5120, 40, 40, 13_824),
    "1-33b": (ONE, 60, 6656, 52, 52, 17_920),
    "1-65b": (ONE | {"norm": {"epsilon": 1e-5}}, 80, 8192, 64, 64, 22_016),
    "2-7b": (TWO, 32, 4096, 32, 32, 11_008),
    "2-13b": (TWO, 40, 5120, 40, 40, 13_824),
    "2-70b": (TWO, 80, 8192, 64, 8, 28_672),
    "3-8b": (THREE, 32, 4096, 32, 8, 14_336),
    "3-70b": (THREE, 80, 8192, 64, 8, 28_672),
    "3.1-8b": (THREE_1, 32, 4096, 32, 8, 14_336),
    "3.1-70b": (THREE_1, 80, 8192, 64, 8, 28_672),
    "3.1-405b": (THREE_1, 126, 16_384, 128, 8, 53_248),
    "3.2-1b": (THREE_2, 16, 2048, 32, 8, 8192),
    "3.2-3b": (THREE_2, 28, 3072, 24, 8, 8192),
    "3.3-70b": (THREE_1, 80, 8192, 64, 8, 28_672),
}


def get_config(size: str = "3.2-1b") -> ml_collections.ConfigDict:
    """Returns the model of one generation and size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not a LLaMA. {nearest(size, SIZES)}")
    generation, layers, width, heads, kv_heads, hidden = SIZES[size]
    config = ml_collections.ConfigDict(
        {
            "num_layers": layers,
            "embed_dim": width,
            "attention": {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": width // heads},
            "mlp": {"hidden_dim": hidden, "activation": "silu", "gated": True},
            "norm": {"kind": "rmsnorm", "placement": "pre", "epsilon": 1e-5},
            "position": {"kind": "rotary", "theta": 10_000.0},
            "tied_embeddings": False,
        }
    )
    config.update(generation)
    return config
