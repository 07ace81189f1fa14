"""Chips that are not here, and JAX's interpreter of GPU kernels, which else compiles for most of
the tests' time.
"""

import threading
from typing import Any

import jax
import pytest
from jax._src.pallas.mosaic.interpret import thread_map

from research.scaling.topology import gpu_devices

_PROGRAMS: dict[Any, Any] = {}
_LOCK = threading.Lock()


@pytest.fixture(scope="session")
def h200() -> Any:
    """An H200 to compile for."""
    pytest.importorskip("jax_cuda12_plugin", reason="compiling for a GPU needs jax[cuda12]")
    return gpu_devices()[0]


def _run_jaxpr(jaxpr: Any, consts: Any, *arguments: Any) -> None:
    """Runs what a thread of an interpreted kernel does, compiled once and not once a thread and
    block.
    """
    with _LOCK:
        if jaxpr not in _PROGRAMS:
            function = jax.jit(
                lambda consts, *arguments: jax.core.eval_jaxpr(jaxpr, consts, *arguments)
            )
            _PROGRAMS[jaxpr] = function.lower(consts, *arguments).compile()
    _PROGRAMS[jaxpr](consts, *arguments)


# JAX 0.11 does as much by itself, and has a function of this name for it.
if not hasattr(thread_map, "_run"):
    thread_map._run_jaxpr = _run_jaxpr
