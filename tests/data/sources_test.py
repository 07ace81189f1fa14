"""Documents from every kind of source; what is broken is counted and named; the split depends on
nothing but names.
"""

import dataclasses
import gzip
import shutil

import pyarrow as pa
import pytest
from pyarrow import parquet

from research.core.errors import UserError
from research.data import source_files, source_stats, sources, tfds_text
from research.data.sources import SourceConfig, SourceReport, documents
from tests.data.source_cases import TEXTS, read, write, write_lines, write_records, zstd


@pytest.mark.parametrize("kind", ["text", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "tfds"])
def test_every_document_is_read_once_and_on_one_side(tmp_path, kind):
    config = SourceConfig(
        kind=kind.split(".")[0], path=str(write(tmp_path, kind)), heldout_fraction=0.3
    )
    report = SourceReport()
    found = read(config, report)
    assert sorted(found["train"] + found["heldout"]) == sorted(TEXTS)
    assert 4 <= len(found["heldout"]) <= 20
    assert (report.documents, report.bad) == (80, 0)  # two passes
    assert read(config) == found


RECORDS = [f"record {i}" for i in range(40)]


@pytest.mark.parametrize("kind", ["jsonl", "parted", "lines", "parquet", "tfds"])
def test_records_are_split_by_their_text(tmp_path, kind):
    """Their order, their file, and what else is there, change no record's side."""
    sides = []
    for index, records in enumerate((RECORDS, RECORDS[::-1], RECORDS[10:])):
        sides.append(set(read(write_records(tmp_path / str(index), kind, records))["heldout"]))
    assert 4 <= len(sides[0]) <= 20
    assert sides[0] == sides[1]
    assert sides[2] == sides[0] & set(RECORDS[10:])


def test_files_are_split_by_their_name_in_the_folder_that_the_source_names(tmp_path):
    sides = []
    for index, records in enumerate((RECORDS, RECORDS[::-1])):
        config = dataclasses.replace(
            write_records(tmp_path / str(index), "tfds", records), kind="text"
        )
        sides.append({document.name for document in documents(config, "heldout")})
    assert 4 <= len(sides[0]) <= 20
    assert sides[0] == sides[1]
    assert sources.stable_hash("asyncio/events.py") == 0x09ED6B3398AF75B8  # on every machine
    assert sources.is_heldout("asyncio/events.py", 0.05)
    assert not sources.is_heldout("asyncio/events.py", 0.03)


