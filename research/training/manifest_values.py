"""What a checkpoint keeps beside its arrays, as JSON: plain values, and small NumPy arrays bit for bit.

They lie in the manifest, so they are written with it, whole or not at all, and its sha256 guards them.
"""

import base64
from typing import Any

import numpy as np

# The only key of a JSON object that stands for an array.
_ARRAY = "__array__"


def encode(value: Any) -> Any:
    """Returns nested dicts and lists with every NumPy array as a JSON object of its type, shape and bytes."""
    if isinstance(value, dict):
        assert _ARRAY not in value, f"the key {_ARRAY!r} is taken"
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, np.ndarray):
        # Little-endian, whatever the machine.
        array = value.astype(value.dtype.newbyteorder("<"))
        data = base64.b64encode(array.tobytes()).decode("ascii")
        return {_ARRAY: {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}}
    return value


def decode(value: Any) -> Any:
    """Returns what `encode` was given, tuples as lists."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_ARRAY}:
        array = value[_ARRAY]
        data = base64.b64decode(array["data"])
        return np.frombuffer(data, np.dtype(array["dtype"])).reshape(array["shape"]).copy()
    return {key: decode(item) for key, item in value.items()}
