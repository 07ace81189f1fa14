"""Families that are no LLaMA, against goldens of torch: logits, gradients, the way in and back, what is refused."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import tokenizers

import research
from research.core.errors import UserError
from research.interop.architecture import choose, config_from, fields_from, fields_of
from research.interop.huggingface import ARCHITECTURES, from_hugging_face, open_hugging_face, write_hugging_face
from research.interop.mapping import find, params_from, reader, tensors_from
from research.interop.safetensors_files import read_header
from research.models.config import HeadConfig, PositionConfig
from research.recipes.convert import convert
from tests.interop import encoders_cases as encoders
from tests.interop.folders import write_folder

# In units of the largest logit, and of a gradient's norm. Measured: up to 5e-6 and 2e-5.
LOGITS, GRADIENTS = 3e-5, 1e-4
NAMES = tuple(encoders.stored())


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_torch(name):
    found, wanted = encoders.ours(name)[0], encoders.golden(name)
    assert np.abs(wanted["logits"]).max() > 0.5
    assert encoders.off_by(found["logits"], wanted["logits"]) < LOGITS


def test_logits_of_the_pooled_classes_equal_torch():
    found, wanted = encoders.ours("bert")[0], encoders.golden("bert")
    assert encoders.off_by(found["classes"], wanted["classes"]) < LOGITS


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_torch(name):
    found, wanted = encoders.ours(name)[0], encoders.golden(name)
    assert encoders.gradients_off_by(found["gradients"], wanted["gradients"]) < GRADIENTS


def changed(config, **changes):
    """The config with `group.field` replaced, a dot written as two underscores."""
    for name, value in changes.items():
        group, _, field = name.rpartition("__")
        if group:
            value = dataclasses.replace(getattr(config, group), **{field: value})
        config = dataclasses.replace(config, **{group or field: value})
    return config


def window(config, width):
    layers = [dataclasses.replace(each, window=each.window and width) for each in config.pattern]
    return dataclasses.replace(config, pattern=tuple(layers))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpt", lambda c: changed(c, mlp__activation="gelu")),
        ("falcon-40b", lambda c: changed(c, norm__placement="pre")),
        ("falcon-rw", lambda c: changed(c, position=PositionConfig(kind="alibi"))),
        ("mpt", lambda c: changed(c, position=PositionConfig(kind="none"))),
        ("roberta", lambda c: changed(c, position__offset=1, max_length=c.max_length + 1)),
        ("modernbert", lambda c: window(c, 4)),
        ("modernbert", lambda c: window(c, 6)),
        ("t5", lambda c: changed(c, attention__scale=None)),
        ("t5", lambda c: changed(c, head__scale=1.0)),
        ("t5", lambda c: changed(c, position__max_distance=140)),
        ("mbart", lambda c: changed(c, scale_embeddings=False)),
        ("marian", lambda c: changed(c, position__halves=False)),
        ("gpt-neo", lambda c: window(c, 7)),
        ("gpt-neo", lambda c: window(c, 9)),
        ("gpt-neo", lambda c: changed(c, pattern=c.pattern[::-1])),
        ("gpt-neo", lambda c: changed(c, attention__scale=None)),
    ],
)
def test_another_model_is_seen_by_the_comparison(name, change):
    architecture, config, tensors = encoders.model(name)
    given, params = encoders.batch(name, config), params_from(architecture, config, tensors)
    words = jax.jit(lambda params: encoders.logits_of(change(config), params, given)[0])(params)
    found = np.asarray(words)[given["weights"] > 0]
    assert encoders.off_by(found, encoders.golden(name)["logits"]) > 5 * LOGITS


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bitwise(name, tmp_path):
    architecture, config, tensors = encoders.model(name)
    config, params = from_hugging_face(write_folder(tmp_path / "in", encoders.stored()[name]["config"], tensors))
    assert config == encoders.model(name)[1]
    chosen, fields = choose(ARCHITECTURES.values(), config, first=architecture.model_type)
    assert chosen is architecture
    assert config_from(architecture, fields) == config
    write_hugging_face(architecture, fields, config, reader(config, params), tmp_path / "out", {"pad": None})
    back = {name: np.asarray(stored) for name, stored in read_header(tmp_path / "out" / "model.safetensors").items()}
    assert encoders.same(back, tensors)
    again, same = from_hugging_face(tmp_path / "out")
    assert again == config
    assert encoders.same(encoders.leaves(same), encoders.leaves(params))


@pytest.mark.parametrize("name", NAMES)
def test_the_architecture_that_is_found_by_itself_holds_the_model(name):
    architecture, config, tensors = encoders.model(name)
    chosen, fields = choose(ARCHITECTURES.values(), config)
    assert config_from(chosen, fields).layers() == config.layers()
    if chosen is architecture:
        assert set(tensors_from(chosen, config, params_from(architecture, config, tensors))) == set(tensors)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_convert_streams_there_and_back(name, tmp_path):
    _, config, tensors = encoders.model(name)
    folder = write_folder(tmp_path / "in", encoders.stored()[name]["config"], tensors)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "tile": 1}, unk_token="[UNK]"))
    words.save(str(folder / "tokenizer.json"))
    convert(str(folder), str(tmp_path / "workdir"), None, None)
    convert(str(tmp_path / "workdir"), str(tmp_path / "out"), "hf", None)
    back = {name: np.asarray(stored) for name, stored in read_header(tmp_path / "out" / "model.safetensors").items()}
    assert encoders.same(back, tensors)
    assert open_hugging_face(tmp_path / "out").config == config
    assert research.load(tmp_path / "workdir").config == config


# What released folders hold that transformers does not write today.


def read(name, fields, tensors):
    """Reads tensors as `open_hugging_face` does, and returns the config and the tensors as they are written."""
    architecture = encoders.model(name)[0]
    config = config_from(architecture, fields_of(architecture, fields, tensors))
    return config, tensors_from(architecture, config, params_from(architecture, config, tensors))


def without(tensors, pattern):
    return {name: value for name, value in tensors.items() if not re.search(pattern, name)}


def renamed(tensors, pattern, replacement):
    return {re.sub(pattern, replacement, name): value for name, value in tensors.items()}


def test_elder_names_of_norms_copies_and_buffers_of_bert_are_read():
    _, config, tensors = encoders.model("bert")
    elder = renamed(tensors, r"LayerNorm\.weight", "LayerNorm.gamma")
    elder = renamed(elder, r"LayerNorm\.bias", "LayerNorm.beta")
    elder["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    elder["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
    elder["bert.embeddings.position_ids"] = np.arange(40)[None]
    # As bert-base-uncased, whose config.json names a class with fewer heads.
    fields = encoders.stored()["bert"]["config"] | {
        "architectures": ["BertForMaskedLM"],
        "position_embedding_type": "absolute",
        "gradient_checkpointing": False,
    }
    found, written = read("bert", fields, elder)
    assert found == config
    assert encoders.same(written, tensors)


def test_encoders_without_head_are_read():
    for name, root, heads in (("bert", "bert", r"^cls\."), ("modernbert", "model", r"^(head|decoder)\.")):
        _, config, tensors = encoders.model(name)
        body = renamed(without(tensors, heads), rf"^{root}\.", "")
        found, written = read(name, encoders.stored()[name]["config"], body)
        assert found.head == HeadConfig(pooler=name == "bert")
        assert dataclasses.replace(found, head=config.head) == config
        assert encoders.same(written, without(tensors, heads))
        assert fields_from(encoders.model(name)[0], found)["architectures"][0].endswith("Model")


def test_a_pooler_without_classes_is_left_out_beside_a_head_of_words():
    _, config, tensors = encoders.model("roberta")
    width = config.embed_dim
    pooler = {"roberta.pooler.dense.weight": np.ones((width, width)), "roberta.pooler.dense.bias": np.ones(width)}
    copy = {"lm_head.decoder.bias": tensors["lm_head.bias"]}
    found, written = read("roberta", encoders.stored()["roberta"]["config"], tensors | pooler | copy)
    assert found == config
    assert encoders.same(written, tensors)


def test_elder_fields_are_read():
    elder = {
        "modernbert": {"global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0, "global_attn_every_n_layers": 3},
        "falcon2-11b": {"rope_theta": 500_042.0, "rope_scaling": None},
        "t5-1.1": {"tie_word_embeddings": False, "n_positions": 512, "output_past": True},
    }
    new = ("rope_parameters", "layer_types", "scale_decoder_outputs", "dense_act_fn", "is_gated_act")
    for name, fields in elder.items():
        architecture, config, _ = encoders.model(name)
        fields = {key: value for key, value in encoders.stored()[name]["config"].items() if key not in new} | fields
        assert config_from(architecture, fields) == config


def test_layers_of_modernbert_are_read_by_name():
    architecture, config, _ = encoders.model("modernbert")
    fields = encoders.stored()["modernbert"]["config"]
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    windows = [layer.window for layer in config_from(architecture, fields | {"layer_types": kinds}).layers()]
    assert windows == [5, None, 5, None]
    with pytest.raises(UserError, match="layer_types"):
        config_from(architecture, fields | {"layer_types": kinds[1:]})
    assert [layer.window for layer in config.layers()] == [None, 5, 5, None]
    assert [layer.attention_norm for layer in config.layers()] == [False, True, True, True]


def test_copies_and_leftovers_of_t5_and_bart_are_read():
    _, config, tensors = encoders.model("t5")
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    more = dict.fromkeys(copies, tensors["shared.weight"])
    more["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.zeros((32, 4), np.float32)
    found, written = read("t5", encoders.stored()["t5"]["config"], tensors | more)
    assert found == config
    assert encoders.same(written, tensors)
    # As bart-base: saved without head, so without the prefix and the bias of the logits.
    _, config, tensors = encoders.model("bart")
    body = without(tensors, "final_logits_bias")
    more = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), tensors["model.shared.weight"])
    fields = encoders.stored()["bart"]["config"] | {"normalize_before": False, "num_beams": 4}
    found, written = read("bart", fields, renamed(body, r"^model\.", "") | more)
    assert found == dataclasses.replace(config, head=HeadConfig())
    assert encoders.same(written, body)


def test_names_without_prefix_and_masks_of_gpt_are_read():
    _, config, tensors = encoders.model("gpt")
    bare = renamed(tensors, r"^transformer\.", "") | {"h.0.attn.bias": np.tril(np.ones((1, 1, 32, 32)))}
    fields = encoders.stored()["gpt"]["config"] | {"n_ctx": 32, "n_special": 40, "predict_special_tokens": True}
    found, written = read("gpt", fields, bare)
    assert found == config
    assert encoders.same(written, tensors)


def test_sinusoids_and_fields_of_a_released_marian_are_read():
    _, config, tensors = encoders.model("marian")
    sinusoids = {f"model.{stack}.embed_positions.weight": np.ones((48, 32)) for stack in ("encoder", "decoder")}
    elder = {"static_position_embeddings": True, "normalize_before": False, "normalize_embedding": False}
    elder |= {"add_bias_logits": False, "bad_words_ids": [[1]], "_num_labels": 3, "num_beams": 6, "max_length": 512}
    found, written = read("marian", encoders.stored()["marian"]["config"] | elder, tensors | sinusoids)
    assert found == config
    assert encoders.same(written, tensors)
    body = without(tensors, "final_logits_bias")
    found, written = read("marian", encoders.stored()["marian"]["config"], renamed(body, r"^model\.", ""))
    assert found == dataclasses.replace(config, head=HeadConfig())
    assert encoders.same(written, body)


def test_masks_and_fields_of_a_released_gpt_neo_are_read():
    _, config, tensors = encoders.model("gpt-neo")
    buffers = {f"transformer.h.0.attn.attention.{name}": np.ones((1, 1, 40, 40)) for name in ("bias", "masked_bias")}
    elder = {"summary_type": "cls_index", "summary_first_dropout": 0.1, "gradient_checkpointing": False}
    found, written = read("gpt-neo", encoders.stored()["gpt-neo"]["config"] | elder, tensors | buffers)
    assert found == config
    assert encoders.same(written, tensors)


def test_the_two_tokenizers_of_marian_are_refused_and_another_one_is_taken(tmp_path):
    _, config, tensors = encoders.model("marian")
    folder = write_folder(tmp_path / "in", encoders.stored()["marian"]["config"], tensors)
    for name, data in {"vocab.json": b'{"</s>": 0}', "source.spm": b"", "target.spm": b""}.items():
        (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=r"merges\.txt cannot be read"):
        convert(str(folder), str(tmp_path / "workdir"), None, None)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "MarianTokenizer"}')
    with pytest.raises(UserError, match="tokenizer_class = 'MarianTokenizer' does more than this file says"):
        convert(str(folder), str(tmp_path / "workdir"), None, None)
    assert not (tmp_path / "workdir").exists()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "tile": 1}, unk_token="</s>"))
    words.save(str(tmp_path / "tokenizer.json"))
    convert(str(folder), str(tmp_path / "workdir"), None, str(tmp_path / "tokenizer.json"))
    assert research.load(tmp_path / "workdir").config == config


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gpt", {"afn": "mish"}, "afn = 'mish' is not supported"),
        ("falcon-7b", {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn = False"),
        ("falcon-7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2"),
        ("falcon-7b", {"multi_query": False, "num_kv_heads": 2}, "num_kv_heads = 2 must be num_attention_heads = 4"),
        ("falcon-7b", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ("mpt", {"attn_config": {"clip_qkv": 6.0}}, "attn_config.clip_qkv = 6.0"),
        ("mpt", {"attn_config": {"alibi": False}}, "attn_config.alibi = False"),
        ("mpt", {"logit_scale": "inv_sqrt_d_model"}, "logit_scale = 'inv_sqrt_d_model' is not supported"),
        ("bert", {"is_decoder": True}, "is_decoder = True is not supported"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ("bert", {"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
        ("roberta", {"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
        ("modernbert", {"classifier_activation": "silu"}, "classifier_activation = 'silu'"),
        ("modernbert", {"global_attn_every_n_layers": 0}, "global_attn_every_n_layers = 0"),
        ("t5", {"feed_forward_proj": "swiglu-silu"}, "feed_forward_proj = 'swiglu-silu'"),
        ("t5", {"is_encoder_decoder": False}, "is_encoder_decoder = False is not supported"),
        ("bart", {"decoder_attention_heads": 8}, "decoder_attention_heads = 8 must equal"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings = False"),
        ("marian", {"decoder_vocab_size": 65}, "decoder_vocab_size = 65 must equal vocab_size = 64"),
        ("marian", {"normalize_embedding": True}, "normalize_embedding = True is not supported: only False is"),
        ("gpt-neo", {"attention_types": [[["global"], 2]]}, "must name num_layers = 3 layers"),
        ("gpt-neo", {"attention_types": [[["global"], 10**12]]}, "must name num_layers = 3 layers"),
        ("gpt-neo", {"attention_types": [[["global", "sparse", "local"], 1]]}, "'sparse' is not supported"),
        ("gpt-neo", {"attention_types": [3]}, "makes no model"),
        ("gpt-neo", {"embed_dropout": 0.1}, "embed_dropout = 0.1 must equal resid_dropout = 0.0"),
    ],
)
def test_a_feature_that_is_not_supported_is_named(name, fields, message):
    with pytest.raises(UserError) as error:
        config_from(encoders.model(name)[0], encoders.stored()[name]["config"] | fields)
    assert message in str(error.value)


def test_a_head_that_no_class_has_is_refused_by_field():
    architecture, config, _ = encoders.model("bert")
    with pytest.raises(UserError, match=r"head\.num_classes"):
        fields_from(architecture, changed(config, head__num_classes=3))
    with pytest.raises(UserError, match=r"head\.scale"):
        fields_from(ARCHITECTURES["t5"], changed(encoders.model("t5")[1], head__scale=0.5))


def test_an_activation_that_an_architecture_has_no_name_for_is_refused_by_field():
    architecture, config, _ = encoders.model("gpt")
    with pytest.raises(UserError, match=r"mlp\.activation"):
        fields_from(architecture, changed(config, mlp__activation="gelu_sigmoid"))


def test_missing_tensors_of_both_stacks_are_named():
    architecture, config, tensors = encoders.model("bart")
    with pytest.raises(UserError) as error:
        find(architecture, config, without(tensors, r"layers\.0\.fc1\.bias"))
    for stack in ("encoder", "decoder"):
        assert f"model.{stack}.layers.0.fc1.bias is missing" in str(error.value)


def test_config_of_a_released_mpt_is_read():
    released = json.loads(
        """{"attn_config": {"alibi": true, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
        "attn_type": "multihead_attention", "attn_uses_sequence_id": false, "clip_qkv": null, "prefix_lm": false,
        "qk_ln": false, "softmax_scale": null}, "d_model": 4096, "emb_pdrop": 0, "embedding_fraction": 1.0,
        "expansion_ratio": 4, "init_config": {"name": "kaiming_normal_"}, "init_device": "cpu", "learned_pos_emb": true,
        "logit_scale": null, "max_seq_len": 2048, "model_type": "mpt", "n_heads": 32, "n_layers": 32, "no_bias": true,
        "norm_type": "low_precision_layernorm", "resid_pdrop": 0, "verbose": 0, "vocab_size": 50432}"""
    )
    config = config_from(ARCHITECTURES["mpt"], released)
    assert (config.position.kind, config.attention.head_dim, config.norm.bias) == ("alibi", 128, False)
