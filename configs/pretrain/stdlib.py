"""The quickstart: a LLaMA-style model of about 10 M parameters on the text that every Python
carries.

    tessera train --config=configs/pretrain/stdlib.py --workdir=runs/stdlib

Hardware: 2 CPU cores. Cost and result: see the README.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the values; everything left out has the default of its dataclass."""
    return ml_collections.ConfigDict(
        {
            "model": {
                "vocab_size": 4096,
                "num_layers": 5,
                "embed_dim": 384,
                "max_length": 1024,
                "attention": {"num_heads": 6, "num_kv_heads": 6, "head_dim": 64},
                "mlp": {"hidden_dim": 1024, "activation": "silu", "gated": True},
                "norm": {"kind": "rmsnorm"},
                "position": {"kind": "rotary"},
                "tied_embeddings": True,
            },
            "data": {
                "sources": [{"kind": "stdlib"}],
                "tokenizer": {"kind": "bpe", "vocab_size": 4096},
            },
            "train": {
                "steps": 320,
                "batch_size": 8,
                "sequence_length": 256,
                "log_every": 10,
                "eval_every": 160,
                "eval_batches": 0,
            },
            "optim": {
                "name": "adamw",
                "learning_rate": 1.5e-3,
                "schedule": {
                    "name": "wsd",
                    "warmup_steps": 20,
                    "decay_steps": 120,
                    "final_fraction": 0.05,
                },
                "weight_decay": 0.1,
            },
            "checkpoint": {"every": 80, "keep": 2},
        }
    )
