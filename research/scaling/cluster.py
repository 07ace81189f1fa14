"""Clusters by name: slices of TPUs, nodes of GPUs, or CPU devices, none of which need be here."""

import dataclasses
import math
import re

from research.core.errors import UserError, nearest
from research.scaling.devices import DEVICES


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Devices of a name.

    Attributes:
      platform: `cpu`, `gpu` or `tpu`.
      device_kind: as JAX reports it.
      dimensions: of the torus of TPU chips.
      cores: devices of a TPU chip, as JAX counts them.
    """

    platform: str
    device_kind: str
    dimensions: int = 0
    cores: int = 1


# Google Cloud documentation, the page of each version: v4, v5p and 7x chips form a torus of three
# dimensions, v5e and v6e chips one of two. The compiler's topologies have these numbers of devices
# (v4 with both cores of a chip as one device, which is how JAX runs them).
_KINDS = {
    "v4": _Kind("tpu", "TPU v4", dimensions=3),
    "v5p": _Kind("tpu", "TPU v5", dimensions=3),
    "v5e": _Kind("tpu", "TPU v5 lite", dimensions=2),
    "v6e": _Kind("tpu", "TPU v6 lite", dimensions=2),
    "tpu7x": _Kind("tpu", "TPU7x", dimensions=3, cores=2),
    "a100": _Kind("gpu", "NVIDIA A100-SXM4-80GB"),
    "h100": _Kind("gpu", "NVIDIA H100 80GB HBM3"),
    "h200": _Kind("gpu", "NVIDIA H200"),
    "b200": _Kind("gpu", "NVIDIA B200"),
    "cpu": _Kind("cpu", "cpu"),
}
# GPUs that NVLink joins: those of an HGX board.
GPUS_PER_NODE = 8

# platform -> the network inside a slice, and the slower one between slices
_NETWORKS = {
    "tpu": ("ICI", "the data-center network"),
    "gpu": ("NVLink", "the network between nodes"),
    "cpu": ("memory", "the network between slices"),
}
# v5p:4x4x4 and v5p:4x4x4*2, cpu:8
_NAME = re.compile(r"(?P<kind>\w+):(?P<shape>\d+(?:x\d+)*)(?:\*(?P<slices>\d+))?")
_FORMS = "Use a form such as v5p:4x4x4, v5p:4x4x4*2 (two slices), h200:16 or cpu:8."


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Devices of one kind, in slices that a slower network joins.

    Attributes:
      name: `v5p:4x4x4*2`, `h200:16`, `cpu:8`.
      platform: `cpu`, `gpu` or `tpu`.
      device_kind: as JAX reports it.
      devices_per_slice: of a TPU slice, or of a node of GPUs.
      slices: how many.
    """

    name: str
    platform: str
    device_kind: str
    devices_per_slice: int
    slices: int

    @property
    def num_devices(self) -> int:
        """All devices."""
        return self.devices_per_slice * self.slices

    @property
    def memory_bytes(self) -> int | None:
        """Bytes of a device's own memory, as `scaling.devices` has them; None for a CPU."""
        if self.device_kind not in DEVICES:
            return None
        return DEVICES[self.device_kind].memory_bytes

    @property
    def fast_network(self) -> str:
        """The network inside a slice."""
        return _NETWORKS[self.platform][0]

    @property
    def slow_network(self) -> str:
        """The network between slices."""
        return _NETWORKS[self.platform][1]


def parse_cluster(name: str) -> Cluster:
    """Returns the cluster of a name.

    `v5p:4x4x4` is a slice with a torus of 4 · 4 · 4 chips, `v5p:4x4x4*2` two of them. `h200:16` has
    two nodes of eight GPUs. `cpu:8` has eight CPU devices.

    Raises:
      UserError: a name of another form, an unknown kind, or a shape that such devices do not have.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise UserError("devices", name, f"names no devices. {_FORMS}")
    if found["kind"] not in _KINDS:
        advice = nearest(found["kind"], _KINDS)
        raise UserError("devices", name, f": {found['kind']!r} is no kind of device. {advice}")

    kind = _KINDS[found["kind"]]
    sizes = [int(size) for size in found["shape"].split("x")]
    slices = int(found["slices"] or 1)
    if 0 in (*sizes, slices):
        raise UserError("devices", name, "has a size of 0.")
    if kind.platform == "tpu":
        _check_torus(name, sizes, kind.dimensions)
        per_slice = math.prod(sizes) * kind.cores
        return Cluster(name, kind.platform, kind.device_kind, per_slice, slices)

    if len(sizes) > 1:
        raise UserError("devices", name, f"has a shape, which only TPUs have. {_FORMS}")
    per_slice = sizes[0]
    if kind.platform == "gpu" and per_slice > GPUS_PER_NODE:
        # h200:16 -> two nodes of 8
        if per_slice % GPUS_PER_NODE:
            raise UserError(
                "devices", name, f"does not fill its nodes of {GPUS_PER_NODE} GPUs. {_FORMS}"
            )
        slices *= per_slice // GPUS_PER_NODE
        per_slice = GPUS_PER_NODE
    return Cluster(name, kind.platform, kind.device_kind, per_slice, slices)


def _check_torus(name: str, sizes: list[int], dimensions: int) -> None:
    """Raises UserError where no TPU slice has this shape."""
    if len(sizes) != dimensions:
        example = "x".join(["4"] * dimensions)
        raise UserError(
            "devices", name, f"must have {dimensions} sizes, such as {example}: its chips."
        )
    # A host has 2 · 2 · 1 chips of a torus of three dimensions.
    if dimensions == 3 and (sizes[0] % 2 or sizes[1] % 2):
        raise UserError(
            "devices", name, "does not exist: a host has 2x2x1 chips, so that two sizes are even."
        )
