"""`tessera evaluate --needle` prints a row for each length, and the same as JSON."""

import json

from research import cli
from tests.recipes.fixtures import Unbroken


def evaluate(unbroken: Unbroken, *flags: str) -> int:
    return cli.main(["evaluate", f"--workdir={unbroken.workdir}", "--prompts=3", *flags])


def test_the_table_has_a_row_for_each_length_beyond_the_model_s_own_too(unbroken, capsys):
    assert evaluate(unbroken, "--needle=60,120") == 0
    heading, depths, *rows = capsys.readouterr().out.splitlines()
    assert heading == "share of 3 needles found, by their depth in a prompt (1 is its end)"
    assert depths.split() == ["tokens", "0.00", "0.25", "0.50", "0.75", "1.00", "without"]
    # A model of a dozen steps finds none.
    assert [row.split() for row in rows] == [["60", *["0.00"] * 6], ["120", *["0.00"] * 6]]


def test_json_has_what_was_asked_and_found(unbroken, capsys):
    assert evaluate(unbroken, "--needle=60", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "step": 12,
        "prompts": 3,
        "depths": [0.0, 0.25, 0.5, 0.75, 1.0],
        "rows": [{"length": 60, "found": [0.0] * 5, "guessed": 0.0}],
    }


def test_lengths_that_are_none_are_refused_in_one_line(unbroken, capsys):
    assert evaluate(unbroken, "--needle=long") == 2
    assert "must be lengths such as 128,1024." in capsys.readouterr().err
    assert evaluate(unbroken, "--needle=0") == 2
    assert "--needle = '0' must name lengths of at least 1" in capsys.readouterr().err
    # The shortest length is refused before the longest is tried.
    assert evaluate(unbroken, "--needle=64,20") == 2
    out, err = capsys.readouterr()
    assert "lengths = 20 leaves no room" in err
    assert not out
    assert evaluate(unbroken) == 2
    assert "--prompts = 3 is for --needle." in capsys.readouterr().err
