"""Lines of a file of requests: OpenAI's batch form, or a prompt with its settings."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

from research.core import config as configs
from research.core.errors import UserError, nearest, shown
from research.core.random import SEEDS
from research.data.tokenizers import Tokenizer
from research.inference.beam_config import BeamConfig
from research.inference.grammar_config import KINDS, bind_grammar
from research.inference.openai_fields import CHAT, COMPLETIONS, from_openai, names_in
from research.inference.prompts import encode_ids
from research.inference.requests import Request, collect_prompts, decoding_config
from research.inference.sampling_config import USUAL_SEED, SamplingConfig
from research.models.language_model import LanguageModelConfig

logger = logging.getLogger("tessera")

# The form of a line that is none of OpenAI's.
PLAIN = "plain"
# A line has the seeds from its number times this on, one for each of its samples.
SEEDS_OF_A_LINE = 2**20
# Answers of a line, at most, as of OpenAI's interface.
MOST_ANSWERS = 128
# Digits of an id, at most: Python reads no number of thousands.
MOST_DIGITS = 20
PROMPTS = ("prompt", "ids", "messages")


@dataclasses.dataclass(frozen=True)
class LineOptions:
    """What a line may ask beside how its text is drawn, as `Request` has it.

    Attributes:
      n: answers.
      best_of: drawn ones, of which the `n` likeliest are returned.
      logprobs: likeliest ids beside each drawn one; None is no log-probabilities at all.
      prompt_logprobs: the same of the prompt.
      speculate: whether guesses may be read.
      priority: higher ones are served first.
      salt: only requests with the same one share pages.
    """

    n: int = 1
    best_of: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    speculate: bool = True
    priority: int = 0
    salt: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.n <= MOST_ANSWERS:
            raise UserError("n", self.n, f"must lie in [1, {MOST_ANSWERS}], the most of a line.")
        if self.best_of and not self.n <= self.best_of <= MOST_ANSWERS:
            rule = f"must lie in [n = {self.n}, {MOST_ANSWERS}], or be 0 for n."
            raise UserError("best_of", self.best_of, rule)


@dataclasses.dataclass(frozen=True)
class BatchLine:
    """A line that was read.

    Attributes:
      number: of it, from 1.
      id: its own, or its number.
      form: `plain`, or an address of OpenAI's interface.
      model: as the line names it.
      request: what it asks; None where it is malformed.
      wants_logprobs: whether log-probabilities are returned.
      error: why it is malformed, or None.
      names: what the line calls fields of `Request` that it does not call as that does.
    """

    number: int
    id: Any
    form: str = PLAIN
    model: str = ""
    request: Request | None = None
    wants_logprobs: bool = False
    error: str | None = None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)


class LineReader:
    """Reads lines for a model.

    Args:
      config: of the model.
      tokenizer: its own.
      defaults: fields that hold where a line does not say otherwise.
    """

    def __init__(
        self, config: LanguageModelConfig, tokenizer: Tokenizer, defaults: Mapping[str, Any]
    ):
        self._config = config
        self._tokenizer = tokenizer
        self._defaults = dict(defaults)

    def read(self, number: int, text: bytes) -> BatchLine:
        """Returns a line; a malformed one with its error."""
        line = BatchLine(number, number)
        try:
            values = _json_object(text)
            line = dataclasses.replace(line, **_heading(values))
            line = dataclasses.replace(line, names=_names(line, values))
            return self._with_request(line, values)
        except UserError as error:
            return dataclasses.replace(line, error=error.text(line.names))
        except Exception as error:
            # Of this line alone: the others go on.
            return dataclasses.replace(line, error=unexpected(number, error))

    def _with_request(self, line: BatchLine, values: dict[str, Any]) -> BatchLine:
        if line.form == PLAIN:
            fields = {name: value for name, value in values.items() if name != "id"}
        else:
            fields = from_openai(values["body"], line.form)
        if "prompt" in fields and not isinstance(fields["prompt"], str):
            fields["ids"] = fields.pop("prompt")
        given = [name for name in PROMPTS if name in fields]
        if len(given) != 1:
            raise UserError(f"exactly one of {', '.join(PROMPTS)} must be given.")
        (kind,) = given
        prompt = self._prompt_ids(kind, fields.pop(kind), fields.pop("tools", None))

        defaults = dict(self._defaults)
        if any(name in fields for name in KINDS):
            defaults = {name: value for name, value in defaults.items() if name not in KINDS}
        if fields.get("num_beams", 1) != 1:
            known = _names_of(BeamConfig)
            defaults = {name: value for name, value in defaults.items() if name in known}
        # A seed for each line: where prompts are the same, their answers are not. None is drawn, as
        # a line is answered alike by each call of the command.
        if "seed" in fields and fields["seed"] is None:
            del fields["seed"]
        first = defaults.get("seed", USUAL_SEED) + line.number * SEEDS_OF_A_LINE
        if "seed" in defaults or fields.get("num_beams", 1) == 1:
            defaults["seed"] = first % SEEDS
        options, request = _request(prompt, {**defaults, **fields})
        wants = options.logprobs is not None
        return dataclasses.replace(line, request=request, wants_logprobs=wants)

    def _prompt_ids(self, kind: str, value: Any, tools: Any) -> tuple[int, ...]:
        if tools is not None and kind != "messages":
            raise UserError("tools", constraint=": they belong to messages.")
        if kind == "messages":
            if not isinstance(value, list) or not value:
                raise UserError("messages", value, "must be a list of messages.")
            chat = None if tools is None else {"tools": tools}
            [prompt] = collect_prompts(self._tokenizer, None, None, value, chat)
        elif kind == "ids":
            [prompt] = collect_prompts(self._tokenizer, None, [value], None, None)
        else:
            prompt = value
        [ids] = encode_ids(self._config, self._tokenizer, [prompt])
        return tuple(ids)


def unexpected(number: int, error: Exception) -> str:
    """Returns what is said of a line that cannot be answered for a reason that nobody thought of;
    where it was raised is in the log of debugging.
    """
    logger.debug("line %d", number, exc_info=error)
    reason = " ".join(str(error).split())
    return f"the line cannot be answered: {type(error).__name__}: {reason}"


def _names(line: BatchLine, values: Mapping[str, Any]) -> dict[str, str]:
    """Returns what a line calls fields of `Request`."""
    fields = values if line.form == PLAIN else values["body"]
    names = {"count": "n"}
    for kind in PROMPTS:
        if kind in fields:
            names["ids"] = kind
    if line.form != PLAIN:
        names.update(names_in(fields, line.form))
    return names


def _json_object(text: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        values = json.loads(text.decode("utf-8"), parse_constant=refuse)
        # Half a surrogate pair is JSON, but no text.
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise UserError(f"the line is no JSON: {error}.") from error
    if not isinstance(values, dict):
        raise UserError("the line must be a JSON object.")
    return values


def _heading(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a line says of itself: its id, its form and its model."""
    if "custom_id" not in values:
        if "id" not in values:
            return {}
        if not isinstance(values["id"], str | int) or isinstance(values["id"], bool):
            raise UserError("id", values["id"], "must be text or a whole number.")
        return {"id": values["id"]}

    if not isinstance(values["custom_id"], str):
        raise UserError("custom_id", values["custom_id"], "must be text.")
    heading = {"id": values["custom_id"], "form": COMPLETIONS}
    for name in ("method", "url", "body"):
        if name not in values:
            raise UserError(name, constraint="is missing beside custom_id.")
    if values["method"] != "POST":
        raise UserError("method", values["method"], "must be 'POST'.")
    if values["url"] not in (COMPLETIONS, CHAT):
        raise UserError("url", values["url"], f"must be {COMPLETIONS!r} or {CHAT!r}.")
    body = values["body"]
    if not isinstance(body, dict):
        raise UserError("body", body, "must be an object.")
    model = body.get("model", "")
    if not isinstance(model, str):
        raise UserError("model", model, "must be text.")
    return {**heading, "form": values["url"], "model": model}


