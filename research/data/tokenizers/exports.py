"""A `tokenizer.json` for the tokenizers that have none: SentencePiece models and bytes.

It tells the `tokenizers` library to do what SentencePiece does; how far that goes is what its tests measure.
"""

from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from research.core.errors import UserError
from research.data.tokenizers.base import Tokenizer
from research.data.tokenizers.pieces import META_SPACE

UNIGRAM, BYTE_PAIRS = 1, 2  # TrainerSpec.model_type
USER_DEFINED = 4  # SentencePiece.type
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
    library.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in names])
    assert all(library.token_to_id(name) == i for name, i in control.items()), "control tokens lie where they lay"
    if "bos" in specials:
        library.post_processor = _framing(library, f"{specials['bos']} $A", specials["bos"])
    elif "eos" in specials:  # as T5 is read, with sentinels or, as mT5, without
        library.post_processor = _framing(library, f"$A {specials['eos']}", specials["eos"])
    return library.to_str().encode("utf-8")


def _framing(library: tokenizers.Tokenizer, single: str, token: str) -> processors.TemplateProcessing:
    pair = f"{single} {single.replace('$A', '$B')}"
    return processors.TemplateProcessing(single, pair, [(token, library.token_to_id(token))])


def _from_bytes() -> tokenizers.Tokenizer:
    """Byte-level pairs without a pair; the library writes a byte as a character that can be seen."""
    rest = (byte for byte in range(256) if byte not in PRINTABLE)
    signs = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    library = tokenizers.Tokenizer(models.BPE({signs[byte]: byte for byte in range(256)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    return library


def _from_sentencepiece(data: bytes) -> tokenizers.Tokenizer:
    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    trainer, rules = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (UNIGRAM, BYTE_PAIRS) or trainer.treat_whitespace_as_suffix:
        raise UserError("tokenizer: this kind of SentencePiece model cannot be written as a tokenizer.json.")
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    if trainer.model_type == UNIGRAM:
        library = tokenizers.Tokenizer(models.Unigram(pieces, trainer.unk_id, trainer.byte_fallback))
    else:
        ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        unknown = pieces[trainer.unk_id][0]
        byte_pairs = models.BPE(
            ids, _merges(pieces, ids), unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback
        )
        library = tokenizers.Tokenizer(byte_pairs)
    library.normalizer = normalizers.Sequence(_normalizers(rules))
    strip = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    library.decoder = decoders.Sequence(
        [decoders.Replace(META_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    library.add_tokens(
        [
            tokenizers.AddedToken(piece.piece, normalized=False, special=False)
            for piece in model.pieces
            if piece.type == USER_DEFINED
        ]
    )
    return library


def _merges(pieces: list[tuple[str, float]], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Returns the pairs of pieces that make a piece, in the order in which SentencePiece would merge them."""
    ranked = sorted((-score, ids[piece], piece) for piece, score in pieces if len(piece) > 1)
    splits = ((piece[:at], piece[at:]) for _, _, piece in ranked for at in range(1, len(piece)))
    return [(left, right) for left, right in splits if left in ids and right in ids]


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
