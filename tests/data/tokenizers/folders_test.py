"""Every file a Hugging Face folder may hold its tokenizer in gives the ids of an independent
implementation.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tokenizers as hf

from research.core.errors import UserError
from research.data.tokenizers import TokenizerConfig, build, folders, load
from tests.data.tokenizers import make_goldens, references

GOLDENS = json.loads(make_goldens.FILE.read_text(encoding="utf-8"))
SPELT = [
    "[CLS] a [MASK]",
    "<|endoftext|>",
    "</s><pad>",
    "<extra_id_0> <extra_id_99>",
    "[SEP]",
    "[mask]",
]
# What is read of each file, so that the tests stay quick; `references` reads all of it.
CHARACTERS = 600


FORMS = {
    "bert": {"vocab.txt": "tok-bert-uncased/vocab.txt"},
    "gpt2": {"vocab.json": "tok-gpt2/vocab.json", "merges.txt": "tok-gpt2/merges.txt"},
    "t5": {"spiece.model": "tok-t5-base/t5-base.model"},
}
TEMPLATE = "{{ messages[0].content }}\r\n ü"


def folder_of(shared_data, path, family, **settings):
    """A Hugging Face folder with a family's older files."""
    path.mkdir(exist_ok=True)
    for name, source in FORMS[family].items():
        shutil.copy(shared_data / source, path / name)
    if settings:
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def made(shared_data, tmp_path_factory):
    """The tokenizer of each family's older files."""
    settings = {"chat_template": TEMPLATE, "model_max_length": 512}
    classes = {"bert": {}, "gpt2": {}, "t5": {"tokenizer_class": "T5Tokenizer"}}
    path = tmp_path_factory.mktemp("families")
    return {
        name: folders.from_folder(
            folder_of(shared_data, path / name, name, **settings, **classes[name])
        )
        for name in FORMS
    }


@pytest.fixture(scope="module")
def real_texts(shared_data):
    return list(references.texts(shared_data, CHARACTERS))


@pytest.mark.parametrize("family", [*FORMS])
def test_hard_texts_have_the_golden_ids(made, family):
    for text, ids in zip(GOLDENS["texts"], GOLDENS[family], strict=True):
        assert made[family].encode(text) == ids, text


@pytest.mark.parametrize(
    ("golden", "settings"),
    [
        ("bert_cased", {"do_lower_case": False, "tokenize_chinese_chars": False}),
        ("bert_accents", {"strip_accents": False}),
    ],
)
def test_the_settings_of_bert_are_read(shared_data, tmp_path, golden, settings):
    tokenizer = folders.from_folder(folder_of(shared_data, tmp_path / "bert", "bert", **settings))
    found = [tokenizer.encode(text) for text in GOLDENS["texts"]]
    assert found == GOLDENS[golden]
    assert found != GOLDENS["bert"]  # the control: these texts can tell


@pytest.mark.live
@pytest.mark.parametrize("family", [*FORMS])
def test_real_texts_have_the_ids_of_the_reference(shared_data, made, real_texts, family):
    if family == "bert":
        pytest.importorskip("transformers")
        reference = references.bert(shared_data / "tok-bert-uncased" / "vocab.txt")
    elif family == "gpt2":
        pytest.importorskip("regex")
        reference = references.gpt2(shared_data / "tok-gpt2")
    else:
        reference = references.sentence_pieces(shared_data / "tok-t5-base" / "t5-base.model")
    compared = 0
    for name, blocks in real_texts:
        count, different = references.compare(made[family], reference, blocks)
        compared += count
        assert not different, (name, different[:1])
    assert compared > 10_000


