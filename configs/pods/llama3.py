"""LLaMA-3 on TPU pods and GPU nodes: `configs/pods/llama3.py:70b-v5p-512`, `405b-h200-1024`, …

    tessera compile --config=configs/pods/llama3.py:70b-v5p-512

Source: Dubey et al. 2024, arXiv:2407.21783, table 3 and section 3.4: peak learning rates, batches
of 4 million tokens, 16 million for 405B, and 15.6 trillion in all. v5p-512 has 256 chips (Google
counts their cores, of which JAX makes one device), v6e-64 has 64; of a tpu7x chip JAX makes two
devices, which count here. `8b-1m-v5p-256` continues with rows of 2^20 tokens, which a ring of 32
devices shares. GPU nodes have `tensor` inside. What the compiler says of each: docs/parallelism.md.
Cost and result: unmeasured.
"""

from typing import Any

import ml_collections

from configs.model import llama
from configs.pods import run
from research.core.errors import UserError, nearest

MILLION = 2**20
# 2^20 tokens: the base of RoPE as Xiong et al. 2023, arXiv:2309.16039, raise it with the length.
LONG = {"max_length": MILLION, "position": {"theta": 5e7}}

# model, mesh, (rows, tokens of each, microbatches), learning rate, tokens of the run, what the
# model has otherwise
PRESETS: dict[str, tuple[str, dict[str, Any], tuple[int, int, int], float, float, dict]] = {
    "8b-v6e-64": (
        "3-8b",
        {"devices": "v6e:8x8", "data": 2, "fsdp": 32},
        (512, 8192, 8),
        3e-4,
        15.6e12,
        {},
    ),
    "8b-1m-v5p-256": (
        "3-8b",
        {"devices": "v5p:4x4x8", "context": 32, "tensor": 4},
        (4, MILLION, 4),
        2e-5,
        10e9,
        LONG,
    ),
    "70b-v5p-512": (
        "3-70b",
        {"devices": "v5p:4x8x8", "data": 4, "fsdp": 64},
        (512, 8192, 1),
        1.5e-4,
        15.6e12,
        {},
    ),
    "70b-tpu7x-128": (
        "3-70b",
        {"devices": "tpu7x:4x4x4", "fsdp": 64, "tensor": 2},
        (512, 8192, 8),
        1.5e-4,
        15.6e12,
        {},
    ),
    "70b-h100-256": (
        "3-70b",
        {"devices": "h100:256", "fsdp": 32, "tensor": 8, "slices": {"fsdp": 32}},
        (512, 8192, 8),
        1.5e-4,
        15.6e12,
        {},
    ),
    "405b-v5p-2048": (
        "3.1-405b",
        {"devices": "v5p:8x8x16", "fsdp": 128, "tensor": 8},
        (2048, 8192, 16),
        8e-5,
        15.6e12,
        {},
    ),
    "405b-tpu7x-1024": (
        "3.1-405b",
        {"devices": "tpu7x:8x8x8", "fsdp": 128, "tensor": 8},
        (2048, 8192, 16),
        8e-5,
        15.6e12,
        {},
    ),
    "405b-h200-1024": (
        "3.1-405b",
        {"devices": "h200:1024", "fsdp": 128, "tensor": 8, "slices": {"fsdp": 128}},
        (2048, 8192, 16),
        8e-5,
        15.6e12,
        {},
    ),
}


def get_config(preset: str = "70b-v5p-512") -> ml_collections.ConfigDict:
    """Returns the values of a preset."""
    if preset not in PRESETS:
        raise UserError(f"preset = {preset!r} is not here. {nearest(preset, PRESETS)}")
    size, mesh, batch, learning_rate, tokens, changes = PRESETS[preset]
    model = llama.get_config(size)
    model.update(changes)
    warmup_steps = 100 if changes else 2000
    return run.build(model, mesh, batch, learning_rate, tokens, warmup_steps)
