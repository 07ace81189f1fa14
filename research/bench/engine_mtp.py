"""`tessera bench engine --only=mtp`: guesses of a small DeepSeek-V3 with multi-token prediction,
trained on the quickstart's text: tokens a step, speed, and how many are kept.

`python -m research.bench.engine_mtp ROUNDS WORKDIR [DRAFT]` measures a trained one in a process of
its own, beside a draft model.
"""

import contextlib
import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from research.bench import report
from research.bench.acceptance import (
    Acceptance,
    Text,
    acceptance,
    mean_of,
    of_first_layers,
    of_lookup,
    of_model,
    of_mtp,
)
from research.bench.engine_load import on_first_device
from research.bench.engine_row import Row
from research.bench.sides import run
from research.core import backend
from research.core import config as configs
from research.core.errors import UserError
from research.data import tokenizers
from research.data.tokenizers import Tokenizer
from research.inference.answers import Answer
from research.inference.engine import Engine
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig
from research.models.config import ModelConfig
from research.models.language_model import abstract_params
from research.parallel.target import platform
from research.storage.json_files import read_object
from research.training.checkpoints import CheckpointConfig, Checkpoints

SIDE = "research.bench.engine_mtp"
CONFIG = "configs/pretrain/deepseek.py"
PROMPTS = ("def __init__(self", "import ", "class Test", "    return ", "    for i in ", "try:\n")
TOKENS = 96
TEMPERATURE = 0.7
# One trained depth, applied again for the second guess.
DRAFTS = 2
SERVE = ServeConfig(slots=1, tokens=1024, rows=16, tiles=(2, 8), prefix_cache=False)
# The first layers that guess beside it.
FIRST_LAYERS = 1
SAMPLINGS = {
    "greedy": SamplingConfig(temperature=0.0, max_tokens=TOKENS),
    f"temperature {TEMPERATURE}": SamplingConfig(temperature=TEMPERATURE, max_tokens=TOKENS),
}


def mtp_rows(
    folder: pathlib.Path, workdir: str | None, draft: str | None, rounds: int
) -> Iterator[Row]:
    """Yields what multi-token prediction gains, and how often guesses are kept.

    Args:
      folder: for a model that is trained for it.
      workdir: of a trained one, or None.
      draft: workdir of a draft model with the same tokenizer, or None.
      rounds: of each measurement.
    """
    if workdir is None:
        workdir = str(folder / "deepseek")
        run(["research", "train", f"--config={CONFIG}", f"--workdir={workdir}"])
    drafts = [] if draft is None else [draft]
    found = json.loads(run([SIDE, str(rounds), workdir, *drafts]))
    yield from rows_of(found)
    if draft is None:
        reason = "no --draft_workdir says which"
        yield Row("first guess by a draft model: kept", "", "left out", "", "", reason)


def rows_of(found: dict[str, Any]) -> Iterator[Row]:
    """Yields the rows of what a side has measured.

    Args:
      found: as of `measure`.
    """
    for name, timed in found["timed"].items():
        plain = timed["none"]
        guessed = timed["mtp"]
        ratios = []
        for own, other in zip(guessed["seconds"], plain["seconds"], strict=True):
            ratios.append(other / own)
        tokens = found["tokens"]
        rate = tokens / statistics.median(guessed["seconds"])
        other = tokens / statistics.median(plain["seconds"])
        yield Row(
            f"multi-token prediction, {name}: speed",
            f"{report.digits(rate)} tokens a second",
            f"none {report.digits(other)}",
            report.spread(ratios),
            "",
            f"{report.digits(guessed['tokens_a_step'])} tokens a step; {guessed['right']} of "
            f"{guessed['made']} guesses kept; model of step {found['step']}",
        )
    for kind, values in found["acceptance"].items():
        kept = Acceptance(*values)
        yield Row(
            f"first guess by {kind}, temperature {TEMPERATURE}: kept",
            f"{kept.same_noise:.3f}",
            f"rejection sampling {kept.rejection:.3f}",
            report.digits(kept.same_noise / kept.rejection),
            "",
            f"{kept.guesses:,} tokens",
        )


def load(workdir: pathlib.Path) -> tuple[ModelConfig, Any, Tokenizer, int]:
    """Returns config, parameters, tokenizer and step of a trained model, its layers unrolled."""
    values = read_object(workdir / "config.json")
    config = configs.bind(ModelConfig, values["model"], "model")
    config = dataclasses.replace(config, layer_loop="unroll")
    stored = abstract_params(config, platform())
    wanted = on_first_device(stored)
    with contextlib.closing(Checkpoints(workdir, CheckpointConfig())) as checkpoints:
        step, params = checkpoints.stream_params(stored, wanted, fields=("ema", "params"))
    tokenizer = tokenizers.load(workdir / "tokenizer")
    return config, params, tokenizer, step


