"""`tessera data`: build the tokenizer and the corpora of a config, and show what a model will
read.
"""

import argparse
import logging

import numpy as np

from research.data.objectives import bytes_per_target
from research.recipes.experiment import add_config_argument, load_experiment
from research.recipes.inputs import make_loader, prepare_data

logger = logging.getLogger("tessera")

EXAMPLES = """\
  tessera data --config=configs/pretrain/stdlib.py
  tessera data --config=configs/pretrain/stdlib.py --config.data.tokenizer.kind=bytes
  tessera data --config=configs/pretrain/stdlib.py --rows=2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this verb."""
    add_config_argument(parser)
    parser.add_argument(
        "--rows", type=int, default=1, help="rows of the first batch to show (default 1)"
    )


def main(arguments: argparse.Namespace) -> None:
    """Prints the first rows of the run, a document a paragraph."""
    config = load_experiment(arguments.config, arguments.overrides)
    prepared = prepare_data(config)
    loader = make_loader(config, prepared)
    batch = next(loader)
    loader.close()
    if config.data.objective.predicts_all_text:
        logger.info(
            "data: the held-out text has %.3f bytes a token", bytes_per_target(prepared.heldout)
        )
    sides = [name.removesuffix("tokens") for name in batch if name.endswith("tokens")]
    for row in range(min(arguments.rows, config.train.batch_size)):
        for side in sides:
            tokens, segments = batch[f"{side}tokens"][row], batch[f"{side}segments"][row]
            empty = int((segments == 0).sum())
            print(
                f"{side}row {row}: {int(segments.max())} documents, {empty} of {len(segments)} "
                "padding"
            )
            for segment in np.unique(segments[segments > 0]):
                print(repr(prepared.tokenizer.decode(tokens[segments == segment].tolist())))
