"""A decode step of latent attention: MLA weight absorption beside decompressed MLA."""

import argparse
import itertools

from research.bench import report
from research.bench.sides import interleave_workers
from research.core.errors import UserError

FORMS = ("weight_absorption", "decompressed")
DTYPES = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    parser.add_argument(
        "--batch", default="1,8", help="sequences, separated by commas (default 1,8)"
    )
    parser.add_argument("--slots", type=int, default=2048, help="of the cache (default 2048)")
    parser.add_argument(
        "--dtype", choices=(*DTYPES, "both"), default="both", help="of the model (default both)"
    )
    report.add_arguments(parser, rounds=7)
    parser.add_argument("--steps", type=int, default=10, help="tokens a round (default 10)")


def main(arguments: argparse.Namespace) -> None:
    """Measures both forms interleaved, and prints milliseconds a step and their ratios."""
    report.check_arguments(arguments, "steps")
    parts = arguments.batch.split(",")
    if not all(part.isdigit() and int(part) for part in parts):
        raise UserError(
            "--batch", arguments.batch, "must be whole numbers of at least 1, separated by commas."
        )

    # The cache begins half full, and each round takes `steps` slots.
    least = 2 * (arguments.rounds + 1) * arguments.steps
    if arguments.slots < least:
        raise UserError(
            "--slots",
            arguments.slots,
            f"must be at least {least}: half of them are read at the start.",
        )
    dtypes = DTYPES if arguments.dtype == "both" else (arguments.dtype,)
    cases = itertools.product(map(int, parts), dtypes)
    rows = (measure(batch, dtype, arguments) for batch, dtype in cases)
    report.publish("latent", arguments, rows)


def measure(batch: int, dtype: str, arguments: argparse.Namespace) -> tuple[str, report.Figure]:
    """Returns the row of a batch, with the milliseconds a step of each form's rounds."""
    # A process each, with the same arguments but the form.
    sizes = [str(batch), str(arguments.slots), dtype]
    commands = {form: ["research.bench.latent_side", form, *sizes] for form in FORMS}
    seconds = interleave_workers(commands, arguments.rounds, arguments.steps)
    times = {form: report.milliseconds(values, arguments.steps) for form, values in seconds.items()}
    name = f"{dtype}, batch {batch}, {arguments.slots:,} slots"
    return name, report.Figure("ms", False, times)
