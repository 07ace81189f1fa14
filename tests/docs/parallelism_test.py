"""What the page on parallelism shows is what the command prints."""

import pathlib
import re
import shlex

from research import cli
from research.parallel.pipeline_schedule import make_schedule, schedule_lines

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "parallelism.md"


def consoles(text: str) -> list[tuple[str, str]]:
    """Returns each command of a page's console blocks with the output that stands under it."""
    return re.findall(
        r"^```console\n\$ (tessera describe [^\n]*)\n(.*?)^```", text, re.DOTALL | re.M
    )


def test_each_console_block_is_what_its_command_prints(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    found = consoles(PAGE.read_text(encoding="utf-8"))
    assert found
    for command, output in found:
        capsys.readouterr()
        assert cli.main(shlex.split(command)[1:]) == 0
        assert capsys.readouterr().out == output


def test_a_command_and_its_output_are_told_apart():
    text = "a\n```console\n$ tessera describe --x=1\none\n\ntwo\n```\n```bash\nb\n```\n"
    assert consoles(text) == [("tessera describe --x=1", "one\n\ntwo\n")]


def test_schedules_are_drawn_as_they_run():
    text = PAGE.read_text(encoding="utf-8")
    (block,) = re.findall(r"^```text\n(gpipe\n.*?)^```", text, re.DOTALL | re.M)
    expected = []
    for name in ("gpipe", "1f1b"):
        expected += [name, *schedule_lines(make_schedule(name, 4, 6))]
    assert block.splitlines() == expected
