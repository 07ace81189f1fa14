"""A small model that finds needles in texts of 128 bytes, and is continued at eight times that
length.

    tessera train --config=configs/pretrain/long_context.py:short --workdir=runs/short
    tessera train --config=configs/pretrain/long_context.py --workdir=runs/long \
        --config.start_from=runs/short --config.model.position.theta=500000.0

Hardware: 2 CPU cores. Cost and result: docs/long-context.md.
"""

import ml_collections

from research.core.errors import UserError, nearest

# Length of a row, rows, steps, learning rate
STAGES = {"short": (128, 64, 3000, 1e-2), "long": (1024, 8, 1000, 5e-3)}


def get_config(stage: str = "long") -> ml_collections.ConfigDict:
    """Returns the values of a stage; `long` is to start from a run of `short`."""
    if stage not in STAGES:
        raise UserError(f"stage = {stage!r} is not one of them. {nearest(stage, STAGES)}")
    length, rows, steps, learning_rate = STAGES[stage]
    return ml_collections.ConfigDict(
        {
            "model": {
                "vocab_size": 320,
                "num_layers": 2,
                "embed_dim": 64,
                "max_length": length,
                "attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 32},
                "mlp": {"hidden_dim": 160, "activation": "silu", "gated": True},
                "norm": {"kind": "rmsnorm"},
                "position": {"kind": "rotary"},
                "tied_embeddings": True,
                # 1 / √embed_dim: with 0.02 the scores of so narrow a model are all alike for long.
                "init_stddev": 0.125,
            },
            "data": {
                # With its two control tokens a document fills a row.
                "sources": [{"kind": "needle", "length": length - 2, "documents": 2**24 // length}],
                "tokenizer": {"kind": "bytes"},
            },
            "train": {
                "steps": steps,
                "batch_size": rows,
                "sequence_length": length,
                "log_every": 50,
                "eval_every": 0,
                "eval_batches": 20,
            },
            "optim": {
                "name": "muon",
                "learning_rate": learning_rate,
                "schedule": {"name": "linear", "warmup_steps": 20, "final_fraction": 0.05},
                "weight_decay": 0.1,
            },
            "checkpoint": {"every": steps // 4, "keep": 2},
        }
    )
