"""Tokenizer files that somebody made to break what reads them are one short line."""

import json
import random
import time

import pytest

from research.core.errors import UserError
from research.data.tokenizers import TokenizerConfig, build, exports, folders, load
from research.data.tokenizers.pieces import SentencePieceTokenizer

TEXTS = ["the cat sat on the mat, naïve 12 x == y\n" * 3 + f"word{i % 7} {i}" for i in range(60)]
DEEP = "[" * 100_000 + "]" * 100_000
ADDED = {
    "content": "<x>",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}
PIECES = {"tokenizer_class": "T5Tokenizer"}


@pytest.fixture(scope="module")
def model() -> bytes:
    return build(TokenizerConfig(kind="unigram", vocab_size=400), TEXTS).files()[
        "sentencepiece.model"
    ]


@pytest.fixture(scope="module")
def whole() -> dict:
    return json.loads(exports.to_tokenizer_json(build(TokenizerConfig(kind="bytes"), ())))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"extra_ids": 10**8}, "extra_ids = 100000000 is not a count up to 10000"),
        ({"extra_ids": 2**63}, "extra_ids = 9223372036854775808 is not a count"),
        ({"extra_ids": True}, "extra_ids = True is not a count"),
        (
            {"additional_special_tokens": 2147483648},
            "additional_special_tokens = 2147483648 is no list of tokens",
        ),
        ({"extra_special_tokens": "x"}, "extra_special_tokens = 'x' is no list of tokens"),
        (
            {"added_tokens_decoder": {"Infinity": {"content": "<x>"}}},
            "added tokens are not readable",
        ),
        ({"added_tokens_decoder": 3}, "added tokens are not readable"),
    ],
)
def test_settings_beside_a_model_are_refused_at_once(tmp_path, model, settings, said):
    (tmp_path / "spiece.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(PIECES | settings))
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        folders.from_folder(tmp_path)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("added_tokens.json", '{"<x>": Infinity}'),
        ("added_tokens.json", '{"<x>": NaN}'),
        ("added_tokens.json", DEEP),
        ("tokenizer_config.json", DEEP),
        ("special_tokens_map.json", DEEP),
        ("config.json", DEEP),
        ("tokenizer.json", DEEP),
    ],
)
def test_json_that_is_no_tokenizer_is_refused(tmp_path, model, name, text):
    (tmp_path / "spiece.model").write_bytes(model)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        folders.from_folder(tmp_path)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("i", [float("inf"), float("nan"), 2**63, -1, "1", None, 1.5, True])
def test_an_added_token_without_a_whole_id_is_refused(tmp_path, whole, i):
    content = whole | {"added_tokens": [*whole["added_tokens"], ADDED | {"id": i}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer\.json"):
        folders.from_folder(tmp_path)


def outcome(model: bytes) -> str:
    """What is said of a model, or that it is read and written."""
    try:
        tokenizer = SentencePieceTokenizer(model)
        tokenizer.encode("the cat <mask> é")
        exports.to_tokenizer_json(tokenizer)
    except UserError as error:
        return str(error)
    return "read"


def test_a_model_with_a_flipped_bit_is_read_or_refused(model):
    rng = random.Random(0)
    said = []
    for _ in range(120):
        damaged = bytearray(model)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        said.append(outcome(bytes(damaged)))
    assert 0 < said.count("read") < 120
    assert not [text for text in said if "\n" in text]
    # The library's own message of this one is no UTF-8.
    assert outcome(model.replace(b"<0x7F>", b"<0x7F\xbe")) != "read"


@pytest.mark.parametrize("spelt", ["a b", "x:1", "$A", "x y:1"])
@pytest.mark.parametrize("role", ["cls_token", "sep_token"])
def test_a_special_token_of_any_spelling_is_one_token(tmp_path, role, spelt):
    specials = {"cls_token": "[CLS]", "sep_token": "[SEP]"} | {role: spelt}
    (tmp_path / "vocab.txt").write_text("\n".join(["[UNK]", *specials.values(), "tiles"]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(specials))
    assert folders.from_folder(tmp_path).encode_source("tiles") == [1, 3, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"options": {"sentinels": 10**8}},
        {"options": {"other": 1}},
        {"options": 3},
        {"files": 3},
        {"further_end_ids": 3},
        {"prompt_frame": [[1], [2], [3]]},
        None,
    ],
)
def test_a_descriptor_that_was_changed_is_refused(tmp_path, changes):
    build(TokenizerConfig(kind="bytes"), ()).save(tmp_path)
    path = tmp_path / "descriptor.json"
    descriptor = json.loads(path.read_text())
    path.write_text(DEEP if changes is None else json.dumps(descriptor | changes))
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("kind", [1], "kind = [1] must be a string."),
        ("files", {"a": 1}, "files.a = 1 must be a string."),
        ("options", [], "options = [] must be a group of fields."),
        ("further_end_ids", "ab", "further_end_ids = 'ab' must be a list."),
        ("further_end_ids", [-1], "further_end_ids = [-1]: -1 must be an id in [0, 16777216)."),
        ("further_end_ids", [1.5], "further_end_ids.0 = 1.5 must be a whole number."),
        ("further_end_ids", [True], "further_end_ids.0 = True must be a whole number."),
        (
            "further_end_ids",
            [10**9],
            "further_end_ids = [1000000000]: 1000000000 must be an id in [0, 16777216).",
        ),
        ("chat_templates", 3, "chat_templates = 3 must be a group of fields."),
        ("chat_templates", {"default": 3}, "chat_templates.default = 3 must be a string."),
        ("named_tokens", [1], "named_tokens = [1] must be a group of fields."),
        ("guarded_tokens", [1], "guarded_tokens.0 = 1 must be a string."),
        ("prompt_frame", [[-1], []], "prompt_frame = [-1]: -1 must be an id in [0, 16777216)."),
    ],
)
def test_a_field_of_another_type_in_a_descriptor_is_named_with_its_file(
    tmp_path, field, value, said
):
    build(TokenizerConfig(kind="bytes"), ()).save(tmp_path)
    path = tmp_path / "descriptor.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert str(caught.value) == f"{path}: {said}"


def test_a_config_with_more_sentinels_than_any_model_has_is_refused():
    with pytest.raises(
        UserError, match=r"sentinels = 100000000 must be a whole number in \[0, 10000\]"
    ):
        TokenizerConfig(kind="bytes", sentinels=10**8)
