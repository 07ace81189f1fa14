"""Which platform and chip the kernels are picked for."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

# The chips whose tensor cores take the instructions of Hopper kernels; those before and after have others.
HOPPER = ("H100", "H200", "H800", "H20", "GH200")

_TARGET: contextvars.ContextVar[tuple[str, str] | None] = contextvars.ContextVar("target", default=None)


def platform() -> str:
    """Returns `cpu`, `gpu` or `tpu`: the backend's, or the one that is compiled for on a machine without it."""
    target = _TARGET.get()
    return jax.default_backend() if target is None else target[0]


def chip() -> str:
    """Returns the kind of device, as JAX spells it: `TPU v5 lite`, `NVIDIA H200`, `cpu`."""
    target = _TARGET.get()
    return jax.local_devices()[0].device_kind if target is None else target[1]


def not_hopper() -> str | None:
    """Returns why kernels for Hopper GPUs do not run here, or None where they do."""
    if platform() != "gpu":
        return f"{platform()}: it needs a GPU"
    if not any(name in chip() for name in HOPPER):
        return f"{chip() or 'a GPU that is not named'}: it needs a Hopper GPU, such as an H200"
    return None


@contextlib.contextmanager
def compiling_for(name: str, kind: str = "") -> Iterator[None]:
    """Picks kernels for a platform in what is traced inside, as a plan for another machine needs.

    Args:
      name: `cpu`, `gpu` or `tpu`.
      kind: the device's kind, as JAX spells it; empty where no kernel asks.
    """
    token = _TARGET.set((name, kind))
    try:
        yield
    finally:
        _TARGET.reset(token)
