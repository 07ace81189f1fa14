"""Families that are no LLaMA: what released folders hold that transformers does not write today,
what is refused.
"""

import dataclasses
import json
import re

import numpy as np
import pytest
import tokenizers

import research
from research.core.errors import UserError
from research.interop.architecture import config_from, fields_from, fields_of
from research.interop.huggingface import ARCHITECTURES, open_hugging_face
from research.interop.mapping import match_tensors, params_from, tensors_from
from research.interop.safetensors_files import read_header
from research.models.config import HeadConfig
from research.recipes.convert import convert
from tests.interop import registry
from tests.interop.folders import write_folder


def parts(name):
    """The architecture, the model and the tensors of a case."""
    case = registry.model(name)
    return case.architecture, case.config, case.tensors


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_convert_streams_there_and_back(name, tmp_path):
    _, config, tensors = parts(name)
    folder = write_folder(tmp_path / "in", registry.stored()[name]["config"], tensors)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "tile": 1}, unk_token="[UNK]")
    )
    words.save(str(folder / "tokenizer.json"))
    convert(str(folder), str(tmp_path / "workdir"), None, None)
    convert(str(tmp_path / "workdir"), str(tmp_path / "out"), "hf", None)
    back = {
        name: np.asarray(stored)
        for name, stored in read_header(tmp_path / "out" / "model.safetensors").items()
    }
    assert registry.same(back, tensors)
    assert open_hugging_face(tmp_path / "out").config == config
    assert research.load(tmp_path / "workdir").config == config


# What released folders hold that transformers does not write today.


def read(name, fields, tensors):
    """Reads tensors as `open_hugging_face` does, and returns the config and the tensors as they are
    written.
    """
    architecture = parts(name)[0]
    config = config_from(architecture, fields_of(architecture, fields, tensors))
    return config, tensors_from(architecture, config, params_from(architecture, config, tensors))


def without(tensors, pattern):
    return {name: value for name, value in tensors.items() if not re.search(pattern, name)}


def renamed(tensors, pattern, replacement):
    return {re.sub(pattern, replacement, name): value for name, value in tensors.items()}


