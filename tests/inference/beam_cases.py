"""The golden beams: sharpened golden models, prompts of several lengths, and a grid of settings."""

import dataclasses
import json
import pathlib

import numpy as np

from research.inference.beam_config import BeamConfig
from research.inference.beam_search import Hypothesis
from tests.interop import cases, registry

GOLDENS = pathlib.Path(__file__).parent / "beam_goldens.json"
# Of the golden models: the norm that logits are a product of, and an id that ends texts here, one
# that is likely.
MODELS = {"gpt2-small": ("transformer.ln_f.", 58), "llama-3.2-1b": ("model.norm.", 1)}
# The same of encoder-decoders, whose decoders begin with `START`, and what their encoders read.
ENCODER_DECODERS = {
    "t5": ("decoder.final_layer_norm.", 5),
    "bart": ("model.decoder.layers.0.final_layer_norm.", 19),
    "marian": ("model.decoder.layers.0.final_layer_norm.", 19),
}
START, SOURCES = 0, ([5, 9, 33], [17, 4, 50, 21, 8, 50, 21, 40, 61], [12])
# The logits of the golden models are nearly flat: times this, the best beam and the greedy text
# often differ.
SHARPNESS = 4.0
PROMPTS = ([5], [9, 33, 2], [17, 4, 50, 21, 8, 50, 21])
MAX_TOKENS = 10


def tensors(name: str) -> dict[str, np.ndarray]:
    """Returns the weights of a golden model, its logits sharpened."""
    values = cases.weights(registry.stored()[name]["tensors"])
    final = (MODELS | ENCODER_DECODERS)[name][0]
    return {
        key: value * np.float32(SHARPNESS if key.startswith(final) else 1.0)
        for key, value in values.items()
    }


def _grid() -> list[BeamConfig]:
    """Every penalty with every stopping rule for a few widths, with lower bounds and prefixes
    spread over them.
    """
    found = []
    for beams, ngram in ((2, 0), (3, 2), (4, 3), (5, 0)):
        for i, penalty in enumerate((0.0, 0.6, 1.0, 2.0)):
            for j, early in enumerate((False, True, "never")):
                found.append(
                    BeamConfig(
                        num_beams=beams,
                        max_tokens=MAX_TOKENS,
                        min_tokens=4 * ((i + j) % 3 == 2),
                        length_penalty=penalty,
                        no_repeat_ngram=ngram,
                        early_stopping=early,
                        num_return=beams,
                        forced_prefix=(7, 50) if (i + 2 * j) % 4 == 3 else (),
                    )
                )
    plain = dataclasses.replace(found[0], num_beams=4, num_return=4, no_repeat_ngram=3)
    return [
        *found,
        dataclasses.replace(plain, length_penalty=-1.0),
        dataclasses.replace(plain, length_penalty=-1.0, early_stopping="never"),
        dataclasses.replace(plain, length_penalty=1.0, forced_eos=True),
        dataclasses.replace(
            plain, length_penalty=1.0, forced_bos=8, forced_prefix=(3,), early_stopping=True
        ),
        # The prompts hold 50 21 once or twice, so the prefix repeats what must not be repeated.
        dataclasses.replace(
            plain, num_beams=3, num_return=3, no_repeat_ngram=2, forced_prefix=(50, 21, 50, 21)
        ),
    ]


GRID = _grid()


def eos_id(name: str) -> int:
    """Returns the id that ends texts of a model."""
    return (MODELS | ENCODER_DECODERS)[name][1]


def grid(name: str) -> list[BeamConfig]:
    """Returns the settings of a model: of encoder-decoders, a part."""
    return [*GRID[::5], *GRID[48:]] if name in ENCODER_DECODERS else GRID


def prompts(name: str, beams: BeamConfig) -> tuple[list[int], ...]:
    """Returns those that transformers takes: after longer ones than one token it does not heed
    `forced_bos`.
    """
    if name in ENCODER_DECODERS:
        return SOURCES
    return PROMPTS if beams.forced_bos is None else PROMPTS[:1]


def stored(name: str) -> list[list[list[Hypothesis]]]:
    """Returns the hypotheses of transformers by setting and prompt, of those that it takes."""
    by_setting = json.loads(GOLDENS.read_text())[name]
    return [
        [[Hypothesis(tuple(ids), score) for ids, score in best] for best in by_prompt]
        for by_prompt in by_setting
    ]
