"""What torch and transformers make of the golden cases: folders, outputs, gradients."""

import json
import pathlib
import tempfile
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import transformers as hf

from tests.interop import cases, mtp_references, presets_references, registry
from tests.interop.torch_models import DECODERS, MODELS, TOKENS, UNTIED

Described = dict[str, Any]
Named = dict[str, np.ndarray]


def write_seeded(name: str, folder: pathlib.Path) -> Described:
    """Writes a case as transformers does, with the seed's weights; returns its config and the
    shapes of its tensors.
    """
    if name == registry.MTP:
        return mtp_references.write_seeded(folder)
    kind, config = MODELS[name]
    make = kind.from_config if name in DECODERS else kind._from_config
    made = make(config, dtype=torch.float32)
    if name in UNTIED:
        made.lm_head.weight = torch.nn.Parameter(torch.randn(made.lm_head.weight.shape))
    made.save_pretrained(folder)
    written = safetensors.numpy.load_file(folder / "model.safetensors")
    shapes = {name: list(written[name].shape) for name in sorted(written)}
    safetensors.numpy.save_file(
        cases.weights(shapes), folder / "model.safetensors", metadata={"format": "pt"}
    )
    return {"config": json.loads((folder / "config.json").read_text()), "tensors": shapes}


def compute(name: str, folder: pathlib.Path | None) -> tuple[Named, Named]:
    """Returns a case's outputs and the gradients by the names that tensors are written with.

    Args:
      name: of the case.
      folder: none of its tensors may be missing or too many; presets have none.
    """
    if name == registry.MTP:
        logits, gradients = mtp_references.compute(*mtp_references.load(folder))
        return {f"depth_{depth}": each for depth, each in enumerate(logits, 1)}, gradients
    if name in registry.PRESET_CASES:
        case, reference = registry.model(name), presets_references.REFERENCES[name]
        logits, gradients = presets_references.measured(
            reference, case.config, case.tensors, registry.batch(name)
        )
        return {"logits": logits}, gradients
    eager = {"attn_implementation": "eager"} if name in DECODERS else {}
    model, report = MODELS[name][0].from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, **eager
    )
    assert not report["missing_keys"], report["missing_keys"]
    assert not report["unexpected_keys"], report["unexpected_keys"]
    return _compute(name, model.eval())


def _compute(name: str, model: hf.PreTrainedModel) -> tuple[Named, Named]:
    """A model whose tensors are its gradients is saved, so that transformers takes its fused
    tensors apart.
    """
    batch = {
        key: torch.from_numpy(value.astype(np.float32 if key == "weights" else np.int64))
        for key, value in registry.batch(name).items()
    }
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.requires_grad_()
    found = model(**_inputs(batch))
    words = found.prediction_logits if "classes" in batch else found.logits
    real = batch["weights"] > 0
    loss = torch.nn.functional.cross_entropy(words[real], batch["targets"][real])
    outputs = {"logits": (words if name in DECODERS else words[real]).detach().numpy()}
    if "classes" in batch:
        loss = loss + torch.nn.functional.cross_entropy(
            found.seq_relationship_logits, batch["classes"]
        )
        outputs["classes"] = found.seq_relationship_logits.detach().numpy()
    loss.backward()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for value in (*model.parameters(), *model.buffers()):
            value.copy_(torch.zeros_like(value) if value.grad is None else value.grad)
        model.save_pretrained(folder)
        return outputs, safetensors.numpy.load_file(f"{folder}/model.safetensors")


def _inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if "encoder_tokens" in batch:
        return {
            "input_ids": batch["encoder_tokens"],
            "attention_mask": batch["encoder_segments"],
            "decoder_input_ids": batch["tokens"],
        }
    types = {"token_type_ids": batch["types"]} if "types" in batch else {}
    if "segments" not in batch:
        return {"input_ids": batch["tokens"], **types}
    padding = 1 - batch["segments"]
    # RoBERTa counts positions by the padding tokens.
    tokens = batch["tokens"] * batch["segments"] + TOKENS["pad_token_id"] * padding
    return {
        "input_ids": tokens,
        **({"attention_mask": batch["segments"]} if padding.any() else {}),
        **types,
    }
