"""Embeddings, classes, masks and scores of texts are those of transformers."""

import functools
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")

from research.data.tokenizers import ByteTokenizer  # noqa: E402
from research.interop.huggingface import from_hugging_face  # noqa: E402
from research.recipes.loaded import LoadedModel  # noqa: E402
from tests.interop import cases, registry, torch_models, torch_references  # noqa: E402

pytestmark = pytest.mark.live

TOLERANCE = 1e-4
MASK = 5
# BERT's positions end at 40, and the cases of decoders at 32.
LENGTHS = (3, 31, 17, 32, 9)


def rows(seed: int = 0) -> list[list[int]]:
    draws = np.random.default_rng(seed)
    first = registry.FIRST_TOKEN
    return [draws.integers(first, cases.VOCAB, length).tolist() for length in LENGTHS]


@functools.cache
def both(name: str, parent: pathlib.Path) -> tuple[LoadedModel, torch.nn.Module]:
    """A case of a family with random weights, in Tessera and in transformers."""
    folder = parent / name
    folder.mkdir()
    torch_references.write_seeded(name, folder)
    config, params = from_hugging_face(folder)
    tokenizer = ByteTokenizer(mask=True)
    tokenizer.mask_id = MASK
    kind = torch_models.MODELS[name][0]
    theirs = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return LoadedModel(config, params, tokenizer, 0), theirs.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("families")


def padded(ids: list[list[int]]) -> dict[str, torch.Tensor]:
    """A batch as transformers takes it, padded to the longest."""
    width = max(map(len, ids))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    return {"input_ids": tokens, "attention_mask": real}


def sentence_embeddings(states: torch.Tensor, real: torch.Tensor) -> np.ndarray:
    """As on the cards of sentence-transformers: a mean over the real tokens, normalized."""
    expanded = real.unsqueeze(-1).expand(states.size()).float()
    means = torch.sum(states * expanded, 1) / torch.clamp(expanded.sum(1), min=1e-9)
    return torch.nn.functional.normalize(means, p=2, dim=1).numpy()


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "t5", "gpt2-small"])
def test_sentence_embeddings_are_those_of_transformers(name: str, folder: pathlib.Path):
    model, theirs = both(name, folder)
    batch = padded(rows())
    encoder = theirs.get_encoder() if name == "t5" else theirs.base_model
    if name == "roberta":
        # Positions count up where a token is no padding.
        batch["input_ids"][batch["attention_mask"] == 0] = theirs.config.pad_token_id
    states = encoder(**batch).last_hidden_state
    expected = sentence_embeddings(states, batch["attention_mask"])
    np.testing.assert_allclose(model.embed(ids=rows()), expected, atol=TOLERANCE)
    # The control: a mean with the padding.
    everything = torch.ones_like(batch["attention_mask"])
    wrong = sentence_embeddings(states, everything)
    assert np.abs(model.embed(ids=rows()) - wrong).max() > 100 * TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_masks_are_those_of_transformers(name: str, folder: pathlib.Path):
    model, theirs = both(name, folder)
    ids = [[MASK if place % 5 == 2 else token for place, token in enumerate(r)] for r in rows()]
    found = model.fill_masks(ids=ids, top=4)
    for row, masks in zip(ids, found, strict=True):
        output = theirs(torch.tensor([row]))
        logits = output.prediction_logits if name == "bert" else output.logits
        logprobs = torch.log_softmax(logits[0], dim=-1)
        places = [place for place, token in enumerate(row) if token == MASK]
        assert [mask.position for mask in masks] == places
        for mask in masks:
            expected = torch.topk(logprobs[mask.position], 4)
            assert [token for token, _ in mask.top] == expected.indices.tolist()
            named = [logprob for _, logprob in mask.top]
            np.testing.assert_allclose(named, expected.values, atol=TOLERANCE)


@torch.no_grad()
def test_pairs_are_those_of_transformers(folder: pathlib.Path):
    model, theirs = both("bert", folder)
    pairs = [(row[:2], row[2:]) for row in rows()]
    found = model.score_pairs(ids=pairs)
    for (first, second), classes in zip(pairs, found, strict=True):
        types = torch.tensor([[0] * len(first) + [1] * len(second)])
        output = theirs(torch.tensor([first + second]), token_type_ids=types)
        expected = output.seq_relationship_logits[0]
        np.testing.assert_allclose(classes, expected, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2-small", "llama-3-8b", "gemma2", "qwen3-moe", "falcon-7b"])
def test_scores_are_those_of_transformers(name: str, folder: pathlib.Path):
    model, theirs = both(name, folder)
    for row, score in zip(rows(), model.score(ids=rows(), top=3), strict=True):
        logprobs = torch.log_softmax(theirs(torch.tensor([row])).logits[0, :-1], dim=-1)
        expected = logprobs[range(len(row) - 1), row[1:]]
        np.testing.assert_allclose(score.logprobs, expected, atol=TOLERANCE)
        best = torch.topk(logprobs, 3).values
        named = [[logprob for _, logprob in top] for top in score.top]
        np.testing.assert_allclose(named, best, atol=TOLERANCE)


@torch.no_grad()
def test_scores_of_an_encoder_decoder_are_those_of_transformers(folder: pathlib.Path):
    model, theirs = both("t5", folder)
    targets = rows(seed=1)
    found = model.score(ids=targets, prompts=rows())
    for source, target, score in zip(rows(), targets, found, strict=True):
        labels = torch.tensor([target])
        logits = theirs(input_ids=torch.tensor([source]), labels=labels).logits[0]
        expected = torch.log_softmax(logits, dim=-1)[range(len(target)), target]
        np.testing.assert_allclose(score.logprobs, expected, atol=TOLERANCE)
