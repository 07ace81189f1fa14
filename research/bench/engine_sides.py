"""The parts of `tessera bench engine`, each in a process of its own: `python -m
research.bench.engine_sides PART FOLDER …` prints what it measured as JSON.
"""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from research.bench.any_ids import AnyIds
from research.bench.serving_sides import load
from research.core import backend

# Ids of prompts: those that stand for letters.
PROMPT_IDS = (300, 1000)
SHARED = 1000
LONGEST_PROMPT = 96
LONGEST_ANSWER = 48
# Slots for the 32 answers, and guesses of each: 7 fill a tile of 8 rows with the newest token.
LOOKUP_SETTINGS = {"slots": 32, "tokens": 8192, "rows": 128}
LOOKUP_DRAFTS = (3, 7)
# Requests of the tiny model after which its memory is measured.
MEMORY_AT = (1000, 10_000)


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request that comes at a time.

    Attributes:
      at: seconds after the first one.
      prompt: its ids.
      tokens: of its answer.
    """

    at: float
    prompt: tuple[int, ...]
    tokens: int


def arrivals(count: int, rate: float) -> list[Arrival]:
    """Returns requests that come independently of each other, `rate` a second: the same each time.

    Args:
      count: of requests.
      rate: of them a second, in the mean.
    """
    random = np.random.default_rng(14)
    times = np.cumsum(random.exponential(1 / rate, count))
    found = []
    for at in times - times[0]:
        prompt = random.integers(*PROMPT_IDS, int(random.integers(8, LONGEST_PROMPT + 1)))
        tokens = int(random.integers(8, LONGEST_ANSWER + 1))
        found.append(Arrival(float(at), tuple(prompt.tolist()), tokens))
    return found


def times_of(
    asked: Sequence[Arrival], answer: Callable[[Sequence[Arrival]], list[list[float]]]
) -> dict[str, list[float]]:
    """Returns the seconds to each first token, and between each two.

    Args:
      asked: requests.
      answer: returns when each token of each request was there, after the first request came.
    """
    moments = answer(asked)
    first = [tokens[0] - request.at for request, tokens in zip(asked, moments, strict=True)]
    between = [float(gap) for tokens in moments for gap in np.diff(tokens)]
    return {"first": first, "next": between}


def start_engine(folder: pathlib.Path, **settings: Any) -> Any:
    """Returns an engine of a folder's model."""
    from research.inference.engine import Engine
    from research.inference.serve_config import ServeConfig

    config, params = load(folder, "float32")
    return Engine(config, params, AnyIds(config.vocab_size), ServeConfig(**settings))


def request_of(prompt: Sequence[int], tokens: int, **fields: Any) -> Any:
    """Returns a greedy request."""
    from research.inference.requests import Request
    from research.inference.sampling_config import SamplingConfig

    return Request(tuple(prompt), SamplingConfig(temperature=0.0, max_tokens=tokens), **fields)


def tessera(folder: pathlib.Path) -> Callable[[Sequence[Arrival]], list[list[float]]]:
    """Returns the engine as it answers requests that come one by one."""
    engine = start_engine(folder, slots=16, tokens=4096)
    engine.run([request_of(range(300, 400), 4)])

    def answer(asked: Sequence[Arrival]) -> list[list[float]]:
        start = time.perf_counter()
        moments: list[list[float]] = [[] for _ in asked]
        answers: list[Any] = []
        while len(answers) < len(asked) or not all(each.finished for each in answers):
            now = time.perf_counter() - start
            while len(answers) < len(asked) and asked[len(answers)].at <= now:
                request = asked[len(answers)]
                answers.append(engine.submit(request_of(request.prompt, request.tokens)))
            if not engine.run_step():
                time.sleep(1e-3)
            now = time.perf_counter() - start
            for found, each in zip(moments, answers, strict=False):
                new = len(each.samples[0].logprobs) - len(found)
                found += [now] * new
        return moments

    return answer


def one_by_one(
    generate: Callable[[Sequence[int], int, Callable[[], None]], None],
) -> Callable[[Sequence[Arrival]], list[list[float]]]:
    """Returns a peer that answers one request after the other.

    Args:
      generate: takes a prompt and a number of tokens, and calls what it is given after each.
    """

    def answer(asked: Sequence[Arrival]) -> list[list[float]]:
        start = time.perf_counter()
        moments = []
        for request in asked:
            time.sleep(max(0.0, request.at - (time.perf_counter() - start)))
            found: list[float] = []
            generate(
                request.prompt,
                request.tokens,
                lambda found=found: found.append(time.perf_counter() - start),
            )
            moments.append(found)
        return moments

    return answer


