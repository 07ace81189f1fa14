"""The `config.json` that families were released with, in the words of their time, are their
presets.
"""

import dataclasses

import pytest

from research.core import config as configs
from research.interop.architecture import choose, config_from, fields_from
from research.interop.huggingface import ARCHITECTURES
from research.models.config import ModelConfig
from tests.interop import cases

PRESETS = cases.ROOT / "configs" / "model"
# What says nothing of the logits, in most of them.
COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 106],
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
}


def sizes(layers, width, heads, kv_heads, hidden, vocab_size, length, epsilon, **rest):
    return COMMON | {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": hidden,
        "vocab_size": vocab_size,
        "max_position_embeddings": length,
        "rms_norm_eps": epsilon,
        **rest,
    }


QWEN = {"hidden_act": "silu", "use_sliding_window": False, "rope_theta": 1_000_000.0}
RELEASED = {
    "mistral.py:7b-v0.1": {
        **sizes(32, 4096, 32, 8, 14_336, 32_000, 32_768, 1e-05),
        **{
            "model_type": "mistral",
            "hidden_act": "silu",
            "rope_theta": 10_000.0,
            "sliding_window": 4096,
        },
        "tie_word_embeddings": False,
    },
    "mistral.py:nemo-12b": {
        **sizes(40, 5120, 32, 8, 14_336, 131_072, 131_072, 1e-05),
        **{
            "model_type": "mistral",
            "hidden_act": "silu",
            "rope_theta": 1_000_000.0,
            "sliding_window": None,
        },
        "head_dim": 128,
    },
    "mixtral.py:8x7b": {
        **sizes(32, 4096, 32, 8, 14_336, 32_000, 32_768, 1e-05),
        **{
            "model_type": "mixtral",
            "hidden_act": "silu",
            "rope_theta": 1e6,
            "sliding_window": None,
        },
        **{"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02},
        "output_router_logits": False,
    },
    "gemma.py:2-9b": {
        **sizes(42, 3584, 16, 8, 14_336, 256_000, 8192, 1e-06),
        **{
            "model_type": "gemma2",
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
        },
        **{
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 256,
        },
        **{
            "attention_bias": False,
            "cache_implementation": "hybrid",
            "head_dim": 256,
            "rope_theta": 10_000.0,
        },
        **{"sliding_window": 4096, "sliding_window_size": 4096},
    },
    "gemma.py:3-1b": {
        **sizes(26, 1152, 4, 1, 6912, 262_144, 32_768, 1e-06),
        **{
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
        },
        **{
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "cache_implementation": "hybrid",
        },
        **{"rope_local_base_freq": 10_000, "rope_scaling": None, "rope_theta": 1_000_000},
        **{
            "head_dim": 256,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "attention_bias": False,
        },
    },
    "gemma.py:3-4b": {
        **{"model_type": "gemma3", "boi_token_index": 255_999, "eoi_token_index": 256_000},
        **{"image_token_index": 262_144, "mm_tokens_per_image": 256, "initializer_range": 0.02},
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
        "text_config": {
            **{"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10_240},
            **{"num_hidden_layers": 34, "sliding_window": 1024},
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
    },
    "qwen.py:2.5-7b": {
        **sizes(28, 3584, 28, 4, 18_944, 152_064, 131_072, 1e-06, **QWEN),
        **{
            "model_type": "qwen2",
            "max_window_layers": 28,
            "sliding_window": 131_072,
            "use_mrope": False,
        },
        "tie_word_embeddings": False,
    },
    "qwen.py:3-0.6b": {
        **sizes(28, 1024, 16, 8, 3072, 151_936, 32_768, 1e-06, **QWEN),
        **{
            "model_type": "qwen3",
            "max_window_layers": 28,
            "sliding_window": None,
            "rope_scaling": None,
        },
        **{"attention_bias": False, "head_dim": 128, "tie_word_embeddings": True},
    },
    "qwen.py:2-57b-a14b": {
        **sizes(28, 3584, 28, 4, 18_944, 151_936, 131_072, 1e-06, **QWEN),
        **{
            "model_type": "qwen2_moe",
            "max_window_layers": 28,
            "sliding_window": 65_536,
            "decoder_sparse_step": 1,
        },
        **{
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2560,
            "norm_topk_prob": False,
        },
        **{
            "shared_expert_intermediate_size": 20_480,
            "router_aux_loss_coef": 0.001,
            "output_router_logits": False,
        },
    },
    "qwen.py:3-30b-a3b": {
        **sizes(48, 2048, 32, 4, 6144, 151_936, 32_768, 1e-06, **QWEN),
        **{
            "model_type": "qwen3_moe",
            "max_window_layers": 48,
            "sliding_window": None,
            "decoder_sparse_step": 1,
        },
        **{
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
        },
        **{"head_dim": 128, "attention_bias": False, "mlp_only_layers": [], "rope_scaling": None},
    },
    "olmo2.py:7b": {
        **sizes(32, 4096, 32, 32, 11_008, 100_352, 4096, 1e-06),
        **{
            "model_type": "olmo2",
            "hidden_act": "silu",
            "rope_theta": 500_000,
            "rope_scaling": None,
        },
        **{"attention_bias": False, "tie_word_embeddings": False},
    },
    "phi3.py:mini-4k": {
        **sizes(32, 3072, 32, 32, 8192, 32_064, 4096, 1e-05),
        **{
            "model_type": "phi3",
            "hidden_act": "silu",
            "rope_theta": 10_000.0,
            "rope_scaling": None,
        },
        **{
            "sliding_window": 2047,
            "original_max_position_embeddings": 4096,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
        **{"attention_bias": False, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}},
    },
    "gpt_oss.py:20b": {
        **sizes(24, 2880, 64, 8, 2880, 201_088, 131_072, 1e-05),
        **{"model_type": "gpt_oss", "hidden_act": "silu", "head_dim": 64, "attention_bias": True},
        **{
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "experts_per_token": 4,
            "swiglu_limit": 7.0,
        },
        **{"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 12},
        **{"rope_theta": 150_000, "initial_context_length": 4096, "router_aux_loss_coef": 0.9},
        "rope_scaling": {
            **{
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
            "original_max_position_embeddings": 4096,
        },
    },
    "deepseek.py:v3-671b-mtp": {
        **sizes(61, 7168, 128, 128, 18_432, 129_280, 163_840, 1e-06, initializer_range=0.006),
        **{
            "model_type": "deepseek_v3",
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_theta": 10_000,
        },
        **{
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
        },
        **{
            "v_head_dim": 128,
            "first_k_dense_replace": 3,
            "moe_intermediate_size": 2048,
            "moe_layer_freq": 1,
        },
        **{
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
        },
        **{
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
        **{"num_nextn_predict_layers": 1, "ep_size": 1, "tie_word_embeddings": False},
        "rope_scaling": {
            **{
                "type": "yarn",
                "factor": 40,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            "original_max_position_embeddings": 4096,
        },
    },
}


def preset(name):
    if not (PRESETS / name.partition(":")[0]).is_file():
        pytest.skip(f"configs/model has no {name}")
    config = configs.bind(ModelConfig, configs.load_file(str(PRESETS / name)))
    if config.experts is None:
        return config
    # What only training sees is not read.
    trained = {"balance_weight": 0.0, "bias_speed": 0.0, "z_weight": 0.0}
    return dataclasses.replace(config, experts=dataclasses.replace(config.experts, **trained))


@pytest.mark.parametrize("name", RELEASED)
def test_released_config_is_the_preset(name):
    architecture = ARCHITECTURES[RELEASED[name]["model_type"]]
    assert config_from(architecture, RELEASED[name]) == preset(name)


@pytest.mark.parametrize("name", RELEASED)
def test_preset_goes_out_and_comes_back(name):
    model_type = RELEASED[name]["model_type"]
    architecture = ARCHITECTURES["gemma3_text" if model_type == "gemma3" else model_type]
    assert config_from(architecture, fields_from(architecture, preset(name))) == preset(name)


def test_windows_of_some_layers_make_a_mistral_a_ministral():
    architecture, fields = choose(
        ARCHITECTURES.values(), preset("mistral.py:ministral-8b"), first="mistral"
    )
    assert architecture.model_type == "ministral"
    assert config_from(architecture, fields) == preset("mistral.py:ministral-8b")


def test_scalings_have_the_amplitudes_of_their_papers():
    phi = {
        **RELEASED["phi3.py:mini-4k"],
        "max_position_embeddings": 131_072,
        "sliding_window": 262_144,
    }
    phi["rope_scaling"] = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    found = config_from(ARCHITECTURES["phi3"], phi)
    assert found.position.scaling.amplitude == pytest.approx(
        1.1902380714238083
    )  # √(1 + ln 32 / ln 4096)
    assert [layer.window for layer in found.pattern] == [None]
    qwen = RELEASED["qwen.py:3-0.6b"] | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    scaling = config_from(ARCHITECTURES["qwen3"], qwen).position.scaling
    assert scaling.amplitude == pytest.approx(1.138629436111989)  # 0.1 ln 4 + 1
    assert scaling.original_length == 32_768
