"""Training steps of this project and of `transformers` GPT-2 on torch, interleaved on the same
machine.
"""

import argparse
import dataclasses
import importlib.util

from research.bench import report
from research.bench.machine import without_torch_bfloat16
from research.bench.sides import interleave_workers
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
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
DTYPES = ("float32", "bfloat16")
SIDES = ("tessera", "torch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    parser.add_argument(
        "--dtype", choices=(*DTYPES, "both"), default="both", help="of the products (default both)"
    )
    report.add_arguments(parser, rounds=7)
    parser.add_argument("--steps", type=int, default=3, help="training steps a round (default 3)")
    parser.add_argument(
        "--same_allocator",
        action="store_true",
        help="give torch this project's settings of the C library's allocator",
    )


def main(arguments: argparse.Namespace) -> None:
    """Measures both sides interleaved, and prints rates and ratios with their spread."""
    # The peer is a model of transformers on torch.
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"bench train needs {package}: pip install -c constraints.txt -e '.[parity]'."
            )
    report.check_arguments(arguments, "steps")
    dtypes = DTYPES if arguments.dtype == "both" else (arguments.dtype,)
    report.publish("train", arguments, (measure(dtype, arguments) for dtype in dtypes))


def measure(dtype: str, arguments: argparse.Namespace) -> tuple[str, report.Figure]:
    """Returns the row of a type, with the tokens a second of each side's rounds.

    In `float32` torch runs eagerly; in `bfloat16` it has autocast and torch.compile.
    """
    # Torch with its own allocator, or with the settings that this project makes.
    peers, skipped = without_torch_bfloat16(["torch"], dtype)
    keep = ["--keep_memory"] if arguments.same_allocator else []
    flags = {"tessera": [], "torch": keep}
    commands = {
        side: ["research.bench.train_sides", side, dtype, *flags[side]]
        for side in ("tessera", *peers)
    }
    seconds = interleave_workers(commands, arguments.rounds, arguments.steps)

    tokens = SHAPE.tokens * arguments.steps
    rates = {}
    for side, values in seconds.items():
        rates[side] = [tokens / taken for taken in values]
    sizes = report.sizes_text(dataclasses.asdict(SHAPE))
    mode = "eager" if dtype == "float32" else "with autocast, compiled"
    name = f"{dtype}, torch {mode}"
    return name, report.Figure("tokens/s", True, rates, skipped, sizes)
