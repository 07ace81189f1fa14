"""Fields of config.json that others leave there: what changes no logit is taken, what might is
named.
"""

import numpy as np
import pytest

from research.core.errors import UserError
from research.interop.architecture import choose, config_from, fields_of
from research.interop.huggingface import ARCHITECTURES, from_hugging_face
from tests.interop import cases, registry
from tests.interop.folders import write_folder

STORED = {name: stored for name, stored in registry.stored().items() if name != registry.MTP}
# One case an architecture.
NAMES = tuple({stored["config"]["model_type"]: name for name, stored in STORED.items()}.values())
HARMLESS = {
    "_attn_implementation": "eager",
    "_attn_implementation_autoset": True,
    "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
    "begin_suppress_tokens": [1, 2],
    "keys_to_ignore_at_inference": ["past_key_values"],
    "num_labels": 3,
    "pruned_heads": {},
    "some_ids": [],
    "temperature": 0.6,
    "transformers.js_config": {"kv_cache_dtype": "fp16"},
    "unsloth_version": "2025.1",
}


def read(name, **fields):
    """The config of a golden case with other fields."""
    stored = STORED[name]
    architecture, fields = ARCHITECTURES[stored["config"]["model_type"]], stored["config"] | fields
    return config_from(
        architecture, fields_of(architecture, fields, cases.weights(stored["tensors"]))
    )


@pytest.mark.parametrize("name", NAMES)
def test_fields_that_change_no_logit_are_taken_and_listed_in_one_line(name, caplog):
    caplog.set_level("INFO", logger="tessera")
    wanted = read(name)
    caplog.clear()
    assert read(name, **HARMLESS) == wanted
    (said,) = [said for said in caplog.messages if "as no logit depends on them" in said]
    listed = set(said.partition(": ")[2].split(", "))
    own = listed - HARMLESS.keys()
    assert listed - own == HARMLESS.keys() - {"pruned_heads", "some_ids"}
    assert own <= STORED[name]["config"].keys()


@pytest.mark.parametrize("name", NAMES)
def test_all_fields_that_might_change_logits_are_in_one_error(name):
    unknown = {"attention_sharpness": 2.0, "heat": 1, "adapter_id": 3}
    with pytest.raises(UserError) as error:
        read(name, **HARMLESS | {"pruned_heads": {"0": [1]}, "vocab_size": -1} | unknown)
    for fault in (
        "pruned_heads = {'0': [1]} is a field of ",
        "attention_sharpness = 2.0 is",
        "heat = 1 is",
        "adapter_id = 3 is",
        "vocab_size = -1 must be",
    ):
        assert fault in str(error.value)
    assert not any(field in str(error.value) for field in ("temperature", "unsloth"))


def test_many_faults_are_cut_after_ten_with_their_count():
    with pytest.raises(UserError) as error:
        read("gpt2-small", **{f"x{i}": "y" * 10**6 for i in range(300)})
    assert str(error.value).endswith("… (300 in all).")
    assert len(str(error.value)) < 3000


def test_fields_of_attention_in_mpt_are_told_apart_as_well():
    attention = STORED["mpt"]["config"]["attn_config"]
    taken = attention | {"_attn_implementation_autoset": True, "pruned_heads": {}}
    assert read("mpt", attn_config=taken) == read("mpt")
    with pytest.raises(
        UserError, match=r"attn_config\.clip_qkv = 6\.0 .*; attn_config\.heat = 2 is not supported"
    ):
        read("mpt", attn_config=attention | {"clip_qkv": 6.0, "heat": 2})


ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        (
            "yarn",
            {"attn_factor": 0.878},
        ),  # as released: transformers reads `attention_factor` alone
        ("yarn", {"finetuned": True, "low_freq_factor": 1.0}),
        ("linear", {"attn_factor": 0.878, "beta_fast": 32.0}),
        ("dynamic", {"attention_factor": 1.5}),
        ("llama3", {"mscale": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    ],
)
def test_fields_of_other_kinds_of_rotary_scaling_are_left_out_with_a_warning(
    kind, left_out, caplog
):
    needed = {
        name: left_out.pop(name) for name in list(left_out) if kind == "llama3" and name != "mscale"
    }
    rope = {**ROPE, **needed, "rope_type": kind}
    plain = read("llama-yarn", rope_parameters=rope)
    caplog.clear()
    assert read("llama-yarn", rope_parameters=rope | left_out) == plain
    (said,) = [said for said in caplog.messages if "does not read it" in said]
    assert all(name in said for name in left_out)


