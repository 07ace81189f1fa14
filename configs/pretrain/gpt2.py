r"""GPT-2 on text of one's own: the preset with the learning rate, batch and decay of the GPT-3
paper's small models.

    tessera train --config=configs/pretrain/gpt2.py:small --workdir=runs/gpt2 \
        --config.data.sources.0.path='text/*.jsonl.gz'

Source: Radford et al. 2019; Brown et al. 2020, arXiv:2005.14165, table 2.1 and appendix B.
Hardware, cost and result: unmeasured.
"""

import ml_collections

from configs.model import gpt2

# By width.
LEARNING_RATES = {768: 6e-4, 1024: 3e-4, 1280: 2.5e-4, 1600: 2e-4}


def get_config(size: str = "small") -> ml_collections.ConfigDict:
    """Returns the values for a size of `configs/model/gpt2.py`."""
    model = gpt2.get_config(size)
    model.dtype = "bfloat16"
    return ml_collections.ConfigDict(
        {
            "model": model,
            "data": {
                "sources": [
                    {"kind": "jsonl", "path": "text/*.jsonl.gz", "heldout_fraction": 0.005}
                ],
                "tokenizer": {"kind": "bpe", "vocab_size": 50257, "training_bytes": 200_000_000},
            },
            "train": {
                "steps": 20_000,
                "batch_size": 512,
                "sequence_length": 1024,
                "eval_every": 1000,
                "eval_batches": 20,
            },
            "optim": {
                "learning_rate": LEARNING_RATES[model.embed_dim],
                "schedule": {"name": "cosine", "warmup_steps": 700, "final_fraction": 0.1},
            },
            "checkpoint": {"every": 1000, "keep": 2, "keep_every": 10_000},
        }
    )
