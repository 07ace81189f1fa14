"""What a parameter is: the box that names its axes says what the array does, too."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
from jaxtyping import Array

# kernel: multiplied with its inputs. table: one row or column for each id. bias: added. scale:
# multiplied, one by one.
# selection: added to the scores that experts are chosen by, and moved by their load.
Kind = Literal["kernel", "table", "bias", "scale", "selection"]

# Axes along which an array is many arrays of its kind.
STACKED = ("layers", "expert")


class Parameter(nn.LogicallyPartitioned, kw_only=True):
    """The box of a parameter, as a model's `init` gives it.

    Attributes:
      kind: what the array does.
      num_inputs: of a kernel: how many axes are its inputs, after those along which it is stacked.
    """

    kind: Kind = flax.struct.field(pytree_node=False)
    num_inputs: int = flax.struct.field(pytree_node=False, default=0)


@dataclasses.dataclass(frozen=True)
class Axes:
    """The logical axes of a parameter, and what it does with them.

    Attributes:
      names: of all axes, in order.
      kind: what the array does.
      num_inputs: as of `Parameter`.
    """

    names: tuple[str | None, ...]
    kind: Kind
    num_inputs: int = 0

    @property
    def is_matrix(self) -> bool:
        """Whether it maps vectors to vectors, one-hot ids included."""
        return self.kind in ("kernel", "table")

    def inputs_and_outputs(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns which axes of a kernel are its inputs, and which its outputs."""
        # ("layers", "expert", "embed", "mlp") with one input: (2,), (3,)
        own = tuple(i for i, name in enumerate(self.names) if name not in STACKED)
        inputs = own[: self.num_inputs]
        outputs = own[self.num_inputs :]
        return inputs, outputs


def boxed(init: Callable[..., Array], axes: Axes) -> Callable[..., Parameter]:
    """Returns an initializer whose array comes in its box."""

    def make(*args: Any) -> Parameter:
        array = init(*args)
        return Parameter(array, names=axes.names, kind=axes.kind, num_inputs=axes.num_inputs)

    return make


def is_box(leaf: Any) -> bool:
    """Whether a leaf is a parameter in a box that names its axes."""
    return isinstance(leaf, nn.LogicallyPartitioned)


def logical_axes(params: Any) -> Any:
    """Returns the axes of boxed parameters, in their tree."""

    # {"kernel": a box of [D, F]} -> {"kernel": Axes(("embed", "mlp"), "kernel", 1)}
    def axes(box: Parameter) -> Axes:
        return Axes(box.names, box.kind, box.num_inputs)

    return jax.tree.map(axes, params, is_leaf=is_box)
