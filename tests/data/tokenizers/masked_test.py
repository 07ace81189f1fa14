"""Texts with masks and pairs of texts are encoded as the library encodes them."""

import pytest
import tokenizers as library

from research.data.tokenizers import TokenizerConfig, build
from research.data.tokenizers.byte import ByteTokenizer
from research.data.tokenizers.huggingface import HuggingFaceTokenizer

TEXTS = ["the tile is blue.", "the mask, the floor and the wall", "is it? it is."]
MASKED = ["<mask>", "the <mask> is blue.", "the tile is<mask>. <mask>", "  <mask> <mask>  wall"]


def roberta() -> library.Tokenizer:
    """Byte pairs, and a mask that takes the spaces before it, as RoBERTa's does."""
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = library.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[*names, library.AddedToken("<mask>", lstrip=True)],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 20, trainer)
    ends = [("</s>", 2), ("<s>", 0)]
    made.post_processor = library.processors.RobertaProcessing(
        *ends, trim_offsets=True, add_prefix_space=False
    )
    return made


def bert() -> library.Tokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set("".join(TEXTS)) - {" "})]
    words += [f"##{letter}" for letter in sorted(set("".join(TEXTS)) - {" "})]
    made = library.Tokenizer(
        library.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(words[:5])
    made.post_processor = library.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


@pytest.mark.parametrize("text", MASKED)
@pytest.mark.parametrize("made", [roberta, bert])
def test_masks_are_encoded_as_the_library_does(made, text):
    theirs = made()
    ours = HuggingFaceTokenizer(theirs.to_str().encode())
    spelt = text.replace("<mask>", ours.specials["mask"])
    ids = ours.encode_masked(spelt)
    assert ids == theirs.encode(spelt).ids
    assert ids.count(ours.mask_id) == text.count("<mask>")
    # The control: in other texts the spelling of a mask is text.
    assert ours.mask_id not in ours.encode_source(spelt)


def test_a_pair_is_encoded_with_the_types_of_the_library():
    theirs = bert()
    ours = HuggingFaceTokenizer(theirs.to_str().encode())
    encoding = theirs.encode("the tile", "is blue")
    assert ours.encode_pair("the tile", "is blue") == (encoding.ids, encoding.type_ids)
    assert ours.encode_pair("the tile [SEP]", "a")[0].count(ours.eos_id) == 2


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_masks_of_tokenizers_made_here_are_found(kind):
    tokenizer = ByteTokenizer(mask=True)
    if kind == "bpe":
        tokenizer = build(TokenizerConfig(kind=kind, vocab_size=320, mask=True), TEXTS * 20)
    name = tokenizer.specials["mask"]
    ids = tokenizer.encode_masked(f"the {name} is <s> {name}")
    assert ids.count(tokenizer.mask_id) == 2
    assert ids[0] == tokenizer.bos_id
    # Other control tokens stay text.
    assert ids.count(tokenizer.bos_id) == 1
    parts = tokenizer.decode(ids).split(name)
    assert [part.strip() for part in parts] == ["the", "is <s>", ""]
