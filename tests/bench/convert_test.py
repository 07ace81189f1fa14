"""`tessera bench convert`: its rows beside a copy, each round in a process of its own, and what it
refuses.
"""

import argparse
import json

import pytest

from research.bench import convert
from research.core.errors import UserError


def arguments(*argv):
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    return parser.parse_args(argv)


def test_both_ways_are_measured_beside_a_copy(tmp_path, monkeypatch):
    asked, seconds = [], {"copy": 1.0, "in": 2.0, "out": 4.0}

    def run(command, root):
        module, side, *_ = command
        assert (module, root) == ("research.bench.convert_sides", None)
        asked.append(side)
        return json.dumps({"seconds": seconds[side], "peak_bytes": 5 * 10**6})

    monkeypatch.setattr(convert, "run", run)
    monkeypatch.setattr(convert, "make_folder", lambda folder, size, dtype: size)
    flags = (
        "--rounds=1",
        "--megabytes=8",
        f"--folder={tmp_path}",
        f"--json={tmp_path / 'out.json'}",
    )
    convert.main(arguments(*flags))
    assert asked == 2 * ["copy", "in", "out", "out", "in", "copy"]
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert figures["in, 8 MB of float32"]["rounds"] == {"in": [4.0], "copy": [8.0]}
    assert figures["out, 8 MB of bfloat16"]["rounds"] == {"out": [2.0], "copy": [8.0]}


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--megabytes=0", "--megabytes = 0 must be at least 1"),
        ("--folder=nowhere", "--folder = 'nowhere' is not a folder"),
        ("--folder=", "--folder = '' must not be empty"),
        ("--json=", "--json = '' is not a file"),
    ],
)
def test_mistakes_are_one_line(flag, said):
    with pytest.raises(UserError, match=f"^{said}"):
        convert.main(arguments(flag))
