"""Computes their goldens with torch and transformers: `python -m tests.interop.make_encoders_goldens` (`parity`)."""

import json
import pathlib
import tempfile
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import transformers as hf

from research.interop.architecture import config_from
from research.interop.huggingface import ARCHITECTURES
from tests.interop import cases, encoders_cases
from tests.interop.encoders_cases import Batch

TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
SIZES = {"vocab_size": cases.VOCAB, **TOKENS}
ENCODER = {
    **SIZES,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
T5 = {
    **SIZES,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
SHORT = {"num_layers": 2, "num_decoder_layers": 1}
BART = {
    **SIZES,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 48,
}
FALCON = {**SIZES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
BERT, ROBERTA = hf.BertConfig(**ENCODER), hf.RobertaConfig(**ENCODER, type_vocab_size=1, layer_norm_eps=1e-5)

# The class and its config, by case.
MODELS = {
    "gpt": (
        hf.OpenAIGPTLMHeadModel,
        hf.OpenAIGPTConfig(vocab_size=cases.VOCAB, n_embd=32, n_head=4, n_layer=2, n_positions=32),
    ),
    # Global layers and local ones in turns, and fewer tokens in a window than in a row.
    "gpt-neo": (
        hf.GPTNeoForCausalLM,
        hf.GPTNeoConfig(
            **SIZES,
            hidden_size=32,
            num_heads=4,
            num_layers=3,
            attention_types=[[["global", "local"], 1], [["global"], 1]],
            window_size=8,
            max_position_embeddings=40,
            intermediate_size=80,
        ),
    ),
    "falcon-7b": (hf.FalconForCausalLM, hf.FalconConfig(**FALCON)),
    "falcon-40b": (hf.FalconForCausalLM, hf.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2)),
    "falcon2-11b": (
        hf.FalconForCausalLM,
        hf.FalconConfig(
            **FALCON,
            new_decoder_architecture=True,
            num_kv_heads=2,
            num_ln_in_parallel_attn=1,
            ffn_hidden_size=80,
            rope_parameters={"rope_type": "default", "rope_theta": 500_042.0},
            tie_word_embeddings=False,
        ),
    ),
    # Twelve heads, whose slopes are not all powers of two, so that rounding them tells.
    "falcon-rw": (
        hf.FalconForCausalLM,
        hf.FalconConfig(
            **(FALCON | {"hidden_size": 48, "num_attention_heads": 12}),
            alibi=True,
            bias=True,
            multi_query=False,
            parallel_attn=False,
        ),
    ),
    # Six heads, so that slopes fill up between powers of two.
    "mpt": (hf.MptForCausalLM, hf.MptConfig(**SIZES, d_model=36, n_heads=6, n_layers=2, max_seq_len=32)),
    "bert": (hf.BertForPreTraining, BERT),
    "bert-words": (hf.BertForMaskedLM, BERT),
    "roberta": (hf.RobertaForMaskedLM, ROBERTA),
    "xlm-roberta": (
        hf.XLMRobertaForMaskedLM,
        hf.XLMRobertaConfig(**ENCODER, type_vocab_size=1, layer_norm_eps=1e-5),
    ),
    # More tokens than the window on both sides; layers that are full, local, local and full.
    "modernbert": (
        hf.ModernBertForMaskedLM,
        hf.ModernBertConfig(**(ENCODER | {"num_hidden_layers": 4}), cls_token_id=0, sep_token_id=0, local_attention=8),
    ),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config(**T5)),
    "t5-1.1": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(**T5 | SHORT, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "ul2": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(**T5 | SHORT, feed_forward_proj="gated-silu", tie_word_embeddings=False),
    ),
    "mt5": (hf.MT5ForConditionalGeneration, hf.MT5Config(**T5 | SHORT)),
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig(**BART)),
    # Its decoder starts with padding.
    "marian": (
        hf.MarianMTModel,
        hf.MarianConfig(**BART, scale_embedding=True, activation_function="swish", decoder_start_token_id=1),
    ),
    "mbart": (hf.MBartForConditionalGeneration, hf.MBartConfig(**BART, scale_embedding=True)),
}
# Output projections of their own, which transformers 5 would tie where no weights say otherwise.
UNTIED = ("t5-1.1", "ul2", "mt5")


