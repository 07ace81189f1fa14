"""The engine on an accelerator: a large shape beside what the device's memory and arithmetic allow.

`python -m research.bench.engine_accelerator SHAPE ROUNDS` prints what it measured as JSON.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.bench import report
from research.bench.any_ids import AnyIds
from research.core import backend
from research.core import config as configs
from research.inference.engine import Engine
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig
from research.models.config import ModelConfig
from research.models.language_model import language_model
from research.parallel.target import platform
from research.scaling.devices import peak_flops

COPIED_BYTES = 2**31


class Load(NamedTuple):
    """Requests that are answered at once.

    Attributes:
      sequences: how many.
      prompt: tokens of each prompt.
      answer: tokens of each answer.
    """

    sequences: int
    prompt: int
    answer: int


LOADS = {"one": Load(1, 16, 256), "many": Load(64, 1000, 1000)}


def serve_config(load: Load) -> ServeConfig:
    """Returns how an engine runs that answers a load: a step is one tile."""
    tile = max(8, load.sequences)
    tokens = load.sequences * (load.prompt + load.answer + 256)
    return ServeConfig(slots=tile, tokens=tokens, rows=2 * tile, tiles=(tile,), prefix_cache=False)


def roofline(config: ModelConfig, load: Load, bandwidth: float, flops: float) -> float:
    """Returns the seconds that a load takes at least: of each tile of prompts and of each step of
    answers the larger of what its bytes and what its operations take.

    Args:
      config: of the model.
      load: of the requests.
      bandwidth: bytes a second.
      flops: operations a second.
    """
    # Parameters that a step multiplies, by the operations of a token, two for each: a sixth of
    # those of its training.
    parameters = language_model(config).flops_per_token(1) / 6
    width = jnp.dtype(config.dtype).itemsize
    attention = config.attention
    of_token = 2 * attention.num_kv_heads * attention.head_dim * width * config.num_layers

    def seconds(rows: int, cached: float) -> float:
        moved = parameters * width + cached * of_token
        return max(moved / bandwidth, 2 * parameters * rows / flops)

    tile = serve_config(load).tiles[-1]
    prompts = load.sequences * load.prompt
    reading = seconds(tile, 0.0) * (prompts / tile)
    # In the mean of its steps an answer has its prompt and half of itself in the cache.
    cached = load.sequences * (load.prompt + load.answer / 2)
    return reading + seconds(load.sequences, cached) * load.answer


def measure(config: ModelConfig, loads: dict[str, Load], rounds: int) -> dict[str, Any]:
    """Returns the bytes a second of a copy, and the seconds of each load in each round.

    Args:
      config: of the model, whose weights are random.
      loads: of requests, by name.
      rounds: of each.
    """
    model = language_model(config, platform())
    params = jax.jit(lambda key: nn.unbox(model.init(key)))(jax.random.key(0))
    found: dict[str, Any] = {"bandwidth": copy_bandwidth()}
    for name, load in loads.items():
        engine = Engine(config, params, AnyIds(config.vocab_size), serve_config(load))
        random = np.random.default_rng(0)
        seconds = []
        for index in range(rounds + 1):
            prompts = random.integers(300, config.vocab_size, (load.sequences, load.prompt))
            # The first round warms up.
            answer = load.answer if index else 2
            sampling = SamplingConfig(temperature=0.0, max_tokens=answer)
            requests = [Request(tuple(prompt.tolist()), sampling) for prompt in prompts]
            start = time.perf_counter()
            engine.run(requests)
            seconds.append(time.perf_counter() - start)
        found[name] = seconds[1:]
    return found


def copy_bandwidth() -> float:
    """Returns the bytes that a copy reads and writes a second, the best of some."""
    array = jnp.zeros(COPIED_BYTES // 4, jnp.int32)
    copy = jax.jit(lambda array: array + 1)
    copy(array).block_until_ready()
    best = np.inf
    for _ in range(5):
        start = time.perf_counter()
        copy(array).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * COPIED_BYTES / best


def rows(found: dict[str, Any], config: ModelConfig, loads: dict[str, Load]) -> Iterator[list[str]]:
    """Yields a row of the bench for each load: seconds, and the share of what the device allows.

    Args:
      found: as of `measure`, with `device` and `flops`.
      config: of the model.
      loads: of requests, by name.
    """
    wanted = {"one": "at least 0.75", "many": "at least 0.6"}
    for name, load in loads.items():
        least = roofline(config, load, found["bandwidth"], found["flops"])
        shares = [least / seconds for seconds in found[name]]
        made = load.sequences * load.answer / float(np.median(found[name]))
        yield [
            f"{load.sequences} at once, {load.prompt:,} + {load.answer:,} tokens",
            f"{report.digits(made)} tokens/s",
            f"at the bounds of {found['device']} {report.digits(least)} s",
            report.spread(shares),
            wanted.get(name, ""),
            f"a copy moves {found['bandwidth'] / 1e9:,.0f} GB/s",
        ]


def main(shape: str, rounds: str) -> None:
    """Prints rows, or why there are none."""
    backend.configure()
    device = jax.devices()[0]
    config = configs.bind(ModelConfig, configs.load_file(shape))
    config = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16", max_length=4096)
    flops = peak_flops(device.device_kind, config.dtype)
    if device.platform == "cpu" or flops is None:
        print(json.dumps({"reason": f"{device.device_kind} is no accelerator that is known"}))
        return
    found = measure(config, LOADS, int(rounds))
    found |= {"device": device.device_kind, "flops": flops}
    print(json.dumps({"rows": list(rows(found, config, LOADS))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
