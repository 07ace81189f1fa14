"""The proof that answers do not change: drawn requests under every condition, bit for bit those of
the request alone.
"""

import argparse
import dataclasses
import gc
import pathlib
import shlex

import jax

from research.bench import report
from research.bench.drawn_requests import draw_requests
from research.bench.exactness_answers import Found
from research.bench.exactness_models import MODELS, random_params
from research.bench.exactness_numbers import (
    NUM_DEVICES,
    largest_error,
    mesh_error,
    page_size_error,
)
from research.bench.exactness_runs import (
    NARROW_CACHES,
    answer_alone,
    compare_engines,
    engines,
    few_engines,
    narrow_engines,
)
from research.core.errors import UserError, nearest

DTYPES = ("float32", "bfloat16")
REQUESTS = 48
FULL_REQUESTS = 1000
# Of log-probabilities in float32, beside those of one run over the whole text.
TOLERANCE = 1e-5
COLUMNS = [
    "model",
    "answers compared",
    "that differ",
    "log-probabilities compared",
    "bits that differ",
    "lost their pages",
    "guesses that counted",
    "largest difference to the whole text",
    "with other sizes of pages",
    "over 2 × 2 devices",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    parser.add_argument("--only", help="models, separated by commas (default all)")
    parser.add_argument("--dtype", choices=(*DTYPES, "both"), default="both", help="of the models")
    parser.add_argument(
        "--full",
        action="store_true",
        help=f"{FULL_REQUESTS} requests of each model, on all engines, with narrow pages and over "
        "devices: hours",
    )
    parser.add_argument(
        "--requests", type=int, help=f"of each model (default {REQUESTS}, or {FULL_REQUESTS})"
    )
    parser.add_argument("--json", metavar="FILE", help="where to write the table")


def main(arguments: argparse.Namespace) -> None:
    """Compares all answers, and prints a table of counts.

    Raises:
      UserError: an answer that differs, or log-probabilities too far from those of the whole text.
    """
    arguments.rounds = 1
    requests = arguments.requests
    if requests is None:
        requests = FULL_REQUESTS if arguments.full else REQUESTS
    arguments.requests = requests
    report.check_arguments(arguments, "requests")
    names = list(MODELS) if arguments.only is None else arguments.only.split(",")
    for name in names:
        if name not in MODELS:
            raise UserError("--only", name, f"is no model of this bench. {nearest(name, MODELS)}")
    if arguments.full and jax.device_count() < NUM_DEVICES:
        raise UserError(
            "--full",
            constraint=f": needs {NUM_DEVICES} devices. On CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={NUM_DEVICES}.",
        )
    dtypes = DTYPES if arguments.dtype == "both" else (arguments.dtype,)

    rows = []
    faults = []
    for name in names:
        for dtype in dtypes:
            row, found = measure(name, dtype, requests, full=arguments.full)
            cells = zip(COLUMNS[1:], row[1:], strict=True)
            print(f"{row[0]}: {'; '.join(f'{cell} {what}' for what, cell in cells)}", flush=True)
            rows.append(row)
            faults += found
    if arguments.json is not None:
        flags = ["--full"] if arguments.full else []
        flags += [f"--dtype={arguments.dtype}", f"--requests={requests}"]
        if arguments.only is not None:
            flags.append(f"--only={arguments.only}")
        command = shlex.join(["tessera", "bench", "exactness", *flags])
        report.write(pathlib.Path(arguments.json), command, columns=COLUMNS, rows=rows)
    if faults:
        raise UserError(f"answers are not exact: {'; '.join(faults)}")


def measure(name: str, dtype: str, requests: int, *, full: bool) -> tuple[list[str], list[str]]:
    """Returns the row of a model, and what is wrong with its answers.

    Args:
      name: of `exactness_models.MODELS`.
      dtype: of its weights and products.
      requests: that are drawn.
      full: whether on all engines.
    """
    config = dataclasses.replace(MODELS[name], dtype=dtype, param_dtype=dtype)
    params = random_params(config)
    asked = draw_requests(config, requests)
    settings = engines(config) if full else few_engines(config)
    alone = answer_alone(config, params, asked, settings[0])
    wanted = [Found.of(answer) for answer in alone]
    total = compare_engines(config, params, asked, wanted, settings)
    if full:
        # Each beside itself run plainly: its answers are others than those of wide pages.
        for cache_dtype in NARROW_CACHES:
            narrow = narrow_engines(config, cache_dtype)
            plain = answer_alone(config, params, asked, narrow[0])
            of_plain = [Found.of(answer) for answer in plain]
            total.add(compare_engines(config, params, asked, of_plain, narrow))

    title = f"{name}, {dtype}"
    faults = []
    if not total.numbers:
        faults.append(f"{title}: no number was compared")
    if total.differing:
        faults.append(f"{title}: {total.differing} of {total.answers} differ, {total.first}")
    # A sum in 16 bits depends on how many are added at once: what is exact there is the bits.
    cells = ["not compared"] * 3
    errors: dict[str, float] = {}
    if dtype == "float32":
        compared, errors["from the whole text's"] = largest_error(config, params, asked, alone)
        same = (config, params, asked, wanted, settings[0])
        errors["with other sizes of pages"] = page_size_error(*same)
        cells[:2] = [f"{error:.1e}" for error in errors.values()]
        cells[0] += f" of {compared:,}"
        if full:
            errors["over devices"] = mesh_error(*same)
            cells[2] = f"{errors['over devices']:.1e}"
    for what, error in errors.items():
        if error > TOLERANCE:
            faults.append(f"{title}: a number is {error:.1e} off {what}")
    # Each compiled program takes some of the mappings of memory that a process may have.
    jax.clear_caches()
    gc.collect()
    counts = [total.answers, total.differing, total.numbers, total.bits]
    counts += [total.preempted, total.guessed_right]
    return [title, *(f"{each:,}" for each in counts), *cells], faults
