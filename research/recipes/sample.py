"""`tessera sample`: continue prompts, or answer messages, with a trained model."""

import argparse
import dataclasses
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from research.core.errors import UserError
from research.inference.beam_config import BeamConfig
from research.inference.detokenizer import Completion
from research.inference.prompts import CACHES, check_cache
from research.inference.requests import decoding_config
from research.inference.sampling import SamplingConfig
from research.recipes import conversations, loaded
from research.recipes.conversations import Conversation
from research.recipes.loaded import LoadedModel
from research.storage import files
from research.storage.paths import Path, as_path, reason

logger = logging.getLogger("tessera")

EXAMPLES = """\
  tessera sample --workdir=runs/stdlib --prompt="def main(" --temperature=0.8
  tessera sample --workdir=runs/stdlib --prompt="class " --prompt="import " --top_p=0.9
  tessera sample --workdir=runs/stdlib --prompt="The " --temperature=0 --stop="."
  tessera sample --workdir=runs/stdlib --prompt="def " --num_beams=4 --no_repeat_ngram=3
  tessera sample --workdir=runs/llama-instruct --chat --prompt="Why is the sky blue?"
  tessera sample --workdir=runs/llama-instruct --chat
  tessera sample --workdir=runs/llama-instruct --messages=conversation.json --max_tokens=512"""

# Fields of `BeamConfig` that are flags; texts are searched where `--num_beams` is above 1, and
# drawn else.
BEAM_FLAGS = ("num_beams", "length_penalty", "no_repeat_ngram")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the fields of `SamplingConfig` and some of `BeamConfig` as flags."""
    parser.add_argument("--workdir", required=True, help="folder of a trained model")
    parser.add_argument(
        "--prompt",
        dest="prompts",
        action="append",
        default=[],
        help="text to continue; may be given several times",
    )
    conversations.add_arguments(parser)
    parser.add_argument(
        "--stop", action="append", help="a string that ends the text; may be repeated"
    )
    drawn = [field for field in dataclasses.fields(SamplingConfig) if field.name != "stop"]
    searched = [field for field in dataclasses.fields(BeamConfig) if field.name in BEAM_FLAGS]
    for config, fields in ((SamplingConfig, drawn), (BeamConfig, searched)):
        says = _meanings(config)
        for field in fields:
            default = 1 if field.name == "num_beams" else field.default
            says_it = f"{says[field.name]} (default {default})"
            parser.add_argument(f"--{field.name}", type=field.type, help=says_it, metavar="X")
    parser.add_argument(
        "--cache", default="dense", help=f"form of the KV cache: {' or '.join(CACHES)}", metavar="X"
    )
    parser.add_argument(
        "--forced_prefix", help="text that every continuation found by beam search begins with"
    )


def _meanings(config: type) -> dict[str, str]:
    """Returns what a config's docstring says of each field, as one line without its full stop."""
    _, _, attributes = config.__doc__.partition("Attributes:")
    entries, _, _ = attributes.partition("\n\n")
    # Name and text take turns: ["", "seed", "of the …", "stop", "strings …"].
    parts = re.split(r"^ +(\w+): ", entries, flags=re.MULTILINE)[1:]
    return {
        name: " ".join(text.split()).removesuffix(".")
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    }


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields that flags name, but for `--forced_prefix`, which a tokenizer must
    read.
    """
    names = [field.name for field in dataclasses.fields(SamplingConfig)] + list(BEAM_FLAGS)
    fields = {
        name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None
    }
    return {name: tuple(value) if name == "stop" else value for name, value in fields.items()}


def main(arguments: argparse.Namespace) -> None:
    """Prints each prompt with its continuation, or each answer, and adds them to `samples.txt` of
    the workdir.
    """
    fields = given(arguments)
    # What is wrong is said before a model is loaded.
    decoding_config(fields)
    check_cache(arguments.cache)
    asked = conversations.from_flags(arguments)
    workdir = as_path(arguments.workdir, "workdir")
    model = loaded.load(workdir)
    if asked is not None and not model.tokenizer.chat_templates:
        flag = "--chat" if arguments.messages is None else "--messages"
        raise UserError(
            f"{flag}: the model of {workdir} has no chat template. Use --prompt alone to continue "
            "a text."
        )
    if arguments.forced_prefix is not None:
        fields["forced_prefix"] = tuple(model.tokenizer.encode(arguments.forced_prefix))
    fields["cache"] = arguments.cache
    if asked is None:
        _continue(model, workdir, arguments.prompts or [""], fields)
    elif asked:
        _answer(model, workdir, asked, fields)
    else:
        _converse(model, workdir, conversations.beginning(arguments), fields)


def _continue(
    model: LoadedModel, workdir: Path, prompts: list[str], fields: Mapping[str, Any]
) -> None:
    start = time.monotonic()
    texts = model.generate(prompts, **fields)
    # What an encoder reads is not continued but answered.
    between = "\n" if model.config.structure == "encoder_decoder" else ""
    shown = "\n\n".join(
        prompt + between + text.text for prompt, text in zip(prompts, texts, strict=True)
    )
    print(shown, flush=True)
    _report(model, texts, start)
    _keep(model, workdir, shown, fields)


def _answer(
    model: LoadedModel, workdir: Path, asked: list[Conversation], fields: Mapping[str, Any]
) -> list[str]:
    """Prints and returns the answer to each conversation; beside each is kept what it answers."""
    start = time.monotonic()
    texts = model.generate(messages=asked, **fields)
    print("\n\n".join(text.text for text in texts), flush=True)
    _report(model, texts, start)
    pairs = zip(asked, texts, strict=True)
    shown = "\n\n".join(
        f"{json.dumps(messages, ensure_ascii=False)}\n{text.text}" for messages, text in pairs
    )
    _keep(model, workdir, shown, fields)
    return [text.text for text in texts]


def _converse(
    model: LoadedModel, workdir: Path, begin: Conversation, fields: Mapping[str, Any]
) -> None:
    """Answers the lines of standard input, each in view of all before, until they end."""
    conversation = list(begin)
    for line in conversations.lines():
        conversation.append({"role": "user", "content": line})
        [answer] = _answer(model, workdir, [conversation], fields)
        conversation.append({"role": "assistant", "content": answer})


def _report(model: LoadedModel, texts: Sequence[Completion], start: float) -> None:
    count, seconds = sum(len(text.tokens) for text in texts), time.monotonic() - start
    logger.info("%d tokens in %.1f s, compilation included; step %d", count, seconds, model.step)


def _keep(model: LoadedModel, workdir: Path, shown: str, fields: Mapping[str, Any]) -> None:
    kept = workdir / "samples.txt"
    how = decoding_config({name: value for name, value in fields.items() if name != "cache"})
    try:
        files.append_text(kept, f"step {model.step}, {how}\n{shown}\n\n")
    except OSError as error:  # a model that one may only read is a model all the same
        logger.warning("%s cannot be written: %s", kept, reason(error))
