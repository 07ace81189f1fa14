"""What layers tell beside their output: the loss of routers and the load of experts."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from research.core.trees import node


@node(static=())
@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What one layer tells beside its output, or several layers, stacked.

    Attributes:
      router_loss: weighed as the config says; 0 without experts.
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
    """What all layers tell together.

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
        return LayerReports(
            self.router_loss, {f"{path}/{name}": load for name, load in self.expert_load.items()}
        )

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
    total, routed = jnp.zeros(()), 0
    loads = {}
    for name, report in by_layer.items():
        total = total + report.router_loss.sum()
        if report.expert_load is not None:
            loads[f"{name}/mlp"] = report.expert_load
            routed += report.router_loss.size
    return LayerReports(total / max(routed, 1), loads)
