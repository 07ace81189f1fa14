"""`tessera evaluate --needle`: how often a model finds a needle in long texts."""

import argparse
import json
from typing import Any

from research.core.errors import UserError
from research.evaluation.needle import NeedleConfig, Row, find_needles
from research.recipes.load import load
from research.storage.paths import Path


def add_needle_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the needle test."""
    parser.add_argument(
        "--needle",
        metavar="TOKENS,…",
        help="lengths of prompts in which the model must find a needle",
    )
    parser.add_argument(
        "--prompts",
        type=int,
        help=f"prompts of each length and depth (default {NeedleConfig.prompts})",
    )


def print_needles(arguments: argparse.Namespace, workdir: Path) -> None:
    """Prints the table of lengths and depths, or all of it as JSON.

    Raises:
      UserError: lengths that are no numbers, or that the model does not reach.
    """
    try:
        lengths = tuple(int(text) for text in arguments.needle.split(","))
    except ValueError as error:
        raise UserError("needle", arguments.needle, "must be lengths such as 128,1024.") from error
    if min(lengths) < 1:
        raise UserError("needle", arguments.needle, "must name lengths of at least 1 token.")
    prompts = NeedleConfig.prompts if arguments.prompts is None else arguments.prompts
    asked = NeedleConfig(lengths, prompts=prompts)
    model = load(workdir)
    if model.config.structure != "decoder":
        raise UserError("model.structure", model.config.structure, "does not continue texts.")

    rows = []
    for row in find_needles(model.config, model.params, model.tokenizer, asked):
        if not arguments.json:
            print("\n".join(lines(row, asked, is_first=not rows)), flush=True)
        rows.append(row)
    if arguments.json:
        print(json.dumps(as_json(rows, asked, model.step), indent=2))


def as_json(rows: list[Row], asked: NeedleConfig, step: int) -> dict[str, Any]:
    """Returns the table as JSON holds it."""
    return {
        "step": step,
        "prompts": asked.prompts,
        "depths": list(asked.depths),
        "rows": [row._asdict() for row in rows],
    }


def lines(row: Row, asked: NeedleConfig, is_first: bool) -> list[str]:
    """Returns the line of a row, with a heading before the first one."""
    shares = [*row.found, row.guessed]
    line = f"{row.length:8,}  " + "".join(f"{share:7.2f}" for share in shares)
    if not is_first:
        return [line]
    depths = "".join(f"{depth:7.2f}" for depth in asked.depths)
    return [
        f"share of {asked.prompts} needles found, by their depth in a prompt (1 is its end)",
        f"{'tokens':>8}  {depths} without",
        line,
    ]
