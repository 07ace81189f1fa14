"""Chat templates: a conversation as text in the format that the model was trained on.

A template is Jinja, as Hugging Face keeps it with a model. It comes with a download, so it runs in
Jinja's sandbox and reads plain JSON values only.

What people write must not become a control token. So before the template runs, a private character,
the guard, breaks every spelling of a control token in the inputs; in the text that comes out, only
the template's own control tokens are intact, and another private character, the mark, is put before
each. Then the guards are removed. A template that deletes letters inside a message could still
form a token; no published one does.
"""

import datetime
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.sandbox

from research.core.errors import UserError, nearest

# What a message's reasoning is called, in the order in which it is looked for.
REASONING = ("reasoning_content", "thinking", "reasoning")
PRIVATE = range(0xE000, 0xF900)  # Unicode's first private use area


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`: marks the assistant's text, and changes nothing."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        statements = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(statements, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without access to Python's own attributes, which begin with an underscore."""

    def __init__(self, *args: Any, **values: Any):
        for name in dict(*args, **values):
            _check_public(name)
        super().__init__(*args, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r} must not begin with an underscore")


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape what HTML reserves."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _now,
        "namespace": _Namespace,
    }
    return environment


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def choose(templates: Mapping[str, str], name: str | None, with_tools: bool) -> str:
    """Returns the template of a name; without a name `tool_use` where there are tools and it
    exists, or else `default`.
    """
    if not templates:
        raise UserError("chat_template", constraint="is missing: this tokenizer has none.")
    if name is None:
        has_tool_use = with_tools and "tool_use" in templates
        name = "tool_use" if has_tool_use else "default"
    if name not in templates:
        raise UserError(
            "chat_template", name, f"is not one of this tokenizer's. {nearest(name, templates)}"
        )
    return templates[name]


def render(source: str, variables: Mapping[str, Any]) -> str:
    """Returns the text that a template makes of its variables.

    Raises:
      UserError: the template is no Jinja, rejects its variables (`raise_exception`), or fails.
    """
    try:
        return _compiled(source).render(variables)
    except Exception as error:  # a template is a program: it can fail in every way that Python can
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError("chat_template", constraint=f": {reason.rstrip('.')}.") from error


def plain(inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns a template's inputs as plain JSON values; fields of a message that are None are left
    out.

    Raises:
      UserError: no messages, a message that is no dict, or a value that JSON does not have.
    """
    messages = inputs["messages"]
    if not messages:
        raise UserError("messages", constraint="is empty: a conversation has at least one.")
    for message in messages:
        if not isinstance(message, Mapping):
            raise UserError(
                "messages",
                constraint=f": {message!r} must be a dict, as in "
                f"{{'role': 'user', 'content': 'Hello'}}.",
            )

    stated = []
    for message in messages:
        fields = {key: value for key, value in message.items() if value is not None}
        stated.append(fields)
    inputs = inputs | {"messages": stated}
    return {key: _plain(value, key) for key, value in inputs.items()}


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(element, where) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(element, where) for element in value]
    # A subclass of str or int can carry methods that the sandbox does not know.
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise UserError(f"{where}: {value!r} must be a plain JSON value, not {type(value).__name__}.")


def with_reasoning(inputs: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns a template's inputs in which the reasoning before an answer has the names that the
    template reads.

    `reasoning_content`, `thinking` and `reasoning` of a message mean the same; a field that it has
    keeps its value.
    """
    names_in_source = _names_in(source)
    read = [name for name in REASONING if name in names_in_source]

    messages = []
    for message in inputs["messages"]:
        reasoning = [message[name] for name in REASONING if name in message]
        aliases = dict.fromkeys(read, reasoning[0]) if reasoning else {}
        messages.append(aliases | message)
    return inputs | {"messages": messages}


@functools.lru_cache(maxsize=16)
def _names_in(source: str) -> frozenset[str]:
    """Returns the attributes and the texts that a template's code names; none where it is not valid
    Jinja.
    """
    try:
        tree = _environment().parse(source)
    except (jinja2.TemplateError, RecursionError):
        return frozenset()
    names = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    for node in tree.find_all(jinja2.nodes.Const):
        if isinstance(node.value, str):
            names.add(node.value)
    return frozenset(names)


def unused_characters(source: str, inputs: Mapping[str, Any]) -> tuple[str, str]:
    """Returns two private characters that occur neither in a template nor in its inputs."""
    used = set(source) | set(json.dumps(inputs, ensure_ascii=False))
    unused = (chr(code) for code in PRIVATE if chr(code) not in used)
    found = list(itertools.islice(unused, 2))
    if len(found) < 2:
        raise UserError(
            "messages use every private character of Unicode: none is left to mark control tokens "
            "with."
        )
    first, second = found
    return first, second


def guarded(value: Any, tokens: Sequence[str], guard: str) -> Any:
    """Returns plain values in which no text spells a control token, whatever text follows it: every
    spelling has `guard` inside.
    """
    tokens = _breakable(tokens)
    if not tokens:
        return value
    spelling = _inside(tokens)
    # "<s>" -> "<", "<s"
    prefixes = {token[:end].lower() for token in tokens for end in range(1, len(token))}
    longest = max(map(len, prefixes))

    def guard_text(text: str) -> str:
        # A token may begin at the end of this text and end in the next one: a guard goes between.
        # Templates strip the texts that they get.
        stripped = text.rstrip()
        most = min(longest, len(stripped))
        endings = [stripped[-length:].lower() for length in range(1, most + 1)]
        if not prefixes.isdisjoint(endings):
            spaces = text[len(stripped) :]
            text = stripped + guard + spaces
        return spelling.sub(guard, text)

    def guard_all(item: Any) -> Any:
        if isinstance(item, str):
            return guard_text(item)
        if isinstance(item, list):
            return [guard_all(element) for element in item]
        if isinstance(item, dict):
            return {guard_text(key): guard_all(element) for key, element in item.items()}
        return item

    return guard_all(value)


def _inside(tokens: Sequence[str]) -> re.Pattern[str]:
    """Returns a pattern of the gap behind the first character of every spelling of a token.

    Tokens ["<s>", "<b>"] -> (?<=<)(?=s>|b>)
    """
    rests: dict[str, list[str]] = {}
    for token in tokens:
        first = re.escape(token[0])
        rests.setdefault(first, []).append(re.escape(token[1:]))

    gaps = []
    for first, rest in rests.items():
        any_rest = "|".join(rest)
        gaps.append(f"(?<={first})(?={any_rest})")
    return re.compile("|".join(gaps), re.IGNORECASE)  # templates change case


def _breakable(tokens: Sequence[str]) -> list[str]:
    """Returns the tokens of more than one character, the longest first; no published tokenizer has
    a control token of one character, and text would have to lose that character.
    """
    breakable = [token for token in tokens if len(token) > 1]
    return sorted(breakable, key=len, reverse=True)


def marked(text: str, tokens: Sequence[str], mark: str) -> str:
    """Returns text with `mark` before every control token, the longest where several fit."""
    pattern = "|".join(map(re.escape, _breakable(tokens)))
    if not pattern:
        return text
    return re.sub(pattern, lambda found: mark + found.group(), text)


def split(text: str, tokens: Sequence[str], mark: str) -> Iterator[str]:
    """Yields the parts of a marked text: `mark` and a control token, or plain text."""
    # "aM<s>b" -> "a", "M<s>", "b"
    names = [re.escape(mark + token) for token in _breakable(tokens)]
    any_name = "|".join(names)
    parts = re.split(f"({any_name})", text) if names else [text]
    for part in parts:
        if part:
            yield part
