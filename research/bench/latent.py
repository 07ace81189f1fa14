"""A decode step of latent attention: MLA weight absorption beside decompressed MLA."""

import argparse
import json
import pathlib

from research.bench.sides import interleave, spread
from research.core.errors import UserError

FORMS = ("absorbed", "decompressed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    parser.add_argument("--batch", type=int, default=1, help="sequences (default 1)")
    parser.add_argument("--slots", type=int, default=2048, help="of the cache (default 2048)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default 7)")
    parser.add_argument("--steps", type=int, default=10, help="tokens a turn (default 10)")
    parser.add_argument("--json", metavar="FILE", help="where to write every turn as JSON")


def main(arguments: argparse.Namespace) -> None:
    """Measures both forms in turns, and prints milliseconds a step and the ratio turn by turn."""
    for name in ("batch", "rounds", "steps"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} = {getattr(arguments, name)} must be at least 1.")
    least = 2 * (arguments.rounds + 1) * arguments.steps
    if arguments.slots < least:
        raise UserError(f"--slots = {arguments.slots} must be at least {least}: half of them are read at the start.")
    sizes = [str(arguments.batch), str(arguments.slots), arguments.dtype]
    sides = {form: ["research.bench.latent_side", form, *sizes] for form in FORMS}
    seconds = interleave(sides, arguments.rounds, arguments.steps)
    for form, turns in seconds.items():
        print(f"{form:12} {spread([1000 * turn / arguments.steps for turn in turns], 2)} ms a step")
    ratios = [ours / theirs for ours, theirs in zip(*seconds.values(), strict=True)]
    print(f"{'ratio':12} {spread(ratios, 2)}")
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(seconds, indent=2) + "\n")
