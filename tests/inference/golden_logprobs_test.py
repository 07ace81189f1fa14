"""The engine's log-probabilities are those of transformers, of which the goldens are."""

import jax
import numpy as np
import pytest

from research.bench.any_ids import AnyIds
from research.inference.engine import Engine
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig
from tests.interop import registry

FAMILIES = ("gpt2-small", "llama-3.1-8b", "gemma3", "mixtral", "deepseek-v3", "gpt-oss")
TOLERANCE = 1e-4


def wanted_logprobs(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of a case's rows, and the log-probability of each but the first."""
    # Without the last one: a text of the model's length leaves no room for an answer.
    tokens = registry.batch(name)["tokens"][:, :-1]
    logits = registry.golden(name)["logits"][:, :-1]
    logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    return tokens, np.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]


@pytest.mark.fast_cases("gpt2-small", "gemma3")
@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_of_prompts_are_those_of_transformers(name):
    model = registry.model(name)
    tokens, wanted = wanted_logprobs(name)
    serve = ServeConfig(slots=2, tokens=2 * model.config.max_length, rows=16, tiles=(8,))
    engine = Engine(model.config, model.params, AnyIds(model.config.vocab_size), serve)
    sampling = SamplingConfig(temperature=0.0, max_tokens=1)
    # The second time the pages of the prompts are shared.
    for _ in range(2):
        requests = [Request(tuple(row.tolist()), sampling, prompt_logprobs=0) for row in tokens]
        found = []
        for answer in engine.run(requests):
            assert sorted(answer.prompt_logprobs) == list(range(1, tokens.shape[1]))
            found.append([answer.prompt_logprobs[i].logprob for i in range(1, tokens.shape[1])])
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
    # The control: of another token's.
    assert np.abs(np.roll(found, 1, axis=1) - wanted).max() > 1
