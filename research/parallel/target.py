"""Which platform and chip the kernels are picked for: those of the mesh in context, which a program
is built for.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

# The chips whose tensor cores take the instructions of Hopper kernels; those before and after have
# others.
HOPPER = ("H100", "H200", "H800", "H20", "GH200")

_TARGET: contextvars.ContextVar[tuple[str, str] | None] = contextvars.ContextVar(
    "target", default=None
)


def platform() -> str:
    """Returns `cpu`, `gpu` or `tpu`: that of the mesh in context; without a mesh that of this
    machine.
    """
    return _target()[0]


def chip() -> str:
    """Returns the kind of device, as JAX spells it: `TPU v5 lite`, `NVIDIA H200`, `cpu`."""
    return _target()[1]


def mesh_platform(mesh: Mesh) -> str:
    """Returns `cpu`, `gpu` or `tpu`, whose devices a mesh has."""
    return _spelled(mesh.devices.flat[0].platform)


def _target() -> tuple[str, str]:
    """Returns platform and chip: those of `compiling_for`, else of the mesh in context, else of
    this machine.
    """
    target = _TARGET.get()
    if target is not None:
        return target

    # The abstract mesh names its devices' platform and kind, where it was made of real devices.
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    if device is not None:
        return _spelled(device.platform), device.device_kind
    device = jax.local_devices()[0]
    return jax.default_backend(), device.device_kind


def _spelled(name: str) -> str:
    """Returns how this project spells a platform: JAX calls a GPU's `gpu`, `cuda` or `rocm`."""
    return name if name in ("cpu", "tpu") else "gpu"


def not_hopper() -> str | None:
    """Returns why kernels for Hopper GPUs do not run here, or None where they do."""
    if platform() != "gpu":
        return f"{platform()}: it needs a GPU"
    # JAX's `NVIDIA H200` has the name H200; a plan for another machine may name no chip.
    if not any(name in chip() for name in HOPPER):
        return f"{chip() or 'a GPU that is not named'}: it needs a Hopper GPU, such as an H200"
    return None


def compiling_for_mesh(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """Picks kernels for the devices of a mesh in what is traced inside, where the mesh itself is
    not in context.
    """
    return compiling_for(mesh_platform(mesh), mesh.devices.flat[0].device_kind)


@contextlib.contextmanager
def compiling_for(name: str, kind: str = "") -> Iterator[None]:
    """Picks kernels for a platform in what is traced inside without a mesh, as counts for another
    machine need.

    Args:
      name: `cpu`, `gpu` or `tpu`.
      kind: the device's kind, as JAX spells it; empty where no kernel asks.
    """
    token = _TARGET.set((name, kind))
    try:
        yield
    finally:
        _TARGET.reset(token)
