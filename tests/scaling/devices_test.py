"""Peaks of devices: claims about `scaling.devices`."""

import jax
import pytest

from research.scaling.devices import DEVICES, peak_flops


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32"),
    [
        ("TPU v4", 275e12, 275e12),
        ("TPU v5 lite", 197e12, 197e12),
        ("TPU7x", 1153.5e12, 1153.5e12),  # half a chip
        ("NVIDIA H200", 989.4e12, 494.7e12),
        ("Tesla V100-SXM2-16GB", None, 15.7e12),
    ],
)
def test_known_devices_have_their_vendors_figures(kind, bfloat16, float32):
    assert peak_flops(kind, "bfloat16") == bfloat16
    assert peak_flops(kind, "float32") == float32


def test_unknown_devices_and_types_have_no_peak():
    assert peak_flops(jax.devices("cpu")[0].device_kind, "float32") is None
    assert peak_flops("NVIDIA H2000", "bfloat16") is None
    assert peak_flops("NVIDIA H200", "int8") is None


def test_figures_are_plausible():
    for kind, device in DEVICES.items():
        assert 8e9 <= device.memory_bytes <= 300e9, kind
        assert 3e11 <= device.bandwidth <= 1e13, kind
        assert 5e12 < device.float32 <= (device.bfloat16 or device.float32) < 5e15, kind
        # A device of these years multiplies some tens to hundreds of numbers for each byte that it
        # reads.
        assert 10 < device.float32 / device.bandwidth < 800, kind
