"""Fails on what the partitioner did by accident in a compiled training step."""

from collections.abc import Collection
from typing import Any

from jax.sharding import PartitionSpec

from research.data.objectives import CAUSAL
from research.inspection.activations import activation_groups
from research.models.config import ModelConfig
from research.parallel.mesh_config import SlicesConfig
from research.scaling.accidents import Finding, ProgramArrays, accidents
from research.scaling.array_forms import TableArray, parameters
from research.training.program import Program

# Keys, values and their latents meet the queries of other devices: they may have all tokens of a
# row.
KEYS = ("kv_heads", "latent")


def activations(program: Program, model: ModelConfig) -> list[TableArray]:
    """Returns what the modules of a model take and give, as the table shards it."""
    rows, length = program.batch["tokens"].shape
    groups = activation_groups(model, CAUSAL, rows, length, program.mesh.abstract_mesh)
    arrays = []
    for group in groups:
        for array in group.arrays:
            gathered = ("length",) if set(KEYS) & set(array.axes) else ()
            spec = PartitionSpec(*(axes or None for axes in array.mesh_axes))
            arrays.append(TableArray(array.name, array.axes, array.shape, spec, gathered))
    return arrays


def find_accidents(
    compiled: Any,
    program: Program,
    model: ModelConfig,
    *,
    slices: SlicesConfig | None = None,
    expected: Collection[tuple[str, tuple[str, ...]]] | None = None,
    large: int = 2**10,
) -> list[Finding]:
    """Returns what a compiled step does by accident.

    Args:
      compiled: of the step.
      program: that it is the step of.
      model: that it trains.
      slices: of the mesh.
      expected: kinds and axes of the collectives that it may have; None is any.
      large: bytes from which an array or a collective counts.
    """
    num_layers = ()
    if model.layer_loop == "scan":
        num_layers = (model.num_layers - len(model.first_layers),)
    arrays = ProgramArrays(
        program.mesh,
        tuple(parameters(program)),
        tuple(activations(program, model)),
        num_layers,
        slices or SlicesConfig(),
        large,
    )
    return accidents(compiled.as_text(), arrays, expected)


def assert_no_accidents(compiled: Any, program: Program, model: ModelConfig, **options) -> None:
    """Fails with all that `find_accidents` finds."""
    found = find_accidents(compiled, program, model, **options)
    assert not found, "\n".join(f"{each.what}: {each.where} ({each.bytes} bytes)" for each in found)
