"""What benches write: one form, the table that it makes, and the blocks of Markdown that hold
tables.
"""

import argparse
import json
import pathlib

import pytest

from research.bench import report
from research.core.errors import UserError

TIMES = report.Figure(
    "ms", False, {"tessera": [10.0, 20.0, 10.0], "jax.nn": [25.0, 40.0, 60.0]}, note="a | b"
)
RATES = report.Figure(
    "tokens/s", True, {"tessera": [3000.0], "torch": [1500.0]}, {"other": "not here"}
)


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser, rounds=3)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--steps", type=int, default=1)
    return parser.parse_args(argv)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    report.publish(
        "toy",
        arguments("--full", f"--json={tmp_path / 'toy.json'}"),
        [("times", TIMES), ("rates", RATES)],
    )
    return tmp_path


def test_a_ratio_says_how_much_faster_we_are_of_times_and_of_rates():
    assert TIMES.ratios() == {"jax.nn": [2.5, 2.0, 6.0]}
    assert RATES.ratios() == {"torch": [2.0]}


def test_a_file_holds_every_round_and_what_made_it(folder):
    held = json.loads((folder / "toy.json").read_text())
    assert list(held) == ["command", "date", "machine", "figures"]
    assert held["command"] == "tessera bench toy --rounds=3 --full --steps=1"
    assert held["figures"]["times"]["rounds"] == {
        "tessera": [10.0, 20.0, 10.0],
        "jax.nn": [25.0, 40.0, 60.0],
    }
    assert {name: report.Figure(**fields) for name, fields in held["figures"].items()} == {
        "times": TIMES,
        "rates": RATES,
    }


def test_figures_are_printed_as_they_come(folder, capsys):
    report.publish("toy", arguments(), iter([("times", TIMES), ("rates", RATES)]))
    lines = capsys.readouterr().out.splitlines()
    assert "  tessera      10.0 (10.0 to 20.0) ms" in lines
    assert "  2.50 (2.00 to 6.00) times the speed of jax.nn, round by round" in lines
    assert "  2.00 times the speed of torch, round by round" in lines
    assert "  other        left out: not here" in lines


def test_a_table_has_the_ratio_its_spread_and_both_medians(folder):
    text = report.table(json.loads((folder / "toy.json").read_text()))
    assert text.startswith("`tessera bench toy --rounds=3 --full --steps=1`, 2")
    assert (
        "| times | jax.nn | 2.50 | 2.00 to 6.00, 3 rounds | 10.0 ms | 40.0 ms | a \\| b |\n" in text
    )
    assert "| rates | torch | 2.00 |  | 3,000 tokens/s | 1,500 tokens/s |  |\n" in text
    assert "| rates | other | left out | not here | 3,000 tokens/s |  |  |\n" in text


def test_another_command_gives_its_columns_and_rows(tmp_path):
    report.write(tmp_path / "a.json", "python -m a", columns=["x", "y"], rows=[["1", "2"]])
    text = report.table(json.loads((tmp_path / "a.json").read_text()))
    assert text.endswith("\n\n| x | y |\n| --- | --- |\n| 1 | 2 |\n")


@pytest.mark.parametrize(
    ("value", "said"),
    [(712_551.0, "712,551"), (33.62, "33.6"), (0.9951, "0.995"), (0.0207, "0.0207"), (0.0, "0")],
)
def test_numbers_have_three_digits_or_all_whole_ones(value, said):
    assert report.digits(value) == said


def block(name: str, content: str) -> str:
    return f"before\n<!-- figures: {name} -->\n{content}<!-- end of figures -->\nafter\n"


def test_blocks_are_filled_and_a_changed_digit_is_found(folder):
    filled = report.filled(block("toy", "old\n") + block("later", ""), folder)
    assert report.check(filled, folder) == []
    assert "| 2.50 |" in filled
    assert block("later", "unmeasured\n") in filled
    assert report.check(filled.replace("| 2.50 |", "| 2.60 |"), folder) == ["toy"]
    assert report.check(filled.replace("unmeasured", "3 ms"), folder) == ["later"]


@pytest.mark.parametrize(
    "text", ["<!-- figures: toy -->\n" + block("toy", ""), "<!-- end of figures -->"]
)
def test_half_a_block_is_refused(text, folder):
    with pytest.raises(UserError, match="a block of figures without its beginning or end"):
        report.filled(text, folder)


def broken(content: str) -> str:
    return json.dumps({"command": "a", "date": "b", "machine": {}, "figures": {"a": content}})


@pytest.mark.parametrize("content", ["{", "[]", '{"command": "a"}', broken("a"), broken({})])
def test_a_file_that_no_bench_wrote_is_one_line_and_status_2(
    content, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(report, "FIGURES", tmp_path)
    (tmp_path / "toy.json").write_text(content)
    (tmp_path / "a.md").write_text(block("toy", ""))
    assert report.main([str(tmp_path / "a.md")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{tmp_path / 'toy.json'} is not a file of figures" in said
    assert (tmp_path / "a.md").read_text() == block("toy", "")


def test_a_document_that_is_not_there_is_one_line_and_status_2(capsys):
    assert report.main(["nowhere.md"]) == 2
    assert capsys.readouterr().err == "error: nowhere.md is not a file.\n"


def test_a_document_is_filled_in_its_place(folder, monkeypatch):
    monkeypatch.setattr(report, "FIGURES", folder)
    (folder / "a.md").write_text(block("toy", ""))
    assert report.main([str(folder / "a.md")]) == 0
    assert report.check((folder / "a.md").read_text(), folder) == []


def test_mistakes_in_flags_name_the_flag(tmp_path):
    for flag, said in (
        ("--rounds=0", "--rounds = 0 must be at least 1"),
        ("--steps=0", "--steps = 0 must be at least 1"),
        (
            f"--json={tmp_path}/none/out.json",
            f"--json = '{tmp_path}/none/out.json' is in a folder that does not exist",
        ),
    ):
        with pytest.raises(UserError, match=f"^{said}") as found:
            report.check_arguments(arguments(flag), "steps")
        assert found.value.field == flag.partition("=")[0]
