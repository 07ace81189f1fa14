"""Where the text of a run comes from, as a config."""

import dataclasses
from typing import Literal

from research.core.errors import UserError
from research.data.needle import OVERHEAD
from research.data.source_files import BUNDLED_WINDOW_LOG

# The kinds that read no path.
EMBEDDED = ("stdlib", "needle")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of text.

    Attributes:
      kind: `stdlib` (text that every Python carries), `needle` (needles in a haystack,
        `data.needle`), `text` (one document per file), `jsonl`
        (plain, .gz or .zst), `lines` (one pair of texts per line, in two files), `parquet`, or
        `tfds` (a prepared dataset, or text files that are prepared as one).
      path: file, folder (searched recursively) or glob pattern; not used by `stdlib` and
        `needle`.
      field: the field of a JSON object, the column of a Parquet file or the feature of a TFDS
          example with the text.
      pair_field: the field of a JSON object with the text from which the one in `field` is made: a
        pair of texts for `data.objective.kind = "translate"`; empty: documents are single texts.
      pair_path: for `lines`: as many files as `path` names, matched in the order of names; line n
        of one is the text from which line n of its match in `path` is made.
      separator: where to cut a text file into several documents; empty: one document per file.
      tfds_split: the TFDS split that is read.
      length: for `needle`: bytes of a document.
      documents: for `needle`: how many there are.
      weight: share of this source in the training mixture, relative to the other weights; above 0.
      heldout_fraction: share of the documents kept for evaluation, in [0, 1]. 1 makes the source
          evaluation only.
      max_bad_fraction: share of unreadable records, in [0, 1], above which the source fails.
      max_record_bytes: bytes of a record (a file of text, a part between separators, a line, a
        value), at least 1; a longer one counts as unreadable and is never in memory as a whole,
        even if it is compressed.
      zstd_window_log: the largest window of a Zstandard frame, as a power of 2 in [10, 31]; reading
        takes that much memory. Above 27 it needs the package `zstandard`.
    """

    kind: Literal["stdlib", "needle", "text", "jsonl", "lines", "parquet", "tfds"] = "stdlib"
    path: str = ""
    field: str = "text"
    pair_field: str = ""
    pair_path: str = ""
    separator: str = ""
    tfds_split: str = "train"
    length: int = 0
    documents: int = 0
    weight: float = 1.0
    heldout_fraction: float = 0.05
    max_bad_fraction: float = 0.01
    max_record_bytes: int = 2**28
    zstd_window_log: int = BUNDLED_WINDOW_LOG

    def __post_init__(self):
        embedded = self.kind in EMBEDDED
        if embedded != (self.path == ""):
            need = "must be empty" if embedded else "must name a file, folder or glob"
            raise UserError("path", self.path, f"{need} for kind = {self.kind!r}.")
        for name, least in (("length", OVERHEAD + 1), ("documents", 1)):
            value = getattr(self, name)
            if self.kind == "needle" and value < least:
                raise UserError(name, value, f"must be at least {least} for kind = 'needle'.")
            if self.kind != "needle" and value != 0:
                raise UserError(name, value, f"must be 0 for kind = {self.kind!r}.")
        if not self.field:
            raise UserError("field", "", "must name the field that holds the text.")
        if self.pair_field and self.kind != "jsonl":
            raise UserError(
                "pair_field", self.pair_field, f"must be empty for kind = {self.kind!r}."
            )
        if bool(self.pair_path) != (self.kind == "lines"):
            need = "be empty" if self.pair_path else "name the other files"
            raise UserError("pair_path", self.pair_path, f"must {need} for kind = {self.kind!r}.")
        if not 0 < self.weight < float("inf"):
            raise UserError("weight", self.weight, "must be above 0 and finite.")
        for name in ("heldout_fraction", "max_bad_fraction"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(name, value, "must lie in [0, 1].")
        if self.max_record_bytes < 1:
            raise UserError("max_record_bytes", self.max_record_bytes, "must be at least 1.")
        if not 10 <= self.zstd_window_log <= 31:
            raise UserError("zstd_window_log", self.zstd_window_log, "must lie in [10, 31].")
