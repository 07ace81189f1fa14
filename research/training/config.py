"""How a run trains: steps, batches, logging and evaluation."""

import dataclasses
from typing import Literal

from research.core.errors import UserError
from research.parallel.divisibility import nearest_divisors
from research.parallel.pipeline_schedule import Name
from research.training.partition import TrainableConfig


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How the stages of `mesh.pipeline` take the microbatches of a batch, `train.accumulation` of
    them.

    Attributes:
      schedule: see `parallel.pipeline_schedule`.
      chunks: of layers on each device, which `interleaved` takes in turns.
    """

    schedule: Name = "1f1b"
    chunks: int = 1

    def __post_init__(self) -> None:
        if self.chunks < 1:
            raise UserError("chunks", self.chunks, "must be at least 1.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a run trains.

    Attributes:
      steps: batches in all.
      seed: of initialization, dropout and sample order, in [0, 2³¹).
      batch_size: rows of a batch, over all devices.
      sequence_length: tokens of a row.
      accumulation: microbatches of a batch; divides the batch size.
      reduce_dtype: in which gradients of kernels and tables are summed over devices: `float32` or
          `bfloat16`, which halves their bytes. Scales and biases, and sums over microbatches, are
          always in float32.
      pipeline: how stages take the microbatches, where the mesh has several.
      z_loss: coefficient of the z-loss; 0 leaves it out.
      label_smoothing: share of the target spread over the vocabulary, in [0, 1); evaluation has
          none.
      log_every: steps between lines of the log.
      eval_every: steps between evaluations on held-out text; 0 evaluates at the end only.
      eval_batches: most held-out batches of an evaluation; 0 takes them all.
      max_skipped: this many steps in a row without a finite loss stop the run.
      trainable: which parameters are trained; the others are frozen.
      self_check: whether attention is compared with the plain one on the first batch; drift stops
          the run.
    """

    steps: int
    seed: int = 0
    batch_size: int = 16
    sequence_length: int = 256
    accumulation: int = 1
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    pipeline: PipelineConfig = PipelineConfig()
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 0
    max_skipped: int = 5
    trainable: TrainableConfig = TrainableConfig()
    self_check: bool = True

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "sequence_length",
            "accumulation",
            "log_every",
            "max_skipped",
        ):
            if getattr(self, name) < 1:
                raise UserError(name, getattr(self, name), "must be at least 1.")
        for name in ("eval_every", "eval_batches", "z_loss"):
            if getattr(self, name) < 0:
                raise UserError(name, getattr(self, name), "must not be below 0.")
        if not 0 <= self.label_smoothing < 1:
            raise UserError("label_smoothing", self.label_smoothing, "must lie in [0, 1).")
        # Random keys use no more bits: a larger seed would give the numbers of another one.
        if not 0 <= self.seed < 2**31:
            raise UserError("seed", self.seed, "must lie in [0, 2147483648).")
        if self.batch_size % self.accumulation:
            advice = nearest_divisors(self.accumulation, self.batch_size)
            raise UserError(
                "accumulation",
                self.accumulation,
                f"does not divide batch_size = {self.batch_size}. Use {advice}.",
            )
