"""Bodies of OpenAI's requests in this project's fields."""

from collections.abc import Mapping
from typing import Any

from research.core.errors import UserError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

# What changes no answer here.
_IGNORED = (
    "model",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
)
_RENAMED = {"max_completion_tokens": "max_tokens"}


def from_openai(body: Mapping[str, Any], url: str) -> dict[str, Any]:
    """Returns the fields of a body, in which null is a field that is not given; those of
    `SamplingConfig` that OpenAI does not have may be in it too.

    Args:
      body: of a request.
      url: `COMPLETIONS` or `CHAT`.

    Raises:
      UserError: a stream, or another prompt than belongs to the address.
    """
    fields = {}
    for name, value in body.items():
        if name not in _IGNORED and value is not None:
            fields[_RENAMED.get(name, name)] = value
    if fields.pop("stream", False) is not False:
        raise UserError("stream", True, "must be false: a file is no stream.")
    fields.pop("stream_options", None)

    prompt = "messages" if url == CHAT else "prompt"
    if prompt not in fields:
        raise UserError(prompt, constraint=f"is missing for {url}.")
    if url == CHAT:
        # Whether there are log-probabilities, and how many beside each.
        wants = fields.pop("logprobs", False)
        top = fields.pop("top_logprobs", 0)
        if not isinstance(wants, bool):
            raise UserError("logprobs", wants, "must be true or false.")
        if wants:
            fields["logprobs"] = top
    if "response_format" in fields:
        fields.update(_grammar(fields.pop("response_format")))
    return fields


def names_in(body: Mapping[str, Any], url: str) -> dict[str, str]:
    """Returns what a body calls the fields that `from_openai` makes of it, where that differs."""
    names = {}
    for name, own in _RENAMED.items():
        if name in body:
            names[own] = name
    if url == CHAT:
        names["logprobs"] = "top_logprobs"
    if "response_format" in body:
        names["json_schema"] = "response_format"
    return names


def _grammar(response: Any) -> dict[str, Any]:
    """Returns the grammar that `response_format` asks for."""
    kind = response.get("type") if isinstance(response, Mapping) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    named = response.get("json_schema") if kind == "json_schema" else None
    if isinstance(named, Mapping) and "schema" in named:
        return {"json_schema": named["schema"]}
    raise UserError(
        "response_format",
        response,
        "must have the type text, json_object, or json_schema with a schema.",
    )
