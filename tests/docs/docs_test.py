"""README and docs: each figure is what a command wrote into `docs/figures`, and no speed is claimed
by hand.
"""

import pathlib
import re

import pytest

from research.bench import report

ROOT = pathlib.Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "figures"
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "AGENTS.md",
    *sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "docs").glob("*.md")
        if path.name != "performance-2026-11-21.md"  # of older figures, as they were written
    ),
)
# What commands printed, as it stands: the quickstart, its sizes, and the last lines of the tests.
PRINTED = ("quickstart.txt", "quickstart_sizes.txt", "tests.txt")
# Which of them the console block of a page is from.
CONSOLES = {"README.md": "quickstart.txt", "docs/getting-started.md": "quickstart_sizes.txt"}
UNMEASURED_TIME = f"an {report.UNMEASURED} time"

NUMBER = r"(?<![\d.,])\d[\d.,]*"
SPREAD = rf"{NUMBER}( \([^)]*\))?"
WORK = "(B|bytes|tokens|ids|rows|steps|flops?|operations)"
CLAIMS = (
    rf"{SPREAD} ?(x|×|times|%) (faster|slower|as fast|the speed|the time|torch|transformers|jax)",
    rf"{SPREAD} of .{{0,40}}(speed|bandwidth|flops)",
    rf"{NUMBER} ?([kMGT]|thousand|million)? ?{WORK}(/s| a second| per second)",
    rf"{NUMBER} ?(ms|µs|us|ns|milliseconds?|microseconds?|seconds?|min|minutes?|hours?)\b",
    rf"(?<!every ){NUMBER} s\b",
    r"\b(twice|half|times) (as fast|the speed)\b",
)
TAKES = r"`(bash [^`]+)` takes ((?:[^,.;]|,\d)+)"


def speed_claims(text: str) -> list[str]:
    """Returns what a text says of speed and time, but for blocks of figures, code and what
    `COMMAND` takes.
    """
    text = report.BLOCK.sub("", text)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(TAKES, "", text)
    text = " ".join(re.sub(r"`[^`]*`", "", text).split())
    return [found[0] for pattern in CLAIMS for found in re.finditer(pattern, text, re.IGNORECASE)]


def not_shown(names: list[str], text: str) -> list[str]:
    """Returns the files of figures that no block of a text shows."""
    shown = [f"{found[2]}.json" for found in report.BLOCK.finditer(text)]
    return [name for name in names if name not in (*shown, *PRINTED)]


def console_faults(text: str, printed: str) -> list[str]:
    """Returns the lines of a text's console block that a command did not print; a line ending in
    `…` may be longer.
    """
    (block,) = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    lines = printed.splitlines()
    if not lines and block == f"{report.UNMEASURED}\n":
        return []

    def stands(line: str) -> bool:
        begins = line.endswith("…") and any(
            one.startswith(line.removesuffix("…").rstrip()) for one in lines
        )
        return begins or line in lines

    return [line for line in block.splitlines() if line and not stands(line)]


def times(printed: str) -> dict[str, str]:
    """Returns what a text may say that each command takes, by what pytest or the shell's `time`
    printed after it.

    `$ bash launch/test.sh` and `1234 passed in 65.00s (0:01:05)` are «1 min 5 s (1,234 tests)».
    `.ci/run` prints
    several such lines: their seconds count together, and the tests of the first. The shell's `real`
        counts alone.
    """
    found = {}
    for command, lines in re.findall(r"^\$ (bash .+)\n((?:(?!\$ ).*\n?)*)", printed, re.MULTILINE):
        runs = re.findall(r"(\d+) passed.* in ([\d.]+)s", lines)
        wall = re.search(r"^real\s+(\d+)m([\d.]+)s", lines, re.MULTILINE)
        seconds = round(
            60 * int(wall[1]) + float(wall[2]) if wall else sum(float(taken) for _, taken in runs)
        )
        tests = f" ({int(runs[0][0]):,} tests)" if runs else ""
        found[command] = f"{seconds // 60} min {seconds % 60} s{tests}"
    return found


def time_faults(text: str, printed: str) -> list[str]:
    """Returns what a text says that a command takes, and nobody measured so."""
    measured = times(printed)
    faults = []
    for command, said in re.findall(TAKES, " ".join(text.split())):
        wanted = measured.get(command, UNMEASURED_TIME)
        if not re.match(rf"{re.escape(wanted)}( [a-z]|$)", said):
            faults.append(f"`{command}` takes {said}: it is {wanted}")
    return faults


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def printed(*names: str) -> str:
    paths = [FIGURES / name for name in names]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths if path.exists())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_block_of_figures_is_what_its_file_makes(name):
    changed = report.check(read(name), FIGURES)
    assert not changed, f"python -m research.bench.report {name} fills the blocks {changed}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_speed_is_claimed_by_hand(name):
    assert not speed_claims(read(name))


