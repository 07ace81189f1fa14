"""What is written by hand for Orbax is what Orbax writes: claims about `training.orbax_tree`."""

import json
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from research.core.trees import named_leaves
from research.training import orbax_tree

TREE = {
    "params": {
        "embed": np.ones((3, 2), np.float32),
        "layers": {"mlp": {"kernel": np.ones((2, 3, 4), np.float16)}},
    }
}


def shapes() -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in named_leaves(TREE).items()
    }


def without_write_shapes(description):
    """Orbax writes the shapes of what a device wrote for arrays of JAX, and none for NumPy's."""
    for entry in description["tree_metadata"].values():
        entry["value_metadata"].pop("write_shape", None)
    return description


def test_a_description_is_that_which_orbax_writes(tmp_path):
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    ocp.Checkpointer(handler).save(epath.Path(tmp_path / "orbax"), args=ocp.args.PyTreeSave(TREE))
    written = json.loads((tmp_path / "orbax" / orbax_tree.FILE).read_text())
    made = json.loads(json.dumps(orbax_tree.tree_metadata(shapes())))
    assert made["tree_metadata"]["('params', 'embed')"]["value_metadata"]["write_shape"] == [3, 2]
    assert without_write_shapes(made) == without_write_shapes(written)


def test_names_of_a_description_are_those_that_it_was_made_of():
    content = json.dumps(orbax_tree.tree_metadata(shapes())).encode()
    assert orbax_tree.array_names(content) == {"params/embed", "params/layers/mlp/kernel"}


def test_writing_a_checkpoint_in_parts_starts_no_device(tmp_path):
    """Why Orbax does not write the description: it would start JAX's devices."""
    program = (
        "import pathlib, sys, jax, numpy as np\n"
        "from jax._src import xla_bridge\n"
        "from research.training.checkpoint_stream import write_params\n"
        "shapes = {'a': jax.ShapeDtypeStruct((3,), np.float32)}\n"
        "parts = [('a', (), np.ones(3, np.float32))]\n"
        "write_params(pathlib.Path(sys.argv[1]), 0, shapes, parts)\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "jax.devices()\n"
        "assert xla_bridge.backends_are_initialized()  # the control\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
