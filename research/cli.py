"""The command line: `tessera VERB …`, one recipe a verb."""

import argparse
import contextlib
import difflib
import errno
import importlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tqdm

from research.core import backend, interrupts
from research.core.errors import Interrupted, UserError

# What each verb does. Its recipe is imported when it is called: the overview and a mistyped verb
# answer at once.
VERBS = {
    "train": "train a model",
    "evaluate": "show held-out bits per byte beside gzip and byte n-grams",
    "sample": "continue prompts with a trained model",
    "data": "build the tokenizer and corpora of a config, and show them",
    "describe": "show a model: sizes, parameters as a tree, attention masks as a picture",
    "convert": "bring a model in from another format, or out to it",
    "bench": "measure this project beside its peers",
    "doctor": "check what would make a run fail later",
}


# Letters of a message that are shown.
LONGEST_LINE = 4000


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line."""

    def error(self, message: str) -> None:
        raise UserError(message)


class _LogHandler(logging.Handler):
    """Writes lines to stderr, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.tqdm.write(self.format(record), file=sys.stderr)
        sys.stderr.flush()


class _Terminated(BaseException):
    """SIGTERM came, and takes the way of Ctrl-C: what is half written is removed on it."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    def terminate(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not cut the removal short
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit status.

    0, 2 for a user's mistake, 75 for a run that can go on later, or 128 and the number of the
    signal that stopped it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter ends no run
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[_LogHandler()], force=True
    )
    logging.getLogger("tessera").setLevel(logging.INFO)
    for library in (
        "gcsfs",
        "fsspec",
        "google.auth",
    ):  # what they log with a traceback, they raise as well
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        backend.configure()
        status = _run(argv)
        sys.stdout.flush()
        return status
    except UserError as error:
        return _fail(f"error: {error}", 2)
    except Interrupted as stop:
        return _fail(str(stop), stop.status)
    except BrokenPipeError:
        # Who read the output has gone; at its end Python would try to write the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        return _fail(f"error: {error.filename or 'workdir or cache'}: {error.strerror}", 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except _Terminated:
        return _fail("terminated", 128 + signal.SIGTERM)


def _fail(message: str, status: int) -> int:
    line = " ".join(message.split())
    if len(line) > LONGEST_LINE:  # a value of somebody else's file may be anything
        line = f"{line[: LONGEST_LINE // 2]} … {line[-LONGEST_LINE // 2 :]} ({len(line):,} letters)"
    print(f"tessera: {line}", file=sys.stderr)
    return status


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    verb = argv[0]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        raise UserError(
            f"{verb!r} is not a verb. " + (f"Did you mean {close[0]!r}?" if close else _known())
        )
    recipe = importlib.import_module(f"research.recipes.{verb}")
    interrupts.restore_default_handlers()
    parser = _Parser(
        prog=f"tessera {verb}",
        usage=f"tessera {verb} FLAGS\n\n{VERBS[verb]}\n\nexamples:\n{recipe.EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    recipe.add_arguments(parser)
    argv, overrides = split_overrides(argv[1:])
    flags = [flag for action in parser._actions for flag in action.option_strings]
    if overrides and "--config" not in flags:
        raise UserError(f"--config.{overrides[0][0]}: {verb} reads no config.")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
        raise UserError(
            f"{unknown[0]!r} is not known. " + (f"Did you mean {close[0]!r}?" if close else "")
        )
    arguments.overrides = overrides
    try:
        with _terminable():
            return recipe.main(arguments) or 0
    except UserError as error:
        # Libraries name the argument that they were given, which here came from a flag.
        names = {
            action.dest: action.option_strings[0]
            for action in parser._actions
            if action.option_strings
        }
        raise UserError(error.text(names)) from error


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--config.a.b=value` (or `--config.a.b value`) out of a command line."""
    rest, overrides, items = [], [], iter(argv)
    for item in items:
        if not item.startswith("--config."):
            rest.append(item)
            continue
        name, equals, value = item.removeprefix("--config.").partition("=")
        if not equals:
            value = next(items, "")
            if not value or value.startswith("--"):
                raise UserError(f"--config.{name} needs a value: --config.{name}=VALUE.")
        overrides.append((name, value))
    return rest, overrides


def _known() -> str:
    return f"Known: {', '.join(VERBS)}."


def _overview() -> str:
    verbs = "\n".join(f"  {verb:9} {summary}" for verb, summary in VERBS.items())
    usage = "tessera VERB [--config=FILE.py] [--config.a.b=VALUE …] [--workdir=DIR]"
    return f"{usage}\n\n{verbs}\n\ntessera VERB --help shows examples."
