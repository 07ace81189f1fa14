"""What is said of a text is what is said of it alone, and what the whole model computes of it."""

import dataclasses
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import research
from research.core.errors import UserError
from research.data.tokenizers import ByteTokenizer
from research.inference.text_batches import Text, TextBatches, TextRows, pooled_states, read
from research.models.transformer_model import TransformerModel
from research.recipes.generation_mesh import mesh_for_generation, shardings_for_generation
from research.recipes.loaded import LoadedModel
from tests.models.variants import VARIANTS as ALL_VARIANTS
from tests.tiny import abstract_params, random_params

# Bytes and their control tokens, and ids that the tokenizer does not have.
TOKENIZER = ByteTokenizer(mask=True)
MASK = TOKENIZER.mask_id
VOCAB = TOKENIZER.vocab_size + 4
VARIANTS = {
    name: dataclasses.replace(config, vocab_size=VOCAB, max_length=96)
    for name, config in ALL_VARIANTS.items()
}
SCORED = (
    "windows",
    "dynamic",
    "longrope",
    "rounded alibi",
    "shared experts",
    "latent",
    "multi-token prediction",
    "prefix",
    "encoder-decoder",
)
# Two widths: 32 and 64.
LENGTHS = (2, 31, 32, 33, 5, 64, 17, 3, 40)


def loaded(name: str, dtype: str = "float32") -> LoadedModel:
    config = dataclasses.replace(VARIANTS[name], dtype=dtype)
    # As large as those of trained models are: logits are around 3.
    params = jax.tree.map(lambda leaf: jnp.asarray(0.6 * leaf), random_params(config))
    return LoadedModel(config, params, TOKENIZER, 0)


def rows(lengths=LENGTHS, seed: int = 0) -> list[list[int]]:
    draws = np.random.default_rng(seed)
    return [draws.integers(0, 256, length).tolist() for length in lengths]


def masked(row: list[int]) -> list[int]:
    return [MASK if index % 4 == 1 else token for index, token in enumerate(row)]


def pairs(given: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    return [(row[:1], row[1:]) for row in given]


def scores(model: LoadedModel, ids: list[list[int]]) -> list:
    if model.config.structure == "encoder_decoder":
        # Nine tokens of each are its target, as far as there are.
        return model.score(ids=[row[:9] for row in ids], prompts=ids, top=3)
    if model.config.structure == "prefix":
        return model.score(ids=[row[1:] for row in ids], prompts=[row[:1] for row in ids], top=3)
    return model.score(ids=ids, top=3)


KINDS = {
    "mean": lambda model, ids: list(model.embed(ids=ids)),
    "last": lambda model, ids: list(model.embed(ids=ids, pooling="last", normalize=False)),
    "classes": lambda model, ids: list(model.classify(ids=ids)),
    "pairs": lambda model, ids: list(model.score_pairs(ids=pairs(ids))),
    "masks": lambda model, ids: model.fill_masks(ids=[masked(row) for row in ids]),
    "scores": scores,
}
READ = {"encoder": ("mean", "last", "classes", "pairs", "masks")}


def bits(answer) -> bytes:
    return answer.tobytes() if isinstance(answer, np.ndarray) else repr(answer).encode()


@pytest.mark.fast_cases("windows-float32", "encoder-float32")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["windows", "encoder", "prefix", "encoder-decoder", "experts"])
def test_an_answer_is_bit_for_bit_that_of_the_text_alone(name: str, dtype: str):
    ids = rows()
    for kind in READ.get(name, ("mean", "scores")):
        model = loaded(name, dtype)
        answers = [bits(answer) for answer in KINDS[kind](model, ids)]
        assert answers == [bits(KINDS[kind](model, [row])[0]) for row in ids], kind
        order = np.random.default_rng(1).permutation(len(ids))
        others = KINDS[kind](model, [ids[index] for index in order])
        assert [answers[index] for index in order] == [bits(each) for each in others], kind


@pytest.mark.default_passes
def test_embeddings_alone_and_mixed_have_the_same_bits_with_all_passes_of_the_compiler():
    model = loaded("encoder")
    mixed = model.embed(ids=rows())
    alone = [model.embed(ids=[row])[0] for row in rows()]
    assert [bits(each) for each in mixed] == [bits(each) for each in alone]


