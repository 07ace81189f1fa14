"""`tessera sample`: continue prompts, or answer messages, with a trained model."""

import argparse
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from research.core.errors import UserError
from research.inference.requests import decoding_config
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import bind_serve
from research.inference.text import Completion
from research.recipes import conversations, engine_flags, grammar_flags, sample_flags
from research.recipes.conversations import Conversation
from research.recipes.loaded import LoadedModel
from research.storage import files
from research.storage.paths import Path, as_path, reason

logger = logging.getLogger("tessera")

Fields = Mapping[str, Any]

EXAMPLES = """\
  tessera sample --workdir=runs/stdlib --prompt="def main(" --temperature=0.8
  tessera sample --workdir=runs/stdlib --prompt="class " --prompt="import " --top_p=0.9
  tessera sample --workdir=runs/stdlib --prompt="The " --temperature=0 --stop="."
  tessera sample --workdir=runs/stdlib --prompt="def " --num_beams=4 --no_repeat_ngram=3
  tessera sample --workdir=runs/stdlib --prompt="def main(" --speculate=lookup
  tessera sample --workdir=runs/stdlib --prompt="x" --speculate=draft --draft=runs/smaller
  tessera sample --workdir=runs/stdlib --prompt="x = " --regex="[0-9]+"
  tessera sample --workdir=runs/stdlib --prompt="def " --config.mesh.tensor=2
  tessera sample --workdir=runs/llama-instruct --chat --prompt="Why is the sky blue?"
  tessera sample --workdir=runs/llama-instruct --chat
  tessera sample --workdir=runs/llama-instruct --messages=conversation.json --max_tokens=512"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this verb."""
    sample_flags.add_arguments(parser)


def main(arguments: argparse.Namespace) -> None:
    """Prints each prompt with its continuation, or each answer, and adds them to `samples.txt` of
    the workdir.
    """
    fields = sample_flags.config_fields(arguments)
    # Mistakes in flags are found before a model is loaded.
    decoding_config(fields)
    grammar = grammar_flags.from_flags(arguments)
    guessing = engine_flags.guessing(arguments)
    options = {"grammar": grammar, "debug_nans": arguments.debug_nans, **guessing}
    messages = conversations.from_flags(arguments)

    workdir = as_path(arguments.workdir, "workdir")
    model, draft = engine_flags.load_models(arguments, workdir, bind_serve(guessing))
    if draft is not None:
        options["draft"] = draft
    if messages is not None and not model.tokenizer.chat_templates:
        flag = "--chat" if arguments.messages is None else "--messages"
        raise UserError(
            f"{flag}: the model of {workdir} has no chat template. Use --prompt alone to continue "
            "a text."
        )
    if arguments.forced_prefix is not None:
        fields["forced_prefix"] = tuple(model.tokenizer.encode(arguments.forced_prefix))

    # Prompts to continue, conversations to answer, or one that comes line by line.
    if messages is None:
        _continue(model, workdir, arguments.prompts or [""], fields, options)
    elif messages:
        _answer(model, workdir, messages, fields, options)
    else:
        _chat(model, workdir, conversations.system_message(arguments), fields, options)


def _continue(
    model: LoadedModel, workdir: Path, prompts: list[str], fields: Fields, options: Fields
) -> None:
    start = time.monotonic()
    completions = model.generate(prompts, **fields, **options)

    # An encoder's prompt is answered rather than continued.
    between = "\n" if model.config.structure == "encoder_decoder" else ""
    pairs = zip(prompts, completions, strict=True)
    texts = [prompt + between + completion.text for prompt, completion in pairs]
    shown = "\n\n".join(texts)
    print(shown, flush=True)
    _log_speed(model, completions, start)
    _append_samples(model, workdir, shown, fields)


def _answer(
    model: LoadedModel, workdir: Path, asked: list[Conversation], fields: Fields, options: Fields
) -> list[str]:
    """Prints and returns the answer to each conversation; `samples.txt` has the conversations,
    too.
    """
    start = time.monotonic()
    completions = model.generate(messages=asked, **fields, **options)
    answers = [completion.text for completion in completions]
    print("\n\n".join(answers), flush=True)
    _log_speed(model, completions, start)

    pairs = zip(asked, answers, strict=True)
    shown = []
    for messages, answer in pairs:
        asked_json = json.dumps(messages, ensure_ascii=False)
        shown.append(f"{asked_json}\n{answer}")
    _append_samples(model, workdir, "\n\n".join(shown), fields)
    return answers


def _chat(
    model: LoadedModel, workdir: Path, system: Conversation, fields: Fields, options: Fields
) -> None:
    """Answers each line of standard input as the next message of one conversation."""
    conversation = list(system)
    for line in conversations.stdin_lines():
        conversation.append({"role": "user", "content": line})
        [answer] = _answer(model, workdir, [conversation], fields, options)
        conversation.append({"role": "assistant", "content": answer})


def _log_speed(model: LoadedModel, completions: Sequence[Completion], start: float) -> None:
    seconds = time.monotonic() - start
    count = sum(len(completion.tokens) for completion in completions)
    logger.info("%d tokens in %.1f s, compilation included; step %d", count, seconds, model.step)


def _append_samples(model: LoadedModel, workdir: Path, shown: str, fields: Fields) -> None:
    """Appends what was printed to `samples.txt`, with the settings that it was made with."""
    path = workdir / "samples.txt"
    settings = decoding_config(fields)
    if isinstance(settings, SamplingConfig):
        settings = settings.with_seed()
    try:
        files.append_text(path, f"step {model.step}, {settings}\n{shown}\n\n")
    except OSError as error:
        # A workdir may be read-only.
        logger.warning("%s cannot be written: %s", path, reason(error))
