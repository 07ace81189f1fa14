"""A `tokenizer.json` for the tokenizers that have none: SentencePiece models and bytes.

With it the `tokenizers` library gives the ids that SentencePiece gives, as far as tests compare
them.
"""

import re
from collections.abc import Sequence
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers

from research.core.errors import UserError
from research.data.tokenizers.base import Tokenizer
from research.data.tokenizers.pieces import META_SPACE
from research.data.tokenizers.post_processing import Part, with_template

# TrainerSpec.model_type
UNIGRAM = 1
BYTE_PAIRS = 2
# SentencePiece.type of the pieces that text can spell.
NORMAL = 1
USER_DEFINED = 4
UNUSED = 5
# The spelling of a byte, <0x0A>, after its first character.
BYTE_END = "0x[0-9A-F]{2}>"
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))


def to_tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """Returns the tokenizer.json of a SentencePiece or byte tokenizer.

    Raises:
      UserError: a SentencePiece model of a kind that the library does not have.
    """
    model_files = list(tokenizer.files().values())
    library = _from_sentencepiece(model_files[0]) if model_files else _from_bytes()

    control = tokenizer.control_tokens
    specials = tokenizer.specials
    if "unk" in specials:  # text that spells it is not unknown
        control = {specials["unk"]: tokenizer.unk_id, **control}

    # Tokens that the model lacks get the ids after its own, in this order.
    added = []
    for name in sorted(control, key=control.__getitem__):
        added.append(tokenizers.AddedToken(name, normalized=False, special=True))
    library.add_special_tokens(added)
    for name, i in control.items():
        assert library.token_to_id(name) == i, "control tokens keep their ids"

    if "bos" in specials:
        library = _framed(library, [(specials["bos"], 0), (None, 0)], specials["bos"])
    elif "eos" in specials:  # as T5, which has sentinels, and mT5, which has none
        library = _framed(library, [(None, 0), (specials["eos"], 0)], specials["eos"])
    return library.to_str().encode("utf-8")


def with_frame(data: bytes, frame: tuple[Sequence[int], Sequence[int]]) -> bytes:
    """Returns a tokenizer.json that puts the ids of `frame` before and after a text."""
    library = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    before, after = frame
    ids = {library.id_to_token(i): i for i in (*before, *after)}

    # Before (1,), after (2,) -> <s> text </s>
    single: list[Part] = [(library.id_to_token(i), 0) for i in before]
    single.append((None, 0))
    single += [(library.id_to_token(i), 0) for i in after]
    framed = with_template(library, single, [*single, *single], ids)
    return framed.to_str().encode("utf-8")


def _framed(library: tokenizers.Tokenizer, single: list[Part], token: str) -> tokenizers.Tokenizer:
    """Returns the tokenizer with the parts of one text, around both of a pair too."""
    ids = {token: library.token_to_id(token)}
    return with_template(library, single, [*single, *single], ids)


