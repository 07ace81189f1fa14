"""What is written for `transformers`: its AutoTokenizer loads the folder and gives the same ids."""

import io
import json
import random

import pytest
import sentencepiece
import tokenizers as hf

from research.core.errors import UserError
from research.data.tokenizers import Tokenizer, TokenizerConfig, build, exports, folders
from research.data.tokenizers.byte import ByteTokenizer
from research.data.tokenizers.huggingface import HuggingFaceTokenizer
from research.data.tokenizers.pieces import SentencePieceTokenizer
from tests.data.tokenizers import references
from tests.data.tokenizers.make_goldens import HARD

TEXTS = ["the cat sat on the mat, naïve 12 x == y\n" * 3 + f"word{i % 7} {i}" for i in range(60)]
LOADED = {
    "wordpiece": "tok-bert-uncased/vocab.txt",
    "gpt2": "tok-gpt2/vocab.json",
    "t5": "tok-t5-base/t5-base.model",
    "llama": "stories260K/tok512.model",
    "unigram": "tok-sentencepiece-tests/test_model.model",
}
TRAINED = {
    "bpe": TokenizerConfig(kind="bpe", vocab_size=400, mask=True),
    "trained_unigram": TokenizerConfig(kind="unigram", vocab_size=400, sentinels=2),
    "bytes": TokenizerConfig(kind="bytes", mask=True, sentinels=2),
}
CHARACTERS = 300


def make(shared_data, name) -> Tokenizer:
    if name in TRAINED:
        return build(TRAINED[name], TEXTS)
    return folders.from_path(shared_data / LOADED[name], sentinels=100 if name == "t5" else 0)


@pytest.fixture(scope="module")
def texts(shared_data):
    """Hard and real texts, but for U+2581: it is a space to SentencePiece, and only exact models
    tell it from one.
    """
    real = (blocks[0] for _, blocks in references.texts(shared_data, CHARACTERS))
    return [text for text in [*HARD, *TEXTS[:3], *real] if "▁" not in text]


@pytest.mark.parametrize("name", [*LOADED, *TRAINED])
def test_an_exported_folder_loads_with_the_same_ids(shared_data, texts, tmp_path, name):
    tokenizer = make(shared_data, name)
    tokenizer.chat_templates = {"default": "{{ messages[0]['content'] }}\r\n  é"}
    for file, data in folders.to_hugging_face_files(tokenizer).items():
        (tmp_path / file).write_bytes(data)
    again = folders.from_folder(tmp_path)
    for attribute in (
        "vocab_size",
        "bos_id",
        "eos_id",
        "pad_id",
        "unk_id",
        "mask_id",
        "sentinel_ids",
    ):
        assert getattr(again, attribute) == getattr(tokenizer, attribute), attribute
    assert again.chat_templates == tokenizer.chat_templates
    ids = [row.tolist() for row in tokenizer.encode_batch(texts)]
    assert [row.tolist() for row in again.encode_batch(texts)] == ids
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(reference) == tokenizer.vocab_size
    assert reference.chat_template == tokenizer.chat_templates["default"]
    for role in ("bos", "eos", "pad", "unk", "mask", "cls", "sep"):
        assert getattr(reference, f"{role}_token") == tokenizer.specials.get(role), role
    # To `transformers` text that spells a special token is that token.
    plain = [not any(token in text for token in again.control_tokens) for text in texts]
    found = reference(texts, add_special_tokens=False)["input_ids"]
    assert [row for row, held in zip(found, plain, strict=True) if held] == [
        row for row, held in zip(ids, plain, strict=True) if held
    ]


@pytest.mark.live
@pytest.mark.parametrize(
    ("name", "framed"),
    [("wordpiece", "[CLS] a [SEP]"), ("t5", "a</s>"), ("llama", "<s> a"), ("bytes", "<s>a")],
)
def test_an_exported_folder_frames_a_text_as_its_model_reads_it(
    shared_data, tmp_path, name, framed
):
    transformers = pytest.importorskip("transformers")
    tokenizer = make(shared_data, name)
    for file, data in folders.to_hugging_face_files(tokenizer).items():
        (tmp_path / file).write_bytes(data)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert reference.decode(reference.encode("a")).replace(" ", "") == framed.replace(" ", "")


