"""The post-processor of a `tokenizer.json`, written so that any spelling of a token is one token.

The library's own template language splits at spaces and reads `x:1` as the token `x` of the second
kind.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

# A part of a template: the spelling of a token, or None for the text, and its segment type (0, 1).
Part = tuple[str | None, int]


def with_template(
    library: tokenizers.Tokenizer,
    single: Sequence[Part],
    pair: Sequence[Part],
    ids: Mapping[str, int],
) -> tokenizers.Tokenizer:
    """Returns the tokenizer with what it puts around one text and around a pair of texts.

    Args:
      library: the tokenizer.
      single: the parts of one text.
      pair: the parts of two texts, the first one before the second.
      ids: of all tokens that the parts spell.
    """
    content = json.loads(library.to_str())
    used = dict.fromkeys(name for name, _ in (*single, *pair) if name is not None)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": _parts(single),
        "pair": _parts(pair),
        "special_tokens": {
            name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in used
        },
    }
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def _parts(template: Sequence[Part]) -> list[dict[str, Any]]:
    parts = []
    names = iter("AB")  # the library's names of the first text and the second one
    for token, segment_type in template:
        if token is None:
            part = {"Sequence": {"id": next(names), "type_id": segment_type}}
        else:
            part = {"SpecialToken": {"id": token, "type_id": segment_type}}
        parts.append(part)
    return parts
