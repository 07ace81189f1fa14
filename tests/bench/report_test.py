"""What a bench measured is kept whole, or a line says why not."""

import json
import os

import pytest

from research.bench.report import write_report
from research.core.errors import UserError


def test_a_report_is_written_whole_and_only_where_it_is_asked_for(tmp_path):
    write_report(str(tmp_path / "out.json"), {"ratio": [1.5]})
    write_report(None, {"ratio": [2.5]})
    assert json.loads((tmp_path / "out.json").read_text()) == {"ratio": [1.5]}
    assert os.listdir(tmp_path) == ["out.json"]


def test_a_report_that_cannot_be_written_is_one_line(tmp_path):
    place = str(tmp_path / "nowhere" / "out.json")
    with pytest.raises(UserError) as caught:
        write_report(place, {})
    assert str(caught.value) == f"json = {place!r} cannot be written: No such file or directory."
    with pytest.raises(UserError, match=r"json = 's3://bucket/out\.json' is an address of an unknown kind"):
        write_report("s3://bucket/out.json", {})
