"""Training steps of this project and of `transformers` GPT-2 on torch, in turns on the same machine."""

import argparse
import dataclasses
import importlib.util
import json
import pathlib

from research.bench.sides import interleave, spread
from research.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Shape:
    """What both sides train: GPT-2 with a small vocabulary."""

    layers: int = 6
    width: int = 384
    heads: int = 6
    length: int = 256
    batch: int = 16
    vocabulary: int = 4096

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.batch * self.length


SHAPE = Shape()
LEARNING_RATE, WEIGHT_DECAY, BETAS = 1e-4, 0.1, (0.9, 0.95)
DTYPES = ("float32", "bfloat16")
SIDES = ("tessera", "torch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    parser.add_argument("--dtype", choices=(*DTYPES, "both"), default="both", help="of the products (default both)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default 7)")
    parser.add_argument("--steps", type=int, default=3, help="training steps a turn (default 3)")
    parser.add_argument("--json", metavar="FILE", help="where to write every turn as JSON")
    parser.add_argument(
        "--same_allocator", action="store_true", help="give torch this project's settings of the C library's allocator"
    )


def main(arguments: argparse.Namespace) -> None:
    """Measures both sides in turns, and prints rates and ratios with their spread."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"bench train needs {package}: pip install -c constraints.txt -e '.[parity]'.")
    if min(arguments.rounds, arguments.steps) < 1:
        raise UserError(f"--rounds = {arguments.rounds} and --steps = {arguments.steps} must be at least 1.")
    dtypes = DTYPES if arguments.dtype == "both" else (arguments.dtype,)
    results = {dtype: run(dtype, arguments.rounds, arguments.steps, arguments.same_allocator) for dtype in dtypes}
    if arguments.json:
        report = {"shape": dataclasses.asdict(SHAPE), "tokens_per_second": results}
        pathlib.Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")


def run(dtype: str, rounds: int, steps: int, same_allocator: bool = False) -> dict[str, list[float]]:
    """Prints and returns the tokens a second of each side's turns.

    Args:
      dtype: `float32`, where torch runs eagerly, or `bfloat16`, where it has autocast and torch.compile.
      rounds: turns of each side; one more before them warms up.
      steps: training steps a turn.
      same_allocator: whether torch too keeps freed memory (`core.backend.keep_memory`).
    """
    module = "research.bench.train_sides"
    commands = {"tessera": [module, "tessera", dtype], "torch": [module, "torch", dtype]}
    commands["torch"] += ["--keep_memory"] * same_allocator
    seconds = interleave(commands, rounds, steps)
    rates = {side: [SHAPE.tokens * steps / taken for taken in turns] for side, turns in seconds.items()}
    peer = "eager" if dtype == "float32" else "autocast, compiled"
    print(f"{dtype}: {dataclasses.asdict(SHAPE)}, {rounds} turns of {steps} steps; torch: {peer}")
    for side in SIDES:
        print(f"  {side:8} {spread(rates[side], 0)} tokens a second")
    ratios = [us / them for us, them in zip(*(rates[side] for side in SIDES), strict=True)]
    print(f"  ratio    {spread(ratios, 2)} tessera / torch, turn by turn", flush=True)
    return rates