def test_every_file_of_figures_is_shown():
    names = [path.name for path in FIGURES.iterdir()]
    assert names
    assert not not_shown(names, "".join(map(read, DOCUMENTS)))


@pytest.mark.parametrize("name", CONSOLES)
def test_a_console_block_is_what_its_commands_printed(name):
    assert not console_faults(read(name), printed(CONSOLES[name]))


def test_what_commands_take_is_what_was_measured():
    for name in DOCUMENTS:
        assert not time_faults(read(name), printed(*PRINTED))
    stated = [command for command, _ in re.findall(TAKES, read("README.md"))]
    assert {"bash launch/quickstart.sh", "bash launch/test.sh", "bash .ci/run"} <= set(stated)


# That each of these can fail.


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_a_digit_changed_in_a_block_is_found(name):
    text = read(name)
    for block in report.BLOCK.finditer(text):
        start = block.start(3)
        assert report.check(f"{text[:start]}1{text[start:]}", FIGURES) == [block[2]]


@pytest.mark.parametrize(
    "claim",
    [
        "it is 1.90 times faster",
        "3 x as fast",
        "2.5 × torch",
        "1.90 (1.33 to 1.97) times torch",
        "float32 3,296 tokens a second",
        "at 4,843 tokens/s",
        "607 MB/s in",
        "13.9 M tokens a second a core",
        "a step of 12 ms",
        "starts in 4 to 7 s",
        "took 3 min 35 s",
        "keeps 0.93 to 1.15 of GPT-2's model FLOPs",
        "0.28 (0.22 to 0.32) of the copy's bandwidth",
        "twice as fast",
        "5 % faster",
    ],
)
def test_a_claim_by_hand_is_found(claim):
    assert speed_claims(f"Tessera: {claim}.")
    assert not speed_claims(f"<!-- figures: a -->\n{claim}\n<!-- end of figures -->")
    assert not speed_claims(f"```console\n{claim}\n```")


def test_what_is_no_claim_is_not_found():
    text = (
        "uploaded every 30 s; `--rounds=3 s`; 8,192 tokens; 0.4 to 4.3 % of them; `bash a` "
        "takes 1 min 5 s (3 tests)."
    )
    assert not speed_claims(text)


def test_a_file_that_nobody_shows_is_found():
    text = "<!-- figures: train -->\n<!-- end of figures -->\n"
    assert not_shown(["train.json", "loader.json", "tests.txt"], text) == ["loader.json"]


def test_a_line_that_was_not_printed_is_found():
    lines = "model: 5 parameters\nstep 1  loss 5.4  tokens/s 4,843\n"
    block = "```console\nmodel: 5 parameters\n\nstep 1  loss 5.4  …\n```\n"
    assert not console_faults(block, lines)
    assert console_faults(block.replace("5 par", "6 par"), lines) == ["model: 6 parameters"]
    assert console_faults(block.replace("5.4  …", "5.5  …"), lines) == ["step 1  loss 5.5  …"]
    assert console_faults(block.replace("  …", ""), lines) == ["step 1  loss 5.4"]
    assert console_faults(block, "") != []
    unmeasured = "```console\nunmeasured\n```"
    assert not console_faults(unmeasured, "")
    assert console_faults(unmeasured, lines) == ["unmeasured"]


RECORDED = """\
$ bash launch/test.sh
1234 passed, 5 skipped in 64.60s (0:01:04)
$ bash .ci/run
3039 passed in 600.00s (0:10:00)
12 passed in 9.00s
$ bash launch/quickstart.sh
data: stdlib

real\t3m35.2s
"""


def test_times_are_those_that_were_printed():
    assert times(RECORDED) == {
        "bash launch/test.sh": "1 min 5 s (1,234 tests)",
        "bash .ci/run": "10 min 9 s (3,039 tests)",
        "bash launch/quickstart.sh": "3 min 35 s",
    }
    said = (
        "`bash launch/test.sh` takes 1 min 5 s\n(1,234 tests), `bash .ci/run` takes 10 min 9 s "
        "(3,039 tests).\n"
    )
    said += "`bash launch/quickstart.sh` takes 3 min 35 s on two cores"
    assert not time_faults(said, RECORDED)


@pytest.mark.parametrize(
    "said",
    [
        "1 min 6 s (1,234 tests)",
        "1 min 5 s (1,235 tests)",
        "1 min 5 s",
        "an unmeasured time",
        "65 s",
        "about a minute",
    ],
)
def test_another_time_is_found(said):
    assert len(time_faults(f"`bash launch/test.sh` takes {said}.", RECORDED)) == 1


def test_a_time_that_nobody_measured_is_found():
    assert time_faults("`bash launch/test.sh` takes 1 min 5 s (1,234 tests)", "") != []
    assert not time_faults("`bash launch/test.sh` takes an unmeasured\ntime, and so on", "")
