"""Training of a language model: its loss, and its run as programs for a mesh."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.core.errors import UserError
from research.core.trees import named_leaves
from research.data.batch import Batch
from research.data.objectives import CAUSAL, ObjectiveConfig, batch_shapes
from research.kernels.cross_entropy import cross_entropy
from research.kernels.gradient_type import with_gradient_type
from research.losses.token import weighted_sum, z_loss
from research.models.config import ModelConfig
from research.models.heads import shift_left
from research.models.language_model import LanguageModel, LanguageModelConfig, language_model
from research.models.layer_loops import LayerLoop
from research.models.transformer import LogitTerms, Output
from research.optim.optimizers import OptimConfig
from research.parallel.mesh import make_mesh
from research.parallel.mesh_axes import PIPELINE_AXIS
from research.parallel.mesh_config import MeshConfig
from research.parallel.parameter import logical_axes
from research.parallel.target import compiling_for_mesh, mesh_platform
from research.training.config import TrainConfig
from research.training.gradients import Metrics, Report
from research.training.mesh_checks import check_axes, check_schedule, stacked_for_stages
from research.training.partition import EVERYTHING, Partition, build_partition
from research.training.program import Program, build_program


@dataclasses.dataclass(frozen=True)
class LanguageModelLoss:
    """The weighted cross-entropy of a model, in nats per token, and the losses that training adds.

    loss = Σ w (nll + z-loss) + mtp_weight · mean over depths of Σ w (nll + z-loss) at that depth

    The router loss of experts is reported as a mean, which the step adds. The output projection is
    taken in chunks, so float32 logits of the whole batch never exist.

    Attributes:
      config: the model.
      z_coefficient: of the z-loss, 0 for none.
      label_smoothing: in [0, 1), part of the reported loss; 0 leaves it plain, as evaluation needs
          it.
      partition: puts the trainable and the frozen parameters together.
      bfloat16_gradients: names of the parameters whose gradients are summed over devices in
          bfloat16; those of others are in float32.
      loop: how the model's layers are run; None follows the form of their parameters.
    """

    config: LanguageModelConfig
    z_coefficient: float = 0.0
    label_smoothing: float = 0.0
    partition: Partition = EVERYTHING
    bfloat16_gradients: frozenset[str] = frozenset()
    loop: LayerLoop | None = None

    def with_loop(self, loop: LayerLoop) -> "LanguageModelLoss":
        """Implements `LayeredLoss.with_loop`."""
        return dataclasses.replace(self, loop=loop)

    def hidden(self, trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None) -> Output:
        """Implements `LayeredLoss.hidden`."""
        params = self._params(trainable, frozen)
        return self._model().hidden(params, batch, key=key)

    def _params(self, trainable: Any, frozen: Any) -> Any:
        """Returns all parameters, with the type that each one's gradient is summed in."""
        params = self.partition.merge(trainable, frozen)
        return with_gradient_type(params, self.bfloat16_gradients, "bfloat16")

    def _model(self) -> LanguageModel:
        model = language_model(self.config)
        if self.loop is None:
            return model
        return dataclasses.replace(model, loop=self.loop)

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """Returns the weights of all tokens together."""
        return jnp.sum(batch["weights"])

    def sums(
        self, trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[Float[Array, ""], Report]:
        """Returns the loss summed over tokens, and the report."""
        model = self._model()
        params = self._params(trainable, frozen)
        output = model.hidden(params, batch, key=key)
        logits = model.projection(params, output.hidden)
        total, sums = self._cross_entropy(logits, batch["targets"], batch["weights"])

        # Multi-token prediction: the states of depth d predict the target d tokens further on.
        if output.mtp_hidden:
            mtp_total = 0.0
            mtp_nll = 0.0
            for depth, hidden in enumerate(output.mtp_hidden, start=1):
                targets, weights = _targets_at(batch, depth)
                logits = model.projection(params, hidden)
                depth_total, depth_sums = self._cross_entropy(logits, targets, weights)
                mtp_total += depth_total
                mtp_nll += depth_sums["loss"]
            depths = len(output.mtp_hidden)
            total = total + output.mtp_weight * mtp_total / depths
            sums = {**sums, "mtp_loss": mtp_nll / depths}

        means = {}
        if output.reports.experts:
            means = {"router_loss": output.reports.router_loss}
        return total, Report(sums, means, output.reports.experts)

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
    """Returns the targets `depth` tokens further on, and their weights: 0 past a sequence's end."""
    # segments [1 1 1 2 2 0], depth 1 -> same [1 1 0 1 0 1]; the last is padding, of weight 0
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
    """Returns the programs that train a language model; nothing is compiled yet.

    Args:
      model, optim, train, mesh: what is trained, how, and on which mesh.
      devices: of the mesh; None is all.
      objective: which arrays a batch has.

    Raises:
      UserError: sizes that do not fit the devices, an axis that the model cannot use, a schedule
          longer than the run, or nothing to train.
    """
    devices_mesh = make_mesh(mesh, devices)
    check_axes(model, devices_mesh.shape, train.pipeline.chunks, train.sequence_length)
    check_schedule(model, train, devices_mesh.shape)
    model = stacked_for_stages(model, devices_mesh.shape[PIPELINE_AXIS])
    init_for_platform = language_model(model, mesh_platform(devices_mesh)).init

    def init(key: jax.Array) -> Any:
        with compiling_for_mesh(devices_mesh):
            return init_for_platform(key)

    boxed = jax.eval_shape(init, jax.random.key(0))
    partition = build_partition(train.trainable, boxed)
    bfloat16_gradients = _bfloat16_gradients(train, model, logical_axes(boxed))
    expert_bias_speed = 0.0
    if model.experts is not None:
        expert_bias_speed = model.experts.bias_speed
    return build_program(
        init,
        LanguageModelLoss(
            model, train.z_loss, train.label_smoothing, partition, bfloat16_gradients
        ),
        batch_shapes(objective, train.batch_size, train.sequence_length),
        optim,
        train,
        mesh,
        devices,
        eval_loss=LanguageModelLoss(model, partition=partition),
        partition=partition,
        expert_bias_speed=expert_bias_speed,
    )


def _bfloat16_gradients(train: TrainConfig, model: ModelConfig, axes: Any) -> frozenset[str]:
    """Returns the names of the parameters whose gradients are summed over devices in bfloat16:
    kernels and tables, where the config asks for it.

    Raises:
      UserError: activations are in another type, whose gradients bfloat16 would round.
    """
    if train.reduce_dtype == "float32":
        return frozenset()
    if model.dtype != train.reduce_dtype:
        raise UserError(
            "train.reduce_dtype",
            train.reduce_dtype,
            f"rounds gradients of model.dtype = {model.dtype!r}. Use 'float32'.",
        )
    return frozenset(name for name, axes in named_leaves(axes).items() if axes.is_matrix)
