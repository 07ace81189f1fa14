"""GPT-3 175B on a TPU pod: `configs/pods/gpt3.py:175b-v5p-1024`, 512 chips.

    tessera compile --config=configs/pods/gpt3.py:175b-v5p-1024

Source: Brown et al. 2020, arXiv:2005.14165, table 2.1 and appendix B: batches of 3.2 million
tokens, 300 billion in all, a learning rate of 0.6 · 10^-4. The vocabulary of 50,257 has rows that
no token uses, so that `tensor` divides it. What the compiler says: docs/parallelism.md. Cost and
result: unmeasured.
"""

import ml_collections

from configs.model import gpt3
from configs.pods import run
from research.core.errors import UserError, nearest

# model, mesh, (rows, tokens of each, microbatches)
PRESETS = {
    "175b-v5p-1024": (
        "175b",
        {"devices": "v5p:8x8x8", "data": 8, "fsdp": 32, "tensor": 2},
        (1536, 2048, 3),
    ),
}
# A multiple of 8 · 128.
VOCABULARY = 51_200


def get_config(preset: str = "175b-v5p-1024") -> ml_collections.ConfigDict:
    """Returns the values of a preset."""
    if preset not in PRESETS:
        raise UserError(f"preset = {preset!r} is not here. {nearest(preset, PRESETS)}")
    size, mesh, batch = PRESETS[preset]
    model = gpt3.get_config(size)
    model.vocab_size = VOCABULARY
    return run.build(model, mesh, batch, 6e-5, tokens=300e9, warmup_steps=120)