def test_a_text_file_is_cut_where_the_separator_is(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\n\n\nthree")
    found = read(
        SourceConfig(
            kind="text", path=str(tmp_path / "*.txt"), separator="\n\n", heldout_fraction=0.0
        )
    )
    assert found == {"train": ["one", "two", "three"], "heldout": []}


def test_no_part_of_a_text_file_begins_with_a_byte_order_mark(tmp_path):
    """Files with marks may have been joined before they were cut; a mark inside of a text is a
    letter of it.
    """
    (tmp_path / "a.txt").write_text("\ufeffone\n--\n\ufefft\ufeffwo\n--\n\ufeff")
    found = read(
        SourceConfig(
            kind="text", path=str(tmp_path / "*.txt"), separator="\n--\n", heldout_fraction=0.0
        )
    )
    assert found == {"train": ["one", "t\ufeffwo"], "heldout": []}


def test_size_is_that_of_plain_text_and_unknown_of_other_files(tmp_path):
    (tmp_path / "a.txt").write_text("four")
    (tmp_path / "b.txt").write_text("fünf")
    assert source_stats.size_bytes(SourceConfig(kind="text", path=str(tmp_path))) == 9
    assert source_stats.size_bytes(SourceConfig(kind="jsonl", path=str(tmp_path))) is None
    with gzip.open(tmp_path / "c.txt.gz", "wb") as file:
        file.write(b"packed")
    assert source_stats.size_bytes(SourceConfig(kind="text", path=str(tmp_path))) is None
    assert source_stats.size_bytes(SourceConfig()) > 1_000_000


def test_hidden_files_are_not_text(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.txt").write_text("hidden")
    (tmp_path / "a.txt").write_text("seen")
    assert read(SourceConfig(kind="text", path=str(tmp_path), heldout_fraction=0.0))["train"] == [
        "seen"
    ]


def test_lines_of_two_files_are_pairs(tmp_path):
    config = write_lines(
        tmp_path,
        b_en=b"one\r\ntwo\n\nfour\n",
        b_de=b"eins\nzwei\xe2\x80\xa8!\n\nvier",
        a_en=b"six",
        a_de=b"sechs\n",
    )
    report = SourceReport()
    found = [
        (d.name, d.source, d.text)
        for split in ("train", "heldout")
        for d in documents(config, split, report)
    ]
    assert sorted(found) == [
        ("a.de.gz:1", "six", "sechs"),
        ("b.de.gz:1", "one", "eins"),
        ("b.de.gz:2", "two", "zwei\u2028!"),
        ("b.de.gz:4", "four", "vier"),
    ]
    before = source_stats.fingerprint(config)
    write_lines(tmp_path, b_en=b"one\ntwo\nthree\nfour")
    assert source_stats.fingerprint(config) != before


def test_files_whose_lines_are_no_pairs_are_named(tmp_path):
    config = write_lines(tmp_path, a_en=b"one\ntwo\n\n", a_de=b"eins\nzwei\n")
    with pytest.raises(UserError, match=r"a\.de\.gz has 2 lines and .*a\.en\.gz has more"):
        list(documents(config, "train"))
    write_lines(tmp_path, a_en=b"one\n\xff", a_de=b"eins\nzwei\n")
    with pytest.raises(UserError, match=r"a\.de\.gz:2: bad UTF-8 .*a\.en\.gz"):
        list(documents(config, "train"))
    write_lines(tmp_path, b_en=b"one\n")
    with pytest.raises(UserError, match=r"en\.gz' matches 2 files, path 1: not pairs"):
        list(documents(config, "train"))


def test_captions_are_read_in_two_languages(shared_data):
    folder = shared_data / "multi30k"
    config = SourceConfig(
        kind="lines", path=str(folder / "val.de.gz"), pair_path=str(folder / "val.en.gz")
    )
    found = [document for split in ("train", "heldout") for document in documents(config, split)]
    first = next(document for document in found if document.name == "val.de.gz:1")
    assert len(found) == 1014
    assert first.source == "A group of men are loading cotton onto a truck"
    assert first.text == "Eine Gruppe von Männern lädt Baumwolle auf einen Lastwagen"


def test_missing_empty_and_damaged_sources_are_named(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "blank.txt").write_text("")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 999)[:-9])
    (tmp_path / "not.parquet").write_bytes(b"no")
    parquet.write_table(pa.table({"body": ["a"]}), tmp_path / "other.parquet")
    (tmp_path / "not.jsonl.zst").write_bytes(b"no frame of Zstandard")
    (tmp_path / "cut.jsonl.zst").write_bytes(
        zstd(b"".join(b'{"text": "%d"}\n' % i for i in range(9)))[:-4]
    )
    for kind, name, message in [
        ("text", "missing", "matches no file"),
        ("text", "empty", "matches no file"),
        ("text", "blank.txt", "holds no text"),
        ("jsonl", "cut.jsonl.gz", "cut.jsonl.gz cannot be read"),
        ("jsonl", "not.jsonl.zst", "not.jsonl.zst cannot be read"),
        ("jsonl", "cut.jsonl.zst", "cut.jsonl.zst cannot be read: Truncated"),
        ("parquet", "not.parquet", "not.parquet cannot be read"),
        ("parquet", "other.parquet", "field = 'text' is not a column.*Columns: body"),
    ]:
        with pytest.raises(UserError, match=message):
            list(documents(SourceConfig(kind=kind, path=str(tmp_path / name)), "train"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "text"}, "path = ''"),
        ({"path": "x"}, "path = 'x' must be empty"),
        ({"weight": 0.0}, "weight = 0.0"),
        ({"weight": float("nan")}, "weight = nan"),
        ({"heldout_fraction": 1.5}, "heldout_fraction = 1.5"),
        ({"max_bad_fraction": -0.1}, "max_bad_fraction = -0.1"),
        ({"field": ""}, "field = ''"),
        (
            {"kind": "lines", "path": "a"},
            "pair_path = '' must name the other files for kind = 'lines'",
        ),
        ({"max_record_bytes": 0}, "max_record_bytes = 0 must be at least 1"),
        ({"zstd_window_log": 32}, r"zstd_window_log = 32 must lie in \[10, 31\]"),
        ({"pair_path": "b"}, "pair_path = 'b' must be empty for kind = 'stdlib'"),
    ],
)
def test_a_config_that_cannot_be_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        SourceConfig(**values)


def test_a_prepared_tfds_dataset_is_read_in_place(tmp_path):
    write(tmp_path, "tfds")
    tfds_text.prepare(dict(source_files.find_files(str(tmp_path))), tmp_path.parent / "prepared")
    shutil.rmtree(tmp_path / "part")
    config = SourceConfig(kind="tfds", path=str(tmp_path.parent / "prepared"), heldout_fraction=0.0)
    assert sorted(read(config)["train"]) == sorted(TEXTS)
    with pytest.raises(UserError, match="field = 'body' is not a feature"):
        list(documents(SourceConfig(kind="tfds", path=config.path, field="body"), "train"))
    with pytest.raises(UserError, match="tfds_split = 'test' is not a split"):
        list(documents(SourceConfig(kind="tfds", path=config.path, tfds_split="test"), "train"))


def test_c4_reads_as_array_record_and_parquet(shared_data):
    c4 = shared_data / "c4-minimal"
    records = str(c4 / "c4" / "en" / "3.0.1" / "c4-train.array_record*")
    texts = [
        d.text
        for d in documents(SourceConfig(kind="tfds", path=records, heldout_fraction=0.0), "train")
    ]
    assert len(texts) == 1000
    assert texts[0].startswith("Posted on April 12, 2018 by admin")
    rows = SourceConfig(
        kind="parquet", path=str(c4 / "hf" / "c4" / "*train*.parquet"), heldout_fraction=0.0
    )
    assert len(list(documents(rows, "train"))) == 200
    with pytest.raises(UserError, match="tfrecord, which has no random access"):
        list(documents(SourceConfig(kind="tfds", path=str(c4 / "c4")), "train"))
