"""`tessera data`: build the tokenizer and the corpora of a config, and show what a model will
read.
"""

import argparse
import logging

import numpy as np

from research.data.objectives import bytes_per_target
from research.data.tokenizers import Tokenizer
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
    """Prints the first rows of the run, one line per document."""
    config = load_experiment(arguments.config, arguments.overrides)
    prepared = prepare_data(config)
    loader = make_loader(config, prepared)
    batch = next(loader)
    loader.close()
    if config.data.objective.predicts_all_text:
        bytes_per_token = bytes_per_target(prepared.heldout)
        logger.info("data: the held-out text has %.3f bytes a token", bytes_per_token)

    # The decoder's or only side is "", the encoder's "encoder_".
    sides = [name.removesuffix("tokens") for name in batch if name.endswith("tokens")]
    for row in range(min(arguments.rows, config.train.batch_size)):
        for side in sides:
            tokens = batch[f"{side}tokens"][row]
            segments = batch[f"{side}segments"][row]
            _print_row(f"{side}row {row}", tokens, segments, prepared.tokenizer)


def _print_row(name: str, tokens: np.ndarray, segments: np.ndarray, tokenizer: Tokenizer) -> None:
    # Segments [1, 1, 2, 0]: two documents and one token of padding.
    documents = int(segments.max())
    padding = int((segments == 0).sum())
    print(f"{name}: {documents} documents, {padding} of {len(segments)} padding")
    for segment in np.unique(segments[segments > 0]):
        ids = tokens[segments == segment].tolist()
        print(repr(tokenizer.decode(ids)))
