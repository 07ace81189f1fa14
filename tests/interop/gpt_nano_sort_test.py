"""A small trained GPT, layer by layer: every activation is the one that its authors saw, and it
sorts.
"""

import base64
import dataclasses
import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.trees import named_leaves
from research.interop.architecture import config_from
from research.interop.gpt2 import GPT2
from research.interop.mapping import params_from
from research.models.transformer import Transformer

# minGPT is GPT-2 with torch's `Linear` instead of `Conv1D`: outputs first.
MINGPT = dataclasses.replace(
    GPT2,
    tensors=tuple(
        dataclasses.replace(tensor, transposed=True)
        if ".c_" in tensor.theirs and tensor.theirs.endswith("weight")
        else tensor
        for tensor in GPT2.tensors
    ),
)
# minGPT's name of an activation, and the module whose output it is.
OUTPUTS = {
    "tok_emb": "embed",
    "pos_emb": "position_embed",
    "ln1": "layers_0/attention_norm",
    "q": "layers_0/attention/query",
    "k": "layers_0/attention/key",
    "v": "layers_0/attention/value",
    "yProj": "layers_0/attention",
    "ln2": "layers_0/mlp_norm",
    "fc": "layers_0/mlp/up",
    "mlp": "layers_0/mlp",
    "block0": "layers_0",
    "block1": "layers_1",
    "block2": "layers_2",
    "ln_f": "final_norm",
}


def read(path):
    content = json.loads(path.read_text())
    arrays = {
        name: np.frombuffer(base64.b64decode(value["data"]), "<f4").reshape(value["shape"])
        for name, value in content.items()
        if name != "config"
    }
    return content["config"], arrays


@pytest.fixture(scope="module")
def trained(shared_data):
    folder = shared_data / "gpt-nano-sort"
    fields, tensors = read(folder / "gpt-nano-sort-model.json")
    fields["n_positions"] = fields.pop("block_size")
    config = config_from(GPT2, fields | {"model_type": "gpt2", "tie_word_embeddings": False})
    config = dataclasses.replace(config, layer_loop="unroll")
    _, wanted = read(folder / "gpt-nano-sort-t0-partials.json")
    tokens = jnp.asarray(wanted["idx"].astype(np.int32))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def apply(module):
        hidden = module({"tokens": tokens, "positions": positions}).hidden
        return module.logits(hidden)

    logits, seen = nn.apply(apply, Transformer(config), capture_intermediates=True)(
        {"params": params_from(MINGPT, config, tensors)}
    )
    return wanted, np.asarray(logits), named_leaves(seen["intermediates"])


@pytest.mark.parametrize(("theirs", "ours"), OUTPUTS.items())
def test_activation_equals_the_authors(trained, theirs, ours):
    wanted, _, seen = trained
    found = np.asarray(
        next(value for name, value in seen.items() if name.startswith(f"{ours}/__call__/"))
    )
    if found.ndim == 4:
        found = found.swapaxes(1, 2)
    np.testing.assert_allclose(found, np.broadcast_to(wanted[theirs], found.shape), atol=1e-5)


def test_logits_equal_the_authors_and_it_sorts(trained):
    wanted, logits, _ = trained
    np.testing.assert_allclose(logits, wanted["lm_head"], atol=2e-5)
    given = wanted["idx"][:, :6].astype(int)
    # The eleven tokens are six to sort and the first five of the answer.
    np.testing.assert_array_equal(logits[:, 5:].argmax(axis=-1), np.sort(given, axis=1))
