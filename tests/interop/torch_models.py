"""The golden cases as models of transformers, by name.

The configs are written here as the families' own config.json says them, not made from Tessera's
presets, so that the golden tests compare two readings of the same sources.
"""

from typing import Any

import transformers as hf

from tests.interop import cases

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
FALCON = {
    **SIZES,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
BERT, ROBERTA = (
    hf.BertConfig(**ENCODER),
    hf.RobertaConfig(**ENCODER, type_vocab_size=1, layer_norm_eps=1e-5),
)


def _gpt2(width: int, heads: int) -> hf.GPT2Config:
    return hf.GPT2Config(
        vocab_size=cases.VOCAB,
        n_embd=width,
        n_head=heads,
        n_layer=2,
        n_positions=cases.LENGTH,
        bos_token_id=0,
        eos_token_id=0,
    )


def _llama(
    heads: int, kv_heads: int, hidden: int, length: int = cases.LENGTH, **rest: Any
) -> hf.LlamaConfig:
    return hf.LlamaConfig(
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
    kind: type[hf.PreTrainedConfig], layers: int = 2, heads: int = 4, kv_heads: int = 2, **rest: Any
) -> hf.PreTrainedConfig:
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

# Decoders that transformers has, as the families' own config.json says them.
DECODERS = {
    "gpt2-small": _gpt2(64, 4),
    "gpt2-xl": _gpt2(60, 5),
    "llama-1-7b": _llama(4, 4, 172, rms_norm_eps=1e-6, rope_parameters=_default_rope(10_000.0)),
    "llama-2-7b": _llama(4, 4, 172, rms_norm_eps=1e-5, rope_parameters=_default_rope(10_000.0)),
    "llama-2-70b": _llama(8, 2, 224, rms_norm_eps=1e-5, rope_parameters=_default_rope(10_000.0)),
    "llama-3-8b": _llama(4, 1, 224, rms_norm_eps=1e-5, rope_parameters=_default_rope(500_000.0)),
    "llama-3.1-8b": _llama(4, 1, 224, 64, rms_norm_eps=1e-5, rope_parameters=_llama3_rope(8.0)),
    "llama-3.2-1b": _llama(
        4,
        2,
        256,
        64,
        rms_norm_eps=1e-5,
        rope_parameters=_llama3_rope(32.0),
        tie_word_embeddings=True,
    ),
    "llama-linear": _sized(hf.LlamaConfig, rope_parameters=_rope("linear", factor=4.0)),
    "llama-dynamic": _sized(
        hf.LlamaConfig, max_position_embeddings=16, rope_parameters=_rope("dynamic", factor=4.0)
    ),
    "llama-yarn": _sized(hf.LlamaConfig, rope_parameters=_rope("yarn", **YARN)),
    "llama-longrope": _sized(hf.LlamaConfig, rope_parameters=_rope("longrope", **LONG)),
    "llama-biases": _sized(hf.LlamaConfig, attention_bias=True, mlp_bias=True),
    "mistral": _sized(hf.MistralConfig, head_dim=12, sliding_window=WINDOW),
    "ministral": _sized(
        hf.MinistralConfig,
        layers=3,
        head_dim=12,
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "mixtral": _sized(hf.MixtralConfig, num_local_experts=4),
    "gemma2": _sized(
        hf.Gemma2Config,
        head_dim=12,
        query_pre_attn_scalar=10,
        sliding_window=WINDOW,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=4.0,
    ),
    "gemma3": _sized(
        hf.Gemma3TextConfig,
        layers=4,
        layer_types=[
            "sliding_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
        ],
        head_dim=12,
        query_pre_attn_scalar=10,
        sliding_window=WINDOW,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "qwen2": _sized(hf.Qwen2Config, tie_word_embeddings=True),
    "qwen2-windows": _sized(
        hf.Qwen2Config,
        layers=3,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    ),
    "qwen2-moe": _sized(
        hf.Qwen2MoeConfig, shared_expert_intermediate_size=40, mlp_only_layers=[0], **MIXED
    ),
    "qwen3": _sized(
        hf.Qwen3Config, head_dim=12, rope_parameters=_rope("default") | {"rope_theta": 1e6}
    ),
    "qwen3-moe": _sized(hf.Qwen3MoeConfig, head_dim=12, norm_topk_prob=True, **MIXED),
    "olmo2": _sized(hf.Olmo2Config),
    "phi3": _sized(hf.Phi3Config, sliding_window=WINDOW),
    "phi3-longrope": _sized(
        hf.Phi3Config,
        heads=2,
        kv_heads=1,
        original_max_position_embeddings=16,
        rope_parameters=_rope("longrope", partial_rotary_factor=0.5, **LONG),
    ),
    "gpt-oss": _sized(
        hf.GptOssConfig,
        head_dim=12,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        swiglu_limit=1.0,
        rope_parameters=_rope("yarn", truncate=False, **YARN),
    ),
    "deepseek-v3": _sized(
        hf.DeepseekV3Config,
        q_lora_rank=16,
        first_k_dense_replace=1,
        rms_norm_eps=1e-4,
        rope_parameters=_rope("yarn", mscale=1.0, mscale_all_dim=1.0, **YARN),
        **DEEPSEEK,
    ),
    "deepseek-v3-direct": _sized(
        hf.DeepseekV3Config,
        q_lora_rank=None,
        first_k_dense_replace=0,
        n_shared_experts=2,
        **DEEPSEEK,
    ),
}

# The class and its config, of other families.
ENCODERS = {
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
    "falcon-40b": (
        hf.FalconForCausalLM,
        hf.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
    ),
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
    "mpt": (
        hf.MptForCausalLM,
        hf.MptConfig(**SIZES, d_model=36, n_heads=6, n_layers=2, max_seq_len=32),
    ),
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
        hf.ModernBertConfig(
            **(ENCODER | {"num_hidden_layers": 4}),
            cls_token_id=0,
            sep_token_id=0,
            local_attention=8,
        ),
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
        hf.MarianConfig(
            **BART, scale_embedding=True, activation_function="swish", decoder_start_token_id=1
        ),
    ),
    "mbart": (hf.MBartForConditionalGeneration, hf.MBartConfig(**BART, scale_embedding=True)),
}
# Output projections of their own, which transformers 5 would tie where no weights say otherwise.
UNTIED = ("t5-1.1", "ul2", "mt5")

MODELS = {
    **{name: (hf.AutoModelForCausalLM, config) for name, config in DECODERS.items()},
    **ENCODERS,
}
