"""Router loss and expert load, which layers with experts return beside their hidden states."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from research.core.trees import node


@node(static=())
@dataclasses.dataclass(frozen=True)
class LayerReport:
    """Router loss and expert load of one layer, or of several layers, stacked.

    Attributes:
      router_loss: times the config's weights; 0 without experts.
      expert_load: how many real tokens chose each expert; None without experts.
    """

    router_loss: Float[Array, "*L"]
    expert_load: Float[Array, "*L E"] | None


def empty_report() -> LayerReport:
    """Returns the report of a layer without experts."""
    return LayerReport(jnp.zeros(()), None)


@node(static=())
@dataclasses.dataclass(frozen=True)
class LayerReports:
    """Router loss and expert loads of all layers.

    Attributes:
      router_loss: the mean over a stack's layers that have experts, added over stacks; 0 without
          experts.
      expert_load: how many real tokens chose each expert, by the path of the experts' parameters:
        `layers_0/mlp`, `encoder/layers_0/mlp`, or `layers/mlp` with a leading layer axis where
        layers are scanned. The selection bias that the load moves is the parameter `selection_bias`
        under that path.
    """

    router_loss: Float[Array, ""]
    expert_load: dict[str, Float[Array, "*L E"]]

    def under(self, path: str) -> "LayerReports":
        """Returns the reports of a stack whose parameters lie under `path`."""
        expert_load = {f"{path}/{name}": load for name, load in self.expert_load.items()}
        return LayerReports(self.router_loss, expert_load)

    def __add__(self, other: "LayerReports") -> "LayerReports":
        """Returns the reports of two stacks."""
        return LayerReports(
            self.router_loss + other.router_loss, self.expert_load | other.expert_load
        )


def no_reports() -> LayerReports:
    """Returns the reports of no layers."""
    return LayerReports(jnp.zeros(()), {})


def collect_reports(by_layer: Mapping[str, LayerReport]) -> LayerReports:
    """Returns the reports of a stack.

    Args:
      by_layer: the report of each layer, or of a stack of layers, by the name of its parameters.
    """
    total_loss = jnp.zeros(())
    num_with_experts = 0
    expert_load = {}
    for name, report in by_layer.items():
        total_loss = total_loss + report.router_loss.sum()
        if report.expert_load is not None:
            expert_load[f"{name}/mlp"] = report.expert_load
            # A stacked report is one of several layers.
            num_with_experts += report.router_loss.size
    return LayerReports(total_loss / max(num_with_experts, 1), expert_load)
