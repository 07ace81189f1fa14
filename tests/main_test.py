"""Ctrl-C and SIGTERM at any moment: one line, and the status of the signal."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LINES = {signal.SIGINT: "tessera: interrupted\n", signal.SIGTERM: "tessera: terminated\n"}
# A module that is found before the real one and is stopped while it is imported.
STOPPED = "import os, time\nos.kill(os.getpid(), {number})\ntime.sleep(60)\n"
# A verb whose program compiles, in a thread as XLA does it, when the signal comes.
COMPILING = """
import os, signal, threading, time
from research.recipes import describe

def main(arguments):
    threading.Thread(target=threading.Event().wait).start()
    print("compiling", flush=True)
    os.kill(os.getpid(), {number})
    time.sleep(60)

describe.main = main
describe.add_arguments = lambda parser: None
"""


def ended(folder: pathlib.Path, *command: str) -> tuple[int, str, str]:
    """Runs a command with the modules of a folder before all others; returns status, stdout and
    stderr.
    """
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=400
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("module", ["tqdm", "jax"])  # of the command line itself, and of a verb
@pytest.mark.parametrize("number", LINES)
def test_a_signal_during_imports_is_one_line(tmp_path, module, number):
    (tmp_path / f"{module}.py").write_text(STOPPED.format(number=int(number)))
    assert ended(tmp_path, "-m", "research", "describe") == (128 + number, "", LINES[number])


@pytest.mark.parametrize("number", LINES)
def test_a_signal_during_compilation_is_one_line_and_waits_for_no_thread(tmp_path, number):
    program = COMPILING.format(number=int(number)) + "from research.__main__ import main\nmain()\n"
    (tmp_path / "run.py").write_text(program)
    assert ended(tmp_path, str(tmp_path / "run.py"), "describe") == (
        128 + number,
        "compiling\n",
        LINES[number],
    )


def test_an_exit_that_waits_for_threads_would_not_end(tmp_path):  # the control
    program = (
        COMPILING.format(number=int(signal.SIGINT))
        + "from research import cli\nsys.exit(cli.main())\n"
    )
    (tmp_path / "run.py").write_text(f"import sys\n{program}")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "XLA_FLAGS": ""}
    command = [sys.executable, str(tmp_path / "run.py"), "describe"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        try:
            assert run.stderr.readline() == LINES[signal.SIGINT]
            with pytest.raises(subprocess.TimeoutExpired):
                run.wait(3)
        finally:
            run.kill()


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    (tmp_path / "run.py").write_text(
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from research.__main__ import main\n"
        "from research.recipes import describe\n"
        "describe.add_arguments = lambda parser: None\n"
        "describe.main = lambda arguments: os.kill(os.getpid(), signal.SIGINT)\n"
        "main()\n"
    )
    assert ended(tmp_path, str(tmp_path / "run.py"), "describe") == (0, "", "")
