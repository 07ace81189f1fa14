"""`tessera generate`: answer the lines of a file, of any size, with a trained model."""

import argparse
import logging
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from research.core import config as configs
from research.core.errors import UserError
from research.core.progress import Progress
from research.inference.batch_lines import BatchLine, LineReader
from research.inference.offline import LONGEST_LINE, answer_lines, file_digest, numbered_lines
from research.inference.requests import decoding_config
from research.inference.serve_config import ANSWER_FIELDS, ServeConfig
from research.recipes import engine_flags, grammar_flags, sample_flags
from research.recipes.loaded import LoadedModel
from research.storage.line_log import LineLog
from research.storage.paths import Path, as_path, local_path, reason

logger = logging.getLogger("tessera")

EXAMPLES = """\
  tessera generate --workdir=runs/stdlib --in=prompts.jsonl --out=answers.jsonl
  tessera generate --workdir=runs/stdlib --in=prompts.jsonl --out=answers.jsonl --max_tokens=64
  tessera generate --workdir=runs/stdlib --in=prompts.jsonl --out=answers.jsonl \\
      --serve=configs/serve/default.py --speculate=lookup --config.mesh.tensor=2

a line of --in is one of
  {"prompt": "def main(", "max_tokens": 40, "temperature": 0.7}
  {"id": "a", "messages": [{"role": "user", "content": "Hello"}], "regex": "[a-z]+"}
  {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": "import "}}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this verb."""
    parser.add_argument("--workdir", required=True, help="folder of a trained model")
    parser.add_argument(
        "--in", dest="source", required=True, help="file of JSON lines, each a request"
    )
    parser.add_argument(
        "--out",
        required=True,
        help="file that answers are appended to, a JSON line each, in any order; a command that "
        "was stopped answers what is missing when it is called again",
    )
    parser.add_argument("--serve", metavar="FILE.py", help="config of the engine")
    sample_flags.add_decoding_arguments(parser)
    engine_flags.add_arguments(parser)


def main(arguments: argparse.Namespace) -> None:
    """Answers each line that has no answer yet."""
    # Mistakes in flags are found before a model is loaded.
    defaults = _defaults(arguments)
    guessing = engine_flags.guessing(arguments)
    serve = engine_flags.serve_config(arguments.serve, guessing, arguments.debug_nans)
    source = as_path(arguments.source, "in")
    out = local_path("out", arguments.out)
    try:
        digest, total = file_digest(source)
    except OSError as error:
        raise UserError("--in", source, f"cannot be read: {reason(error)}.") from error

    workdir = as_path(arguments.workdir, "workdir")
    model, draft = engine_flags.load_models(arguments, workdir, serve)
    with LineLog(out, _source(digest, model, serve, defaults)) as log:
        # One byte a line, from 1.
        is_done = bytearray(total + 1)
        for value in log.values():
            is_done[_line_number(out, value, total)] = 1
        done = sum(is_done)
        if done:
            logger.info("%s has %s answers already", out, f"{done:,}")
        reader = LineReader(model.config, model.tokenizer, defaults)
        start = time.monotonic()
        count = 0
        with Progress("generate", total, unit="lines") as progress:
            progress.advance(done)

            def write(value: dict[str, Any]) -> None:
                nonlocal count
                log.append(value)
                count += 1
                progress.advance()

            lines = _lines_to_answer(source, is_done, reader)
            answer_lines(model.engine_for(serve, draft), model.tokenizer, lines, write)
    seconds = time.monotonic() - start
    logger.info("%s: %s answers in %.1f s, compilation included", out, f"{count:,}", seconds)


def _defaults(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields that hold where a line does not say otherwise."""
    defaults = sample_flags.config_fields(arguments)
    decoding_config(defaults)
    grammar = grammar_flags.from_flags(arguments)
    if grammar is not None:
        defaults.update(grammar.given())
    return defaults


def _source(
    digest: str, model: LoadedModel, serve: ServeConfig, defaults: dict[str, Any]
) -> dict[str, Any]:
    """Returns what the answers are of: all that decides them, and nothing of where it lies."""
    config = configs.plain(model.config)
    params = model.params_digest
    assert params is not None, "a loaded checkpoint has a digest"
    return {
        "in": digest,
        "dtype": [config.pop("dtype"), config.pop("param_dtype")],
        "step": model.step,
        "params": params.hex(),
        "tokenizer": model.tokenizer.digest(),
        # How layers are run is not what they compute.
        "model": {name: config[name] for name in config if name not in ("layer_loop", "remat")},
        "serve": {name: getattr(serve, name) for name in ANSWER_FIELDS},
        "defaults": configs.plain(defaults),
    }


def _line_number(out: pathlib.Path, value: dict[str, Any], total: int) -> int:
    number = value.get("line")
    if not isinstance(number, int) or not 1 <= number <= total:
        raise UserError("--out", out, f"has an answer to line {number!r}, which --in has not.")
    return number


def _lines_to_answer(
    source: Path, is_done: bytearray, reader: LineReader
) -> Iterator[tuple[BatchLine, int]]:
    for number, text in numbered_lines(source):
        if is_done[number]:
            continue
        if text is None:
            error = f"the line has more than {LONGEST_LINE:,} bytes."
            yield BatchLine(number, number, error=error), 0
        else:
            yield reader.read(number, text), len(text)
