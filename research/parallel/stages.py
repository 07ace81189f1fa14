"""How layers are cut into the stages of a pipeline, and where their parameters lie for it.

The unit is a round of the pattern of layers, so that all stages run the same program. Where the
rounds are no multiple of the stages, the first stages have one more than the last ones, which wait
for it; where the layers are no multiple of a round, the last stage ends within one.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

from research.core.errors import UserError
from research.parallel.mesh_axes import PIPELINE_AXIS


class LayerRange(NamedTuple):
    """Which layers a stage runs.

    Attributes:
      first: the index of the first of them.
      count: how many of its places have a layer; None is all.
    """

    first: Int[Array, ""]
    count: Int[Array, ""] | None


@dataclasses.dataclass(frozen=True)
class StageSplit:
    """A split of layers into virtual stages; stage q is chunk q // P of device q % P.

    Attributes:
      num_layers: L.
      period: layers of a round.
      devices: P.
      chunks: stages of a device, V.
      stack: whose layers they are, for messages.

    Raises:
      UserError: there are more stages than rounds.
    """

    num_layers: int
    period: int
    devices: int
    chunks: int = 1
    stack: str = "the model"

    def __post_init__(self) -> None:
        stages = self.devices * self.chunks
        if stages > self._rounds:
            unit = "layers" if self.period == 1 else f"rounds of {self.period} layers"
            raise UserError(
                "mesh.pipeline × train.pipeline.chunks",
                stages,
                f"is more than the {self._rounds} {unit} of {self.stack}: a stage has at least "
                "one.",
            )

    @property
    def _rounds(self) -> int:
        # 7 layers in rounds of 3: 3 rounds, the last of one layer
        return -(-self.num_layers // self.period)

    @property
    def firsts(self) -> Int[np.ndarray, "VP"]:
        """The first layer of each stage, in the order of the layers."""
        stages = self.devices * self.chunks
        least, rest = divmod(self._rounds, stages)
        # 7 rounds over 3 stages: 3, 2 and 2
        rounds = np.full(stages, least)
        rounds[:rest] += 1
        ends = np.cumsum(rounds)
        return (ends - rounds) * self.period

    @property
    def counts(self) -> Int[np.ndarray, "VP"]:
        """The layers of each stage."""
        return np.diff(self.firsts, append=self.num_layers)

    @property
    def places(self) -> int:
        """Layers for which each stage has a place: whole rounds, S."""
        # 7 layers in rounds of 3: places for 9
        most = int(self.counts.max())
        rounds = -(-most // self.period)
        return rounds * self.period

    @property
    def is_even(self) -> bool:
        """Whether every place has a layer."""
        is_full = self.counts == self.places
        return bool(is_full.all())

    def layers_of(self, stage: Int[Array, ""]) -> LayerRange:
        """Returns the layers of a stage."""
        first = jnp.asarray(self.firsts)[stage]
        if self.is_even:
            return LayerRange(first, None)
        return LayerRange(first, jnp.asarray(self.counts)[stage])

    def by_stage(self, layers: Any, free: Any = None) -> Any:
        """Returns the arrays of all layers by their stages, `[L, …] -> [V, P, S, …]`.

        A place without a layer has the arrays of the first one.

        Args:
          layers: a tree of arrays.
          free: for each array the sharding that leaves its layers together, in which they are moved
            to other places; None is what the partitioner chooses.
        """
        shape = (self.chunks, self.devices, self.places)

        def cut(x: Shaped[Array, "L ..."]) -> Shaped[Array, "V P S ..."]:
            rest = x.shape[1:]
            return x.reshape(*shape, *rest)

        if self._in_order:
            return jax.tree.map(cut, layers)

        # [V P, S]: the layer of each place, or 0
        place = np.arange(self.places)
        index = self.firsts[:, None] + place
        is_layer = place < self.counts[:, None]
        index = np.where(is_layer, index, 0)
        index = index.reshape(shape)

        layers = _moved(layers, free, leading=0)
        staged = jax.tree.map(lambda x: x[index], layers)
        return _moved(staged, free, leading=2)

    def by_layer(self, staged: Any, free: Any = None) -> Any:
        """Returns the arrays of all layers in their order, `[V, P, S, …] -> [L, …]`."""

        def join(x: Shaped[Array, "V P S ..."]) -> Shaped[Array, "VPS ..."]:
            rest = x.shape[3:]
            return x.reshape(-1, *rest)

        if self._in_order:
            return jax.tree.map(join, staged)

        # Layer 5 of stages of 4 and 3 is the second of stage 1, in place 4 + 1.
        stages = np.arange(self.counts.size)
        stage = np.repeat(stages, self.counts)
        layer = np.arange(self.num_layers)
        within = layer - self.firsts[stage]
        index = stage * self.places + within

        staged = _moved(staged, free, leading=2)
        flat = jax.tree.map(join, staged)
        return jax.tree.map(lambda x: x[index], flat)

    @property
    def _in_order(self) -> bool:
        """Whether places and devices have the layers in their order: nothing has to be moved."""
        return self.is_even and self.chunks == 1


def _moved(tree: Any, free: Any, leading: int) -> Any:
    """Lays out arrays as `free` says, behind `leading` axes that are not sharded."""
    if free is None:
        return tree

    def move(x: Shaped[Array, "..."], sharding: NamedSharding) -> Shaped[Array, "..."]:
        free_axes = [None] * leading
        spec = PartitionSpec(*free_axes, *sharding.spec)
        return jax.lax.with_sharding_constraint(x, spec)

    return jax.tree.map(move, tree, free)


def without_stages(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Returns the sharding of stacked layers that leaves them together on each device: `pipeline`
    shards another axis, the one with the largest shards that it divides, or none.

    Args:
      sharding: of the array.
      shape: of the array, `[L, …]`.
    """
    mesh = sharding.mesh
    stages = mesh.shape[PIPELINE_AXIS]
    spec = [None, *sharding.spec[1:]]
    unstaged = NamedSharding(mesh, PartitionSpec(*spec))
    shards = unstaged.shard_shape(shape)

    # [7, 64, 512 / tensor 4] on 2 stages: [7, 64, 512 / tensor 4 and pipeline 2]
    candidates = []
    for axis, size in enumerate(shards):
        if PIPELINE_AXIS in _axes_of(spec[axis]):
            return sharding
        if axis > 0 and size % stages == 0:
            candidates.append(axis)
    if stages > 1 and candidates:
        axis = max(candidates, key=lambda axis: shards[axis])
        others = _axes_of(spec[axis])
        spec[axis] = (*others, PIPELINE_AXIS)
    return NamedSharding(mesh, PartitionSpec(*spec))


def _axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes of an entry of a `PartitionSpec`."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else entry
