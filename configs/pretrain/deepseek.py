"""A small DeepSeek-V3 with multi-token prediction on the quickstart's text, for `tessera bench
engine --only=mtp`: latent attention, experts with selection biases, one MTP module.

    tessera train --config=configs/pretrain/deepseek.py --workdir=runs/deepseek

Source: the shape of configs/model/deepseek.py:v3-671b-mtp, small. Hardware: 2 CPU cores. Cost and
result: unmeasured.
"""

import ml_collections

from configs.pretrain import stdlib

STEPS = 600


def get_config() -> ml_collections.ConfigDict:
    """Returns the quickstart's smallest config with this model; everything left out has the default
    of its dataclass.
    """
    config = stdlib.get_config("2m")
    config.model = ml_collections.ConfigDict(
        {
            "vocab_size": 4096,
            "num_layers": 4,
            "embed_dim": 192,
            "max_length": 1024,
            "attention": {
                "num_heads": 4,
                "num_kv_heads": 4,
                "head_dim": 32,
                "latent": {"kv_dim": 64, "q_dim": 96, "rope_dim": 16, "value_dim": 32},
            },
            "mlp": {"hidden_dim": 512, "activation": "silu", "gated": True},
            "norm": {"kind": "rmsnorm", "epsilon": 1e-6},
            "position": {"kind": "rotary"},
            "first_layers": [{"experts": False}],
            "experts": {
                "num_experts": 8,
                "experts_per_token": 2,
                "hidden_dim": 128,
                "shared_dim": 128,
                "score": "sigmoid",
                "renormalize": True,
                "selection_bias": True,
                "bias_speed": 1e-3,
                "num_groups": 4,
                "groups_per_token": 2,
                "scale": 2.5,
                "balance_weight": 1e-4,
            },
            "head": {"mtp_depth": 1, "mtp_weight": 0.3},
            "tied_embeddings": True,
        }
    )
    config.train.steps = STEPS
    config.train.eval_every = STEPS // 2
    config.checkpoint.every = STEPS // 4
    return config