@pytest.mark.live
@pytest.mark.parametrize(
    ("file", "model_type", "settings"),
    [
        ("tok-t5-base/t5-base.model", "t5", None),
        ("tok-t5-base/t5-base.model", "mt5", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}),
        ("tok-bert-uncased/vocab.txt", "bert", None),
        ("tok-gpt2/tokenizer.json", "gpt2", None),
    ],
)
def test_an_exported_folder_reads_texts_and_pairs_as_the_original(
    shared_data, tmp_path, file, model_type, settings
):
    transformers = pytest.importorskip("transformers")
    original, exported = tmp_path / "original", tmp_path / "exported"
    original.mkdir()
    exported.mkdir()
    name = "spiece.model" if file.endswith(".model") else file.rpartition("/")[2]
    (original / name).write_bytes((shared_data / file).read_bytes())
    (original / "config.json").write_text(json.dumps({"model_type": model_type}))
    if settings is not None:
        (original / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = folders.from_folder(original)
    for name, data in folders.to_hugging_face_files(tokenizer, types=model_type == "bert").items():
        (exported / name).write_bytes(data)
    wanted, found = map(transformers.AutoTokenizer.from_pretrained, (original, exported))
    assert len(found) == len(wanted) == tokenizer.vocab_size
    assert set(found.all_special_tokens) == set(wanted.all_special_tokens)
    for texts in (("the cat",), ("the cat", "naïve 12")):
        assert dict(found(*texts)) == dict(wanted(*texts))


@pytest.mark.live
@pytest.mark.parametrize("name", ["llama", "bpe", "bytes"])
def test_an_exported_folder_encodes_the_same_chats(shared_data, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    tokenizer = make(shared_data, name)
    template = (
        "{% for m in messages %}{{ bos_token }}[INST] {{ m.content }} [/INST] ok {{ "
        "eos_token }}{% endfor %}"
    )
    tokenizer.chat_templates = {"default": template}
    for file, data in folders.to_hugging_face_files(tokenizer).items():
        (tmp_path / file).write_bytes(data)
    chat = [
        {"role": "user", "content": "Once  upon a time"},
        {"role": "user", "content": "naïve \n 😀 "},
    ]
    ids = tokenizer.encode_chat(chat)
    assert ids.count(tokenizer.bos_id) == ids.count(tokenizer.eos_id) == 2
    assert folders.from_folder(tmp_path).encode_chat(chat) == ids
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert reference.apply_chat_template(chat, return_dict=False) == ids


def test_an_exported_model_is_kept_as_it_was(shared_data):
    files = folders.to_hugging_face_files(make(shared_data, "llama"))
    assert files["tokenizer.model"] == (shared_data / LOADED["llama"]).read_bytes()
    assert set(files) == {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads(files["tokenizer_config.json"])["bos_token"] == "<s>"


def test_a_model_of_another_kind_is_refused(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type="char",
        vocab_size=40,
        minloglevel=2,
    )
    (tmp_path / "char.model").write_bytes(model.getvalue())
    tokenizer = folders.from_path(tmp_path / "char.model")
    with pytest.raises(UserError, match=r"cannot be written as a tokenizer\.json"):
        exports.to_tokenizer_json(tokenizer)


# The first is how the last begins, which SentencePiece prefers.
SYMBOLS = ["<ma", "[SEP]", "<mask>"]
FRAGMENTS = [
    *SYMBOLS,
    "a",
    " ",
    "the ",
    "<0x0A>",
    "<s>",
    "</s>",
    "é",
    "\n",
    "0x",
    "<",
    "x1",
    "mat",
    "  ",
    "<unk>",
    "日",
]


def model_with_symbols(kind: str, **options) -> SentencePieceTokenizer:
    model = io.BytesIO()
    texts = [
        "the cat sat on the mat <s> x1 <0x0A>",
        "naïve <mask> or [SEP] words",
        "aa bb <<0x0A>> cc 0x0A> ü",
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 20),
        model_writer=model,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=SYMBOLS,
        **options,
    )
    return SentencePieceTokenizer(model.getvalue())


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options", [{"byte_fallback": True, "vocab_size": 330}, {"vocab_size": 70}]
)
@pytest.mark.parametrize("prefix", [True, False])
def test_text_that_spells_symbols_bytes_and_control_tokens_has_the_ids_of_sentencepiece(
    kind, options, prefix
):
    tokenizer = model_with_symbols(kind, add_dummy_prefix=prefix, **options)
    exported = HuggingFaceTokenizer(exports.to_tokenizer_json(tokenizer))
    rng = random.Random(0)
    texts = ["x<mask>y", "<mask>", "a<0x0A>b", "<s>a", "x<mask><s>"]
    texts += ["".join(rng.choices(FRAGMENTS, k=rng.randrange(1, 9))) for _ in range(200)]
    for text in texts:
        assert exported.encode(text) == tokenizer.encode(text), text
    symbol = tokenizer.encode("x1<mask>mat")
    assert exported.decode(symbol) == tokenizer.decode(symbol) == "x1<mask>mat"


@pytest.mark.parametrize("name", ["a b", "x:1", "$A", "{x}"])
def test_a_special_token_of_any_spelling_frames_text(name):
    data = exports.to_tokenizer_json(ByteTokenizer())
    library = hf.Tokenizer.from_str(data.decode())
    library.add_special_tokens([name])
    framed = exports.with_frame(library.to_str().encode(), ((library.token_to_id(name),), (257,)))
    assert hf.Tokenizer.from_str(framed.decode()).encode("a").ids == [259, ord("a"), 257]


def test_a_frame_that_the_file_has_not_is_written_beside_it():
    tokenizer = ByteTokenizer()
    tokenizer.prompt_frame = ((), (257,))
    files = folders.to_hugging_face_files(tokenizer)
    assert hf.Tokenizer.from_str(files["tokenizer.json"].decode()).encode("a").ids == [
        ord("a"),
        257,
    ]
