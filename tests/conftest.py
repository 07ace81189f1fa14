"""Every test sees eight CPU devices, checked shapes and one compilation cache."""

import logging
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all the time of small tests is compilation, and half of that is LLVM polishing code that runs once.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import gc
import pathlib
from collections.abc import Iterator

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

# Shapes and types of every public function are checked under pytest only.
install_import_hook("research", "beartype.beartype")

pytest_plugins = ["tests.recipes.fixtures"]

SHARED_DATA = pathlib.Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real data beside the checkout; tests that need it are skipped where it is missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip("real data is not beside the checkout (../shared/data)")
    return SHARED_DATA


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Drops the compiled programs of each file of tests: a process may hold so many mappings of memory and no more."""
    yield
    jax.clear_caches()
    gc.collect()


def pytest_unconfigure() -> None:
    """Keeps what Orbax leaves behind of reads that were made to fail from being logged after the summary."""
    logging.getLogger("asyncio").disabled = True
