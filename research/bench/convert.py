"""Conversion of a Hugging Face folder, in and out, beside a plain copy of its files."""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

from research.bench.convert_sides import SIDES
from research.bench.sides import spread
from research.core.errors import UserError
from research.interop import mapping
from research.interop.architecture import choose
from research.interop.huggingface import ARCHITECTURES, write_hugging_face
from research.models.config import AttentionConfig, MlpConfig, ModelConfig

# Of one layer with the widths below, and of the embeddings.
LAYER, EMBEDDINGS = 60_821_504, 2 * 1024 * 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default 3)")
    parser.add_argument("--megabytes", type=int, default=256, help="of the folder (default 256)")
    parser.add_argument("--dtype", default="float32", help="of the folder: float32 (the default) or bfloat16")
    parser.add_argument("--folder", help="where to work: the disk to measure (default: that of temporary files)")


def main(arguments: argparse.Namespace) -> None:
    """Measures the sides in turns, each a process of its own, and prints rates, ratios and memory with their spread."""
    if arguments.dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype = {arguments.dtype!r} is not float32 or bfloat16.")
    with tempfile.TemporaryDirectory(prefix="tessera-convert-", dir=arguments.folder) as place:
        folder = pathlib.Path(place)
        size = make_folder(folder / "source", arguments.megabytes * 10**6, arguments.dtype)
        print(f"a LLaMA of {size / 1e6:,.0f} MB of {arguments.dtype} in files of at most 1 GB, in the page cache after")
        print("the first round, which is not counted; every side waits until its files are on the disk")
        turns = [dict(_round(folder)) for _ in range(arguments.rounds + 1)][1:]
    for side in SIDES:
        rates = [size / 1e6 / turn[side]["seconds"] for turn in turns]
        peak = max(turn[side]["peak_bytes"] for turn in turns)
        print(f"  {side:5} {spread(rates, 0)} MB/s of the folder, at most {peak / 1e6:,.0f} MB of memory")
    for side in ("in", "out"):
        ratios = [turn["copy"]["seconds"] / turn[side]["seconds"] for turn in turns]
        print(f"  ratio {spread(ratios, 2)} {side} / copy")


def make_folder(folder: pathlib.Path, size: int, dtype: str) -> int:
    """Makes a Hugging Face folder of about `size` bytes of weights, and returns how many it has."""
    layers = max(1, round((size / np.dtype(dtype).itemsize - EMBEDDINGS) / LAYER))
    config = ModelConfig(
        vocab_size=1024,
        num_layers=layers,
        embed_dim=2048,
        max_length=2048,
        attention=AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=64),
        mlp=MlpConfig(hidden_dim=8192),
    )
    noise = np.random.default_rng(0).standard_normal(2**22, dtype=np.float32)
    shapes = mapping.unrolled_shapes(config)

    def read(name: str, box: mapping.Box) -> np.ndarray:
        return np.resize(noise, shapes[name].shape)[box]

    architecture, fields = choose(ARCHITECTURES.values(), config)
    write_hugging_face(architecture, fields, config, read, folder, {}, dtype, shard_bytes=10**9)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _round(folder: pathlib.Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Yields each side and what its turn took; `out` reads what `in` has made."""
    targets = {"copy": folder / "copy", "in": folder / "workdir", "out": folder / "back"}
    for target in targets.values():
        shutil.rmtree(target, ignore_errors=True)
    for side, target in targets.items():
        command = [sys.executable, "-m", "research.bench.convert_sides", side, folder / "source", target]
        yield side, json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
