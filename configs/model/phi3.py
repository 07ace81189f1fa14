"""Phi-3 and 3.5: `configs/model/phi3.py:mini-4k`, `mini-128k`, `medium-4k`, `medium-128k`,
`3.5-mini`.

Sources: Abdin et al. 2024, arXiv:2404.14219, section 2; the padded vocabulary, windows, epsilon and
LongRoPE's divisors from the `config.json` released with the weights (for `mini-128k` its update of
June 2024), the divisors as
float32 numbers. Parameters: mini and 3.5-mini 3,821,079,552; medium 13,960,238,080.

Left out: Phi-3-small, which has block-sparse attention, and Phi-3.5-MoE, which has a sampling
router.
"""

import math
from typing import Any

import ml_collections

from research.core.errors import UserError, nearest

MINI_SHORT = (
    *(1.1, 1.1, 1.1, 1.3, 1.35, 1.35, 1.4, 1.55),
    *(2.0,) * 17,
    *(2.05,) * 6,
    *(2.1, 2.1, 2.15),
    *(2.25,) * 5,
    *(2.4, 2.45, 2.5, 2.7, 2.7, 2.75, 2.8, 2.9, 3.05),
)
MINI_LONG = (
    *(
        1.07,
        1.12,
        1.15,
        1.42,
        1.5699999,
        1.8,
        2.1299999,
        2.1299999,
        3.01,
        5.9100003,
        6.9500003,
        9.070001,
        9.93,
    ),
    *(
        10.71,
        11.13,
        14.61,
        15.409999,
        19.81,
        37.28,
        38.28,
        38.6,
        40.120003,
        46.200005,
        50.940006,
        53.660007,
    ),
    *(
        54.93739,
        56.89739,
        57.287388,
        59.987385,
        60.867386,
        60.887386,
        61.717392,
        62.917393,
        62.957394,
        63.417393,
    ),
    *(
        63.817394,
        63.837395,
        63.897396,
        63.937397,
        64.0674,
        64.11435,
        64.12435,
        64.15435,
        64.19435,
        64.244354,
    ),
    *(64.574356, 64.69, 64.76),
)
MINI_3_5_SHORT = (
    *(1.0, 1.02, 1.03, 1.03),
    *(1.05,) * 5,
    *(
        1.0699999,
        1.0999999,
        1.1099999,
        1.1599998,
        1.1599998,
        1.1699998,
        1.2899998,
        1.3399998,
        1.6799998,
        1.7899998,
    ),
    *(1.8199998, 1.8499998, 1.8799998, 1.9099997, 1.9399997, 1.9899997),
    *(2.0199997,) * 6,
    *(2.0299997,) * 9,
    *(2.0799997, 2.0899997, 2.1899996, 2.2199996, 2.5899994, 2.7299995, 2.7499995, 2.8399994),
)
MINI_3_5_LONG = (
    *(
        1.08,
        1.11,
        1.14,
        1.34,
        1.5899999,
        1.6,
        1.62,
        2.6200001,
        3.23,
        3.23,
        4.79,
        7.4,
        7.7000003,
        9.09,
        12.2,
        17.67,
    ),
    *(
        24.460001,
        28.570002,
        30.420002,
        30.840002,
        32.590004,
        32.930004,
        42.320004,
        44.960003,
        50.340004,
        50.450005,
    ),
    *(
        57.550003,
        57.930004,
        58.210003,
        60.140003,
        62.610004,
        62.620003,
        62.710003,
        63.140003,
        63.140003,
        63.770004,
    ),
    *(63.930004, 63.960003, 63.97, 64.03, 64.07, 64.08, 64.12, 64.41, 64.48, 64.51, 64.53, 64.84),
)
MEDIUM_SHORT = (
    *(1.0,) * 6,
    *(
        1.01,
        1.02,
        1.02,
        1.04,
        1.04,
        1.07,
        1.07,
        1.1,
        1.3,
        1.3,
        1.5,
        1.57,
        1.9,
        2.31,
        2.76,
        3.39,
        3.94,
        4.01,
        4.29,
    ),
    *(
        4.35,
        5.35,
        6.66,
        7.03,
        7.52,
        8.01,
        8.25,
        8.28,
        9.63,
        9.9,
        10.59,
        11.05,
        11.79,
        12.19,
        12.89,
        13.13,
        13.17,
    ),
    *(
        13.21,
        13.48,
        13.54,
        13.78,
        13.93,
        14.43,
        14.76,
        15.15,
        15.42,
        15.54,
        15.66,
        15.75,
        15.76,
        15.8,
        16.06,
        16.08,
    ),
    *(16.12, 16.12, 16.19, 16.32, 16.54, 16.8),
)
MEDIUM_LONG = (
    *(1.0,) * 13,
    *(
        1.25,
        1.25,
        1.5,
        2.0,
        2.75,
        5.75,
        5.75,
        6.5,
        9.25,
        11.0,
        13.25,
        19.25,
        19.75,
        19.75,
        21.25,
        21.5,
        26.5,
        30.0,
    ),
    *(
        33.75,
        35.25,
        38.5,
        42.0,
        42.25,
        46.0,
        47.0,
        50.0,
        50.5,
        51.0,
        52.0,
        52.75,
        53.75,
        54.75,
        57.0,
        57.25,
        58.5,
    ),
    *(
        59.25,
        59.5,
        62.0,
        62.5,
        62.75,
        63.25,
        63.25,
        63.25,
        63.75,
        64.0,
        64.0,
        64.25,
        64.5,
        64.5,
        65.0,
        65.0,
    ),
)


