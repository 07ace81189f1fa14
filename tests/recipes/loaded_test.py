"""A workdir is a model: what it says from Python is what training said."""

import dataclasses
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import research
from research.core.errors import UserError
from research.core.trees import named_leaves
from research.data import tokenizers
from research.data.tokenizers.byte import ByteTokenizer
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.text import Completion
from research.recipes.experiment import load_experiment
from research.recipes.inputs import make_loader, prepare_data
from research.recipes.loaded import LoadedModel
from research.training.language_model import LanguageModelLoss
from tests.models.variants import VARIANTS
from tests.recipes import runs
from tests.recipes.fixtures import Unbroken
from tests.tiny import summed


@pytest.fixture(scope="module")
def model(unbroken: Unbroken):
    return research.load(str(unbroken.workdir))


@pytest.fixture(scope="module")
def batch(unbroken: Unbroken) -> dict[str, np.ndarray]:
    """The first training batch: packed rows."""
    config = load_experiment(str(unbroken.config), [])
    loader = make_loader(config, prepare_data(config))
    batch = next(loader)
    loader.close()
    assert batch["segments"].max() > 1
    return batch


@pytest.fixture(scope="module")
def loss_of_training(model, batch) -> float:
    """The mean loss of the batch as the training step computes it, without dropout."""
    _, sums = summed(LanguageModelLoss(model.config))(
        model.params, jax.tree.map(jnp.asarray, batch), None
    )
    return float(sums["loss"]) / batch["weights"].sum()


def mean_loss(logits: jax.Array, batch: dict[str, np.ndarray]) -> float:
    log_p = jax.nn.log_softmax(logits)
    nll = -np.take_along_axis(np.asarray(log_p), batch["targets"][..., None], axis=-1)[..., 0]
    return float((nll * batch["weights"]).sum() / batch["weights"].sum())


def test_averaged_parameters_are_loaded_bitwise(model, unbroken: Unbroken):
    assert model.step == 12
    ours, theirs = named_leaves(model.params), named_leaves(unbroken.state.ema)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], np.asarray(theirs[name]), err_msg=name)


def test_packed_logits_give_the_loss_of_training(model, batch, loss_of_training):
    logits = model.logits(batch["tokens"], batch["segments"])
    assert mean_loss(logits, batch) == pytest.approx(loss_of_training, rel=1e-5)


def test_packed_logits_without_segments_are_others(model, batch, loss_of_training):  # the control
    assert mean_loss(model.logits(batch["tokens"]), batch) != pytest.approx(
        loss_of_training, rel=1e-4
    )


def test_greedy_text_takes_the_likeliest_token_of_the_logits(model):
    [generated] = model.generate(["the cat"], temperature=0.0, max_tokens=5)
    assert isinstance(generated, Completion)
    ids = [model.tokenizer.bos_id] if model.tokenizer.bos_id is not None else []
    ids += model.tokenizer.encode("the cat")
    for token in generated.tokens:
        assert token == int(model.logits(np.asarray([ids]))[0, -1].argmax())
        ids.append(token)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([[0, 384]], "tokens: id 384 is out of range: it must lie in [0, 384)."),
        ([[-1, 3]], "tokens: id -1 is out of range: it must lie in [0, 384)."),
        ([[0] * 65], "tokens: 65 is longer than model.max_length = 64."),
    ],
)
def test_tokens_that_the_model_cannot_read_are_refused(model, tokens, said):
    with pytest.raises(UserError) as caught:
        model.logits(np.asarray(tokens))
    assert str(caught.value) == said


@pytest.mark.parametrize("page", ["getting-started", "generation", "inference"])
def test_python_of_a_page_runs_as_it_is_printed(
    unbroken: Unbroken, tmp_path, monkeypatch, page: str
):
    text = (runs.ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "configs" / "pretrain").mkdir(parents=True)
    config = unbroken.config.read_text().replace("get_config()", "get_config(size)")
    (tmp_path / "configs" / "pretrain" / "stdlib.py").write_text(config)
    for name in ("adamw", "llama-instruct"):
        shutil.copytree(unbroken.workdir, tmp_path / "runs" / name)
    tokenizer = tokenizers.load(tmp_path / "runs" / "llama-instruct" / "tokenizer")
    tokenizer.chat_templates = {"default": "{{ messages[0].content }}"}
    tokenizer.save(tmp_path / "runs" / "llama-instruct" / "tokenizer")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["model"].step == 12
    exported = tmp_path / "adamw-hf" / "model.safetensors"
    assert exported.exists() == ("convert" in block)


def test_lists_are_read_as_arrays(model):
    rows = [[1, 17, 42]]
    assert model.logits(rows).shape == (1, 3, 384)
    np.testing.assert_array_equal(
        model.logits(rows, [[1, 1, 2]]), model.logits(np.asarray(rows), np.array([[1, 1, 2]]))
    )
    with pytest.raises(UserError, match=r"tokens: shape \(3,\) must be"):
        model.logits(rows[0])


def test_address_of_an_unknown_kind_is_refused():
    with pytest.raises(
        UserError, match="workdir = 's3://bucket/run' is an address of an unknown kind"
    ):
        research.load("s3://bucket/run")


