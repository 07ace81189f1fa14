"""An engine for one device: `configs/serve/default.py`.

    tessera describe --serve=configs/serve/default.py --workdir=runs/stdlib
    tessera generate --serve=configs/serve/default.py --workdir=runs/stdlib \\
        --in=prompts.jsonl --out=answers.jsonl

Sixteen sequences at a time, in tiles of 2, 8 and 16 rows; the cache has the tokens that fit.
Cost and result: unmeasured.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the values of `ServeConfig`."""
    return ml_collections.ConfigDict(
        {
            "slots": 16,
            "memory": 0.8,
            "tiles": (2, 8, 16),
        }
    )
