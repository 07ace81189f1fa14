"""`tessera evaluate`: bits per byte of held-out text, beside gzip and byte n-grams on the same
bytes; with `--needle`, how often a model finds a needle in long texts.
"""

import argparse
import json
import math
from typing import Any

from research.core.config import bind
from research.core.errors import UserError, within
from research.data.sources import SourceReport, split_documents
from research.evaluation.baselines import ByteNgram, bits_per_byte, gzip_bits
from research.recipes.experiment import ExperimentConfig
from research.recipes.needles import add_needle_arguments, print_needles
from research.recipes.workdir import read_config
from research.storage.paths import Path, as_path
from research.training import metrics

EXAMPLES = """\
  tessera evaluate --workdir=runs/stdlib
  tessera evaluate --workdir=runs/stdlib --order=6 --json
  tessera evaluate --workdir=runs/long --needle=128,1024"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this verb."""
    parser.add_argument("--workdir", required=True, help="folder of a training run")
    parser.add_argument("--order", type=int, default=5, help="bytes of an n-gram (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_needle_arguments(parser)


def main(arguments: argparse.Namespace) -> None:
    """Prints the table."""
    if not 1 <= arguments.order <= 8:
        raise UserError("order", arguments.order, "must lie in [1, 8].")
    workdir = as_path(arguments.workdir, "workdir")
    if arguments.needle is not None:
        print_needles(arguments, workdir)
        return
    if arguments.prompts is not None:
        raise UserError("prompts", arguments.prompts, "is for --needle.")
    result = evaluate(workdir, arguments.order)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(f"held out: {result['documents']:,} documents, {result['bytes']:,} bytes")
    for row in result["bits_per_byte"]:
        print(f"{row['bits_per_byte']:8.3f} bits per byte  {row['name']}")


def evaluate(workdir: Path, order: int) -> dict[str, Any]:
    """Returns the held-out bits per byte of a run's last evaluation and of the baselines.

    Raises:
      UserError: no workdir of a run, no evaluation in it yet, or an objective that does not predict
          all of the text.
    """
    config = bind(ExperimentConfig, read_config(workdir))
    rows = [row for row in metrics.evaluations(workdir) if "eval/bits_per_byte" in row]
    if not rows:
        raise UserError(
            "workdir",
            workdir,
            "has no evaluation in bits per byte: train until one is logged, with an objective that "
            "predicts all of the text.",
        )
    last = rows[-1]
    train, heldout = _texts(config)
    read = _first_bytes(train, _bytes_read(config, last))

    table = [(f"this run at step {last['step']}", last["eval/bits_per_byte"])]
    # A run may have read a part of the training text, which the second n-gram counts whole.
    parts = {"as much text as the run read": read, "all training text": train}
    for name, part in parts.items():
        bits = ByteNgram(part, order).bits(heldout)
        size = sum(map(len, part)) / 1e6
        table.append((f"byte {order}-gram of {name} ({size:.1f} MB)", bits_per_byte(bits, heldout)))
    table.append(("gzip -9", bits_per_byte(gzip_bits(heldout), heldout)))
    return {
        "documents": len(heldout),
        "bytes": sum(map(len, heldout)),
        "bits_per_byte": [{"name": name, "bits_per_byte": bits} for name, bits in table],
    }


def _texts(config: ExperimentConfig) -> tuple[list[bytes], list[bytes]]:
    """Returns the documents to train on, and those held out."""
    texts: dict[str, list[bytes]] = {"train": [], "heldout": []}
    for index, source in enumerate(config.data.sources):
        with within(f"data.sources.{index}"):
            for split, document in split_documents(source, SourceReport()):
                texts[split].append(document.text.encode())
    return texts["train"], texts["heldout"]


def _bytes_read(config: ExperimentConfig, last: dict[str, Any]) -> int:
    """Returns about how many bytes of text the run had trained on at its last evaluation."""
    tokens = last["step"] * config.train.batch_size * config.train.sequence_length
    # Both are the same loss: nats per token = ln 2 · bits per byte · bytes per token.
    nats_a_byte = math.log(2) * last["eval/bits_per_byte"]
    return round(tokens * last["eval/loss"] / nats_a_byte)


def _first_bytes(texts: list[bytes], size: int) -> list[bytes]:
    """Returns the first documents that have so many bytes together, the last of them cut."""
    taken = []
    left = size
    for text in texts:
        if left <= 0:
            break
        taken.append(text[:left])
        left -= len(text)
    return taken
