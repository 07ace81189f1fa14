"""What the arrays of a training step are meant to be, for the check of its compiled program."""

from jax.sharding import PartitionSpec

from research.data.objectives import ObjectiveConfig
from research.inspection.activations import activation_groups
from research.models.config import ModelConfig
from research.parallel.mesh_config import SlicesConfig
from research.scaling.accidents import ProgramArrays
from research.scaling.array_forms import TableArray, parameters
from research.training.program import Program

# Keys, values and their latents meet the queries of other devices: they may have all tokens of a
# row.
_KEYS = ("kv_heads", "latent")


def program_arrays(
    program: Program,
    model: ModelConfig,
    objective: ObjectiveConfig,
    *,
    accumulation: int = 1,
    slices: SlicesConfig | None = None,
    large: int = 2**20,
) -> ProgramArrays:
    """Returns the parameters and activations of a program, as the table shards them.

    Args:
      program: of a training run.
      model, objective: that it trains, and on which batches.
      accumulation: microbatches of a batch.
      slices: of the mesh; None is one slice.
      large: bytes on one device from which an array, or what a collective gives, counts.
    """
    scanned = ()
    if model.layer_loop == "scan":
        scanned = (model.num_layers - len(model.first_layers),)
    # Distances are projected once for all rows.
    summed = ("relative",) if model.position.kind == "relative" else ()
    return ProgramArrays(
        program.mesh,
        tuple(parameters(program)),
        tuple(_activations(program, model, objective, accumulation)),
        scanned,
        slices or SlicesConfig(),
        large,
        summed,
    )


def _activations(
    program: Program, model: ModelConfig, objective: ObjectiveConfig, accumulation: int
) -> list[TableArray]:
    """Returns what the modules of a model take and give of a microbatch."""
    rows, length = program.batch["tokens"].shape
    rows //= accumulation
    groups = activation_groups(model, objective, rows, length, program.mesh.abstract_mesh)
    arrays = []
    for group in groups:
        for array in group.arrays:
            gathered = ("length",) if set(_KEYS) & set(array.axes) else ()
            spec = PartitionSpec(*(axes or None for axes in array.mesh_axes))
            arrays.append(TableArray(array.name, array.axes, array.shape, spec, gathered))
    return arrays
