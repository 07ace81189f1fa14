"""The activations of each kind of layer, as a traced layer has them; no array is ever made."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh

from research.data.objectives import ObjectiveConfig, batch_shapes
from research.inspection.sharded_arrays import (
    ArrayGroup,
    ShardedArray,
    group_layers,
    sharded_array,
)
from research.models.block import Block
from research.models.config import ExpertsConfig, ModelConfig
from research.models.experts import Experts
from research.models.language_model import language_model
from research.models.layers import Norm, Projection
from research.parallel.expert_dispatch import Dispatch
from research.parallel.mesh_axes import EXPERT_AXIS

Names = tuple[str | None, ...]
_TOKENS = ("batch", "length")
# encoder/layers_0/mlp/up -> encoder/, layers, mlp/up
_LAYER = re.compile(r"(?P<stack>(?:.*?/)?)layers_0/(?P<leaf>.*)")


@dataclasses.dataclass
class _Recorder:
    """What the modules of a layer take and give, in the order in which they run.

    Attributes:
      mesh: sizes of the mesh axes.
      hidden_axes: logical axes of the hidden states between sublayers.
      found: the arrays.
      seen: arrays by identity, which are kept so that no other gets the same one -> their axes.
    """

    mesh: AbstractMesh
    hidden_axes: Names
    found: list[ShardedArray] = dataclasses.field(default_factory=list)
    seen: dict[int, tuple[Any, Names]] = dataclasses.field(default_factory=dict)

    def intercept(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Runs a method of a module, as `nn.intercept_methods` asks, and records what it takes and
        gives.
        """
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        path = "/".join(module.path)
        if isinstance(module, Projection):
            # Its input is a step of its own: the heads' outputs, or the MLP after its activation.
            self._record(f"{path}, its input", args[0], _projected(module, args[0], inputs=True))
        result = call(*args, **kwargs)

        if isinstance(module, Projection):
            names = _projected(module, result, inputs=False)
            if names == (*_TOKENS, "embed"):
                names = self.hidden_axes
            self._record(path, result, names)
        elif isinstance(module, Norm):
            _, names = self.seen.get(id(args[0]), (None, self.hidden_axes))
            self._record(path, result, names)
        elif isinstance(module, Experts):
            self._record_experts(module, path, args[0])
        elif isinstance(module, Block):
            self._record(f"{path}/output", result[0], self.hidden_axes)
        return result

    def _record(self, name: str, array: Any, names: Names) -> None:
        """Keeps an array that is not kept yet."""
        if id(array) not in self.seen:
            self.seen[id(array)] = (array, names)
            self.found.append(sharded_array(name, names, array.shape, array.dtype, self.mesh))

    def _record_experts(self, module: Experts, path: str, x: Any) -> None:
        """Keeps what the experts take and give: a row for each choice of a token that a device has
        room for.
        """
        model = module.config
        hidden = ("mlp", model.experts.hidden_dim)
        widths = {"rows": ("embed", model.embed_dim), "up": hidden}
        if model.mlp.gated:
            widths["gate"] = hidden
        widths["down"] = ("embed", model.embed_dim)
        for name, (axis, width) in widths.items():
            shape = (*x.shape[:2], width)
            # Sharded as these arrays of one row for each token are.
            like = sharded_array(
                f"{path}/experts/{name}", (*_TOKENS, axis), shape, x.dtype, self.mesh
            )
            self.found.append(_expert_rows(model.experts, like, self.mesh.shape[EXPERT_AXIS]))


def _expert_rows(config: ExpertsConfig, like: ShardedArray, devices: int) -> ShardedArray:
    """Returns the rows of experts, whose first axis is that of tokens and of their choices.

    Args:
      config: of the experts.
      like: an array of tokens with the width of the rows.
      devices: along the mesh axis of the experts.
    """
    # [B, T, F] of which a device has [1, T, F / 2]: T tokens, so that T · choices rows are its own.
    tokens = math.prod(like.device_shape[:2])
    rows = tokens * config.experts_per_token
    if devices > 1:
        dispatch = Dispatch(
            config.num_experts, EXPERT_AXIS, devices, True, buffer_factor=config.buffer_factor
        )
        rows = dispatch.buffer_rows(tokens, config.experts_per_token)
    shards = math.prod(like.shape[:2]) // tokens
    width = like.shape[2]
    device_width = like.device_shape[2]
    rows_axes = like.mesh_axes[0] + like.mesh_axes[1]
    return dataclasses.replace(
        like,
        axes=("choices", like.axes[2]),
        shape=(rows * shards, width),
        mesh_axes=(rows_axes, like.mesh_axes[2]),
        device_shape=(rows, device_width),
    )


def _projected(module: Projection, array: Any, inputs: bool) -> Names:
    """Returns the logical axes of what a projection takes or gives: tokens, then its own axes."""
    own = module.names[: module.num_inputs] if inputs else module.names[module.num_inputs :]
    # [B, T, N, H] of ("heads", "head"): two axes before them
    leading = array.ndim - len(own)
    tokens = _TOKENS if leading == len(_TOKENS) else (None,) * leading
    return (*tokens, *own)


def activation_groups(
    config: ModelConfig, objective: ObjectiveConfig, rows: int, length: int, mesh: AbstractMesh
) -> list[ArrayGroup]:
    """Returns what the modules of each kind of layer take and give, in a forward pass.

    Experts have a row for each choice of a token. Along the mesh axis `expert` a device has room
    for those of all devices, unless `ExpertsConfig.buffer_factor` bounds them.

    Args:
      config: the model.
      objective: which arrays a batch has.
      rows: of a microbatch, over all devices.
      length: tokens of a row.
      mesh: sizes of the mesh axes, which divide both.
    """
    model = language_model(_shortened(config))
    batch = {
        name: jax.ShapeDtypeStruct(*shape)
        for name, shape in batch_shapes(objective, rows, length).items()
    }
    recorder = _Recorder(mesh, config.hidden_axes)

    def trace(batch: Any) -> Any:
        params = nn.unbox(model.init(jax.random.key(0)))
        with nn.intercept_methods(recorder.intercept):
            return model.hidden(params, batch).hidden

    jax.eval_shape(trace, batch)
    arrays = []
    for array in recorder.found:
        arrays += _of_all_layers(config, array)
    groups = group_layers(config, arrays)
    return [group for group in groups if group.name]


def _shortened(config: ModelConfig) -> ModelConfig:
    """Returns the model with its first layers and one layer after them in each stack, and plain
    attention, which is traced in no time.
    """
    num_layers = len(config.first_layers) + 1
    return dataclasses.replace(
        config,
        num_layers=min(config.num_layers, num_layers),
        encoder_layers=min(config.encoder_layers, num_layers),
        attention=dataclasses.replace(config.attention, implementation="reference"),
        dropout=0.0,
        layer_loop="unroll",
        remat="none",
    )


def _of_all_layers(config: ModelConfig, array: ShardedArray) -> list[ShardedArray]:
    """Returns an array of the traced layer of a pattern as those of all layers of its stack; others
    alone.
    """
    found = _LAYER.fullmatch(array.name)
    if found is None or found["stack"].endswith("first_"):
        return [array]
    in_encoder = found["stack"].startswith("encoder")
    depth = config.encoder_layers if in_encoder else config.num_layers
    return [
        dataclasses.replace(array, name=f"{found['stack']}layers_{index}/{found['leaf']}")
        for index in range(depth - len(config.first_layers))
    ]
