"""Every test sees eight CPU devices, checked shapes, no implicit promotion and one cache, and lies
in one tier.
"""

import logging
import os
import signal

# Tests send themselves signals. A shell starts what it runs in the background with SIGINT ignored.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Where arrays of two types or ranks meet, the code says what comes of it. Processes that tests
# start read this too.
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Nearly all the time of small tests is compilation: half of it LLVM polishing code that runs once,
# a quarter the newer way to emit fused loops, and a tenth cutting modules up for threads that other
# tests keep busy. With TESSERA_TEST_XLA=default the tests see the passes that users get.
if os.environ.get("TESSERA_TEST_XLA") != "default":
    os.environ["XLA_FLAGS"] += (
        " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        " --xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false"
    )

import gc
import pathlib
from collections.abc import Iterator

import hypothesis
import jax
import psutil
import pytest

from research.core import backend
from tests import type_checks

backend.add_threads()
jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax-tests")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

type_checks.install()

# How long examples take to make says how busy the machine is.
hypothesis.settings.register_profile(
    "busy", suppress_health_check=[hypothesis.HealthCheck.too_slow], deadline=None
)
hypothesis.settings.load_profile("busy")

pytest_plugins = ["tests.recipes.fixtures", "tests.storage.fixtures"]

SHARED_DATA = pathlib.Path(__file__).parent.parent.parent / "shared" / "data"
SLOWER_TIERS = ("thorough", "compilers", "live", "processes")
# Tracing makes millions of small objects, and looking through them for circles takes a fifth of its
# time.
gc.set_threshold(200_000, 50, 100)
# Linux grants a process 65,530 mappings of memory, and each compiled program takes some.
MAPPINGS = 30_000
# Bytes of a worker, of which there are two.
MOST_MEMORY = 5e9


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test that no mark puts into a slower tier is in `fast`."""
    ids: dict[
        str, set[str]
    ] = {}  # of the parametrized tests with the mark `fast_cases`: those of all their cases
    named: dict[str, tuple[str, ...]] = {}
    for item in items:
        cases = item.get_closest_marker("fast_cases")
        if cases is not None:
            test, _, _ = item.nodeid.partition("[")
            ids.setdefault(test, set()).add(item.callspec.id)
            named[test] = cases.args
            if item.callspec.id not in cases.args:
                item.add_marker("thorough")
        if not any(item.get_closest_marker(tier) for tier in SLOWER_TIERS):
            item.add_marker("fast")
    for test, fast in named.items():
        unknown = set(fast) - ids[test]
        # A command line that names some cases collects no others.
        if unknown and not any("[" in argument for argument in config.args):
            raise pytest.UsageError(
                f"{test} has no case {sorted(unknown)[0]!r}, which its mark fast_cases names."
            )


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
    """Files that import torch are not opened for `fast`, which has none of their tests: the import
    takes seconds.
    """
    return (
        True
        if collection_path.name.endswith("_torch_test.py") and config.option.markexpr == "fast"
        else None
    )


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real data beside the checkout; tests that need it are skipped where it is
    missing.
    """
    if not SHARED_DATA.is_dir():
        pytest.skip("real data is not beside the checkout (../shared/data)")
    return SHARED_DATA


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Drops compiled programs after a file of tests when the process holds many, or has much
    memory; until then files share them.
    """
    yield
    mappings = pathlib.Path("/proc/self/maps")
    is_full = psutil.Process().memory_info().rss > MOST_MEMORY
    if is_full or not mappings.exists() or mappings.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()
        gc.collect()


def pytest_unconfigure() -> None:
    """Keeps what Orbax leaves behind of reads that were made to fail from being logged after the
    summary.
    """
    logging.getLogger("asyncio").disabled = True