def _longrope_scaling(short: tuple[float, ...], long: tuple[float, ...]) -> dict[str, Any]:
    """Returns LongRoPE from 4,096 to 131,072 tokens, with the amplitude of Ding et al. 2024,
    arXiv:2402.13753.
    """
    amplitude = math.sqrt(1 + math.log(131_072 / 4096) / math.log(4096))
    scaling = {"kind": "longrope", "original_length": 4096, "amplitude": amplitude}
    scaling |= {"short_factors": short, "long_factors": long}
    return {"max_length": 131_072, "position": {"kind": "rotary", "theta": 1e4, "scaling": scaling}}


SHORT = {
    "max_length": 4096,
    "position": {"kind": "rotary", "theta": 1e4},
    "pattern": [{"window": 2047}],
}
MINI_WIDTHS, MEDIUM_WIDTHS = (32, 3072, 32, 32, 8192), (40, 5120, 40, 10, 17_920)

# what its context needs; layers, width, heads, key/value heads, MLP width
SIZES = {
    "mini-4k": (SHORT, MINI_WIDTHS),
    "mini-128k": (_longrope_scaling(MINI_SHORT, MINI_LONG), MINI_WIDTHS),
    "medium-4k": (SHORT, MEDIUM_WIDTHS),
    "medium-128k": (_longrope_scaling(MEDIUM_SHORT, MEDIUM_LONG), MEDIUM_WIDTHS),
    "3.5-mini": (_longrope_scaling(MINI_3_5_SHORT, MINI_3_5_LONG), MINI_WIDTHS),
}


def get_config(size: str = "mini-4k") -> ml_collections.ConfigDict:
    """Returns the model of one size and context."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not a Phi-3. {nearest(size, SIZES)}")
    context, (layers, width, heads, kv_heads, hidden) = SIZES[size]
    return ml_collections.ConfigDict(
        {
            "vocab_size": 32_064,
            "num_layers": layers,
            "embed_dim": width,
            "attention": {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": width // heads},
            "mlp": {"hidden_dim": hidden, "activation": "silu", "gated": True},
            "norm": {"kind": "rmsnorm", "placement": "pre", "epsilon": 1e-5},
            "tied_embeddings": False,
            **context,
        }
    )