def _from_bytes() -> tokenizers.Tokenizer:
    """Returns byte-level BPE without merges; the library writes bytes as printable characters."""
    # GPT-2's table: bytes that print are themselves, the others are the characters from 256 on.
    characters = {byte: chr(byte) for byte in PRINTABLE}
    rest = [byte for byte in range(256) if byte not in PRINTABLE]
    for code, byte in enumerate(rest, start=256):
        characters[byte] = chr(code)

    vocab = {characters[byte]: byte for byte in range(256)}
    library = tokenizers.Tokenizer(models.BPE(vocab, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    return library


def _from_sentencepiece(data: bytes) -> tokenizers.Tokenizer:
    """Returns the library's tokenizer of a SentencePiece model; raises UserError where there can be
    none.
    """
    try:
        return _library_of(sentencepiece_model_pb2.ModelProto.FromString(data))
    except UserError:
        raise
    except Exception as error:  # both libraries raise bare Exception for a damaged model
        reason = " ".join(str(error).split())
        raise UserError(
            "tokenizer", constraint=f": its model cannot be written as a tokenizer.json: {reason}."
        ) from error


def _library_of(model: sentencepiece_model_pb2.ModelProto) -> tokenizers.Tokenizer:
    trainer = model.trainer_spec
    rules = model.normalizer_spec
    if trainer.model_type not in (UNIGRAM, BYTE_PAIRS) or trainer.treat_whitespace_as_suffix:
        raise UserError(
            "tokenizer",
            constraint=": this kind of SentencePiece model cannot be written as a tokenizer.json.",
        )
    symbols = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    spellable = {piece.piece for piece in model.pieces if piece.type in (NORMAL, UNUSED)}

    # Encoding: the model, and the normalization before it.
    is_unigram = trainer.model_type == UNIGRAM
    if is_unigram:
        pieces = [(piece.piece, piece.score) for piece in model.pieces]
        library_model = models.Unigram(pieces, trainer.unk_id, trainer.byte_fallback)
    else:
        library_model = _byte_pairs(model, symbols, spellable)
    library = tokenizers.Tokenizer(library_model)
    library.normalizer = normalizers.Sequence(_normalizers(rules))

    # The library would find the spelling of a byte or a control token in text, as a piece or, where
    # it looks up all of a pre-token, as that.
    hidden: list[str] = []
    if symbols or is_unigram:
        known = spellable.union(symbols)
        hidden = [piece.piece for piece in model.pieces if piece.piece not in known]
    splits = [*_symbol_splits(symbols), *_spelling_splits(hidden, spellable)]
    if splits:
        library.pre_tokenizer = pre_tokenizers.Sequence(splits)

    # Decoding.
    steps = [decoders.Replace(META_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    library.decoder = decoders.Sequence(steps)
    return library


def _byte_pairs(
    model: sentencepiece_model_pb2.ModelProto, symbols: list[str], spellable: set[str]
) -> models.BPE:
    """Returns the library's BPE model of a SentencePiece one."""
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.piece in spellable}
    return models.BPE(
        ids,
        _merges(scores, ids, spellable),
        unk_token=model.pieces[model.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
        # A symbol is a pre-token of its own, which is looked up before it is merged.
        ignore_merges=bool(symbols),
    )


def _symbol_splits(symbols: list[str]) -> list[pre_tokenizers.PreTokenizer]:
    """Returns pre-tokenizers that cut user-defined symbols out of text, the longest where several
    fit, as SentencePiece does.

    They are no added tokens: the library would take those out before it normalizes, and then begin
    what follows anew, with a space in front.
    """
    if not symbols:
        return []
    longest_first = sorted(symbols, key=len, reverse=True)
    any_symbol = "|".join(map(re.escape, longest_first))
    return [pre_tokenizers.Split(tokenizers.Regex(any_symbol), "isolated")]


def _spelling_splits(names: list[str], spellable: set[str]) -> list[pre_tokenizers.PreTokenizer]:
    """Returns pre-tokenizers that cut the spellings of `names` in two, where no piece of text
    crosses the cut.
    """
    pairs = {piece[i : i + 2] for piece in spellable for i in range(len(piece) - 1)}

    gaps: set[str] = set()
    for name in names:
        if len(name) < 2:
            continue
        # "<s>" is cut into "<" and "s>", or "<s" and ">" if only a piece spells "<s".
        cuts = [i for i in range(1, len(name)) if name[i - 1 : i + 1] not in pairs]
        cut = cuts[0] if cuts else 1
        before = re.escape(name[:cut])
        after = name[cut:]
        after = BYTE_END if re.fullmatch(BYTE_END, after) else re.escape(after)
        gaps.add(f"(?<={before})(?={after})")

    if not gaps:
        return []
    any_gap = "|".join(sorted(gaps))
    return [pre_tokenizers.Split(tokenizers.Regex(any_gap), "isolated")]


def _merges(
    scores: dict[str, float], ids: dict[str, int], spellable: set[str]
) -> list[tuple[str, str]]:
    """Returns the pairs of pieces that make a piece, in the order in which SentencePiece would
    merge them.
    """
    merged = [piece for piece in scores if len(piece) > 1]
    merged.sort(key=lambda piece: (-scores[piece], ids[piece]))

    merges = []
    for piece in merged:
        # "abc" -> (a, bc), (ab, c)
        for cut in range(1, len(piece)):
            left = piece[:cut]
            right = piece[cut:]
            if left in spellable and right in spellable:
                merges.append((left, right))
    return merges


def _normalizers(rules: Any) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        # Spaces at both ends go, and of several in between one stays.
        around = tokenizers.Regex(r"\A +| +\z")
        repeated = tokenizers.Regex(" {2,}")
        steps.append(normalizers.Replace(around, ""))
        steps.append(normalizers.Replace(repeated, " "))
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(META_SPACE))
    return [*steps, normalizers.Replace(" ", META_SPACE)]
