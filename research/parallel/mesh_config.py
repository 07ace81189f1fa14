"""The sizes of the mesh axes, as a config has them."""

import dataclasses
import math

from research.core.errors import UserError
from research.parallel.divisibility import nearest_divisors


@dataclasses.dataclass(frozen=True)
class SlicesConfig:
    """How many slices lie along each mesh axis; their product is the number of slices.

    A slice is a set of devices with a fast network among them: a TPU slice, or a node of GPUs. A
    slower network joins the slices. Each size divides that of the same axis of the mesh: `data` 8
    over 2 slices has 4 replicas in each.

    Attributes:
      data, fsdp, pipeline, context, expert, tensor: slices along that axis.
    """

    data: int = 1
    fsdp: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name, size in self.sizes().items():
            if size < 1:
                raise UserError(name, size, "must be at least 1.")

    def sizes(self) -> dict[str, int]:
        """Returns the sizes by name, outermost axis first."""
        return {
            "data": self.data,
            "fsdp": self.fsdp,
            "pipeline": self.pipeline,
            "context": self.context,
            "expert": self.expert,
            "tensor": self.tensor,
        }


@dataclasses.dataclass(frozen=True)
class MeshConfig(SlicesConfig):
    """Sizes of the mesh axes; their product is the number of devices, and one of them may be -1 for
    what is left.

    Source of `zero`: Rajbhandari et al. 2019 (ZeRO), arXiv:1910.02054, section 5.

    Attributes:
      data: replicas, which shard the batch.
      fsdp: shards of the parameters, which shard the batch too.
      pipeline: stages of layers.
      context: shards of the sequence.
      expert: shards of the experts, which shard the batch too.
      tensor: shards of heads, MLP width and vocabulary.
      zero: what the axes that see other tokens (`mesh_axes.WIDTH_AXES`) shard beside the batch. 1:
        the optimizer's state and the averaged parameters; 2: gradients too; 3: parameters too.
      slices: how many slices, which a slower network joins, lie along each axis.
      devices: that the sizes are for, by a name such as `v5p:4x8x8`; `compile` takes them, while a
        run takes those that are there. Empty where the config is for any.
      compiler_options: of XLA for the training step on TPUs and GPUs, each as `name=value`.
    """

    data: int = -1
    zero: int = 3
    slices: SlicesConfig = SlicesConfig()
    devices: str = ""
    compiler_options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option in self.compiler_options:
            if "=" not in option:
                raise UserError("compiler_options", option, "must be name=value.")
        if self.zero not in (1, 2, 3):
            raise UserError("zero", self.zero, "must be 1, 2 or 3.")
        sizes = self.sizes()
        for name, size in sizes.items():
            is_free = size == -1
            if size < 1 and not is_free:
                raise UserError(name, size, "must be at least 1, or -1 for what is left.")

        # data = -1 and fsdp = -1: the error names the second one.
        free = [name for name, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise UserError(free[1], -1, f": only one size may be -1, and {free[0]} is.")

    def xla_options(self, platform: str) -> dict[str, str | bool]:
        """Returns the options of the compiler of a platform by name; those of TPUs and GPUs mean
        nothing to XLA for CPU.
        """
        if platform == "cpu":
            return {}
        options = {}
        for option in self.compiler_options:
            name, _, value = option.partition("=")
            # XLA for GPU takes no other form of a bool.
            options[name] = {"true": True, "false": False}.get(value, value)
        return options


def resolve_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Returns the axis sizes with -1 filled in.

    Raises:
      UserError: the sizes do not multiply to `num_devices`; the message says which size to change.
    """
    sizes = config.sizes()
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    if num_devices % fixed == 0 and free:
        # data -1, tensor 2 on 8 devices: data 4
        rest = num_devices // fixed
        return {**sizes, free[0]: rest}
    if fixed == num_devices:
        return sizes
    raise UserError(_misfit(sizes, num_devices))


def _misfit(sizes: dict[str, int], num_devices: int) -> str:
    """Names the largest axis (or `data`) that alone can make the product fit, else says to lower
    one.
    """
    used = {name: size for name, size in sizes.items() if size != 1}
    is_open = -1 in used.values()
    shape = " × ".join(f"{name} {size}" for name, size in used.items())
    shape = shape or "all sizes 1"

    # data 4, tensor 3 on 8 devices: tensor does not divide 8, so tensor = 2 is the advice. With
    # data -1, tensor may be any divisor: 2 or 4.
    candidates = used | {"data": sizes["data"]}
    by_size = sorted(candidates.items(), key=lambda item: -item[1])
    for name, size in by_size:
        others = math.prod(abs(other) for key, other in used.items() if key != name)
        if size != -1 and num_devices % others == 0:
            right = str(num_devices // others)
            if is_open:
                right = nearest_divisors(size, num_devices // others)
            return (
                f"mesh.{name} = {size} does not fit {num_devices} devices ({shape}). Set "
                f"mesh.{name} = {right}."
            )
    return (
        f"mesh does not fit {num_devices} devices ({shape}). Set mesh.data = -1 and let the "
        "others divide them."
    )