def transformers(folder: pathlib.Path) -> Callable[[Sequence[Arrival]], list[list[float]]]:
    """Returns transformers, which answers one request after the other."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    class Streamer(BaseStreamer):
        """Says that there is a token; the first call has the prompt."""

        def __init__(self, say: Callable[[], None]):
            self._say = say
            self._is_prompt = True

        def put(self, value: Any) -> None:
            if not self._is_prompt:
                self._say()
            self._is_prompt = False

        def end(self) -> None:
            pass

    def generate(prompt: Sequence[int], tokens: int, say: Callable[[], None]) -> None:
        ids = torch.tensor([list(prompt)])
        length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                pad_token_id=0,
                streamer=Streamer(say),
                **length,
            )

    generate(range(300, 310), 2, lambda: None)
    return one_by_one(generate)


def llama_cpp(folder: pathlib.Path) -> Callable[[Sequence[Arrival]], list[list[float]]]:
    """Returns llama.cpp, which answers one request after the other."""
    from research.bench.llama_cpp_model import LlamaCpp

    model = LlamaCpp(folder, 1, 512)

    def generate(prompt: Sequence[int], tokens: int, say: Callable[[], None]) -> None:
        model.clear()
        rows = [(0, position, token) for position, token in enumerate(prompt)]
        for position in range(len(prompt), len(prompt) + tokens):
            [token] = model.step(rows, [len(rows) - 1])
            say()
            rows = [(0, position, token)]

    generate(range(300, 310), 2, lambda: None)
    return one_by_one(generate)


SIDES = {"tessera": tessera, "transformers": transformers, "llama.cpp": llama_cpp}


def arrive(folder: pathlib.Path, side: str, count: str, rate: str) -> dict[str, list[float]]:
    """Returns the times of a side's answers to requests that arrive at random."""
    return times_of(arrivals(int(count), float(rate)), SIDES[side](folder))


def seconds_of(engine: Any, requests: Sequence[Any]) -> float:
    """Returns the seconds that requests take."""
    start = time.perf_counter()
    engine.run(requests)
    return time.perf_counter() - start


def prefix(folder: pathlib.Path, rounds: str) -> dict[str, list[float]]:
    """Returns seconds to a first token after a prompt of which 1,000 tokens are shared, cold and
    warm; and those of requests that share nothing, with the prefix cache and without.
    """
    random = np.random.default_rng(0)
    cached = start_engine(folder, slots=8, tokens=4096)
    plain = start_engine(folder, slots=8, tokens=4096, prefix_cache=False)
    shared = random.integers(*PROMPT_IDS, SHARED).tolist()
    found: dict[str, list[float]] = {"cold": [], "warm": [], "cached": [], "plain": []}
    for index in range(int(rounds) + 1):
        own = random.integers(*PROMPT_IDS, 16).tolist()
        salt = f"round {index}"
        for name in ("cold", "warm"):
            taken = seconds_of(cached, [request_of(shared + own, 1, salt=salt)])
            found[name].append(taken)
            own = own[::-1]
        others = [random.integers(*PROMPT_IDS, 64).tolist() for _ in range(8)]
        pair = [("cached", cached), ("plain", plain)]
        for name, engine in pair[:: 1 - 2 * (index % 2)]:
            found[name].append(seconds_of(engine, [request_of(each, 32) for each in others]))
    # The first round warms up.
    return {name: values[1:] for name, values in found.items()}


def lookup(folder: pathlib.Path, rounds: str) -> dict[str, list[float]]:
    """Returns seconds with guesses by look-up and without: of one greedy answer, which repeats
    itself as those of random weights do, and of 32 drawn ones, which do not.
    """
    from research.inference.requests import Request
    from research.inference.sampling_config import SamplingConfig

    engines = {"plain": start_engine(folder, **LOOKUP_SETTINGS)}
    for drafts in LOOKUP_DRAFTS:
        settings = {**LOOKUP_SETTINGS, "rows": LOOKUP_SETTINGS["slots"] * (1 + drafts)}
        name = f"{drafts} guesses"
        engines[name] = start_engine(folder, **settings, drafts=drafts, speculate="lookup")
    one = [request_of(range(300, 316), 96)]
    many = []
    for seed in range(32):
        drawn = SamplingConfig(temperature=1.0, max_tokens=24, seed=seed)
        many.append(Request(tuple(range(300 + seed, 316 + seed)), drawn))
    found: dict[str, list[float]] = {}
    for index in range(int(rounds) + 1):
        for name, engine in list(engines.items())[:: 1 - 2 * (index % 2)]:
            for case, requests in (("one", one), ("many", many)):
                found.setdefault(f"{case}, {name}", []).append(seconds_of(engine, requests))
    return {name: values[1:] for name, values in found.items()}


def programs(folder: pathlib.Path) -> dict[str, list[float]]:
    """Returns the seconds of each compilation of an engine's start."""
    import jax

    seconds = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            seconds.append(duration)

    jax.config.update("jax_enable_compilation_cache", False)
    config, params = load(folder, "float32")
    jax.block_until_ready(params)
    jax.monitoring.register_event_duration_secs_listener(listen)
    from research.inference.engine import Engine
    from research.inference.serve_config import ServeConfig

    Engine(config, params, AnyIds(config.vocab_size), ServeConfig())
    return {"compile": seconds}


def memory(folder: pathlib.Path) -> dict[str, list[float]]:
    """Returns the bytes of the process after some short requests to a tiny model, and after many.

    Args:
      folder: of the model.
    """
    import psutil

    engine = start_engine(folder, slots=16, tokens=2048)
    random = np.random.default_rng(0)
    found = []
    done = 0
    for count in MEMORY_AT:
        while done < count:
            prompts = [random.integers(*PROMPT_IDS, 12).tolist() for _ in range(100)]
            engine.run([request_of(prompt, 4) for prompt in prompts])
            done += 100
        found.append(float(psutil.Process().memory_info().rss))
    return {"bytes": found}


PARTS = {
    "arrive": arrive,
    "prefix": prefix,
    "lookup": lookup,
    "programs": programs,
    "memory": memory,
}


def main(part: str, folder: str, *arguments: str) -> None:
    """Measures one part."""
    backend.configure()
    print(json.dumps(PARTS[part](pathlib.Path(folder), *arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
