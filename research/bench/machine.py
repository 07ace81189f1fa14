"""The machine that figures were measured on, and what it has no instructions for."""

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
    found = _instructions()
    return {
        "processor": model[1] if model else platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "avx512": "avx512f" in found,
        "bfloat16": bool(found & BFLOAT16),
        "memory_gigabytes": round(psutil.virtual_memory().total / 1e9),
        "accelerators": _nvidia(),
        "packages": {"python": platform.python_version(), **_versions()},
    }


def sentence(machine: Mapping[str, Any]) -> str:
    """Returns a description as a line of text."""
    instructions = "AVX-512" if machine["avx512"] else "no AVX-512"
    bfloat16 = "bfloat16 instructions" if machine["bfloat16"] else "no bfloat16 instructions"
    versions = ", ".join(f"{package} {version}" for package, version in machine["packages"].items())
    parts = [machine["processor"], f"{machine['cores']} cores", instructions, bfloat16]
    parts += [f"{machine['memory_gigabytes']} GB", *machine["accelerators"]]
    return f"{', '.join(parts)}; {versions}"


def without_torch_bfloat16(peers: Sequence[str], dtype: str) -> tuple[list[str], dict[str, str]]:
    """Returns the peers that can be measured, and why the others are left out.

    Without instructions for bfloat16 torch computes it number by number, which takes hundreds of
    times as long.
    """
    if dtype != "bfloat16" or "torch" not in peers or _instructions() & BFLOAT16:
        return list(peers), {}
    return [peer for peer in peers if peer != "torch"], {
        "torch": "the processor has no bfloat16 instructions"
    }


def _processor() -> str:
    """Returns what Linux says of the first processor; nothing elsewhere."""
    path = pathlib.Path("/proc/cpuinfo")
    return path.read_text().partition("\n\n")[0] if path.exists() else ""


def _instructions() -> set[str]:
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", _processor(), re.MULTILINE)
    return set(flags[1].split()) if flags else set()


def _nvidia() -> list[str]:
    """Returns the models of NVIDIA's GPUs; JAX, which knows all accelerators, would take them from
    the sides.
    """
    texts = [
        pathlib.Path(path).read_text()
        for path in glob.glob("/proc/driver/nvidia/gpus/*/information")
    ]
    return [
        line.partition(":")[2].strip()
        for text in texts
        for line in text.splitlines()
        if line.startswith("Model:")
    ]


def _versions() -> dict[str, str]:
    installed = {each.metadata["Name"].lower() for each in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
