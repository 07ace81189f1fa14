"""Router loss and counts of experts, which layers with experts return."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from research.core.trees import node


@node(static=())
@dataclasses.dataclass(frozen=True)
class ExpertCounts:
    """Sums over the real tokens of a batch, of one layer with experts or of several, stacked.

    Attributes:
      load: how many tokens chose each expert.
      dropped: choices that no expert computed.
      entropy: of the router's probabilities, in nats.
      tokens: how many there are.
    """

    load: Float[Array, "*L E"]
    dropped: Float[Array, "*L"]
    entropy: Float[Array, "*L"]
    tokens: Float[Array, "*L"]

    def metrics(self, path: str) -> dict[str, Float[Array, ""]]:
        """Returns numbers for the log, of each layer.

        They are the load of the busiest expert as a multiple of the mean (`max_load`), the share of
        choices that were dropped (`dropped`), and the mean entropy (`entropy`).

        Args:
          path: of the experts' parameters, `layers_3/mlp`, or `layers/mlp` of stacked layers.
        """
        choices = jnp.maximum(self.load.sum(axis=-1), 1.0)
        tokens = jnp.maximum(self.tokens, 1.0)
        # [*L]: of choices in number of a mean load
        max_load = self.load.max(axis=-1) * self.load.shape[-1] / choices
        values = {
            "max_load": max_load,
            "dropped": self.dropped / choices,
            "entropy": self.entropy / tokens,
        }

        layer = path.removesuffix("/mlp")
        named = {}
        for name, value in values.items():
            if value.ndim == 0:
                named[f"experts/{layer}/{name}"] = value
                continue
            for index in range(value.shape[0]):
                named[f"experts/{layer}_{index}/{name}"] = value[index]
        return named


@node(static=())
@dataclasses.dataclass(frozen=True)
class LayerReport:
    """Router loss and counts of one layer, or of several layers, stacked.

    Attributes:
      router_loss: times the config's weights; 0 without experts.
      experts: None without experts.
    """

    router_loss: Float[Array, "*L"]
    experts: ExpertCounts | None


def empty_report() -> LayerReport:
    """Returns the report of a layer without experts."""
    return LayerReport(jnp.zeros(()), None)


@node(static=())
@dataclasses.dataclass(frozen=True)
class LayerReports:
    """Router loss and counts of experts of all layers.

    Attributes:
      router_loss: the mean over a stack's layers that have experts, added over stacks; 0 without
          experts.
      experts: the counts of each layer, by the path of the experts' parameters: `layers_0/mlp`,
        `encoder/layers_0/mlp`, or `layers/mlp` with a leading layer axis where layers are scanned.
        The selection bias that the load moves is the parameter `selection_bias` under that path.
    """

    router_loss: Float[Array, ""]
    experts: dict[str, ExpertCounts]

    def under(self, path: str) -> "LayerReports":
        """Returns the reports of a stack whose parameters lie under `path`."""
        experts = {f"{path}/{name}": counts for name, counts in self.experts.items()}
        return LayerReports(self.router_loss, experts)

    def __add__(self, other: "LayerReports") -> "LayerReports":
        """Returns the reports of two stacks."""
        return LayerReports(self.router_loss + other.router_loss, self.experts | other.experts)


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
    experts = {}
    for name, report in by_layer.items():
        total_loss = total_loss + report.router_loss.sum()
        if report.experts is not None:
            experts[f"{name}/mlp"] = report.experts
            # A stacked report is one of several layers.
            num_with_experts += report.router_loss.size
    return LayerReports(total_loss / max(num_with_experts, 1), experts)
