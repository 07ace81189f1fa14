"""Peak rates and memory of devices, by the name under which JAX reports them
(`jax.Device.device_kind`).

A device is an entry of `jax.devices()`. On TPU v2, v3 and 7x that is one of two cores of a chip,
so the figures are half of the chip's; on v4 and v5p both cores are one device. All figures are
dense, never "with sparsity", and decimal except where the vendor gives GiB.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Peaks of one device.

    Attributes:
      bfloat16: FLOP/s of matrix products in bfloat16; None where the hardware has none.
      float32: FLOP/s of matrix products of float32 arrays at JAX's default precision, which is one
        bfloat16 pass on TPUs, TF32 on NVIDIA's Ampere and later, and true float32 before.
      memory_bytes: of the device's own memory.
      bandwidth: of that memory, bytes/s.
    """

    bfloat16: float | None
    float32: float | None
    memory_bytes: int
    bandwidth: float


def _tpu(tflops: int, gib: int, gigabytes_per_second: int, cores_per_chip: int = 1) -> Device:
    """A device from the figures of its chip, which some generations share between two."""
    peak = tflops * 1e12 / cores_per_chip
    return Device(
        bfloat16=peak,
        float32=peak,
        memory_bytes=gib * GIB // cores_per_chip,
        bandwidth=gigabytes_per_second * 1e9 / cores_per_chip,
    )


def _gpu(
    bf16_tflops: float | int | None,
    f32_tflops: float | int,
    gigabytes: int,
    gigabytes_per_second: int,
) -> Device:
    # Before Ampere there are no bfloat16 instructions.
    bfloat16 = None if bf16_tflops is None else bf16_tflops * 1e12
    return Device(
        bfloat16=bfloat16,
        float32=f32_tflops * 1e12,
        memory_bytes=gigabytes * 10**9,
        bandwidth=gigabytes_per_second * 1e9,
    )


# Google Cloud documentation, "TPU architecture" and the page of each version: "peak compute per
# chip (BF16)", "HBM capacity", "HBM bandwidth".
_TPU_V2 = _tpu(45, 16, 700, cores_per_chip=2)
_TPU_V3 = _tpu(123, 32, 900, cores_per_chip=2)
_TPU_V4 = _tpu(275, 32, 1200)
_TPU_V5E = _tpu(197, 16, 819)
_TPU_V5P = _tpu(459, 95, 2765)
_TPU_V6E = _tpu(918, 32, 1638)
_TPU_7X = _tpu(2307, 192, 7380, cores_per_chip=2)

# NVIDIA datasheets of each product; halved where they say "with sparsity". Second column: TF32, or
# FP32 before Ampere.
_V100_16 = _gpu(None, 15.7, 16, 900)  # V100 datasheet, SXM2
_V100_32 = _gpu(None, 15.7, 32, 900)  # V100 datasheet, SXM2
_T4 = _gpu(None, 8.1, 16, 320)  # T4 datasheet
_A100_40 = _gpu(312, 156, 40, 1555)  # A100 datasheet, SXM4
_A100_80 = _gpu(312, 156, 80, 2039)  # A100 datasheet, SXM4
_A100_80_PCIE = _gpu(312, 156, 80, 1935)  # A100 datasheet, PCIe
_A10 = _gpu(125, 62.5, 24, 600)  # A10 datasheet
_L4 = _gpu(121, 60, 24, 300)  # L4 datasheet
_L40S = _gpu(362.05, 183, 48, 864)  # L40S datasheet
_H100_SXM = _gpu(989.4, 494.7, 80, 3350)  # H100 architecture white paper, SXM5
_H100_PCIE = _gpu(756, 378, 80, 2000)  # H100 architecture white paper, PCIe
_H100_NVL = _gpu(835.5, 417.5, 94, 3900)  # H100 datasheet, NVL
_H200 = _gpu(989.4, 494.7, 141, 4800)  # H200 datasheet, SXM
_B200 = _gpu(2250, 1125, 180, 8000)  # HGX B200 datasheet, one of eight

DEVICES = {
    "TPU v2": _TPU_V2,
    "TPU v3": _TPU_V3,
    "TPU v4": _TPU_V4,
    "TPU v5 lite": _TPU_V5E,
    "TPU v5e": _TPU_V5E,
    "TPU v5": _TPU_V5P,
    "TPU v5p": _TPU_V5P,
    "TPU v6 lite": _TPU_V6E,
    "TPU v6e": _TPU_V6E,
    "TPU7x": _TPU_7X,
    "Tesla V100-SXM2-16GB": _V100_16,
    "Tesla V100-SXM2-32GB": _V100_32,
    "Tesla T4": _T4,
    "NVIDIA A100-SXM4-40GB": _A100_40,
    "NVIDIA A100-SXM4-80GB": _A100_80,
    "NVIDIA A100 80GB PCIe": _A100_80_PCIE,
    "NVIDIA A10": _A10,
    "NVIDIA L4": _L4,
    "NVIDIA L40S": _L40S,
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA H100 PCIe": _H100_PCIE,
    "NVIDIA H100 NVL": _H100_NVL,
    "NVIDIA H200": _H200,
    "NVIDIA B200": _B200,
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the peak FLOP/s of one device in matrix products, or None where it is not known.

    Nothing is guessed: the utilization of a CPU, or of a device that the table does not have, is
    unknown.

    Args:
      device_kind: as `jax.devices()[0].device_kind`.
      dtype: of the arrays that are multiplied, "bfloat16" or "float32"; the peaks of others are not
          known.
    """
    if device_kind not in DEVICES:
        return None
    device = DEVICES[device_kind]
    if dtype == "bfloat16":
        return device.bfloat16
    if dtype == "float32":
        return device.float32
    return None
