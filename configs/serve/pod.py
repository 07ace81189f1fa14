"""An engine for a slice of TPUs or a node of GPUs: `configs/serve/pod.py`.

    tessera describe --serve=configs/serve/pod.py --config=configs/model/llama.py:3-70b \\
        --devices=h200:8 --config.mesh.tensor=8

A replica for each index along `data`; its slots and rows are those of one replica. Rows that an
accelerator multiplies at once cost little more than one, so tiles are large. Cost and result:
unmeasured.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the values of `ServeConfig`."""
    return ml_collections.ConfigDict(
        {
            "slots": 256,
            "memory": 0.9,
            "rows": 2048,
            "tiles": (64, 256),
        }
    )
