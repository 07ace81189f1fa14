"""Orbax's description of the arrays in a store: its file `_METADATA`.

    {"tree_metadata": {"('params', 'embed')": {"key_metadata": [{"key": "params", …}, …], …}}, …}

Orbax writes it for the arrays that it saves itself. For those that are written a part at a time
(checkpoint_stream.py) it is made here: Orbax has no public function for it. A public `TypeHandler`
that saves nothing would make Orbax write the file, but Orbax then asks for the index of the
process, which starts JAX's devices: a conversion, which needs none, would claim their memory. A
test compares what is made here with what Orbax writes.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax

FILE = "_METADATA"
_DICT_KEY = 2  # Orbax's number for a key of a dict


def tree_metadata(arrays: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Returns the description of a tree of NumPy arrays.

    Args:
      arrays: shapes by slash-separated names.
    """
    tree = {}
    for name, shape in arrays.items():
        # params/embed -> ('params', 'embed')
        keys = tuple(name.split("/"))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
            "value_metadata": {
                "value_type": "np.ndarray",
                "skip_deserialize": False,
                "write_shape": list(shape.shape),
            },
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def array_names(content: bytes) -> set[str]:
    """Returns the slash-separated names of the arrays that a description has.

    Raises:
      ValueError, KeyError, TypeError, AttributeError, RecursionError: it is none.
    """
    tree = json.loads(content)["tree_metadata"]
    names = set()
    for entry in tree.values():
        keys = [str(key["key"]) for key in entry["key_metadata"]]
        names.add("/".join(keys))
    return names
