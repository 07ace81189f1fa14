"""Records that cannot be read are counted and named, and those beside them are read."""

import dataclasses
import json
import random

import pyarrow as pa
import pytest
from pyarrow import parquet

from research.core.errors import UserError
from research.data import source_files, tfds_text
from research.data.sources import SourceConfig, SourceReport, documents
from tests.data.source_cases import TEXTS, read, write, write_lines

BAD_LINES = [
    (b'{"text": "caf\xe9"}', r"a.jsonl:3: bad UTF-8 at byte 13"),
    (b'{"text": "open', r"a.jsonl:3: broken JSON"),
    (b'{"other": "x"}', r"a.jsonl:3: no field 'text'"),
    (b'["text"]', r"a.jsonl:3: no field 'text'"),
    (b'{"text": 7}', r"a.jsonl:3: field 'text' is not a string"),
    (b'{"text": "\\ud800"}', r"a.jsonl:3: half a surrogate pair"),
]


def read_around(path, line: bytes) -> str:
    """Writes a bad line, the third of its file, between two good ones, which are read; returns what
    is said of it.
    """
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good too"}\n')
    report = SourceReport()
    config = SourceConfig(kind="jsonl", path=str(path), heldout_fraction=0.0, max_bad_fraction=0.5)
    assert [d.text for d in documents(config, "train", report)] == ["good", "good too"]
    assert report.bad == 1
    return report.first_bad


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_lines_are_counted_and_named_and_fail_past_the_limit(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    assert message in read_around(path, line)
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
    assert f"a.jsonl:3: {message}" in read_around(tmp_path / "a.jsonl", line)


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
    tfds_text.prepare(dict(source_files.find_files(str(tmp_path))), tmp_path / "prepared")
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