def write_seeded(name: str, folder: pathlib.Path) -> dict[str, Any]:
    """Writes a case as transformers does, with the seed's weights; returns its config and the shapes of its tensors."""
    kind, config = MODELS[name]
    made = kind._from_config(config, dtype=torch.float32)
    if name in UNTIED:
        made.lm_head.weight = torch.nn.Parameter(torch.randn(made.lm_head.weight.shape))
    made.save_pretrained(folder)
    written = safetensors.numpy.load_file(folder / "model.safetensors")
    shapes = {name: list(written[name].shape) for name in sorted(written)}
    safetensors.numpy.save_file(cases.weights(shapes), folder / "model.safetensors", metadata={"format": "pt"})
    return {"config": json.loads((folder / "config.json").read_text()), "tensors": shapes}


def load(name: str, folder: pathlib.Path) -> hf.PreTrainedModel:
    """Returns the model of a folder, none of whose tensors is missing or too many."""
    model, report = MODELS[name][0].from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"], report["missing_keys"]
    assert not report["unexpected_keys"], report["unexpected_keys"]
    return model.eval()


def compute(model: hf.PreTrainedModel, given: Batch) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns `logits`, `classes` where there are any, and the gradients by the names that tensors are written with."""
    batch = {
        name: torch.from_numpy(value.astype(np.float32 if name == "weights" else np.int64))
        for name, value in given.items()
    }
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.requires_grad_()
    found = model(**_inputs(model, batch))
    words = found.prediction_logits if "classes" in batch else found.logits
    real = batch["weights"] > 0
    loss = torch.nn.functional.cross_entropy(words[real], batch["targets"][real])
    outputs = {"logits": words[real].detach().numpy()}
    if "classes" in batch:
        loss = loss + torch.nn.functional.cross_entropy(found.seq_relationship_logits, batch["classes"])
        outputs["classes"] = found.seq_relationship_logits.detach().numpy()
    loss.backward()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for value in (*model.parameters(), *model.buffers()):
            value.copy_(torch.zeros_like(value) if value.grad is None else value.grad)
        model.save_pretrained(folder)
        return outputs, safetensors.numpy.load_file(f"{folder}/model.safetensors")


def _inputs(model: hf.PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if "encoder_tokens" in batch:
        return {
            "input_ids": batch["encoder_tokens"],
            "attention_mask": batch["encoder_segments"],
            "decoder_input_ids": batch["tokens"],
        }
    types = {"token_type_ids": batch["types"]} if "types" in batch else {}
    padding = 1 - batch["segments"]
    # RoBERTa counts positions by the padding tokens.
    tokens = batch["tokens"] * batch["segments"] + TOKENS["pad_token_id"] * padding
    return {"input_ids": tokens, **({"attention_mask": batch["segments"]} if padding.any() else {}), **types}


def main() -> None:
    """Writes `goldens/encoders.*`."""
    described, arrays = [], {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            description = write_seeded(name, pathlib.Path(folder))
            fields = description["config"]
            config = config_from(ARCHITECTURES[fields["model_type"]], fields)
            outputs, gradients = compute(load(name, pathlib.Path(folder)), encoders_cases.batch(name, config))
        described.append(f"{json.dumps(name)}: {json.dumps(description)}")
        arrays |= {f"{name}/{key}": value for key, value in outputs.items()}
        arrays[f"{name}/gradients"] = cases.facts(gradients)
    (cases.GOLDENS / "encoders.json").write_text("{\n" + ",\n".join(described) + "\n}\n")
    np.savez_compressed(cases.GOLDENS / "encoders.npz", **arrays)


if __name__ == "__main__":
    main()
