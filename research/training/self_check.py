"""The first batch through the attention that was picked, compared with the plain one: a wrong
implementation stops the run.

A known way to lose a run: a backend that ignores segment ids trains on documents that leak into
each other, and every curve looks a little better than it should.
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

# Of each device's rows one is looked at, and of that no more than so many tokens, since the
# reference holds all scores.
MAX_TOKENS = 1024
# A relative difference is drift above so much, and so many times what rounding does to the
# reference itself.
FLOOR, ROUNDINGS = 1e-3, 4.0


def check_attention(config: ModelConfig, params: Any, batch: Batch, mesh: Mesh) -> None:
    """Compares the first layer's output and gradients on a slice of a batch, by the attention
    picked and by the plain.

    Both are measured against the plain one in float32, so that the bound is what the type's
    rounding explains.

    Args:
      config: the model.
      params: all its parameters; only the embeddings and the first layer are read.
      batch: on the devices of `mesh`.
      mesh: the devices.

    Raises:
      UserError: the attention that was picked is further from the truth than rounding explains.
    """
    if config.attention.implementation == "reference":
        return
    shards = math.prod(mesh.shape[name] for name in BATCH_AXES)
    with jax.set_mesh(mesh):
        single, first = _first_layer(config, params)
        errors = jax.jit(functools.partial(_errors, single, shards))(first, batch)
    errors = {
        name: (float(picked), float(plain))
        for name, (picked, plain) in jax.device_get(errors).items()
    }
    drift = {
        name: picked
        for name, (picked, plain) in errors.items()
        if not picked <= ROUNDINGS * plain + FLOOR
    }
    if drift:
        implementation = config.attention.implementation
        worst = max(drift, key=drift.get)
        raise UserError(
            "model.attention.implementation",
            implementation,
            f"drifts from the reference on the first batch: {worst} is off by {drift[worst]:.2g} "
            "of its norm, "
            f"where rounding explains {errors[worst][1]:.2g}. Use 'reference', "
            "or train.self_check = False to train all the same.",
        )


def _first_layer(config: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """Returns the same model with one layer of its pattern, and one of its encoder, unrolled; and
    its parameters.

    It is one of the first layers where these leave no room for the pattern, in the encoder or in
    the decoder.
    """
    encoded = config.structure == "encoder_decoder"
    depth = min(config.num_layers, config.encoder_layers) if encoded else config.num_layers
    of_first = len(config.first_layers) == depth
    kind = config.first_layers[0] if of_first else config.pattern[0]
    changes = {
        "num_layers": 1,
        "first_layers": (),
        "pattern": (kind,),
        "layer_loop": "unroll",
        "remat": "none",
    }
    layers = _one_layer(config, params, of_first)
    if encoded:
        layers |= {"encoder": _one_layer(config.encoder(), params["encoder"], of_first)}
        changes |= {"encoder_layers": 1}
    return dataclasses.replace(config, **changes), layers


def _one_layer(config: ModelConfig, params: Any, of_first: bool) -> dict[str, Any]:
    """Returns a stack's parameters with those of one layer alone."""
    rest = {
        name: leaf
        for name, leaf in params.items()
        if not name.startswith(("layers", "first_layers"))
    }
    if of_first:
        layer = params["first_layers_0"]
    elif "layers" in params:  # stacked
        layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    else:
        layer = params["layers_0"]
    return rest | {"layers_0": layer}


def _errors(
    config: ModelConfig, shards: int, params: Any, batch: Batch
) -> dict[str, tuple[Float[Array, ""], Float[Array, ""]]]:
    """Returns how far the attention picked, and the plain one, are from the plain one in float32,
    relative to norms.
    """
    rows = {name: x.reshape(shards, -1, x.shape[1])[:, 0, :MAX_TOKENS] for name, x in batch.items()}
    plain = dataclasses.replace(config.attention, implementation="reference")
    with jax.default_matmul_precision("highest"):
        truth = language_model(dataclasses.replace(config, attention=plain, dtype="float32"))
        exact = _outputs(truth, params, rows)
    models = [language_model(one) for one in (config, dataclasses.replace(config, attention=plain))]
    sides = [_outputs(model, params, rows) for model in models]

    def error(side: Array, truth: Array) -> Float[Array, ""]:
        return jnp.linalg.norm(side.ravel() - truth.ravel()) / jnp.maximum(
            jnp.linalg.norm(truth.ravel()), 1e-30
        )

    return {
        name: tuple(error(side[name], truth) for side in sides) for name, truth in exact.items()
    }


def _outputs(model: LanguageModel, params: Any, batch: Batch) -> dict[str, Float[Array, "..."]]:
    """Returns the hidden states of real tokens, and the gradients of every attention under a random
    cotangent.
    """
    shape = (*batch["tokens"].shape, model.config.embed_dim)
    real = (batch["segments"] != 0)[..., None].astype(jnp.float32)
    cotangent = jax.random.normal(jax.random.key(0), shape) * real

    def projected_output(
        attention: dict[str, Array],
    ) -> tuple[Float[Array, ""], Float[Array, "B T D"]]:
        with_these = tree_map_with_path(
            lambda path, leaf: attention.get(path_name(path), leaf), params
        )
        hidden = model.hidden(with_these, model_inputs(batch)).hidden.astype(jnp.float32)
        return jnp.sum(hidden * cotangent), hidden * real

    # Of the sequence, of the encoder's, and of one over the other.
    attention = {name: leaf for name, leaf in named_leaves(params).items() if "attention/" in name}
    gradients, hidden = jax.grad(projected_output, has_aux=True)(attention)
    gradients = {
        f"the gradient of {name}": leaf.astype(jnp.float32) for name, leaf in gradients.items()
    }
    return {"the output of a layer": hidden} | gradients
