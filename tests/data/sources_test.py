"""Documents from every kind of source; what is broken is counted and named; the split depends on
nothing but names.
"""

import dataclasses
import gzip
import json
import random
import shutil

import pyarrow as pa
import pytest
from pyarrow import parquet

from research.core.errors import UserError
from research.data import sources, tfds_text
from research.data.sources import SourceConfig, SourceReport, documents

TEXTS = [f"document {i}: héllo\r\n\tworld \0 {'x' * i}" for i in range(40)]
BYTES = {f"part/{i:02}.txt": text.encode() for i, text in enumerate(TEXTS)}


def read(config: SourceConfig, report: SourceReport | None = None) -> dict[str, list[str]]:
    return {
        split: [d.text for d in documents(config, split, report)] for split in ("train", "heldout")
    }


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def write(folder, kind: str):
    """Writes TEXTS as a source of one kind and returns its path."""
    if kind in ("text", "tfds"):
        for name, data in BYTES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        return folder
    if kind == "parquet":
        parquet.write_table(
            pa.table({"text": TEXTS, "n": range(40)}), folder / "a.parquet", row_group_size=7
        )
        return folder / "a.parquet"
    lines = "".join(json.dumps({"text": text}) + "\n\n" for text in TEXTS).encode()
    (folder / "a.jsonl").write_bytes(lines[:999])
    packed = {
        "jsonl": lines,
        "jsonl.gz": gzip.compress(lines),
        "jsonl.zst": zstd(lines[:999]) + zstd(lines[999:]),
    }
    (folder / f"a.{kind}").write_bytes(packed[kind])
    return folder / f"a.{kind}"


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


def write_records(folder, kind: str, records: list[str]) -> SourceConfig:
    """Writes records in this order as a source of one kind, of which three in ten are held out."""
    folder.mkdir()
    path, more = folder / "a", {}
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": record}) + "\n" for record in records))
    elif kind == "parted":
        path.write_text("<->".join(records))
        more = {"separator": "<->"}
    elif kind == "lines":
        path.write_text("\n".join(records))
        (folder / "b").write_text("\n".join(record.upper() for record in records))
        more = {"pair_path": str(folder / "b")}
    elif kind == "parquet":
        parquet.write_table(pa.table({"text": records}), path)
    else:
        path.mkdir()
        for index, record in enumerate(records):
            (path / f"{index:02}.txt").write_text(record)
    kind = "text" if kind == "parted" else kind
    return SourceConfig(kind=kind, path=str(path), heldout_fraction=0.3, **more)


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
    assert sources.size_bytes(SourceConfig(kind="text", path=str(tmp_path))) == 9
    assert sources.size_bytes(SourceConfig(kind="jsonl", path=str(tmp_path))) is None
    with gzip.open(tmp_path / "c.txt.gz", "wb") as file:
        file.write(b"packed")
    assert sources.size_bytes(SourceConfig(kind="text", path=str(tmp_path))) is None
    assert sources.size_bytes(SourceConfig()) > 1_000_000


