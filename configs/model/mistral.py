"""Mistral's dense models: `configs/model/mistral.py:7b-v0.3`, `nemo-12b`, `small-24b-2501`,
`large-123b`, …

Sources: Jiang et al. 2023, arXiv:2310.06825, table 1 (7B v0.1), and the model cards and
`config.json` released with the weights. Parameters:

    7b-v0.1 and v0.2 7,241,732,096   7b-v0.3 7,248,023,552           ministral-8b 8,019,808,256
    nemo-12b 12,247,782,400          small-22b (and Codestral) 22,247,282,688
    small-24b 23,572,403,200         large-123b 122,610,069,504

`small-24b-2503` is the text tower of Small 3.1 and 3.2, which also take images. Ministral 8B has no
window in one layer of four, as its card says; in its `config.json` all layers have the window. Left
out: the Ministral 3 of 2025, which scales queries by their position.
"""

import ml_collections

from research.core.errors import UserError, nearest

# vocabulary, longest sequence, rotary base, layers, width, heads, MLP width, windows of the
# pattern's layers
SIZES = {
    "7b-v0.1": (32_000, 32_768, 1e4, 32, 4096, 32, 14_336, (4096,)),
    "7b-v0.2": (32_000, 32_768, 1e6, 32, 4096, 32, 14_336, (None,)),
    "7b-v0.3": (32_768, 32_768, 1e6, 32, 4096, 32, 14_336, (None,)),
    "ministral-8b": (131_072, 131_072, 1e8, 36, 4096, 32, 12_288, (None, 32_768, 32_768, 32_768)),
    "nemo-12b": (131_072, 131_072, 1e6, 40, 5120, 32, 14_336, (None,)),
    "small-22b": (32_768, 32_768, 1e6, 56, 6144, 48, 16_384, (None,)),
    "small-24b-2501": (131_072, 32_768, 1e8, 40, 5120, 32, 32_768, (None,)),
    "small-24b-2503": (131_072, 131_072, 1e9, 40, 5120, 32, 32_768, (None,)),
    "large-123b": (32_768, 131_072, 1e6, 88, 12_288, 96, 28_672, (None,)),
}


def get_config(size: str = "7b-v0.3") -> ml_collections.ConfigDict:
    """Returns the model of one size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not a Mistral. {nearest(size, SIZES)}")
    vocab_size, max_length, theta, layers, width, heads, hidden, windows = SIZES[size]
    return ml_collections.ConfigDict(
        {
            "vocab_size": vocab_size,
            "num_layers": layers,
            "embed_dim": width,
            "max_length": max_length,
            "attention": {"num_heads": heads, "num_kv_heads": 8, "head_dim": 128},
            "mlp": {"hidden_dim": hidden, "activation": "silu", "gated": True},
            "norm": {"kind": "rmsnorm", "placement": "pre", "epsilon": 1e-5},
            "position": {"kind": "rotary", "theta": theta},
            "pattern": [{"window": window} for window in windows],
            "tied_embeddings": False,
        }
    )
