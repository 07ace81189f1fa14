"""Checks of the machine that a run is to start on: software, devices, memory, folders."""

import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import psutil

from research.core.backend import ACCELERATORS, cache_folder
from research.storage import files
from research.storage.paths import Path, in_bucket, reason

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "sentencepiece",
    "libtpu",
)
LEAST_MEMORY = 2e9
LEAST_DISK = 2e9

Status = Literal["ok", "warn", "fail"]


class Check(NamedTuple):
    """A check and its result.

    Attributes:
      name: what was checked.
      status: `ok`, `warn` (a run may fail) or `fail` (a run will fail).
      message: what was found.
    """

    name: str
    status: Status
    message: str


def machine_checks(workdir: Path) -> tuple[list[Check], list[jax.Device]]:
    """Returns the checks of the machine, and the devices that JAX found on it.

    Args:
      workdir: the folder that a run will write to.
    """
    checks = list(_software_checks())
    devices: list[jax.Device] = []
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        # JAX fails with an assertion for a platform without its plugin.
        message = f"none for JAX_PLATFORMS = {jax.config.jax_platforms} {error}"
        one_line = " ".join(message.split())
        checks.append(Check("devices", "fail", one_line[:200]))

    checks += _device_checks(devices)
    checks += _memory_checks(devices)
    checks += _folder_checks(workdir)
    return checks, devices


def _software_checks() -> Iterator[Check]:
    version = f"{platform.python_version()} on {platform.platform()}"
    status = "ok" if sys.version_info >= (3, 11) else "fail"
    yield Check("python", status, version)

    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            if package != "libtpu":
                yield Check("packages", "fail", f"{package} is not installed: pip install -e .")
    yield Check("packages", "ok", ", ".join(versions))


def _device_checks(devices: list[jax.Device]) -> Iterator[Check]:
    if not devices:
        return

    backend = jax.default_backend()
    kind = devices[0].device_kind
    found = f"{len(devices)} × {kind} ({backend}), {jax.process_count()} process(es)"
    yield Check("devices", "ok", found)
    if backend == "cpu":
        yield from _cpu_checks()
        return
    # An accelerator has room for one process at a time.
    for process in _other_device_users(backend):
        message = f"another process holds the device: {process}"
        yield Check("device use", "fail", message)


def _cpu_checks() -> Iterator[Check]:
    load = os.getloadavg()[0]
    cores = os.cpu_count() or 1
    if load > 0.5 * cores:
        message = f"load average is {load:.1f} on {cores} cores: another process is computing"
        yield Check("device use", "warn", message)

    present = [name for name in ACCELERATORS if os.path.exists(name)]
    if present:
        message = f"{present[0]} is here, but JAX uses the CPU: install jax[tpu] or jax[cuda12]"
        yield Check("devices", "warn", message)


def _other_device_users(backend: str) -> list[str]:
    """Returns the other processes that have the accelerator open: id and name."""
    if backend == "gpu" and shutil.which("nvidia-smi"):
        return _other_gpu_processes()
    return _other_tpu_processes()


def _other_gpu_processes() -> list[str]:
    query = ["nvidia-smi", "--query-compute-apps=pid,process_name", "--format=csv,noheader"]
    output = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    others = []
    for line in output.splitlines():
        # "1234, python" -> "1234"
        pid = line.partition(",")[0].strip()
        if pid not in ("", str(os.getpid())):
            others.append(line)
    return others


def _other_tpu_processes() -> list[str]:
    others = []
    for process in psutil.process_iter(["pid", "name"]):
        if process.pid == os.getpid():
            continue
        try:
            links = list(pathlib.Path(f"/proc/{process.pid}/fd").iterdir())
            opened = [os.readlink(link) for link in links]
        except OSError:
            # The process has ended, or belongs to another user.
            continue
        if any(name.startswith(("/dev/accel", "/dev/vfio/")) for name in opened):
            others.append(f"{process.pid} {process.info['name']}")
    return others


def _memory_checks(devices: list[jax.Device]) -> Iterator[Check]:
    free = psutil.virtual_memory().available
    yield _free_memory(free, "free for the host")
    for device in devices:
        stats = device.memory_stats()
        if stats and "bytes_limit" in stats:
            free = stats["bytes_limit"] - stats["bytes_in_use"]
            yield _free_memory(free, f"free on {device}")


def _free_memory(free: int, where: str) -> Check:
    status = "ok" if free > LEAST_MEMORY else "warn"
    return Check("memory", status, f"{free / 1e9:.1f} GB {where}")


def _folder_checks(workdir: Path) -> Iterator[Check]:
    yield _folder_check("workdir", workdir)
    yield _folder_check("cache", cache_folder())


def _folder_check(name: str, folder: Path) -> Check:
    try:
        files.check_writable(folder)
    except OSError as error:
        return Check(name, "fail", f"{folder} cannot be written: {reason(error)}")
    if in_bucket(folder):
        return Check(name, "ok", f"{folder} can be written")

    # The folder may not be there yet: its file system is that of its nearest parent.
    folders = (folder.absolute(), *folder.absolute().parents)
    existing = next(path for path in folders if path.exists())
    free = shutil.disk_usage(existing).free
    status = "ok" if free > LEAST_DISK else "warn"
    return Check(name, status, f"{folder} can be written, {free / 1e9:.1f} GB free")
