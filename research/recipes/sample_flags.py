"""The flags of `sample`: fields of `SamplingConfig` and `BeamConfig`, with their docstrings as
help.
"""

import argparse
import dataclasses
import re
from typing import Any

from research.inference.beam_config import BeamConfig
from research.inference.sampling_config import USUAL_SEED, SamplingConfig
from research.recipes import conversations, engine_flags, grammar_flags

# Fields of `BeamConfig` that are flags. Texts are searched where `--num_beams` is above 1, else
# sampled.
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
    add_decoding_arguments(parser)
    parser.add_argument(
        "--forced_prefix", help="text that every continuation found by beam search begins with"
    )
    engine_flags.add_arguments(parser)


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the fields of `SamplingConfig`, some of `BeamConfig`, and grammars."""
    parser.add_argument(
        "--stop", action="append", help="a string that ends the text; may be repeated"
    )
    # `--seed`, `--num_beams`, …: a flag is None where it is not given.
    sampled = [field for field in dataclasses.fields(SamplingConfig) if field.name != "stop"]
    searched = [field for field in dataclasses.fields(BeamConfig) if field.name in BEAM_FLAGS]
    kinds = {"stop_ids": _ids, "logit_bias": _biases, "seed": int}
    # What holds without a flag, where that is not the field's own default.
    defaults = {"num_beams": 1, "seed": USUAL_SEED}
    for config, fields in ((SamplingConfig, sampled), (BeamConfig, searched)):
        docs = _attribute_docs(config)
        for field in fields:
            default = defaults.get(field.name, field.default)
            text = f"{docs[field.name]} (default {default})"
            kind = kinds.get(field.name, field.type)
            parser.add_argument(f"--{field.name}", type=kind, help=text, metavar="X")
    grammar_flags.add_arguments(parser)


def _ids(text: str) -> tuple[int, ...]:
    """Returns `5,7` as ids."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be ids, as in 5,7") from error


def _biases(text: str) -> tuple[tuple[int, float], ...]:
    """Returns `5:-1.5,7:2` as pairs of an id and a bias."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return tuple((int(i), float(bias)) for i, bias in pairs)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be ids with their biases, as in 5:-1.5,7:2"
        ) from error


def _attribute_docs(config: type) -> dict[str, str]:
    """Returns the text about each field in a config's docstring, as one line without its full
    stop.
    """
    _, _, attributes = config.__doc__.partition("Attributes:")
    entries, _, _ = attributes.partition("\n\n")
    # Names and texts alternate: ["", "seed", "of the …", "stop", "strings …"].
    _, *parts = re.split(r"^ +(\w+): ", entries, flags=re.MULTILINE)
    docs = {}
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        docs[name] = " ".join(text.split()).removesuffix(".")
    return docs


def config_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields that flags give, but for `--forced_prefix`, which needs a tokenizer."""
    names = [field.name for field in dataclasses.fields(SamplingConfig)]
    fields = {}
    for name in (*names, *BEAM_FLAGS):
        value = getattr(arguments, name)
        if value is not None:
            fields[name] = tuple(value) if name == "stop" else value
    return fields
