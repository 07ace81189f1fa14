"""Chat templates: a conversation as the text that a model was taught to read.

A template is Jinja, as Hugging Face keeps it with a model. It comes with a download, so it runs in
Jinja's sandbox and sees plain JSON values only.

What people write must not become a control token. So before the template runs, a private character,
the guard, breaks every spelling of a control token in the inputs; in the text that comes out, only
the template's own control tokens are whole, and another private character, the mark, goes before
each. Then the guards can go. A template that takes letters out of the middle of a message could
still join a token; none that is published does.
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
    """`{% generation %} … {% endgeneration %}`: says which text is the assistant's, and changes
    nothing.
    """

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that keeps Python's own attributes out of a template's reach."""

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
    """Returns the template of a name; without one `tool_use` where there are tools and it exists,
    or else `default`.
    """
    if not templates:
        raise UserError("chat_template", constraint="is missing: this tokenizer has none.")
    if name is None:
        name = "tool_use" if with_tools and "tool_use" in templates else "default"
    if name not in templates:
        raise UserError(
            "chat_template", name, f"is not one of this tokenizer's. {nearest(name, templates)}"
        )
    return templates[name]


def render(source: str, variables: Mapping[str, Any]) -> str:
    """Returns the text that a template makes of its variables.

    Raises:
      UserError: the template is no Jinja, refuses its variables (`raise_exception`), or fails.
    """
    try:
        return _compiled(source).render(variables)
    except Exception as error:  # a template is a program: it can fail in every way that Python can
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError("chat_template", constraint=f": {reason.rstrip('.')}.") from error


def plain(inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns a template's inputs as plain JSON values; what a message holds as None, it does not
    hold.

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
    held = [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]
    return {key: _plain(value, key) for key, value in (inputs | {"messages": held}).items()}


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    # A subclass of str or int can carry methods that the sandbox does not know.
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise UserError(f"{where}: {value!r} must be a plain JSON value, not {type(value).__name__}.")


def with_reasoning(inputs: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns a template's inputs in which what a model thought before an answer has the names that
    the template reads.

    `reasoning_content`, `thinking` and `reasoning` of a message mean the same; a name that it holds
    keeps its value.
    """
    read = [name for name in REASONING if name in _names_in(source)]
    messages = []
    for message in inputs["messages"]:
        told = [message[name] for name in REASONING if name in message]
        aliases = dict.fromkeys(read, told[0]) if told else {}
        messages.append(aliases | message)
    return inputs | {"messages": messages}


@functools.lru_cache(maxsize=16)
def _names_in(source: str) -> frozenset[str]:
    """Returns the attributes and the texts that a template's code names; none of one that is no
    Jinja.
    """
    try:
        tree = _environment().parse(source)
    except (jinja2.TemplateError, RecursionError):
        return frozenset()
    attributes = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    texts = {
        node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)
    }
    return frozenset(attributes | texts)


def unused_characters(source: str, inputs: Mapping[str, Any]) -> tuple[str, str]:
    """Returns two private characters that occur neither in a template nor in its inputs."""
    used = set(source) | set(json.dumps(inputs, ensure_ascii=False))
    found = list(itertools.islice((chr(code) for code in PRIVATE if chr(code) not in used), 2))
    if len(found) < 2:
        raise UserError(
            "messages use every private character of Unicode: none is left to mark control tokens "
            "with."
        )
    return found[0], found[1]


def guarded(value: Any, tokens: Sequence[str], guard: str) -> Any:
    """Returns plain values in which no text spells a control token, whatever is put after it:
    `guard` is in between.
    """
    tokens = _breakable(tokens)
    rests: dict[str, list[str]] = {}
    for token in tokens:
        rests.setdefault(re.escape(token[0]), []).append(re.escape(token[1:]))
    pattern = "|".join(f"(?<={first})(?={'|'.join(rest)})" for first, rest in rests.items())
    spelt = re.compile(pattern, re.IGNORECASE)  # templates change case
    beginnings = {token[:end].lower() for token in tokens for end in range(1, len(token))}
    longest = max(map(len, beginnings), default=0)

    def guard_text(text: str) -> str:
        body = text.rstrip()  # templates strip what they get
        if any(
            body[-length:].lower() in beginnings for length in range(1, min(longest, len(body)) + 1)
        ):
            text = body + guard + text[len(body) :]
        return spelt.sub(guard, text)

    def walk(item: Any) -> Any:
        if isinstance(item, dict):
            return {guard_text(key): walk(held) for key, held in item.items()}
        if isinstance(item, list):
            return [walk(held) for held in item]
        return guard_text(item) if isinstance(item, str) else item

    return walk(value) if tokens else value


def _breakable(tokens: Sequence[str]) -> list[str]:
    """Returns the tokens that have a middle, the longest first; no published tokenizer has a
    control token of one character, and text would have to lose that character."""
    return sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)


def marked(text: str, tokens: Sequence[str], mark: str) -> str:
    """Returns text with `mark` before every control token, the longest where several fit."""
    pattern = "|".join(map(re.escape, _breakable(tokens)))
    return re.sub(pattern, lambda found: mark + found.group(), text) if pattern else text


def split(text: str, tokens: Sequence[str], mark: str) -> Iterator[str]:
    """Yields the parts of a marked text: `mark` and a control token, or plain text."""
    pattern = "|".join(re.escape(mark + token) for token in _breakable(tokens))
    yield from (piece for piece in (re.split(f"({pattern})", text) if pattern else [text]) if piece)
