"""A request may name an adapter: its rows carry the adapter's index, and its pages the digest."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import pytest

from research.core.errors import UserError
from research.data.tokenizers import ByteTokenizer
from research.inference import page_names
from research.inference.engine import Engine
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig
from research.models.transformer_model import TransformerModel
from tests.tiny import logits, random_params, tiny_config

BYTES = ByteTokenizer()
# Of no other test: what is compiled here has other adapters than theirs.
CONFIG = tiny_config(vocab_size=260, max_length=244)
SERVE = ServeConfig(slots=4, tokens=1024, rows=16, tiles=(2, 8), top_logprobs=8)
ADAPTERS = {"polite": b"1", "terse": b"2"}
# Three pages and a part.
PROMPT = tuple(range(5, 60))
GREEDY = SamplingConfig(max_tokens=6, temperature=0.0)


def shifted(tokens: Any, adapters: Any) -> Any:
    """What the adapters of this file do: the model reads other tokens."""
    return (tokens + 31 * adapters) % 250


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def adapting() -> Iterator[None]:
    """Gives the model adapters."""
    hidden = TransformerModel.hidden

    def adapted(self: Any, params: Any, inputs: Any, **others: Any) -> Any:
        if "adapters" in inputs:
            inputs = {**inputs, "tokens": shifted(inputs["tokens"], inputs["adapters"])}
        return hidden(self, params, inputs, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerModel, "hidden", adapted)
        yield


@pytest.fixture
def engine(params: Any, adapting: None) -> Engine:
    return Engine(CONFIG, params, BYTES, SERVE, adapters=ADAPTERS)


def answered(engine: Engine, names: list[str]) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Returns tokens and log-probabilities of the answers to one prompt, under adapters."""
    answers = engine.run([Request(PROMPT, GREEDY, adapter=name) for name in names])
    samples = [answer.samples[0] for answer in answers]
    logprobs = [tuple(token.logprob for token in each.logprobs) for each in samples]
    return [
        (each.completion().tokens, found) for each, found in zip(samples, logprobs, strict=True)
    ]


def test_each_row_is_read_by_the_adapter_that_its_request_names(engine: Engine, params: Any):
    names = ["", "polite", "terse"]
    found = answered(engine, names)
    for adapter, (tokens, _) in enumerate(found):
        text = list(PROMPT)
        for token in tokens:
            best = logits(CONFIG, params, shifted(jnp.array([text]), adapter))[0, -1].argmax()
            assert token == best
            text.append(token)
    assert len({tokens for tokens, _ in found}) == 3


def test_requests_of_other_adapters_change_no_answer(engine: Engine, params: Any):
    names = ["polite", "", "terse", "polite"]
    together = answered(engine, names)
    for name, answer in zip(names, together, strict=True):
        alone = Engine(CONFIG, params, BYTES, SERVE, adapters=ADAPTERS)
        assert answered(alone, [name]) == [answer]


def test_prompts_share_pages_under_one_adapter_alone(engine: Engine, monkeypatch):
    [replica] = engine.replicas
    before = replica.num_rows
    first = answered(engine, ["polite"])
    cold = replica.num_rows - before
    assert answered(engine, ["polite"]) == first
    assert replica.num_rows - before - cold < cold
    other = answered(engine, ["terse"])

    # A name of pages that says nothing of the adapter gives the keys of another one.
    start = page_names.chain_start

    def without_adapter(fields: Any) -> bytes:
        return start({name: value for name, value in fields.items() if name != "adapter"})

    monkeypatch.setattr(page_names, "chain_start", without_adapter)
    wrong = Engine(CONFIG, engine._params, BYTES, SERVE, adapters=ADAPTERS)
    assert answered(wrong, ["polite"]) == first
    assert answered(wrong, ["terse"]) != other


def test_an_unknown_adapter_is_refused_by_name(engine: Engine):
    with pytest.raises(UserError, match="adapter = 'rude' is not one of the engine's: polite, ter"):
        engine.submit(Request(PROMPT, GREEDY, adapter="rude"))
