"""The start of a run on all its processes, which must have the same config and code."""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.experimental import multihost_utils

import research
from research.core import config as configs
from research.core.errors import UserError, join
from research.parallel import distributed
from research.recipes.experiment import ExperimentConfig
from research.storage.paths import Path

# Says which process this is, and how it reaches the others.
MAY_DIFFER = "distributed"


def join_processes(config: ExperimentConfig, workdir: Path) -> None:
    """Joins the other processes of the run, and compares what all of them were started with.

    Raises:
      UserError: the others cannot be reached, or have another config, workdir, version of JAX or
          code. Each process raises it, before anything is compiled or written.
    """
    distributed.initialize(config.distributed)
    if jax.process_count() == 1:
        return
    _check_devices()
    values = started_with(config, workdir)
    texts = _gather(json.dumps(values))
    check_equal([json.loads(text) for text in texts])


def started_with(config: ExperimentConfig, workdir: Path) -> dict[str, Any]:
    """Returns what must be the same on all processes, by name: a different version may be why
    something after it differs.
    """
    # Another version of a file may make another program of the same config.
    code = hashlib.sha256()
    root = pathlib.Path(research.__file__).parent
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        code.update(name.encode())
        code.update(path.read_bytes())

    values = configs.plain(config)
    del values[MAY_DIFFER]
    return {
        "version of jax": jax.__version__,
        "version of jaxlib": jaxlib.__version__,
        "digest of the package": code.hexdigest()[:16],
        "workdir": str(workdir),
        **_flat(values),
    }


def check_equal(processes: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError for the first name under which a process has another value than process 0.

    Args:
      processes: the values of each process, by name.
    """
    first, *others = processes
    names = list(first)
    for values in others:
        names += [name for name in values if name not in names]

    for name in names:
        expected = _value(first, name)
        for index, values in enumerate(others, start=1):
            found = _value(values, name)
            if found != expected:
                raise UserError(
                    name,
                    found,
                    f"on process {index}, but {expected} on process 0. Start all processes with "
                    "the same config and code.",
                )


def _check_devices() -> None:
    """Raises UserError where processes have different numbers of devices, which JAX tells each of
    them.
    """
    counts = [0] * jax.process_count()
    for device in jax.devices():
        counts[device.process_index] += 1
    for index, count in enumerate(counts):
        if count != counts[0]:
            raise UserError(
                "number of devices",
                count,
                f"on process {index}, but {counts[0]} on process 0. Give all processes as many.",
            )


def _value(values: Mapping[str, Any], name: str) -> Any:
    """Returns a value as messages show it; fields of another version may be missing."""
    if name not in values:
        return "not set"
    return values[name]


def _flat(values: Any, where: str = "") -> dict[str, Any]:
    """Returns nested values by their dotted names."""
    # {"train": {"seed": 0}, "sources": [{"kind": "text"}]} -> train.seed 0, sources.0.kind "text"
    if isinstance(values, dict):
        items = list(values.items())
    elif isinstance(values, list):
        items = [(str(index), value) for index, value in enumerate(values)]
    else:
        items = []
    if not items:
        return {where: values}
    flat = {}
    for key, value in items:
        flat |= _flat(value, join(where, key))
    return flat


def _gather(text: str) -> list[str]:
    """Returns the texts of all processes, by their index."""
    # Texts of 3 and 5 bytes: sizes [3, 5], rows of 5 bytes
    data = np.frombuffer(text.encode("utf-8"), np.uint8)
    size = np.int32(len(data))
    sizes = np.asarray(multihost_utils.process_allgather(size)).reshape(-1)
    row = np.zeros(sizes.max(), np.uint8)
    row[:size] = data
    rows = np.asarray(multihost_utils.process_allgather(row))
    return [row[:size].tobytes().decode("utf-8") for row, size in zip(rows, sizes, strict=True)]
