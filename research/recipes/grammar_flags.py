"""The flags that say what a text must be."""

import argparse
import pathlib
from typing import Any

from research.inference.grammar_config import GrammarConfig, bind_grammar

# Kinds of grammars that are flags by their names; `--choices` is repeated.
FLAGS = {
    "regex": "regular expression that the whole text matches",
    "json_schema": "JSON Schema of the text, or a file of one",
    "lark": "Lark grammar of the text, or a file of one",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each kind of grammar."""
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name}", help=text)
    parser.add_argument(
        "--choices", action="append", help="a text that the answer may be; may be repeated"
    )


def from_flags(arguments: argparse.Namespace) -> GrammarConfig | None:
    """Returns the grammar that flags give; None without one.

    Raises:
      UserError: more than one, or a value that is no grammar.
    """
    fields: dict[str, Any] = {}
    for name in FLAGS:
        value = getattr(arguments, name)
        if value is not None:
            fields[name] = value if name == "regex" else _text_or_file(value)
    if arguments.choices is not None:
        fields["choices"] = tuple(arguments.choices)
    return bind_grammar(fields)


def _text_or_file(value: str) -> str:
    # Schemas and grammars have brackets or lines, which names of files seldom have.
    is_text = value.lstrip().startswith("{") or "\n" in value
    if is_text or not pathlib.Path(value).is_file():
        return value
    return pathlib.Path(value).read_text(encoding="utf-8")
