"""Files behind sources: byte order marks, compression, bounds of memory, names that no file has."""

import contextlib
import dataclasses
import gzip
import io
import json
import random
import sys
import tracemalloc

import pyarrow as pa
import pytest

from research.core.errors import UserError
from research.data import source_files
from research.data.sources import SourceConfig, SourceReport, documents


def train_texts(config: SourceConfig) -> list[str]:
    return [document.text for document in documents(config, "train")]


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_byte_order_marks_are_no_text(tmp_path, suffix):
    compressed = {"": bytes, ".gz": gzip.compress, ".zst": zstd}[suffix]
    rows = [json.dumps({"text": text}).encode() for text in ("one", "two", "three")]
    # As two files with marks look when they are joined.
    joined = MARK + rows[0] + b"\n" + rows[1] + b"\n" + MARK + rows[2] + b"\n"
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compressed(joined))
    (tmp_path / f"a.txt{suffix}").write_bytes(compressed(MARK + b"text"))
    (tmp_path / f"a.de{suffix}").write_bytes(compressed(MARK + b"eins\nzwei\n"))
    (tmp_path / f"a.en{suffix}").write_bytes(compressed(MARK + b"one\ntwo\n"))
    report = SourceReport()
    for kind, name, pair, expected in (
        ("jsonl", "a.jsonl", "", [("one",), ("two",), ("three",)]),
        ("text", "a.txt", "", [("text",)]),
        ("lines", "a.de", "a.en", [("one", "eins"), ("two", "zwei")]),
    ):
        pair_path = str(tmp_path / f"{pair}{suffix}") if pair else ""
        path = str(tmp_path / f"{name}{suffix}")
        config = SourceConfig(kind=kind, path=path, pair_path=pair_path, heldout_fraction=0.0)
        assert [document.texts for document in documents(config, "train", report)] == expected
    assert report.bad == 0


def test_byte_order_marks_of_files_that_become_a_dataset_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(MARK + b"text")
    assert train_texts(SourceConfig(kind="tfds", path=str(tmp_path), heldout_fraction=0.0)) == [
        "text"
    ]


def frame(window_log: int, data: bytes) -> bytes:
    """A Zstandard frame of one raw block (RFC 8878, 3.1.1), whose decoder must keep a window of
    2^window_log bytes.
    """
    magic, descriptor = b"\x28\xb5\x2f\xfd", b"\x00"
    window = bytes([(window_log - 10) << 3])
    block = (len(data) << 3 | 1).to_bytes(3, "little")  # the size, raw, the last one
    return magic + descriptor + window + block + data


def test_a_window_above_the_limit_is_one_line_that_names_the_option(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(frame(27, b'{"text": "one"}\n') + frame(28, b'{"text": "two"}\n'))
    config = SourceConfig(kind="jsonl", path=str(path), heldout_fraction=0.0)
    with pytest.raises(
        UserError, match=r"a\.jsonl\.zst .* zstd_window_log = 27 must be higher"
    ) as error:
        list(documents(config, "train"))
    assert "\n" not in str(error.value)
    path.write_bytes(frame(27, b'{"text": "one"}\n'))  # the control: a window of the limit
    assert train_texts(config) == ["one"]


def test_a_wider_window_without_the_package_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(frame(28, b'{"text": "one"}\n'))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    config = SourceConfig(kind="jsonl", path=str(path), zstd_window_log=28)
    with pytest.raises(
        UserError, match=r"zstd_window_log = 28 must be at most 27 until .*'\.\[zstd\]'\.$"
    ):
        list(documents(config, "train"))


def test_a_wider_window_is_read_where_the_option_allows_it(tmp_path):
    pytest.importorskip("zstandard", reason="needs the extra zstd")
    path = tmp_path / "a.jsonl.zst"
    rows = [b'{"text": "%s"}\n' % (b"%d " % i * 999) for i in range(100)]
    path.write_bytes(
        frame(31, rows[0]) + zstd(b"".join(rows[1:50])) + frame(20, b"") + zstd(b"".join(rows[50:]))
    )
    config = SourceConfig(kind="jsonl", path=str(path), zstd_window_log=31, heldout_fraction=0.0)
    assert train_texts(config) == [f"{i} " * 999 for i in range(100)]
    with pytest.raises(UserError, match="zstd_window_log = 30 must be higher"):
        list(documents(dataclasses.replace(config, zstd_window_log=30), "train"))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="cannot be read: Truncated"):
        list(documents(config, "train"))


@pytest.mark.parametrize("kind", ["jsonl", "text", "parted"])
def test_a_record_above_the_bound_is_not_held_in_memory(tmp_path, kind):
    path = tmp_path / "a.zst"
    size = 2**26
    path.write_bytes(zstd(b'{"text": "' + b"x" * size + b'"}\n{"text": "good"}\n'))
    config = SourceConfig(
        kind="jsonl" if kind == "jsonl" else "text",
        path=str(path),
        separator="</s>" if kind == "parted" else "",
        max_bad_fraction=1.0,
        max_record_bytes=2**16,
    )
    report = SourceReport()

    def peak() -> int:
        tracemalloc.start()
        try:
            with contextlib.suppress(UserError):  # of text all is one record, and bad
                list(documents(config, "train", report))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak() < size / 8
    assert report.bad == 1
    config = dataclasses.replace(config, max_record_bytes=2 * size)  # the control
    assert peak() > size


def test_parts_are_those_of_a_split_wherever_the_chunks_end(monkeypatch):
    rng = random.Random(0)
    for _ in range(300):
        separator = rng.choice([b"a", b"aa", b"ab\n", b"\n\n", b"aab"])
        data = bytes(rng.choice(b"ab\n") for _ in range(rng.randrange(60)))
        limit = rng.choice([1, 3, 100])
        monkeypatch.setattr(source_files, "CHUNK_BYTES", rng.choice([1, 2, 3, 7, 100]))
        found = list(source_files.parts(io.BufferedReader(io.BytesIO(data)), separator, limit))
        split = data.split(separator)
        before = [separator.join([*split[:i], b""]) for i in range(len(split))]
        wanted = [None if len(part) > limit else part for part in split]
        assert found == [(1 + b.count(b"\n"), part) for b, part in zip(before, wanted, strict=True)]


@pytest.mark.parametrize("path", ["a\0b", "a" * 5000, "x" * 300 + "/*.txt"])
def test_a_name_that_no_file_has_is_one_line(path):
    with pytest.raises(UserError, match=r"path = .* (cannot be read|matches no file)"):
        list(documents(SourceConfig(kind="text", path=path), "train"))


@pytest.mark.parametrize("kind", ["text", "jsonl", "tfds"])
def test_an_address_is_said_to_be_none_of_a_source(kind):
    with pytest.raises(UserError) as caught:
        list(documents(SourceConfig(kind=kind, path="gs://bucket/texts"), "train"))
    said = "path = 'gs://bucket/texts' is an address: sources are read from local or mounted files."
    assert str(caught.value) == said


def test_a_loop_of_links_is_no_text(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "a.txt").write_text("text")
    assert train_texts(SourceConfig(kind="text", path=str(tmp_path), heldout_fraction=0.0)) == [
        "text"
    ]
    with pytest.raises(UserError, match="path = "):
        list(documents(SourceConfig(kind="text", path=str(tmp_path / "loop")), "train"))