@pytest.mark.parametrize(
    "sampling", [{"top_q": 1.0}, {"temperature": float("nan")}, {"max_tokens": 64}]
)
def test_generate_refuses_what_cannot_be(model, sampling):
    with pytest.raises(UserError, match=next(iter(sampling))):
        model.generate(["the"], **sampling)


def test_generate_refuses_no_prompts(model):
    with pytest.raises(UserError, match="at least one prompt"):
        model.generate([])


def test_more_beams_than_one_are_searched(model):
    fields = {"num_beams": 3, "max_tokens": 5, "num_return": 2}
    texts = model.generate(["the", "cat"], **fields)
    for (best, second), text in zip(model.beams(["the", "cat"], **fields), texts, strict=True):
        assert text == best
        assert best.score >= second.score


def test_one_beam_is_no_search(model):
    drawn = {"max_tokens": 5, "seed": 3}
    assert model.generate(["the"], num_beams=1, **drawn) == model.generate(["the"], **drawn)
    with pytest.raises(UserError, match=r"forced_prefix = \(1,\) needs num_beams above 1"):
        model.generate(["the"], forced_prefix=(1,))


def test_search_takes_no_seeds(model):
    with pytest.raises(UserError, match="seeds: num_beams = 3 searches"):
        model.generate(["the"], seeds=[1], num_beams=3)


@pytest.mark.parametrize(
    ("name", "inputs", "said"),
    [
        ("windows", {"tokens": [[1, 2], [3]]}, "tokens: rows must be equally long"),
        ("windows", {"tokens": [[1.5, 2.0]]}, "tokens: must be whole numbers, not float64."),
        ("windows", {"tokens": [[2**40]]}, "tokens: id 1099511627776 is out of range"),
        ("windows", {"tokens": [[]]}, "tokens: shape (1, 0) must be [rows, ids]"),
        (
            "windows",
            {"tokens": [[1, 2]], "segments": [[1, 1, 1]]},
            "segments: shape (1, 3) must be (1, 2)",
        ),
        (
            "windows",
            {"tokens": [[1, 2]], "prefix": [[1, 0]]},
            "prefix is given for model.structure = 'decoder'.",
        ),
        (
            "windows",
            {"tokens": [[1, 2]], "types": [[1, 0]]},
            "types are given for model.embedding.num_types = 0.",
        ),
        ("prefix", {"tokens": [[1, 2]], "prefix": [[1]]}, "prefix: shape (1, 1) must be (1, 2)"),
        (
            "encoder",
            {"tokens": [[1, 2]], "types": [[1, 2]]},
            "types: id 2 is out of range: it must lie in [0, 2).",
        ),
        (
            "encoder-decoder",
            {"tokens": [[1]], "encoder_tokens": [[3], [5]]},
            "encoder_tokens: 2 rows must be 1",
        ),
        (
            "encoder-decoder",
            {"tokens": [[1, 2]], "segments": [[1, 2]], "encoder_tokens": [[3, 4]]},
            "encoder_segments is missing",
        ),
    ],
)
def test_what_a_structure_cannot_read_is_refused(name: str, inputs: dict[str, Any], said: str):
    config = VARIANTS[name]
    with pytest.raises(UserError) as caught:
        LoadedModel(config, {}, ByteTokenizer(), 0).logits(**inputs)
    assert str(caught.value).startswith(said)


def test_an_engine_has_the_tokens_that_fit_and_answers_as_generate_does(model):
    engine = model.engine(slots=2, tiles=(2,))
    assert engine.serve.tokens == 2 * 2 * 64  # all slots, and as much for shared prompts
    ids = tuple(model.tokenizer.encode_prompt("the cat"))
    sampling = SamplingConfig(max_tokens=5, seed=3)
    *_, answer = engine.stream(Request(ids, sampling))
    [expected] = model.generate(["the cat"], max_tokens=5, seed=3)
    assert answer.samples[0].completion() == expected
    with pytest.raises(UserError, match="memory = 1e-09 is too little: beside the weights"):
        model.engine(memory=1e-9)


def test_a_draft_model_has_the_tokenizer_of_the_model(model):
    other = dataclasses.replace(model, tokenizer=ByteTokenizer(mask=True))
    with pytest.raises(UserError, match=r"^draft: its tokenizer must be that of the model\."):
        model.engine(slots=2, tiles=(2,), speculate="draft", draft=other)
    with pytest.raises(UserError, match=r"^draft guesses with speculate = 'draft' alone"):
        model.engine(slots=2, tiles=(2,), draft=model)


def test_engines_of_one_checkpoint_may_have_each_others_pages(model, unbroken: Unbroken):
    request = Request(tuple(range(40)), SamplingConfig(max_tokens=2))
    first = model.engine(slots=2, tiles=(2,), transfers=True)
    first.run([request])
    loaded = research.load(str(unbroken.workdir))
    second = loaded.engine(slots=2, tiles=(2,), transfers=True)
    second.import_pages(request, first.export_pages(request))
    # The control: parameters of no checkpoint.
    other = dataclasses.replace(model, params_digest=None)
    nameless = other.engine(slots=2, tiles=(2,), transfers=True)
    nameless.run([request])
    with pytest.raises(UserError, match="params_digest"):
        nameless.export_pages(request)
