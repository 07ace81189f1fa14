"""Tokenizers of the Hugging Face library, read from a `tokenizer.json`."""

import dataclasses
import json
import re
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
# How vocabularies with byte fallback spell a byte.
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`. Encodes as the library does, except that text never yields a special
    token.
    """

    kind: ClassVar[str] = "huggingface"

    def __init__(self, data: bytes, specials: Mapping[str, str | None] | None = None):
        """Args: data: the `tokenizer.json`. specials: the token of each of `ROLES`; None: found by
        known names.

        Raises:
          UserError: not a tokenizer.json, or a special token that it does not have.
        """
        content, added = _parsed(data)
        if specials is None:
            specials = known_specials(added)
        sentinels = _sentinels(added)
        for name in (*specials.values(), *sentinels):
            if name in added:  # some files lack the mark, and then text could spell these tokens
                added[name]["special"] = True

        self._data = data
        self._specials = {role: token for role, token in specials.items() if token is not None}
        self._control = {name: token["id"] for name, token in added.items() if token["special"]}
        self._tokenizer = _library(content)
        self._encoder = self._tokenizer
        if content["model"].get("type") == "Unigram":
            self._encoder = _library(_hide(content, self._control))
        self._marking: _Marking | None = None
        self._decoders = _decoder_types(content.get("decoder"))
        self._bytes = _byte_letters()

        # Ids may have gaps, so the number of tokens does not bound them.
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = 1 + max(ids, default=-1)
        # BERT has other names for what begins and ends a text.
        self.bos_id = self._id("bos", "cls")
        self.eos_id = self._id("eos", "sep")
        self.pad_id = self._id("pad")
        self.unk_id = self._id("unk")
        self.mask_id = self._id("mask")
        self.sentinel_ids = tuple(added[name]["id"] for name in sentinels)

    def _id(self, *roles: str) -> int | None:
        """Returns the id of the first of these roles that has a token."""
        for role in roles:
            if role not in self._specials:
                continue
            token = self._specials[role]
            found = self._tokenizer.token_to_id(token)
            if found is None:
                raise UserError(role, token, "is not a token of this tokenizer.json.")
            return found
        return None

    @property
    def specials(self) -> dict[str, str]:
        """The spelling of the special tokens, by their `ROLES`."""
        return dict(self._specials)

    @property
    def control_tokens(self) -> dict[str, int]:
        """The ids of the tokens that the file marks as special."""
        return self._control

    def token_of(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def bytes_of(self, token_id: int) -> bytes | None:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token in self._control or token_id == self.unk_id:
            return None
        if "ByteLevel" in self._decoders and self._bytes.keys() >= set(token):
            return bytes(self._bytes[letter] for letter in token)
        if "ByteFallback" in self._decoders and BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])

        # Other decoders are known by what they do: as a later token, "cat" may be " cat", and
        # "##s" is "s".
        before = self._tokenizer.decode([token_id])
        text = self._tokenizer.decode([token_id, token_id])
        return text[len(before) :].encode("utf-8")

    def frame_of_file(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the ids that the file's post-processor puts before and after a text."""
        # What the post-processor adds is marked 1, and what the text itself becomes 0:
        # <s> a </s> -> mask [1, 0, 1] -> the text's ids are 1:2
        encoding = self._tokenizer.encode("a")
        ids = tuple(encoding.ids)
        is_added = encoding.special_tokens_mask
        start = len(ids)
        end = len(ids)
        if 0 in is_added:
            start = is_added.index(0)
            end -= is_added[::-1].index(0)
        return ids[:start], ids[end:]

    def _encode_batch(self, texts: list[str]) -> list[Int[np.ndarray, "_"]]:
        encodings = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """Lets the library find the tokens, which may take the spaces beside them, under their
        marked spelling.
        """
        tokens = self.chat_tokens
        marking = self._marking
        if marking is None or marking.mark != mark or marking.tokens != tokens:
            marking = self._marking_for(tokens, mark)
            self._marking = marking
        ids = marking.library.encode(text, add_special_tokens=False).ids
        return [marking.originals.get(i, i) for i in ids]

    def _marking_for(self, tokens: Mapping[str, int], mark: str) -> "_Marking":
        """Returns a copy of the tokenizer that knows each of these tokens as `mark` and its name.

        The copied tokens are not special, because the library encodes special tokens in text as
        plain text. Original tokens that are not special get an unknown name, so that they cannot be
        found in text.
        """
        content = json.loads(self._encoder.to_str())
        further = [name for name in tokens if name not in self._control]
        if further:
            content = _hide(content, further)
        library = _library(content)

        # Copies take the spaces beside them that the originals would take.
        added = self._tokenizer.get_added_tokens_decoder()
        copies = {}
        for name, i in tokens.items():
            original = added[i] if i in added else tokenizers.AddedToken(name)
            copies[i] = tokenizers.AddedToken(
                mark + original.content,
                lstrip=original.lstrip,
                rstrip=original.rstrip,
                normalized=False,
                special=False,
            )
        library.add_tokens(list(copies.values()))
        originals = {library.token_to_id(copy.content): i for i, copy in copies.items()}
        return _Marking(mark, tokens, library, originals)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._data}

    def options(self) -> dict[str, Any]:
        return {"specials": self.specials}


@dataclasses.dataclass(frozen=True)
class _Marking:
    """A copy of a tokenizer in which some tokens are spelt with a mark before their name.

    Attributes:
      mark: the character.
      tokens: ids of the tokens, by their names.
      library: the copy.
      originals: the tokens' ids by those that they have in the copy.
    """

    mark: str
    tokens: Mapping[str, int]
    library: tokenizers.Tokenizer
    originals: Mapping[int, int]


def _parsed(data: bytes) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Returns the content of a `tokenizer.json`, and its added tokens by their spelling."""
    try:
        content = json.loads(data)
        added = {token["content"]: token for token in content["added_tokens"]}
        for token in added.values():
            token.setdefault("special", False)
        have_ids = all(type(token["id"]) is int for token in added.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"is not a tokenizer.json: {error}.") from error
    if not have_ids:
        raise UserError("is not a tokenizer.json: the id of an added token is no whole number.")
    return content, added


def _library(content: dict[str, Any]) -> tokenizers.Tokenizer:
    """Returns the library's tokenizer, set to encode special tokens in text as plain text."""
    try:
        library = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"is not a tokenizer.json: {error}.") from error
    library.no_padding()
    library.no_truncation()
    library.encode_special_tokens = True
    return library


def _hide(content: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Renames tokens that a model would find in text (T5's `</s>` is a piece), and removes merges
    that make them.

    Nobody can know their new names. Their scores stay, because the lowest score decides the score
    of what is unknown.
    """
    hidden = {name: name + secrets.token_hex(16) for name in names}
    model = content["model"]
    changed: dict[str, Any] = {}
    if isinstance(model["vocab"], dict):
        changed["vocab"] = {hidden.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:  # a unigram model's pairs of piece and score
        changed["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        merges = model["merges"]
        changed["merges"] = [pair for pair in merges if hidden.keys().isdisjoint(_tokens_of(pair))]

    renamed = []
    for token in content["added_tokens"]:
        name = token["content"]
        renamed.append(token | {"content": hidden.get(name, name)})
    return content | {"model": model | changed, "added_tokens": renamed}


def _decoder_types(decoder: Mapping[str, Any] | None) -> set[str]:
    """Returns the types of a decoder and of those that it is a sequence of."""
    if decoder is None:
        return set()
    types = {decoder["type"]}
    if "decoders" in decoder:
        for part in decoder["decoders"]:
            types |= _decoder_types(part)
    return types


def _byte_letters() -> dict[str, int]:
    """Returns the byte that each letter of a byte-level vocabulary stands for.

    Source: Radford et al. 2019 (GPT-2), `bytes_to_unicode`: bytes that can be seen stand for
    themselves, the others are the letters from 256 on.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown}
    for index, byte in enumerate(hidden):
        letters[chr(256 + index)] = byte
    return letters


def _tokens_of(merge: str | list[str]) -> tuple[str, str, str]:
    """Returns the two tokens of a merge, which older files write with a space between, and the one
    that they make.
    """
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right


def known_specials(tokens: Container[str]) -> dict[str, str]:
    """Returns the token of each role that has one of its usual names among `tokens`."""
    found = {}
    for role in ROLES:
        names = [name for name in KNOWN[role] if name in tokens]
        if names:
            found[role] = names[0]
    return found


def _sentinels(tokens: Mapping[str, Any]) -> list[str]:
    """Returns the spellings of the sentinels among `tokens`, in their order."""
    names: list[str] = []
    while SENTINEL.format(len(names)) in tokens:
        names.append(SENTINEL.format(len(names)))
    return names
