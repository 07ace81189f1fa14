"""Fails on what the partitioner did by accident in a compiled training step."""

from collections.abc import Collection
from typing import Any

from research.data.objectives import CAUSAL
from research.inspection.program_arrays import program_arrays
from research.models.config import ModelConfig
from research.parallel.mesh_config import SlicesConfig
from research.scaling.accidents import Finding, accidents
from research.training.program import Program


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
    arrays = program_arrays(program, model, CAUSAL, slices=slices, large=large)
    return accidents(compiled.as_text(), arrays, expected)


def assert_no_accidents(compiled: Any, program: Program, model: ModelConfig, **options) -> None:
    """Fails with all that `find_accidents` finds."""
    found = find_accidents(compiled, program, model, **options)
    assert not found, "\n".join(f"{each.what}: {each.where} ({each.bytes} bytes)" for each in found)
