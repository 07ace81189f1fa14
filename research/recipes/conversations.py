"""Conversations on the command line: from flags, from a file, or line by line from standard
input.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from research.core.errors import UserError
from research.storage.json_files import read_json
from research.storage.paths import local_path

Conversation = list[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that make a conversation; `--prompt` is a verb's own."""
    parser.add_argument(
        "--chat",
        action="store_true",
        help="each --prompt is a user's message, answered through the model's chat template; "
        "without one, messages are "
        "read from standard input, one per line, and are one conversation",
    )
    parser.add_argument(
        "--messages", help="a JSON file with the messages of a conversation to answer"
    )
    parser.add_argument("--system", help="with --chat: the system message that comes first")


def from_flags(arguments: argparse.Namespace) -> list[Conversation] | None:
    """Returns the conversations that flags give, [] where they come from standard input, or None
    without a chat.

    Raises:
      UserError: flags that do not go together, or a file that holds no messages.
    """
    # A file is one whole conversation.
    if arguments.messages is not None:
        if arguments.prompts or arguments.system is not None:
            raise UserError(
                "--messages: its file is the whole conversation; leave out --prompt and --system."
            )
        return [_read(local_path("messages", arguments.messages))]
    if not arguments.chat:
        if arguments.system is not None:
            raise UserError("--system needs --chat.")
        return None

    # Each prompt begins a conversation of its own.
    system = system_message(arguments)
    return [[*system, {"role": "user", "content": prompt}] for prompt in arguments.prompts]


def system_message(arguments: argparse.Namespace) -> Conversation:
    """Returns the system message as the beginning of a conversation, [] without one."""
    if arguments.system is None:
        return []
    return [{"role": "system", "content": arguments.system}]


def _read(path: pathlib.Path) -> Conversation:
    try:
        messages = read_json(path)
    except UserError as error:
        raise UserError(f"--messages = {error}") from error
    if not isinstance(messages, list):
        raise UserError(
            f"--messages = {path} must be a list of messages, each with a role and its content."
        )
    return messages


def stdin_lines() -> Iterator[str]:
    """Yields the lines of standard input that are not blank; a terminal is prompted for each.

    Raises:
      UserError: bytes that are not text in the encoding of standard input, usually UTF-8.
    """
    while True:
        # The prompt is no output: it goes to stderr.
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not text: {error}.") from error
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")