def test_all_unknown_and_missing_fields_of_rotary_scaling_are_in_one_error():
    with pytest.raises(UserError) as error:
        read(
            "llama-yarn",
            rope_parameters={
                "rope_type": "linear",
                "mrope_section": [2],
                "partial_rotary_factor": 0.5,
            },
        )
    for fault in (
        "mrope_section = [2] of",
        "partial_rotary_factor = 0.5 of",
        "factor of rope_type = 'linear' is missing",
    ):
        assert fault in str(error.value)


def test_a_rotary_factor_of_all_of_the_head_is_taken():
    assert read("llama-yarn", partial_rotary_factor=1.0) == read("llama-yarn")
    with pytest.raises(
        UserError, match=r"partial_rotary_factor = 0\.5 is not supported: only 1 is"
    ):
        read("llama-yarn", partial_rotary_factor=0.5)


def without(tensors, name):
    return {each: value for each, value in tensors.items() if each != name}


@pytest.mark.parametrize(
    ("fields", "scaled"),
    [
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": True}, True),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, True),
        # Until transformers 5 one field said both.
        ({"tie_word_embeddings": True, "scale_decoder_outputs": None}, True),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": None}, False),
    ],
)
def test_tied_embeddings_and_scaled_outputs_of_a_t5_are_two_facts(fields, scaled, tmp_path):
    stored = STORED["t5-1.1"]
    fields, tensors = stored["config"] | fields, cases.weights(stored["tensors"])
    for tied, held in (
        (False, tensors),
        (True, without(tensors, "lm_head.weight")),
        (True, tensors | {"lm_head.weight": tensors["shared.weight"]}),
        (True, without(tensors, "shared.weight")),
    ):
        config, params = from_hugging_face(write_folder(tmp_path / str(tied), fields, held))
        assert config.tied_embeddings == tied
        assert config.head.scale == pytest.approx(32**-0.5 if scaled else 1.0)
        assert ("unembed" in params) == (not tied)
        architecture, written = choose(ARCHITECTURES.values(), config, first="t5")
        assert architecture.model_type == "t5"
        assert config_from(architecture, written) == config


def test_an_mt5_is_never_scaled():
    tensors = without(cases.weights(STORED["mt5"]["tensors"]), "lm_head.weight")
    fields = fields_of(ARCHITECTURES["mt5"], STORED["mt5"]["config"], tensors)
    config = config_from(ARCHITECTURES["mt5"], fields)
    assert (config.tied_embeddings, config.head.scale) == (True, 1.0)


HOSTILE = (
    True,
    -1,
    0,
    10**30,
    float("nan"),
    float("inf"),
    "x" * 10**5,
    "\n",
    [],
    {},
    [[]],
    {"a": {}},
    None,
    0.5,
    [0],
)


@pytest.mark.parametrize("name", NAMES)
def test_any_value_of_any_field_makes_a_model_or_one_short_line(name):
    stored = STORED[name]["config"]
    architecture = ARCHITECTURES[stored["model_type"]]
    fields = {**architecture.defaults, **stored}
    for number, field in enumerate(fields):
        for value in HOSTILE[number % 3 :: 3]:
            said = ""
            try:
                config_from(architecture, stored | {field: value})
            except UserError as error:
                said = str(error)
            assert "\n" not in said
            assert len(said) < 1500, field


def test_numbers_that_are_none_are_refused():
    for value in (np.nan, np.inf):
        with pytest.raises(UserError, match=r"norm\.epsilon = \w+ must be a finite number"):
            read("llama-yarn", rms_norm_eps=value)