@pytest.mark.thorough
@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"data": 2}], ids=["tensor", "data"])
@pytest.mark.parametrize("name", ["windows", "encoder-decoder"])
def test_on_a_mesh_answers_are_those_of_one_device_and_of_the_text_alone(name: str, sizes):
    model = loaded(name)
    mesh, zero = mesh_for_generation(model.config, sizes)
    shardings = shardings_for_generation(abstract_params(model.config), mesh, zero)
    params = jax.device_put(model.params, shardings)
    sharded = dataclasses.replace(model, params=params, mesh=mesh)
    ids = rows((5, 31, 40))
    np.testing.assert_allclose(sharded.embed(ids=ids), model.embed(ids=ids), atol=1e-5)
    answers = scores(sharded, ids)
    for found, expected in zip(answers, scores(model, ids), strict=True):
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
    assert answers == [scores(sharded, [row])[0] for row in ids]


def test_several_texts_are_computed_at_a_time():
    model = loaded("encoder")
    batches = TextBatches(model.config, model.params, tokens=4 * 32)
    assert batches.rows_of(pooled_states, 32) > 1


def test_padded_to_the_longest_of_a_batch_it_is_not():  # the control
    model = loaded("encoder")
    texts = [Text(row, chosen=range(len(row))) for row in rows()]
    batch = TextRows.of(texts, len(texts), max(text.width for text in texts))
    padded = np.asarray(read(model.params, batch, config=model.config, reading=pooled_states))
    alone = model.embed(ids=rows(), normalize=False)
    np.testing.assert_allclose(padded, alone, atol=1e-5)
    assert padded.tobytes() != alone.tobytes()


def by_row(config, params, texts: TextRows):
    return jnp.arange(len(texts.tokens)) // 2 + texts.lengths


def by_neighbour(config, params, texts: TextRows):
    return texts.lengths + jnp.flip(texts.lengths)


def test_a_batch_whose_rows_are_not_alike_is_made_smaller():
    config = VARIANTS["encoder"]
    batches = TextBatches(config, {}, tokens=8 * 32)
    # Of two rows both have the number 0.
    assert batches.rows_of(by_row, 32) == 2
    assert batches.rows_of(by_neighbour, 32) == 1
    assert batches.rows_of(lambda config, params, texts: texts.lengths, 32) == 8
    experts = TextBatches(VARIANTS["experts"], {}, tokens=8 * 32)
    assert experts.rows_of(lambda config, params, texts: texts.lengths, 32) == 1


def test_texts_of_all_lengths_compile_a_program_for_each_width():
    before = read._cache_size()
    loaded("local encoder").embed(ids=rows(range(1, 97)))
    # Widths 32, 64 and 128.
    assert read._cache_size() - before == 3


def hidden_alone(model: LoadedModel, row: list[int]) -> np.ndarray:
    """The last hidden states of a text without padding."""
    tokens = jnp.asarray([row])
    positions = jnp.arange(len(row))[None]
    known = TransformerModel(model.config)
    if model.config.structure == "encoder_decoder":
        inputs = {"encoder_tokens": tokens}
        return np.asarray(jax.jit(known.encode)(model.params, inputs))[0]
    inputs = {"tokens": tokens, "positions": positions, "prefix": jnp.ones_like(tokens)}
    return np.asarray(jax.jit(lambda *given: known.hidden(*given).hidden)(model.params, inputs))[0]


@pytest.mark.fast_cases("encoder")
@pytest.mark.parametrize("name", ["encoder", "windows", "prefix", "encoder-decoder", "dynamic"])
def test_an_embedding_is_that_of_the_states_without_padding(name: str):
    model = loaded(name)
    ids = rows((3, 33))
    states = [hidden_alone(model, row) for row in ids]
    means = model.embed(ids=ids, normalize=False)
    np.testing.assert_allclose(means, [state.mean(axis=0) for state in states], atol=1e-5)
    last = model.embed(ids=ids, pooling="last", normalize=False)
    np.testing.assert_allclose(last, [state[-1] for state in states], atol=1e-5)
    if VARIANTS[name].structure != "decoder":
        first = model.embed(ids=ids, pooling="first", normalize=False)
        np.testing.assert_allclose(first, [state[0] for state in states], atol=1e-5)


def test_a_mean_with_its_padding_is_another():  # the control
    model = loaded("encoder")
    [row] = rows((3,))
    batch = TextRows.of([Text(row, chosen=range(32))], 1, 32)
    padded = read(model.params, batch, config=model.config, reading=pooled_states)
    assert np.abs(padded - model.embed(ids=[row], normalize=False)).max() > 1e-2


def test_embeddings_are_cut_and_then_normalized():
    model = loaded("encoder")
    whole = model.embed(["a tile", "tiles"], normalize=False)
    norms = np.linalg.norm(model.embed(["a tile", "tiles"]), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-6)
    cut = model.embed(["a tile", "tiles"], dimensions=5)
    expected = whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, atol=1e-6)
    unscaled = model.embed(["a tile", "tiles"], dimensions=5, normalize=False)
    np.testing.assert_array_equal(unscaled, whole[:, :5])


