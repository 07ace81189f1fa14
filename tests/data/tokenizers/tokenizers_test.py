"""Text to ids and back, for every kind; control ids never come out of text."""

import json
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from research.core.errors import UserError
from research.data import tokenizers
from research.data.tokenizers import StreamDecoder, TokenizerConfig, build, load, pieces

WORDS = [
    "the",
    "cat",
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "  over",
    "▁",
    "éa\u0301",
    "naïve\r",
    "\0nul",
    "x == 12",
]
TEXTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(30)) + "\n\ttail" for i in range(60)]
NASTY = [
    "", " ", "  a  ", "\n", "a\r\nb\tc", "\0", "a\0b", "▁", "▁▁ ▁a▁", "<s>",
    "</s> <unk> <pad> <0x41>", "<|endoftext|>",
    "😀e\u0301", "\ufeff\ufffd\uffff", "\x01\x7f\x85\u2028\u00a0\u3000", "\U0010ffff", "ﬁ Å １",
]  # fmt: skip
ALL_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
SPELT = st.lists(st.sampled_from([*NASTY, *WORDS]), max_size=8).map("".join)


def huggingface_json() -> bytes:
    """A small byte-level BPE whose pad token is, as in some real files, not marked as special."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>", "<s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([hf.AddedToken("<pad>", special=False)])
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, tokenizers.Tokenizer]:
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    path.write_bytes(huggingface_json())
    return {
        "bpe": build(TokenizerConfig(kind="bpe", vocab_size=400), TEXTS),
        "unigram": build(TokenizerConfig(kind="unigram", vocab_size=400), TEXTS),
        "bytes": build(TokenizerConfig(kind="bytes"), ()),
        "huggingface": build(TokenizerConfig(kind="huggingface", path=str(path)), ()),
    }


KINDS = ["bpe", "unigram", "bytes", "huggingface"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=ALL_TEXT | SPELT)
@example(text="a▁b c")
def test_any_text_round_trips_without_control_ids(kinds, kind, text):
    tokenizer = kinds[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_encodes_as_its_texts_do(kinds, kind):
    batch = kinds[kind].encode_batch([*NASTY, *TEXTS[:5]])
    assert [ids.tolist() for ids in batch] == [
        kinds[kind].encode(text) for text in [*NASTY, *TEXTS[:5]]
    ]


def test_plain_sentencepiece_loses_the_meta_space(kinds):
    """The control: without the spelling by bytes the round trip fails, so the test above can
    fail.
    """
    processor = sentencepiece.SentencePieceProcessor(
        model_proto=kinds["bpe"].files()["sentencepiece.model"]
    )
    assert processor.decode(processor.encode("a▁b")) == "a b"


def test_plain_huggingface_parses_special_tokens_out_of_text(kinds):
    """The control: the library's default does give a control id."""
    plain = hf.Tokenizer.from_str(huggingface_json().decode())
    assert kinds["huggingface"].eos_id in plain.encode("a<|endoftext|>").ids
    assert kinds["huggingface"].pad_id in plain.encode("a<pad>").ids


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic_in_another_process(kinds, kind):
    program = (
        "import sys, json, hashlib; from research.data.tokenizers import pieces;"
        "model = pieces.train_sentencepiece(sys.argv[1], json.loads(sys.stdin.read()), "
        "400).files()['sentencepiece.model'];"
        "print(hashlib.sha256(model).hexdigest())"
    )
    command = [sys.executable, "-c", program, kind]
    printed = subprocess.run(
        command, input=json.dumps(TEXTS), capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == kinds[kind].descriptor()["files"]["sentencepiece.model"]


def test_training_sees_the_whole_of_long_lines():
    """The trainer drops long lines in silence; ours come to it in parts."""
    word = "zyxzyx "
    tokenizer = pieces.train_sentencepiece("bpe", [word * 40_000], 300)
    assert len(tokenizer.encode(word * 10)) < 40


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_loads_as_the_same(kinds, kind, tmp_path):
    kinds[kind].save(tmp_path)
    loaded = load(tmp_path)
    assert loaded.digest() == kinds[kind].digest()
    for text in NASTY:
        assert loaded.encode(text) == kinds[kind].encode(text)


def test_a_changed_file_does_not_load(kinds, tmp_path):
    kinds["bpe"].save(tmp_path)
    model = tmp_path / "sentencepiece.model"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"sentencepiece.model.*digest differs"):
        load(tmp_path)
    with pytest.raises(UserError, match="does not hold a saved tokenizer"):
        load(tmp_path / "missing")


@pytest.mark.parametrize("kind", KINDS)
def test_ids_outside_the_vocabulary_are_refused(kinds, kind):
    for token in (-1, kinds[kind].vocab_size):
        with pytest.raises(UserError, match=f"token id {token} is outside the vocabulary"):
            kinds[kind].decode([5, token])


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_surrogate_pair_is_refused(kinds, kind):
    with pytest.raises(UserError, match="character 1"):
        kinds[kind].encode("a\ud800")


@pytest.mark.parametrize("kind", KINDS)
def test_control_ids_are_silent_and_frame_a_document(kinds, kind):
    tokenizer = kinds[kind]
    framed = tokenizer.frame(np.array(tokenizer.encode("a b"), np.int32))
    assert framed[-1] == tokenizer.eos_id
    assert framed[0] == tokenizer.bos_id
    assert tokenizer.decode(framed) == "a b"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(text=ALL_TEXT | SPELT)
