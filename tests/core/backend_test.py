"""Settings before JAX starts: freed memory stays mapped."""

import os
import subprocess
import sys

import pytest

from research.core import backend

# Allocates and fills 64 MiB ten times, and prints how many pages were mapped after the first time.
# What is free on the machine is not asked: other tests may have taken it.
FAULTS = """
import resource, sys
import numpy as np
from research.core import backend
backend.AMPLE_MEMORY = {"ample": 0, "short": float("inf")}[sys.argv[1]]
backend.keep_memory()
for repeat in range(10):
    if repeat == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array = np.empty(2**23)
    array.fill(1.0)
    del array
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(memory: str, **environment: str) -> int:
    command = [sys.executable, "-c", FAULTS, memory]
    return int(
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc's allocator is set")
def test_freed_memory_stays_mapped_where_it_is_ample_and_the_user_does_not_say_otherwise():
    # Where memory is short, the system may unmap pages that are then mapped again, but hardly in
    # each of three attempts.
    assert min(faults("ample") for _ in range(3)) < 100
    assert faults("short") > 100
    assert faults("ample", MALLOC_TRIM_THRESHOLD_="131072") > 100


@pytest.mark.parametrize(
    ("installed", "vendors", "given", "expected"),
    [
        (True, ["0x8086"], None, "cpu"),
        (True, ["0x8086"], "tpu", "tpu"),
        (True, ["0x8086", "0x1ae0"], None, None),
        (False, ["0x8086"], None, None),
    ],
    ids=["a compiler only", "said by the user", "a TPU", "nothing"],
)
def test_the_tpu_compiler_alone_is_no_tpu(
    installed, vendors, given, expected, monkeypatch, tmp_path
):
    for index, vendor in enumerate(vendors):
        (tmp_path / str(index)).write_text(f"{vendor}\n")
    monkeypatch.setattr(backend, "VENDORS", str(tmp_path / "*"))
    monkeypatch.setattr(backend, "ACCELERATORS", ())
    monkeypatch.setattr(backend, "keep_memory", lambda: None)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: installed or None)
    environment = {} if given is None else {"JAX_PLATFORMS": given}
    monkeypatch.setattr(backend.os, "environ", environment)
    backend.configure()
    assert environment.get("JAX_PLATFORMS") == expected


@pytest.mark.parametrize(
    ("flags", "given", "expected"),
    [
        ("--xla_force_host_platform_device_count=8", None, "32"),
        ("--xla_force_host_platform_device_count=8", "9", "9"),
        (
            "--xla_force_host_platform_device_count=8 --xla_force_host_platform_device_count=2",
            None,
            "8",
        ),
        ("--xla_force_host_platform_device_count=1", None, None),
        ("", None, None),
    ],
)
def test_several_cpu_devices_have_threads_to_wait_in(flags, given, expected, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    if given:
        monkeypatch.setenv("PJRT_NPROC", given)
    backend.add_threads()
    assert os.environ.get("PJRT_NPROC") == expected
    monkeypatch.delenv("PJRT_NPROC", raising=False)


THREADS = """
import glob
import jax
jax.devices()
names = [open(path).read().strip() for path in glob.glob("/proc/self/task/*/comm")]
print(names.count("tf_XLAEigen"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed by Linux")
def test_xla_has_as_many_threads_as_the_variable_says():
    flags = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "PJRT_NPROC": "37"}
    command = [sys.executable, "-c", THREADS]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(found.stdout) == 37
