"""Faults that public trainers had, seeded one by one, and the check that finds each of them.

The check is `plain_step.assert_plain_step`: losses, the clipping norm and every gradient of a step
on a mesh are those of a step that is written out. It runs with the fault in place, as it would if
the fault were in the code.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

from research.core.trees import path_name
from research.models import block, experts, layer_loops, router, stack
from research.models.config import HeadConfig, ModelConfig
from research.parallel import pipeline_operations
from research.parallel.mesh_config import MeshConfig
from research.parallel.rules import partition_spec
from research.parallel.shard_map import shard_map
from research.training import gradients, language_model, program, step
from research.training.gradients import microbatch_of
from tests.models.variants import VARIANTS
from tests.parallel.plain_step import assert_plain_step
from tests.tiny import tiny_config

Patch = pytest.MonkeyPatch
DENSE = tiny_config(
    attention={"sinks": True}, tied_embeddings=True, dropout=0.1, layer_loop="scan", num_layers=1
)
EXPERTS = dataclasses.replace(VARIANTS["experts"], dropout=0.1, layer_loop="scan", num_layers=1)


class Case(NamedTuple):
    """A model on a mesh, whose batch is taken in microbatches."""

    model: ModelConfig
    sizes: dict[str, int]
    microbatches: int = 1


CASES = {
    "dense": Case(DENSE, {"data": 2, "context": 2, "tensor": 2}),
    # Tensor ranks have different tokens between sublayers, and the same ones in "dense".
    "sequence-parallel": Case(
        dataclasses.replace(DENSE, sequence_parallel=True), {"data": 2, "tensor": 2}
    ),
    "microbatches": Case(DENSE, {"data": 2}, 2),
    "pipeline": Case(dataclasses.replace(DENSE, num_layers=2), {"pipeline": 2}, 2),
    "experts": Case(EXPERTS, {"expert": 2}),
    "MTP": Case(dataclasses.replace(DENSE, head=HeadConfig(mtp_depth=2)), {"context": 2}),
}


def check(case: Case) -> None:
    """Fails where the first step of a case is not the plain one."""
    devices = jax.devices()[: math.prod(case.sizes.values())]
    mesh = MeshConfig(**({"data": 1} | case.sizes))
    assert_plain_step(case.model, mesh, devices, microbatches=case.microbatches)


@pytest.mark.fast_cases("dense")
@pytest.mark.parametrize("name", CASES)
def test_a_step_on_a_mesh_is_the_plain_step(name: str):
    check(CASES[name])


def mesh_size(axis: str) -> int:
    """Of the mesh that is compiled for; 1 for the plain step, which has none."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def norm_without(gradients: Any, name: str) -> jax.Array:
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    return optax.global_norm([g for path, g in leaves if name not in path_name(path)])


def leave_sinks_out_of_norm(patch: Patch) -> None:
    patch.setattr(step, "_global_norm", lambda gradients: norm_without(gradients, "sinks"))


def clip_by_norm_without_scales(patch: Patch) -> None:
    """The norm that is logged is right."""
    clip = step._clip

    def clip_by_other(gradients: Any, norm: jax.Array, largest: float) -> Any:
        return clip(gradients, norm_without(gradients, "scale"), largest)

    patch.setattr(step, "_clip", clip_by_other)


def average_experts_over_ranks(patch: Patch) -> None:
    """Their own devices have summed them already, and there is nobody to average with."""
    apply = experts._apply_experts

    def averaged(model: Any, x: Any, kept: Any, weights: Any, kernels: Any) -> Any:
        share = 1 / mesh_size("expert")

        # The same value, with a gradient of 1 / ranks.
        def scaled(kernel: jax.Array) -> jax.Array:
            return kernel * share + jax.lax.stop_gradient(kernel * (1 - share))

        return apply(model, x, kept, weights, jax.tree.map(scaled, kernels))

    patch.setattr(experts, "_apply_experts", averaged)


def scale_loss_by_context(patch: Patch) -> None:
    """Each context shard divides by the tokens that it has."""
    weight = language_model.LanguageModelLoss.weight

    def of_shard(self: Any, batch: Any) -> jax.Array:
        return weight(self, batch) / mesh_size("context")

    patch.setattr(language_model.LanguageModelLoss, "weight", of_shard)


def lose_reports_of_scan(patch: Patch) -> None:
    """The scan returns the hidden states alone, and zeros for what layers report."""
    scan = layer_loops._scan_rounds

    def without_loss(*args: Any) -> Any:
        x, cache, report = scan(*args)
        lost = jnp.zeros_like(report.router_loss)
        return x, cache, dataclasses.replace(report, router_loss=lost)

    patch.setattr(layer_loops, "_scan_rounds", without_loss)


def average_means_of_microbatches(patch: Patch) -> None:
    """Each microbatch is divided by its own weight, though they have different numbers of
    targets.
    """
    mean_gradients = program.mean_gradients

    def averaged(
        loss: Any, trainable: Any, frozen: Any, batch: Any, weight: Any, key: Any, **options: Any
    ) -> Any:
        count = options["accumulation"]
        parts = []
        for index in range(count):
            rows = microbatch_of(batch, index, count)
            own_key = jax.random.fold_in(key, index)
            part = mean_gradients(loss, trainable, frozen, rows, loss.weight(rows), own_key)
            parts.append(part)
        return jax.tree.map(lambda *leaves: sum(leaves) / count, *parts)

    patch.setattr(program, "mean_gradients", averaged)


