"""The machine that figures were measured on, and the instructions that it has."""

import glob
import importlib.metadata
import pathlib
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

PACKAGES = ("jax", "jaxlib", "libtpu", "torch", "transformers")
BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}


def describe() -> dict[str, Any]:
    """Returns the processor, its cores and instructions, memory, accelerators, and versions of
    packages.
    """
    model = re.search(r"^model name\s*:\s*(.+)$", _processor(), re.MULTILINE)
    instructions = _instructions()
    return {
        "processor": model[1] if model else platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "avx512": "avx512f" in instructions,
        "bfloat16": bool(instructions & BFLOAT16),
        "memory_gigabytes": round(psutil.virtual_memory().total / 1e9),
        "accelerators": _nvidia(),
        "packages": {"python": platform.python_version(), **_versions()},
    }


def sentence(machine: Mapping[str, Any]) -> str:
    """Returns a description as a line of text."""
    instructions = "AVX-512" if machine["avx512"] else "no AVX-512"
    bfloat16 = "bfloat16 instructions" if machine["bfloat16"] else "no bfloat16 instructions"
    # AMD EPYC, 2 cores, AVX-512, …, 25 GB; python 3.11.7, jax 0.10.2
    packages = machine["packages"].items()
    versions = ", ".join(f"{package} {version}" for package, version in packages)
    cores = f"{machine['cores']} cores"
    memory = f"{machine['memory_gigabytes']} GB"
    parts = [machine["processor"], cores, instructions, bfloat16, memory, *machine["accelerators"]]
    return f"{', '.join(parts)}; {versions}"


def without_torch_bfloat16(peers: Sequence[str], dtype: str) -> tuple[list[str], dict[str, str]]:
    """Returns the peers that can be measured, and why the others are left out.

    Without instructions for bfloat16 torch computes it number by number, which takes hundreds of
    times as long.
    """
    if dtype != "bfloat16" or "torch" not in peers or _instructions() & BFLOAT16:
        return list(peers), {}
    measured = [peer for peer in peers if peer != "torch"]
    return measured, {"torch": "the processor has no bfloat16 instructions"}


def _processor() -> str:
    """Returns the description of the first processor on Linux; nothing elsewhere."""
    path = pathlib.Path("/proc/cpuinfo")
    if not path.exists():
        return ""
    first, _, _ = path.read_text().partition("\n\n")
    return first


def _instructions() -> set[str]:
    # `flags` on x86, `Features` on Arm.
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", _processor(), re.MULTILINE)
    if flags is None:
        return set()
    return set(flags[1].split())


def _nvidia() -> list[str]:
    """Returns the models of NVIDIA's GPUs.

    JAX knows all accelerators, but would allocate the memory that the sides need.
    """
    # A line `Model: NVIDIA H200` in the file of each GPU.
    models = []
    for path in glob.glob("/proc/driver/nvidia/gpus/*/information"):
        for line in pathlib.Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "Model":
                models.append(value.strip())
    return models


def _versions() -> dict[str, str]:
    packages = importlib.metadata.distributions()
    installed = {package.metadata["Name"].lower() for package in packages}
    return {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
