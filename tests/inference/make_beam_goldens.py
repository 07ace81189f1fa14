"""Searches the golden beams with transformers: `python -m tests.inference.make_beam_goldens` (extra
`parity`).
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from research.inference.beam_config import BeamConfig
from tests.inference import beam_cases
from tests.interop import torch_models

# Beams that noise of this size in log p changes were no goldens: other float32 arithmetic could
# change them too.
NOISE, DRAWS = 1e-4, 3


class _Noise(transformers.LogitsProcessor):
    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + NOISE * (2 * torch.rand(scores.shape, generator=self._generator) - 1)


def load(name: str) -> Any:
    """Returns a golden model with the weights of the golden beams."""
    tensors = beam_cases.tensors(name)
    if name in beam_cases.ENCODER_DECODERS:
        kind, config = torch_models.MODELS[name]
        model = kind._from_config(config, dtype=torch.float32).eval()
        # Rules that a family's generation has of its own are no part of the comparison.
        model.generation_config = transformers.GenerationConfig(
            decoder_start_token_id=beam_cases.START
        )
        tensors |= (
            {"final_logits_bias": tensors["final_logits_bias"]}
            if "final_logits_bias" in tensors
            else {}
        )
        model.load_state_dict(
            {key: torch.from_numpy(value) for key, value in tensors.items()}, strict=False
        )
        model.tie_weights()
        return model
    config = torch_models.DECODERS[name]
    model = (
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        .float()
        .eval()
    )
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.copy_(torch.from_numpy(tensors[key]))
    return model


def search(
    model: Any, prompt: Sequence[int], beams: BeamConfig, eos_id: int, noise: int | None = None
) -> list[tuple[list[int], float]]:
    """Returns new ids and score of the hypotheses of a prompt, which the encoder reads if there is
    one.
    """
    bos = [] if beams.forced_bos is None else [beams.forced_bos]
    prefix, start = (
        bos + list(beams.forced_prefix),
        1 if model.config.is_encoder_decoder else len(prompt),
    )

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        made = len(ids) - start
        return [prefix[made]] if made < len(prefix) else list(range(model.config.vocab_size))

    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        num_beams=beams.num_beams,
        num_return_sequences=beams.num_return,
        max_new_tokens=beams.max_tokens,
        min_new_tokens=beams.min_tokens,
        length_penalty=beams.length_penalty,
        no_repeat_ngram_size=beams.no_repeat_ngram,
        early_stopping=beams.early_stopping,
        forced_bos_token_id=beams.forced_bos,
        forced_eos_token_id=eos_id if beams.forced_eos else None,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
        prefix_allowed_tokens_fn=allowed if prefix else None,
        logits_processor=[] if noise is None else [_Noise(noise)],
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = [row[start:].tolist() for row in found.sequences]
    ends = [row.index(eos_id) + 1 if eos_id in row else len(row) for row in rows]
    return [
        (row[:end], float(score))
        for row, end, score in zip(rows, ends, found.sequences_scores, strict=True)
    ]


def compute(name: str) -> list[list[list[tuple[list[int], float]]]]:
    """Returns the hypotheses of a model by setting and prompt."""
    model, eos_id = load(name), beam_cases.eos_id(name)

    def certain(prompt: Sequence[int], beams: BeamConfig) -> list[tuple[list[int], float]]:
        best = search(model, prompt, beams, eos_id)
        for seed in range(DRAWS):
            noisy = search(model, prompt, beams, eos_id, seed)
            assert [ids for ids, _ in noisy] == [ids for ids, _ in best], (
                f"{beams}: a near tie after {prompt}"
            )
        return [(ids, round(score, 6)) for ids, score in best]

    return [
        [certain(prompt, beams) for prompt in beam_cases.prompts(name, beams)]
        for beams in beam_cases.grid(name)
    ]


def main() -> None:
    """Writes the goldens, a setting a line."""
    blocks = []
    for name in (*beam_cases.MODELS, *beam_cases.ENCODER_DECODERS):
        lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in compute(name))
        blocks.append(f"{json.dumps(name)}: [\n{lines}\n]")
    beam_cases.GOLDENS.write_text("{" + ",\n".join(blocks) + "}\n")


if __name__ == "__main__":
    main()