def test_hidden_files_are_not_text(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.txt").write_text("hidden")
    (tmp_path / "a.txt").write_text("seen")
    assert read(SourceConfig(kind="text", path=str(tmp_path), heldout_fraction=0.0))["train"] == [
        "seen"
    ]


def write_lines(folder, **texts: bytes) -> SourceConfig:
    for name, data in texts.items():
        (folder / f"{name[:-3]}.{name[-2:]}.gz").write_bytes(gzip.compress(data))
    return SourceConfig(
        kind="lines", path=str(folder / "*.de.gz"), pair_path=str(folder / "*.en.gz")
    )


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
    before = sources.fingerprint(config)
    write_lines(tmp_path, b_en=b"one\ntwo\nthree\nfour")
    assert sources.fingerprint(config) != before


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


BAD_LINES = [
    (b'{"text": "caf\xe9"}', r"a.jsonl:3: bad UTF-8 at byte 13"),
    (b'{"text": "open', r"a.jsonl:3: broken JSON"),
    (b'{"other": "x"}', r"a.jsonl:3: no field 'text'"),
    (b'["text"]', r"a.jsonl:3: no field 'text'"),
    (b'{"text": 7}', r"a.jsonl:3: field 'text' is not a string"),
    (b'{"text": "\\ud800"}', r"a.jsonl:3: half a surrogate pair"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_lines_are_counted_and_named_and_fail_past_the_limit(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good too"}\n')
    report = SourceReport()
    config = SourceConfig(kind="jsonl", path=str(path), heldout_fraction=0.0, max_bad_fraction=0.5)
    assert [d.text for d in documents(config, "train", report)] == ["good", "good too"]
    assert report.bad == 1
    assert message in report.first_bad
    strict = SourceConfig(kind="jsonl", path=str(path), max_bad_fraction=0.3)
    with pytest.raises(
        UserError, match=message.replace("[", r"\[") + r".*\(1 of 3 records are bad"
    ):
        list(documents(strict, "train"))


def test_a_mostly_bad_source_fails_before_its_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + b"x\n" * 5000 + b'{"text": "good"}\n' * 5000)
    report = SourceReport()
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        list(
            documents(
                SourceConfig(kind="jsonl", path=str(path), max_bad_fraction=0.4), "train", report
            )
        )
    assert report.documents == 2


@pytest.mark.parametrize("kind", ["text", "tfds"])
def test_a_file_of_bad_utf8_is_counted_and_named(tmp_path, kind):
    path = write(tmp_path, kind)
    (path / "bad.txt").write_bytes(b"line\nb\xff")
    report = SourceReport()
    config = SourceConfig(kind=kind, path=str(path), heldout_fraction=0.0, max_bad_fraction=0.1)
    assert len(list(documents(config, "train", report))) == len(TEXTS)
    assert report.bad == 1
    assert "bad.txt" in report.first_bad
    assert "bad UTF-8 at byte 6" in report.first_bad


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
    tfds_text.prepare(dict(sources.find_files(str(tmp_path))), tmp_path.parent / "prepared")
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


HARD_LINES = {
    "a number of too many digits": (
        b'{"text": "x", "n": ' + b"9" * 5000 + b"}",
        "broken JSON: Exceeds the limit",
    ),
    "deep": (
        b'{"text": "x", "n": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        "broken JSON: maximum recursion",
    ),
    "a NUL": (b'{"text": "x\0y"}', "broken JSON"),
    "UTF-16": ('{"text": "x"}'.encode("utf-16-le"), "broken JSON"),
}


@pytest.mark.parametrize("name", HARD_LINES)
def test_whatever_a_line_raises_is_one_bad_record(tmp_path, name):
    line, message = HARD_LINES[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good too"}\n')
    report = SourceReport()
    config = SourceConfig(kind="jsonl", path=str(path), heldout_fraction=0.0, max_bad_fraction=0.5)
    assert [d.text for d in documents(config, "train", report)] == ["good", "good too"]
    assert report.bad == 1
    assert f"a.jsonl:2: {message}" in report.first_bad


def test_a_pair_that_is_bad_twice_is_one_bad_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 1, "from": 2}\n{"text": "a", "from": "b"}\n')
    config = SourceConfig(
        kind="jsonl", path=str(tmp_path / "a.jsonl"), pair_field="from", max_bad_fraction=0.5
    )
    report = SourceReport()
    list(documents(config, "train", report))
    lines = write_lines(tmp_path, a_en=b"one\n\xff", a_de=b"eins\n\xff\n")
    list(documents(dataclasses.replace(lines, max_bad_fraction=0.5), "train", report))
    assert (report.documents, report.bad) == (2, 2)


def test_values_of_parquet_that_python_has_no_text_for_are_bad_records(tmp_path):
    far = pa.array([0, 2**52], pa.int64()).cast(
        pa.timestamp("ms")
    )  # beyond the years of Python's dates
    parquet.write_table(
        pa.table({"far": far, "bytes": [b"good", b"b\xffd"]}), tmp_path / "a.parquet"
    )
    config = SourceConfig(
        kind="parquet", path=str(tmp_path / "a.parquet"), field="bytes", max_bad_fraction=1.0
    )
    report = SourceReport()
    found = read(config, report)
    assert found["train"] + found["heldout"] == ["good"]
    assert "bad UTF-8 at byte 1" in report.first_bad
    report = SourceReport()
    with pytest.raises(UserError, match="holds no text"):
        list(documents(dataclasses.replace(config, field="far"), "train", report))
    assert report.bad == 2


def test_whatever_a_damaged_dataset_raises_is_one_line(tmp_path):
    rng, caught = random.Random(0), 0
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text(f"document {index}")
    tfds_text.prepare(dict(sources.find_files(str(tmp_path))), tmp_path / "prepared")
    files = [path for path in (tmp_path / "prepared").rglob("*") if path.is_file()]
    config = SourceConfig(
        kind="tfds", path=str(tmp_path / "prepared"), heldout_fraction=0.0, max_bad_fraction=1.0
    )
    for index in range(60):
        path = files[index % len(files)]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        bit = rng.randrange(8 * len(whole))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            list(documents(config, "train"))
        except UserError as error:
            caught += "\n" not in str(error)
        path.write_bytes(whole)
    assert caught > 20
    assert len(list(documents(config, "train"))) == 3


LIMIT = 1000


@pytest.mark.parametrize("kind", ["jsonl", "text", "parted", "lines", "parquet", "tfds"])
def test_a_record_above_the_bound_is_bad_and_those_beside_it_are_not(tmp_path, kind):
    # The third is short in letters, and too long in bytes.
    texts = ["one", "x" * 5000, "é" * (LIMIT // 2 + 1), "y" * LIMIT, "three"]
    good = [text for text in texts if len(text.encode()) <= LIMIT]
    config = SourceConfig(
        kind="jsonl", path=str(tmp_path / "a"), heldout_fraction=0.0, max_bad_fraction=0.7
    )
    if kind == "jsonl":
        rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (tmp_path / "a").write_text("\n".join(rows))
        config = dataclasses.replace(config, max_record_bytes=len(rows[3]))
    elif kind == "parted":
        (tmp_path / "a").write_text("<->".join(texts))
        config = dataclasses.replace(config, kind="text", separator="<->", max_record_bytes=LIMIT)
    elif kind == "lines":
        (tmp_path / "a").write_text("\n".join(texts))
        (tmp_path / "b").write_text("\n".join(reversed(texts)))
        good = [
            text for text in good if text != "y" * LIMIT
        ]  # beside the long one of the other side
        pair_path = str(tmp_path / "b")
        config = dataclasses.replace(
            config, kind="lines", pair_path=pair_path, max_record_bytes=LIMIT
        )
    elif kind == "parquet":
        parquet.write_table(pa.table({"text": texts}), tmp_path / "a")
        config = dataclasses.replace(config, kind=kind, max_record_bytes=LIMIT)
    else:
        (tmp_path / "a").mkdir()
        for index, text in enumerate(texts):
            (tmp_path / "a" / f"{index}.txt").write_text(text)
        config = dataclasses.replace(config, kind=kind, max_record_bytes=LIMIT)
    report = SourceReport()
    assert sorted(d.text for d in documents(config, "train", report)) == sorted(good)
    assert report.bad == len(texts) - len(good)
    assert "longer than max_record_bytes = 1" in report.first_bad
