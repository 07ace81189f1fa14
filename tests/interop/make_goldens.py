"""Computes the goldens with torch and transformers: `python -m tests.interop.make_goldens` (extra
`parity`).
"""

import json
import pathlib
import tempfile
from typing import Any

import numpy as np

from tests.interop import cases, registry
from tests.interop.torch_references import compute, write_seeded


def _computed(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the description of a case, and its outputs beside the facts of its gradients."""
    with tempfile.TemporaryDirectory() as text:
        folder = pathlib.Path(text)
        described = {} if name in registry.PRESET_CASES else write_seeded(name, folder)
        outputs, gradients = compute(name, folder)
    return described, outputs | {"gradients": cases.facts(gradients)}


def main() -> None:
    """Writes `goldens/`."""
    cases.GOLDENS.mkdir(exist_ok=True)
    found = {name: _computed(name) for name in registry.CASES}

    def held(suite: registry.Suite) -> dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]]:
        return {name: found[name] for name, each in registry.CASES.items() if each is suite}

    for file, suite in (("cases", registry.DECODERS), ("encoders", registry.ENCODERS)):
        lines = [
            f"{json.dumps(name)}: {json.dumps(described)}"
            for name, (described, _) in held(suite).items()
        ]
        (cases.GOLDENS / f"{file}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for key in ("logits", "gradients"):
        arrays = {name: arrays[key] for name, (_, arrays) in held(registry.DECODERS).items()}
        np.savez_compressed(cases.GOLDENS / f"{key}.npz", **arrays)
    for file, suite in (("encoders", registry.ENCODERS), ("presets", registry.PRESETS)):
        flat = {
            f"{name}/{key}": value
            for name, (_, arrays) in held(suite).items()
            for key, value in arrays.items()
        }
        np.savez_compressed(cases.GOLDENS / f"{file}.npz", **flat)
    described, arrays = found[registry.MTP]
    (cases.GOLDENS / "mtp.json").write_text(json.dumps(described) + "\n")
    np.savez_compressed(cases.GOLDENS / "mtp.npz", **arrays)


if __name__ == "__main__":
    main()