def whole_logprobs(model: LoadedModel, before: list[int], row: list[int]) -> np.ndarray:
    """Log-probabilities [T, V] in the place of each token of a row, by `logits` of the whole."""
    inputs = {}
    start = before
    if model.config.structure == "encoder_decoder":
        inputs["encoder_tokens"] = [before]
        start = [model.config.decoder_start_id]
    if model.config.structure == "prefix":
        inputs["prefix"] = [[1] * len(before) + [0] * len(row)]
    logits = model.logits([[*start, *row]], **inputs)
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))[0, len(start) - 1 : -1]


@pytest.mark.fast_cases("windows", "encoder-decoder")
@pytest.mark.parametrize("name", SCORED)
def test_scores_are_those_of_the_logits_of_the_whole(name: str):
    model = loaded(name)
    prompts = rows((4, 30))
    ids = rows((35, 9), seed=7)
    found = model.score(ids=ids, prompts=prompts, top=3)
    for before, row, score in zip(prompts, ids, found, strict=True):
        expected = whole_logprobs(model, before, row)
        assert score.ids == tuple(row)
        each = expected[np.arange(len(row)), row]
        np.testing.assert_allclose(score.logprobs, each, atol=1e-5)
        assert score.total == pytest.approx(each.sum(), abs=1e-4)
        # Ids that the tokenizer does not have are not named.
        best = np.sort(expected[:, : TOKENIZER.vocab_size], axis=1)[:, :-4:-1]
        named = [[logprob for _, logprob in top] for top in score.top]
        np.testing.assert_allclose(named, best, atol=1e-5)
        for place, top in enumerate(score.top):
            values = [expected[place, token] for token, _ in top]
            np.testing.assert_allclose(values, best[place], atol=1e-5)


def test_a_text_without_prompt_is_scored_from_its_second_token_on():
    model = loaded("windows")
    [alone] = model.score(["tile"])
    [after] = model.score(["tile"], prompts=[""])
    assert alone.ids == tuple(b"tile")
    assert alone == after
    assert model.score(["e"], prompts=["til"])[0].logprobs == alone.logprobs[3:]


def test_log_probabilities_do_not_depend_on_how_many_ids_are_named():
    model = loaded("windows")
    found = [model.score(ids=rows((2, 31, 32)), top=top) for top in (0, 1, 5)]
    for plain, one, five in zip(*found, strict=True):
        assert plain.logprobs == one.logprobs == five.logprobs
        assert [top[:1] for top in five.top] == list(one.top)
        assert {len(top) for top in five.top} == {5}
        assert set(plain.top) == {()}


def test_masks_are_filled_by_the_likeliest_ids():
    model = loaded("encoder")
    text = "a <mask> of <mask>."
    [[first, second]] = model.fill_masks([text], top=4)
    ids = [256, *b"a ", MASK, *b" of ", MASK, *b".", 257]
    assert (first.position, second.position) == (3, 8)
    logprobs = np.asarray(jax.nn.log_softmax(model.logits([ids]), axis=-1))[0]
    for found in (first, second):
        known = logprobs[found.position, : TOKENIZER.vocab_size]
        likeliest = np.argsort(-known)[:4]
        assert [token for token, _ in found.top] == likeliest.tolist()
        np.testing.assert_allclose(
            [logprob for _, logprob in found.top], known[likeliest], atol=1e-5
        )


