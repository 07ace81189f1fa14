"""The command line: `tessera VERB …`, one recipe a verb."""

import argparse
import difflib
import errno
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType

import tqdm

from research.core import backend, interrupts
from research.core.errors import Interrupted, UserError

# What each verb does. Its recipe is imported when it is called, so that the overview and a mistyped
# verb answer at once.
VERBS = {
    "train": "train a model",
    "evaluate": "show held-out bits per byte beside gzip and byte n-grams",
    "sample": "continue prompts with a trained model",
    "generate": "answer the lines of a file, of any size, with a trained model",
    "data": "build the tokenizer and corpora of a config, and show them",
    "describe": "show a model: sizes, parameters as a tree, attention masks as a picture",
    "compile": "compile a run for devices that are not here: memory, collectives, accidents",
    "convert": "bring a model in from another format, or out to it",
    "bench": "measure this project beside its peers",
    "doctor": "check what would make a run fail later",
}
# Characters of a message that are shown.
LONGEST_LINE = 4000
# Libraries that log with a traceback what they raise as well.
_NOISY_LIBRARIES = ("gcsfs", "fsspec", "google.auth")
# Full or read-only disks, and files of other users: mistakes of a user, not of the code.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

    def error(self, message: str) -> None:
        raise UserError(message)


class _LogHandler(logging.Handler):
    """Writes lines to stderr, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.tqdm.write(self.format(record), file=sys.stderr)
        sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit status.

    0, 2 for a user's mistake, 75 for a run that can be resumed, or 128 and the number of the
    signal that stopped it.
    """
    if argv is None:
        argv = sys.argv[1:]
    _configure_output()
    try:
        backend.configure()
        status = _run(list(argv))
        sys.stdout.flush()
        return status
    except UserError as error:
        return _fail(f"error: {error}", 2)
    except Interrupted as stop:
        return _fail(str(stop), stop.status)
    except BrokenPipeError:
        # The reader of the output has ended; at its own end Python would try to write the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        return _fail(f"error: {error.filename or 'workdir or cache'}: {error.strerror}", 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except interrupts.Terminated:
        return _fail("terminated", 128 + signal.SIGTERM)


def _configure_output() -> None:
    """Sets what stdout, stderr and logs show."""
    # A terminal that cannot show a character must not end a run.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[_LogHandler()], force=True
    )
    logging.getLogger("tessera").setLevel(logging.INFO)
    for library in _NOISY_LIBRARIES:
        logging.getLogger(library).setLevel(logging.CRITICAL)


def _fail(message: str, status: int) -> int:
    line = " ".join(message.split())
    if len(line) > LONGEST_LINE:
        # A value from a foreign file can have any length.
        half = LONGEST_LINE // 2
        begin = line[:half]
        end = line[-half:]
        line = f"{begin} … {end} ({len(line):,} letters)"
    print(f"tessera: {line}", file=sys.stderr)
    return status


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"tessera {importlib.metadata.version('tessera')}")
        return 0
    verb, *flags = argv
    _check_verb(verb)
    recipe = importlib.import_module(f"research.recipes.{verb}")
    interrupts.restore_default_handlers()

    parser = _verb_parser(verb, recipe)
    arguments = _parse(parser, verb, flags)
    try:
        with interrupts.terminable(), interrupts.retry_ignored_signals():
            return recipe.main(arguments) or 0
    except UserError as error:
        # Libraries name the Python argument; here it came from a flag.
        actions = [action for action in parser._actions if action.option_strings]
        names = {action.dest: action.option_strings[0] for action in actions}
        raise UserError(error.text(names)) from error


def _check_verb(verb: str) -> None:
    if verb not in VERBS:
        advice = f"Known: {', '.join(VERBS)}."
        for close in difflib.get_close_matches(verb, VERBS, n=1):
            advice = f"Did you mean {close!r}?"
        raise UserError(f"{verb!r} is not a verb. {advice}")


def _verb_parser(verb: str, recipe: ModuleType) -> _Parser:
    parser = _Parser(
        prog=f"tessera {verb}",
        usage=f"tessera {verb} FLAGS\n\n{VERBS[verb]}\n\nexamples:\n{recipe.EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    recipe.add_arguments(parser)
    return parser


def _parse(parser: _Parser, verb: str, argv: list[str]) -> argparse.Namespace:
    """Returns the flags of a verb, with the `overrides` of its config."""
    # `--config.a.b=VALUE` is not a flag of the parser: every dotted name would be one.
    argv, overrides = split_overrides(argv)
    known = [flag for action in parser._actions for flag in action.option_strings]
    _check_overrides(overrides, known, verb)

    # argparse lists all unknown flags; the first one, with the flag that it may stand for, helps
    # more.
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flag, _, _ = unknown[0].partition("=")
        close = difflib.get_close_matches(flag, known, n=1)
        advice = f"Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{unknown[0]!r} is not known. {advice}")
    arguments.overrides = overrides
    return arguments


def _check_overrides(overrides: Sequence[tuple[str, str]], known: Sequence[str], verb: str) -> None:
    """Raises UserError where a verb reads no config, or another group of it alone: `--config.mesh`
    among its flags is for `--config.mesh.tensor=2`.
    """
    if "--config" in known:
        return
    groups = [flag.removeprefix("--config.") for flag in known if flag.startswith("--config.")]
    for name, _ in overrides:
        group, _, field = name.partition(".")
        if group not in groups or not field:
            advice = "".join(f", but for --config.{group}.FIELD" for group in groups)
            raise UserError(f"--config.{name}: {verb} reads no config{advice}.")


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--config.a.b=value` (or `--config.a.b value`) out of a command line.

    Returns:
      the rest of it, and the (name, value) pairs: `--config.a.b=1` is ("a.b", "1").
    """
    rest = []
    overrides = []
    items = iter(argv)
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


def complete() -> None:
    """Answers a shell that asks for completions, and ends the process; else does nothing.

    The extra `completion` installs argcomplete, whose shell function sets `_ARGCOMPLETE`.
    """
    if "_ARGCOMPLETE" not in os.environ or importlib.util.find_spec("argcomplete") is None:
        return
    import argcomplete

    parser = _completion_parser(os.environ["COMP_LINE"].split())
    argcomplete.autocomplete(parser, always_complete_options=False)


def _completion_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Returns a parser of all verbs, with the flags of the verb that `words` name: other recipes
    are not imported.
    """
    from argcomplete.completers import DirectoriesCompleter, FilesCompleter

    # What a shell completes: folders and .py files, folders alone.
    completers = {"--config": FilesCompleter(["py"]), "--workdir": DirectoriesCompleter()}
    parser = argparse.ArgumentParser(prog="tessera", allow_abbrev=False)
    parser.add_argument("--version", action="store_true")
    verbs = parser.add_subparsers()
    for verb, summary in VERBS.items():
        verb_parser = verbs.add_parser(verb, help=summary, allow_abbrev=False)
        if verb in words:
            importlib.import_module(f"research.recipes.{verb}").add_arguments(verb_parser)
        for action in verb_parser._actions:
            for flag in completers.keys() & action.option_strings:
                action.completer = completers[flag]
    return parser


def _overview() -> str:
    lines = [f"  {verb:9} {summary}" for verb, summary in VERBS.items()]
    verbs = "\n".join(lines)
    usage = "tessera VERB [--config=FILE.py] [--config.a.b=VALUE …] [--workdir=DIR]"
    more = "tessera VERB --help shows examples, tessera --version the version."
    return f"{usage}\n\n{verbs}\n\n{more}"
