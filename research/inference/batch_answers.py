"""Answers to lines of a file, as JSON in the form of the line."""

import json
from collections.abc import Sequence
from typing import Any

from research.data.tokenizers import Tokenizer
from research.inference.answers import Answer, Sample, TokenLogprobs
from research.inference.batch_lines import PLAIN, BatchLine, unexpected
from research.inference.openai_answers import answer_body, response


def error_value(line: BatchLine, message: str) -> dict[str, Any]:
    """Returns what is written for a line that has no answer."""
    error = {"message": message, "type": "invalid_request_error"}
    if line.form == PLAIN:
        return {"id": line.id, "line": line.number, "error": {"message": message}}
    return response(line, 400, {"error": error})


def answer_value(line: BatchLine, answer: Answer, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns what is written for an answer that has ended, which is JSON: an error where it cannot
    be.
    """
    try:
        value = _answer_value(line, answer, tokenizer)
        # Neither infinity nor half a surrogate pair is JSON in a file.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except Exception as error:
        # Of this line alone: the others go on.
        return error_value(line, unexpected(line.number, error))
    return value


def _answer_value(line: BatchLine, answer: Answer, tokenizer: Tokenizer) -> dict[str, Any]:
    # Those that have an error are the worst.
    samples = [sample for sample in answer.best() if sample.error is None]
    errors = [sample.error for sample in answer.samples if sample.error is not None]
    if answer.error is not None:
        return error_value(line, answer.error)
    if answer.beams is None and len(samples) < answer.request.count:
        return error_value(line, errors[0])
    if line.form != PLAIN:
        return response(line, 200, answer_body(line, answer, samples, tokenizer))

    value: dict[str, Any] = {"id": line.id, "line": line.number}
    value["answers"] = _plain_answers(line, answer, samples)
    if answer.request.prompt_logprobs is not None:
        places = sorted(answer.prompt_logprobs)
        value["prompt_logprobs"] = [_plain(answer.prompt_logprobs[each]) for each in places]
    return value


def _plain_answers(
    line: BatchLine, answer: Answer, samples: Sequence[Sample]
) -> list[dict[str, Any]]:
    found = []
    for beam in answer.beams or ():
        found.append({"text": beam.text, "tokens": list(beam.tokens), "score": beam.score})
    for sample in samples:
        completion = sample.completion()
        value = {
            "text": completion.text,
            "tokens": list(completion.tokens),
            "finish": completion.finish,
            "stop_match": completion.stop_match,
            "seed": sample.seed,
        }
        if line.wants_logprobs:
            value["logprobs"] = [_plain(each) for each in sample.logprobs]
        found.append(value)
    return found


def _plain(found: TokenLogprobs) -> dict[str, Any]:
    value: dict[str, Any] = {"token": found.token, "logprob": found.logprob}
    if found.top:
        value["top"] = [list(pair) for pair in found.top]
    return value