def test_a_pair_is_read_with_types():
    model = loaded("encoder")
    texts = model.score_pairs([("one", "two")])
    halves = ([256, *b"one", 257], [*b"two", 257])
    np.testing.assert_array_equal(model.score_pairs(ids=[halves]), texts)
    types = [[0] * 5 + [1] * 4]
    inputs = {
        "tokens": jnp.asarray([halves[0] + halves[1]]),
        "positions": jnp.arange(9)[None],
        "types": jnp.asarray(types),
    }
    known = TransformerModel(model.config)

    def classes(params, inputs):
        return known.class_logits(params, known.hidden(params, inputs).hidden)

    expected = jax.jit(classes)(model.params, inputs)
    np.testing.assert_allclose(texts, expected, atol=1e-5)
    without = model.classify(ids=[halves[0] + halves[1]])  # the control
    assert np.abs(without - texts).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "method", "arguments", "said"),
    [
        ("encoder", "embed", {}, "texts and ids: exactly one of them must be given."),
        ("encoder", "embed", {"texts": "tile"}, "texts = 'tile' must be a list"),
        ("encoder", "embed", {"texts": []}, "texts = [] must be a list with at least one entry."),
        ("encoder", "embed", {"ids": [[1], []]}, "ids: 1 has no ids."),
        ("encoder", "embed", {"ids": [3]}, "ids: 3 must be a row of ids."),
        ("encoder", "embed", {"ids": [[1, 2.0]]}, "ids: 0 has 2.0; ids are whole numbers in [0,"),
        ("encoder", "embed", {"ids": [[VOCAB]]}, f"ids: 0 has {VOCAB}; ids are whole numbers in"),
        ("encoder", "embed", {"ids": [[0] * 97]}, "ids: 0 has 97 tokens, and the model's max_len"),
        ("encoder", "embed", {"texts": ["a", "a" * 95]}, "texts: 1 has 97 tokens, and the model's"),
        ("encoder", "embed", {"texts": ["a"], "dimensions": 0}, "dimensions = 0 must be a whole"),
        ("encoder", "embed", {"texts": ["a"], "dimensions": 17}, "dimensions = 17 must be a whole"),
        ("encoder", "embed", {"texts": ["a"], "pooling": "max"}, "pooling = 'max' is not one of"),
        ("windows", "embed", {"texts": ["a"], "pooling": "first"}, "pooling = 'first' says noth"),
        ("windows", "classify", {"texts": ["a"]}, "model.structure = 'decoder' has no classes"),
        ("local encoder", "classify", {"texts": ["a"]}, "model.head.num_classes = 0: the model"),
        ("local encoder", "score_pairs", {"pairs": [("a", "b")]}, "model.head.num_classes = 0"),
        ("one type", "score_pairs", {"pairs": [("a", "b")]}, "model.embedding.num_types = 1 does"),
        ("encoder", "score_pairs", {"pairs": [("a",)]}, "pairs: 0 is ('a',) and must be a pair."),
        ("encoder", "score_pairs", {"ids": [([1] * 60, [2] * 37)]}, "ids: 0 has 97 tokens"),
        ("windows", "fill_masks", {"texts": ["a<mask>"]}, "model.structure = 'decoder' fills no"),
        ("encoder", "fill_masks", {"texts": ["a"]}, "texts: 0 has no <mask>, id 259."),
        ("encoder", "fill_masks", {"texts": ["<mask>"], "top": 0}, "top = 0 must be a whole"),
        ("encoder", "score", {"texts": ["a"]}, "model.structure = 'encoder' predicts no next"),
        ("encoder-decoder", "score", {"texts": ["a"]}, "prompts are missing: the encoder reads"),
        ("windows", "score", {"ids": [[1]]}, "ids: 0 is [1]: no token follows the first."),
        ("windows", "score", {"texts": ["a"], "prompts": []}, "prompts = [] must be a list of 1"),
        ("windows", "score", {"texts": ["a" * 50], "prompts": ["b" * 46]}, "texts: 0 has 97 tok"),
        ("windows", "score", {"texts": [""], "prompts": ["b"]}, "texts: 0 has no ids."),
        ("windows", "score", {"texts": ["ab"], "top": -1}, "top = -1 must be a whole number in"),
        ("capacity", "embed", {"texts": ["a"]}, "model.experts.capacity_factor = 1.0 drops tok"),
    ],
)
def test_what_a_model_cannot_answer_is_refused(name, method, arguments, said):
    encoder = VARIANTS["encoder"]
    experts = dataclasses.replace(VARIANTS["experts"].experts, capacity_factor=1.0)
    others = {
        "one type": dataclasses.replace(
            encoder, embedding=dataclasses.replace(encoder.embedding, num_types=1)
        ),
        "capacity": dataclasses.replace(VARIANTS["experts"], experts=experts),
    }
    # Nothing is computed: there are no parameters.
    model = LoadedModel((VARIANTS | others)[name], {}, TOKENIZER, 0)
    with pytest.raises(UserError) as caught:
        getattr(model, method)(**arguments)
    assert str(caught.value).startswith(said)


def test_a_tokenizer_without_a_mask_fills_none():
    model = LoadedModel(VARIANTS["encoder"], {}, ByteTokenizer(), 0)
    with pytest.raises(UserError, match=r"tokenizer\.mask_id = None: the tokenizer has no mask"):
        model.fill_masks(["<mask>"])


@pytest.mark.thorough
def test_python_of_the_page_runs_as_it_is_printed(monkeypatch: pytest.MonkeyPatch):
    page = pathlib.Path(__file__).parents[2] / "docs" / "embeddings.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    models = {"runs/adamw": loaded("windows"), "runs/encoder": loaded("encoder")}
    monkeypatch.setattr(research, "load", models.__getitem__)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["vectors"].shape == (2, 16)
    assert names["score"].ids == tuple(b"return x")
