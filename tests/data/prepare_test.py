"""A data config becomes a tokenizer and corpora, once."""

import pytest

from research.core.config import bind
from research.core.errors import UserError
from research.data import prepare as prepare_module
from research.data.objectives import bytes_per_target
from research.data.prepare import DataConfig, prepare, training_texts
from research.data.sources import SourceConfig
from research.data.tokenizers import TokenizerConfig
from tests.data.text import texts


@pytest.fixture
def config(tmp_path) -> DataConfig:
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        for i, text in enumerate(texts(60, seed)):
            (tmp_path / name / f"{i}.txt").write_text(text)
    sources = [
        {"kind": "text", "path": str(tmp_path / name), "heldout_fraction": 0.2} for name in "ab"
    ]
    return bind(DataConfig, {"sources": sources, "tokenizer": {"vocab_size": 320}})


def test_a_config_is_prepared_once(config, tmp_path, monkeypatch):
    first = prepare(config, tmp_path / "cache")
    assert len(first.train) == len(first.heldout) == 2
    assert first.tokenizer.decode(first.train[1].document(0)) in texts(60, 2)
    assert 0.3 < bytes_per_target(first.heldout) < 9
    assert [line.split(":")[0] for line in first.report()] == [
        c.folder.parent.name for c in first.train
    ]
    monkeypatch.setattr(prepare_module.tokenizers, "build", lambda *_: pytest.fail("trained again"))
    second = prepare(config, tmp_path / "cache")
    assert second.tokenizer.digest() == first.tokenizer.digest()
    assert [c.digest for c in second.train] == [c.digest for c in first.train]


def test_heldout_text_trains_no_tokenizer(config):
    heldout = set()
    for source in config.sources:
        heldout |= {d.text for d in prepare_module.documents(source, "heldout")}
    assert heldout
    assert not heldout & set(training_texts(config))


def test_sources_share_the_training_bytes_by_weight(config):
    sources = (config.sources[0], SourceConfig(**{**vars(config.sources[1]), "weight": 3.0}))
    limited = DataConfig(sources=sources, tokenizer=TokenizerConfig(training_bytes=1200))
    found = list(training_texts(limited))
    first, second = (sum(len(t) for t in found if t in set(texts(60, seed))) for seed in (1, 2))
    assert 300 <= first < 400
    assert 900 <= second < 1000


def test_a_mistake_names_its_source(config, tmp_path):
    (tmp_path / "b" / "bad.txt").write_bytes(b"\xff" * 9)
    for kind in ("bytes", "bpe"):
        with pytest.raises(UserError, match=r"^sources\.1: .*bad\.txt:1: bad UTF-8 at byte 0"):
            prepare(
                DataConfig(sources=config.sources, tokenizer=TokenizerConfig(kind=kind)),
                tmp_path / "cache",
            )


def test_a_missing_path_has_its_dotted_name(config, tmp_path):
    missing = SourceConfig(kind="text", path=str(tmp_path / "missing"))
    for tokenizer in (TokenizerConfig(), TokenizerConfig(kind="bytes")):
        with pytest.raises(UserError, match=r"^sources\.1\.path = .*missing' matches no file"):
            prepare(
                DataConfig(sources=(config.sources[0], missing), tokenizer=tokenizer),
                tmp_path / "cache",
            )
    loaded = TokenizerConfig(kind="huggingface", path=str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"^tokenizer\.path = .*missing' cannot be read"):
        prepare(DataConfig(sources=config.sources, tokenizer=loaded), tmp_path / "cache")


def test_skipped_records_are_reported(config, tmp_path):
    (tmp_path / "b" / "bad.txt").write_bytes(b"\xff" * 9)
    sources = tuple(
        SourceConfig(**{**vars(source), "max_bad_fraction": 0.1}) for source in config.sources
    )
    prepared = prepare(
        DataConfig(sources=sources, tokenizer=TokenizerConfig(kind="bytes")), tmp_path / "cache"
    )
    assert "skipped" not in prepared.report()[0]
    assert "; 1 skipped, first: " in prepared.report()[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": ()}, "sources = ()"),
        ({"sources": (SourceConfig(heldout_fraction=1.0),)}, "nothing is left to train on"),
        ({"workers": -1}, "workers = -1"),
        ({"prefetch": 0}, "prefetch = 0"),
        ({"block_documents": 0}, "block_documents = 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(values, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        DataConfig(**values)
