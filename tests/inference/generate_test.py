"""From prompts to text: each prompt by itself, to its own end, with one compiled step."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from research.core.errors import UserError
from research.data.tokenizers.byte import ByteTokenizer
from research.inference.drawing import draw_step
from research.inference.generate import generate
from research.inference.placement import id_rules
from research.inference.programs import read
from research.inference.prompts import encode
from research.inference.sampling_config import SamplingConfig
from research.inference.sequence import Sequence
from research.inference.slots import admit
from research.inference.text import Completion
from research.models.config import AttentionConfig, MlpConfig, ModelConfig, PositionConfig
from tests.tiny import logits, random_params, tiny_config

BYTES = ByteTokenizer()
GREEDY = SamplingConfig(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def model() -> tuple[ModelConfig, Any]:
    """A random model of bytes."""
    config = tiny_config(vocab_size=BYTES.vocab_size, num_layers=1)
    return config, random_params(config)


def chain(*texts: bytes, vocab_size: int = BYTES.vocab_size) -> tuple[ModelConfig, Any]:
    """A model that goes through each of `texts` byte by byte and then ends; other ids follow
    themselves.
    """
    config = ModelConfig(
        vocab_size=vocab_size,
        num_layers=1,
        embed_dim=vocab_size,
        max_length=64,
        attention=AttentionConfig(1, 1, 2),
        mlp=MlpConfig(1),
        position=PositionConfig(kind="none"),
    )
    params = jax.tree.map(np.zeros_like, random_params(config))
    params["embed"]["embedding"] = np.eye(vocab_size, dtype=np.float32)
    params["final_norm"]["scale"] += 1.0
    follower = np.arange(vocab_size)
    for text in texts:
        follower[list(text)] = [*text[1:], BYTES.eos_id]
    params["unembed"] = np.eye(vocab_size, dtype=np.float32)[follower]
    return config, params


def run(model: tuple[ModelConfig, Any], prompts: list[str], **fields) -> list[Completion]:
    return generate(*model, BYTES, prompts, dataclasses.replace(GREEDY, **fields))


def test_greedy_text_is_the_argmax_of_the_training_logits(model):
    config, params = model
    prompts = ["abc", "a much longer prompt"]
    for prompt, found in zip(prompts, run(model, prompts), strict=True):
        ids = [BYTES.bos_id, *prompt.encode()]
        for token in found.tokens:
            row = np.asarray(
                logits(config, params, np.pad(ids, (0, 40 - len(ids))).astype(np.int32)[None])
            )
            best = np.argsort(row[0, len(ids) - 1])
            assert token == best[-1]
            ids.append(token)
        assert len(found.tokens) == 12 or found.tokens[-1] == BYTES.eos_id
        assert len(set(found.tokens)) > 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_of_a_prompt_does_not_depend_on_the_batch(model, temperature: float):
    prompts = ["abc", "a much longer prompt than the first", "x"]
    together = run(model, prompts, temperature=temperature, seed=5)
    for i, prompt in enumerate(prompts):
        alone = run(model, [prompt], temperature=temperature, seed=5 + i)
        assert alone == [together[i]]


def test_another_seed_gives_another_text_and_the_same_seed_the_same(model):
    one, same, other = (run(model, ["abc"], temperature=1.0, seed=seed) for seed in (0, 0, 1))
    assert one == same != other
    twins = run(model, ["abc", "abc"], temperature=1.0)
    assert twins[0] != twins[1]


def test_each_prompt_takes_the_seed_it_is_given(model):
    sampling = dataclasses.replace(GREEDY, temperature=1.0)
    first, second = generate(*model, BYTES, ["abc", "abc"], sampling, seeds=[7, 7])
    assert [first] == [second] == run(model, ["abc"], temperature=1.0, seed=7)
    with pytest.raises(UserError, match="seeds: 1 of them for 2 prompts"):
        generate(*model, BYTES, ["a", "b"], sampling, seeds=[1])


def test_text_ends_with_the_end_of_text_token():
    found = run(chain(b"abcdef"), ["a", "d", "xc"])
    assert [(g.text, g.finish) for g in found] == [
        ("bcdef", "stop"),
        ("ef", "stop"),
        ("def", "stop"),
    ]
    assert found[1].tokens == (*b"ef", BYTES.eos_id)


def test_text_ends_with_any_of_the_end_ids_and_does_not_spell_it(monkeypatch):
    model = chain(b"abcdef", b"xyz")
    monkeypatch.setattr(BYTES, "further_end_ids", (ord("d"), BYTES.eos_id, 9999))
    found = run(model, ["a", "e", "x"])
    assert [(g.text, g.finish) for g in found] == [("bc", "stop"), ("f", "stop"), ("yz", "stop")]
    assert [g.tokens[-1] for g in found] == [ord("d"), BYTES.eos_id, BYTES.eos_id]
    assert BYTES.end_ids == (BYTES.eos_id, ord("d"), 9999)


def test_ids_are_continued_as_they_stand():
    model = chain(b"abcdef")
    [text] = run(model, [[ord("a")]])
    assert (text.text, text.finish) == ("bcdef", "stop")
    assert run(model, [[BYTES.bos_id, *b"xc"], "xc"]) == run(model, ["xc", "xc"])
    [framed] = run(model, [[BYTES.bos_id, ord("a")]])
    assert framed == run(model, ["a"])[0] == text


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (
            [1, BYTES.vocab_size],
            f"ids: id 259 is out of range: the model's ids lie in [0, {BYTES.vocab_size}).",
        ),
        ([-1], f"ids: id -1 is out of range: the model's ids lie in [0, {BYTES.vocab_size})."),
    ],
)
def test_ids_that_the_model_has_not_are_refused(model, ids: list[int], said: str):
    with pytest.raises(UserError) as caught:
        run(model, [ids])
    assert str(caught.value) == said


def test_text_that_becomes_ids_beyond_the_embedding_is_refused(model, monkeypatch):
    monkeypatch.setattr(BYTES, "prompt_frame", ((), ()))
    config = dataclasses.replace(model[0], vocab_size=37)
    encode(config, BYTES, ["\x01$"], [1])
    with pytest.raises(UserError) as caught:
        encode(config, BYTES, ["\x01%"], [1])
    assert (
        str(caught.value)
        == "prompts: '%' is the tokenizer's id 37, and the model's ids lie in [0, 37)."
    )


def test_text_ends_after_max_tokens():
    found = run(chain(b"abcdef"), ["a", "e"], max_tokens=3)
    assert [(g.text, g.finish) for g in found] == [("bcd", "length"), ("f", "stop")]
    assert run(chain(b"abcdef"), ["a"], max_tokens=1)[0].tokens == (ord("b"),)


@pytest.mark.parametrize(
    ("stop", "text"),
    [(("def",), "bc"), (("zz", "e"), "bcd"), (("fg", "cd"), "b"), (("b",), ""), (("bc", "c"), "")],
)
def test_stop_string_ends_the_text_wherever_tokens_are_cut(stop: tuple[str, ...], text: str):
    found = run(chain(b"abcdefghij"), ["a"], stop=stop)[0]
    assert (found.text, found.finish) == (text, "stop")


def test_stop_string_in_the_prompt_does_not_end_the_text():
    found = run(chain(b"abcdef"), ["abc"], stop=("abc", "cd"))[0]
    assert (found.text, found.finish) == ("def", "stop")


def test_stop_string_may_be_a_character_of_several_tokens():
    found = run(chain("abé!".encode()), ["a"], stop=("é",))[0]
    assert (found.text, found.finish) == ("b", "stop")
    assert run(chain("abé!".encode()), ["a"])[0].text == "bé!"


def test_stop_strings_of_one_prompt_leave_the_others_running():
    found = run(chain(b"abc", b"xyz"), ["a", "x"], stop=("c",))
    assert [(g.text, g.finish) for g in found] == [("b", "stop"), ("yz", "stop")]
    assert len(found[1].tokens) == 3


def test_ids_that_the_tokenizer_lacks_are_never_drawn():
    config, params = chain(b"ab", vocab_size=BYTES.vocab_size + 5)
    params["unembed"][:, BYTES.vocab_size :] = 2.0
    assert run((config, params), ["a"])[0].text == "b"
    # The control: the model alone takes one of those.
    found = logits(config, params, np.array([[ord("a")]], np.int32))
    assert int(np.argmax(found[0, -1])) >= BYTES.vocab_size


def test_tokens_of_prompt_and_text_are_seen_and_those_of_the_answer_are_counted():
    sampling = SamplingConfig(max_tokens=9, min_tokens=2, logit_bias=((3, 1.5),), stop_ids=(4,))
    sequence = Sequence((0,), [5, 6, 5], 3 + 9)
    sequence.tokens += [7, 6, 7]
    rules = id_rules(sequence, 3, sampling, [1, 99], 10)
    assert np.flatnonzero(rules.in_prompt[0]).tolist() == [5, 6]
    assert np.asarray(rules.counts[0]).tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 0, 0]
    assert np.flatnonzero(rules.is_end[0]).tolist() == [1, 4]
    assert (int(rules.first_end[0]), float(rules.bias[0, 3])) == (5, 1.5)


# Settings that differ in every field that is drawn by, greedy ones among them.
MIXED = (
    dataclasses.replace(GREEDY, seed=1),
    SamplingConfig(max_tokens=12, temperature=1.0, seed=2),
    SamplingConfig(max_tokens=5, temperature=0.7, top_k=3, seed=3),
    SamplingConfig(max_tokens=9, temperature=1.5, top_p=0.6, seed=2**63 + 5),
    SamplingConfig(max_tokens=12, temperature=2.0, min_p=0.3, repetition_penalty=1.5, seed=5),
    SamplingConfig(max_tokens=12, temperature=0.0, repetition_penalty=3.0, stop=("e",), seed=6),
)


def test_one_compilation_serves_all_settings(model):
    def compiled() -> list[int]:
        return [program._cache_size() for program in (read, draw_step, admit)]

    run(model, ["abc"] * len(MIXED), temperature=1.0)
    before = compiled()
    # Neither another prompt, seed, stop string, limit nor rule of drawing compiles anything, for
    # all rows or for some.
    others = [f"another prompt {i}" for i in range(len(MIXED))]
    run(model, others, temperature=1.0, seed=3, stop=("q",), max_tokens=7)
    for changed in MIXED:
        generate(*model, BYTES, others, changed)
    generate(*model, BYTES, others, MIXED)
    assert compiled() == before
    read.clear_cache()
    run(model, ["abc"])  # the control: as many tiles as there are
    assert compiled()[0] == 2


def test_prompts_of_one_batch_take_settings_of_their_own(model):
    prompts = ["abc", "a much longer prompt than the first", "x", "abc", "abc", "abc"]
    together = generate(*model, BYTES, prompts, MIXED)
    alone = [
        generate(*model, BYTES, [prompt], each)[0]
        for prompt, each in zip(prompts, MIXED, strict=True)
    ]
    assert together == alone
    # The control: the same prompt reads on otherwise by other settings.
    same = [together[i].tokens for i, prompt in enumerate(prompts) if prompt == "abc"]
    assert len(set(same)) == len(same)
    with pytest.raises(
        UserError, match="sampling: 6 settings for 1 prompts; give one per prompt, or one for all"
    ):
        generate(*model, BYTES, ["abc"], MIXED)


def test_every_seed_of_64_bits_draws_otherwise(model):
    seeds = [0, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    found = generate(
        *model, BYTES, ["abc"] * len(seeds), dataclasses.replace(GREEDY, temperature=1.0), seeds
    )
    assert len({text.tokens for text in found}) == len(seeds)
    # After the last seed comes the first.
    last, first = run(model, ["abc", "abc"], temperature=1.0, seed=2**64 - 1)
    assert (last.tokens, first.tokens) == (found[-1].tokens, found[0].tokens)
    with pytest.raises(
        UserError, match=r"seeds: -1 must be a whole number in \[0, 18446744073709551616\)"
    ):
        generate(*model, BYTES, ["abc"], GREEDY, [-1])
    with pytest.raises(UserError, match="seeds: True must be a whole number"):
        generate(*model, BYTES, ["abc"], GREEDY, [True])


def test_text_that_does_not_fit_the_model_is_refused(model):
    with pytest.raises(UserError) as caught:
        run(model, ["a" * 60], max_tokens=4)
    assert str(caught.value) == (
        "max_tokens = 4 after a prompt of 61 tokens is more than the model's max_length = 64. Use "
        "at most 3."
    )
    assert len(run(chain(b"ab"), ["x" * 60], max_tokens=3)[0].tokens) == 3


def test_prompt_that_fills_the_model_is_refused_with_advice_that_helps(model):
    with pytest.raises(UserError, match="prompt of 64 tokens leaves no room"):
        run(model, ["a" * 63], max_tokens=4)


def test_no_prompt_is_refused(model):
    with pytest.raises(UserError, match="at least one prompt is needed"):
        run(model, [])


def test_empty_prompt_begins_a_document():
    config, params = chain(b"ab")
    params["unembed"] = params["unembed"].copy()
    params["unembed"][BYTES.bos_id] = np.eye(BYTES.vocab_size)[ord("a")]
    assert run((config, params), [""])[0].text == "ab"
