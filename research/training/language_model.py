"""Training of a language model: its loss, and its run as programs for a mesh."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.data.batch import Batch
from research.data.objectives import CAUSAL, ObjectiveConfig, batch_shapes
from research.kernels.cross_entropy import cross_entropy
from research.losses.token import weighted_sum, z_loss
from research.models.config import ModelConfig
from research.models.heads import shift_left
from research.models.language_model import LanguageModelConfig, language_model
from research.models.transformer import LogitTerms
from research.optim.optimizers import OptimConfig
from research.parallel.mesh import MeshConfig, make_mesh
from research.parallel.target import compiling_for_mesh, mesh_platform
from research.training.config import TrainConfig
from research.training.partition import EVERYTHING, Partition, build_partition
from research.training.program import Program, build_program
from research.training.step import Metrics, Report


@dataclasses.dataclass(frozen=True)
class LanguageModelLoss:
    """The weighted cross-entropy of a model, in nats a token, and the terms that training adds.

    These are the z-loss, the router loss of experts, and the loss of multi-token prediction, where
    the config has them; of the last the plain mean over the depths is reported. The output
    projection is taken in chunks, so float32 logits of the whole batch never exist.

    Attributes:
      config: the model.
      z_coefficient: of the z-loss, 0 for none.
      label_smoothing: in [0, 1), part of the reported loss; 0 leaves it plain, as evaluation needs
          it.
      partition: puts the trainable and the frozen parameters together.
    """

    config: LanguageModelConfig
    z_coefficient: float = 0.0
    label_smoothing: float = 0.0
    partition: Partition = EVERYTHING

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """Returns the weights of all tokens together."""
        return jnp.sum(batch["weights"])

    def sums(
        self, trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[Float[Array, ""], Report]:
        """Returns the loss summed over tokens, and what else there is to tell."""
        params = self.partition.merge(trainable, frozen)
        model = language_model(self.config)
        output = model.hidden(params, batch, key=key)

        total, sums = self._cross_entropy(
            model.projection(params, output.hidden), batch["targets"], batch["weights"]
        )
        mtp = [
            self._cross_entropy(model.projection(params, hidden), *_targets_at(batch, depth))
            for depth, hidden in enumerate(output.mtp_hidden, start=1)
        ]
        if mtp:
            total = total + output.mtp_weight * sum(loss for loss, _ in mtp) / len(mtp)
            sums = {**sums, "mtp_loss": sum(metrics["loss"] for _, metrics in mtp) / len(mtp)}

        reports = output.reports
        means = {"router_loss": reports.router_loss} if reports.expert_load else {}
        return total, Report(sums, means, reports.expert_load)

    def _cross_entropy(
        self, logits: LogitTerms, targets: Int[Array, "B T"], weights: Float[Array, "B T"]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Returns Σ w (nll + z-loss), and both parts."""

        def token_loss(
            nll: Array, log_z: Array, weights: Array
        ) -> tuple[Float[Array, ""], Metrics]:
            nll_sum = weighted_sum(nll, weights)
            z_sum = jnp.zeros(())
            if self.z_coefficient:
                z_sum = weighted_sum(z_loss(log_z, self.z_coefficient), weights)
            return nll_sum + z_sum, {"loss": nll_sum, "z_loss": z_sum}

        return cross_entropy(
            token_loss,
            logits.hidden,
            logits.kernel,
            targets,
            weights,
            softcap=logits.softcap,
            label_smoothing=self.label_smoothing,
        )


def _targets_at(batch: Batch, depth: int) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """Returns the targets that are `depth` places further on, and their weights: 0 past the end of
    a sequence.
    """
    same = shift_left(batch["segments"], depth) == batch["segments"]
    weights = jnp.where(same, shift_left(batch["weights"], depth), 0.0)
    return shift_left(batch["targets"], depth), weights


def language_model_program(
    model: ModelConfig,
    optim: OptimConfig,
    train: TrainConfig,
    mesh: MeshConfig,
    devices: Sequence[jax.Device] | None = None,
    objective: ObjectiveConfig = CAUSAL,
) -> Program:
    """Returns the training of a language model on `devices` (all by default); nothing is compiled
    yet.

    Raises:
      UserError: sizes that do not fit the devices, a schedule longer than the run, or nothing to
          train.
    """
    devices_mesh = make_mesh(mesh, devices)
    untargeted = language_model(model, mesh_platform(devices_mesh)).init

    def init(key: jax.Array) -> Any:
        with compiling_for_mesh(devices_mesh):
            return untargeted(key)

    partition = build_partition(train.trainable, jax.eval_shape(init, jax.random.key(0)))
    return build_program(
        init,
        LanguageModelLoss(model, train.z_loss, train.label_smoothing, partition),
        batch_shapes(objective, train.batch_size, train.sequence_length),
        optim,
        train,
        mesh,
        devices,
        eval_loss=LanguageModelLoss(model, partition=partition),
        partition=partition,
        expert_bias_speed=0.0 if model.experts is None else model.experts.bias_speed,
    )
