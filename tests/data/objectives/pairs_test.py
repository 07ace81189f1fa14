"""Pairs of texts: each whole, on its two sides, under one segment number."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.config import bind
from research.core.errors import UserError
from research.data.loader import Loader, heldout_batches
from research.data.prepare import DataConfig, prepare, training_texts
from research.data.sources import SourceConfig
from tests.data.objectives.examples import epoch, objective_of, packed, segments
from tests.data.text import BOS, EOS, PAD, store

PAIRS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=30)


def texts(corpus) -> list[list[int]]:
    """The documents without their frames."""
    return [corpus.document(i)[1:-1].tolist() for i in range(corpus.num_documents)]


@settings(max_examples=50, deadline=None)
@given(
    lengths=PAIRS,
    widths=st.tuples(st.integers(32, 40), st.integers(32, 40)),
    seed=st.integers(0, 2**40),
)
def test_every_pair_comes_once_and_whole(lengths, widths, seed):
    corpus = store([n for pair in lengths for n in pair])
    batch = epoch(
        packed(corpus, objective_of("translate", widths[0], encoder_length=widths[1]), seed)
    )
    assert (batch["tokens"].shape[1], batch["encoder_tokens"].shape[1]) == widths
    found = []
    for segment in segments(batch):
        assert segment.encoder[-1] == segment.targets[-1] == EOS
        assert segment.tokens == [PAD, *segment.targets[:-1]]
        assert set(segment.weights) == {1.0}
        found.append((segment.encoder[:-1], segment.targets[:-1]))
    alone = texts(corpus)
    assert sorted(found) == sorted(zip(alone[::2], alone[1::2], strict=True))


def test_pairs_that_are_too_long_are_left_out_and_counted():
    corpus = store([5, 5, 9, 5, 5, 9, 8, 7])
    rows = packed(corpus, objective_of("translate", 8, encoder_length=9))
    assert rows.plan.dropped == 2
    found = sorted(segment.encoder[:-1] for segment in segments(epoch(rows)))
    assert found == [texts(corpus)[0], texts(corpus)[6]]
    with pytest.raises(UserError, match="its 4 pairs are all too long for a row"):
        packed(corpus, objective_of("translate", 5))


@pytest.fixture
def config(tmp_path) -> DataConfig:
    rows = [
        {"en": f"number {i}", "de": f"Zahl {i}" + "!" * (i % 7), "extra": i} for i in range(200)
    ]
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"en": "", "de": "leer"}\n'
    )
    source = {
        "kind": "jsonl",
        "path": str(tmp_path / "pairs.jsonl"),
        "field": "de",
        "pair_field": "en",
    }
    objective = {"kind": "translate", "encoder_length": 40, "decoder_start": "bos"}
    values = {
        "sources": [source | {"heldout_fraction": 0.2}],
        "tokenizer": {"kind": "bytes"},
        "objective": objective,
    }
    return bind(DataConfig, values)


def sides(batches, tokenizer) -> set[tuple[str, str]]:
    found = set()
    for batch in batches:
        for segment in segments(batch):
            assert segment.tokens[0] == tokenizer.bos_id
            found.add((tokenizer.decode(segment.encoder), tokenizer.decode(segment.targets)))
    return found


def test_pairs_are_read_from_json_lines(config, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.data.objectives.examples.PAD", 258)
    prepared = prepare(config, tmp_path / "cache")
    loader = Loader(
        prepared.train, config, prepared.tokenizer, batch_size=1, sequence_length=32, seed=1
    )
    train = sides((next(loader) for _ in range(loader.rows_per_epoch)), prepared.tokenizer)
    loader.close()
    heldout = heldout_batches(
        prepared.heldout, config, prepared.tokenizer, batch_size=1, sequence_length=32
    )
    held = sides(heldout, prepared.tokenizer)
    expected = {(f"number {i}", f"Zahl {i}" + "!" * (i % 7)) for i in range(200)}
    assert train | held == expected
    assert len(train) + len(held) == 200
    assert 20 < len(held) < 60


def test_pairs_are_read_from_two_files_of_lines(config, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.data.objectives.examples.PAD", 258)
    (tmp_path / "a.en").write_text("".join(f"number {i}\n" for i in range(20)))
    (tmp_path / "a.de").write_text("".join(f"Zahl {i}\n" for i in range(20)))
    source = SourceConfig(
        kind="lines", path=str(tmp_path / "a.de"), pair_path=str(tmp_path / "a.en")
    )
    lines = dataclasses.replace(
        config, sources=(dataclasses.replace(source, heldout_fraction=0.0),)
    )
    prepared = prepare(lines, tmp_path / "cache")
    loader = Loader(
        prepared.train, lines, prepared.tokenizer, batch_size=1, sequence_length=32, seed=1
    )
    found = sides((next(loader) for _ in range(loader.rows_per_epoch)), prepared.tokenizer)
    loader.close()
    assert found == {(f"number {i}", f"Zahl {i}") for i in range(20)}


def test_a_tokenizer_learns_from_both_texts(config):
    found = list(training_texts(config))
    assert any(text.startswith("number") for text in found)
    assert any(text.startswith("Zahl") for text in found)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"objective": {"kind": "translate"}},
            r"sources\.0\.pair_field = '' must name the other text",
        ),
        (
            {"sources": [{"kind": "jsonl", "path": "a", "pair_field": "b"}]},
            r"sources\.0\.pair_field = 'b' must be empty for objective\.kind = 'causal'",
        ),
        (
            {"sources": [{"kind": "text", "path": "a", "pair_field": "b"}]},
            r"sources\.0\.pair_field = 'b' must be empty for kind = 'text'",
        ),
        (
            {"sources": [{"kind": "lines", "path": "a", "pair_path": "b"}]},
            r"sources\.0\.pair_path = 'b' must be empty for objective\.kind = 'causal'",
        ),
    ],
)
def test_pairs_and_their_objective_belong_together(values, message):
    with pytest.raises(UserError, match=message):
        bind(DataConfig, values)


def test_a_pair_without_one_of_its_fields_is_bad(config, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"en": "one", "de": "eins"}\n{"en": "two"}\n')
    with pytest.raises(UserError, match=r"pairs\.jsonl:2: no field 'de'"):
        prepare(config, tmp_path / "cache")


@pytest.mark.parametrize("first", [0, 1])
def test_pairs_are_packed_by_the_side_that_fills_its_row_first(first):
    """The texts of one side fill rows of ten two by two; those of the other leave room in
    theirs.
    """
    filling = [[9, 1], [8, 2], [7, 3], [6, 4]]  # with EOS
    sizes = [[n - 1, 29] for pair in filling for n in pair]
    corpus = store([n for pair in sizes for n in (pair if first == 0 else pair[::-1])])
    widths = [100, 10] if first == 0 else [10, 100]
    rows = packed(corpus, objective_of("translate", widths[0], encoder_length=widths[1]))
    assert len(rows) == len(filling)
    batch = epoch(rows)
    name = "encoder_segments" if first == 0 else "segments"
    assert (batch[name] > 0).all()
    filled = [batch[name] > 0 for name in ("segments", "encoder_segments")]
    assert rows.plan.padding == pytest.approx(
        1 - sum(x.sum() for x in filled) / sum(x.size for x in filled)
    )


def test_a_row_has_room_on_both_sides_or_another_is_begun():
    """As sources the first and third fit together, as targets they do not."""
    corpus = store([2, 12, 12, 2, 2, 12])
    batch = epoch(packed(corpus, objective_of("translate", 16)))
    assert sorted(batch["segments"].max(axis=1)) == [1, 2]
    assert {len(segment.targets) for segment in segments(batch)} == {13, 3}
    assert BOS not in batch["tokens"]