def test_gpt2_from_its_vocabulary_is_gpt2_from_its_tokenizer_json(shared_data, made):
    built, given = (
        made["gpt2"],
        build(TokenizerConfig(kind="huggingface", path=str(shared_data / "tok-gpt2")), ()),
    )
    for text in [*GOLDENS["texts"], *SPELT]:
        assert built.encode(text) == given.encode(text)
    for name in (
        "vocab_size",
        "bos_id",
        "eos_id",
        "pad_id",
        "unk_id",
        "mask_id",
        "sentinel_ids",
        "control_tokens",
    ):
        assert getattr(built, name) == getattr(given, name), name


def test_bert_has_its_control_ids(made):
    tokenizer = made["bert"]
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id) == (
        30522,
        0,
        100,
        103,
    )
    assert tokenizer.frame(np.array([7592], np.int32)).tolist() == [101, 7592, 102]
    assert tokenizer.decode([101, 7592, 103, 102, 0]) == "hello [MASK]"
    assert tokenizer.sentinel_ids == ()
    assert tokenizer.encode("x" * 101) == [tokenizer.unk_id]
    assert tokenizer.unk_id not in tokenizer.encode("x" * 100)


def test_t5_has_its_sentinels(shared_data, made):
    tokenizer = made["t5"]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        32100,
        None,
        1,
        0,
    )
    assert tokenizer.sentinel_ids == tuple(range(32099, 31999, -1))
    assert tokenizer.mask_id is None
    assert tokenizer.frame(np.array([8774], np.int32)).tolist() == [8774, 1]
    ids = [32099, *tokenizer.encode("Hello there"), 32098, *tokenizer.encode("you"), 1]
    assert tokenizer.decode(ids) == "<extra_id_0> Hello there<extra_id_1> you"
    path = str(shared_data / "tok-t5-base" / "t5-base.model")
    named = build(TokenizerConfig(kind="sentencepiece", path=path, sentinels=7), ())
    assert named.sentinel_ids == tuple(range(32006, 31999, -1))
    assert build(TokenizerConfig(kind="sentencepiece", path=path), ()).sentinel_ids == ()


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"extra_ids": 3}, 3),
        ({"additional_special_tokens": ["<extra_id_0>", "<extra_id_1>"]}, 2),
        ({"legacy": True}, 0),
    ],
)
def test_the_files_tell_how_many_sentinels_there_are(shared_data, tmp_path, settings, count):
    tokenizer = folders.from_folder(folder_of(shared_data, tmp_path / "t5", "t5", **settings))
    assert (tokenizer.vocab_size, len(tokenizer.sentinel_ids)) == (32000 + count, count)


def test_roberta_files_give_its_tokens_and_its_prefix_space(shared_data, tmp_path):
    """The byte-level form with the special tokens of RoBERTa and BART, of which `<mask>` takes the
    space before it.
    """
    names = {
        "bos": "<s>",
        "eos": "</s>",
        "sep": "</s>",
        "cls": "<s>",
        "unk": "<unk>",
        "pad": "<pad>",
    }
    ids = json.loads((shared_data / "tok-gpt2" / "vocab.json").read_text())
    del ids["<|endoftext|>"]
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    ids = (
        {name: i for i, name in enumerate(special)}
        | {name: i + 4 for name, i in ids.items()}
        | {"<mask>": 50260}
    )
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    shutil.copy(shared_data / "tok-gpt2" / "merges.txt", tmp_path / "merges.txt")
    tokens = {f"{role}_token": name for role, name in names.items()}
    mask = {
        "content": "<mask>",
        "lstrip": True,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
    }
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens | {"mask_token": mask}))
    plain = folders.from_folder(tmp_path)
    assert (plain.bos_id, plain.pad_id, plain.eos_id, plain.unk_id, plain.mask_id) == (
        0,
        1,
        2,
        3,
        50260,
    )
    reference = references.gpt2(shared_data / "tok-gpt2") if pytest.importorskip("regex") else None
    for text in GOLDENS["texts"][1:]:
        assert plain.encode(text) == [i + 4 for i in reference(text)]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": True}))
    assert folders.from_folder(tmp_path).encode("Hello") == plain.encode(" Hello")
    library = hf.Tokenizer.from_str(plain.files()["tokenizer.json"].decode())
    assert library.encode("a <mask>").ids == [0, *plain.encode("a"), 50260, 2]
    assert library.encode("a", "b").ids == [0, *plain.encode("a"), 2, 2, *plain.encode("b"), 2]


