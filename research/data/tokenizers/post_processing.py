"""What a `tokenizer.json` puts around a text, written so that any spelling of a token is one token.

The library's own template language splits at spaces and reads `x:1` as the token `x` of the second
kind.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

# A part of a template: the spelling of a token, or None for the text, with the kind of segment that
# it belongs to.
Part = tuple[str | None, int]


def with_template(
    library: tokenizers.Tokenizer,
    single: Sequence[Part],
    pair: Sequence[Part],
    ids: Mapping[str, int],
) -> tokenizers.Tokenizer:
    """Returns the tokenizer with what it puts around one text and around two, the second one's
    parts in their order.

    Args:
      library: the tokenizer.
      single: the parts of one text.
      pair: those of two.
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
    texts = iter("AB")  # the first text of a template and the second one
    return [
        {"Sequence": {"id": next(texts), "type_id": kind}}
        if name is None
        else {"SpecialToken": {"id": name, "type_id": kind}}
        for name, kind in template
    ]
