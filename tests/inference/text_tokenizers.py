"""Small tokenizers of every kind, for tests of text and grammars."""

import functools
import io

import sentencepiece
import tokenizers as hf

from research.data.tokenizers import Tokenizer, TokenizerConfig, build
from research.data.tokenizers.byte import ByteTokenizer
from research.data.tokenizers.huggingface import HuggingFaceTokenizer
from research.data.tokenizers.pieces import SentencePieceTokenizer

TEXTS = [
    "the cat over there, naïve and 東京 12 x == 3.5",
    '{"name": "Ann", "age": 31, "tags": ["a", "bc"], "ok": true}',
    "  two  spaces\n\tand a tab, 😀😀 é ▁ end",
] * 30
# Those that can spell any text; of `no_bytes` some characters are unknown.
KINDS = ("bytes", "bpe", "unigram", "llama", "huggingface")


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    """Returns a tokenizer; one for all tests."""
    if kind == "bytes":
        return ByteTokenizer(mask=True, sentinels=2)
    if kind == "plain":
        return ByteTokenizer()
    if kind == "llama":
        return SentencePieceTokenizer(_llama_model(byte_fallback=True))
    if kind == "no_bytes":
        return SentencePieceTokenizer(_llama_model(byte_fallback=False))
    if kind == "huggingface":
        return HuggingFaceTokenizer(_byte_level_json())
    return build(TokenizerConfig(kind=kind, vocab_size=400), TEXTS)


def _llama_model(byte_fallback: bool) -> bytes:
    """A model that puts a space before a text and leaves out further ones, as SentencePiece's own
    settings have it.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=byte_fallback,
        minloglevel=2,
    )
    return model.getvalue()


def _byte_level_json() -> bytes:
    """Byte pairs over bytes, as GPT-2 has."""
    library = hf.Tokenizer(hf.models.BPE())
    library.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        show_progress=False,
    )
    library.train_from_iterator(TEXTS, trainer)
    return library.to_str().encode()
