"""Chinchilla 70B on a TPU pod: `configs/pods/chinchilla.py:70b-v5p-512`, 256 chips.

    tessera compile --config=configs/pods/chinchilla.py:70b-v5p-512

Source: Hoffmann et al. 2022, arXiv:2203.15556, table 4: a learning rate of 10^-4, batches of 1.5
and then 3 million tokens, of which these are the second, and 1.4 trillion in all. What the compiler
says: docs/parallelism.md. Cost and result: unmeasured.
"""

import ml_collections

from configs.model import chinchilla
from configs.pods import run
from research.core.errors import UserError, nearest

# model, mesh, (rows, tokens of each, microbatches)
PRESETS = {
    "70b-v5p-512": ("70b", {"devices": "v5p:4x8x8", "data": 4, "fsdp": 64}, (1536, 2048, 2)),
}


def get_config(preset: str = "70b-v5p-512") -> ml_collections.ConfigDict:
    """Returns the values of a preset."""
    if preset not in PRESETS:
        raise UserError(f"preset = {preset!r} is not here. {nearest(preset, PRESETS)}")
    size, mesh, batch = PRESETS[preset]
    return run.build(chinchilla.get_config(size), mesh, batch, 1e-4, tokens=1.4e12)
