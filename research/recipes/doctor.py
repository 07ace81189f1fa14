"""`tessera doctor`: say in one screen what would fail later."""

import argparse
import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator

import jax
import psutil

from research.core.backend import ACCELERATORS, cache_folder
from research.core.errors import UserError
from research.data.prepare import check_sources
from research.recipes import workdir as workdirs
from research.recipes.experiment import add_config_argument, load_experiment
from research.storage import files
from research.storage.paths import Path, as_path, in_bucket, reason
from research.training.language_model import language_model_program

EXAMPLES = """\
  tessera doctor
  tessera doctor --workdir=runs/stdlib
  tessera doctor --config=configs/pretrain/stdlib.py --workdir=runs/stdlib"""

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
LEAST_MEMORY, LEAST_DISK = 2e9, 2e9
# A finding: `ok`, `warn` (may fail later) or `FAIL` (will), what was looked at, what was found.
Finding = tuple[str, str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this verb."""
    parser.add_argument(
        "--workdir", default="runs", help="folder that a run will write to (default runs)"
    )
    add_config_argument(parser, required=False)


def main(arguments: argparse.Namespace) -> int:
    """Prints every finding and returns 1 where something will fail."""
    workdir = as_path(arguments.workdir, "workdir")
    findings = list(_software())
    devices: list[jax.Device] = []
    try:
        devices = jax.devices()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # a platform without its plugin fails as an assertion of JAX
        said = f"none for JAX_PLATFORMS = {jax.config.jax_platforms} {error}"
        findings.append(("FAIL", "devices", " ".join(said.split())[:200]))
    findings += [*_devices(devices), *_memory(devices), *_folders(workdir)]
    if arguments.config is not None:
        findings += _experiment(arguments.config, arguments.overrides, workdir, devices)
    for state, subject, found in findings:
        print(f"{state:5} {subject:12} {found}")
    return int(any(state == "FAIL" for state, _, _ in findings))


def _software() -> Iterator[Finding]:
    supported = sys.version_info >= (3, 11)
    yield (
        "ok" if supported else "FAIL",
        "python",
        f"{platform.python_version()} on {platform.platform()}",
    )
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            if package != "libtpu":
                yield "FAIL", "packages", f"{package} is not installed: pip install -e ."
    yield "ok", "packages", ", ".join(versions)


def _devices(devices: list[jax.Device]) -> Iterator[Finding]:
    if not devices:
        return
    backend = jax.default_backend()
    yield (
        "ok",
        "devices",
        f"{len(devices)} × {devices[0].device_kind} ({backend}), {jax.process_count()} process(es)",
    )
    if backend == "cpu":
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        if load > 0.5 * cores:
            yield (
                "warn",
                "device use",
                f"load average is {load:.1f} on {cores} cores: another process is computing",
            )
        present = [name for name in ACCELERATORS if os.path.exists(name)]
        if present:
            yield (
                "warn",
                "devices",
                f"{present[0]} is here, but JAX uses the CPU: install jax[tpu] or jax[cuda12]",
            )
        return
    for holder in _other_holders(backend):
        yield "FAIL", "device use", f"another process holds the device: {holder}"


def _other_holders(backend: str) -> list[str]:
    """Names the processes, but this one, that have the accelerator open."""
    if backend == "gpu" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-compute-apps=pid,process_name", "--format=csv,noheader"]
        lines = subprocess.run(
            query, capture_output=True, text=True, check=False
        ).stdout.splitlines()
        return [
            line for line in lines if line.partition(",")[0].strip() not in ("", str(os.getpid()))
        ]
    holders = []
    for process in psutil.process_iter(["pid", "name"]):
        try:
            files = [
                os.readlink(link) for link in pathlib.Path(f"/proc/{process.pid}/fd").iterdir()
            ]
        except OSError:  # it has ended, or belongs to another user
            continue
        if process.pid != os.getpid() and any(
            name.startswith(("/dev/accel", "/dev/vfio/")) for name in files
        ):
            holders.append(f"{process.pid} {process.info['name']}")
    return holders


def _memory(devices: list[jax.Device]) -> Iterator[Finding]:
    free = psutil.virtual_memory().available
    yield (
        "ok" if free > LEAST_MEMORY else "warn",
        "memory",
        f"{free / 1e9:.1f} GB free for the host",
    )
    for device in devices:
        stats = device.memory_stats()
        if stats and "bytes_limit" in stats:
            left = stats["bytes_limit"] - stats["bytes_in_use"]
            yield (
                "ok" if left > LEAST_MEMORY else "warn",
                "memory",
                f"{left / 1e9:.1f} GB free on {device}",
            )


def _folders(workdir: Path) -> Iterator[Finding]:
    for subject, folder in (("workdir", workdir), ("cache", cache_folder())):
        try:
            files.check_writable(folder)
        except OSError as error:
            yield "FAIL", subject, f"{folder} cannot be written: {reason(error)}"
            continue
        if in_bucket(folder):
            yield "ok", subject, f"{folder} can be written"
            continue
        existing = next(
            path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
        )
        free = shutil.disk_usage(existing).free
        yield (
            "ok" if free > LEAST_DISK else "warn",
            subject,
            f"{folder} can be written, {free / 1e9:.1f} GB free",
        )


def _experiment(
    spec: str, overrides: list[tuple[str, str]], workdir: Path, devices: list[jax.Device]
) -> Iterator[Finding]:
    try:
        config = load_experiment(spec, overrides)
        check_sources(config.data)
        workdirs.check(workdir, config)
        if not devices:
            yield (
                "warn",
                "config",
                f"{spec} can be read; whether it fits is not known without a device",
            )
            return
        mesh = language_model_program(
            config.model, config.optim, config.train, config.mesh, devices
        ).mesh
    except UserError as error:
        yield "FAIL", "config", error.text({"workdir": "--workdir", "config": "--config"})
        return
    sizes = (
        ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "one device"
    )
    yield "ok", "config", f"{spec} fits: mesh of {sizes}"
