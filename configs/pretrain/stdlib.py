"""The quickstart: LLaMA-style models of three sizes on the text that every Python carries.

    tessera train --config=configs/pretrain/stdlib.py:2m --workdir=runs/stdlib

A larger size has more steps: with as few as the smallest it would not be better than that.
Hardware: 2 CPU cores. Cost and result of each size: docs/getting-started.md.
"""

import ml_collections

from research.core.errors import UserError, nearest

# layers, width, heads, MLP width, steps, learning rate
SIZES = {
    "10m": (5, 384, 6, 1024, 1600, 8e-4),
    "5m": (5, 256, 4, 704, 1300, 2e-3),
    "2m": (4, 192, 3, 512, 1000, 3e-3),
}


def get_config(size: str = "10m") -> ml_collections.ConfigDict:
    """Returns the values of a size; everything left out has the default of its dataclass."""
    if size not in SIZES:
        raise UserError(f"size = {size!r} is not one of the quickstart. {nearest(size, SIZES)}")
    layers, width, heads, hidden, steps, learning_rate = SIZES[size]
    return ml_collections.ConfigDict(
        {
            "model": {
                "vocab_size": 4096,
                "num_layers": layers,
                "embed_dim": width,
                "max_length": 1024,
                "attention": {"num_heads": heads, "num_kv_heads": heads, "head_dim": 64},
                "mlp": {"hidden_dim": hidden, "activation": "silu", "gated": True},
                "norm": {"kind": "rmsnorm"},
                "position": {"kind": "rotary"},
                "tied_embeddings": True,
            },
            "data": {
                "sources": [{"kind": "stdlib"}],
                "tokenizer": {"kind": "bpe", "vocab_size": 4096},
            },
            "train": {
                "steps": steps,
                "batch_size": 8,
                "sequence_length": 256,
                "log_every": 20,
                "eval_every": steps // 2,
                "eval_batches": 0,
            },
            "optim": {
                "name": "adamw",
                "learning_rate": learning_rate,
                "schedule": {"name": "linear", "warmup_steps": 20, "final_fraction": 0.05},
                "weight_decay": 0.1,
            },
            "checkpoint": {"every": steps // 4, "keep": 2},
        }
    )