def measure(
    rounds: int, workdir: pathlib.Path, draft: pathlib.Path | None = None
) -> dict[str, Any]:
    """Returns seconds, tokens a step and kept guesses with multi-token prediction and without, and
    how often guesses are kept by this engine and by rejection sampling.

    Args:
      rounds: of each measurement.
      workdir: of the model.
      draft: workdir of a draft model, or None.

    Raises:
      UserError: no multi-token prediction, or another tokenizer.
    """
    config, params, tokenizer, step = load(workdir)
    if not config.head.mtp_depth:
        raise UserError("--mtp_workdir", workdir, "has a model without head.mtp_depth.")
    small = None
    if draft is not None:
        draft_config, draft_params, theirs, _ = load(draft)
        if theirs.digest() != tokenizer.digest():
            raise UserError("--draft_workdir", draft, "has another tokenizer.")
        small = (draft_config, draft_params)
    guessing = dataclasses.replace(SERVE, speculate="mtp", drafts=DRAFTS)
    engines = {
        "none": Engine(config, params, tokenizer, SERVE),
        "mtp": Engine(config, params, tokenizer, guessing),
    }
    prompts = [tuple(tokenizer.encode_prompt(prompt)) for prompt in PROMPTS]
    timed = {}
    drawn: list[Text] = []
    for name, sampling in SAMPLINGS.items():
        # No end ends a text before the others.
        requests = []
        for index, ids in enumerate(prompts):
            own = dataclasses.replace(sampling, seed=index, min_tokens=TOKENS)
            requests.append(Request(ids, own))
        timed[name], drawn = _timed(engines, requests, rounds)
    return {
        "step": step,
        "tokens": len(prompts) * TOKENS,
        "timed": timed,
        # The last texts were drawn.
        "acceptance": acceptances(config, params, drawn, TEMPERATURE, small),
    }


def _timed(
    engines: dict[str, Engine], requests: Sequence[Request], rounds: int
) -> tuple[dict[str, Any], list[Text]]:
    """Returns what was measured of each engine, and the texts, which are the same of both."""
    timed: dict[str, Any] = {name: {"seconds": []} for name in engines}
    texts: list[Text] = []
    for index in range(rounds + 1):
        order = reversed(engines) if index % 2 else engines
        for name in order:
            [replica] = engines[name].replicas
            steps = replica.num_steps
            made = replica.guesses.made
            right = replica.guesses.right
            start = time.perf_counter()
            answers = engines[name].run(requests)
            seconds = time.perf_counter() - start

            texts = [text_of(answer) for answer in answers]
            # The first round warms up.
            if index:
                timed[name]["seconds"].append(seconds)
            count = sum(len(text.ids) - text.num_prompt for text in texts)
            steps = replica.num_steps - steps
            timed[name]["tokens_a_step"] = count / steps
            timed[name]["made"] = replica.guesses.made - made
            timed[name]["right"] = replica.guesses.right - right
    return timed, texts


def text_of(answer: Answer) -> Text:
    """Returns the text of an answer of which there is one."""
    [sample] = answer.samples
    prompt = answer.request.ids
    drawn = [each.token for each in sample.logprobs]
    return Text((*prompt, *drawn), len(prompt))


def acceptances(
    config: ModelConfig,
    params: Any,
    texts: Sequence[Text],
    temperature: float,
    small: tuple[ModelConfig, Any] | None,
) -> dict[str, Acceptance]:
    """Returns how often the first guess of each kind is kept in texts that the model drew.

    Args:
      config: of the model.
      params: its parameters.
      texts: that it drew.
      temperature: that it drew them with.
      small: config and parameters of a draft model, or None.
    """
    kinds = ("mtp", "first layers", "look-up", "a draft model")
    found: dict[str, list[Acceptance]] = {kind: [] for kind in kinds}
    for text in texts:
        p = of_model(config, params, text, temperature)
        q = of_mtp(config, params, text, temperature)
        found["mtp"].append(acceptance(p, q))
        q = of_first_layers(config, params, FIRST_LAYERS, text, temperature)
        found["first layers"].append(acceptance(p, q))
        if small is not None:
            q = of_model(*small, text, temperature)
            found["a draft model"].append(acceptance(p, q))
        guessed = of_lookup(p, text)
        if guessed is not None:
            found["look-up"].append(guessed)
    return {kind: mean_of(each) for kind, each in found.items() if each}


def main(rounds: str, *workdirs: str) -> None:
    """Prints what was measured."""
    print(json.dumps(measure(int(rounds), *map(pathlib.Path, workdirs))))


if __name__ == "__main__":
    backend.configure()
    main(*sys.argv[1:])
