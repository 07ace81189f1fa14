"""Topologies of TPUs and GPUs that this machine does not have, to compile for them on a CPU
machine.
"""

import functools
import importlib.util
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from research.core.errors import UserError, nearest
from research.parallel.target import compiling_for

# The smallest topology of each TPU generation.
TPU_TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
H200 = pathlib.Path(__file__).with_name("h200.txtpb")


def tpu_devices(topology: str) -> list[Any]:
    """Returns the devices of a TPU topology, to compile for.

    Args:
      topology: a generation of `TPU_TOPOLOGIES`, or a generation with its shape as the compiler
          spells it, `v5e:4x4`.

    Raises:
      UserError: the compiler is not installed, or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("no TPU compiler is installed: pip install -c constraints.txt -e '.[tpu]'.")
    generation = topology.partition(":")[0]
    if generation not in TPU_TOPOLOGIES:
        raise UserError(
            "topology", topology, f"is no TPU generation. {nearest(generation, TPU_TOPOLOGIES)}"
        )
    return _devices("tpu", TPU_TOPOLOGIES.get(topology, topology))


def gpu_devices() -> list[Any]:
    """Returns eight H200 GPUs to compile for.

    Raises:
      UserError: the compiler is not installed.
    """
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise UserError(
            "no GPU compiler is installed: pip install -c constraints.txt -e '.[cuda]'."
        )
    return _devices("cuda", "h200", target_config=H200.read_text(), topology="1x1x8")


@functools.cache
def _devices(platform: str, topology_name: str, **options: str) -> list[Any]:
    # Compiling needs no chip: any number of processes may load the compiler, and none asks the
    # cloud's metadata server about its host.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        found = topologies.get_topology_desc(
            platform=platform, topology_name=topology_name, **options
        )
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        raise UserError(
            "topology", topology_name, f"does not exist for {platform}: {first_line}"
        ) from error
    return list(found.devices)


def compile_on(device: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """Compiles `function` for one device, which this machine need not have, with the kernels for
    that device.

    Args:
      device: of `tpu_devices`, `gpu_devices` or this machine's CPU.
      function: to be jitted.
      arguments: pytrees of `jax.ShapeDtypeStruct`, or arrays in their place.

    Returns:
      What `jax.jit(function).lower(...).compile()` returns; it cannot be called here.
    """
    platform = device.platform if device.platform in ("cpu", "tpu") else "gpu"
    lowering_platform = "cuda" if platform == "gpu" else platform
    sharding = SingleDeviceSharding(device)

    def on_device(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    # A new function for each device: JAX would return the trace of an earlier one, with another
    # chip's kernels.
    traced_function = functools.partial(function)
    with compiling_for(platform, device.device_kind):
        traced = jax.jit(traced_function).trace(*jax.tree.map(on_device, arguments))
        lowered = traced.lower(lowering_platforms=(lowering_platform,))
    with warnings.catch_warnings():
        # These programs are cached like all others, but JAX cannot load them without the chip.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
        return lowered.compile()
