"""Tokenizers of the Hugging Face library, read from a `tokenizer.json`."""

import itertools
import json
import secrets
from collections.abc import Collection, Container, Mapping
from typing import Any, ClassVar

import numpy as np
import tokenizers
from jaxtyping import Int

from research.core.errors import UserError
from research.data.tokenizers.base import ROLES, SENTINEL, Tokenizer

# A tokenizer.json does not say which token begins or ends a text; where the files beside it do not
# either, these names decide (GPT-2, LLaMA 1 and 2, RoBERTa, BART, T5, LLaMA 3, Gemma, BERT, Qwen).
KNOWN = {
    "bos": ("<|begin_of_text|>", "<s>", "<bos>"),
    "eos": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"),
    "unk": ("<unk>", "[UNK]"),
    "sep": ("[SEP]",),
    "pad": ("<pad>", "[PAD]", "<|finetune_right_pad_id|>"),
    "cls": ("[CLS]",),
    "mask": ("<mask>", "[MASK]"),
}


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`. Encodes as the library does, except that text never yields a special
    token.
    """

    kind: ClassVar[str] = "huggingface"

    def __init__(self, data: bytes, specials: Mapping[str, str | None] | None = None):
        """Args: data: the `tokenizer.json`. specials: the token of each of `ROLES`; None: by known
        names.

        Raises:
          UserError: not a tokenizer.json, or a special token that it does not have.
        """
        try:
            content = json.loads(data)
            added = {token["content"]: token for token in content["added_tokens"]}
            for token in added.values():
                token.setdefault("special", False)
            whole = all(type(token["id"]) is int for token in added.values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"is not a tokenizer.json: {error}.") from error
        if not whole:
            raise UserError("is not a tokenizer.json: the id of an added token is no whole number.")
        specials = known_specials(added) if specials is None else specials
        sentinels = _sentinels(added)
        for name in (*specials.values(), *sentinels):
            if name in added:  # some files forget to mark them, and then text could spell them
                added[name]["special"] = True
        self._tokenizer = _library(content)
        self._control = {name: token["id"] for name, token in added.items() if token["special"]}
        is_unigram = content["model"].get("type") == "Unigram"
        self._encoder = _library(_hide(content, self._control)) if is_unigram else self._tokenizer
        self._data = data
        self._specials = {role: token for role, token in specials.items() if token is not None}
        self._marked: tuple[str, dict[str, int], tokenizers.Tokenizer, dict[int, int]] | None = None
        # Ids may have gaps, so the count of tokens is not the bound of the ids.
        self.vocab_size = 1 + max(
            self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1
        )
        # BERT begins and ends with what it calls by other names.
        self.bos_id, self.eos_id = self._id("bos", "cls"), self._id("eos", "sep")
        self.pad_id, self.unk_id, self.mask_id = (self._id(role) for role in ("pad", "unk", "mask"))
        self.sentinel_ids = tuple(added[name]["id"] for name in sentinels)

    def _id(self, *roles: str) -> int | None:
        """Returns the id of the first of these roles that has a token."""
        for role in roles:
            if role in self._specials:
                found = self._tokenizer.token_to_id(self._specials[role])
                if found is None:
                    raise UserError(
                        role, self._specials[role], "is not a token of this tokenizer.json."
                    )
                return found
        return None

    @property
    def specials(self) -> dict[str, str]:
        """The spelling of the tokens that have a part to play, by their `ROLES`."""
        return dict(self._specials)

    @property
    def control_tokens(self) -> dict[str, int]:
        """The ids of the tokens that the file marks as special."""
        return self._control

    def token_of(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def frame_of_file(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the ids that the file's post-processor puts before and after a text."""
        encoding = self._tokenizer.encode("a")
        ids = list(zip(encoding.ids, encoding.special_tokens_mask, strict=True))
        # What the post-processor adds is marked 1, and what the text itself becomes 0.
        before = [i for i, _ in itertools.takewhile(lambda pair: pair[1], ids)]
        after = [
            i for i, _ in itertools.takewhile(lambda pair: pair[1], reversed(ids[len(before) :]))
        ]
        return tuple(before), tuple(reversed(after))

    def _encode_batch(self, texts: list[str]) -> list[Int[np.ndarray, "_"]]:
        encodings = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """Lets the library find the tokens, which may take the spaces beside them, under their
        marked spelling.
        """
        tokens = self.chat_tokens
        if self._marked is None or self._marked[:2] != (mark, tokens):
            self._marked = (mark, tokens, *self._marking(tokens, mark))
        *_, marking, originals = self._marked
        return [originals.get(i, i) for i in marking.encode(text, add_special_tokens=False).ids]

    def _marking(
        self, names: Mapping[str, int], mark: str
    ) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """Returns a copy of the tokenizer that knows each of these tokens as `mark` and its name;
        ids to the real ones.

        The copies are not special, because special tokens are text to both. Tokens that are not
        special have no other name, so that they cannot be found in text.
        """
        content = json.loads(self._encoder.to_str())
        further = [name for name in names if name not in self._control]
        marking = _library(_hide(content, further) if further else content)
        added = self._tokenizer.get_added_tokens_decoder()
        tokens = {
            i: added[i] if i in added else tokenizers.AddedToken(name) for name, i in names.items()
        }
        copies = [
            tokenizers.AddedToken(
                mark + token.content,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=False,
                special=False,
            )
            for token in tokens.values()
        ]
        marking.add_tokens(copies)
        return marking, {
            marking.token_to_id(mark + token.content): i for i, token in tokens.items()
        }

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._data}

    def options(self) -> dict[str, Any]:
        return {"specials": self.specials}


def _library(content: dict[str, Any]) -> tokenizers.Tokenizer:
    """Returns the library's tokenizer, to which special tokens in text are text."""
    try:
        library = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"is not a tokenizer.json: {error}.") from error
    library.no_padding()
    library.no_truncation()
    library.encode_special_tokens = True
    return library


def _hide(content: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Renames tokens that a model would take out of text (T5's `</s>` is a piece), and forgets
    merges that make them.

    Nobody can know their new names. Their scores stay, because the least score tells what is
    unknown.
    """
    hidden = {name: name + secrets.token_hex(16) for name in names}
    model = content["model"]
    changed: dict[str, Any] = {}
    if isinstance(model["vocab"], dict):
        changed["vocab"] = {hidden.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:  # a unigram model's pairs of piece and score
        changed["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        changed["merges"] = [
            pair for pair in model["merges"] if hidden.keys().isdisjoint(_pieces(pair))
        ]
    renamed = [
        token | {"content": hidden.get(token["content"], token["content"])}
        for token in content["added_tokens"]
    ]
    return content | {"model": model | changed, "added_tokens": renamed}


def _pieces(merge: str | list[str]) -> tuple[str, str, str]:
    """Returns the two pieces of a merge, which older files write with a space between, and what
    they make.
    """
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right


def known_specials(tokens: Container[str]) -> dict[str, str]:
    """Returns the token of each role that has one of its usual names among `tokens`."""
    found = {role: next((name for name in KNOWN[role] if name in tokens), None) for role in ROLES}
    return {role: name for role, name in found.items() if name is not None}


def _sentinels(tokens: Mapping[str, Any]) -> list[str]:
    """Returns the spellings of the sentinels among `tokens`, in their order."""
    names: list[str] = []
    while SENTINEL.format(len(names)) in tokens:
        names.append(SENTINEL.format(len(names)))
    return names
