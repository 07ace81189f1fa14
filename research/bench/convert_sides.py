"""The sides of `tessera bench convert`: one round of one of them, in a process of its own."""

import json
import os
import pathlib
import re
import shutil
import sys
import time

from research.core import backend
from research.interop import mapping
from research.interop.architecture import choose
from research.interop.huggingface import ARCHITECTURES, open_hugging_face, write_hugging_face
from research.training.checkpoint_stream import ParamsReader, write_params


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies the files of a folder, and waits until they are on the disk."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
            with place.open("rb") as file:
                os.fsync(file.fileno())


def convert_in(source: pathlib.Path, target: pathlib.Path) -> None:
    """Makes a checkpoint of a Hugging Face folder."""
    model = open_hugging_face(source)
    write_params(target, 0, mapping.unrolled_shapes(model.config), model.weights.slices())


def convert_out(source: pathlib.Path, target: pathlib.Path) -> None:
    """Makes a Hugging Face folder, like the one at `source`, of the checkpoint beside it."""
    config = open_hugging_face(source).config
    reader = ParamsReader(source.parent / "workdir", 0, mapping.unrolled_shapes(config))
    architecture, fields = choose(ARCHITECTURES.values(), config)
    write_hugging_face(architecture, fields, config, reader.read, target, {})
    reader.check()


SIDES = {"copy": copy, "in": convert_in, "out": convert_out}


def main() -> None:
    """Runs one round; prints its seconds and the most memory that the process has had."""
    backend.configure()  # as every verb does: for its memory, since JAX has started and is not used
    side, source, target = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
    start = time.perf_counter()
    SIDES[side](source, target)
    seconds = time.perf_counter() - start
    # Not `getrusage`, whose maximum counts the process that started this one, too.
    peak = re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    print(json.dumps({"seconds": seconds, "peak_bytes": 1024 * int(peak[1])}))


if __name__ == "__main__":
    main()
