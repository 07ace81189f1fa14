"""The config of a training run: its groups, and what they must agree on."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from research.core import config as configs
from research.core.errors import UserError, within
from research.data.objectives import encoder_length
from research.data.prepare import DataConfig
from research.models.config import ModelConfig
from research.optim.optimizers import OptimConfig
from research.parallel.distributed import DistributedConfig
from research.parallel.mesh_config import MeshConfig
from research.training.checkpoints import CheckpointConfig
from research.training.config import TrainConfig
from research.training.trackers import TrackersConfig

# Which structures an objective's batches are for.
_BOTH_STACKS = ("encoder_decoder",)
STRUCTURES = {
    "causal": ("decoder",),
    "masked": ("encoder",),
    "prefix": ("prefix",),
    "span": _BOTH_STACKS,
    "denoise": _BOTH_STACKS,
    "infill": _BOTH_STACKS,
    "translate": _BOTH_STACKS,
}


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything that a training run depends on; each group belongs to the module that reads it.

    Attributes:
      start_from: a workdir whose newest parameters, averaged ones where it has them, the run begins
        with; empty: with random ones. Shapes and tokenizer must be the same; positions, the length
        of rows, data and optimizer may differ.
    """

    model: ModelConfig
    train: TrainConfig
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    trackers: TrackersConfig = TrackersConfig()
    start_from: str = ""

    def __post_init__(self) -> None:
        # The objective makes batches for the model's structure.
        kind = self.data.objective.kind
        structure = self.model.structure
        if structure not in STRUCTURES[kind]:
            fitting = [repr(kind) for kind, fits in STRUCTURES.items() if structure in fits]
            raise UserError(
                "data.objective.kind",
                kind,
                f"does not train model.structure = {structure!r}. Use {' or '.join(fitting)}.",
            )

        # Rows are no longer than the model's positions.
        longest_encoder = encoder_length(self.data.objective, self.train.sequence_length)
        if longest_encoder > self.model.max_length:
            raise UserError(
                "data.objective.encoder_length",
                self.data.objective.encoder_length,
                f"is longer than model.max_length = {self.model.max_length}.",
            )
        if self.train.sequence_length > self.model.max_length:
            raise UserError(
                "train.sequence_length",
                self.train.sequence_length,
                f"is longer than model.max_length = {self.model.max_length}.",
            )

        if self.optim.ema_decay is not None and self.model.param_dtype == "bfloat16":
            raise UserError(
                "optim.ema_decay",
                self.optim.ema_decay,
                "needs model.param_dtype = 'float32': in bfloat16 an average's small steps are "
                "rounded away.",
            )


def add_config_argument(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds `--config`; the command line takes `--config.a.b=VALUE` for itself."""
    parser.add_argument(
        "--config", required=required, help="FILE.py, or FILE.py:ARG; --config.a.b=VALUE changes it"
    )


def load_experiment(spec: str, overrides: Sequence[tuple[str, str]]) -> ExperimentConfig:
    """Returns the config of `FILE.py[:arg]` with dotted overrides.

    Raises:
      UserError: what `core.config` refuses, with the file's name in front.
    """
    values = configs.override(configs.load_file(spec), overrides)
    with within("", origin=spec.partition(":")[0]):
        return configs.bind(ExperimentConfig, values)


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the plain config of a workdir, with the fields that are newer than it at their
    defaults.
    """
    try:
        return configs.plain(configs.bind(ExperimentConfig, values))
    except UserError:
        # The config of a converted model, or of a version that had other fields, stays unchanged.
        return values