def drop_gradient_of_first_stage(patch: Patch) -> None:
    """A tied table is read on the first stage and on the last, and the last alone adds up."""
    patch.setattr(
        pipeline_operations.StageOperations, "_enter_gradient", lambda self, carry, tick, dx: carry
    )


def drop_out_the_same_on_shards_of(axis: str) -> Callable[[Patch], None]:
    """The shards of a row take the random numbers of its first shard."""

    def seed(patch: Patch) -> None:
        dropout = block.Block._dropout

        def of_first_shard(self: Any, y: jax.Array, context: Any, index: int) -> jax.Array:
            shards = mesh_size(axis)
            factors = dropout(self, jnp.ones_like(y), context, index)
            # [B, T, D] -> [B, T / shards, D]
            of_first = factors[:, : y.shape[1] // shards]
            return y * jnp.tile(of_first, (1, shards, 1))

        patch.setattr(block.Block, "_dropout", of_first_shard)

    return seed


def drop_out_differently_on_replicas(patch: Patch) -> None:
    """Tensor ranks have the same hidden states, and the second takes other random numbers."""
    dropout = block.Block._dropout

    def by_rank(self: Any, y: jax.Array, context: Any, index: int) -> jax.Array:
        first = dropout(self, y, context, index)
        if mesh_size("tensor") == 1:
            return first
        second = dropout(self, y, context, index + 100)

        def own(first: jax.Array, second: jax.Array) -> jax.Array:
            return jnp.where(jax.lax.axis_index("tensor") == 0, first, second)

        spec = partition_spec(("batch", "length", "embed"))
        return shard_map(own, (spec, spec), spec)(first, second)

    patch.setattr(block.Block, "_dropout", by_rank)


def count_positions_from_shard_start(patch: Patch) -> None:
    context = stack.Stack.context

    def local(self: Any, positions: jax.Array, *args: Any) -> Any:
        of_shard = positions.shape[1] // mesh_size("context")
        index = jnp.arange(positions.shape[1], dtype=positions.dtype) % of_shard
        return context(self, jnp.broadcast_to(index, positions.shape), *args)

    patch.setattr(stack.Stack, "context", local)


def count_padding_in_balance_loss(patch: Patch) -> None:
    loss = router._router_loss
    patch.setattr(router, "_router_loss", lambda *args: loss(*args[:-1], None))


def mask_all_targets_of_mtp(patch: Patch) -> None:
    targets_at = language_model._targets_at

    def masked(batch: Any, depth: int) -> Any:
        targets, weights = targets_at(batch, depth)
        return targets, jnp.zeros_like(weights)

    patch.setattr(language_model, "_targets_at", masked)


def reduce_in_bfloat16(patch: Patch) -> None:
    """What is summed over devices is rounded, though the config says float32."""

    def rounded(grads: Any, _: Any) -> Any:
        return jax.tree.map(lambda g: g.astype(jnp.bfloat16).astype(g.dtype), grads)

    patch.setattr(gradients, "constrain_tree", rounded)


# fault -> how it is seeded, the case that it is in, and how the check's message begins
FAULTS: dict[str, tuple[Callable[[Patch], None], str, str]] = {
    "sinks left out of the norm": (leave_sinks_out_of_norm, "dense", "grad_norm"),
    "clipping by a norm without scales": (clip_by_norm_without_scales, "dense", "gradient of"),
    "gradients of experts averaged": (average_experts_over_ranks, "experts", "grad_norm"),
    "loss scaled by the context size": (scale_loss_by_context, "dense", "loss"),
    "router loss lost inside a scan": (lose_reports_of_scan, "experts", "router_loss"),
    "means of microbatches averaged": (average_means_of_microbatches, "microbatches", "loss"),
    "tied gradient of one stage only": (drop_gradient_of_first_stage, "pipeline", "grad_norm"),
    "dropout equal on context shards": (drop_out_the_same_on_shards_of("context"), "dense", "loss"),
    "dropout equal on tensor ranks": (
        drop_out_the_same_on_shards_of("tensor"),
        "sequence-parallel",
        "loss",
    ),
    "dropout different on replicas": (drop_out_differently_on_replicas, "dense", "loss"),
    "positions local to a context shard": (count_positions_from_shard_start, "dense", "loss"),
    "padding in the balance loss": (count_padding_in_balance_loss, "experts", "router_loss"),
    "MTP loss silently 0": (mask_all_targets_of_mtp, "MTP", "mtp_loss"),
    "sums in bfloat16": (reduce_in_bfloat16, "dense", "grad_norm"),
}


@pytest.mark.fast_cases("sinks left out of the norm")
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch):
    seed, case, what = FAULTS[fault]
    seed(monkeypatch)
    with pytest.raises(AssertionError) as caught:
        check(CASES[case])
    assert str(caught.value).strip().startswith(what) or f"\n{what}" in str(caught.value)
