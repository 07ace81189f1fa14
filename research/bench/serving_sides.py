"""Sides of `tessera bench decode`: greedy decoding by this project and its peers, each in a process
of its own.

`python -m research.bench.serving_sides WORK SIDE FOLDER DTYPE SEQUENCES TOKENS`, where WORK is
`time`, which answers counts of rounds with seconds, or `tokens`, which prints the first answer.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from research.bench.any_ids import AnyIds
from research.bench.sides import serve
from research.core import backend

# Greedy decoding of so many tokens after each of the prompts, all at once.
Decode = Callable[[], list[list[int]]]
READ_BYTES = 2**30


def first_tokens(sequences: int) -> list[int]:
    """Returns the prompts, of one token each, so that every step is one of decoding."""
    return [1000 + 37 * index for index in range(sequences)]


def load(folder: pathlib.Path, dtype: str) -> tuple[Any, Any]:
    """Returns config and parameters of a folder, as this project serves them."""
    import jax

    from research.interop.huggingface import from_hugging_face

    config, params = from_hugging_face(folder)
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype, layer_loop="unroll")
    return config, jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def tessera(
    folder: pathlib.Path, dtype: str, sequences: int, tokens: int, *, invariant: bool = True
) -> Decode:
    """Returns decoding by the engine."""
    from research.inference.engine import Engine
    from research.inference.requests import Request
    from research.inference.sampling_config import SamplingConfig
    from research.inference.serve_config import ServeConfig

    config, params = load(folder, dtype)
    room = 2 * sequences * (tokens + 16)
    settings = ServeConfig(slots=8, tokens=room, invariant=invariant, prefix_cache=False)
    engine = Engine(config, params, AnyIds(config.vocab_size), settings)
    sampling = SamplingConfig(temperature=0.0, max_tokens=tokens)
    requests = [Request((token,), sampling) for token in first_tokens(sequences)]

    def decode() -> list[list[int]]:
        answers = engine.run(requests)
        return [list(answer.samples[0].completion().tokens) for answer in answers]

    return decode


def any_tiles(folder: pathlib.Path, dtype: str, sequences: int, tokens: int) -> Decode:
    """As `tessera`, without the promise that an answer is one of its request alone."""
    return tessera(folder, dtype, sequences, tokens, invariant=False)


def compiled_step(folder: pathlib.Path, dtype: str, sequences: int, tokens: int) -> Decode:
    """Returns decoding by the compiled steps alone: nothing is read until the last one is done."""
    import jax
    import numpy as np

    from research.inference.placement import id_rules, one_slot
    from research.inference.runner import Runner
    from research.inference.sampling_config import SamplingConfig
    from research.inference.scheduler import Row
    from research.inference.scheduler import Sequence as Answered
    from research.inference.serve_config import ServeConfig
    from research.inference.slots import LogprobKind
    from research.kernels.decode_attention import PAGE_SIZE

    config, params = load(folder, dtype)
    settings = ServeConfig(slots=8, tokens=2 * sequences * (tokens + 16), prefix_cache=False)
    runner = Runner(config, params, settings, config.vocab_size, None, None, None)
    sampling = SamplingConfig(temperature=0.0, max_tokens=tokens)
    pages = -(-tokens // PAGE_SIZE)
    answered = []
    for slot, token in enumerate(first_tokens(sequences)):
        answered.append(Answered((slot,), [token], tokens + 1))
        runner.tables.write(slot, [range(1 + slot * pages, 1 + (slot + 1) * pages)])

    def decode() -> list[list[int]]:
        for slot, sequence in enumerate(answered):
            rules = id_rules(sequence, 1, sampling, (), config.vocab_size)
            runner.place(slot, one_slot(sequence, sampling, 0, slot, LogprobKind.RAW, rules, 0))
        found = []
        for position in range(tokens):
            rows = [Row(each, slot, position, None, True) for slot, each in enumerate(answered)]
            drawn, _ = runner.draw(runner.read(rows, {}, set()), {})
            found.append(drawn.token)
        # [tokens][rows] -> [sequences][tokens]
        return np.stack(jax.device_get(found), axis=1)[:sequences].tolist()

    return decode


def transformers(folder: pathlib.Path, dtype: str, sequences: int, tokens: int) -> Decode:
    """Returns decoding by `generate` of transformers, in one batch."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    prompts = torch.tensor([[token] for token in first_tokens(sequences)])
    mask = torch.ones_like(prompts)

    def decode() -> list[list[int]]:
        with torch.inference_mode():
            found = model.generate(
                prompts,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
            )
        return found[:, 1:].tolist()

    return decode


def llama_cpp(folder: pathlib.Path, dtype: str, sequences: int, tokens: int) -> Decode:
    """Returns decoding by llama.cpp's own calls, all sequences in one batch."""
    from research.bench.llama_cpp_model import LlamaCpp

    assert dtype == "float32"
    model = LlamaCpp(folder, sequences, tokens + 1)

    def decode() -> list[list[int]]:
        model.clear()
        newest = first_tokens(sequences)
        found: list[list[int]] = [[] for _ in newest]
        for position in range(tokens):
            newest = model.step([(i, position, token) for i, token in enumerate(newest)])
            for row, token in zip(found, newest, strict=True):
                row.append(token)
        return found

    return decode


def read_memory(folder: pathlib.Path, dtype: str, sequences: int, tokens: int) -> Decode:
    """Returns a sum over an array that no cache holds: how fast memory is read."""
    import jax
    import jax.numpy as jnp

    array = jnp.ones((64, READ_BYTES // 4 // 64), jnp.float32)
    add = jax.jit(jnp.sum)

    def read() -> list[list[int]]:
        add(array).block_until_ready()
        return []

    return read


SIDES = {
    "tessera": tessera,
    "any tiles": any_tiles,
    "compiled step": compiled_step,
    "transformers": transformers,
    "llama.cpp": llama_cpp,
    "read": read_memory,
}


def main(work: str, side: str, folder: str, dtype: str, sequences: str, tokens: str) -> None:
    """Serves rounds of one side, or prints what it answers."""
    backend.configure()
    decode = SIDES[side](pathlib.Path(folder), dtype, int(sequences), int(tokens))
    if work == "tokens":
        print(json.dumps(decode()))
    else:
        serve(decode)


if __name__ == "__main__":
    main(*sys.argv[1:])
