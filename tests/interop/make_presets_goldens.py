"""Computes their goldens with torch and transformers: `python -m tests.interop.make_presets_goldens` (`parity`)."""

import numpy as np

from tests.interop import cases, presets_cases
from tests.interop.presets_references import REFERENCES, measured


def main() -> None:
    """Writes `goldens/presets.npz`."""
    arrays = {}
    for name, reference in REFERENCES.items():
        config = presets_cases.config(name)
        given = presets_cases.weights(config), presets_cases.batch(config)
        arrays[f"{name}/logits"], gradients = measured(reference, config, *given)
        arrays[f"{name}/gradients"] = cases.facts(gradients)
    np.savez_compressed(cases.GOLDENS / "presets.npz", **arrays)


if __name__ == "__main__":
    main()
