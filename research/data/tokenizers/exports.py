"""A `tokenizer.json` for the tokenizers that have none: SentencePiece models and bytes.

It tells the `tokenizers` library to do what SentencePiece does; how far that goes is what its tests
measure.
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

UNIGRAM, BYTE_PAIRS = 1, 2  # TrainerSpec.model_type
# SentencePiece.type: what text can spell, and what it cannot.
NORMAL, USER_DEFINED, UNUSED = 1, 4, 5
# How the spelling of a byte, <0x0A>, goes on after its first letter.
BYTE_END = "0x[0-9A-F]{2}>"
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))


def to_tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """Returns the tokenizer.json of a SentencePiece or byte tokenizer.

    Raises:
      UserError: a SentencePiece model of a kind that the library does not have.
    """
    models_held = [*tokenizer.files().values()]
    library = _from_sentencepiece(models_held[0]) if models_held else _from_bytes()
    control, specials = tokenizer.control_tokens, tokenizer.specials
    if "unk" in specials:  # text that spells it is not unknown
        control = {specials["unk"]: tokenizer.unk_id, **control}
    names = sorted(control, key=control.__getitem__)
    library.add_special_tokens(
        [tokenizers.AddedToken(name, normalized=False, special=True) for name in names]
    )
    assert all(library.token_to_id(name) == i for name, i in control.items()), (
        "control tokens lie where they lay"
    )
    if "bos" in specials:
        library = _framed(library, [(specials["bos"], 0), (None, 0)], specials["bos"])
    elif "eos" in specials:  # as T5 is read, with sentinels or, as mT5, without
        library = _framed(library, [(None, 0), (specials["eos"], 0)], specials["eos"])
    return library.to_str().encode("utf-8")


def with_frame(data: bytes, frame: tuple[Sequence[int], Sequence[int]]) -> bytes:
    """Returns a tokenizer.json that puts the ids of `frame` before and after a text."""
    library = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    names = {i: library.id_to_token(i) for ids in frame for i in ids}
    before, after = ([(names[i], 0) for i in ids] for ids in frame)
    single = [*before, (None, 0), *after]
    ids = {name: i for i, name in names.items()}
    return with_template(library, single, [*single, *single], ids).to_str().encode("utf-8")


def _framed(library: tokenizers.Tokenizer, single: list[Part], token: str) -> tokenizers.Tokenizer:
    return with_template(library, single, [*single, *single], {token: library.token_to_id(token)})


def _from_bytes() -> tokenizers.Tokenizer:
    """Byte-level pairs without a pair; the library writes a byte as a character that can be
    seen.
    """
    rest = (byte for byte in range(256) if byte not in PRINTABLE)
    signs = {byte: chr(byte) for byte in PRINTABLE} | {
        byte: chr(256 + i) for i, byte in enumerate(rest)
    }
    library = tokenizers.Tokenizer(models.BPE({signs[byte]: byte for byte in range(256)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    return library


def _from_sentencepiece(data: bytes) -> tokenizers.Tokenizer:
    """Returns what the library makes of a SentencePiece model; raises UserError where it makes
    nothing of it.
    """
    try:
        return _library_of(sentencepiece_model_pb2.ModelProto.FromString(data))
    except UserError:
        raise
    except Exception as error:  # both libraries raise bare Exception for a damaged model
        raise UserError(
            "tokenizer",
            constraint=": its model cannot be written as a tokenizer.json: "
            f"{' '.join(str(error).split())}.",
        ) from error


def _library_of(model: sentencepiece_model_pb2.ModelProto) -> tokenizers.Tokenizer:
    trainer, rules = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (UNIGRAM, BYTE_PAIRS) or trainer.treat_whitespace_as_suffix:
        raise UserError(
            "tokenizer",
            constraint=": this kind of SentencePiece model cannot be written as a tokenizer.json.",
        )
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    symbols = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    spellable = {piece.piece for piece in model.pieces if piece.type in (NORMAL, UNUSED)}
    if trainer.model_type == UNIGRAM:
        library = tokenizers.Tokenizer(
            models.Unigram(pieces, trainer.unk_id, trainer.byte_fallback)
        )
    else:
        ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        unknown = pieces[trainer.unk_id][0]
        byte_pairs = models.BPE(
            ids,
            _merges([piece for piece in pieces if piece[0] in spellable], ids, spellable),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
            # A symbol stands alone in its stretch of text, which is looked up as a whole before it
            # is merged.
            ignore_merges=bool(symbols),
        )
        library = tokenizers.Tokenizer(byte_pairs)
    library.normalizer = normalizers.Sequence(_normalizers(rules))
    # The library would find the spelling of a byte or a control token in text, as a piece or as a
    # whole stretch.
    hidden = [name for name, _ in pieces if name not in spellable and name not in symbols]
    whole = symbols or trainer.model_type == UNIGRAM
    splits = [*_isolated(symbols), *_broken(hidden if whole else [], spellable)]
    if splits:
        library.pre_tokenizer = pre_tokenizers.Sequence(splits)
    strip = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    library.decoder = decoders.Sequence(
        [decoders.Replace(META_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return library


def _isolated(symbols: list[str]) -> list[pre_tokenizers.PreTokenizer]:
    """Returns what cuts user-defined symbols out of text, the longest where several fit, as
    SentencePiece does.

    They are no added tokens: the library would take those out before it normalizes, and then begin
    what follows anew, with a space in front.
    """
    if not symbols:
        return []
    longest_first = sorted(symbols, key=len, reverse=True)
    return [
        pre_tokenizers.Split(tokenizers.Regex("|".join(map(re.escape, longest_first))), "isolated")
    ]


def _broken(names: list[str], spellable: set[str]) -> list[pre_tokenizers.PreTokenizer]:
    """Returns what cuts the spellings of `names` in two, where no piece of text lies across the
    cut.
    """
    pairs = {piece[i : i + 2] for piece in spellable for i in range(len(piece) - 1)}
    cuts: set[str] = set()
    for name in names:
        places = [at for at in range(1, len(name)) if name[at - 1 : at + 1] not in pairs]
        if len(name) > 1:
            at = places[0] if places else 1
            rest = BYTE_END if re.fullmatch(BYTE_END, name[at:]) else re.escape(name[at:])
            cuts.add(f"(?<={re.escape(name[:at])})(?={rest})")
    return (
        [pre_tokenizers.Split(tokenizers.Regex("|".join(sorted(cuts))), "isolated")] if cuts else []
    )


def _merges(
    pieces: list[tuple[str, float]], ids: dict[str, int], spellable: set[str]
) -> list[tuple[str, str]]:
    """Returns the pairs of pieces that make a piece, in the order in which SentencePiece would
    merge them.
    """
    ranked = sorted((-score, ids[piece], piece) for piece, score in pieces if len(piece) > 1)
    splits = ((piece[:at], piece[at:]) for _, _, piece in ranked for at in range(1, len(piece)))
    return [(left, right) for left, right in splits if left in spellable and right in spellable]


def _normalizers(rules: Any) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(META_SPACE))
    return [*steps, normalizers.Replace(" ", META_SPACE)]
