"""The presets of `configs/pods`, and their figures: compiled once, kept by a digest of what they
follow from, and shown as a table.
"""

import hashlib
import importlib.metadata
import json
import logging
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import research
from research.bench.report import write
from research.core import config as configs
from research.core.errors import UserError
from research.inspection.compile_row import COLUMNS, report_row
from research.scaling.cluster import parse_cluster
from research.scaling.topology import check_tpu_compiler
from research.storage.json_files import read_object

logger = logging.getLogger("tessera")

_HOUSE = pathlib.Path(research.__file__).parent.parent
PODS = _HOUSE / "configs" / "pods"
FIGURES = _HOUSE / "docs" / "figures" / "pods.json"


def pod_specs(folder: str) -> list[str]:
    """Returns `FILE.py:PRESET` of each preset in the files of a folder, as their `PRESETS` name
    them.

    Raises:
      UserError: the folder has no such file.
    """
    specs = []
    for path in sorted(pathlib.Path(folder).glob("*.py")):
        specs += [f"{path}:{name}" for name in configs.preset_names(str(path))]
    if not specs:
        raise UserError("all", folder, "has no file with PRESETS.")
    return specs


def versions_here(spec: str) -> dict[str, str]:
    """Returns the versions of the packages that compile a preset.

    Raises:
      UserError: it names no devices, or their compiler is not installed.
    """
    mesh = configs.load_file(spec).get("mesh") or {}
    devices = mesh.get("devices")
    if not devices:
        raise UserError("mesh.devices", constraint=f"is not set in {spec}: it names the cluster.")
    compiler = "jaxlib"
    if parse_cluster(devices).platform == "tpu":
        check_tpu_compiler()
        compiler = "libtpu"
    found = {}
    for package in ("jax", compiler):
        found[package] = importlib.metadata.version(package)
    return found


def digest(spec: str, versions: Mapping[str, str]) -> str:
    """Returns the digest of a preset's values and of the versions of what compiles it."""
    text = json.dumps([configs.load_file(spec), versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def figures_of(folder: str) -> pathlib.Path:
    """Returns the file of the figures of a folder's presets: this project's are in its docs, those
    of others in the folder.
    """
    path = pathlib.Path(folder)
    if path.resolve() == PODS.resolve():
        return FIGURES
    return path / "figures.json"


def read_figures(path: pathlib.Path | None = None) -> dict[str, Any]:
    """Returns the figures of presets by name, none where there is no file; those of this project
    where no file is given.
    """
    path = path or FIGURES
    return read_object(path)["pods"] if path.exists() else {}


def name_of(spec: str) -> str:
    """Returns the name of a preset in the file: `llama3.py:70b-v5p-512`."""
    return pathlib.Path(spec).name


def compile_pods(
    folder: str, specs: Sequence[str], chosen: Iterable[str], *, again: bool
) -> list[str]:
    """Compiles presets, one after the other, and writes the figures of each as soon as they are
    there.

    Args:
      folder: of the presets.
      specs: of all of them; figures of presets that it has no more are removed.
      chosen: those to compile.
      again: whether those are compiled too whose figures are of their values and this compiler.

    Returns:
      The names of those that cannot be compiled.
    """
    failed = []
    path = figures_of(folder)
    for spec in chosen:
        name = name_of(spec)
        versions = versions_here(spec)
        key = digest(spec, versions)
        if not again and read_figures(path).get(name, {}).get("digest") == key:
            logger.info("%s: its figures are there", name)
            continue

        # A process of its own, whose memory is that of one preset.
        command = [sys.executable, "-m", "research", "compile", f"--config={spec}", "--json"]
        found = subprocess.run(command, capture_output=True, text=True)
        if not found.stdout:
            lines = found.stderr.splitlines() or [f"status {found.returncode}"]
            logger.warning("%s: %s", name, lines[-1])
            failed.append(name)
            continue
        entry = {"digest": key, "versions": versions, "report": json.loads(found.stdout)}
        _write(path, f"tessera compile --all={folder}", specs, read_figures(path) | {name: entry})
        logger.info("%s: %s", name, ", ".join(report_row(name, entry)[3:]))
    return failed


def _write(path: pathlib.Path, command: str, specs: Iterable[str], pods: Mapping[str, Any]) -> None:
    """Writes the figures of these presets, in this order, with their table."""
    known = {}
    for name in map(name_of, specs):
        if name in pods:
            known[name] = pods[name]
    rows = [report_row(name, entry) for name, entry in known.items()]
    write(path, command, columns=COLUMNS, rows=rows, pods=known)
