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
from research.scaling.cluster import Cluster

# The smallest topology of each TPU generation.
TPU_TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
# What JAX says of such a program in its cache; entries that are damaged are another matter.
_NOT_LOADED = "Error reading persistent compilation cache entry.*PjRtCompiler must be constructed"
# JAX runs both cores of these chips as one device; the compiler has to be told.
_MEGACORE = ("v4",)
# What the compiler needs to know of each kind of GPU, by its name in a cluster's.
GPU_TARGETS = {
    "h100": pathlib.Path(__file__).with_name("h100.txtpb"),
    "h200": pathlib.Path(__file__).with_name("h200.txtpb"),
}


def cluster_devices(cluster: Cluster) -> list[Any]:
    """Returns the devices of a cluster, to compile for.

    Raises:
      UserError: no compiler for them is installed, it does not know them, or they are more CPU
        devices than this process has.
    """
    kind, _, shape = cluster.name.partition("*")[0].partition(":")
    if cluster.platform == "tpu":
        return tpu_devices(f"{kind}:{shape}", cluster.slices)
    if cluster.platform == "gpu":
        return gpu_devices(kind, cluster.slices, cluster.devices_per_slice)
    here = jax.devices("cpu")
    if len(here) < cluster.num_devices:
        raise UserError("devices", cluster.name, f"are more than the {len(here)} of this process.")
    return here[: cluster.num_devices]


def check_tpu_compiler() -> None:
    """Raises UserError where the compiler for TPUs is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("no TPU compiler is installed: pip install -c constraints.txt -e '.[tpu]'.")


def tpu_devices(topology: str, slices: int = 1) -> list[Any]:
    """Returns the devices of a TPU topology, to compile for.

    Args:
      topology: a generation of `TPU_TOPOLOGIES`, or a generation with its shape as the compiler
          spells it, `v5e:4x4`.
      slices: how many of it.

    Raises:
      UserError: the compiler is not installed, or does not know the topology.
    """
    check_tpu_compiler()
    generation = topology.partition(":")[0]
    if generation not in TPU_TOPOLOGIES:
        raise UserError(
            "topology", topology, f"is no TPU generation. {nearest(generation, TPU_TOPOLOGIES)}"
        )
    options: dict[str, Any] = {}
    if generation in _MEGACORE:
        options["chip_config_name"] = "megacore"
    if slices > 1:
        options["num_slices"] = slices
    # JAX keeps what is compiled here and cannot load it again without a TPU: it is compiled anew.
    warnings.filterwarnings("ignore", _NOT_LOADED)
    return _devices("tpu", TPU_TOPOLOGIES.get(topology, topology), **options)


def gpu_devices(kind: str = "h200", nodes: int = 1, per_node: int = 8) -> list[Any]:
    """Returns GPUs to compile for.

    Args:
      kind: of `GPU_TARGETS`.
      nodes: how many.
      per_node: GPUs of each.

    Raises:
      UserError: the compiler is not installed, or its target of such GPUs is not known here.
    """
    if kind not in GPU_TARGETS:
        raise UserError("devices", kind, f"is compiled for by none. {nearest(kind, GPU_TARGETS)}")
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise UserError(
            "no GPU compiler is installed: pip install -c constraints.txt -e '.[cuda]'."
        )
    target = GPU_TARGETS[kind].read_text()
    return _devices("cuda", kind, target_config=target, topology=f"1x{nodes}x{per_node}")


@functools.cache
def _devices(platform: str, topology_name: str, **options: Any) -> list[Any]:
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
