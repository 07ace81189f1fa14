"""BERT, with the heads that it was trained with: `configs/model/bert.py:base`, `large-cased`,
`tiny`, `4x256`, …

Sources: Devlin et al. 2018, arXiv:1810.04805, section 3; Turc et al. 2019, arXiv:1908.08962, for
the small ones (`LxD`: 2 to 12 layers of width 128 to 768); the vocabularies, the norm's epsilon,
the activation and the biases from the files released with the weights. `base` and `large` are
lowercase. Parameters, both heads (masked words, next sentence) with them, where the papers say 110M
and 340M for the first two and 4.4M, 11.3M, 29.1M and 41.7M for the last four:

    base 110,106,428          large 336,226,108          base-cased 108,932,934    large-cased
    334,661,958 base-chinese 102,882,442  base-multilingual 168,055,961, -cased 178,566,653
    tiny 4,433,468            mini 11,267,900            small 29,058,876          medium 41,668,412
"""

import ml_collections

from research.core.errors import UserError, nearest

LOWERCASE, CASED = 30_522, 28_996
# vocabulary, layers, width
SIZES = {
    "base": (LOWERCASE, 12, 768),
    "large": (LOWERCASE, 24, 1024),
    "base-cased": (CASED, 12, 768),
    "large-cased": (CASED, 24, 1024),
    "base-chinese": (21_128, 12, 768),
    "base-multilingual": (105_879, 12, 768),
    "base-multilingual-cased": (119_547, 12, 768),
}
SIZES |= {
    f"{layers}x{width}": (LOWERCASE, layers, width)
    for layers in range(2, 13, 2)
    for width in (128, 256, 512, 768)
}
SIZES |= {
    "tiny": SIZES["2x128"],
    "mini": SIZES["4x256"],
    "small": SIZES["4x512"],
    "medium": SIZES["8x512"],
}


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """Returns the model of one size."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not a BERT. {nearest(size, SIZES)}")
    vocab_size, layers, width = SIZES[size]
    return ml_collections.ConfigDict(
        {
            "structure": "encoder",
            "vocab_size": vocab_size,
            "num_layers": layers,
            "embed_dim": width,
            "max_length": 512,
            "attention": {
                "num_heads": width // 64,
                "num_kv_heads": width // 64,
                "head_dim": 64,
                "qkv_bias": True,
                "out_bias": True,
            },
            "mlp": {"hidden_dim": 4 * width, "activation": "gelu", "gated": False, "bias": True},
            "norm": {"kind": "layernorm", "placement": "post", "epsilon": 1e-12, "bias": True},
            "position": {"kind": "learned"},
            "embedding": {"norm": True, "num_types": 2},
            "head": {"transform": True, "bias": True, "pooler": True, "num_classes": 2},
            "tied_embeddings": True,
            "dropout": 0.1,
        }
    )