def _request(ids: tuple[int, ...], fields: dict[str, Any]) -> tuple[LineOptions, Request]:
    fields = dict(fields)
    names = _names_of(LineOptions)
    known = (*names, *KINDS, *PROMPTS, *_names_of(SamplingConfig), *_names_of(BeamConfig))
    for name in fields:
        if name not in known:
            raise UserError(name, constraint=f"is no field of a line. {nearest(name, known)}")
    own = {name: fields.pop(name) for name in names if name in fields}
    options = configs.bind(LineOptions, own)
    grammar = bind_grammar({name: fields.pop(name) for name in KINDS if name in fields})
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if isinstance(fields.get("logit_bias"), Mapping):
        fields["logit_bias"] = _pairs(fields["logit_bias"])
    how = decoding_config(fields)
    drawn = {} if isinstance(how, BeamConfig) else {"sampling": how}
    searched = {"beams": how} if isinstance(how, BeamConfig) else {}
    return options, Request(
        ids,
        **drawn,
        **searched,
        grammar=grammar,
        count=options.n,
        best_of=options.best_of,
        logprobs=options.logprobs or 0,
        prompt_logprobs=options.prompt_logprobs,
        speculate=options.speculate,
        priority=options.priority,
        salt=options.salt,
    )


def _pairs(biases: Mapping[str, Any]) -> list[tuple[int, Any]]:
    # {"5": -1} -> [(5, -1)]
    pairs = []
    for key, bias in biases.items():
        if not key.isdecimal() or len(key) > MOST_DIGITS:
            raise UserError("logit_bias", constraint=f": {shown(key)} must be an id.")
        pairs.append((int(key), bias))
    return pairs


def _names_of(config: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config)]
