"""Fields of the `config.json` released with some models, as `transformers` takes them: (preset,
size) -> fields.

`architecture` is the class that holds them all. Fields that no parameter and no test here depends
on are left out.
"""

from typing import Any

_T5 = {"architecture": "T5ForConditionalGeneration", "vocab_size": 32_128}
_BART = {
    "architecture": "BartForConditionalGeneration",
    "vocab_size": 50_265,
    "max_position_embeddings": 1024,
}
_BERT = {"architecture": "BertForPreTraining", "vocab_size": 30_522, "max_position_embeddings": 512}
_DEEPSEEK = {
    "rope_theta": 10_000.0,
    "max_position_embeddings": 163_840,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}
_YARN = {
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "type": "yarn",
}

TRANSFORMERS: dict[tuple[str, str], dict[str, Any]] = {
    ("bart", "base"): _BART
    | {"d_model": 768, "encoder_layers": 6, "encoder_ffn_dim": 3072, "encoder_attention_heads": 12}
    | {"decoder_layers": 6, "decoder_ffn_dim": 3072, "decoder_attention_heads": 12},
    ("bert", "base"): _BERT
    | {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    ("bert", "mini"): _BERT
    | {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    },
    ("deepseek", "v3-671b"): _DEEPSEEK
    | {
        "architecture": "DeepseekV3ForCausalLM",
        "vocab_size": 129_280,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
    }
    | {
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "intermediate_size": 18_432,
    }
    | {
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
    }
    | {"rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ("deepseek", "v2-lite-16b"): _DEEPSEEK
    | {
        "architecture": "DeepseekV2ForCausalLM",
        "vocab_size": 102_400,
        "hidden_size": 2048,
        "num_hidden_layers": 27,
    }
    | {
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "intermediate_size": 10_944,
    }
    | {
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
    }
    | {"rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    ("falcon", "7b"): {
        "architecture": "FalconForCausalLM",
        "hidden_size": 4544,
        "num_attention_heads": 71,
    }
    | {"num_hidden_layers": 32, "multi_query": True, "parallel_attn": True},
    ("falcon", "40b"): {
        "architecture": "FalconForCausalLM",
        "hidden_size": 8192,
        "num_attention_heads": 128,
    }
    | {"num_hidden_layers": 60, "num_kv_heads": 8, "new_decoder_architecture": True},
    ("falcon", "11b"): {
        "architecture": "FalconForCausalLM",
        "hidden_size": 4096,
        "num_attention_heads": 32,
    }
    | {"num_hidden_layers": 60, "num_kv_heads": 8, "new_decoder_architecture": True}
    | {"num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
    ("gemma", "2-27b"): {
        "architecture": "Gemma2ForCausalLM",
        "hidden_size": 4608,
        "intermediate_size": 36_864,
    }
    | {
        "num_hidden_layers": 46,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
    }
    | {"vocab_size": 256_000, "query_pre_attn_scalar": 144},
    ("gemma", "3-1b"): {
        "architecture": "Gemma3ForCausalLM",
        "hidden_size": 1152,
        "intermediate_size": 6912,
    }
    | {"num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
    | {"vocab_size": 262_144},
    ("gemma", "3-27b"): {
        "architecture": "Gemma3ForCausalLM",
        "hidden_size": 5376,
        "intermediate_size": 21_504,
    }
    | {
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
    }
    | {"vocab_size": 262_208, "query_pre_attn_scalar": 168},
    ("gpt", "117m"): {
        "architecture": "OpenAIGPTLMHeadModel",
        "vocab_size": 40_478,
        "n_positions": 512,
    }
    | {"n_embd": 768, "n_layer": 12, "n_head": 12},
    ("gpt2", "xl"): {
        "architecture": "GPT2LMHeadModel",
        "n_embd": 1600,
        "n_layer": 48,
        "n_head": 25,
    },
    ("gpt_oss", "20b"): {
        "architecture": "GptOssForCausalLM",
        "vocab_size": 201_088,
        "hidden_size": 2880,
    }
    | {
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_local_experts": 32,
        "num_attention_heads": 64,
    }
    | {"num_key_value_heads": 8, "head_dim": 64, "rope_theta": 150_000}
    | {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
        }
    },
    ("llama", "1-65b"): {
        "architecture": "LlamaForCausalLM",
        "hidden_size": 8192,
        "intermediate_size": 22_016,
    }
    | {"num_hidden_layers": 80, "num_attention_heads": 64, "vocab_size": 32_000},
    ("llama", "3.1-405b"): {
        "architecture": "LlamaForCausalLM",
        "hidden_size": 16_384,
        "intermediate_size": 53_248,
    }
    | {
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
    ("llama", "3.2-3b"): {
        "architecture": "LlamaForCausalLM",
        "hidden_size": 3072,
        "intermediate_size": 8192,
    }
    | {
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    }
    | {"tie_word_embeddings": True},
    ("mistral", "nemo-12b"): {
        "architecture": "MistralForCausalLM",
        "hidden_size": 5120,
        "intermediate_size": 14_336,
    }
    | {
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    | {"vocab_size": 131_072},
    ("mistral", "ministral-8b"): {
        "architecture": "MinistralForCausalLM",
        "hidden_size": 4096,
        "head_dim": 128,
    }
    | {
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    | {"vocab_size": 131_072},
    ("mixtral", "8x22b"): {
        "architecture": "MixtralForCausalLM",
        "hidden_size": 6144,
        "intermediate_size": 16_384,
    }
    | {
        "num_hidden_layers": 56,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
    }
    | {"vocab_size": 32_768},
    ("modernbert", "large"): {
        "architecture": "ModernBertForMaskedLM",
        "hidden_size": 1024,
        "intermediate_size": 2624,
    }
    | {"num_hidden_layers": 28, "num_attention_heads": 16, "vocab_size": 50_368},
    ("mpt", "30b"): {
        "architecture": "MptForCausalLM",
        "d_model": 7168,
        "n_heads": 64,
        "n_layers": 48,
    }
    | {"expansion_ratio": 4, "max_seq_len": 8192, "vocab_size": 50_432, "no_bias": True},
    ("olmo2", "32b"): {
        "architecture": "Olmo2ForCausalLM",
        "hidden_size": 5120,
        "intermediate_size": 27_648,
    }
    | {
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 100_352,
    },
    ("phi3", "mini-128k"): {
        "architecture": "Phi3ForCausalLM",
        "hidden_size": 3072,
        "intermediate_size": 8192,
    }
    | {
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32_064,
    }
    | {
        "max_position_embeddings": 131_072,
        "original_max_position_embeddings": 4096,
        "rope_theta": 10_000.0,
    }
    | {"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 48, "short_factor": [1.0] * 48}},
    ("phi3", "medium-4k"): {
        "architecture": "Phi3ForCausalLM",
        "hidden_size": 5120,
        "intermediate_size": 17_920,
    }
    | {
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "vocab_size": 32_064,
    },
    ("qwen", "2.5-0.5b"): {
        "architecture": "Qwen2ForCausalLM",
        "hidden_size": 896,
        "intermediate_size": 4864,
    }
    | {
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    }
    | {"tie_word_embeddings": True},
    ("qwen", "3-32b"): {
        "architecture": "Qwen3ForCausalLM",
        "hidden_size": 5120,
        "intermediate_size": 25_600,
    }
    | {
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    | {"vocab_size": 151_936},
    ("qwen", "3-235b-a22b"): {
        "architecture": "Qwen3MoeForCausalLM",
        "hidden_size": 4096,
        "intermediate_size": 12_288,
    }
    | {
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
    }
    | {"num_experts": 128, "moe_intermediate_size": 1536, "vocab_size": 151_936},
    ("qwen", "2-57b-a14b"): {
        "architecture": "Qwen2MoeForCausalLM",
        "hidden_size": 3584,
        "intermediate_size": 18_944,
    }
    | {
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "num_experts": 64,
    }
    | {
        "moe_intermediate_size": 2560,
        "shared_expert_intermediate_size": 20_480,
        "vocab_size": 151_936,
    },
    ("roberta", "large"): {
        "architecture": "RobertaForMaskedLM",
        "hidden_size": 1024,
        "intermediate_size": 4096,
    }
    | {
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "vocab_size": 50_265,
        "type_vocab_size": 1,
    }
    | {"max_position_embeddings": 514},
    ("t5", "11b"): _T5
    | {"d_model": 1024, "d_kv": 128, "d_ff": 65_536, "num_layers": 24, "num_heads": 128},
    ("t5", "small"): _T5
    | {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
}
