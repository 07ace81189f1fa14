"""The token store holds every document whole, is built once, and is never seen half-written."""

import pickle
import zlib

import numpy as np
import pytest

from research.core.errors import UserError
from research.data import corpus as corpus_module
from research.data import objectives
from research.data.corpus import build_corpora, open_corpus
from research.data.objectives import bytes_per_target
from research.data.packing import PackedRows
from research.data.sources import SourceConfig
from research.data.tokenizers import TokenizerConfig, build
from research.data.tokenizers.byte import ByteTokenizer
from research.storage import checksums, files
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
    targets = len(train.tokens) - train.num_documents
    assert bytes_per_target([train]) == pytest.approx(train.num_bytes.sum() / targets)
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
    source = SourceConfig(
        kind="text", path=str(tmp_path / "text-30-1"), heldout_fraction=0.2, weight=3.0
    )
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "_build", lambda *_: pytest.fail("built again"))
        again = build_corpora(source, ByteTokenizer(), tmp_path / "cache")["train"]
    assert again.folder == first.folder
    (tmp_path / "text-30-1" / "new.txt").write_text("new")
    assert (
        build_corpora(source, ByteTokenizer(), tmp_path / "cache")["train"].folder != first.folder
    )
    other = build(TokenizerConfig(vocab_size=320), texts(30))
    assert build_corpora(source, other, tmp_path / "cache")["train"].folder != first.folder


def test_equal_content_has_an_equal_digest(tmp_path):
    """The order of samples may be checked against it on another machine, where files have other
    dates.
    """
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


def _flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def _large(tmp_path, blocks=3):
    """A corpus of some blocks of tokens, two bytes each."""
    (tmp_path / "a.txt").write_text("x" * (blocks * checksums.BLOCK_BYTES // 2 - 100))
    source = SourceConfig(kind="text", path=str(tmp_path / "a.txt"), heldout_fraction=0.0)
    return build_corpora(source, ByteTokenizer(), tmp_path / "cache")["train"]


@pytest.mark.parametrize("name", ["offsets.npy", "bytes.npy", "checksums.npy", "corpus.json"])
@pytest.mark.parametrize("offset", [0, 9, 60, -9, -2])
def test_a_flipped_bit_in_a_table_is_refused_by_name_when_the_corpus_is_opened(
    tmp_path, name, offset
):
    folder = corpora(tmp_path, 30)["train"].folder
    _flip(folder / name, offset)
    with pytest.raises(UserError, match=r"train[/ ].*Delete .*cache/text-\w+ to build it again"):
        open_corpus(folder)


@pytest.mark.parametrize("table", [np.int64(7), np.zeros((2, 2), np.int64), np.zeros(0, np.int64)])
def test_offsets_of_another_form_are_refused_by_name(tmp_path, table):
    folder = corpora(tmp_path, 30)["train"].folder
    np.save(folder / "offsets.npy", table)
    with pytest.raises(UserError, match=r"offsets\.npy is not what was written"):
        open_corpus(folder)


def test_a_changed_id_is_refused_when_its_block_is_read_and_only_then(tmp_path):
    folder = _large(tmp_path).folder
    block = checksums.BLOCK_BYTES // 2
    _flip(folder / "tokens.bin", 2 * (block + 5))
    corpus = open_corpus(folder)
    corpus.verify(np.array([0, 2 * block]), np.array([block, 10]))
    with pytest.raises(
        UserError, match=rf"tokens\.bin: ids {block:,} to {2 * block - 1:,} are not those"
    ):
        corpus.verify(np.array([0, block - 1]), np.array([1, 2]))
    with pytest.raises(UserError, match="are not those that were written"):
        corpus.document(0)


def test_a_batch_of_changed_ids_is_refused(tmp_path):
    folder = corpora(tmp_path, 60)["train"].folder
    np.memmap(folder / "tokens.bin", np.uint16, "r+")[:] = 7
    objective = objectives.build(objectives.ObjectiveConfig(), ByteTokenizer(), 64)
    rows = PackedRows(open_corpus(folder), objective=objective, seed=0, block_documents=100)
    with pytest.raises(
        UserError, match=r"tokens\.bin: ids 0 to [\d,]+ are not those that were written"
    ):
        rows.batch(np.array([0]), np.array([0]))


def test_the_checksums_are_those_of_the_blocks_however_they_were_written(tmp_path):
    folder = _large(tmp_path).folder
    data, size = (folder / "tokens.bin").read_bytes(), checksums.BLOCK_BYTES
    assert len(data) == 3 * size - 2 * 98
    want = [zlib.crc32(data[start : start + size]) for start in range(0, len(data), size)]
    assert np.load(folder / "checksums.npy").tolist() == want


@pytest.mark.parametrize("hit", [False, True])
def test_the_next_run_removes_what_a_killed_build_left(tmp_path, hit):
    if hit:
        corpora(tmp_path, 10)
    left = tmp_path / "cache" / ".text-0123456789abcdef-x7y8z9"
    (left / "train").mkdir(parents=True)
    (left / "train" / "tokens.bin").write_bytes(b"half")
    (tmp_path / "cache" / f".text-0123456789abcdef.x7y8z9{files.PARTIAL}").mkdir()
    for foreign in (".git", ".text-notes", ".text-0123456789abcdef"):
        (tmp_path / "cache" / foreign).mkdir()
    corpora(tmp_path, 10)
    assert {path.name for path in (tmp_path / "cache").glob(".*")} == {
        ".git",
        ".text-notes",
        ".text-0123456789abcdef",
    }


def test_the_last_token_of_a_piece_is_verified_too(tmp_path):
    """A causal segment of n pairs reads n + 1 tokens: here the last one is in a block of its
    own.
    """
    (tmp_path / "a.txt").write_text("x" * (checksums.BLOCK_BYTES // 2 - 1))
    source = SourceConfig(kind="text", path=str(tmp_path / "a.txt"), heldout_fraction=0.0)
    folder = build_corpora(source, ByteTokenizer(), tmp_path / "cache")["train"].folder
    _flip(folder / "tokens.bin", -1)
    objective = objectives.build(
        objectives.ObjectiveConfig(), ByteTokenizer(), checksums.BLOCK_BYTES // 2
    )
    rows = PackedRows(open_corpus(folder), objective=objective, seed=0, block_documents=100)
    block = checksums.BLOCK_BYTES // 2
    with pytest.raises(UserError, match=f"ids {block:,} to {block:,} are not"):
        rows.batch(np.array([0]), np.array([0]))
