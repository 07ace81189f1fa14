"""Writes `goldens.json`: what independent implementations make of hard texts.

`python -m tests.data.tokenizers.make_goldens DATA`, with `transformers` and `regex`. The
implementations are those of `references`; BERT also with case, and with accents.
"""

import json
import pathlib
import sys

from tests.data.tokenizers import references

FILE = pathlib.Path(__file__).with_name("goldens.json")
HARD = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\tand a tab\nand a line ",
    "naïve café, Ångström, Übergröße, ÇA VA",
    "e\u0301 is e and an accent; ﬁ is one sign",
    "東京は日本の首都です。中文也行,混合mixed文字",
    "한국어 텍스트",
    "Привет, мир! ¿Qué tal? Ğüzel",
    "😀👩‍👩‍👧 and 🇩🇪",
    "control \x00\x01\x07\x1b characters \x7f\x85",
    "non-breaking\u00a0space, zero\u200bwidth, ideographic\u3000space, \ufeff mark",
    "3.14159, 1,000,000 and 2026-11-21; x==y != z",
    "it's we'll they've I'M YOU'RE o'clock",
    "a" * 99 + " " + "b" * 100 + " " + "c" * 101,
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "snake_case CamelCase kebab-case http://example.com/?q=1&r=#2",
    "\r\n\r\nWindows\r\nlines\r\n",
    "„quotes“ ‘single’ «guillemets» … — –",
    "\U0001d54f \U00020000 \ufffd",
    "Ünïcödé ＦＵＬＬＷＩＤＴＨ １２３",
    "▁meta▁space▁",
    "x" * 300,
]


def main(data: pathlib.Path) -> None:
    """Writes the goldens."""
    vocab = data / "tok-bert-uncased" / "vocab.txt"
    families = {
        "bert": references.bert(vocab),
        "bert_cased": references.bert(vocab, do_lower_case=False, tokenize_chinese_chars=False),
        "bert_accents": references.bert(vocab, strip_accents=False),
        "gpt2": references.gpt2(data / "tok-gpt2"),
        "t5": references.sentence_pieces(data / "tok-t5-base" / "t5-base.model"),
    }
    ids = {name: [encode(text) for text in HARD] for name, encode in families.items()}
    rows = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(values)}"
        for name, values in {"texts": HARD, **ids}.items()
    )
    FILE.write_text(f"{{\n{rows}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
