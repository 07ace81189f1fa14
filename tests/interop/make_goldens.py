"""Computes the goldens with torch and transformers: `python -m tests.interop.make_goldens` (extra `parity`).

The configs are written here as the families' own config.json says them, not made from Tessera's presets, so that the
golden tests compare two readings of the same sources.
"""

import json
import pathlib
import tempfile
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import transformers

from tests.interop import cases


def _gpt2(width: int, heads: int) -> transformers.GPT2Config:
    return transformers.GPT2Config(
        vocab_size=cases.VOCAB,
        n_embd=width,
        n_head=heads,
        n_layer=2,
        n_positions=cases.LENGTH,
        bos_token_id=0,
        eos_token_id=0,
    )


def _llama(heads: int, kv_heads: int, hidden: int, length: int = cases.LENGTH, **rest: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=cases.VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=hidden,
        max_position_embeddings=length,
        **rest,
    )


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }


def _default_rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _sized(
    kind: type[transformers.PreTrainedConfig], layers: int = 2, heads: int = 4, kv_heads: int = 2, **rest: Any
) -> transformers.PreTrainedConfig:
    """Returns a small config of one family."""
    sizes = {
        "vocab_size": cases.VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), None),
    }
    return kind(**sizes | rest)


def _rope(kind: str, **rest: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10_000.0, **rest}