@example(text="naïve 😀😀 ▁ �")
def test_a_stream_never_shows_half_a_character(kinds, kind, text):
    stream = StreamDecoder(kinds[kind])
    shown = [stream.push(i) for i in kinds[kind].encode(text)]
    assert "".join([*shown, stream.flush()]) == text
    assert "".join(shown).count("\ufffd") <= text.count("\ufffd")


def test_a_stream_ends_with_the_bytes_that_stay_broken(kinds):
    stream = StreamDecoder(kinds["bytes"])
    assert [stream.push(i) for i in "é".encode()[:1]] == [""]
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "huggingface"}, "path = ''"),
        ({"kind": "bpe", "path": "x"}, "path = 'x' must be empty"),
        ({"vocab_size": 299}, "vocab_size = 299"),
        ({"training_bytes": 0}, "training_bytes = 0"),
        ({"sentinels": -1}, "sentinels = -1"),
        (
            {"vocab_size": 310, "sentinels": 10, "mask": True},
            "vocab_size = 310 must be at least 311",
        ),
        ({"kind": "huggingface", "path": "x", "mask": True}, "mask = True"),
        ({"kind": "huggingface", "path": "x", "sentinels": 1}, "sentinels = 1 must be 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        TokenizerConfig(**values)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytes"])
def test_trained_tokenizers_reserve_a_mask_and_sentinels(kind, tmp_path):
    spelt = "<mask> <extra_id_0> <extra_id_2>"
    tokenizer = build(
        TokenizerConfig(kind=kind, vocab_size=400, mask=True, sentinels=3), [*TEXTS, spelt * 9]
    )
    control = (tokenizer.mask_id, *tokenizer.sentinel_ids)
    named = [
        tokenizer.control_tokens[name]
        for name in ("<mask>", "<extra_id_0>", "<extra_id_1>", "<extra_id_2>")
    ]
    assert [*control] == named
    assert len({*control, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}) == 7
    for text in [*NASTY, spelt]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {*control} & {*ids}
        assert max(ids, default=0) < tokenizer.vocab_size
    ids = [tokenizer.sentinel_ids[2], *tokenizer.encode(" a"), tokenizer.mask_id, tokenizer.eos_id]
    assert tokenizer.decode(ids) == "<extra_id_2> a<mask>"
    tokenizer.save(tmp_path)
    assert (load(tmp_path).mask_id, load(tmp_path).sentinel_ids) == (
        tokenizer.mask_id,
        tokenizer.sentinel_ids,
    )


def test_nothing_is_reserved_that_is_not_asked_for(kinds):
    for kind in ("bpe", "unigram", "bytes"):
        assert (kinds[kind].mask_id, kinds[kind].sentinel_ids) == (None, ())


def test_a_missing_or_foreign_file_is_named(tmp_path):
    (tmp_path / "a").write_text("{}")
    for kind in ("huggingface", "sentencepiece"):
        with pytest.raises(UserError, match=r"missing.*cannot be read"):
            build(TokenizerConfig(kind=kind, path=str(tmp_path / "missing")), ())
        with pytest.raises(UserError, match="is not a"):
            build(TokenizerConfig(kind=kind, path=str(tmp_path / "a")), ())


def test_training_on_nothing_or_with_too_few_ids_is_refused():
    with pytest.raises(UserError, match="no text"):
        build(TokenizerConfig(), [])
    with pytest.raises(UserError, match="vocab_size = 300"):
        build(TokenizerConfig(vocab_size=300), ["".join(map(chr, range(0x4E00, 0x4F00))) * 9])


def test_gpt2_encodes_as_the_library_but_for_control_ids(shared_data):
    path = shared_data / "tok-gpt2" / "tokenizer.json"
    tokenizer = build(TokenizerConfig(kind="huggingface", path=str(path.parent)), ())
    plain = hf.Tokenizer.from_file(str(path))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (50257, None, 50256)
    for text in [
        *(text for text in NASTY if "<|endoftext|>" not in text),
        *TEXTS[:9],
        "Hello world's 123  tokens",
    ]:
        assert tokenizer.encode(text) == plain.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert plain.encode("a<|endoftext|>").ids == [64, 50256]
    assert tokenizer.decode(tokenizer.encode("a<|endoftext|>")) == "a<|endoftext|>"
    assert 50256 not in tokenizer.encode("a<|endoftext|>")
    assert tokenizer.frame(np.array([64], np.int32)).tolist() == [50256, 64, 50256]


@pytest.mark.parametrize(
    "name",
    [
        "stories260K/tok512.model",
        "tok-c4-sentencepiece/bpe_32k_c4.model",
        "tok-sentencepiece-tests/test_model.model",
    ],
)
def test_a_loaded_model_encodes_as_sentencepiece(shared_data, name, tmp_path):
    path = shared_data / name
    tokenizer = build(TokenizerConfig(kind="sentencepiece", path=str(path)), ())
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in ["Once upon a time", " <s> a  b", "naïve ▁ 😀"]:
        assert tokenizer.encode(text) == plain.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == plain.decode(plain.encode(text))
        stream = StreamDecoder(tokenizer)
        shown = [stream.push(i) for i in tokenizer.encode(text)]
        assert "".join([*shown, stream.flush()]) == plain.decode(plain.encode(text))
    tokenizer.save(tmp_path)
    assert load(tmp_path).encode("Once upon a time") == tokenizer.encode("Once upon a time")
