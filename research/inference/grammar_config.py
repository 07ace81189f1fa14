"""What an answer must be, and what a grammar may take."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from research.core.errors import UserError, nearest

KINDS = ("json_schema", "regex", "choices", "lark")


class GrammarError(UserError):
    """A grammar that is none, that no text of the tokenizer meets, or not within its limits."""


@dataclasses.dataclass(frozen=True)
class GrammarConfig:
    """What an answer must be; exactly one of the fields is given.

    Attributes:
      json_schema: JSON text or value of a JSON Schema, an object or a bool; kept as text. What of
        JSON Schema there is, is llguidance's; properties come in the schema's order.
      regex: that the whole answer matches, in the syntax of Rust's `regex` without look-around.
      choices: texts, one of which the answer is.
      lark: grammar in llguidance's form of Lark's syntax, with the rule `start`.
    """

    json_schema: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choices: Sequence[Any] | None = None
    lark: str | None = None

    def __post_init__(self) -> None:
        given = self.given()
        if len(given) != 1:
            raise UserError(
                "grammar",
                constraint=f": exactly one of {', '.join(KINDS)} must be given, not {len(given)}.",
            )
        ((name, value),) = given.items()
        if name == "json_schema":
            object.__setattr__(self, name, _schema_text(value))
        elif name == "choices":
            object.__setattr__(self, name, _checked_choices(value))
        else:
            _check_text(name, value)
        if name == "lark" and value.lstrip().startswith("{"):
            raise UserError(name, value, "must be a grammar with the rule start.")

    def given(self) -> dict[str, Any]:
        """Returns the fields that are given, by their names."""
        fields = {
            "json_schema": self.json_schema,
            "regex": self.regex,
            "choices": self.choices,
            "lark": self.lark,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def error(self, constraint: str) -> "GrammarError":
        """Returns an error of the field that is given."""
        ((name, value),) = self.given().items()
        return GrammarError(name, value, constraint)


def bind_grammar(fields: Mapping[str, Any]) -> GrammarConfig | None:
    """Returns the grammar of some fields of `GrammarConfig`; None where there are none.

    Raises:
      UserError: a field that is not known, more than one, or a value that is none.
    """
    for name in fields:
        if name not in KINDS:
            raise UserError(
                f"grammar.{name}", constraint=f"is not a kind of grammar. {nearest(name, KINDS)}"
            )
    return GrammarConfig(**fields) if fields else None


def _schema_text(schema: Any) -> str:
    """Returns a schema as JSON text; raises UserError where it is none."""
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        is_schema = isinstance(value, Mapping | bool)
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError("json_schema", schema, f"is no JSON: {error}.") from error
    if not is_schema:
        raise UserError("json_schema", schema, "must be an object, true or false.")
    _check_text("json_schema", text)
    return text


def _checked_choices(choices: Any) -> tuple[str, ...]:
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise UserError("choices", choices, "must be a list of at least one text.")
    for choice in choices:
        _check_text("choices", choice)
    return tuple(choices)


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise UserError(name, text, "must be text.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            name, constraint=f": half a surrogate pair at character {error.start}."
        ) from error


@dataclasses.dataclass(frozen=True)
class GrammarLimits:
    """What a grammar may take. They count work, and not seconds, so that whether a grammar is met
    does not depend on the load.

    Attributes:
      letters: of the grammar's text.
      symbols: of its compiled productions.
      lexer_states: of the automaton that reads a text, about 1 to 2 kB each.
      compile_steps: of building the lexer; about 50,000 take a millisecond.
      lexer_steps: of one mask; about 14,000 take a millisecond.
      parser_items: of one mask; about 20,000 take a millisecond.
      row_items: ways in which one text may be read at the same time.
    """

    letters: int = 1_000_000
    symbols: int = 500_000
    lexer_states: int = 50_000
    compile_steps: int = 1_000_000
    lexer_steps: int = 200_000
    parser_items: int = 50_000
    row_items: int = 2_000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise UserError(field.name, getattr(self, field.name), "must be at least 1.")
