"""The token store holds every document whole, is built once, and is never seen half-written."""

import pickle

import numpy as np
import pytest

from research.core.errors import UserError
from research.data import corpus as corpus_module
from research.data.corpus import build_corpora, open_corpus
from research.data.sources import SourceConfig
from research.data.tokenizers import TokenizerConfig, build
from research.data.tokenizers.byte import ByteTokenizer
from tests.data.text import corpora, texts


def test_a_corpus_holds_every_document_framed_and_its_bytes(tmp_path):
    splits = corpora(tmp_path, 60)
    found = []
    for corpus in splits.values():
        tokenizer = ByteTokenizer()
        for i in range(corpus.num_documents):
            ids = corpus.document(i)
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            found.append(tokenizer.decode(ids))
            assert corpus.num_bytes[i] == len(found[-1].encode())
    assert sorted(found) == sorted(texts(60))
    assert splits["heldout"].num_documents > 0
    train = splits["train"]
    assert train.tokens.dtype == np.uint16
    assert train.num_targets == len(train.tokens) - train.num_documents
    assert train.bytes_per_target == pytest.approx(train.num_bytes.sum() / train.num_targets)
    assert train.report.documents == 60


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path):
    wide = ByteTokenizer()
    wide.vocab_size = 70_000
    (tmp_path / "a.txt").write_text("abc")
    source = SourceConfig(kind="text", path=str(tmp_path / "a.txt"), heldout_fraction=0.0)
    corpus = build_corpora(source, wide, tmp_path / "cache")["train"]
    assert corpus.tokens.dtype == np.uint32
    assert corpus.tokens.tolist() == [256, 97, 98, 99, 257]


def test_a_corpus_is_built_once_for_the_same_inputs(tmp_path, monkeypatch):
    first = corpora(tmp_path, 30)["train"]
    source = SourceConfig(kind="text", path=str(tmp_path / "text-30-1"), heldout_fraction=0.2, weight=3.0)
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "_build", lambda *_: pytest.fail("built again"))
        again = build_corpora(source, ByteTokenizer(), tmp_path / "cache")["train"]
    assert again.folder == first.folder
    (tmp_path / "text-30-1" / "new.txt").write_text("new")
    assert build_corpora(source, ByteTokenizer(), tmp_path / "cache")["train"].folder != first.folder
    other = build(TokenizerConfig(vocab_size=320), texts(30))
    assert build_corpora(source, other, tmp_path / "cache")["train"].folder != first.folder


def test_equal_content_has_an_equal_digest(tmp_path):
    """The order of samples may be checked against it on another machine, where files have other dates."""
    a, b = corpora(tmp_path / "a", 30)["train"], corpora(tmp_path / "b", 30)["train"]
    assert a.digest == b.digest
    assert a.digest != corpora(tmp_path / "a", 31)["train"].digest


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus_module._Writer, "finish", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        corpora(tmp_path, 10)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.undo()
    assert corpora(tmp_path, 10)["train"].num_documents > 0


def test_a_corpus_that_lost_data_is_refused(tmp_path):
    folder = corpora(tmp_path, 30)["train"].folder
    path = folder / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="lost part of its files"):
        open_corpus(folder)
    path.unlink()
    with pytest.raises(UserError, match="is not a tokenized corpus"):
        open_corpus(folder)


def test_a_corpus_travels_by_its_name(tmp_path):
    train = corpora(tmp_path, 30)["train"]
    data = pickle.dumps(train)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data).tokens, train.tokens)
