"""LLaMA-2 on TPU pods: `configs/pods/llama2.py:7b-v4-128`, `70b-v4-1024`, `70b-v6e-256`.

    tessera compile --config=configs/pods/llama2.py:7b-v4-128

Source: Touvron et al. 2023, arXiv:2307.09288, section 2.2: batches of 4 million tokens, 2 trillion
in all, AdamW with β2 = 0.95 and decay 0.1. v4-128 has 64 chips, v6e-256 has 256. On a torus an axis
of the mesh is along two of its sides at most: along three, parameters would not be gathered but
summed. What the compiler says of each: docs/parallelism.md. Cost and result: unmeasured.
"""

import ml_collections

from configs.model import llama
from configs.pods import run
from research.core.errors import UserError, nearest

# model, mesh, (rows, tokens of each, microbatches), learning rate
PRESETS = {
    "7b-v4-128": ("2-7b", {"devices": "v4:4x4x4", "data": 4, "fsdp": 16}, (1024, 4096, 4), 3e-4),
    "70b-v4-1024": (
        "2-70b",
        {"devices": "v4:8x8x8", "data": 2, "fsdp": 32, "tensor": 8},
        (1024, 4096, 16),
        1.5e-4,
    ),
    "70b-v6e-256": (
        "2-70b",
        {"devices": "v6e:16x16", "data": 2, "fsdp": 64, "tensor": 2},
        (1024, 4096, 8),
        1.5e-4,
    ),
}


def get_config(preset: str = "7b-v4-128") -> ml_collections.ConfigDict:
    """Returns the values of a preset."""
    if preset not in PRESETS:
        raise UserError(f"preset = {preset!r} is not here. {nearest(preset, PRESETS)}")
    size, mesh, batch, learning_rate = PRESETS[preset]
    return run.build(llama.get_config(size), mesh, batch, learning_rate, tokens=2e12)
