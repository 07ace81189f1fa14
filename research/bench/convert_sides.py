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
            copied = target / path.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
            with copied.open("rb") as file:
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
    # As every verb does, for its settings of the allocator; JAX itself is not used.
    backend.configure()
    _, side, source, target = sys.argv
    start = time.perf_counter()
    SIDES[side](pathlib.Path(source), pathlib.Path(target))
    seconds = time.perf_counter() - start
    # Not `getrusage`, whose maximum counts the process that started this one, too.
    status = pathlib.Path("/proc/self/status").read_text()
    peak_kilobytes = int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])
    print(json.dumps({"seconds": seconds, "peak_bytes": 1024 * peak_kilobytes}))


if __name__ == "__main__":
    main()
