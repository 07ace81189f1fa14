"""Every id that ends a text is found in a folder's two files, and written again."""

import json

import pytest

from research.core.errors import UserError
from research.interop.end_tokens import end_ids_of, generation_config, read_end_ids


@pytest.mark.parametrize(
    ("config", "generation", "found"),
    [
        ({"eos_token_id": 1}, None, (1,)),
        ({"eos_token_id": [1, 106]}, {"eos_token_id": 1}, (1, 106)),  # Gemma 3
        (
            {"eos_token_id": 128001},
            {"eos_token_id": [128001, 128008, 128009]},
            (128001, 128008, 128009),
        ),  # LLaMA 3.1
        (
            {"eos_token_id": 32000},
            {"eos_token_id": [32000, 32001, 32007]},
            (32000, 32001, 32007),
        ),  # Phi-3
        (
            {"eos_token_id": 200002},
            {"eos_token_id": [200002, 199999, 200012]},
            (200002, 199999, 200012),
        ),  # gpt-oss
        ({"eos_token_id": 7}, {"eos_token_id": [5, 7, 6]}, (7, 5, 6)),  # those of config.json first
        ({"eos_token_id": None}, {"temperature": 0.6}, ()),
        ({}, {"eos_token_id": [-1, 2, 2]}, (2,)),
    ],
)
def test_end_ids_of_both_files_are_read(tmp_path, config, generation, found):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_end_ids(tmp_path, config) == found


@pytest.mark.parametrize(
    "value", [1.5, "2", True, [None], [[1]], float("inf"), 2**63, {"id": 1}, list(range(300))]
)
def test_what_is_no_id_is_refused(value):
    with pytest.raises(UserError, match="eos_token_id"):
        end_ids_of({"eos_token_id": value})


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '"a"'])
def test_a_file_that_is_no_object_is_refused_by_name(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"generation_config\.json"):
        read_end_ids(tmp_path, {})


def test_a_generation_config_says_what_config_says_of_tokens():
    fields = {
        "eos_token_id": [2, 3],
        "bos_token_id": None,
        "decoder_start_token_id": 0,
        "hidden_size": 8,
    }
    assert json.loads(generation_config(fields)) == {
        "eos_token_id": [2, 3],
        "decoder_start_token_id": 0,
    }