@pytest.mark.parametrize("family", [*FORMS])
def test_text_that_spells_control_tokens_is_text(made, family):
    tokenizer = made[family]
    control = set(tokenizer.control_tokens.values()) - {tokenizer.unk_id}
    assert control
    for text in [*SPELT, *tokenizer.control_tokens]:
        assert not control & set(tokenizer.encode(text)), text
    with pytest.raises(UserError, match="character 1"):
        tokenizer.encode("a\ud800")


def test_a_unigram_tokenizer_json_takes_no_control_piece_out_of_text(made, tmp_path):
    """T5's own has `</s>` among its pieces, and the library finds it there."""
    content = json.loads(folders.to_hugging_face_files(made["t5"])["tokenizer.json"])
    written = json.dumps(
        content | {"pre_tokenizer": None}
    ).encode()  # what keeps the library from it in our files
    (tmp_path / "tokenizer.json").write_bytes(written)
    tokenizer = folders.from_folder(tmp_path)
    plain = hf.Tokenizer.from_str(written.decode())
    plain.encode_special_tokens = True
    assert 1 in plain.encode("a</s>").ids[:-1]  # the control; the last one is put there
    for text in SPELT:
        assert tokenizer.encode(text) == made["t5"].encode(text)
    assert tokenizer.sentinel_ids == made["t5"].sentinel_ids


@pytest.mark.parametrize("family", [*FORMS])
def test_a_saved_tokenizer_keeps_what_its_folder_said(made, tmp_path, family):
    tokenizer = made[family]
    tokenizer.save(tmp_path)
    loaded = load(tmp_path)
    assert loaded.digest() == tokenizer.digest()
    assert loaded.chat_templates == {"default": TEMPLATE}
    assert [loaded.encode(text) for text in SPELT] == [tokenizer.encode(text) for text in SPELT]
    for name in (
        "vocab_size",
        "bos_id",
        "eos_id",
        "pad_id",
        "unk_id",
        "mask_id",
        "sentinel_ids",
        "control_tokens",
    ):
        assert getattr(loaded, name) == getattr(tokenizer, name), name


def test_descriptors_from_before_masks_and_sentinels_load(tmp_path):
    model = build(TokenizerConfig(kind="bytes"), ())
    model.save(tmp_path)
    (tmp_path / "descriptor.json").write_text(
        json.dumps({"kind": "bytes", "options": {}, "files": {}})
    )
    assert load(tmp_path).encode("a") == [97]


def test_chat_templates_are_found_in_every_place(tmp_path):
    def templates(**settings):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return folders.read_settings(tmp_path).chat_templates

    assert templates() == {}
    assert templates(chat_template="a") == {"default": "a"}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert templates(chat_template=named) == {"default": "a", "tool_use": "b"}
    (tmp_path / "chat_templates").mkdir()
    (tmp_path / "chat_templates" / "tool_use.jinja").write_text(
        "of a file"
    )  # which comes before the config's
    assert templates(chat_template=named) == {"default": "a", "tool_use": "of a file"}
    (tmp_path / "chat_templates" / "tool_use.jinja").unlink()
    (tmp_path / "chat_template.jinja").write_bytes("é\r\n".encode())
    (tmp_path / "chat_templates" / "rag.jinja").write_text("c")
    assert templates(chat_template=named) == {"default": "é\r\n", "rag": "c"}


