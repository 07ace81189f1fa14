"""A training step written out, and the check that another step is that one.

It is of one device, with layers one after the other, whole logits and a loop over microbatches. It
shares modules and dropout keys with the step under test, and neither the scan, the losses of
routers and of multi-token prediction, what a batch weighs, nor the norm.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.random import key_for, step_key
from research.core.trees import named_leaves
from research.models.config import ModelConfig
from research.models.transformer import Transformer
from tests.parallel.products import CLIP_NORM, TOLERANCE, first_step, host_batch
from tests.tiny import random_params


class PlainStep(NamedTuple):
    """The losses of a step, by the names of its metrics, its gradients and their norm."""

    losses: dict[str, float]
    gradients: dict[str, np.ndarray]
    norm: float


def plain_step(model: ModelConfig, microbatches: int = 1) -> PlainStep:
    """Returns the first step of a run (`products.train`) of a model whose layers are stacked."""
    batch = host_batch(model, 0)
    weight = float(batch["weights"].sum())
    minimized = functools.partial(_minimized, model, weight, microbatches)
    value_and_grad = jax.jit(jax.value_and_grad(minimized, has_aux=True))
    key = step_key(key_for(0, "dropout"), 0)

    losses: dict[str, float] = {}
    gradients: dict[str, np.ndarray] = {}
    for index in range(microbatches):
        # Of 2 microbatches: rows 0, 2, 4, 6 and rows 1, 3, 5, 7
        rows = {name: jnp.asarray(array[index::microbatches]) for name, array in batch.items()}
        own_key = key if microbatches == 1 else jax.random.fold_in(key, index)
        (_, parts), part_gradients = value_and_grad(random_params(model), rows, own_key)
        for name, part in parts.items():
            losses[name] = losses.get(name, 0.0) + float(part)
        for name, part in named_leaves(part_gradients).items():
            gradients[name] = gradients.get(name, 0.0) + np.asarray(part)
    norm = float(np.sqrt(sum(np.sum(gradient**2) for gradient in gradients.values())))
    return PlainStep(losses, gradients, norm)


def _minimized(
    model: ModelConfig, weight: float, microbatches: int, params: Any, batch: Any, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns what a microbatch adds to what is minimized, and to each loss."""
    module = Transformer(dataclasses.replace(model, layer_loop="unroll", remat="none"))
    variables = {"params": _unstacked(params)}
    output, noted = module.apply(
        variables,
        batch,
        deterministic=False,
        rngs={"dropout": key},
        capture_intermediates=_gives_router_logits,
    )

    def mean_nll(hidden: jax.Array, depth: int) -> jax.Array:
        # The target `depth` tokens further on counts where it is of the same document.
        stop = hidden.shape[1] - depth
        of_same = batch["segments"][:, :stop] == batch["segments"][:, depth:]
        weights = jnp.where(of_same, batch["weights"][:, depth:], 0.0)
        targets = batch["targets"][:, depth:, None]
        logits = module.apply(variables, hidden[:, :stop], method=Transformer.logits)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1)
        return jnp.sum(weights * nll[..., 0]) / weight

    losses = {"loss": mean_nll(output.hidden, 0)}
    minimized = losses["loss"]
    if model.head.mtp_depth:
        depths = range(1, model.head.mtp_depth + 1)
        parts = [
            mean_nll(hidden, depth) for depth, hidden in zip(depths, output.mtp_hidden, strict=True)
        ]
        losses["mtp_loss"] = sum(parts) / len(parts)
        minimized += model.head.mtp_weight * losses["mtp_loss"]
    if model.experts is not None:
        real = batch["segments"] != 0
        parts = [_router_loss(model, logits, real) for logits in jax.tree.leaves(noted)]
        assert len(parts) == model.num_layers
        losses["router_loss"] = sum(parts) / len(parts) / microbatches
        minimized += losses["router_loss"]
    return minimized, losses


def _gives_router_logits(module: nn.Module, method: str) -> bool:
    return module.name == "router" and method == "__call__"


def _unstacked(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns parameters with those of each layer by themselves: layers -> layers_0, layers_1."""
    result: dict[str, Any] = {}
    for name, subtree in tree.items():
        if name == "layers":
            for index in range(len(jax.tree.leaves(subtree)[0])):
                layer = jax.tree.map(lambda leaf, index=index: leaf[index], subtree)
                result[f"layers_{index}"] = layer
        elif isinstance(subtree, dict):
            result[name] = _unstacked(subtree)
        else:
            result[name] = subtree
    return result


def _router_loss(model: ModelConfig, logits: jax.Array, real: jax.Array) -> jax.Array:
    """Returns balance_weight · E Σ_e f_e P_e + z_weight · mean(logsumexp²) over real tokens."""
    c = model.experts
    # [B, T] -> [B T]: a row for each token
    counts = real.reshape(-1).astype(logits.dtype)
    logits = logits.reshape(-1, c.num_experts)
    probabilities = jax.nn.softmax(logits)
    # The rank of the best expert is 0.
    ranks = jnp.argsort(jnp.argsort(-probabilities))
    is_chosen = (ranks < c.experts_per_token).astype(logits.dtype)

    loss = jnp.zeros(())
    for expert in range(c.num_experts):
        share = jnp.sum(counts * is_chosen[:, expert]) / c.experts_per_token / jnp.sum(counts)
        mean = jnp.sum(counts * probabilities[:, expert]) / jnp.sum(counts)
        loss += c.balance_weight * c.num_experts * share * mean
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return loss + c.z_weight * jnp.sum(counts * log_z**2) / jnp.sum(counts)


def assert_plain_step(model: ModelConfig, *args: Any, microbatches: int = 1) -> None:
    """Fails where the first step of a run is not the plain one, in a loss, in a gradient as it was
    clipped, or in the norm.

    Args:
      model: with stacked layers.
      args: the mesh and its devices.
      microbatches: of the batch.
    """
    plain = plain_step(model, microbatches)
    metrics, gradients = first_step(model, *args, accumulation=microbatches)
    for name, expected in (plain.losses | {"grad_norm": plain.norm}).items():
        is_equal = metrics[name] == pytest.approx(expected, rel=TOLERANCE)
        assert is_equal, f"{name} = {metrics[name]}, not {expected}"

    # The control: gradients are clipped.
    assert plain.norm > CLIP_NORM
    assert gradients.keys() == plain.gradients.keys()
    for name, gradient in gradients.items():
        expected = plain.gradients[name] * (CLIP_NORM / plain.norm)
        atol = TOLERANCE * np.abs(expected).max()
        np.testing.assert_allclose(
            gradient, expected, rtol=0, atol=atol, err_msg=f"gradient of {name}"
        )
