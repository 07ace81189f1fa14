"""What a checkpoint keeps beside its arrays, as JSON: plain values, and small arrays bit for bit.

They are in the manifest: written atomically with it, and protected by its sha256.
"""

import base64
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (its types, such as bfloat16, have their names in NumPy from here on)
import numpy as np

from research.core.errors import UserError, join

# The only key of a JSON object that encodes an array.
_ARRAY = "__array__"


def encode(value: Any, name: str = "extra") -> Any:
    """Returns nested dicts and lists with every array as a JSON object of its type, shape and
    bytes.

    Arrays are NumPy's and JAX's, and NumPy's scalars, except those that are Python numbers or
    strings too, such as float64.

    Args:
      value: what to encode.
      name: of the value, for errors.

    Raises:
      UserError: an array that would not come back as it is, such as one of objects or of random
          keys.
    """
    if isinstance(value, dict):
        assert _ARRAY not in value, f"the key {_ARRAY!r} is taken"
        return {key: encode(item, join(name, str(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item, join(name, str(index))) for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, jax.Array):
        value = _on_the_host(value, name)
    if isinstance(value, (np.ndarray, np.generic)):
        return {_ARRAY: _encode_array(np.asarray(value), name)}
    raise UserError(
        name,
        constraint=f"is a {type(value).__name__}, which JSON has not. Use plain values and arrays.",
    )


def decode(value: Any) -> Any:
    """Returns what `encode` was given: tuples as lists, scalars of NumPy and arrays of JAX as
    arrays of NumPy.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_ARRAY}:
        array = value[_ARRAY]
        data = base64.b64decode(array["data"])
        # Older checkpoints hold "<f4" for "float32".
        dtype = np.dtype(array["dtype"]).newbyteorder("<")
        return np.frombuffer(data, dtype).reshape(array["shape"]).copy()
    return {key: decode(item) for key, item in value.items()}


def _on_the_host(array: jax.Array, name: str) -> np.ndarray:
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise UserError(
            name, constraint="is an array of random keys. Use jax.random.key_data(keys)."
        )
    if not array.is_fully_addressable:
        raise UserError(
            name,
            constraint="is an array of which other processes hold a part. It belongs into the "
            "state.",
        )
    return np.asarray(array)


def _encode_array(array: np.ndarray, name: str) -> dict[str, Any]:
    # Little-endian, whatever the machine.
    array = array.astype(array.dtype.newbyteorder("<"))
    data = base64.b64encode(array.tobytes()).decode("ascii")
    return {"dtype": _type_name(array.dtype, name), "shape": list(array.shape), "data": data}


def _type_name(dtype: np.dtype, name: str) -> str:
    """Returns the name from which NumPy makes a type again."""
    # bfloat16 has only a `name` that does, strings only a `str` ("<U5"), objects neither.
    candidates = () if dtype.hasobject else (dtype.name, dtype.str)
    for candidate in candidates:
        try:
            found = np.dtype(candidate).newbyteorder("<")
        except TypeError:
            continue
        if found == dtype:
            return candidate
    raise UserError(
        name,
        constraint=f"is an array of {dtype}, which a checkpoint cannot keep beside its arrays.",
    )