WINDOW = 8
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 1.0, "beta_slow": 0.1}
LONG = {"original_max_position_embeddings": 16}
LONG |= {"short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.0, 2.0, 3.5, 6.0]}
MIXED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK = {
    "kv_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}

CONFIGS = {
    "gpt2-small": _gpt2(64, 4),
    "gpt2-xl": _gpt2(60, 5),
    "llama-1-7b": _llama(4, 4, 172, rms_norm_eps=1e-6, rope_parameters=_default_rope(10_000.0)),
    "llama-2-7b": _llama(4, 4, 172, rms_norm_eps=1e-5, rope_parameters=_default_rope(10_000.0)),
    "llama-2-70b": _llama(8, 2, 224, rms_norm_eps=1e-5, rope_parameters=_default_rope(10_000.0)),
    "llama-3-8b": _llama(4, 1, 224, rms_norm_eps=1e-5, rope_parameters=_default_rope(500_000.0)),
    "llama-3.1-8b": _llama(4, 1, 224, 64, rms_norm_eps=1e-5, rope_parameters=_llama3_rope(8.0)),
    "llama-3.2-1b": _llama(
        4, 2, 256, 64, rms_norm_eps=1e-5, rope_parameters=_llama3_rope(32.0), tie_word_embeddings=True
    ),
    "llama-linear": _sized(transformers.LlamaConfig, rope_parameters=_rope("linear", factor=4.0)),
    "llama-dynamic": _sized(
        transformers.LlamaConfig, max_position_embeddings=16, rope_parameters=_rope("dynamic", factor=4.0)
    ),
    "llama-yarn": _sized(transformers.LlamaConfig, rope_parameters=_rope("yarn", **YARN)),
    "llama-longrope": _sized(transformers.LlamaConfig, rope_parameters=_rope("longrope", **LONG)),
    "llama-biases": _sized(transformers.LlamaConfig, attention_bias=True, mlp_bias=True),
    "mistral": _sized(transformers.MistralConfig, head_dim=12, sliding_window=WINDOW),
    "ministral": _sized(
        transformers.MinistralConfig,
        layers=3,
        head_dim=12,
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "mixtral": _sized(transformers.MixtralConfig, num_local_experts=4),
    "gemma2": _sized(
        transformers.Gemma2Config,
        head_dim=12,
        query_pre_attn_scalar=10,
        sliding_window=WINDOW,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=4.0,
    ),
    "gemma3": _sized(
        transformers.Gemma3TextConfig,
        layers=4,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        head_dim=12,
        query_pre_attn_scalar=10,
        sliding_window=WINDOW,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "qwen2": _sized(transformers.Qwen2Config, tie_word_embeddings=True),
    "qwen2-windows": _sized(
        transformers.Qwen2Config, layers=3, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen2-moe": _sized(transformers.Qwen2MoeConfig, shared_expert_intermediate_size=40, mlp_only_layers=[0], **MIXED),
    "qwen3": _sized(transformers.Qwen3Config, head_dim=12, rope_parameters=_rope("default") | {"rope_theta": 1e6}),
    "qwen3-moe": _sized(transformers.Qwen3MoeConfig, head_dim=12, norm_topk_prob=True, **MIXED),
    "olmo2": _sized(transformers.Olmo2Config),
    "phi3": _sized(transformers.Phi3Config, sliding_window=WINDOW),
    "phi3-longrope": _sized(
        transformers.Phi3Config,
        heads=2,
        kv_heads=1,
        original_max_position_embeddings=16,
        rope_parameters=_rope("longrope", partial_rotary_factor=0.5, **LONG),
    ),
    "gpt-oss": _sized(
        transformers.GptOssConfig,
        head_dim=12,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        swiglu_limit=1.0,
        rope_parameters=_rope("yarn", truncate=False, **YARN),
    ),
    "deepseek-v3": _sized(
        transformers.DeepseekV3Config,
        q_lora_rank=16,
        first_k_dense_replace=1,
        rms_norm_eps=1e-4,
        rope_parameters=_rope("yarn", mscale=1.0, mscale_all_dim=1.0, **YARN),
        **DEEPSEEK,
    ),
    "deepseek-v3-direct": _sized(
        transformers.DeepseekV3Config, q_lora_rank=None, first_k_dense_replace=0, n_shared_experts=2, **DEEPSEEK
    ),
}


def load(folder: pathlib.Path) -> transformers.PreTrainedModel:
    """Returns the model of a folder, once nothing in it is missing or left over."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"], report["missing_keys"]
    assert not report["unexpected_keys"], report["unexpected_keys"]
    return model.eval()


def logits_and_gradients(model: transformers.PreTrainedModel) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns float32 logits, and the gradient of the mean cross-entropy of the next token by the tensors' names.

    A model whose tensors are its gradients is saved, so that transformers itself takes its fused tensors apart.
    """
    tokens = torch.from_numpy(cases.tokens()).long()
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, cases.VOCAB), tokens[:, 1:].reshape(-1))
    loss.backward()
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.copy_(torch.zeros_like(value) if value.grad is None else value.grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return logits.detach().numpy(), safetensors.numpy.load_file(f"{folder}/model.safetensors")


def compute(config: transformers.PreTrainedConfig) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Returns the config and tensor shapes as transformers writes them, logits and the facts of the gradients."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        written = safetensors.numpy.load_file(folder / "model.safetensors")
        shapes = {name: list(written[name].shape) for name in sorted(written)}
        safetensors.numpy.save_file(cases.weights(shapes), folder / "model.safetensors", metadata={"format": "pt"})
        logits, gradients = logits_and_gradients(load(folder))
        fields = json.loads((folder / "config.json").read_text())
    return {"config": fields, "tensors": shapes}, logits, cases.facts(gradients)


def main() -> None:
    """Writes `goldens/`."""
    cases.GOLDENS.mkdir(exist_ok=True)
    computed = {name: compute(config) for name, config in CONFIGS.items()}
    described = [f"{json.dumps(name)}: {json.dumps(description)}" for name, (description, _, _) in computed.items()]
    (cases.GOLDENS / "cases.json").write_text("{\n" + ",\n".join(described) + "\n}\n")
    np.savez_compressed(cases.GOLDENS / "logits.npz", **{name: logits for name, (_, logits, _) in computed.items()})
    np.savez_compressed(cases.GOLDENS / "gradients.npz", **{name: facts for name, (_, _, facts) in computed.items()})


if __name__ == "__main__":
    main()
