"""Compares the attention that was picked with the plain one on the first batch.

A backend that ignores segment ids, for example, trains on documents that attend to each other, and
every curve looks a little better than it should. Here that stops the run.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.tree_util import tree_map_with_path
from jaxtyping import Array, Float

from research.core.errors import UserError
from research.core.trees import named_leaves, path_name
from research.data.batch import Batch, model_inputs
from research.models.config import ModelConfig
from research.models.language_model import LanguageModel, language_model
from research.parallel.mesh_axes import BATCH_AXES

# Of each device's rows one is compared, up to this many tokens: the plain attention has all scores
# in memory.
MAX_TOKENS = 1024
# Largest relative error: `FLOOR`, and this many times the error of plain attention by rounding.
FLOOR = 1e-3
ROUNDINGS = 4.0

# (relative error of the attention picked, relative error of the plain one)
Errors = tuple[Float[Array, ""], Float[Array, ""]]


def check_attention(config: ModelConfig, params: Any, batch: Batch, mesh: Mesh) -> None:
    """Compares the first layer's output and gradients, by the attention picked and by the plain.

    Both are compared with the plain one in float32, so that the bound is what rounding to the
    model's type explains.

    Args:
      config: the model.
      params: all its parameters; only the embeddings and the first layer are read.
      batch: on the devices of `mesh`.
      mesh: the devices.

    Raises:
      UserError: the error of the attention picked is larger than rounding explains.
    """
    if config.attention.implementation == "reference":
        return
    shards = math.prod(mesh.shape[name] for name in BATCH_AXES)
    with jax.set_mesh(mesh):
        single, first = _first_layer(config, params)
        errors = jax.jit(functools.partial(_errors, single, shards))(first, batch)
    errors = {name: tuple(map(float, pair)) for name, pair in jax.device_get(errors).items()}

    # `not <=` also finds an error that is not a number.
    drift = {
        name: picked
        for name, (picked, plain) in errors.items()
        if not picked <= ROUNDINGS * plain + FLOOR
    }
    if not drift:
        return
    worst = max(drift, key=drift.get)
    _, explained = errors[worst]
    raise UserError(
        "model.attention.implementation",
        config.attention.implementation,
        f"drifts from the reference on the first batch: {worst} is off by {drift[worst]:.2g} of "
        f"its norm, where rounding explains {explained:.2g}. Use 'reference', or "
        "train.self_check = False to train all the same.",
    )


def _first_layer(config: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """Returns the model with one layer, and one of its encoder, unrolled; and its parameters.

    It is the first layer of the pattern. Where all layers of the decoder or of the encoder come
    before the pattern, it is the first of those.
    """
    encoded = config.structure == "encoder_decoder"
    depth = config.num_layers
    if encoded:
        depth = min(depth, config.encoder_layers)
    from_first = len(config.first_layers) == depth
    kind = config.first_layers[0] if from_first else config.pattern[0]
    changes = {
        "num_layers": 1,
        "first_layers": (),
        "pattern": (kind,),
        "layer_loop": "unroll",
        "remat": "none",
    }
    layers = _one_layer(config, params, from_first)
    if encoded:
        layers |= {"encoder": _one_layer(config.encoder(), params["encoder"], from_first)}
        changes |= {"encoder_layers": 1}
    return dataclasses.replace(config, **changes), layers


def _one_layer(config: ModelConfig, params: Any, from_first: bool) -> dict[str, Any]:
    """Returns the parameters of a stack with one layer, as `layers_0`."""
    outside = {
        name: leaf
        for name, leaf in params.items()
        if not name.startswith(("layers", "first_layers"))
    }
    if from_first:
        layer = params["first_layers_0"]
    elif "layers" in params:
        # [L, ...] -> [...]
        layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    else:
        layer = params["layers_0"]
    return outside | {"layers_0": layer}


def _errors(config: ModelConfig, shards: int, params: Any, batch: Batch) -> dict[str, Errors]:
    """Returns the relative errors of a layer's output and of its gradients."""
    # The first row of each device: [B, T] -> [shards, B / shards, T] -> [shards, MAX_TOKENS]
    rows = {}
    for name, array in batch.items():
        by_shard = array.reshape(shards, -1, array.shape[1])
        rows[name] = by_shard[:, 0, :MAX_TOKENS]

    plain_attention = dataclasses.replace(config.attention, implementation="reference")
    plain_config = dataclasses.replace(config, attention=plain_attention)
    exact_config = dataclasses.replace(plain_config, dtype="float32")
    with jax.default_matmul_precision("highest"):
        exact = _outputs(language_model(exact_config), params, rows)
    picked = _outputs(language_model(config), params, rows)
    plain = _outputs(language_model(plain_config), params, rows)

    errors = {}
    for name, truth in exact.items():
        picked_error = _relative_error(picked[name], truth)
        plain_error = _relative_error(plain[name], truth)
        errors[name] = (picked_error, plain_error)
    return errors


def _relative_error(found: Array, truth: Array) -> Float[Array, ""]:
    """Returns ‖found - truth‖ / ‖truth‖ over all elements."""
    # Frobenius norms of all axes together: [B, T, D] -> [B T D]
    truth = truth.ravel()
    error = jnp.linalg.norm(found.ravel() - truth)
    size = jnp.linalg.norm(truth)
    return error / jnp.maximum(size, 1e-30)


def _outputs(model: LanguageModel, params: Any, batch: Batch) -> dict[str, Float[Array, "..."]]:
    """Returns the hidden states of real tokens, and the gradients of all attention parameters.

    The gradients are those of the states' product with a random cotangent.
    """
    # 1 for real tokens and 0 for padding, whose states mean nothing: [B, T] -> [B, T, 1]
    real = batch["segments"] != 0
    real = real[..., None].astype(jnp.float32)
    shape = (*batch["tokens"].shape, model.config.embed_dim)
    cotangent = jax.random.normal(jax.random.key(0), shape)
    cotangent *= real

    # Its gradient is the product of the cotangent with the Jacobian: one backward pass checks the
    # gradients of all outputs.
    def projected_output(
        attention: dict[str, Array],
    ) -> tuple[Float[Array, ""], Float[Array, "B T D"]]:
        merged = tree_map_with_path(lambda path, leaf: attention.get(path_name(path), leaf), params)
        output = model.hidden(merged, model_inputs(batch))
        hidden = output.hidden.astype(jnp.float32)
        projected = jnp.sum(hidden * cotangent)
        return projected, hidden * real

    # Self-attention, the encoder's, and cross-attention.
    attention = {name: leaf for name, leaf in named_leaves(params).items() if "attention/" in name}
    gradient_of = jax.grad(projected_output, has_aux=True)
    gradients, hidden = gradient_of(attention)
    outputs = {"the output of a layer": hidden}
    for name, gradient in gradients.items():
        outputs[f"the gradient of {name}"] = gradient.astype(jnp.float32)
    return outputs
