"""Mixtures of experts on TPU pods: `configs/pods/mixtures.py:mixtral-8x7b-v6e-256`,
`mixtral-8x7b-v5p-128`, `deepseek-v3-671b-v5p-2048`, `1t-v5p-4096`.

    tessera compile --config=configs/pods/mixtures.py:mixtral-8x7b-v6e-256

Sources: Jiang et al. 2024, arXiv:2401.04088, which gives neither batch nor learning rate: those
here are LLaMA-2's; DeepSeek-AI 2024, arXiv:2412.19437, section 4.2: batches of 15,360 rows of 4,096
tokens, a learning rate of 2.2 · 10^-4, 14.8 trillion tokens. The mixture of a trillion parameters
is DeepSeek-V3 with 384 experts, 64 heads, one layer without experts and a vocabulary of 163,840, as
Kimi K2 has them (Kimi Team 2025, arXiv:2507.20534, table 2). A device takes at most twice an even
share of the choices of tokens. What the compiler says of each: docs/parallelism.md. Cost and
result: unmeasured.
"""

from typing import Any

import ml_collections

from configs.model import deepseek, mixtral
from configs.pods import run
from research.core.errors import UserError, nearest

# 129,280 ids, and rows that no token uses, so that a device has a multiple of 128 of them.
PADDED = {"vocab_size": 129_536}
TRILLION = {
    "vocab_size": 163_840,
    "attention": {"num_heads": 64, "num_kv_heads": 64},
    "experts": {"num_experts": 384, "num_groups": 1, "groups_per_token": 1},
    "first_layers": [{"experts": False}],
}

# model, what it has otherwise, mesh, (rows, tokens of each, microbatches), learning rate, tokens
PRESETS: dict[str, tuple[ml_collections.ConfigDict, dict, dict[str, Any], tuple, float, float]] = {
    "mixtral-8x7b-v6e-256": (
        mixtral.get_config("8x7b"),
        {},
        {"devices": "v6e:16x16", "data": 4, "fsdp": 8, "expert": 4, "tensor": 2},
        (1024, 4096, 8),
        3e-4,
        2e12,
    ),
    "mixtral-8x7b-v5p-128": (
        mixtral.get_config("8x7b"),
        {},
        {"devices": "v5p:4x4x4", "data": 2, "fsdp": 8, "expert": 4},
        (1024, 4096, 8),
        3e-4,
        2e12,
    ),
    "deepseek-v3-671b-v5p-2048": (
        deepseek.get_config("v3-671b"),
        PADDED,
        {"devices": "v5p:8x8x16", "fsdp": 8, "expert": 32, "tensor": 4},
        (15_360, 4096, 15),
        2.2e-4,
        14.8e12,
    ),
    "1t-v5p-4096": (
        deepseek.get_config("v3-671b"),
        TRILLION,
        {"devices": "v5p:8x16x16", "fsdp": 8, "expert": 64, "tensor": 4},
        (15_360, 4096, 15),
        2e-4,
        15.5e12,
    ),
}


def get_config(preset: str = "mixtral-8x7b-v6e-256") -> ml_collections.ConfigDict:
    """Returns the values of a preset."""
    if preset not in PRESETS:
        raise UserError(f"preset = {preset!r} is not here. {nearest(preset, PRESETS)}")
    model, changes, mesh, batch, learning_rate, tokens = PRESETS[preset]
    model.update(changes)
    model.experts.buffer_factor = 2.0
    return run.build(model, mesh, batch, learning_rate, tokens)
