import ml_collections


def get_config():
    return ml_collections.ConfigDict(
        {
            "model": {
                "vocab_size": 260,
                "num_layers": 3,
                "embed_dim": 8,
                "max_length": 64,
                "dropout": 0.1,
                "init_stddev": 0.1,
                "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4},
                "mlp": {"hidden_dim": 8},
                "experts": {
                    "num_experts": 4,
                    "experts_per_token": 2,
                    "hidden_dim": 8,
                    "selection_bias": True,
                    "bias_speed": 0.01,
                    "score": "sigmoid",
                    "balance_weight": 0.01,
                },
                "first_layers": [{"experts": False}],
                "head": {"num_future": 1},
            },
            "data": {
                "sources": [{"kind": "text", "path": "corpus", "heldout_fraction": 0.2}],
                "tokenizer": {"kind": "bytes"},
            },
            "train": {
                "steps": 12,
                "batch_size": 8,
                "sequence_length": 32,
                "log_every": 1,
                "eval_every": 4,
            },
            "optim": {"learning_rate": 0.01, "schedule": {"warmup_steps": 2}, "ema_decay": 0.9},
            "checkpoint": {"every": 4, "keep": 1},
        }
    )