def test_older_names_of_norms_copies_and_buffers_of_bert_are_read():
    _, config, tensors = parts("bert")
    older = renamed(tensors, r"LayerNorm\.weight", "LayerNorm.gamma")
    older = renamed(older, r"LayerNorm\.bias", "LayerNorm.beta")
    older["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    older["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
    older["bert.embeddings.position_ids"] = np.arange(40)[None]
    # As bert-base-uncased, whose config.json names a class with fewer heads.
    fields = registry.stored()["bert"]["config"] | {
        "architectures": ["BertForMaskedLM"],
        "position_embedding_type": "absolute",
        "gradient_checkpointing": False,
    }
    found, written = read("bert", fields, older)
    assert found == config
    assert registry.same(written, tensors)


def test_encoders_without_head_are_read():
    for name, root, heads in (
        ("bert", "bert", r"^cls\."),
        ("modernbert", "model", r"^(head|decoder)\."),
    ):
        _, config, tensors = parts(name)
        body = renamed(without(tensors, heads), rf"^{root}\.", "")
        found, written = read(name, registry.stored()[name]["config"], body)
        assert found.head == HeadConfig(pooler=name == "bert")
        assert dataclasses.replace(found, head=config.head) == config
        assert registry.same(written, without(tensors, heads))
        assert fields_from(parts(name)[0], found)["architectures"][0].endswith("Model")


def test_a_pooler_without_classes_is_left_out_beside_a_head_of_words():
    _, config, tensors = parts("roberta")
    width = config.embed_dim
    pooler = {
        "roberta.pooler.dense.weight": np.ones((width, width)),
        "roberta.pooler.dense.bias": np.ones(width),
    }
    copy = {"lm_head.decoder.bias": tensors["lm_head.bias"]}
    found, written = read(
        "roberta", registry.stored()["roberta"]["config"], tensors | pooler | copy
    )
    assert found == config
    assert registry.same(written, tensors)


def test_older_fields_are_read():
    older = {
        "modernbert": {
            "global_rope_theta": 160_000.0,
            "local_rope_theta": 10_000.0,
            "global_attn_every_n_layers": 3,
        },
        "falcon2-11b": {"rope_theta": 500_042.0, "rope_scaling": None},
        "t5-1.1": {"tie_word_embeddings": False, "n_positions": 512, "output_past": True},
    }
    new = (
        "rope_parameters",
        "layer_types",
        "scale_decoder_outputs",
        "dense_act_fn",
        "is_gated_act",
    )
    for name, fields in older.items():
        architecture, config, _ = parts(name)
        fields = {
            key: value for key, value in registry.stored()[name]["config"].items() if key not in new
        } | fields
        assert config_from(architecture, fields) == config


def test_layers_of_modernbert_are_read_by_name():
    architecture, config, _ = parts("modernbert")
    fields = registry.stored()["modernbert"]["config"]
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    windows = [
        layer.window
        for layer in config_from(architecture, fields | {"layer_types": kinds}).layers()
    ]
    assert windows == [5, None, 5, None]
    with pytest.raises(UserError, match="layer_types"):
        config_from(architecture, fields | {"layer_types": kinds[1:]})
    assert [layer.window for layer in config.layers()] == [None, 5, 5, None]
    assert [layer.attention_norm for layer in config.layers()] == [False, True, True, True]


def test_copies_and_leftovers_of_t5_and_bart_are_read():
    _, config, tensors = parts("t5")
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    more = dict.fromkeys(copies, tensors["shared.weight"])
    more["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.zeros(
        (32, 4), np.float32
    )
    found, written = read("t5", registry.stored()["t5"]["config"], tensors | more)
    assert found == config
    assert registry.same(written, tensors)
    # As bart-base: saved without head, so without the prefix and the bias of the logits.
    _, config, tensors = parts("bart")
    body = without(tensors, "final_logits_bias")
    more = dict.fromkeys(
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        tensors["model.shared.weight"],
    )
    fields = registry.stored()["bart"]["config"] | {"normalize_before": False, "num_beams": 4}
    found, written = read("bart", fields, renamed(body, r"^model\.", "") | more)
    assert found == dataclasses.replace(config, head=HeadConfig())
    assert registry.same(written, body)


def test_names_without_prefix_and_masks_of_gpt_are_read():
    _, config, tensors = parts("gpt")
    bare = renamed(tensors, r"^transformer\.", "") | {
        "h.0.attn.bias": np.tril(np.ones((1, 1, 32, 32)))
    }
    fields = registry.stored()["gpt"]["config"] | {
        "n_ctx": 32,
        "n_special": 40,
        "predict_special_tokens": True,
    }
    found, written = read("gpt", fields, bare)
    assert found == config
    assert registry.same(written, tensors)


def test_sinusoids_and_fields_of_a_released_marian_are_read():
    _, config, tensors = parts("marian")
    sinusoids = {
        f"model.{stack}.embed_positions.weight": np.ones((48, 32))
        for stack in ("encoder", "decoder")
    }
    older = {
        "static_position_embeddings": True,
        "normalize_before": False,
        "normalize_embedding": False,
    }
    older |= {
        "add_bias_logits": False,
        "bad_words_ids": [[1]],
        "_num_labels": 3,
        "num_beams": 6,
        "max_length": 512,
    }
    found, written = read(
        "marian", registry.stored()["marian"]["config"] | older, tensors | sinusoids
    )
    assert found == config
    assert registry.same(written, tensors)
    body = without(tensors, "final_logits_bias")
    found, written = read(
        "marian", registry.stored()["marian"]["config"], renamed(body, r"^model\.", "")
    )
    assert found == dataclasses.replace(config, head=HeadConfig())
    assert registry.same(written, body)


def test_masks_and_fields_of_a_released_gpt_neo_are_read():
    _, config, tensors = parts("gpt-neo")
    buffers = {
        f"transformer.h.0.attn.attention.{name}": np.ones((1, 1, 40, 40))
        for name in ("bias", "masked_bias")
    }
    older = {
        "summary_type": "cls_index",
        "summary_first_dropout": 0.1,
        "gradient_checkpointing": False,
    }
    found, written = read(
        "gpt-neo", registry.stored()["gpt-neo"]["config"] | older, tensors | buffers
    )
    assert found == config
    assert registry.same(written, tensors)


def test_the_two_tokenizers_of_marian_are_refused_and_another_one_is_taken(tmp_path):
    _, config, tensors = parts("marian")
    folder = write_folder(tmp_path / "in", registry.stored()["marian"]["config"], tensors)
    for name, data in {"vocab.json": b'{"</s>": 0}', "source.spm": b"", "target.spm": b""}.items():
        (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=r"merges\.txt cannot be read"):
        convert(str(folder), str(tmp_path / "workdir"), None, None)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "MarianTokenizer"}')
    with pytest.raises(
        UserError, match="tokenizer_class = 'MarianTokenizer' does more than this file says"
    ):
        convert(str(folder), str(tmp_path / "workdir"), None, None)
    assert not (tmp_path / "workdir").exists()
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"</s>": 0, "tile": 1}, unk_token="</s>")
    )
    words.save(str(tmp_path / "tokenizer.json"))
    convert(str(folder), str(tmp_path / "workdir"), None, str(tmp_path / "tokenizer.json"))
    assert research.load(tmp_path / "workdir").config == config


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gpt", {"afn": "mish"}, "afn = 'mish' is not supported"),
        (
            "falcon-7b",
            {"new_decoder_architecture": True, "parallel_attn": False},
            "parallel_attn = False",
        ),
        ("falcon-7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2"),
        (
            "falcon-7b",
            {"multi_query": False, "num_kv_heads": 2},
            "num_kv_heads = 2 must be num_attention_heads = 4",
        ),
        (
            "falcon-7b",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type = 'dynamic'",
        ),
        ("mpt", {"attn_config": {"clip_qkv": 6.0}}, "attn_config.clip_qkv = 6.0"),
        ("mpt", {"attn_config": {"alibi": False}}, "attn_config.alibi = False"),
        (
            "mpt",
            {"logit_scale": "inv_sqrt_d_model"},
            "logit_scale = 'inv_sqrt_d_model' is not supported",
        ),
        ("bert", {"is_decoder": True}, "is_decoder = True is not supported"),
        (
            "bert",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type = 'relative_key'",
        ),
        ("bert", {"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
        ("roberta", {"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
        ("modernbert", {"classifier_activation": "silu"}, "classifier_activation = 'silu'"),
        ("modernbert", {"global_attn_every_n_layers": 0}, "global_attn_every_n_layers = 0"),
        ("t5", {"feed_forward_proj": "swiglu-silu"}, "feed_forward_proj = 'swiglu-silu'"),
        ("t5", {"is_encoder_decoder": False}, "is_encoder_decoder = False is not supported"),
        ("bart", {"decoder_attention_heads": 8}, "decoder_attention_heads = 8 must equal"),
        (
            "marian",
            {"share_encoder_decoder_embeddings": False},
            "share_encoder_decoder_embeddings = False",
        ),
        (
            "marian",
            {"decoder_vocab_size": 65},
            "decoder_vocab_size = 65 must equal vocab_size = 64",
        ),
        (
            "marian",
            {"normalize_embedding": True},
            "normalize_embedding = True is not supported: only False is",
        ),
        ("gpt-neo", {"attention_types": [[["global"], 2]]}, "must name num_layers = 3 layers"),
        ("gpt-neo", {"attention_types": [[["global"], 10**12]]}, "must name num_layers = 3 layers"),
        (
            "gpt-neo",
            {"attention_types": [[["global", "sparse", "local"], 1]]},
            "'sparse' is not supported",
        ),
        ("gpt-neo", {"attention_types": [3]}, "makes no model"),
        ("gpt-neo", {"embed_dropout": 0.1}, "embed_dropout = 0.1 must equal resid_dropout = 0.0"),
    ],
)
def test_a_feature_that_is_not_supported_is_named(name, fields, message):
    with pytest.raises(UserError) as error:
        config_from(parts(name)[0], registry.stored()[name]["config"] | fields)
    assert message in str(error.value)


def test_a_head_that_no_class_has_is_refused_by_field():
    architecture, config, _ = parts("bert")
    with pytest.raises(UserError, match=r"head\.num_classes"):
        fields_from(architecture, registry.changed(config, {"head.num_classes": 3}))
    with pytest.raises(UserError, match=r"head\.scale"):
        fields_from(ARCHITECTURES["t5"], registry.changed(parts("t5")[1], {"head.scale": 0.5}))


def test_an_activation_that_an_architecture_has_no_name_for_is_refused_by_field():
    architecture, config, _ = parts("gpt")
    with pytest.raises(UserError, match=r"mlp\.activation"):
        fields_from(architecture, registry.changed(config, {"mlp.activation": "gelu_sigmoid"}))


def test_missing_tensors_of_both_stacks_are_named():
    architecture, config, tensors = parts("bart")
    with pytest.raises(UserError) as error:
        match_tensors(architecture, config, without(tensors, r"layers\.0\.fc1\.bias"))
    for stack in ("encoder", "decoder"):
        assert f"model.{stack}.layers.0.fc1.bias is missing" in str(error.value)


def test_config_of_a_released_mpt_is_read():
    released = json.loads(
        """{"attn_config": {"alibi": true, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop":
        0, "attn_type": "multihead_attention", "attn_uses_sequence_id": false, "clip_qkv": null,
        "prefix_lm": false, "qk_ln": false, "softmax_scale": null}, "d_model": 4096, "emb_pdrop":
        0, "embedding_fraction": 1.0, "expansion_ratio": 4, "init_config": {"name":
        "kaiming_normal_"}, "init_device": "cpu", "learned_pos_emb": true, "logit_scale": null,
        "max_seq_len": 2048, "model_type": "mpt", "n_heads": 32, "n_layers": 32, "no_bias": true,
        "norm_type": "low_precision_layernorm", "resid_pdrop": 0, "verbose": 0, "vocab_size":
        50432}"""
    )
    config = config_from(ARCHITECTURES["mpt"], released)
    assert (config.position.kind, config.attention.head_dim, config.norm.bias) == (
        "alibi",
        128,
        False,
    )
