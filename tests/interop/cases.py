"""The golden cases: shrunk presets, and weights that a seed gives, so that the goldens hold inputs
and logits only.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from research.core import config as configs
from research.models.config import ModelConfig

ROOT = pathlib.Path(__file__).parents[2]
GOLDENS = pathlib.Path(__file__).parent / "goldens"
BATCH, LENGTH, VOCAB = 2, 32, 64


@dataclasses.dataclass(frozen=True)
class Case:
    """A preset and how it is shrunk.

    Attributes:
      preset: a config file and its argument.
      shrink: `dotted.name=value` by `dotted.name=value`.
    """

    preset: str
    shrink: str

    def config(self) -> ModelConfig:
        """Returns the shrunk preset."""
        overrides = [
            tuple(item.split("="))
            for item in f"vocab_size={VOCAB} num_layers=2 {self.shrink}".split()
        ]
        values = configs.load_file(str(ROOT / "configs" / "model" / self.preset))
        return configs.bind(ModelConfig, configs.override(values, overrides))


def _shape(width: int, heads: int, kv_heads: int, hidden: int, length: int) -> str:
    return (
        f"embed_dim={width} attention.num_heads={heads} attention.num_kv_heads={kv_heads} "
        f"attention.head_dim={width // heads} mlp.hidden_dim={hidden} max_length={length}"
    )


CASES = {
    "gpt2-small": Case("gpt2.py:small", _shape(64, 4, 4, 256, LENGTH)),
    "gpt2-xl": Case("gpt2.py:xl", _shape(60, 5, 5, 240, LENGTH)),
    "llama-1-7b": Case("llama.py:1-7b", _shape(64, 4, 4, 172, LENGTH)),
    "llama-2-7b": Case("llama.py:2-7b", _shape(64, 4, 4, 172, LENGTH)),
    "llama-2-70b": Case("llama.py:2-70b", _shape(64, 8, 2, 224, LENGTH)),
    "llama-3-8b": Case("llama.py:3-8b", _shape(64, 4, 1, 224, LENGTH)),
    "llama-3.1-8b": Case(
        "llama.py:3.1-8b", _shape(64, 4, 1, 224, 64) + " position.scaling.original_length=16"
    ),
    "llama-3.2-1b": Case(
        "llama.py:3.2-1b", _shape(64, 4, 2, 256, 64) + " position.scaling.original_length=16"
    ),
}


def weights(shapes: dict[str, list[int]], seed: int = 0) -> dict[str, np.ndarray]:
    """Returns a tensor a name: norm scales near 1, biases that matter, embeddings small enough for
    epsilons to show.
    """
    random = np.random.RandomState(seed)  # its numbers never change between versions of NumPy
    tensors = {}
    for name in sorted(shapes):
        noise = random.standard_normal(shapes[name])
        if len(shapes[name]) == 1:
            value = 0.2 * noise + (1.0 if name.endswith("weight") else 0.0)
        else:
            value = (0.05 if any(part in name for part in ("embed", "wte", "wpe")) else 0.2) * noise
        tensors[name] = value.astype(np.float32)
    return tensors


def tokens(seed: int = 0) -> np.ndarray:
    """Returns ids `[B, T]`."""
    return np.random.RandomState(seed).randint(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)


def stored() -> dict[str, dict[str, Any]]:
    """Returns, by case, the `config` and the `tensors` (shapes by name) that transformers wrote."""
    return json.loads((GOLDENS / "cases.json").read_text())


def facts(gradients: dict[str, np.ndarray]) -> np.ndarray:
    """Returns what stands for the gradients, by name: the norm of each, and its product with a
    seeded random tensor.
    """
    random = np.random.RandomState(1)
    rows = []
    for name in sorted(gradients):
        gradient = gradients[name].astype(np.float64)
        rows.append(
            (np.linalg.norm(gradient), np.vdot(gradient, random.standard_normal(gradient.shape)))
        )
    return np.array(rows)


def golden_logits(name: str) -> np.ndarray:
    """Returns the float32 logits `[B, T, V]` that torch computed."""
    return np.load(GOLDENS / "logits.npz")[name]
