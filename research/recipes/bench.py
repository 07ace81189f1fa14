"""`tessera bench NAME`: measure this project beside a peer, interleaved in one run."""

import argparse
import importlib

EXAMPLES = """\
  tessera bench train --json=docs/figures/train.json
  tessera bench train --dtype=float32 --rounds=5
  tessera bench loader
  tessera bench attention --target=cpu
  tessera bench attention --target=tpu-schedule --chips=v5e --lengths=4096
  tessera bench kernels --only=cross_entropy,decode_attention
  tessera bench convert --megabytes=3000 --dtype=bfloat16
  tessera bench families --only=gemma,mixtral,t5
  tessera bench latent --batch=8
  tessera bench parallel --only=volume,bubble
  tessera bench compile --json=docs/figures/compile.json
  tessera bench commits --before=HEAD~10 --only=train,attention
  tessera bench exactness --only=LLaMA --dtype=bfloat16
  tessera bench decode --dtype=float32 --json=docs/figures/decode.json
  tessera bench engine --only=arrivals,prefix --rate=2"""

# Each is a module of `research.bench` with `add_arguments` and `main`.
BENCHES = (
    "train",
    "loader",
    "attention",
    "kernels",
    "convert",
    "families",
    "latent",
    "parallel",
    "compile",
    "commits",
    "exactness",
    "decode",
    "engine",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of each bench under its name."""
    benches = parser.add_subparsers(dest="bench", required=True, metavar="|".join(BENCHES))
    for name in BENCHES:
        bench = importlib.import_module(f"research.bench.{name}")
        # The first line of a bench's docstring is its help.
        summary, *_ = bench.__doc__.splitlines()
        parser = benches.add_parser(name, prog=f"tessera bench {name}", help=summary)
        bench.add_arguments(parser)


def main(arguments: argparse.Namespace) -> None:
    """Runs one bench."""
    importlib.import_module(f"research.bench.{arguments.bench}").main(arguments)