def test_templates_that_transformers_puts_beside_the_default_are_found(tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(
        "T{{ messages[0].content }}"
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "D{{ messages[0].content }}"})
    )
    tokenizer = build(TokenizerConfig(kind="bytes"), ())
    for _ in range(2):  # the default is in the config, and then in a file
        tokenizer.chat_templates = folders.read_settings(tmp_path).chat_templates
        asked = [{"role": "user", "content": "?"}]
        assert tokenizer.render_chat(asked) == "D?"
        assert tokenizer.render_chat(asked, tools=[{"name": "f"}]) == "T?"
        assert tokenizer.render_chat(asked, template="tool_use") == "T?"
        (tmp_path / "chat_template.jinja").write_text("D{{ messages[0].content }}")


def mistakes(folder: pathlib.Path, files: dict[str, str]) -> str:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        folders.from_folder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_cannot_be_read_are_named(shared_data, tmp_path):
    vocab = '{"a": 0}'
    signs = json.dumps({sign: i for i, sign in enumerate(hf.pre_tokenizers.ByteLevel.alphabet())})
    pieces = (shared_data / "tok-t5-base" / "t5-base.model").read_bytes().decode("latin-1")
    words = "[UNK]\n[CLS]\n[SEP]\na\n"
    cases = [
        ({}, "holds no tokenizer"),
        ({"vocab.txt": "a\nb\n"}, "has no unk_token '[UNK]'"),
        ({"vocab.txt": "\xff"}, "is not a vocab.txt"),
        (
            {"vocab.txt": words, "tokenizer_config.json": '{"do_lower_case": "yes"}'},
            "do_lower_case = 'yes'",
        ),
        (
            {"vocab.txt": words, "tokenizer_config.json": '{"unk_token": 7}'},
            "unk_token = 7 is not a token",
        ),
        (
            {"vocab.txt": words, "tokenizer_config.json": '{"unk_token": {}}'},
            "unk_token = {} is not a token",
        ),
        ({"vocab.txt": words, "tokenizer_config.json": "[]"}, "is not a JSON object"),
        ({"vocab.txt": words, "tokenizer_config.json": "{"}, "tokenizer_config.json is not JSON"),
        ({"vocab.txt": words, "added_tokens.json": '{"[NEW]": 9}'}, "no '[NEW]' with id 9"),
        (
            {"vocab.txt": words, "added_tokens.json": '{"[NEW]": "x"}'},
            "added tokens are not readable",
        ),
        (
            {
                "vocab.txt": words,
                "tokenizer_config.json": '{"tokenizer_class": "BertJapaneseTokenizer"}',
            },
            "does more",
        ),
        ({"vocab.json": vocab}, "merges.txt cannot be read"),
        ({"vocab.json": vocab, "merges.txt": "a b\n"}, "255 bytes are no tokens"),
        ({"vocab.json": "[]", "merges.txt": "a b\n"}, "is not a vocab.json"),
        ({"vocab.json": signs, "merges.txt": "a b c\n"}, "'a b c' is not a pair"),
        ({"vocab.json": signs, "merges.txt": "a b\n"}, "is not a vocab.json with its merges.txt"),
        ({"spiece.model": "no model"}, "is not a SentencePiece model"),
        (
            {"spiece.model": pieces, "tokenizer_config.json": '{"extra_ids": -1}'},
            "extra_ids = -1 is not a count",
        ),
        (
            {"spiece.model": pieces, "added_tokens.json": '{"<new>": 32000}'},
            "no '<new>' with id 32000",
        ),
        (
            {
                "spiece.model": pieces,
                "tokenizer_config.json": '{"tokenizer_class": "XLMRobertaTokenizer"}',
            },
            "does more",
        ),
        (
            {"spiece.model": pieces, "tokenizer_config.json": '{"chat_template": [1]}'},
            "neither a text nor a list",
        ),
        ({"tokenizer.json": "{}"}, "is not a tokenizer.json"),
    ]
    for i, (files, message) in enumerate(cases):
        assert message in mistakes(tmp_path / str(i), files)
