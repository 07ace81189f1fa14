"""Chips that are not here."""

from typing import Any

import pytest

from research.scaling.topology import gpu_devices


@pytest.fixture(scope="session")
def h200() -> Any:
    """An H200 to compile for."""
    pytest.importorskip("jax_cuda12_plugin", reason="compiling for a GPU needs jax[cuda12]")
    return gpu_devices()[0]
