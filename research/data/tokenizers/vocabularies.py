"""A `tokenizer.json` from the older files that hold a vocabulary alone.

Sources: Devlin et al. 2018, arXiv:1810.04805 (BERT; WordPiece: Wu et al. 2016, arXiv:1609.08144);
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (byte pairs over bytes;
also RoBERTa's, arXiv:1907.11692, and BART's, arXiv:1910.13461). The algorithms are those of the
`tokenizers` library.
"""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from research.core.errors import UserError
from research.data.tokenizers.base import ROLES
from research.data.tokenizers.huggingface import known_specials
from research.data.tokenizers.post_processing import with_template

# BERT's longest word, in characters: a longer one is [UNK].
MAX_WORD = 100


def from_word_pieces(
    vocab: bytes, specials: Mapping[str, Any], settings: Mapping[str, Any]
) -> bytes:
    """Returns the tokenizer.json of a WordPiece vocabulary.

    Args:
      vocab: `vocab.txt`, one token per line.
      specials: the token of each role, a string or the dict of an added token; for other roles
          usual names are tried.
      settings: a `tokenizer_config.json`, of which `do_lower_case`, `strip_accents` (None: as
        `do_lower_case`) and `tokenize_chinese_chars` are read; defaults as in BERT-uncased.

    Raises:
      UserError: not text, or no token for what is unknown.
    """
    try:
        lines = vocab.decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"is not a vocab.txt: {error}.") from error

    ids = {token: i for i, token in enumerate(lines)}
    specials = known_specials(ids) | specials
    unknown = token_name(specials.get("unk"))
    if unknown not in ids:
        raise UserError(
            f"is not a vocab.txt of WordPiece: it has no unk_token {unknown or '[UNK]'!r}."
        )

    model = models.WordPiece(ids, unk_token=unknown, max_input_chars_per_word=MAX_WORD)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=_flag(settings, "tokenize_chinese_chars", True),
        strip_accents=_flag(settings, "strip_accents", None),
        lowercase=_flag(settings, "do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return _finish(tokenizer, specials, has_segment_types=True)


def from_byte_pairs(
    vocab: bytes, merges: bytes, specials: Mapping[str, Any], settings: Mapping[str, Any]
) -> bytes:
    """Returns the tokenizer.json of a byte-level BPE vocabulary, as GPT-2, RoBERTa and BART have.

    Args:
      vocab: `vocab.json`, the id of each token.
      merges: `merges.txt`, the two parts of one token per line, in order of rank.
      specials: the token of each role, a string or the dict of an added token; for other roles
          usual names are tried.
      settings: a `tokenizer_config.json`, of which `add_prefix_space` is read.

    Raises:
      UserError: another kind of vocabulary, or a merge of tokens that it lacks.
    """
    try:
        ids = json.loads(vocab)
        missing = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - ids.keys())
        lines = merges.decode("utf-8").replace("\r\n", "\n").split("\n")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"is not a vocab.json with its merges.txt: {error}.") from error
    if missing:
        raise UserError(
            f"is not a byte-level vocab.json: {len(missing)} bytes are no tokens, such as "
            f"{missing[0]!r}."
        )

    # "t he" -> ("t", "he")
    pairs = []
    for line in lines:
        if not line or line.startswith("#version"):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2:
            raise UserError(f"is not a merges.txt: {line!r} is not a pair of tokens.")
        pairs.append(pair)

    try:
        model = models.BPE(
            ids, pairs, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False
        )
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"is not a vocab.json with its merges.txt: {error}.") from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=_flag(settings, "add_prefix_space", False)
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = known_specials(ids) | specials
    return _finish(tokenizer, specials, has_segment_types=False)


def token_name(token: str | Mapping[str, Any] | None) -> str | None:
    """Returns the spelling of a special token as Hugging Face's files write it: a string, or the
    dict of a token.
    """
    return token["content"] if isinstance(token, Mapping) else token


def _flag(settings: Mapping[str, Any], name: str, default: bool | None) -> bool | None:
    value = settings.get(name, default)
    if value is not default and not isinstance(value, bool):
        raise UserError(
            f"is beside a tokenizer_config.json whose {name} = {value!r} is neither true nor false."
        )
    return value


def _added(token: str | Mapping[str, Any]) -> tokenizers.AddedToken:
    """Returns a special token, with the flags for adjacent spaces that its dict has."""
    if isinstance(token, str):
        return tokenizers.AddedToken(token, special=True, normalized=False)
    names = ("single_word", "lstrip", "rstrip", "normalized")
    flags = {name: bool(token.get(name, False)) for name in names}
    return tokenizers.AddedToken(token["content"], special=True, **flags)


def _finish(
    tokenizer: tokenizers.Tokenizer, specials: Mapping[str, Any], has_segment_types: bool
) -> bytes:
    """Adds the special tokens, those that the vocabulary lacks after its last id, and what begins
    and ends a text.

    Of two texts BERT's second one has segment type 1; RoBERTa's has another end token before it.
    """
    added = [_added(specials[role]) for role in ROLES if role in specials]
    tokenizer.add_special_tokens(added)

    # BERT's roles are CLS and SEP, RoBERTa's also BOS and EOS.
    names = {role: token_name(token) for role, token in specials.items()}
    begin = names.get("cls", names.get("bos"))
    end = names.get("sep", names.get("eos"))
    if begin is not None and end is not None and begin != end:
        # [CLS] A [SEP] B [SEP] with types 0 0 0 1 1, or <s> A </s></s> B </s> without.
        single = [(begin, 0), (None, 0), (end, 0)]
        second = [(end, 0), (None, 0), (end, 0)]
        if has_segment_types:
            second = [(None, 1), (end, 1)]
        ids = {name: tokenizer.token_to_id(name) for name in (begin, end)}
        tokenizer = with_template(tokenizer, single, [*single, *second], ids)
    return tokenizer.to_str().encode("utf-8")
