"""What the tests of sources share: documents, and how they are written as each kind of source."""

import gzip
import json

import pyarrow as pa
from pyarrow import parquet

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


def write_lines(folder, **texts: bytes) -> SourceConfig:
    for name, data in texts.items():
        (folder / f"{name[:-3]}.{name[-2:]}.gz").write_bytes(gzip.compress(data))
    return SourceConfig(
        kind="lines", path=str(folder / "*.de.gz"), pair_path=str(folder / "*.en.gz")
    )
