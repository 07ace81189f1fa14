"""What the tests of grammars share: grammars with independent checks, and texts under masks."""

import functools
import json
import re

import numpy as np

from research.inference.grammar import GrammarCompiler, Matcher
from research.inference.grammar_config import GrammarConfig
from tests.inference.text_tokenizers import tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", None]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CHOICES = ("cat", "cats and dogs", "naïve 東京", '"quoted" \\ \n', "😀", "</s>")
NESTED = 'start: "(" start ")" | NUMBER\nNUMBER: /[0-9]{1,3}/'
REGEXES = (
    "(cat|dog)s? [0-9]{2}",
    "[a-c]{1,5}é?",
    "(naïve|東京){1,2} ?x",
    r"a/b\.c\t\"",
    "😀{1,3}",
    '[^"]{0,6}',
)


def is_instance(text: str) -> bool:
    """Whether a text is JSON of the schema above."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    if not isinstance(value, dict) or not {"name", "age"} <= set(value) <= {"name", "age", "tags"}:
        return False
    tags = value.get("tags", [])
    return (
        isinstance(value["name"], str)
        and len(value["name"]) <= 5
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and isinstance(tags, list)
        and len(tags) <= 2
        and all(tag in ("a", "bc", None) for tag in tags)
    )


def is_nested(text: str) -> bool:
    while text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    return re.fullmatch("[0-9]{1,3}", text) is not None


ORACLES = {
    "json_schema": (GrammarConfig(json_schema=SCHEMA), is_instance),
    "choices": (GrammarConfig(choices=CHOICES), CHOICES.__contains__),
    "lark": (GrammarConfig(lark=NESTED), is_nested),
}
for _index, _regex in enumerate(REGEXES):
    ORACLES[f"regex{_index}"] = (GrammarConfig(regex=_regex), re.compile(_regex).fullmatch)


@functools.cache
def compiler(kind: str) -> GrammarCompiler:
    return GrammarCompiler(tokenizer(kind), threads=2)


def ids_of(of: GrammarCompiler, mask: np.ndarray) -> list[int]:
    bits = np.unpackbits(mask.astype("<u4").view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def sampled(of: GrammarCompiler, matcher: Matcher, seed: int) -> list[int] | None:
    """Ids drawn under the masks; None where the text has not ended after some."""
    rng = np.random.default_rng(seed)
    ids = []
    while len(ids) < 120:
        allowed = ids_of(of, matcher.mask())
        logits = rng.normal(size=of.num_ids)
        # Else random texts seldom end.
        logits[list(of.end_ids)] += 2.0
        token = max(allowed, key=logits.__getitem__)
        assert matcher.accept(token)
        ids.append(token)
        if token in of.end_ids:
            assert matcher.finished
            return ids
    return None
